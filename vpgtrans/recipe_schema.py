"""A recipe's JSON schema, made from its types, so that editors complete and check recipes as they are written.

The schema knows keys, values and what each means. What fits together, and whether a reference resolves, only
`vpgtrans validate` knows.
"""

import json
from typing import Any

from vpgtrans.recipe import Recipe

FILE = "recipe.schema.json"
"""Its name beside recipes, which call it in their first line."""
MODELINE = f"# yaml-language-server: $schema={FILE}\n"
"""The first line of a recipe in the same directory: what editors with a YAML language server look for."""


def recipe_schema() -> dict[str, Any]:
    """Of a recipe as a user may write it, short forms included."""
    schema = _for_editors(Recipe.model_json_schema())
    schema["title"] = "A vpgtrans recipe"
    _allow(schema["properties"]["initialiser"], schema["$defs"]["InitialiserConfig"]["properties"]["kind"])
    _allow(schema["$defs"]["DataConfig"]["properties"]["augment"], {"type": "boolean"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def schema_text() -> str:
    """As it is committed and printed."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _allow(key: dict[str, Any], short: dict[str, Any]) -> None:
    """Let a key take a short form beside its long ones."""
    long = key.pop("anyOf", None) or [{"$ref": key.pop("$ref")}]
    key["anyOf"] = [{name: value for name, value in short.items() if name != "default"}, *long]


def _for_editors(node: Any, *, of_properties: bool = False) -> Any:
    """Without titles, which only repeat the keys; with sentences in one line; and with the keys of a mapping whose
    keys are known written out, because editors complete `properties` and not `propertyNames`."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    if of_properties:  # names of keys, one of which may be "title"
        return {name: _for_editors(value) for name, value in node.items()}
    node = {key: value for key, value in node.items() if key != "title"}
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    if "enum" in node.get("propertyNames", {}):
        names, value = node.pop("propertyNames")["enum"], node.pop("additionalProperties")
        node |= {"properties": dict.fromkeys(names, value), "additionalProperties": False}
    return {
        key: value if key == "default" else _for_editors(value, of_properties=key in ("properties", "$defs"))
        for key, value in node.items()
    }
