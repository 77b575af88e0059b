"""Opening what a recipe's data source names: the layouts of files that are known by name.

| format | what it reads |
|---|---|
| table | parquet, JSON lines, JSON arrays, CSV, TSV: a row is a sample, its columns are named in the recipe |
| llava | LLaVA's conversations (JSON or JSON lines): `image`, `conversations` |
| coco | COCO's captions_*.json |
| vqa | VQAv2's and OK-VQA's questions and annotations |
| gqa | GQA's *_questions.json |
| webdataset | tar shards |
| folder | images with a text beside each |
| huggingface | `hf:ORG/NAME`, or a directory that `datasets` saved |
| openmoji | the built-in set |
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpgtrans.data.config import DataSource
from vpgtrans.data.kept import kept_rows
from vpgtrans.data.openmoji import build_openmoji
from vpgtrans.data.openmoji_names import SPLITS
from vpgtrans.data.pairs import open_coco, open_gqa, open_vqa
from vpgtrans.data.rows import ArrayRows, LineRows, Rows
from vpgtrans.data.tables import ArrowRows, open_delimited, open_parquet, quiet_datasets
from vpgtrans.errors import DataError

_LOGGER = logging.getLogger(__name__)


@dataclass
class Opened:
    """A data set's records, what image paths in them are relative to, and the source with its columns filled in."""

    rows: Rows
    folder: Path | None
    source: DataSource


def open_rows(source: DataSource) -> Opened:
    """
    Raises:
        DataError: nothing there, unreadable, or not laid out as its format says.
    """
    form = _format(source) if source.format == "auto" else source.format
    if form == "openmoji" and source.dataset != "openmoji":
        raise DataError(f"format: openmoji is the built-in set; {source.dataset!r} is another, right would be openmoji")
    opened = _FORMATS[form](source)
    if source.folder is not None:
        opened.folder = Path(source.folder).expanduser().absolute()
        if not opened.folder.is_dir():
            raise DataError(f"folder {source.folder!r} of {source.dataset} is no directory ({opened.folder})")
    if source.filter is not None:
        every = len(opened.rows)
        opened.rows = kept_rows(opened.rows, Path(source.filter).expanduser(), id_column=source.id)
        left = every - len(opened.rows)
        _LOGGER.info("%s: %d of %d rows left out by %s", opened.rows.name, left, every, source.filter)
    return opened


def _format(source: DataSource) -> str:
    """By the ending of what is there, not by what a path is called."""
    name = source.dataset
    if name == "openmoji":
        return "openmoji"
    if name.startswith("hf:"):
        return "huggingface"
    if name.endswith((".tar", ".tar}")) or "::" in name:
        return "webdataset"
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "huggingface"
        if next(path.rglob("*.parquet"), None) is not None:
            return "table"
        return "webdataset" if next(path.glob("*.tar"), None) is not None else "folder"
    return "table"


def _existing(source: DataSource) -> Path:
    path = Path(source.dataset).expanduser()
    if not path.exists():
        raise DataError(
            f"no data set {source.dataset!r}: not `openmoji`, no `hf:` reference, and no file or directory at "
            f"{path.absolute()}"
        )
    return path


def _openmoji(source: DataSource) -> Opened:
    if source.split not in SPLITS:
        raise DataError(f"openmoji has no split {source.split!r}; it has {', '.join(SPLITS)}")
    file = build_openmoji() / f"{source.split}.parquet"
    return Opened(open_parquet([file], f"openmoji {source.split}"), None, source)


def _table(source: DataSource) -> Opened:
    path = _existing(source)
    if path.is_dir():
        files = _split_files(path, source.split)
        return Opened(open_parquet(files, f"{path} {source.split}"), files[0].absolute().parent, source)
    if source.split != "train":
        _LOGGER.warning("%s: one file has no splits; all of it is taken as %s", path, source.split)
    return Opened(_table_file(path), path.absolute().parent, source)


def _table_file(path: Path) -> Rows:
    ending = path.suffix.lower()
    if ending not in _TABLES:
        raise DataError(f"{path}: files end in {', '.join(_TABLES)}, .tar; this one in {path.suffix or 'nothing'}")
    return _TABLES[ending](path)


def _json(path: Path) -> Rows:
    """An array of objects, or objects line by line."""
    with path.open("rb") as stream:
        first = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return ArrayRows(path) if first == b"[" else LineRows(path)


