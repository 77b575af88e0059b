"""Two processes equal one, whatever the strategy: losses and weights, padded and packed, and across a resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import (
    FINETUNE,
    PACKING,
    WARMUP,
    all_tensors,
    build_vlm,
    data_keys,
    lines,
    make_models,
    make_recipe,
    mixtures,
    train,
)
from torch import Tensor, nn

from vpgtrans.data.packs import measure
from vpgtrans.recipe import Recipe
from vpgtrans.training import rates
from vpgtrans.training.draws import Draws, SampleDraws, pack_draws
from vpgtrans.training.sharding import blocks

SCRIPT = Path(__file__).parent / "tiny_training.py"
_STILL = {"lora": {"dropout": 0.0}}
"""Without dropout, whose random numbers differ from device to device."""


def padded_or_packed(packing: dict[str, int] | None) -> Recipe:
    """Six updates a stage; padded in micro-batches of one; an update of packs holds 4.7 samples."""
    budget = {"budget": {"samples": 28 if packing else 24}}
    finetune = FINETUNE | budget | _STILL | {"micro_batch_size": None if packing else 1}
    return make_recipe([WARMUP | budget, finetune], data=data_keys(max_bad_fraction=0.5, packing=packing))


def chats() -> Recipe:
    """Of every batch each of two processes gets one sample, and two of three samples are text alone."""
    common = {"lr": 1e-3, "batch_size": 2, "budget": {"samples": 12}, "validate_every": 4, **_STILL}
    short = [
        {"name": "warmup", "trainable": {"projector": "full"}, "cache_features": True, **common},
        {"name": "finetune", "trainable": {"projector": "full", "llm": "lora"}, "cache_features": False, **common},
    ]
    return make_recipe(short)


def sought() -> Recipe:
    """The rate is picked by a range test; of every batch one of two processes has a micro-batch more."""
    common = {"batch_size": 3, "micro_batch_size": 1, "budget": {"samples": 6}, "validate_every": 3, **_STILL}
    return make_recipe([FINETUNE | common | {"lr": "auto"}])


def everything() -> Recipe:
    """All parts train, images go through encoder and connector in every pass, and blocks are computed twice."""
    common = {"lr": 1e-3, "batch_size": 4, "budget": {"samples": 12}, "validate_every": 12, "micro_batch_size": 1}
    full = {"encoder": "full", "connector": "full", "projector": "full", "llm": "full"}
    trainer = {"precision": "fp32", "devices": 1, "gradient_checkpointing": True}
    return make_recipe([{"name": "all", "trainable": full, "augment": False, **common}], trainer=trainer)


def first_batch_of_two(root: Path, recipe: Recipe) -> list[list[int]]:
    """Rows of the first update that each of two processes gets."""
    train_data, packing, stage = mixtures()["train"], recipe.data.packing, recipe.stages[0]
    draws: Draws = SampleDraws(train_data, seed=recipe.seed, stage=stage)
    if packing is not None:
        lengths = measure(train_data, build_vlm(root).splice.prompter)
        draws = pack_draws(train_data, lengths, packing, stage, seed=recipe.seed, index=0)
    return [draws.update(0, rank=rank, world=2).rows.tolist() for rank in (0, 1)]


def set_up(run: Path, recipe: Recipe, strategy: str, **options: Any) -> None:
    """A run for two processes."""
    trainer = recipe.trainer.model_copy(update={"devices": 2, "strategy": strategy})
    run.mkdir(exist_ok=True)
    (run / "recipe.json").write_text(recipe.model_copy(update={"trainer": trainer}).model_dump_json())
    (run / "options.json").write_text(json.dumps(options))


class Pair:
    """Runs of one process, and the same by two, all by the same two: to start them takes longest."""

    def __init__(self, root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.directory = directory
        self.root = root
        untied = make_models(directory / "untied", family="llama-untied", dropout=0.0)
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.unreadable: dict[str, list[int]] = {}
        for name, recipe in (("padded", padded_or_packed(None)), ("packed", padded_or_packed(PACKING))):
            first, second = first_batch_of_two(root, recipe)
            self.unreadable[name] = sorted({first[0], *second})  # the second process has nothing at all at first
            self._alone(name, recipe, unreadable=self.unreadable[name])
        self._alone("chats", chats(), chats=True)
        self._alone("everything", everything(), root=str(untied))
        monkeypatch.setattr(rates, "UPDATES", 4)
        self._alone("sought", sought(), sweep=4)
        # Written by one process; two go on from before the last two updates.
        later = directory / "resumed-fsdp"
        shutil.copytree(directory / "padded", later)
        cut(later)
        set_up(later, padded_or_packed(None), "fsdp", resume=True, unreadable=self.unreadable["padded"])
        runs = sorted(path for path in directory.iterdir() if path.name.endswith(("-ddp", "-fsdp")))
        names = {"LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(root), *map(str, runs), "--dropout", "0"],
            env={name: value for name, value in os.environ.items() if name not in names},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]

    def _alone(self, name: str, recipe: Recipe, **options: Any) -> None:
        for strategy in ("ddp", "fsdp"):
            set_up(self.directory / f"{name}-{strategy}", recipe, strategy, **options)
        vlm = build_vlm(Path(options.pop("root", self.root)), dropout=0.0)
        options.pop("sweep", None)
        train(vlm, recipe, self.directory / name, **options)
        self.tensors[name] = all_tensors(vlm)


def cut(run: Path) -> None:
    """Take a run's newest checkpoint away."""
    shutil.rmtree(max((run / "checkpoints").iterdir()))


