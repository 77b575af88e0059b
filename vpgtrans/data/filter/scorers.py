"""Scorers that need no model: number of words, duplicates, a column of a file.

A scorer measures samples stretch by stretch (`measure`, which may be slow, and whose results are kept if a run stops),
and makes its scores of all measurements at once (`scores`).
"""

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpgtrans.data.filter.choose import Better
from vpgtrans.data.kept import hash64, hashed, read_made_for
from vpgtrans.data.sample import Sample
from vpgtrans.data.sources import Source
from vpgtrans.errors import DataError
from vpgtrans.prompts import answer_of
from vpgtrans.vision.preprocess import to_rgb

NEAR = 3
"""Perceptual hashes that differ in at most as many of their 64 bits are of the same picture."""
_BANDS = NEAR + 1
"""Two such hashes agree in at least one of as many bands."""


@dataclass(frozen=True)
class Batch:
    """Readable samples, their rows, and of each its images, decoded (nothing where no scorer asks for images)."""

    rows: list[int]
    samples: list[Sample]
    images: list[list[Image.Image]]


class Scorer(ABC):
    """Gives every sample one score or several."""

    names: dict[str, Better]
    """Its scores' names, and which end is the good one."""
    looks = False
    """Whether it needs the images."""
    relative = False
    """Whether a row's score depends on which other rows are readable."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that its measurements depend on besides the data."""

    @abstractmethod
    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Of each sample of a batch some figures, [n] each; NaN (or 0) where there is none."""

    def scores(self, measured: Mapping[str, np.ndarray], known: np.ndarray) -> dict[str, np.ndarray]:
        """Measurements of all rows and whether they are readable, bool [n] -> scores, float64 [n]."""
        return {name: np.where(known, measured[name], np.nan) for name in self.names}


class Length(Scorer):
    """Words of what is to be said."""

    def __init__(self) -> None:
        self.names = {"length": "high"}

    @property
    def settings(self) -> dict[str, Any]:
        return {"scorer": "length"}

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        return {"length": np.array([len(answer_of(sample.text).split()) for sample in batch.samples], dtype=np.float64)}


class Duplicate(Scorer):
    """How many earlier rows there are with the same text, the same picture, or both; 0 for the first of them.

    Texts are the same if they are so without case, punctuation and spaces; pictures if their perceptual hashes nearly
    are. Rows that are not the first are left out, so pictures are compared with firsts only.
    """

    relative = True

    def __init__(self, of: str = "pair"):
        """of: pair, text or image."""
        self.of = of
        self.looks = of != "text"
        self.name = "duplicate" if of == "pair" else f"duplicate-{of}"
        self.names = {self.name: "low"}

    @property
    def settings(self) -> dict[str, Any]:
        return {"scorer": self.name, "version": 1}

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        texts = [text_hash(s.text if isinstance(s.text, str) else repr(s.text)) for s in batch.samples]
        images = [_images_hash(images) if self.looks else 0 for images in batch.images]
        return {
            f"{self.name}.text": np.array(texts, dtype=np.uint64),
            f"{self.name}.image": np.array(images, dtype=np.uint64),
        }

    def scores(self, measured: Mapping[str, np.ndarray], known: np.ndarray) -> dict[str, np.ndarray]:
        texts, images = measured[f"{self.name}.text"], measured[f"{self.name}.image"]
        found = np.full(len(known), np.nan)
        # Firsts by (text, band of the picture): [row, picture]; and how many rows are like each of them.
        firsts: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        like: dict[int, int] = {}
        bands = _BANDS if self.looks else 1
        for row in np.flatnonzero(known).tolist():
            text = int(texts[row]) if self.of != "image" else 0
            picture = int(images[row])
            keys = [(text, band, (picture >> (64 // _BANDS * band)) & 0xFFFF) for band in range(bands)]
            near = (
                first for key in keys for first, other in firsts.get(key, ()) if (picture ^ other).bit_count() <= NEAR
            )
            first = next(near, None)
            if first is None:
                for key in keys:
                    firsts.setdefault(key, []).append((row, picture))
                like[row], found[row] = 1, 0
            else:
                found[row] = like[first]
                like[first] += 1
        return {self.name: found}


def text_hash(text: str) -> int:
    """64 bits of a text without case, accents' spelling, punctuation and spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    # Where nothing is left ("!!!"), the text itself tells.
    letters = "".join(c for c in plain if unicodedata.category(c)[0] in "LNMS") or plain
    return hash64(letters)


