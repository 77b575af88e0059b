"""`vpgtrans data pack` on tiny recipes."""

import json
from pathlib import Path

import pytest
from commands import invoke
from PIL import Image
from tiny_runs import Tiny

from vpgtrans.data.mixture import open_mixture
from vpgtrans.recipe import dump, load_recipe
from vpgtrans.runs.data import open_prompter


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": "and " * (1 + row % 7)} for row in range(40)]
    rows += [
        {"image": "a.png", "caption": None},
        {"image": "a.png", "caption": 3},
        {"image": "a.png", "caption": "x " * 99},
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"dataset": str(table)}], "validation": [{"dataset": str(table)}]}
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(tiny.transfer_recipe(data=data)))
    return file


def test_every_sample_is_in_a_pack_or_counted(recipe: Path) -> None:
    result = invoke("data", "pack", recipe, "--max-tokens", "64", "--max-images", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["samples"], found["dropped"], found["left_out"], found["bad"], found["over_long"]) == (40, 3, 1, 1, 1)
    loaded = load_recipe(recipe)
    prompter, mixture = open_prompter(loaded), open_mixture(loaded.data.train)
    assert found["tokens"] == sum(len(prompter.encode(mixture.sample(row).text)) for row in range(40))
    assert found["images_per_pack"] <= 3
    assert found["fill"] == pytest.approx(found["tokens"] / (found["packs"] * 64))
    assert found["packs"] >= 40 / 3


def test_samples_in_no_pack_are_named_with_their_reason(recipe: Path) -> None:
    shown = invoke("data", "pack", recipe, "--max-tokens", "64")
    assert shown.exit_code == 0, shown.output
    lines = [line for line in shown.stdout.splitlines() if line.startswith(("over long: ", "left out: ", "bad: "))]
    assert [line.split(":")[0] for line in lines] == ["over long", "left out", "bad"]
    assert [f"line {number}: " in line for number, line in zip((43, 41, 42), lines, strict=True)] == [True] * 3
    loaded = load_recipe(recipe)
    longest = open_prompter(loaded).encode(open_mixture(loaded.data.train).sample(42).text)
    assert lines[0].endswith(f"{len(longest)} tokens, 1 image(s)")


def test_a_plan_is_used_again_until_something_changes(recipe: Path) -> None:
    first = json.loads(invoke("data", "pack", recipe, "--max-tokens", "64", "--json").stdout)
    again = invoke("data", "pack", recipe, "--max-tokens", "64", "--json")
    assert json.loads(again.stdout) == first
    plans = {first["plan"]}
    for changed in (("--max-samples", "2"), ("prompt.template=See <image>",), ("data.train.0.limit=20",)):
        plans.add(json.loads(invoke("data", "pack", recipe, "--max-tokens", "64", "--json", *changed).stdout)["plan"])
    assert len(plans) == 4
    shown = invoke("data", "pack", recipe, "--max-tokens", "64").stdout
    assert "packs of 64 tokens" in shown
    assert f"{first['fill']:.2%}" in shown


def test_nothing_fits(recipe: Path) -> None:
    result = invoke("data", "pack", recipe, "--max-tokens", "2")
    assert result.exit_code == 2
    assert "no sample fits a pack of 2 tokens; the shortest has" in result.stderr
