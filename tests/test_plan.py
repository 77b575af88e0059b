"""Planning: memory on shapes, what strategies change, what is refused."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from tiny import tiny_llm
from tiny_runs import QFORMER, write_captions
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpgtrans import runs, short_attention
from vpgtrans.cli.plan import _totals
from vpgtrans.errors import DataError, UserError
from vpgtrans.gpus import GPUS, parse_gpus
from vpgtrans.plan.ledger import Ledger
from vpgtrans.plan.memory import GPU, Standing, memory, moments_of
from vpgtrans.plan.samples import Lengths
from vpgtrans.plan.skeleton import Rows
from vpgtrans.plan.trace import Passes
from vpgtrans.recipe import parse_recipe

VIT = {
    "model_type": "vit", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
TUNE = {"connector": "full", "projector": "full", "llm": "lora"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLM of which the weights are gone, and captions."""
    home = tmp_path_factory.mktemp("plan")
    (tiny_llm("qwen3", home / "llm") / "model.safetensors").unlink()
    write_captions(home / "train.parquet", count=24)
    return home


def keys(home: Path, **changes: Any) -> dict[str, Any]:
    data = [{"dataset": str(home / "train.parquet")}]
    return {
        "name": "small",
        "source": {"vpg": {"encoder": {"kind": "huggingface", "architecture": VIT}, "connector": QFORMER}},
        "target": {"llm": str(home / "llm")},
        "initialiser": "random",
        "data": {"train": data, "validation": data},
        "stages": [
            {"name": "warmup", "trainable": {"projector": "full"}, "budget": {"samples": 64}},
            {"name": "finetune", "trainable": TUNE, "budget": {"samples": 64}, "augment": False},
        ],
    } | changes