def _images_hash(images: Sequence[Image.Image]) -> int:
    """Of several images the hashes, mixed; 0 of none."""
    hashes = [image_hash(image) for image in images]
    return hash64(repr(hashes)) if len(hashes) > 1 else sum(hashes)


def image_hash(image: Image.Image) -> int:
    """64 bits: where a picture gets clearly brighter, bluer or redder from left to right (40); its mean colour (24).

    They survive another size and JPEG quality. Colours count: drawings often differ in nothing else.
    """
    bits: list[bool] = []
    bands = to_rgb(image).convert("YCbCr").split()
    for band, (width, height), levels in zip(bands, ((9, 4), (5, 1), (5, 1)), _LEVELS, strict=True):
        small = np.asarray(band.resize((width, height), Image.Resampling.BOX), dtype=np.int16)
        bits += (np.diff(small, axis=1) > 4).ravel().tolist()
        bits += (small.mean() > np.array(levels)).tolist()  # near a level one bit differs
    return int("".join("01"[bit] for bit in bits), 2)


_LEVELS = ((28, 57, 85, 113, 142, 170, 198, 227), *2 * ((40, 65, 90, 115, 141, 166, 191, 216),))
"""Of brightness, blue and red."""


class Column(Scorer):
    """A column of a parquet file that is keyed by `id` or `row`, such as scores that others published."""

    def __init__(self, source: Source, file: Path, column: str, *, better: Better):
        """
        Raises:
            DataError: the file lacks the column or a key, or none of its keys is in the source.
        """
        self.name = self.named(file, column)
        self.names = {self.name: better}
        self._file, self._column = file, column
        self._values = _read_column(file, column, source)

    @staticmethod
    def named(file: Path, column: str) -> str:
        """Of the score."""
        return f"column:{file.name}:{column}"

    @property
    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._values.tobytes()).hexdigest()
        return {"scorer": "column", "file": self._file.name, "column": self._column, "sha256": digest}

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        return {self.name: self._values[batch.rows]}


def _read_column(file: Path, column: str, source: Source) -> np.ndarray:
    """float64 [rows of the source], NaN where the file has nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        # A file of our own scores of this data set goes by row, as `filter:` does: ids may be made up, or repeated.
        ours = read_made_for(table) == [len(source.rows), source.rows.fingerprint]
        key = next((name for name in (("row", "id") if ours else ("id", "row")) if name in names), None)
        if column not in names or key is None:
            raise DataError(f"{file}: no {column!r} beside `id` or `row`; the columns are {', '.join(names)}")
        values = np.full(len(source), np.nan)
        # Hashes, not the ids themselves: 8 bytes a row.
        names_of = source.rows.values(source.config.id) if key == "id" else iter(range(len(source)))
        own, there = hashed(names_of, len(source))
        order = np.flatnonzero(there)[np.argsort(own[there], kind="stable")]
        found = 0
        for batch in table.iter_batches(columns=[key, column]):
            scores = batch.column(column).cast(pa.float64()).to_numpy(zero_copy_only=False)
            given, known = hashed(batch.column(key).to_pylist(), len(scores))
            given, scores = given[known], scores[known]
            first, last = (np.searchsorted(own[order], given, side) for side in ("left", "right"))
            counts = last - first  # several rows may have one id
            places = np.repeat(first - np.append(0, np.cumsum(counts)[:-1]), counts) + np.arange(counts.sum())
            values[order[places]] = np.repeat(scores, counts)
            found += int(counts.sum())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}, column {column!r}: not readable as numbers: {error}") from error
    if not found:
        raise DataError(f"{file}: none of its `{key}`s is in {source.name}")
    return values
