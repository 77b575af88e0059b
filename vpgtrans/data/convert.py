"""Any data set as sharded parquet or WebDataset: resumable, checksummed, the same bytes every time.

    OUTPUT/train-00000.parquet …    or train-00000.tar …
    OUTPUT/quarantine.jsonl         rows that can't be read, with reasons
    OUTPUT/manifest.json            size, sha256 and rows of each shard, and what the source was

A shard is a stretch of the source's rows. It appears whole, and counts once the manifest has it: a conversion that was
killed goes on behind the last one. Shards that don't match the manifest are written again from the same rows.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vpgtrans.data.config import DataSource
from vpgtrans.data.shards import ENDINGS, WRITERS, Target, Writer, columns, size_of, tar_writer, to_record
from vpgtrans.data.sources import Source, fetched, open_dataset
from vpgtrans.errors import DataError, Dropped, OutputError
from vpgtrans.files import appearing, owned, temporary_of
from vpgtrans.progress import bar
from vpgtrans.references import file_sha256
from vpgtrans.vision.preprocess import open_image

FORMAT_VERSION = 1
MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
SHARD_BYTES = 512 << 20


@dataclass(frozen=True)
class Shard:
    """A shard, or rows of which none could be written (`file` is None then).

    Attributes:
        first, stop: the source's rows that it was made of. rows: how many of them are in it.
    """

    file: str | None
    size: int
    sha256: str
    first: int
    stop: int
    rows: int
    quarantined: int
    dropped: int


@dataclass(frozen=True)
class Settings:
    """What shards depend on besides the source.

    Attributes:
        rows, bytes: a shard ends behind the row with which it has as many. several: images are lists.
        verify: images are decoded, and those that can't be are bad rows.
    """

    to: Target
    split: str
    rows: int | None
    bytes: int
    several: bool
    verify: bool


@dataclass(frozen=True)
class Converted:
    """What a conversion did. rows = written + quarantined + dropped."""

    output: str
    to: Target
    rows: int
    written: int
    quarantined: int
    dropped: int
    shards: int
    reused: int
    """Shards that were there already."""
    bytes: int
    source: dict[str, Any]
    """The recipe's data source that reads the result."""


def convert(
    source: DataSource,
    output: Path,
    *,
    to: Target,
    rows_per_shard: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    images: str = "auto",
    verify: bool = True,
) -> Converted:
    """Write a data set's samples as shards, or go on where an earlier call stopped.

    Args:
        images: `one` (a column of bytes), `list`, or `auto`: one where the first row has one.

    Raises:
        DataError: webdataset is missing, the source doesn't open, or none of its rows is a sample. OutputError:
            `output` holds something else, or the shards of another source or of other settings.
    """
    if to == "webdataset":
        tar_writer()
    opened = open_dataset(source)
    several = not opened.single if images == "auto" else images == "list"
    settings = Settings(to, source.split, rows_per_shard, shard_bytes, several and opened.layout != "text", verify)
    with owned(output):
        return _Conversion(opened, output, settings).run()


