"""Where an image's tiles and their marks stand in a prompt: by its size alone, never cut, never learnt."""

import math
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from vpgtrans.config import ImageConfig, PromptConfig
from vpgtrans.data.stats import pieces
from vpgtrans.errors import DataError
from vpgtrans.layout import Layout, Layouts, Size, native_grid, tile_grid
from vpgtrans.prompts import IMAGE, VISUAL, Prompter, TooLong, Turn

SIDES = st.integers(1, 3000)
TILES = Layouts(ImageConfig(size=28, fit="tiles", max_tiles=6), tokens=3, patch=14, patches=4, tokens_of=math.prod)
NATIVE = Layouts(ImageConfig(size=28, fit="native"), tokens=4, patch=14, patches=12, tokens_of=math.prod)
TOKENIZERS = {style: tiny_tokenizer(style, add_bos=style == "metaspace") for style in ("bytes", "metaspace")}


def prompter(layouts: Layouts | None = TILES, *, limit: int | None = None, style: str = "bytes") -> Prompter:
    return Prompter(TOKENIZERS[style], PromptConfig(), visual_tokens=3, layouts=layouts, limit=limit)


# --- grids --------------------------------------------------------------------------------------


@given(SIDES, SIDES, st.integers(1, 40), st.sampled_from([14, 160, 448]))
def test_a_grid_of_tiles_keeps_to_its_limit_and_turns_with_the_image(width, height, most, side):
    rows, columns = tile_grid((width, height), side=side, most=most)
    assert 1 <= rows * columns <= most
    assert tile_grid((height, width), side=side, most=most) == (columns, rows)


@given(SIDES, SIDES, st.integers(1, 12))
def test_no_other_grid_has_a_nearer_aspect_ratio(width, height, most):
    def off(rows: int, columns: int) -> Fraction:
        ratio = Fraction(columns * height, rows * width)
        return max(ratio, 1 / ratio)

    chosen = off(*tile_grid((width, height), side=160, most=most))
    assert all(chosen <= off(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((600, 600), (1, 1)),  # less than half of 2 x 2 tiles
        ((640, 640), (2, 2)),
        ((3000, 3000), (3, 3)),
        ((100, 100), (1, 1)),
        ((900, 450), (1, 2)),
        ((1800, 900), (2, 4)),
        ((10, 3000), (9, 1)),
    ],
)
def test_of_equally_near_grids_the_largest_that_the_image_fills_by_half(size: Size, grid: tuple[int, int]):
    assert tile_grid(size, side=448, most=9) == grid


@given(SIDES, SIDES, st.integers(1, 400))
def test_a_native_grid_keeps_to_its_limit_and_turns_with_the_image(width, height, most):
    rows, columns = native_grid((width, height), patch=14, most=most)
    assert 1 <= rows * columns <= most
    assert native_grid((height, width), patch=14, most=most) == (columns, rows)


@given(st.integers(14, 400), st.integers(14, 400))
def test_an_image_that_fits_keeps_its_own_size_to_half_a_patch(width, height):
    rows, columns = native_grid((width, height), patch=14, most=10**6)
    assert abs(rows * 14 - height) <= 7
    assert abs(columns * 14 - width) <= 7


def test_a_larger_image_is_scaled_and_keeps_its_shape():
    rows, columns = native_grid((4000, 2000), patch=14, most=576)
    assert (rows, columns) == (16, 33)


# --- in a prompt --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["bytes", "metaspace"])
def test_tiles_have_marks_a_line_break_after_each_row_and_the_whole_at_last(style):
    asked = prompter(style=style)
    shown = pieces(asked.encode("a cat", [(80, 56)]), asked)
    visual = "⟨3 visual tokens⟩"
    text = "".join(piece.text for piece in shown).removeprefix("<s>")
    assert text == (
        f"<1,1>{visual}<1,2>{visual}<1,3>{visual}\n<2,1>{visual}<2,2>{visual}<2,3>{visual}\n<whole>{visual}\na cat</s>"
    )
    assert [piece.text for piece in shown if piece.learnt] == ["a cat</s>"]


def test_an_image_of_one_tile_stands_there_as_ever():
    assert np.array_equal(prompter().encode("a cat", [(20, 20)]).ids, prompter(None).encode("a cat").ids)


def test_a_native_image_has_the_places_of_its_own_grid():
    encoded = prompter(NATIVE).encode("a cat", [(42, 28)])
    assert encoded.layouts == (Layout(6, patches=(2, 3)),)
    assert (encoded.ids == VISUAL).sum() == 6