@pytest.fixture(scope="module")
def pair(root, tmp_path_factory) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        return Pair(root, tmp_path_factory.mktemp("pair"), patch)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["padded", "packed", "chats", "everything", "sought"])
def test_two_processes_give_what_one_gives(pair, name, strategy):
    """Also where one of them has a micro-batch less, no image, or nothing at all, because its images can't be read."""
    alone, run = pair.directory / name, pair.directory / f"{name}-{strategy}"
    for rank in (0, 1):
        assert_close(load_file(run / f"final{rank}.safetensors"), pair.tensors[name])
    one, two = lines(alone / "metrics.jsonl"), lines(run / "metrics.jsonl")
    assert [(line["stage"], line["update"], line["text_tokens"]) for line in two] == [
        (line["stage"], line["update"], line["text_tokens"]) for line in one
    ]
    for kind in ("loss", "val_loss", "grad_norm"):
        figures = [line[kind] for line in one if kind in line]
        assert len(figures) >= 2
        assert [line[kind] for line in two if kind in line] == pytest.approx(figures, rel=1e-4)
    results = [json.loads((run / f"results{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]  # what is decided by it is decided alike
    if name in pair.unreadable:
        assert 2 <= len(pair.unreadable[name]) <= 4
        skipped = {line["id"] for line in lines(run / "quarantine.jsonl")}
        assert skipped == {f"s0-{row:02d}" for row in pair.unreadable[name]}


def test_two_processes_go_on_in_shards_where_one_stopped(pair):
    assert_close(load_file(pair.directory / "resumed-fsdp/final0.safetensors"), pair.tensors["padded"])
    updates = [line["update"] for line in lines(pair.directory / "resumed-fsdp/metrics.jsonl") if "loss" in line]
    assert updates == [1, 2, 3, 4, 5, 6] * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(pair, tmp_path, strategy):
    run = tmp_path / "run"
    shutil.copytree(pair.directory / f"padded-{strategy}", run)
    cut(run)
    vlm = build_vlm(pair.root, dropout=0.0)
    train(vlm, padded_or_packed(None), run, resume=True, unreadable=pair.unreadable["padded"])
    assert_close(all_tensors(vlm), pair.tensors["padded"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_checkpoints_of_two_processes_hold_what_trains_and_whole(pair, strategy):
    def read(run: str) -> tuple[dict[str, list[int]], dict[str, Any]]:
        newest = max((pair.directory / run / "checkpoints").iterdir())
        with safe_open(newest / "state.safetensors", "pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes, torch.load(newest / "optimizer.pt", weights_only=True)

    (expected, one), (found, two) = read("padded"), read(f"padded-{strategy}")
    assert found == expected
    assert {name.partition("/")[0] for name in found} == {"connector", "projector", "llm"}
    assert all("lora" in name for name in found if name.startswith("llm/"))  # not the frozen LLM again
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    assert {name for group in one["param_groups"] for name in group["params"]} == set(one["state"])
    for name, entry in one["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(two["state"][name][key], value, atol=1e-5, rtol=1e-3)


def test_blocks_are_the_outermost_and_largest_list():
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})

    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2)]), "layers": nn.ModuleList([block(), block()])})
    assert blocks(model) == list(model["layers"])
    assert blocks(nn.Linear(2, 2)) == []
