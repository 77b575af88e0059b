"""A VLM, data and recipes for training tests that take a second; as a script, runs that may kill themselves.

Not a test file.

    python tests/tiny_training.py ROOT RUN… [--resume] [--signal STAGE UPDATE NAME]

trains by RUN/recipe.json, several runs one after another; process N of those that train together writes
RUN/finalN.safetensors, and the stages' validation losses into RUN/resultsN.json. RUN/options.json, if there is one,
says otherwise for one run: {"root", "resume", "unreadable", "chats", "sweep"};
sweep: updates of a range test.
"""

import argparse
import io
import json
import math
import os
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_llm
from torch import Tensor

from vpgtrans.config import HuggingFaceEncoderConfig, ImageConfig, ProjectorConfig, PromptConfig, QFormerConnectorConfig
from vpgtrans.data.config import DataSource
from vpgtrans.data.formats import Opened
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.rows import ListRows
from vpgtrans.data.sources import Source
from vpgtrans.errors import VpgTransError
from vpgtrans.llm import open_llm
from vpgtrans.processes import first_process
from vpgtrans.projector import Projector
from vpgtrans.recipe import Recipe, parse_recipe
from vpgtrans.runs.directory import RunDirectory
from vpgtrans.runs.training import run_stages
from vpgtrans.training import rates
from vpgtrans.training.fit import StageResult
from vpgtrans.training.module import StageModule
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM

SIDE = 28
COLOURS = ("red", "white", "blue", "yellow")
THINGS = ("cat", "clock on the wall", "flag of Japan with a red sun", "helmet", "sofa")

WARMUP: dict[str, Any] = {
    "name": "warmup", "trainable": {"projector": "full"}, "lr": 5e-3, "budget": {"samples": 24}, "batch_size": 4,
    "validate_every": 8,
}  # fmt: skip
FINETUNE: dict[str, Any] = {
    "name": "finetune", "trainable": {"connector": "full", "projector": "full", "llm": "lora"}, "lr": 2e-3,
    "budget": {"samples": 24}, "batch_size": 4, "validate_every": 8, "augment": False, "lora": {"dropout": 0.1},
}  # fmt: skip


class Pictures(Source):
    """Noise images with captions, without a file. Rows in `unreadable` can't be read."""

    def __init__(self, count: int, *, seed: int = 0, unreadable: Collection[int] = ()):
        self.ids = [f"s{seed}-{row:02d}" for row in range(count)]
        self.captions = [f"a {COLOURS[row % 4]} {THINGS[row % 5]}" for row in range(count)]
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        images = [b"no image" if row in unreadable else _png(array) for row, array in enumerate(pixels)]
        records = [
            {"id": name, "image": image, "caption": caption}
            for name, image, caption in zip(self.ids, images, self.captions, strict=True)
        ]
        super().__init__(Opened(ListRows(records, "pictures"), None, DataSource(dataset="unused")))
        self.fingerprint = f"pictures {count} {seed} {sorted(unreadable)}"


class Chats(Source):
    """Questions and answers, every third about a noise image, without a file."""

    def __init__(self, count: int, *, seed: int = 0):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        records = [
            {
                "id": f"c{seed}-{row:02d}",
                "image": [] if row % 3 else [_png(array)],
                "said": [
                    {"role": "user", "content": f"{'' if row % 3 else '<image>'}what is {row}?"},
                    {"role": "assistant", "content": f"the number {row}"},
                ],
            }
            for row, array in enumerate(pixels)
        ]
        super().__init__(Opened(ListRows(records, "chats"), None, DataSource(dataset="unused", conversation="said")))
        self.fingerprint = f"chats {count} {seed}"


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def mixtures(*, unreadable: Collection[int] = (), chats: bool = False) -> dict[str, Any]:
    """`train` and `validation` of run_stages."""
    if chats:
        return {"train": Mixture([(Chats(12), 1.0)]), "validation": Mixture([(Chats(5, seed=1), 1.0)])}
    return {
        "train": Mixture([(Pictures(14, unreadable=unreadable), 1.0)]),
        "validation": Mixture([(Pictures(5, seed=1), 1.0)]),
    }


