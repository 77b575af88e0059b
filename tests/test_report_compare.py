"""The comparison's page, plot and table: what they show, when they say that an arm lost, odd summaries."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import report_runs as runs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_runs import Page, rewrite

from vpgtrans.errors import DataError
from vpgtrans.report import compare_plot, markdown_table, write_compare_report
from vpgtrans.report.curves import compare_arms, scratch_best
from vpgtrans.report.plots import spread_apart
from vpgtrans.report.style import PALETTE


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    return runs.write_compare(tmp_path / "compare")


def test_arms_reach_scratchs_best_where_their_curves_say() -> None:
    summary = {
        "arms": {
            "scratch": {
                "val_loss": [4.0, 3.0],
                "curves": [[[0, 9], [100, 5], [200, 4]], [[0, 9], [100, 3], [200, 3.5]]],
            },
            "transfer": {
                "val_loss": [3.5, 3.1],
                "curves": [[[0, 9], [10, 4], [200, 3.5]], [[0, 9], [10, 5], [200, 3.1]]],
            },
        },
        "speedup": {"transfer": None},
    }
    scratch, transfer = compare_arms(summary)
    assert scratch.reached == [200, 100]
    assert transfer.reached == [10, math.inf]
    assert scratch_best([scratch, transfer]) == 3.5
    grid, middle, low, high = transfer.band
    assert grid.tolist() == [0, 10, 200]
    assert middle.tolist() == [9, 4.5, 3.3]
    assert low.tolist() == [9, 4, 3.1]
    assert high.tolist() == [9, 5, 3.5]
    assert "| transfer | 3.300 [3.100 – 3.500] | never | never reached by 1 of 2 seeds |" in markdown_table(summary)


def test_a_seed_without_finite_losses_does_not_shift_the_others() -> None:
    nothing: list[list[float]] = [[0, math.nan]]
    curves = {
        "scratch": [[[0, 9], [100, 5]], nothing, [[0, 9], [200, 2]]],
        "transfer": [nothing, [[0, 9], [10, 1]], [[0, 9], [30, 2]]],
    }
    scratch, transfer = compare_arms({"arms": {name: {"curves": arm} for name, arm in curves.items()}})
    assert scratch.reached == [100, 200]
    assert transfer.reached == [math.inf, 30]
    assert [len(arm.curves) for arm in (scratch, transfer)] == [2, 2]
    del curves["transfer"][1:2]
    with pytest.raises(DataError, match="arm 'transfer': 2 curves, scratch has 3"):
        compare_arms({"arms": {name: {"curves": arm} for name, arm in curves.items()}})


def test_markdown_table_equals_the_summary() -> None:
    summary = runs.compare_summary()
    lines = markdown_table(summary).splitlines()
    assert lines[1] == "|:--|--:|--:|--:|--:|"
    for line, name in zip(lines[2:5], ("scratch", "inherit", "transfer"), strict=True):
        low, middle, high = sorted(summary["arms"][name]["val_loss"])
        assert line.startswith(f"| {name} | {middle:.3f} [{low:.3f} – {high:.3f}] |")
    assert "| 20× [13.3× – 20×] | 640 |" in lines[4]
    assert f"- **inherit**: {summary['definitions']['inherit']}" in lines


def test_comparison_page_shows_plot_table_definitions_and_recipe(comparison: Path) -> None:
    page = Page(write_compare_report(comparison))
    ids = [section["id"] for section in page.all("section")]
    assert ids == ["curves", "arms", "definitions", "recipe", "environment"]
    assert "transfer was as good as scratch at its best after 20× fewer samples (median of 3 seeds)." in page.text
    assert "name: quickstart" in page.text
    assert "the better of two rates" in page.text
    assert ">lowest<" in page.section("arms")


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (None, "transfer never reached scratch's best validation loss"),
        ({"median": 0.5, "min": 0.4, "max": 0.6}, "transfer needed more samples than scratch"),
    ],
)
def test_losing_is_said_plainly(comparison: Path, gain: dict | None, words: str) -> None:
    def change(summary: dict) -> None:
        summary["speedup"]["transfer"] = gain
        summary["arms"]["transfer"]["val_loss"] = [5.0, 5.1, 5.2]

    rewrite(comparison / "summary.json", change)
    text = Page(write_compare_report(comparison)).text
    assert words in text
    assert "inherit ended below transfer" in text


def test_plot_is_1600_wide_and_shows_every_arms_colour(tmp_path: Path) -> None:
    path = compare_plot(runs.compare_summary(), tmp_path / "deep" / "plot.png")
    with Image.open(path) as image:
        assert image.size[0] == 1600
        assert 700 <= image.size[1] <= 1000
        colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b, *_) in image.convert("RGB").getcolors(1 << 20)}
    assert {PALETTE[f"series-{index}"].light for index in range(3)} <= colours


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_labels_keep_their_order_and_distance(places: list[float], gap: float) -> None:
    moved = spread_apart(places, gap=gap)
    order = sorted(range(len(places)), key=lambda index: places[index])
    assert all(moved[upper] - moved[lower] >= gap - 1e-9 for lower, upper in pairwise(order))
    assert sum(moved) == pytest.approx(sum(places), abs=1e-9)  # a crowd moves to both sides alike


def test_labels_far_apart_stay() -> None:
    assert spread_apart([0.9, 0.1, 0.5], gap=0.1) == pytest.approx([0.9, 0.1, 0.5])


def many_arms() -> dict:
    summary = runs.compare_summary()
    for index in range(8):
        summary["arms"][f"converter-{index}"] = summary["arms"]["inherit"]
    return summary


def one_seed_curve_only() -> dict:
    summary = runs.compare_summary(seeds=1)
    for arm in summary["arms"].values():
        del arm["curves"], arm["seconds"]
    return summary


def without_scratch() -> dict:
    summary = runs.compare_summary()
    del summary["arms"]["scratch"], summary["speedup"], summary["definitions"]
    return summary


@pytest.mark.parametrize("build", [many_arms, one_seed_curve_only, without_scratch])
def test_unusual_comparisons_are_drawn(build, comparison: Path, tmp_path: Path) -> None:
    (comparison / "summary.json").write_text(json.dumps(build()))
    assert compare_plot(build(), tmp_path / "plot.png").stat().st_size > 10_000
    assert "NaN" not in Page(write_compare_report(comparison)).text


def test_a_summary_that_is_no_comparison_is_a_clear_error(tmp_path: Path) -> None:
    run = runs.write_run(tmp_path / "run")
    with pytest.raises(DataError, match="not the summary"):
        write_compare_report(run)
    with pytest.raises(DataError, match="arm 'a'"):
        compare_plot({"arms": {"a": {"val_loss": []}}}, tmp_path / "plot.png")
    with pytest.raises(DataError, match="nothing to draw"):
        compare_plot({"arms": {"a": {"val_loss": [1.0], "curve": [[0, 1.0]]}}}, tmp_path / "plot.png")


def test_a_comparison_is_escaped(comparison: Path) -> None:
    evil = "<script>alert(1)</script>|$x_1$"

    def change(summary: dict) -> None:
        summary["arms"][evil] = summary["arms"].pop("inherit")
        summary["definitions"] = {evil: evil}

    rewrite(comparison / "summary.json", change)
    page = Page(write_compare_report(comparison))
    assert not page.all("script")
    assert evil in page.text
    table = markdown_table(json.loads((comparison / "summary.json").read_text()))
    assert evil.replace("|", "\\|") in table
