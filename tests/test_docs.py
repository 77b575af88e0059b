"""What the pages say is so: links lead somewhere, commands and recipes are taken, worked examples work."""

import ast
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from ruamel.yaml import YAML

import vpgtrans
from vpgtrans.cli.root import cli
from vpgtrans.recipe import Recipe, parse_recipe
from vpgtrans.recipe_file import plain, read

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
OF_THE_SITE = {"cli.md": r"vpgtrans( [a-z]+)*"}
"""Pages whose headings are made when the site is built; its own strict build checks links to these."""


@functools.cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(_without_tabs(page.read_text(encoding="utf-8")))


def _without_tabs(text: str) -> str:
    """What stands in tabs of the site is indented, which a plain reader of Markdown takes for code."""
    lines, inside = [], False
    for line in text.splitlines():
        inside = line.startswith(("=== ", "!!! ")) or (inside and (not line or line.startswith("    ")))
        lines.append(line[4:] if inside and line.startswith("    ") else line)
    return "\n".join(lines)


def blocks(page: Path, language: str) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "fence" and token.info.strip() == language]


# --- links --------------------------------------------------------------------------------------


def _inline(page: Path) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or ()


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    found = set()
    for heading, text in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            plain_text = "".join(
                child.content for child in text.children or () if child.type in ("text", "code_inline")
            )
            found.add(re.sub(r"[^\w\- ]", "", plain_text.lower()).strip().replace(" ", "-"))
    return found


@EACH
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for token in _inline(page):
        target = str(token.attrGet("href" if token.type == "link_open" else "src") or "")
        if not target or "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / unquote(path)
        if not file.exists():
            broken.append(target)
        elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
            made = re.fullmatch(OF_THE_SITE.get(file.name, "(?!)"), anchor.replace("-", " ")) or "." in anchor
            broken += [] if made else [target]
    assert broken == []


# --- commands -----------------------------------------------------------------------------------


def _commands(page: Path) -> Iterator[str]:
    """Lines of shell that call the command line; long ones joined, comments and pipes cut off."""
    fenced = [block for language in ("sh", "bash") for block in blocks(page, language)]
    indented = [token.content for token in tokens(page) if token.type == "code_block"]
    for line in "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines():
        if line.strip().startswith("vpgtrans "):
            yield re.split(r"\s+#|\s{5,}| [|>] ", line.strip())[0]


def _parsed(words: list[str]) -> None:
    """Raises click.UsageError for an unknown verb or option, or a missing argument."""
    command: click.Command = cli
    context = click.Context(cli, info_name="vpgtrans")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]}")
        command, words = found, words[1:]
    command.make_parser(click.Context(command)).parse_args(list(words))
    if any(isinstance(each, click.Argument) and each.required for each in command.params):
        assert words, f"{command.name} needs an argument"


@EACH
def test_commands_have_verbs_and_options_that_there_are(page: Path) -> None:
    for line in _commands(page):
        words = shlex.split(line.replace("…", ""))[1:]
        try:
            _parsed(words)
        except click.UsageError as error:
            pytest.fail(f"{line}: {error.format_message()}")


def test_commands_are_found() -> None:
    assert sum(len(list(_commands(page))) for page in PAGES) >= 50
    with pytest.raises(click.UsageError):
        _parsed(["transfer", "recipe.yaml", "--resumee"])


# --- recipes ------------------------------------------------------------------------------------


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merged(below.get(key), value) for key, value in above.items()}
    return above


_STAGE = {"name": "finetune", "trainable": {"connector": "full"}, "budget": {"samples": 64}}


def _completed(said: dict[str, Any]) -> dict[str, Any]:
    """A fragment on top of the quickstart, stages that leave out what they must say completed."""
    said = {key: value for key, value in said.items() if value is not None}
    if "stages" in said:
        said["stages"] = [
            _STAGE | {key: value for key, value in stage.items() if value != "…"} for stage in said["stages"]
        ]
    below = read(ROOT / "recipes" / "quickstart.yaml").data
    if isinstance(said.get("source", {}).get("vpg"), dict) or "micro_batch_size" in str(said):
        below["data"]["packing"] = None
    if "trainable" in str(said.get("stages", "")) and "lora" in below["stages"][1]:
        below["stages"] = said["stages"]
    return _merged(below, said)


def _fragments(page: Path) -> Iterator[dict[str, Any]]:
    """Recipes and parts of them in a page; a block that says a key several times shows alternatives."""
    for block in blocks(page, "yaml"):
        for part in _alternatives(block.replace(", …", "")):
            said = plain(YAML(typ="safe").load(part))
            if isinstance(said, dict) and said.keys() <= Recipe.model_fields.keys():
                yield said


def _alternatives(block: str) -> list[str]:
    keys = re.findall(r"^(\w+):", block, re.M)
    return block.splitlines() if len(set(keys)) < len(keys) else [block]


@EACH
def test_recipes_and_parts_of_them_are_taken(page: Path) -> None:
    for said in _fragments(page):
        parse_recipe(_completed(said), name=str(page.relative_to(ROOT)))


def test_recipes_are_found() -> None:
    assert sum(len(list(_fragments(page))) for page in PAGES) > 25


# --- worked examples ----------------------------------------------------------------------------


def test_the_worked_examples_of_contributing_work(tmp_path: Path) -> None:
    """Every change, applied to one copy of the package, and every script after it."""
    page = ROOT / "CONTRIBUTING.md"
    shutil.copytree(ROOT / "vpgtrans", tmp_path / "vpgtrans", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("tests/tiny.py", "tests/tiny_vlms.py", "tests/test_connectors.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    changes, scripts = blocks(page, "diff"), blocks(page, "python")
    assert len(changes) == len(scripts) == 5
    for change in changes:
        done = subprocess.run(["git", "apply", "-"], input=change, text=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, f"{done.stderr}\n{change}"
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "vpgtrans"], cwd=tmp_path, check=True)
    (tmp_path / "work").mkdir()
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(scripts)],
        cwd=tmp_path / "work",
        env=os.environ | {"PYTHONPATH": paths, "VPGTRANS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


LAYERS = (
    ("cli", "api"),
    ("runs",),
    ("report", "plan"),
    ("training", "transfer", "evaluation"),
    ("data",),
    ("vlm", "vlm_directory"),
    ("vision", "projector", "llm", "prompts"),
    ("references", "registry"),
    ("recipe", "config", "errors"),
)
"""As docs/layout.svg draws them, from above."""
ABOVE_THE_MODEL = {"registry/verify.py"}
"""Of the registry, what opens a checkpoint; all else of it reads files alone."""
CONFIGS = {"vpgtrans.data.config", "vpgtrans.training.config", "vpgtrans.registry.entry"}
"""What a recipe says of parts is beside the parts."""


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vpgtrans"):
            yield from (
                [f"vpgtrans.{alias.name}" for alias in node.names] if node.module == "vpgtrans" else [str(node.module)]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("vpgtrans."))


def test_nothing_imports_upward() -> None:
    level = {unit: depth for depth, units in enumerate(LAYERS) for unit in units}
    package = Path(vpgtrans.__file__).parent
    upward = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        own = level["data"] if path.as_posix() in ABOVE_THE_MODEL else level.get(path.parts[0].removesuffix(".py"), -1)
        for name in _imported(file):
            if name not in CONFIGS and level.get(name.split(".")[1], 99) < own:
                upward.append(f"{path} imports {name}")
    assert upward == []


def test_the_citation_is_of_this_version() -> None:
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vpgtrans.__version__
    assert citation["license"] == "Apache-2.0"
    assert f"## {vpgtrans.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
