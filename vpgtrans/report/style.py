"""One palette for page, charts and PNG: colours by role, each light and dark, and how an SVG takes them.

Series colours are from Okabe & Ito's colour-blind-safe set, darkened (light page) or lightened (dark page)
until they stand at 4.5:1 or better on their background, since the direct labels wear them.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """A role's colour on the light and on the dark page, as #rrggbb."""

    light: str
    dark: str


PALETTE = {
    "page": Colour("#fdfdfb", "#15191c"),
    "panel": Colour("#f4f5f1", "#1d2327"),
    "ink": Colour("#1c2226", "#e7ebec"),
    "muted": Colour("#5a656b", "#9eabb1"),
    "line": Colour("#d9dedb", "#353e43"),
    "accent": Colour("#00638c", "#6cc4ec"),
    "series-0": Colour("#0068a6", "#62bdf2"),  # blue: transfer
    "series-1": Colour("#b84900", "#f08a4b"),  # vermillion: inherit
    "series-2": Colour("#666a6d", "#a9b0b4"),  # grey: scratch
    "series-3": Colour("#007a57", "#3fc79d"),  # green
    "series-4": Colour("#a3457f", "#e594c2"),  # purple
    "series-5": Colour("#8a6100", "#e3ab35"),  # ochre
}

LIGHT = {role: colour.light for role, colour in PALETTE.items()}

_ARM_ROLES = {"transfer": 0, "inherit": 1, "scratch": 2}
_DASHES = ("-", (0, (6, 2)), (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (1, 1.4)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "D", "^", "v", "P")


def arm_styles(names: list[str]) -> dict[str, dict]:
    """Colour role, dash and marker of each arm; the three standing arms always look the same."""
    free = [index for index in range(len(_DASHES)) if index >= 3]
    styles = {}
    for name in names:
        index = _ARM_ROLES.get(name)
        if index is None:
            index = free[0]
            free.append(free.pop(0))  # more arms than styles: they repeat, and the direct labels tell them apart
        styles[name] = {"role": f"series-{index}", "dash": _DASHES[index], "marker": _MARKERS[index]}
    return styles


def css_variables(theme: str) -> str:
    """`--ink: #…; --muted: #…;` for theme `light` or `dark`."""
    return " ".join(f"--{role}: {getattr(colour, theme)};" for role, colour in PALETTE.items())


def inline_svg(svg: str, *, prefix: str, title: str, description: str) -> str:
    """Turn matplotlib's SVG document into an element for a page.

    Colours of the light palette become CSS variables, ids get `prefix` (they must be unique in the page),
    whatever names another host or styles the whole page goes, and `title` and `description` (both already
    escaped) become its text alternative.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    for role, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{role})")
    box = re.search(r'viewBox="[^"]+"', svg)
    head = (
        f'<svg {box.group() if box else ""} role="img" aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{title}</title><desc id="{prefix}-desc">{description}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()