def test_without_a_thumbnail_there_is_none():
    image = ImageConfig(size=28, fit="tiles", max_tiles=2, thumbnail=False)
    layout = Layouts(image, tokens=3, patch=14, patches=4, tokens_of=math.prod)((56, 28))
    assert (layout.pieces, list(layout.marked())) == (2, ["<1,1>", "<1,2>"])


SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4)


@settings(deadline=None)
@given(SIZES, st.sampled_from([TILES, NATIVE]), st.integers(4, 160), st.sampled_from(["caption", "chat", "document"]))
def test_what_is_cut_keeps_whole_images_and_learns_no_mark(sizes, layouts, limit, kind):
    if kind == "document":
        turns = [Turn("assistant", f"a dog {IMAGE}" + f" and a red cat {IMAGE}" * (len(sizes) - 1) + " asleep")]
    elif kind == "chat":
        turns = [
            turn
            for _ in sizes
            for turn in (Turn("user", f"{IMAGE}\nWhat is it?"), Turn("assistant", "a cat on a sofa"))
        ]
    else:
        turns, sizes = [Turn("user", IMAGE), Turn("assistant", "a cat on a sofa")], sizes[:1]
    whole, asked = prompter(layouts).encode(turns, sizes), prompter(layouts, limit=limit)
    assert [layout.visual for layout in whole.layouts] == [layouts(size).visual for size in sizes]
    try:
        encoded = asked.encode(turns, sizes)
    except TooLong as error:
        refused = str(error)
        encoded = None
    if encoded is None:
        assert refused.endswith(f"{limit} are allowed: too long")
        before = prompter(layouts).question(turns[:1], sizes) if kind != "document" else np.array([])
        assert kind == "document" or len(before) >= limit
        return
    assert len(encoded) <= limit
    assert encoded.images == len(encoded.layouts)
    assert encoded.layouts == whole.layouts[: encoded.images]
    assert np.array_equal(encoded.ids, whole.ids[: len(encoded)]) or encoded.cut
    assert (encoded.ids == VISUAL).sum() == sum(layout.visual for layout in encoded.layouts)
    shown = pieces(encoded, asked)
    assert sum(piece.visual for piece in shown) == encoded.pieces
    learnt = "".join(piece.text for piece in shown if piece.learnt)
    assert "<1" not in learnt
    assert "whole" not in learnt
    # No part of an image that was left out: every mark that is there belongs to one that is there.
    marks = sum(piece.text.count("<1,1>") for piece in shown)
    assert marks == sum(layout.pieces > 1 for layout in encoded.layouts)


def test_an_image_whose_tiles_pass_the_limit_is_left_out_by_rule():
    with pytest.raises(TooLong, match=r"before the answer \(1 images in 7 pieces\); 40 are allowed: too long"):
        prompter(limit=40).encode("a cat", [(80, 56)])


def test_each_place_needs_the_size_of_its_image():
    with pytest.raises(DataError, match="1 times <image>, and 0 images"):
        prompter().encode("a cat")


def test_a_question_has_the_same_ids_as_in_training():
    asked, turns = prompter(), [Turn("user", f"{IMAGE}\nWhat is it?"), Turn("assistant", "a cat")]
    before = asked.question(turns[:1], [(80, 56)])
    assert np.array_equal(asked.encode(turns, [(80, 56)]).ids[: len(before)], before)


def test_the_key_of_a_layout_says_what_lengths_depend_on():
    def layouts(tokens: int = 3, tokens_of=math.prod, patches: int = 12, **image) -> str:
        return Layouts(ImageConfig(size=28, **image), tokens, 14, patches, tokens_of).key

    keys = [
        layouts(fit="tiles"),
        layouts(fit="tiles", max_tiles=5),
        layouts(fit="tiles", thumbnail=False),
        layouts(fit="tiles", tokens=4),
        layouts(fit="native"),
        layouts(fit="native", patches=13),
        layouts(fit="native", tokens_of=lambda grid: 1),
    ]
    assert len(set(keys)) == len(keys)


def test_the_picture_in_the_docs_is_what_its_command_draws(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "argv", ["draw_tiles.py", "--output", str(tmp_path / "tiles.svg")])
    runpy.run_path(str(root / "tools" / "draw_tiles.py"), run_name="__main__")
    assert (tmp_path / "tiles.svg").read_text() == (root / "docs" / "tiles.svg").read_text()
