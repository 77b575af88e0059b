"""What both pages share: tables as data, the template environment, and writing the file."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from vpgtrans.errors import OutputError
from vpgtrans.report.format import NOTHING
from vpgtrans.report.style import css_variables

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page's content security policy: the browser itself refuses any request."""


@dataclass(frozen=True)
class Head:
    """A column's head: plain words, and the field's term in small below."""

    text: str
    term: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A table's cell: the figure, a smaller line below, and a mark in words (`chosen`)."""

    text: str
    below: str = ""
    mark: str = ""


@dataclass
class Table:
    """A table with one row head a row; `cards` turns rows into cards on a phone, for many columns."""

    caption: str
    heads: list[Head]
    rows: list[list[Cell]] = field(default_factory=list)
    emphasised: set[int] = field(default_factory=set)
    """Indices of rows that stand out (each says why in a mark, not by colour alone)."""
    total: bool = False
    """The last row sums up the others."""
    cards: bool = False
    dense: bool = False
    """Smaller type and padding, for many columns."""

    def add(self, *cells: str | Cell, emphasised: bool = False) -> None:
        if emphasised:
            self.emphasised.add(len(self.rows))
        self.rows.append([Cell(cell) if isinstance(cell, str) else cell for cell in cells])

    def drop_empty_columns(self) -> None:
        """Take out columns, the first aside, in which no row has a figure."""
        filled = [any(row[i].text != NOTHING or row[i].below for row in self.rows) for i in range(len(self.heads))]
        kept = [i for i, shown in enumerate(filled) if shown or i == 0]
        self.heads = [self.heads[i] for i in kept]
        self.rows = [[row[i] for i in kept] for row in self.rows]


_LINE = 24
"""Characters of a heading that surely fit on a phone's line."""


def keep_whole(text: str, names: Sequence[str]) -> Markup:
    """`text` escaped; `names` that fit on any line aren't broken at their hyphens, nor the punctuation after them."""
    longest_first = sorted({name for name in names if 0 < len(name) <= _LINE}, key=len, reverse=True)
    if not longest_first:
        return Markup(escape(text))
    pattern = rf"(?<!\S)((?:{'|'.join(re.escape(name) for name in longest_first)})[:;,.]?)(?=\s|$)"
    parts = re.split(pattern, text)
    pieces = (
        Markup('<span class="name">{}</span>').format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )
    return Markup("").join(pieces)


def sentence(parts: Sequence[str], *, last: str = "and") -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}" if parts else ""


def write_page(target: Path, template: str, **values: Any) -> Path:
    """Render `template` into the file `target`, whole or not at all.

    Raises:
        OutputError: the file can't be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vpgtrans.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["nothing"] = NOTHING
    style = Path(__file__).with_name("templates").joinpath("style.css").read_text(encoding="utf-8")
    page = environment.get_template(template).render(
        style=Markup(style),
        light=css_variables("light"),
        dark=css_variables("dark"),
        policy=POLICY,
        **values,
    )
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"{target}: can't write the report ({error})") from error
    return target
