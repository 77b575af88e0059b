"""Naming a data set on the command line: the keys of a recipe's data source as options."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vpgtrans.data.config import DataSource

_OPTIONS = {
    "format": "table, llava, coco, vqa, gqa, webdataset, folder, huggingface or openmoji [default: by its ending].",
    "split": "Part of it [default: train].",
    "limit": "Take the first N rows only.",
    "folder": "What image paths are relative to.",
    "annotations": "vqa: the file of answers.",
    "filter": "Leave out rows that this parquet file does not keep.",
    "image": "Column of images [default: image].",
    "caption": "Column of captions [default: caption].",
    "question": "Column of questions, with --answer.",
    "answer": "Column of answers.",
    "conversation": "Column of turns.",
    "document": "Column of texts in which images stand.",
    "text": "Column of texts without images.",
    "id": "Column that names the rows [default: id].",
}
"""Key of a data source -> what it is; `streaming` is for --source."""


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format`, `--image`, … and `--source`, which arrive as `read_source` takes them."""
    function = click.option(
        "--source", metavar="YAML", help="More keys as in a recipe's data source: '{streaming: true}'."
    )(function)
    for name, text in reversed(_OPTIONS.items()):
        kind = click.IntRange(min=1) if name == "limit" else str
        metavar = "N" if name == "limit" else "FILE" if name == "filter" else name.upper()
        function = click.option(f"--{name}", f"source_{name}", type=kind, metavar=metavar, help=text)(function)
    return function


def read_source(dataset: str, options: dict[str, Any]) -> "DataSource":
    """The data source that DATASET and the options name, which are taken out of `options`.

    Raises:
        DataError: a key is unknown or has a value that is not allowed.
    """
    from vpgtrans.recipe import parse_source

    return parse_source({"dataset": dataset, **read_keys(options)})


def read_keys(options: dict[str, Any]) -> dict[str, Any]:
    """The keys of a data source that the options name, which are taken out of `options`.

    Raises:
        DataError: --source is no mapping.
    """
    from ruamel.yaml.error import YAMLError

    from vpgtrans import recipe_file
    from vpgtrans.errors import DataError

    written = options.pop("source")
    given = {name: value for name in _OPTIONS if (value := options.pop(f"source_{name}")) is not None}
    try:
        more = recipe_file.plain(recipe_file.parser().load(written)) if written else {}
    except (YAMLError, ValueError) as error:
        raise DataError(f"--source {written}: not valid YAML: {error}") from error
    if not isinstance(more, dict):
        raise DataError(f"--source {written}: right would be a mapping, such as '{{image: picture}}'")
    return {**more, **given}
