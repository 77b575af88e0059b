"""What the frozen front of a VLM computes, computed once and kept on disk.

In the warm-up encoder and connector are frozen: an image's visual tokens never change, so each image passes through
them once. In a fine-tune with a frozen encoder the same holds for its patch features. The cache is keyed by all that
the numbers depend on: the frozen parts' weights and configs, the preprocessing, the images, the stored precision.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from vpgtrans.errors import DataError, Dropped
from vpgtrans.layout import Size
from vpgtrans.parts import tensors_sha256
from vpgtrans.progress import track
from vpgtrans.references import cache_dir
from vpgtrans.training.workers import Loader, Work
from vpgtrans.vision.vpg import VPG, in_turns, of_pieces

Level = Literal["pixels", "patches", "tokens"]
"""How far the frozen front reaches: nowhere, through the encoder, through the connector."""

Levels = Tensor | list[Tensor]
"""Pieces of images [m, 3, S, S], or m of any shapes, or what the frozen front made of them [m, …]."""

_MISSING, _STORED, _UNREADABLE, _WITHOUT = 0, 1, 2, 3
_LOGGER = logging.getLogger(__name__)


class Images(Protocol):
    """What a data set must offer to be cached."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def id(self, row: int) -> str: ...

    def image(self, row: int) -> Image.Image: ...

    def sized(self, row: int) -> tuple[Image.Image, Size]:
        """An image, and the width and height by which it is laid out."""

    def reopen(self) -> None:
        """In a process that was forked, see `Rows.reopen`."""


