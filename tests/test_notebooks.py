"""The tutorials: scripts and notebooks say the same, and what is committed is what a reader should see."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
OURS = re.compile(r"/(tmp|home|root|work|Users|mnt|opt|usr)/")
"""Paths that are some machine's."""
NOISE = re.compile(r"Warning:|Tip:|available|it/s|\d%")
"""What libraries say that nobody asked for; vpgtrans may warn."""


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("notebooks_tool", ROOT / "tools" / "notebooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def pair(tool, tmp_path, monkeypatch) -> Path:
    """A copy of the first tutorial's pair, in a place where the tool looks."""
    for suffix in (".py", ".ipynb"):
        shutil.copy(SCRIPTS[0].with_suffix(suffix), tmp_path)
    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path)
    return tmp_path / SCRIPTS[0].name


def outputs(script: Path) -> list:
    cells = nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_four():
    assert [script.name[0] for script in SCRIPTS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_and_notebook_are_in_step(tool, script):
    assert tool.out_of_step(script) is None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_is_used_of_the_package_is_there(script):
    import vpgtrans as vt

    tree = ast.parse(script.read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vt"
    }
    assert used
    assert used <= set(vt.__all__)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_outputs_are_kept_and_fit_to_be_seen(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # executed once, from above
    kept = outputs(script)
    assert sum("image/png" in output.get("data", {}) for output in kept) >= 2
    for output in kept:
        assert output.output_type != "error"
        assert output.get("name") != "stderr" or not NOISE.search(output.text), output.text
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert "\r" not in text
        assert not OURS.search(text), text
    assert script.with_suffix(".ipynb").stat().st_size < 1_000_000


def test_another_word_is_found(tool, pair, capsys, monkeypatch):
    pair.write_text(pair.read_text(encoding="utf-8").replace("SmolLM2", "SmolLM3", 1), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["notebooks.py", "--check"])
    assert tool.main() == 1
    said = capsys.readouterr().out
    assert f"jupytext --sync notebooks/{pair.name}" in said
    assert "SmolLM3" in said


def test_a_cell_more_is_found(tool, pair):
    with pair.open("a", encoding="utf-8") as file:
        file.write("\n# %%\nprint(1)\n")
    assert "cells" in tool.out_of_step(pair)


def test_a_missing_half_is_found(tool, pair):
    pair.with_suffix(".ipynb").unlink()
    assert tool.out_of_step(pair) == f"{pair.stem}.ipynb is missing"


def test_a_cell_that_fails_fails_the_command(tool, tmp_path, monkeypatch, capsys):
    import jupytext

    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path)
    for name, code in (("1_good", "print(6 * 7)"), ("2_bad", "1 / 0")):
        script = tmp_path / f"{name}.py"
        script.write_text(f"# %%\n{code}\n")
        jupytext.write(jupytext.read(script), script.with_suffix(".ipynb"))
    monkeypatch.setattr("sys.argv", ["notebooks.py"])
    assert tool.main() == 1
    said = capsys.readouterr().out
    assert "1_good: executed" in said
    assert "ZeroDivisionError" in said
    assert outputs(tmp_path / "1_good.py")[0].text == "42\n"
    assert outputs(tmp_path / "2_bad.py") == []  # as it was


def test_a_name_that_is_no_tutorial(tool):
    with pytest.raises(SystemExit, match="there are: 1_move"):
        tool.pairs(["5_none"])