def make_models(root: Path, *, family: str = "llama", dropout: float = 0.1) -> Path:
    """A vision encoder (with so much dropout) and an LLM on disk."""
    config = transformers.ViTConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=14, hidden_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(root / "encoder")
    tiny_llm(family, root / "llm")
    return root


def build_vlm(root: Path, *, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> VLM:
    """The same VLM every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        image = ImageConfig(size=SIDE, resample="bilinear")
        encoder = encoders.build(HuggingFaceEncoderConfig(reference=str(root / "encoder"), image=image))
        config = QFormerConnectorConfig(queries=3, width=16, layers=2, heads=2, hidden=32, dropout=dropout)
        connector = connectors.build(config, width_in=encoder.width, patches=encoder.patches)
        llm = open_llm(str(root / "llm"), dtype=dtype)
        projector = Projector(ProjectorConfig(), connector.width, llm.width, word_rms=llm.word_rms)
    return VLM(VPG(encoder, connector), projector, llm, prompt=PromptConfig())


PACKING = {"max_tokens": 30}
"""About two samples fit, so that an update of four has two packs."""


def data_keys(**changes: Any) -> dict[str, Any]:
    """A recipe's `data`, of a data set that is not opened: `mixtures` stands for it."""
    return {"train": [{"dataset": "unused"}], "validation": [{"dataset": "unused"}]} | changes


def make_recipe(stages: Sequence[dict[str, Any]] = (WARMUP, FINETUNE), **changes: Any) -> Recipe:
    keys = {
        "name": "tiny",
        "source": {"vpg": "unused"},
        "target": {"llm": "unused"},
        "data": data_keys(),
        "stages": list(stages),
        "trainer": {"precision": "fp32", "devices": 1},
    }
    return parse_recipe(keys | changes)


def train(
    vlm: VLM,
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = False,
    unreadable: Collection[int] = (),
    chats: bool = False,
) -> list[StageResult]:
    run.mkdir(parents=True, exist_ok=True)
    return run_stages(vlm, recipe, RunDirectory(run), resume=resume, **mixtures(unreadable=unreadable, chats=chats))


def damaged(vlm: VLM, word: str = " helmet") -> VLM:
    """One row of the LLM's embedding table is not finite: captions with the word have no finite loss."""
    token = vlm.llm.tokenizer.encode(word, add_special_tokens=False)[-1]

    def hook(_: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return output.masked_fill((arguments[0] == token)[..., None], math.inf)

    vlm.llm.model.get_input_embeddings().register_forward_hook(hook)
    return vlm


def all_tensors(vlm: VLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in vlm.state_dict().items()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def signal_at(stage: str, update: int, name: str) -> None:
    """From now on this process sends itself a signal when update number `update` of a stage begins."""
    step = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> None:
        if self.stage.name == stage and self.done == update:
            os.kill(os.getpid(), signal.Signals[name])
        step(self, batch, batch_idx)

    StageModule.training_step = training_step  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--signal", nargs=3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--unreadable", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.signal:
        stage, update, name = arguments.signal
        signal_at(stage, int(update), name)
    for run in arguments.runs:
        options = {"root": arguments.root, "resume": arguments.resume, "unreadable": arguments.unreadable}
        if (run / "options.json").is_file():
            options |= json.loads((run / "options.json").read_text())
        one_run(run, Path(options.pop("root")), arguments.dropout, **options)


def one_run(run: Path, root: Path, dropout: float, **options: Any) -> None:
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    vlm = build_vlm(root, dropout=dropout)
    if options.pop("damaged", False):
        damaged(vlm)
    rates.UPDATES = options.pop("sweep", rates.UPDATES)
    try:
        results = train(vlm, recipe, run, **options)
    except VpgTransError as error:
        if error.of_all and not first_process():
            sys.exit(0)
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    rank = os.environ.get("LOCAL_RANK", "0")
    save_file(all_tensors(vlm), run / f"final{rank}.safetensors")
    (run / f"results{rank}.json").write_text(json.dumps([result.val_loss for result in results]))


if __name__ == "__main__":
    main()