class FrozenFront:
    """The frozen modules before the first one that trains, as a function from images to tensors."""

    def __init__(self, vpg: VPG, level: Level, *, dtype: torch.dtype = torch.bfloat16):
        self.vpg = vpg
        self.level = level
        self.dtype = dtype

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as one square each -> levels uint8 [B, 3, S, S], patches [B, N, d_enc] or visual tokens
        [B, T, d_vpg], on the CPU."""
        return self._frozen(torch.stack([self.vpg.transform.levels(image) for image in images]))

    def of_levels(self, levels: Levels) -> Levels:
        """As `__call__`, from resized images, uint8 [B, 3, S, S]; those of native size stay what they are."""
        if isinstance(levels, Tensor):
            return self._frozen(levels)
        assert self.level == "pixels", "no other front is for images of native size"
        return levels

    def _frozen(self, levels: Tensor) -> Tensor:
        return levels if self.level == "pixels" else in_turns(levels, self._frozen_some)

    @torch.no_grad()
    def _frozen_some(self, levels: Tensor) -> Tensor:
        parameter = next(self.vpg.encoder.parameters())
        self.vpg.encoder.eval()
        pixels = self.vpg.transform.scaled(levels.to(parameter.device, non_blocking=True))
        features = self.vpg.encode(pixels.to(parameter.dtype))
        if self.level == "tokens":
            self.vpg.connector.eval()
            features = self.vpg.connect(features.to(_dtype_of(self.vpg.connector, features.dtype)))
        return features.to("cpu", self.dtype)

    def rest(self, inputs: Levels) -> Tensor:
        """From what `__call__` gave to visual tokens, with gradients; `inputs` on the right device.

        Returns:
            [B, T, d_vpg]; of images in their native size [m, d_vpg], all of them in order.
        """
        if self.level == "pixels":
            return of_pieces(inputs, self._of_levels)
        assert isinstance(inputs, Tensor)
        if self.level == "tokens":
            return inputs.float()
        return self.vpg.connect(inputs.to(_dtype_of(self.vpg.connector, torch.float32)))

    def _of_levels(self, levels: Tensor) -> Tensor:
        pixels = self.vpg.transform.scaled(levels)
        features = self.vpg.encode(pixels.to(_dtype_of(self.vpg.encoder, pixels.dtype)))
        grid = self.vpg.grid_of(levels)
        return self.vpg.connect(features.to(_dtype_of(self.vpg.connector, torch.float32)), grid)

    def key(self) -> str:
        """sha256 over the frozen weights, their configs, the preprocessing and the stored dtype."""
        config = self.vpg.config.model_dump(mode="json")
        if self.level != "tokens":
            config.pop("connector")
        modules = [self.vpg.encoder] + ([self.vpg.connector] if self.level == "tokens" else [])
        weights = [tensors_sha256(module.state_dict()) for module in modules]
        text = json.dumps([self.level, str(self.dtype), config, weights], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class _Decoded:
    """Some images, read and resized: levels uint8 [their pieces, 3, S, S]; those without, and the unreadable."""

    rows: list[int]
    pieces: list[int]
    levels: Tensor
    without: list[int]
    reasons: dict[int, str]


class _Decoding(Work[_Decoded]):
    """Given rows, `size` at a time."""

    def __init__(self, images: Images, vpg: VPG, rows: Sequence[int], size: int):
        self.images = images
        self.transform = vpg.transform
        self.layouts = vpg.layouts
        self.rows = rows
        self.size = size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __getitem__(self, number: int) -> _Decoded:
        if not 0 <= number < len(self):
            raise IndexError(number)
        levels: list[Tensor] = []
        found = _Decoded([], [], torch.empty(0), [], {})
        for row in self.rows[number * self.size : (number + 1) * self.size]:
            try:
                levels.append(self._pieces(row))
                found.rows.append(row)
                found.pieces.append(len(levels[-1]))
            except Dropped:
                found.without.append(row)
            except DataError as error:
                found.reasons[row] = str(error)
        if levels:
            found.levels = torch.cat(levels)
        return found

    def _pieces(self, row: int) -> Tensor:
        if self.layouts is None:
            return self.transform.levels(self.images.image(row))[None]
        image, size = self.images.sized(row)
        return self.transform.pieces(image, self.layouts(size))

    def begin(self) -> None:
        self.images.reopen()


class FeatureCache:
    """A memory-mapped array of one row an image, filled as rows are asked for.

    Where images are cut into tiles it has as many rows an image as that can be; those that stay empty take no room on
    the disk, because the file is sparse, and how many were filled is kept beside it.

    A row's flag is written after the row itself has reached the disk, so a killed process leaves no half row that is
    taken for whole. Unreadable images are tried again by the next run.
    """

    def __init__(self, images: Images, front: FrozenFront, *, directory: Path | None = None):
        self.images = images
        self.front = front
        key = hashlib.sha256(f"{front.key()} {images.fingerprint}".encode()).hexdigest()[:32]
        self.directory = (directory or cache_dir() / "features") / key
        layouts = front.vpg.layouts
        self._most = 1 if layouts is None else layouts.most_pieces
        self._reasons: dict[int, str] = {}
        self._array: np.memmap | None = None
        self._known_counts: np.memmap | None = None

    def ensure(
        self,
        rows: Sequence[int],
        *,
        batch_size: int = 16,
        title: str = "features",
        each: Callable[[], None] = lambda: None,
        workers: int = 0,
    ) -> None:
        """Compute the given rows that are not there yet, with a progress bar; `each` is called before every batch.

        Images are read and resized by as many processes as `workers` says, by this one if 0.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.directory / "lock")):
            flags = self._flags()
            # What an earlier run could not read may be there by now: a network comes back, a file is mended.
            again = (_MISSING, _UNREADABLE)
            todo = [row for row in sorted(set(rows)) if flags[row] in again and row not in self._reasons]
            if not todo:
                return
            _LOGGER.info("computing %s of %d images into %s", title, len(todo), self.directory)
            decoding = _Decoding(self.images, self.front.vpg, todo, batch_size)
            loader = Loader(decoding, workers=workers)
            try:
                for decoded in track(loader, title, total=len(decoding)):
                    each()
                    self._store(decoded, flags)
            finally:
                loader.close()

    def unreadable(self, rows: Iterable[int]) -> dict[int, str]:
        """Those of the given rows that can't be read, and why; the rows must have been ensured."""
        return {row: self._reasons[row] for row in rows if row in self._reasons}

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), ...] in the stored dtype; the rows must have been ensured and be readable."""
        return self._at(np.array(rows, dtype=np.int64) * self._most)

    def pieces(self, row: int, count: int) -> Tensor:
        """The pieces of one image, [count, …].

        Raises:
            DataError: it had another number when they were computed, so it is not the same image.
        """
        if self._most > 1 and (there := int(self._counts()[row])) != count:
            raise DataError(
                f"{self.images.id(row)}: has {count} tiles now and had {there} when its features were computed; "
                f"delete {self.directory}"
            )
        return self._at(row * self._most + np.arange(count))

    def _at(self, places: np.ndarray) -> Tensor:
        if self._array is None:
            self._data(torch.Size(json.loads((self.directory / "shape.json").read_text())))
        assert self._array is not None
        return torch.from_numpy(np.ascontiguousarray(self._array[places])).view(self.front.dtype)

    # --- files ----------------------------------------------------------------------------------

    def _store(self, decoded: "_Decoded", flags: np.memmap) -> None:
        if decoded.rows:
            features = self.front.of_levels(decoded.levels)
            assert isinstance(features, Tensor), "images of native size are not cached"
            self._data(features.shape[1:])
            firsts = np.repeat(np.array(decoded.rows) * self._most, decoded.pieces)
            places = firsts + np.concatenate([np.arange(count) for count in decoded.pieces])
            self._put(places, features.view(_STORAGE[features.dtype]).numpy())
            if self._most > 1:
                counts = self._counts()
                counts[decoded.rows] = decoded.pieces
                counts.flush()
            flags[decoded.rows] = _STORED
        flags[decoded.without] = _WITHOUT
        if decoded.reasons:
            self._reasons |= decoded.reasons
            flags[list(decoded.reasons)] = _UNREADABLE
        flags.flush()

    def _put(self, places: np.ndarray, rows: np.ndarray) -> None:
        """Written, not mapped: a mapped page that a full disk has no room for ends the process without a word."""
        with (self.directory / "rows.bin").open("r+b") as file:
            for place, row in zip(places.tolist(), rows, strict=True):
                file.seek(place * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _flags(self) -> np.memmap:
        return self._one_each("flags.u8", np.uint8)

    def _counts(self) -> np.memmap:
        """Pieces of each image that is stored."""
        if self._known_counts is None:
            self._known_counts = self._one_each("pieces.u16", np.uint16)
        return self._known_counts

    def _one_each(self, name: str, kind: type[np.unsignedinteger]) -> np.memmap:
        """A number of each image, zeros at first."""
        if not (self.directory / name).exists():
            self._write(name, bytes(len(self.images) * np.dtype(kind).itemsize))
        return np.memmap(self.directory / name, dtype=kind, mode="r+", shape=(len(self.images),))

    def _data(self, row_shape: torch.Size) -> np.memmap:
        if self._array is None:
            path, shape = self.directory / "rows.bin", (len(self.images) * self._most, *row_shape)
            kind = np.dtype(_NUMPY[self.front.dtype])
            made = path.exists() and path.stat().st_size == math.prod(shape) * kind.itemsize
            if not made:
                self._write("shape.json", json.dumps(list(row_shape)).encode())
            self._array = np.memmap(path, dtype=kind, mode="r+" if made else "w+", shape=shape)
        return self._array

    def _write(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""
        temporary = self.directory / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, self.directory / name)


# numpy has no bfloat16, so its bits travel as int16.
_STORAGE = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.float32}
_NUMPY = {torch.bfloat16: np.int16, torch.float16: np.int16, torch.float32: np.float32}


def _dtype_of(module: torch.nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of a module's parameters; `default` for one without any (an identity connector)."""
    return next((parameter.dtype for parameter in module.parameters()), default)
