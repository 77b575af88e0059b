"""A data set as samples by number: records of any container, laid out in any way."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from vpgtrans.data.config import DataSource
from vpgtrans.data.formats import Opened, open_rows
from vpgtrans.data.layouts import columns_of, layout_of, located, named_files, parse
from vpgtrans.data.rows import Rows, State, file_state, lasting_state
from vpgtrans.data.sample import Sample
from vpgtrans.data.urls import read
from vpgtrans.errors import DataError, Dropped
from vpgtrans.layout import Size
from vpgtrans.prompts import Encoded, Prompter, answer_of
from vpgtrans.vision.preprocess import image_size, open_image

_LOGGER = logging.getLogger(__name__)

Result = TypeVar("Result")

_TRIED = 16
"""Rows that are read when a source is opened: if none of them is a sample, its columns are named wrongly."""
_LOOKED = 1000
"""Rows that are read for a key that may be missing, such as that of images in questions."""
_KNOWN_FILES = 1 << 20
"""Image files that are remembered while a fingerprint is made: most rows that share one stand together."""


class Source:
    """The samples of one data set.

    A row is read when it is asked for: it may turn out to be malformed (DataError), or to be left out (Dropped).
    """

    def __init__(self, opened: Opened):
        """
        Raises:
            DataError: there are no rows, a column is missing, or none of the first rows is a sample.
        """
        self.rows: Rows = opened.rows
        self.config = source = opened.source
        self.name = self.rows.name
        self._folder = opened.folder
        self._length = min(len(self.rows), source.limit or len(self.rows))
        if not self._length:
            raise DataError(f"{self.name}: no samples (it has no rows)")
        self._check_columns()
        self._check_first_rows()
        self._check_image_column()

    def __len__(self) -> int:
        return self._length

    @property
    def layout(self) -> str:
        """caption, question, conversation, document or text."""
        return layout_of(self.config)

    @cached_property
    def single(self) -> bool:
        """Whether every sample has one image, as far as its layout and its first row tell."""
        if self.layout not in ("caption", "question"):
            return False
        for row in range(min(_TRIED, len(self))):
            try:
                return len(self.sample(row).images) == 1
            except DataError:
                continue
        return False

    def sample(self, row: int) -> Sample:
        """
        Raises:
            DataError: the row is malformed; the message names file and row. Dropped: a stated rule leaves it out.
        """
        record = self.rows.read(row)
        with self.at(row):
            text, images, references = parse(record, self.config)
        return Sample(
            id=self._named(record.get(self.config.id), row),
            text=text,
            images=tuple(located(image, self._folder) for image in images),
            references=tuple(references),
            row=row,
        )

    def id(self, row: int) -> str:
        """The sample's name, also where the row is malformed."""
        try:
            name = self.rows.read(row).get(self.config.id)
        except DataError:
            name = None
        return self._named(name, row)

    def _named(self, name: object, row: int) -> str:
        if name is None:
            return f"{self.name}/{self.rows.number(row)}"
        # JSON can spell halves of characters, which no file takes.
        return str(name).encode("utf-8", "replace").decode()

    def caption(self, row: int) -> str:
        """What is to be said about a sample."""
        return answer_of(self.sample(row).text)

    def image(self, row: int) -> Image.Image:
        """The one image of a sample, decoded.

        Raises:
            DataError: it can't be read, with file and row. Dropped: there is none, or there are several.
        """
        return self.open(self._of_one_image(row))[0]

    def sized(self, row: int) -> tuple[Image.Image, Size]:
        """As `image`, with its size as `sizes` tells it."""
        images, sizes = self.open_sized(self._of_one_image(row))
        return images[0], sizes[0]

    def _of_one_image(self, row: int) -> Sample:
        sample = self.sample(row)
        if len(sample.images) != 1:
            raise Dropped(f"{self.rows.where(row)}: {len(sample.images)} images")
        return sample

    def open(self, sample: Sample) -> list[Image.Image]:
        """The images of a sample, decoded: RGB or RGBA.

        Raises:
            DataError: one of them can't be read; the message names file and row.
        """
        return self._each_image(sample, lambda image: open_image(fetched(image)))

    def sizes(self, sample: Sample) -> list[Size]:
        """Width and height of a sample's images, from their headers: nothing is decoded.

        Raises:
            DataError: as `open`, as far as headers tell.
        """
        return self._each_image(sample, lambda image: image_size(fetched(image)))

    def open_sized(self, sample: Sample) -> tuple[list[Image.Image], list[Size]]:
        """As `open` and `sizes`, each image fetched once. A few files say deep inside that they lie on their side: for
        such a one the size is the header's, too, so that a sample has one length wherever it is taken."""

        def both(image: bytes | str) -> tuple[Image.Image, Size]:
            content = fetched(image)
            return open_image(content), image_size(content)

        pairs = self._each_image(sample, both)
        return [image for image, _ in pairs], [size for _, size in pairs]

    def encode(self, sample: Sample, prompter: Prompter) -> Encoded:
        """A sample as token ids. Where the layout of images depends on their sizes, their headers are read.

        Raises:
            DataError: as `sizes` and `Prompter.encode`; the message names file and row.
        """
        sizes = self.sizes(sample) if prompter.layouts is not None else []
        with self.at(sample.row):
            return prompter.encode(sample.text, sizes)

    def _each_image(self, sample: Sample, what: Callable[[bytes | str], Result]) -> list[Result]:
        with self.at(sample.row):
            return [what(image) for image in sample.images]

    @contextlib.contextmanager
    def at(self, row: int) -> Iterator[None]:
        """Within the block a DataError, of whatever kind, says of which row it is."""
        try:
            yield
        except DataError as error:
            raise type(error)(f"{self.rows.where(row)}: {error}") from error

    def reopen(self) -> None:
        """In a process that was forked, see `Rows.reopen`."""
        self.rows.reopen()

    @cached_property
    def weights(self) -> np.ndarray | None:
        """How often each row is to come, relative to the others; None: all alike. Only `openmoji` states any."""
        if self.config.dataset != "openmoji" or self.config.split != "train":
            return None
        # Another data set's column of that name may mean anything.
        return np.fromiter(islice(self.rows.values("weight"), len(self)), dtype=np.float64)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that samples depend on: the files, the columns, and the image files that the rows name."""
        return self._told(self.rows.fingerprint, file_state)

    def content(self) -> str:
        """As `fingerprint`, but the same for a copy in another place; of the image files that rows name the size
        counts."""
        return self._told(self.rows.content(lasting_state), lasting_state)

    def _told(self, rows: str, state: State) -> str:
        digest = hashlib.sha256(self.config.model_dump_json(exclude={"weight", "dataset", "filter"}).encode())
        digest.update(rows.encode())
        folder = str(self._folder or "")
        known: set[str] = set()
        for file in self._named_files():
            if file not in known:
                if len(known) == _KNOWN_FILES:
                    known.clear()
                known.add(file)
                told = state(os.path.join(folder, file), whole=False)
                digest.update(file.encode("utf-8", "surrogatepass") + b"\0" + told)
        return digest.hexdigest()

    def _named_files(self) -> Iterator[str]:
        """Paths of images in all rows, as they are written there."""
        if self.layout == "text":
            return
        named = [self.config.image] + ([self.config.conversation] if self.config.conversation is not None else [])
        columns = [column for column in named if self.rows.may_name_files(column)]
        if self.rows.columns is not None:
            for column in columns:
                for value in islice(self.rows.values(column), len(self)):
                    yield from named_files(value)
            return
        for row in range(len(self) if columns else 0):
            try:
                record = self.rows.read(row)
            except DataError:
                continue
            for column in columns:
                yield from named_files(record.get(column))

    def _check_columns(self) -> None:
        for role, column in columns_of(self.config).items():
            self._check_column(column, role)

    def _check_image_column(self) -> None:
        """Where rows may lack images, all of them do if the column is named wrongly: that is to be noticed."""
        column = self.config.image
        # A recipe that was written out states every key, so another name than the usual one is what tells.
        stated = column != type(self.config).model_fields["image"].default and column not in self.rows.optional
        if self.layout in ("caption", "text") or not (stated or self.layout == "question"):
            return
        keys = self.rows.columns
        if keys is None:
            if any(column in record for record in self._first_records()):
                return
            keys = next((list(record) for record in self._first_records()), [])
            where = f"none of the first {min(_LOOKED, len(self))} rows has {column!r}"
        elif column in keys:
            return
        else:
            where = f"no column {column!r}"
        missing = (
            f"{self.name}: {where} for the image; there is {', '.join(keys)} (name another with `image:` in the data "
            "source, or --image)"
        )
        if stated:
            raise DataError(missing)
        _LOGGER.warning("%s; its questions are learnt without images", missing)

    def _first_records(self) -> Iterator[dict[str, Any]]:
        for row in range(min(_LOOKED, len(self))):
            with contextlib.suppress(DataError):
                yield self.rows.read(row)

    def _check_column(self, column: str, role: str) -> None:
        available = self.rows.columns
        if available is not None and column not in available:
            raise DataError(
                f"{self.name}: no column {column!r} for the {role}; the columns are {', '.join(available)} "
                f"(name another with `{role}:` in the data source, or --{role})"
            )

    def _check_first_rows(self) -> None:
        problem: DataError | None = None
        for row in range(min(_TRIED, len(self))):
            try:
                self.sample(row)
                return
            except DataError as error:
                if problem is None or isinstance(problem, Dropped):
                    problem = error
        if len(self) <= _TRIED or not isinstance(problem, Dropped):
            raise DataError(f"{problem}; none of the first {min(_TRIED, len(self))} rows is a sample")


def check_images(source: Source) -> None:
    """Raises DataError where none of the images of the first rows can be read."""
    problem: DataError | None = None
    for row in range(min(_TRIED, len(source))):
        try:
            if source.open(source.sample(row)):
                return
        except DataError as error:
            problem = problem if isinstance(error, Dropped) else error
    if problem is not None:
        raise DataError(f"{problem}; no image of the first {min(_TRIED, len(source))} rows can be read")


def open_dataset(source: DataSource) -> Source:
    """Open what a recipe's data source names.

    Raises:
        DataError: nothing there, unreadable, empty, or without the columns asked for.
    """
    return Source(open_rows(source))


def fetched(image: bytes | str) -> bytes:
    """The content of a file or URL, so that an error while reading and one while decoding can be told apart.

    Raises:
        DataError: it can't be read.
    """
    if isinstance(image, bytes):
        return image
    if "://" in image:
        return read(image)
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise DataError(f"{image}: {error.strerror or error}") from error
    except ValueError as error:  # a null byte
        raise DataError(f"{image!r}: {error}") from error
