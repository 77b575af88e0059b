"""Execute the tutorials, and tell where a script and its notebook are out of step.

    python tools/notebooks.py                       # all of notebooks/
    python tools/notebooks.py 3_what_the_converter_does
    python tools/notebooks.py --check               # execute nothing

Each tutorial is a pair: NAME.py (the percent format, for reviews) and NAME.ipynb (the same cells with their outputs).
A pair that is out of step is not executed, because one of both would be lost: `jupytext --sync notebooks/NAME.py`
takes over the newer one. What is executed is written to the .ipynb. Exit code 1: a pair is out of step, or a cell
failed.
"""

import argparse
import difflib
import os
import re
import resource
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
TIME_LIMIT = 1800
"""Seconds a cell may take: generous, because machines of a CI are slow; the tutorials need a tenth."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Of tracebacks, as a kernel writes them."""


def pairs(names: list[str] | None = None) -> list[Path]:
    """The scripts of the tutorials, all or those that are named. Raises SystemExit where there is none of a name."""
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("[0-9]*.*")) if path.suffix in (".py", ".ipynb")}
    unknown = [name for name in names or [] if Path(name).stem not in known]
    if unknown:
        raise SystemExit(f"no tutorial {', '.join(unknown)}; there are: {', '.join(known)}")
    return [NOTEBOOKS / f"{stem}.py" for stem in known if not names or stem in {Path(name).stem for name in names}]


def out_of_step(script: Path) -> str | None:
    """Where a pair differs, in words; None where it doesn't."""
    notebook = script.with_suffix(".ipynb")
    for file in (script, notebook):
        if not file.is_file():
            return f"{file.name} is missing"
    left, right = jupytext.read(script).cells, jupytext.read(notebook).cells
    for number, (ours, theirs) in enumerate(zip(left, right, strict=False), start=1):
        if (ours.cell_type, ours.source) != (theirs.cell_type, theirs.source):
            names = (f"{script.name}, cell {number}", f"{notebook.name}, cell {number}")
            lines = difflib.unified_diff(ours.source.splitlines(), theirs.source.splitlines(), *names, lineterm="", n=0)
            return "\n".join(lines) or f"cell {number} is {ours.cell_type} in one and {theirs.cell_type} in the other"
    if len(left) != len(right):
        return f"{script.name} has {len(left)} cells, {notebook.name} {len(right)}"
    return None


def execute(script: Path) -> None:
    """Run a tutorial in a kernel of its own and write the notebook with what it printed and drew.

    Raises:
        CellExecutionError, CellTimeoutError, DeadKernelError: a cell failed.
    """
    notebook = jupytext.read(script)
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    client = NotebookClient(
        notebook,
        timeout=TIME_LIMIT,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(script.parent)}},
    )
    client.execute()
    # Named by place, so that running again changes outputs alone; and of no one machine's Python.
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata.pop("language_info", None)
    notebook.metadata.jupytext = {"formats": "ipynb,py:percent"}
    written = script.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, written)
    written.replace(script.with_suffix(".ipynb"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="tutorials; all if none is named")
    parser.add_argument("--check", action="store_true", help="compare the pairs, execute nothing")
    arguments = parser.parse_args()
    failed = False
    for script in pairs(arguments.names):
        if difference := out_of_step(script):
            failed = True
            print(f"{script.stem}: out of step; jupytext --sync notebooks/{script.name} takes over the newer one")
            print(difference)
            continue
        if arguments.check:
            print(f"{script.stem}: in step")
            continue
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            execute(script)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed = True
            print(f"{script.stem}: {_COLOURS.sub('', str(error))}")
            continue
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{script.stem}: executed in {time.perf_counter() - started:.0f} s, of which the processors worked "
            f"{used.ru_utime - before.ru_utime:.0f} s (user) and {used.ru_stime - before.ru_stime:.0f} s (system)",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    # A kernel of this very Python, whatever kernels are installed, that finds what this one does.
    os.environ.setdefault("PYTHONPATH", str(NOTEBOOKS.parent))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
