"""Draw how an image is cut into tiles and marked: docs/tiles.svg.

    python tools/draw_tiles.py

The grid and the marks are what `vpgtrans.layout` gives; the picture is made up.
"""

import argparse
import math
from pathlib import Path

from vpgtrans.config import ImageConfig
from vpgtrans.layout import Layouts

TARGET = Path(__file__).parents[1] / "docs" / "tiles.svg"
WIDTH, HEIGHT = 640, 400
SIDE, GAP, TEXT = 100, 14, 16
"""Of a tile as it is drawn; between tiles; of a mark."""

SCENE = (
    '<rect width="640" height="400" fill="#bfe0f5"/><circle cx="520" cy="90" r="52" fill="#f6c945"/>'
    '<path d="M0 300 L150 130 L290 290 L410 190 L640 330 V400 H0 Z" fill="#7a9a6b"/>'
    '<path d="M0 340 Q200 280 360 345 T640 320 V400 H0 Z" fill="#4f7747"/>'
    '<rect x="250" y="262" width="90" height="72" fill="#c9573f"/>'
    '<path d="M238 264 L295 214 L352 264 Z" fill="#6d3426"/>'
    '<rect x="284" y="294" width="24" height="40" fill="#3c2a20"/>'
)


def picture() -> str:
    """The SVG."""
    layouts = Layouts(ImageConfig(size=160, fit="tiles"), tokens=36, patch=1, patches=1, tokens_of=math.prod)
    layout = layouts((WIDTH, HEIGHT))
    rows, columns = layout.grid
    marks = [mark.strip() for mark in layout.marked()]
    scale = f"scale({columns * SIDE / WIDTH:g} {rows * SIDE / HEIGHT:g})"
    parts: list[str] = []
    left, top = 10 + 260 + 40, 24
    parts.append(f'<svg x="10" y="{top + TEXT}" width="260" height="{260 * HEIGHT / WIDTH:g}" viewBox="0 0 640 400">')
    parts.append(f"{SCENE}</svg>")
    parts.append(_text(10, top + TEXT - 6, f"an image of {WIDTH} x {HEIGHT} pixels"))
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        x, y = left + column * (SIDE + GAP), top + row * (SIDE + GAP + TEXT) + TEXT
        parts.append(_cut(x, y, f"{column * SIDE} {row * SIDE} {SIDE} {SIDE}", scale))
        parts.append(_text(x, y - 5, marks[place]))
    x = left + columns * (SIDE + GAP) + 26
    parts.append(_cut(x, top + TEXT, f"0 0 {SIDE} {SIDE}", f"scale({SIDE / WIDTH:g} {SIDE / HEIGHT:g})"))
    parts.append(_text(x, top + TEXT - 5, marks[-1]))
    bottom = top + rows * (SIDE + GAP + TEXT) + 24
    written = "".join(mark.replace("\n", "⏎") + "▦" for mark in layout.marked())
    parts.append(_text(10, bottom, f"{written}   ▦: {layout.tokens} visual tokens"))
    width, height = x + SIDE + 10, bottom + 14
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = f'font-family="monospace" font-size="{TEXT - 3}" fill="#333"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{ground}{"".join(parts)}</svg>\n'


def _cut(x: int, y: int, view: str, scale: str) -> str:
    """A square that shows a part of the scene."""
    inside = f'<g transform="{scale}">{SCENE}</g>'
    return f'<svg x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" viewBox="{view}">{inside}</svg>'


def _text(x: float, y: float, words: str) -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:g}" y="{y:g}" xml:space="preserve">{escaped}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.parse_args().output.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
