"""Peaks belong to the span in which they were reached."""

import os
import subprocess
import sys

import pytest

from vpgtrans import memory

SPANS = """
import torch
from vpgtrans import memory

LARGE = 200 * 2**20
memory.forget()
quiet = memory.span_peak()
block = torch.ones(LARGE, dtype=torch.uint8)
with_block = memory.span_peak()
assert with_block - quiet > 0.9 * LARGE
del block
memory.start_span()
assert memory.span_peak() < with_block - 0.9 * LARGE
assert memory.overall_peak() > 0.99 * with_block  # the kernel counts in batches
memory.forget()
assert memory.overall_peak() < with_block - 0.9 * LARGE
"""


@pytest.mark.skipif(not os.access(memory._RESET, os.W_OK), reason="no way to reset a process's own peak")
def test_a_peak_counts_in_its_own_span_and_in_the_whole() -> None:
    # In a process of its own: of one with much idle memory, the kernel may take some back while this looks.
    done = subprocess.run([sys.executable, "-c", SPANS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_proc_it_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    expected = memory.span_peak()
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_RESET", tmp_path / "none" / "clear_refs")
    memory.start_span()
    assert memory.span_peak() >= 0.9 * expected
