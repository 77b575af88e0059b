"""Image–caption sources as lists, whatever they are stored in, and their mixture in a reproducible order."""

import contextlib
import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpgtrans.data.config import DataSource
from vpgtrans.data.openmoji import build_openmoji
from vpgtrans.data.openmoji_names import SPLITS
from vpgtrans.errors import DataError
from vpgtrans.vision.preprocess import open_image

_LOGGER = logging.getLogger(__name__)
_TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_WHOLE_FILE_LIMIT = 1 << 30
"""Files up to this size count with their content in a fingerprint; larger ones with size and modification time."""


class Captions:
    """Samples of one source: `captions[i]`, `references[i]` and `image(i)` belong together.

    Rows without a caption are left out; `dropped` says how many. Images are read only when asked for.
    """

    def __init__(self, table: Any, *, source: DataSource, name: str, folder: Path | None, files: Sequence[Path]):
        """table: a `datasets.Dataset`; folder: what image paths are relative to; files: what the fingerprint covers."""
        available = list(table.column_names)
        for role, column in (("image", source.image), ("caption", source.caption)):
            if column not in available:
                raise DataError(
                    f"{name}: no column {column!r} for the {role}; the columns are {', '.join(available)} "
                    f"(name another with `{role}:` in the data source, or --{role})"
                )
        self.source = source
        self.name = name
        self._folder = folder
        self._image_column = source.image
        self.references: list[list[str]] = []
        """Every caption of each sample, at least one."""
        kept = []
        for row, value in enumerate(_column(table, source.caption)):
            texts = _texts(value, f"{name}: row {row}: column {source.caption!r}")
            if texts:
                kept.append(row)
                self.references.append(texts)
            if source.limit is not None and len(kept) == source.limit:
                break
        scanned = kept[-1] + 1 if source.limit is not None and len(kept) == source.limit else table.num_rows
        self.dropped = scanned - len(kept)
        if self.dropped:
            _LOGGER.warning("%s: %d rows have no caption and are left out", name, self.dropped)
        if not kept:
            raise DataError(f"{name}: no samples (rows: {table.num_rows}, without a caption: {self.dropped})")
        self._table = table if len(kept) == table.num_rows else table.select(kept)
        self.captions = [texts[0] for texts in self.references]
        self.ids = self._make_ids(kept)
        self.weights = self._make_weights()
        self.fingerprint = self._make_fingerprint(files)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def columns(self) -> list[str]:
        return list(self._table.column_names)

    def column(self, name: str) -> list[Any]:
        """All values of another column, such as `base` or `modifiers` of openmoji; DataError if there is none."""
        if name not in self.columns:
            raise DataError(f"{self.name}: no column {name!r}; the columns are {', '.join(self.columns)}")
        return _column(self._table, name)

    def image(self, index: int) -> Image.Image:
        """The decoded image, RGB or RGBA; DataError naming the sample if it can't be read."""
        try:
            return open_image(self.image_bytes(index))
        except DataError as error:
            raise DataError(f"sample {self.ids[index]}: {error}") from error

    def image_bytes(self, index: int) -> bytes:
        """The image as it is stored, still encoded."""
        value = self._table[index][self._image_column]
        path = value.get("path") if isinstance(value, dict) else value
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            return data
        if not isinstance(path, str):
            raise DataError(
                f"sample {self.ids[index]}: column {self._image_column!r} holds {type(value).__name__}; "
                "right would be encoded image bytes, or the path of an image file"
            )
        file = self._locate(path)
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"sample {self.ids[index]}: {file}: {error.strerror or error}") from error

    def _locate(self, path: str) -> Path:
        return Path(path) if self._folder is None else self._folder / path

    def _make_ids(self, rows: Sequence[int]) -> list[str]:
        if "id" in self.columns:
            own = [str(value) for value in _column(self._table, "id")]
            if len(set(own)) == len(own):
                return own
        return [f"{self.name}/{row}" for row in rows]

    def _make_weights(self) -> np.ndarray:
        # Another data set's column of that name may mean anything.
        if self.source.dataset == "openmoji" and self.source.split == "train":
            return np.asarray(self.column("weight"), dtype=np.float64)
        return np.ones(len(self))

    def _make_fingerprint(self, files: Sequence[Path]) -> str:
        digest = hashlib.sha256(self.source.model_dump_json(exclude={"weight", "dataset"}).encode())
        for file in files:
            digest.update(_file_state(file, whole=True))
        # Image files that the table only names; inline bytes are covered by the table's own file.
        if getattr(self._table.features[self._image_column], "dtype", None) in ("string", "large_string"):
            for path in _column(self._table, self._image_column):
                if path is not None:
                    digest.update(path.encode() + _file_state(self._locate(path), whole=False))
        for identity, texts in zip(self.ids, self.references, strict=True):
            digest.update("\0".join([identity, *texts, "\n"]).encode())
        return digest.hexdigest()


