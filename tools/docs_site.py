"""What the documentation site does beyond MkDocs: pages from outside docs/, links out of it, commands and keys.

The pages are read on a code host, too, so they link by paths in the repository. A link that leaves docs/ brings what it
names into the site: Markdown as a page, source as a page that shows it, all else as a file.
"""

import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LOGGER = logging.getLogger("mkdocs.plugins.docs_site")  # with --strict a warning of MkDocs ends the build

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "results/benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the navigation that lie elsewhere. For the README stands the site's own first page."""
SHOWN = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".sbatch": "bash", ".cff": "yaml"}
"""Source that is shown in a page: its language."""
SCHEMA = ROOT / "recipes" / "recipe.schema.json"

_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?=[#)])")
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.M | re.S)

_origins: dict[str, Path] = {}
"""Page of the site -> the file of the repository that it was made of."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/, as far as links lead to it."""
    _origins.clear()
    _origins.update({file.src_uri: DOCS / file.src_uri for file in files.documentation_pages()})
    waiting = list(_origins.values())
    for path, uri in PAGES.items():
        if uri not in _origins:
            _add(files, config, ROOT / path, uri)
            waiting.append(ROOT / path)
    while waiting:
        page = waiting.pop()
        for target in _targets(page.read_text(encoding="utf-8"), page):
            uri = _uri(target)
            if target.is_file() and files.get_file_from_path(uri) is None:
                _add(files, config, target, uri)
                if target.suffix == ".md":
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as paths of the site; and what is made of the code, where a page asks for it."""
    origin = _origins.get(page.file.src_uri)
    if origin is not None and origin.suffix == ".md":
        markdown = _relinked(markdown, origin, page)
    for marker, lines in _GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, "\n".join(lines()))
    return markdown


def _add(files: Files, config: MkDocsConfig, target: Path, uri: str) -> None:
    _origins[uri] = target
    if target.suffix in SHOWN:
        name = target.relative_to(ROOT)
        text = target.read_text(encoding="utf-8")
        content = f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n~~~~{SHOWN[target.suffix]}\n{text}\n~~~~\n"
        files.append(File.generated(config, uri, content=content))
    else:
        files.append(File.generated(config, uri, abs_src_path=str(target)))


def _uri(target: Path) -> str:
    """Where a file of the repository lies in the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    path = target.relative_to(ROOT).as_posix()
    return PAGES.get(path) or f"source/{path}" + (".md" if target.suffix in SHOWN else "")