_TABLES: dict[str, Callable[[Path], Rows]] = {
    ".parquet": lambda path: open_parquet([path], str(path)),
    ".jsonl": LineRows,
    ".json": _json,
    ".csv": lambda path: open_delimited(path, ","),
    ".tsv": lambda path: open_delimited(path, "\t"),
}


def _split_files(directory: Path, split: str) -> list[Path]:
    for pattern in (f"{split}.parquet", f"{split}-*.parquet", f"data/{split}-*.parquet", f"{split}/*.parquet"):
        if files := sorted(directory.glob(pattern)):
            return files
    there = sorted(str(file.relative_to(directory)) for file in directory.rglob("*.parquet"))
    raise DataError(
        f"{directory}: no parquet files of split {split!r} ({split}.parquet, {split}-*.parquet, {split}/*.parquet); "
        f"there: {', '.join(there[:10]) or 'no parquet files at all'}"
    )


def _llava(source: DataSource) -> Opened:
    path = _existing(source)
    columns = {} if source.conversation is not None else {"conversation": "conversations"}
    return Opened(_table_file(path), path.absolute().parent, source.model_copy(update=columns))


def _coco(source: DataSource) -> Opened:
    path = _existing(source)
    return Opened(open_coco(path), path.absolute().parent, source)


def _questions(source: DataSource) -> DataSource:
    """With the keys that joined records have, whatever the recipe says: the files have no columns to name."""
    return source.model_copy(update={"image": "image", "question": "question", "answer": "answer"})


def _vqa(source: DataSource) -> Opened:
    path = _existing(source)
    if source.annotations is None:
        raise DataError(f"{path}: format vqa needs the file of answers besides, `annotations: …_annotations.json`")
    if "{image_id" not in source.image:
        raise DataError(
            f'{path}: format vqa needs the images\' file names, such as `image: "COCO_train2014_{{image_id:012d}}.jpg"`'
        )
    rows = open_vqa(path, Path(source.annotations).expanduser(), pattern=source.image)
    return Opened(rows, path.absolute().parent, _questions(source))


def _gqa(source: DataSource) -> Opened:
    path = _existing(source)
    return Opened(open_gqa(path), path.absolute().parent, _questions(source))


def _webdataset(source: DataSource) -> Opened:
    from vpgtrans.data.tars import TarRows, expand

    path = Path(source.dataset).expanduser()
    if path.is_dir():
        urls = [str(shard) for shard in sorted(path.glob("*.tar"))]
        if not urls:
            raise DataError(f"{path}: no tar files")
    else:
        urls = [url if "://" in url else str(Path(url).expanduser().absolute()) for url in expand(source.dataset)]
    return Opened(TarRows(urls, source.dataset), None, source)


def _folder(source: DataSource) -> Opened:
    from vpgtrans.data.folders import FolderRows

    path = _existing(source)
    if not path.is_dir():
        raise DataError(f"{path}: format folder needs a directory")
    return Opened(FolderRows(path), path.absolute(), source)


def _huggingface(source: DataSource) -> Opened:
    from datasets import DatasetDict, load_dataset, load_from_disk

    name = f"{source.dataset} {source.split}"
    try:
        with quiet_datasets():
            if source.dataset.startswith("hf:"):
                repository, _, revision = source.dataset.removeprefix("hf:").partition("@")
                if source.streaming:
                    from vpgtrans.data.streams import StreamRows

                    return Opened(StreamRows.of_hub(repository, source.split, revision or None, name), None, source)
                table = load_dataset(repository, split=source.split, revision=revision or None)
            else:
                table = load_from_disk(str(_existing(source)))
                if isinstance(table, DatasetDict):
                    if source.split not in table:
                        raise DataError(f"{source.dataset}: no split {source.split!r}; it has {', '.join(table)}")
                    table = table[source.split]
                elif source.split != "train":
                    _LOGGER.warning("%s has no splits; all of it is taken as %s", source.dataset, source.split)
    except DataError:
        raise
    except Exception as error:  # of the hub, of a set's files or of what describes them
        raise DataError(f"{source.dataset}, split {source.split!r}: {error}") from error
    files = [Path(entry["filename"]) for entry in table.cache_files]
    folder = None if source.dataset.startswith("hf:") else _existing(source).absolute()
    return Opened(ArrowRows(table, name, files), folder, source)


_FORMATS: dict[str, Callable[[DataSource], Opened]] = {
    "openmoji": _openmoji,
    "table": _table,
    "llava": _llava,
    "coco": _coco,
    "vqa": _vqa,
    "gqa": _gqa,
    "webdataset": _webdataset,
    "folder": _folder,
    "huggingface": _huggingface,
}