def open_captions(source: DataSource) -> Captions:
    """Open what a recipe's data source names.

    `openmoji`; `hf:ORG/NAME[@REVISION]`; a parquet, JSON-lines or CSV file; or a directory with the split's parquet
    files (`SPLIT.parquet`, `SPLIT-*.parquet` there or in `data/`, or `SPLIT/*.parquet`). Image paths are relative to
    the file that names them.

    Raises:
        DataError: nothing there, unreadable, empty, or without the columns asked for.
    """
    if source.dataset == "openmoji":
        if source.split not in SPLITS:
            raise DataError(f"openmoji has no split {source.split!r}; it has {', '.join(SPLITS)}")
        file = build_openmoji() / f"{source.split}.parquet"
        name = f"openmoji {source.split}"
        return Captions(_load_files("parquet", [file], name), source=source, name=name, folder=None, files=[file])
    if source.dataset.startswith("hf:"):
        return _open_hub(source)
    path = Path(source.dataset).expanduser()
    if path.is_dir():
        files = _split_files(path, source.split)
        kind = "parquet"
    elif path.is_file():
        files = [path]
        if path.suffix.lower() not in _TABLES:
            raise DataError(f"{path}: files end in {', '.join(_TABLES)}; this one in {path.suffix or 'nothing'}")
        kind = _TABLES[path.suffix.lower()]
    else:
        raise DataError(
            f"no data set {source.dataset!r}: not `openmoji`, no `hf:` reference, and no file or directory at "
            f"{path.absolute()}"
        )
    name = f"{path} {source.split}" if path.is_dir() else str(path)
    table = _load_files(kind, files, name)
    return Captions(table, source=source, name=name, folder=files[0].absolute().parent, files=files)


def _split_files(directory: Path, split: str) -> list[Path]:
    for pattern in (f"{split}.parquet", f"{split}-*.parquet", f"data/{split}-*.parquet", f"{split}/*.parquet"):
        if files := sorted(directory.glob(pattern)):
            return files
    there = sorted(str(file.relative_to(directory)) for file in directory.rglob("*.parquet"))
    raise DataError(
        f"{directory}: no parquet files of split {split!r} ({split}.parquet, {split}-*.parquet, {split}/*.parquet); "
        f"there: {', '.join(there[:10]) or 'no parquet files at all'}"
    )