def _targets(markdown: str, page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for found in _LINK.finditer(_FENCE.sub("", markdown)):
        target = Path(os.path.normpath(page.parent / unquote(found["path"])))
        if target.is_relative_to(ROOT):
            yield target


def _relinked(markdown: str, origin: Path, page: Page) -> str:
    here = PurePosixPath(page.file.src_uri).parent

    def relink(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(origin.parent / unquote(found["path"])))
        if not target.is_file():
            _LOGGER.warning("%s: a link to %s, which is no file", origin.relative_to(ROOT), found["path"])
            return found["path"]
        return os.path.relpath(_uri(target), here)

    return _LINK.sub(relink, markdown)


# --- the commands -------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """A section for each command: what it does, examples, options."""
    from vpgtrans.cli import cli

    yield from _command(cli, click.Context(cli, info_name="vpgtrans"), level=2)


def _command(command: click.Command, ctx: click.Context, *, level: int) -> Iterator[str]:
    yield f"\n{'#' * level} {ctx.command_path}\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    group = isinstance(command, click.Group)
    yield f"```text\n{' '.join([ctx.command_path, *command.collect_usage_pieces(ctx)])}\n```\n"
    if command.epilog and not group:
        yield f"```sh\n{inspect.cleandoc(command.epilog)}\n```\n"
    options = [each for each in command.get_params(ctx) if isinstance(each, click.Option)]
    records = [record for each in options if (record := each.get_help_record(ctx)) is not None]
    if records:
        yield "| option | |\n|---|---|"
        yield from (f"| `{_cell(names)}` | {_cell(_text(told))} |" for names, told in records)
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            assert inner is not None
            yield from _command(inner, click.Context(inner, info_name=name, parent=ctx), level=min(level + 1, 4))


# --- the keys of a recipe -----------------------------------------------------------------------


def recipe_keys() -> Iterator[str]:
    """A heading and a table for each mapping in a recipe, in the order in which they are named."""
    schema = json.loads(SCHEMA.read_bytes())
    waiting, seen = [("The recipe", schema, 2)], set()
    while waiting:
        title, node, level = waiting.pop(0)
        yield f"\n{'#' * level} {title}\n"
        if "description" in node:
            yield f"{_text(node['description'])}\n"
        yield "| key | takes | default | |\n|---|---|---|---|"
        later = []
        for key, value in node.get("properties", {}).items():
            named = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            told = value.get("description", named.get("description", ""))
            yield _row(key, value, told, required=key in node.get("required", ()))
            later += [name for name in _names(value) if name not in seen]
        seen.update(later)
        waiting += [(_title(name), schema["$defs"][name], 3) for name in dict.fromkeys(later)]


def _row(key: str, value: dict[str, Any], told: str, *, required: bool) -> str:
    default = "**required**" if required else ""
    if "default" in value and not isinstance(value["default"], dict):
        default = f"`{json.dumps(value['default'], ensure_ascii=False)}`"
    return f"| `{key}` | {_cell(_takes(value))} | {_cell(default)} | {_cell(_text(told))} |"


def _takes(value: dict[str, Any]) -> str:
    """What may stand at a key, mappings as links to their tables."""
    if "$ref" in value:
        title = _title(value["$ref"].rpartition("/")[2])
        return f"[{title}](#{title.lower().replace(': ', '-').replace(' ', '-')})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{item}`" for item in value["enum"])
    if several := value.get("anyOf") or value.get("oneOf"):
        said = [_takes(each) for each in several]
        return ", ".join(said) if len(said) > 3 else " or ".join(said)
    if value.get("type") == "array":
        return f"a list: {_takes(value['items'])}" if "items" in value else "a list"
    if value.get("type") == "object":
        keys = value.get("properties", {})
        return "a mapping" + (f" of {', '.join(f'`{key}`' for key in keys)}" if keys else "")
    kinds = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "`true` or `false`"}
    bounds = {"minimum": "≥", "exclusiveMinimum": "&gt;", "maximum": "≤", "exclusiveMaximum": "&lt;"}
    limits = [f"{sign} {value[bound]}" for bound, sign in bounds.items() if bound in value]
    return " ".join([kinds.get(value.get("type", ""), "`null`"), ", ".join(limits)]).strip()


def _names(value: Any) -> Iterator[str]:
    """The definitions that a key refers to."""
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for key, inner in value.items():
            if key not in ("default", "discriminator"):
                yield from _names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner)


_NAMES = {"LoRA": "LoRA", "VPG": "VPG", "EfficientNetLite0": "Encoder: efficientnet-lite0",
          "HuggingFaceEncoder": "Encoder: huggingface", "ConcatEncoder": "Encoder: concat",
          "QFormerConnector": "Connector: qformer"}  # fmt: skip
"""Types whose names don't fall into words."""


def _title(name: str) -> str:
    """`PixelShuffleConnectorConfig` -> `Connector: pixel-shuffle`, `DataSource` -> `Data source`."""
    name = name.removesuffix("Config")
    if name in _NAMES:
        return _NAMES[name]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().split()
    return f"Connector: {'-'.join(words[:-1])}" if words[-1] == "connector" else " ".join(words).capitalize()


def _text(told: str) -> str:
    """Docstrings as Markdown: what looks like HTML outside of code is text."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", told))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_GENERATED = {"<!-- the keys of a recipe -->": recipe_keys, "<!-- the commands -->": commands}
"""What a page asks for -> what makes its lines."""
