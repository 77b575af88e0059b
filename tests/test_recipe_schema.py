"""The JSON schema of recipes says what loading says, and recipes name the committed one."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from vpgtrans.recipe import Recipe, load_recipe
from vpgtrans.recipe_file import read
from vpgtrans.recipe_schema import FILE, MODELINE, recipe_schema, schema_text

ROOT = Path(__file__).parent.parent
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "benchmarks" / "plans").glob("*.yaml"))]

Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    Draft202012Validator.check_schema(recipe_schema())
    return Draft202012Validator(recipe_schema())


def test_the_committed_schema_is_current() -> None:
    committed = ROOT / "recipes" / FILE
    assert committed.read_text(encoding="utf-8") == schema_text(), f"run: vpgtrans schema --output recipes/{FILE}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_schema_and_keeps_to_it(path: Path, schema: Draft202012Validator) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    marker, _, named = first.partition("$schema=")
    assert f"{marker}$schema={FILE}\n" == MODELINE
    assert (path.parent / named).samefile(ROOT / "recipes" / FILE)
    assert [error.message for error in schema.iter_errors(read(path).data)] == []
    written_out = load_recipe(path).model_dump(mode="json")
    assert [error.message for error in schema.iter_errors(written_out)] == []


def _keys(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The paths of all keys and items."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from _keys(value, (*path, key))


def _fits_together(data: dict[str, Any]) -> bool | None:
    """What loading says; None where each value may stand there, but not beside the others."""
    try:
        Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        kinds = {item["type"] for item in error.errors(include_url=False)}
        return None if kinds <= {"value_error", "default_factory_not_called"} else False
    return True


def test_any_key_with_any_value_is_taken_or_refused_by_both(schema: Draft202012Validator) -> None:
    whole = load_recipe(ROOT / "recipes" / "openmoji-source.yaml", ["data.packing={max_tokens: 512}"])
    data = whole.model_dump(mode="json")
    seen = set()
    for path in _keys(data):
        for value in (None, True, 0.5, "text"):
            changed = holder = deepcopy(data)
            for step in path[:-1]:
                holder = holder[step]
            holder[path[-1]] = value
            loads = _fits_together(changed)
            assert schema.is_valid(changed) == (loads is not False), (path, value)
            seen.add(loads)
    assert seen == {True, False, None}


@pytest.mark.parametrize("short", ["initialiser=inherit", "data.augment=true", "data.augment=false"])
def test_short_forms_are_in_the_schema(short: str, schema: Draft202012Validator) -> None:
    data = read(ROOT / "recipes" / "quickstart.yaml").data
    key, _, value = short.partition("=")
    if key == "initialiser":
        data["initialiser"] = value
    else:
        data["data"]["augment"] = value == "true"
    load_recipe(ROOT / "recipes" / "quickstart.yaml", [short])
    assert schema.is_valid(data)


def test_every_key_is_described(schema: Draft202012Validator) -> None:
    plain = {"dropout", "layers", "heads", "layer_norm_eps", "bias", "standardised", "kind"}
    nodes = {"Recipe": schema.schema, **schema.schema["$defs"]}
    silent = [
        f"{name}.{key}"
        for name, node in nodes.items()
        for key, value in node.get("properties", {}).items()
        if "description" not in value and "$ref" not in value and key not in plain
    ]
    assert silent == []


def test_the_command_prints_it_and_writes_it(tmp_path: Path) -> None:
    assert invoke("schema").stdout == schema_text()
    assert invoke("schema", "--output", tmp_path / "made.json").exit_code == 0
    assert (tmp_path / "made.json").read_text(encoding="utf-8") == schema_text()
    refused = invoke("schema", "--output", tmp_path / "missing" / "made.json")
    assert refused.exit_code == 2
    assert "can't be written" in refused.stderr