def _load_files(kind: str, files: Sequence[Path], name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from vpgtrans.references import cache_dir

    empty = [file for file in files if file.stat().st_size == 0]
    if empty:
        raise DataError(f"{empty[0]}: the file is empty")
    try:
        if kind == "parquet" and not sum(pq.read_metadata(file).num_rows for file in files):
            raise DataError(f"{name}: no samples (the parquet files have no rows)")
        with _quiet_datasets():
            # Kept as a memory-mapped table in the cache, so that large sets don't fill the memory.
            table = load_dataset(
                kind, data_files=[str(f) for f in files], split="train", cache_dir=str(cache_dir() / "datasets/tables")
            )
    except (DatasetGenerationError, pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{name}: not readable as {kind}: {error.__cause__ or error}") from error
    return _undecoded(table)


def _open_hub(source: DataSource) -> Captions:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    repository, _, revision = source.dataset.removeprefix("hf:").partition("@")
    try:
        with _quiet_datasets():
            table = load_dataset(repository, split=source.split, revision=revision or None)
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"{source.dataset}, split {source.split!r}: {error}") from error
    files = [Path(entry["filename"]) for entry in table.cache_files]
    name = f"{source.dataset} {source.split}"
    return Captions(_undecoded(table), source=source, name=name, folder=None, files=files)


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Progress bars of `datasets` only on a terminal; afterwards as before."""
    import datasets

    if sys.stderr.isatty() or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _undecoded(table: Any) -> Any:
    """Image columns as stored bytes or paths: decoding happens in one place, `open_image`."""
    import datasets

    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _column(table: Any, name: str) -> list[Any]:
    return table.select_columns([name])[:][name]


def _texts(value: Any, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(v is None or isinstance(v, str) for v in values):
        kind = type(next(v for v in values if v is not None and not isinstance(v, str))).__name__
        raise DataError(f"{where} holds {kind}; right would be a string or a list of strings")
    return [text for v in values if v is not None and (text := v.strip())]


def _file_state(file: Path, *, whole: bool) -> bytes:
    try:
        status = file.stat()
    except OSError:
        return b"missing"
    if whole and status.st_size <= _WHOLE_FILE_LIMIT:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    return f"{status.st_size} {status.st_mtime_ns}".encode()


class Mixture:
    """Several sources drawn together: sample number k of a run is a pure function of (seed, k).

    An epoch is as many draws as there are samples. Each source gets its weight's share of them; within a source,
    sample i gets its own weight's share. Draws are systematic: a sample whose expected count in an epoch is c comes
    floor(c) or ceil(c) times. With equal expectations an epoch is a permutation.

    A sample is named by its index into the concatenation of the sources.
    """

    def __init__(self, sources: Sequence[tuple[Captions, float]]):
        if not sources:
            raise DataError("a mixture needs at least one source")
        if any(not weight > 0 for _, weight in sources):
            raise DataError("weights of sources must be above zero")
        self.sources = [captions for captions, _ in sources]
        self._starts = np.cumsum([0, *(len(captions) for captions in self.sources)])
        shares = np.array([weight for _, weight in sources], dtype=np.float64)
        self._share = np.concatenate(
            [s / shares.sum() * c.weights / c.weights.sum() for s, c in zip(shares, self.sources, strict=True)]
        )
        digest = hashlib.sha256()
        for (captions, weight), row_weights in zip(sources, (c.weights for c in self.sources), strict=True):
            digest.update(f"{captions.fingerprint} {weight!r}\n".encode() + row_weights.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, sample: int) -> tuple[Captions, int]:
        """The source of a sample, and its index there."""
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        source = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.sources[source], int(sample - self._starts[source])

    def id(self, sample: int) -> str:
        captions, index = self.locate(sample)
        return captions.ids[index]

    def caption(self, sample: int) -> str:
        captions, index = self.locate(sample)
        return captions.captions[index]

    def image(self, sample: int) -> Image.Image:
        captions, index = self.locate(sample)
        return captions.image(index)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of one epoch, int64 [len(self)]."""
        size = len(self)
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = generator.permutation(size)
        share = self._share[order]
        if np.allclose(share, 1 / size, rtol=1e-9, atol=0):
            return order
        ends = np.cumsum(share)
        points = (np.arange(size) + generator.random()) / size * ends[-1]
        drawn = order[np.searchsorted(ends, points, side="right").clip(max=size - 1)]
        return generator.permutation(drawn)

    def batches(self, seed: int, start: int = 0, *, batch_size: int) -> Iterator[np.ndarray]:
        """Samples of batch after batch without end, int64 [batch_size], from the run's sample number `start` on."""
        size = len(self)
        epoch, offset = divmod(start, size)
        order = self.order(seed, epoch)
        while True:
            pieces: list[np.ndarray] = []
            wanted = batch_size
            while wanted:
                piece = order[offset : offset + wanted]
                pieces.append(piece)
                wanted -= len(piece)
                offset += len(piece)
                if offset == size:
                    epoch, offset = epoch + 1, 0
                    order = self.order(seed, epoch)
            yield np.concatenate(pieces)