class _Conversion:
    """One conversion under way."""

    def __init__(self, source: Source, output: Path, settings: Settings):
        self.source = source
        self.output = output
        self.settings = settings
        # Rows without an id are named after the source.
        self._of = {"name": source.name, "rows": len(source), "fingerprint": source.fingerprint}
        self._shards: list[Shard] = []
        self._quarantine = hashlib.sha256()
        self._quarantine_size = 0

    def run(self) -> Converted:
        earlier = self._earlier()
        done = earlier["shards"]
        trusted = self._quarantine_intact(earlier["quarantine"], rows=sum(shard.quarantined for shard in done))
        if not trusted:  # what it held comes anew from the shards' rows
            (self.output / QUARANTINE).unlink(missing_ok=True)
        reused = 0
        with bar() as progress:
            task = progress.add_task(f"{self.source.name} -> {self.output.name}", total=len(self.source), note="")
            advance = lambda rows=1: progress.advance(task, rows)  # noqa: E731
            for entry in done:
                if self._intact(entry) and (trusted or not entry.quarantined):
                    reused += entry.file is not None
                    self._shards.append(entry)
                    advance(entry.stop - entry.first)
                else:
                    again, bad = self._write(len(self._shards), entry.first, entry.stop, advance)
                    # the quarantine of a shard that is merely damaged is there already
                    self._shards.append(again)
                    self._commit([] if trusted else bad, rest=done[len(self._shards) :])
            while (first := self._shards[-1].stop if self._shards else 0) < len(self.source):
                shard, bad = self._write(len(self._shards), first, None, advance)
                self._shards.append(shard)
                self._commit(bad)
        if not any(shard.rows for shard in self._shards):
            raise DataError(
                f"{self.source.name}: none of its {len(self.source)} rows could be written; the reasons are in "
                f"{self.output / QUARANTINE}"
            )
        return self._summary(reused)

    # --- a shard --------------------------------------------------------------------------------

    def _write(self, number: int, first: int, stop: int | None, advance: Any) -> tuple[Shard, list[dict[str, Any]]]:
        """A shard of the rows from `first` on, to `stop` or until it is full; and its bad rows."""
        settings = self.settings
        target = self.output / f"{settings.split}-{number:05d}.{ENDINGS[settings.to]}"
        bad: list[dict[str, Any]] = []
        rows, dropped, size, row = 0, 0, 0, first
        writer: Writer | None = None
        with appearing(target) as temporary:
            while row < (len(self.source) if stop is None else stop):
                if stop is None and (rows == settings.rows or size >= settings.bytes):
                    break
                try:
                    record = self._record(row)
                except Dropped:
                    dropped += 1
                except DataError as error:
                    bad.append({"row": row, "id": self.source.id(row), "reason": str(error)})
                else:
                    if writer is None:
                        writer = WRITERS[settings.to](temporary, self.source.layout, several=settings.several)
                    writer.write(record, row)
                    rows += 1
                    size += size_of(record)
                row += 1
                advance()
            if writer is None:
                temporary.touch()
            else:
                writer.close()
        if writer is None:
            target.unlink()
        return Shard(
            file=target.name if rows else None,
            size=target.stat().st_size if rows else 0,
            sha256=file_sha256(target) if rows else "",
            first=first,
            stop=row,
            rows=rows,
            quarantined=len(bad),
            dropped=dropped,
        ), bad

    def _record(self, row: int) -> dict[str, Any]:
        """
        Raises:
            DataError: the row is malformed, or one of its images can't be read. Dropped: a rule leaves it out.
        """
        sample = self.source.sample(row)
        with self.source.at(row):
            contents = [fetched(image) for image in sample.images]
            if self.settings.verify:
                for content in contents:
                    open_image(content)
            whole = replace(sample, images=tuple(contents))
            return to_record(whole, self.source.layout, several=self.settings.several)

    # --- the manifest ---------------------------------------------------------------------------

    def _earlier(self) -> dict[str, Any]:
        """What an earlier call has done; written at once where there was none.

        Raises:
            OutputError: the directory holds something else, or the shards of another source or other settings.
        """
        there = {path.name for path in self.output.iterdir()}
        file = self.output / MANIFEST
        if MANIFEST not in there:
            if others := sorted(there - {temporary_of(file).name}):
                raise OutputError(f"{self.output} holds {', '.join(others[:5])}; right would be a new directory")
            self._write_manifest([])
            return {"shards": [], "quarantine": {"size": 0, "sha256": hashlib.sha256().hexdigest()}}
        try:
            manifest = json.loads(file.read_text())
            shards = [Shard(**entry) for entry in manifest["shards"]]
            known, settings, quarantine = manifest["source"], manifest["settings"], manifest["quarantine"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OutputError(
                f"{file} is no manifest of a conversion ({error}); right would be a new directory"
            ) from error
        if changed := [key for key, value in self._of.items() if known.get(key) != value]:
            raise OutputError(
                f"{self.output} holds shards of another source: another {' and '.join(changed)} "
                f"({known.get('name')}, {known.get('rows')} rows); give another directory, or remove this one"
            )
        if changed := [key for key, value in asdict(self.settings).items() if settings.get(key) != value]:
            was = ", ".join(f"{key} {settings.get(key)}" for key in changed)
            raise OutputError(f"{self.output} was begun with {was}; say the same again, or give another directory")
        ending = ENDINGS[self.settings.to]
        own = {f"{self.settings.split}-{number:05d}.{ending}" for number in range(len(shards) + 1)}
        own |= {MANIFEST, QUARANTINE}
        own |= {temporary_of(Path(name)).name for name in own}
        if others := sorted(there - own):
            raise OutputError(f"{self.output} holds {', '.join(others[:5])} besides the shards; move that away")
        for name in there:
            if name.endswith(".part"):  # a half file of a process that was killed
                (self.output / name).unlink()
        return {"shards": shards, "quarantine": quarantine}

    def _intact(self, shard: Shard) -> bool:
        if shard.file is None:
            return True
        path = self.output / shard.file
        return path.is_file() and path.stat().st_size == shard.size and file_sha256(path) == shard.sha256

    def _quarantine_intact(self, known: dict[str, Any], *, rows: int) -> bool:
        """Whether the file of bad rows begins with what the manifest knows; what comes behind that is cut off.

        rows: how many there are; fewer are known where an earlier call was killed while it wrote the file anew.
        """
        file = self.output / QUARANTINE
        content = file.read_bytes()[: known["size"]] if file.is_file() else b""
        digest = hashlib.sha256(content)
        if content.count(b"\n") != rows or digest.hexdigest() != known["sha256"]:
            return False
        if file.is_file() and file.stat().st_size > known["size"]:
            os.truncate(file, known["size"])
        self._quarantine, self._quarantine_size = digest, known["size"]
        return True

    def _commit(self, bad: list[dict[str, Any]], *, rest: list[Shard] | None = None) -> None:
        """Add bad rows to their file, then the last shard to the manifest. rest: known shards that follow."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad).encode("utf-8", "replace")
        if lines:
            with (self.output / QUARANTINE).open("ab") as stream:
                stream.write(lines)
                stream.flush()
                os.fsync(stream.fileno())
            self._quarantine.update(lines)
            self._quarantine_size += len(lines)
        self._write_manifest(rest or [])

    def _write_manifest(self, rest: list[Shard]) -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": self._of,
            "settings": asdict(self.settings),
            "quarantine": {"size": self._quarantine_size, "sha256": self._quarantine.hexdigest()},
            "shards": [asdict(shard) for shard in [*self._shards, *rest]],
        }
        with appearing(self.output / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def _summary(self, reused: int) -> Converted:
        settings, shards = self.settings, self._shards
        said: dict[str, Any] = {"dataset": str(self.output)}
        if settings.split != "train":
            said["split"] = settings.split
        said |= columns(self.source.layout, settings.to, several=settings.several)
        return Converted(
            output=str(self.output),
            to=settings.to,
            rows=len(self.source),
            written=sum(shard.rows for shard in shards),
            quarantined=sum(shard.quarantined for shard in shards),
            dropped=sum(shard.dropped for shard in shards),
            shards=sum(shard.file is not None for shard in shards),
            reused=reused,
            bytes=sum(shard.size for shard in shards),
            source=said,
        )
