"""How one image stands in a prompt, by its width and height alone: nothing is decoded, no weights are needed.

    2 x 3 tiles, a thumbnail    <1,1>▦<1,2>▦<1,3>▦⏎<2,1>▦<2,2>▦<2,3>▦⏎<whole>▦    ▦: the visual tokens of a piece

The marks are words of the prompt (text tags, as in NVLM, arXiv 2409.11402): they have no parameters, so that a VPG
takes them along to another LLM.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from vpgtrans.config import ImageConfig

Size = tuple[int, int]
"""Width and height in pixels."""
Grid = tuple[int, int]
"""Rows and columns, of tiles or of patches."""


@dataclass(frozen=True)
class Layout:
    """One image as pieces of equally many visual tokens: its tiles row by row, then the whole as a thumbnail.

    Attributes:
        tokens: of a piece. grid: rows and columns of tiles. thumbnail: whether the whole follows.
        patches: rows and columns of patches of an image in its native size; None: a piece is the encoder's square.
    """

    tokens: int
    grid: Grid = (1, 1)
    thumbnail: bool = False
    patches: Grid | None = None

    @property
    def pieces(self) -> int:
        """How many times the image goes through the VPG."""
        return math.prod(self.grid) + self.thumbnail

    @property
    def visual(self) -> int:
        """Visual tokens of the image, its marks not counted."""
        return self.pieces * self.tokens

    def marked(self) -> Iterator[str]:
        """The words before each piece; words in front of the next piece begin with the line break after a row."""
        rows, columns = self.grid
        if self.pieces == 1:
            yield ""
            return
        for row in range(rows):
            for column in range(columns):
                yield ("\n" if row and not column else "") + f"<{row + 1},{column + 1}>"
        if self.thumbnail:
            yield "\n<whole>"


@dataclass(frozen=True)
class Layouts:
    """The layout of any image, where it depends on the image's size.

    Attributes:
        image: with fit tiles or native. tokens: of one square. patch: its side in pixels, of an encoder with patches.
        patches: most of them in an image of native size. tokens_of: visual tokens of a grid of patches.
    """

    image: ImageConfig
    tokens: int
    patch: int
    patches: int
    tokens_of: Callable[[Grid], int]

    def __call__(self, size: Size) -> Layout:
        if self.native:
            grid = native_grid(size, patch=self.patch, most=self.patches)
            return Layout(self.tokens_of(grid), patches=grid)
        grid = tile_grid(size, side=self.image.size, most=self.image.max_tiles or 1)
        return Layout(self.tokens, grid, thumbnail=bool(self.image.thumbnail) and grid != (1, 1))

    @property
    def native(self) -> bool:
        """Whether images keep their own shapes, instead of being cut into squares."""
        return self.image.fit == "native"

    @property
    def most_pieces(self) -> int:
        """Of any image."""
        most = self.image.max_tiles or 1
        return most + (most > 1 and bool(self.image.thumbnail))

    @property
    def key(self) -> str:
        """What a sample's length depends on, as one line of text."""
        said: list[Any] = [self.image.model_dump(mode="json"), self.tokens]
        if self.native:
            said += [self.patch, self.patches, [self.tokens_of(grid) for grid in _grids(self.patches)]]
        return json.dumps(said, sort_keys=True)


def _grids(most: int) -> list[Grid]:
    """All grids of at most so many places."""
    return [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]


@lru_cache(maxsize=1 << 16)
def tile_grid(size: Size, *, side: int, most: int) -> Grid:
    """Rows and columns of at most `most` tiles, whose aspect ratio is nearest to the image's (as a quotient).

    Of equally near grids the largest of which the image fills more than half, so that it keeps its pixels and little is
    blown up (as InternVL 1.5, arXiv 2404.16821, has it); if it fills none so far, the smallest.
    """
    width, height = size

    def rank(grid: Grid) -> tuple[Fraction, bool, int, int]:
        rows, columns = grid
        wide, high, tiles = columns * height, rows * width, rows * columns
        filled = 2 * width * height > tiles * side**2
        return Fraction(max(wide, high), min(wide, high)), not filled, -tiles if filled else tiles, max(grid)

    return min(_grids(most), key=rank)


def native_grid(size: Size, *, patch: int, most: int) -> Grid:
    """Rows and columns of patches of an image in its own size, rounded; of a larger one, scaled to at most `most`."""
    width, height = size
    rows, columns = max(1, round(height / patch)), max(1, round(width / patch))
    if rows * columns > most:
        scale = math.sqrt(most / (width * height))
        rows, columns = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        rows, columns = min(rows, most // min(columns, most)), min(columns, most // min(rows, most))
    return rows, columns