def planned(home: Path, gpus: str = "8xA100-40GB", **changes: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Stage and strategy -> row."""
    return _planned(json.dumps(keys(home, **changes)), gpus)


@functools.cache
def _planned(recipe: str, gpus: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = runs.plan(parse_recipe(json.loads(recipe)), [gpus])
    return {(row["stage"], row["strategy"]): row for row in rows}


def test_the_ledger_counts_what_lives_and_lets_go_what_dies() -> None:
    with FakeTensorMode():
        layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
        ledger = Ledger(layers, vocabulary=4)
        with ledger, ledger.gradients():
            given = torch.empty(100, 8)
            found = layers(given)
            # the input, what relu gave (its own input is gone), the result: 4 columns are logits here
            assert ledger._now == {"activations": 4 * 100 * (8 + 16), "logits": 4 * 100 * 4}
            found.sum().backward()
            del found
        assert ledger._now["logits"] == 0
        assert ledger._now["gradients"] == 4 * (8 * 16 + 16 * 4)
        assert ledger.peak.total() > 4 * 100 * (8 + 16 + 4)


def test_a_plan_needs_no_weights_and_says_every_part(home: Path) -> None:
    rows = planned(home)
    assert [strategy for stage, strategy in rows if stage == "warmup"] == [
        "single", "ddp", "fsdp", "deepspeed-2", "deepspeed-3",
    ]  # fmt: skip
    for row in rows.values():
        assert row["fits"]
        assert set(PARTS) <= set(row["memory_bytes"])
        assert row["total_bytes"] == sum(row["memory_bytes"].values())
        assert row["hours"] > 0
        assert row["cost"] == pytest.approx(row["gpu_hours"] * GPUS["A100-40GB"].price)
        assert row["lengths"] == "24 samples of the data"
    assert sum(row["cheapest"] for row in rows.values()) == 2


def test_strategies_share_what_they_say(home: Path) -> None:
    rows = {strategy: row["memory_bytes"] for (stage, strategy), row in planned(home).items() if stage == "finetune"}
    assert rows["ddp"]["weights"] == rows["deepspeed-2"]["weights"]
    assert rows["fsdp"]["weights"] == rows["deepspeed-3"]["weights"] == rows["ddp"]["weights"] // 8
    assert rows["ddp"]["optimizer"] // 8 == pytest.approx(rows["deepspeed-2"]["optimizer"], rel=0.01)


def test_what_fits_training_into_memory_shows(home: Path) -> None:
    def part(name: str, **trainer: Any) -> int:
        trainer = {"precision": "bf16-true", **trainer}
        row = planned(home, "A100-40GB", stages=keys(home)["stages"][1:], trainer=trainer)["finetune", "single"]
        return int(row["memory_bytes"][name])

    assert part("activations", gradient_checkpointing=True) < part("activations")
    assert part("weights", precision="fp32") > 1.5 * part("weights")


def test_moments_in_eight_bits() -> None:
    assert moments_of(1 << 20, "adamw") == moments_of(1 << 20, "paged-adamw") == 8 << 20
    assert moments_of(1 << 20, "adamw-8bit") == (2 << 20) + 2 * 4 * (1 << 12)
    assert moments_of(100, "adamw-8bit") == 800  # small tensors stay as they are


def test_packs_are_planned_by_their_row(home: Path) -> None:
    data = keys(home)["data"]
    tune = {"stages": keys(home)["stages"][1:]}
    small = planned(home, data={**data, "packing": {"max_tokens": 64}}, **tune)["finetune", "single"]
    large = planned(home, data={**data, "packing": {"max_tokens": 256}}, **tune)["finetune", "single"]
    assert small["pack_tokens"] == 64
    assert small["memory_bytes"]["activations"] < large["memory_bytes"]["activations"]
    with pytest.raises(DataError, match=r"data.packing.max_tokens: 3 is less than a sample has"):
        planned(home, data={**data, "packing": {"max_tokens": 3}})


def test_lengths_are_assumed_where_data_is_elsewhere(home: Path) -> None:
    far = [{"dataset": "hf:some/where"}]
    row = planned(home, data={"train": far, "validation": far}, stages=keys(home)["stages"][:1])["warmup", "single"]
    assert row["lengths"] == "assumed: 32 answer tokens behind 4 visual ones"


def test_planning_leaves_nothing_behind_that_holds_no_numbers(home: Path) -> None:
    data = keys(home)["data"]
    runs.plan(parse_recipe(keys(home, data={**data, "packing": {"max_tokens": 64}})), ["cpu"])
    query = torch.ones(1, 2, 5, 8, dtype=torch.bfloat16)
    found = short_attention.short_attention(query, query, query, scale=1.0)
    assert found.float().mean().item() == pytest.approx(1.0)


def test_less_memory_means_smaller_micro_batches_and_then_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = keys(home)["stages"][1:]
    row = planned(home, "A100-40GB", stages=tune)["finetune", "single"]
    for room, fits in ((row["total_bytes"] - 1, True), (1000, False)):
        gpu = type(GPUS["L4"])(**{**vars(GPUS["L4"]), "memory": float(room)})
        monkeypatch.setitem(GPUS, "L4", gpu)
        _planned.cache_clear()
        found = planned(home, "L4", stages=tune)["finetune", "single"]
        assert found["fits"] is fits
        assert found["largest"] < row["largest"]
    assert not found["cheapest"]


def test_sharding_adds_up() -> None:
    standing = Standing(weights=800, gradients=80, optimizer=160, largest=40, block=100)
    nothing = Passes(0, 0, 0)
    of = {"step": Passes(1000, 100, 80), "validation": nothing, "images": nothing}
    whole = memory(standing, strategy="ddp", devices=8, machine=GPU, **of)
    shared = memory(standing, strategy="fsdp", devices=8, machine=GPU, **of)
    assert whole.total - shared.total == (800 + 80 + 160) * 7 // 8 - 2 * 100


def test_rows_take_the_longest_sample() -> None:
    lengths = Lengths(torch.arange(10, 20).numpy(), torch.arange(10).numpy(), torch.ones(10, dtype=int).numpy(), "")
    rows = lengths.rows(4)
    assert rows.shape == (4, 18)
    assert rows.pieces == 4
    assert Rows([5, 7], 3, 1, packed=True).shape == (1, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xA10O-40GB", r"'A10O-40GB' is unknown; did you mean A100-40GB\?"),
        ("8 A100", "right would be a number and a type"),
        ("0xL4", "right would be a number and a type"),
        ("00xL4", "right would be a number and a type"),
        ("99999999999xL4", "right would be a number and a type"),
        ("8xA100", r"did you mean A100-40GB or A100-80GB\?"),
        ("2xcpu", "this machine, of which there is one"),
    ],
)
def test_wrong_gpus(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_gpus(text)


def test_a_precision_that_a_type_lacks(home: Path) -> None:
    recipe = parse_recipe(keys(home, trainer={"precision": "bf16-true"}))
    with pytest.raises(UserError, match=r"T4 has no bf16, which trainer.precision: bf16-true needs"):
        runs.plan(recipe, ["T4"])
    rows = runs.plan(recipe, ["T4", "L4"])
    assert [row["fits"] for row in rows] == [False, True] * 2


def test_the_command(home: Path) -> None:
    path = home / "recipe.yaml"
    path.write_text(json.dumps(keys(home)))
    wrong = invoke("plan", str(path), "--gpus", "8xA10O-40GB")
    assert (wrong.exit_code, wrong.stderr.count("error:")) == (2, 1)
    assert invoke("plan", str(path)).exit_code == 2
    rows = json.loads(invoke("plan", str(path), "--sweep", "L4,H200", "--price", "2", "--json").stdout)
    assert {"strategy", "fits", "memory_bytes", "hours", "cost"} <= set(rows[0])
    assert [row["gpus"] for row in rows] == ["1xL4", "1xH200"] * 2
    assert rows[0]["cost"] == pytest.approx(2 * rows[0]["hours"])
    shown = invoke("plan", str(path), "stages.warmup.batch_size=1", "--gpus", "2xA100-40GB").stdout
    assert "micro-batch" in shown
    assert "cheapest that fits every stage, 1xA100-40GB single:" in shown
    # what doesn't fit says why, once for all strategies
    assert shown.count("2xA100-40GB deepspeed-3: stage warmup: batch_size 1 is for all devices together") == 1


def test_what_a_run_would_refuse_does_not_fit(home: Path) -> None:
    rows = planned(home, "2xA100-40GB", trainer={"precision": "bf16-mixed", "optimizer": "adamw-8bit"})
    own = {strategy: row for (stage, strategy), row in rows.items() if stage == "finetune"}
    assert {strategy for strategy, row in own.items() if row["fits"]} == {"single", "ddp"}
    assert "trainer.strategy: fsdp needs trainer.optimizer: adamw" in own["fsdp"]["note"]
    assert "trainer.strategy: deepspeed-2 would cast what trains to bf16" in own["deepspeed-2"]["note"]


def test_a_run_has_one_strategy_for_all_stages() -> None:
    def row(stage: str, strategy: str, cost: float | None, *, fits: bool = True) -> dict[str, Any]:
        return {
            "stage": stage, "gpus": "2xL4", "strategy": strategy, "cost": cost, "hours": 1.5, "gpu_hours": 3.0,
            "fits": fits,
        }  # fmt: skip

    rows = [row("a", "ddp", 1.0), row("a", "fsdp", 3.0), row("b", "ddp", 1.0, fits=False), row("b", "fsdp", 3.0)]
    assert _totals(rows) == ["cheapest that fits every stage, 2xL4 fsdp: 3 h 00 min, 6.00 GPU-hours, 6.00 USD"]
    assert _totals([row("a", "ddp", 1.0, fits=False)])[0].startswith("nothing fits every stage")
    assert _totals([row("a", "single", None)]) == [
        "all stages on 2xL4 single: 1 h 30 min"
    ]  # of a CPU no price is known
