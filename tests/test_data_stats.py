"""`vpgtrans data stats`: counts that add up, lengths, resolutions, padding, samples with their masks, a page."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import COLOURS, QFORMER, THINGS, Tiny, write_captions
from tiny_vlms import tiny_blip2, tiny_llava

from vpgtrans import runs
from vpgtrans.cli.root import cli
from vpgtrans.config import VPGConfig
from vpgtrans.data.stats import figures, histogram, padding
from vpgtrans.errors import DataError
from vpgtrans.llm import open_tokenizer
from vpgtrans.runs.parts import open_outline, open_source

CHAT = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}<|end|>{% endfor %}"
VISUAL = "⟨4 visual tokens⟩"


@pytest.fixture(scope="module")
def recipe(tiny: Tiny) -> Path:
    """Captions of which two are no images, and conversations: several images, none, too long, and malformed ones."""
    tokenizer = open_tokenizer(str(tiny.target_llm))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tiny.target_llm)
    folder = tiny.root / "mixed"
    captions = write_captions(folder / "captions.parquet", count=20, unreadable=(3, 7))
    picture = Image.new("RGB", (40, 30), "red")
    picture.save(folder / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    picture.save(folder / "b.jpg", exif=turned)
    lines = [
        _talk("t0", ["a.png", "b.jpg"], "<image><image>\nWhat is there?", "A <red> sofa."),
        _talk("t1", [], "What is red?", "A flag."),
        _talk("t2", ["a.png"], "<image>\nWhat is it?", "A cat.", "And now?", "It sleeps. " * 60),
        _talk("t3", ["a.png"], "<image>\nSay much.", "The clock on the wall. " * 60),
        _talk("t4", [], "Why? " * 300, "So."),
        _talk("t5", ["a.png"], "What is it?", "A cat."),  # an image without a place
        _talk("t6", ["nowhere.png"], "<image>\nWhat is it?", "A cat."),
        _talk("t7", [], "Nobody answers.", ""),
        "{broken",
    ]
    (folder / "talks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    keys = tiny.transfer_keys(
        prompt={"max_tokens": 120},
        data={
            "train": [
                {"dataset": str(captions), "weight": 3},
                {"dataset": str(folder / "talks.jsonl"), "format": "llava"},
            ],
            "validation": [{"dataset": str(tiny.validation)}],
        },
    )
    path = tiny.root / "mixed.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def _talk(name: str, images: list[str], *said: str) -> str:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    return json.dumps({"id": name, "image": images, "conversations": turns})


def stats(recipe: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["data", "stats", str(recipe), *arguments], prog_name="vpgtrans")


def document(recipe: Path, *arguments: str) -> dict[str, Any]:
    result = stats(recipe, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# --- counts and figures -------------------------------------------------------------------------


def test_counts_add_up_and_say_what_was_left_out_and_why(recipe: Path) -> None:
    found = document(recipe, "--samples", "all")
    captions, talks = found["train"]["sources"]
    mixture = found["train"]["mixture"]
    for part in (captions, talks, mixture, found["validation"]["mixture"]):
        assert part["seen"] == part["rows"] == part["used"] + part["bad"] + part["dropped"]
        assert part["measured"] == "all"
    assert [captions[key] for key in ("rows", "used", "bad", "dropped")] == [20, 18, 2, 0]
    assert [talks[key] for key in ("rows", "used", "bad", "dropped")] == [9, 4, 3, 2]
    assert [mixture[key] for key in ("rows", "used", "bad", "dropped", "images")] == [29, 22, 5, 2, 22]
    assert talks["rules"] == {"too long": 1, "no answer": 1}
    assert talks["truncated"] == {"turns": 1, "answer": 1}
    assert talks["images"] == 4
    wheres = [(entry["where"].rpartition("/")[2], entry["reason"]) for entry in talks["problems"]]
    assert wheres[0][0] == "talks.jsonl, line 6"
    assert wheres[0][1].startswith("0 times <image> in the text for 1 images")
    assert wheres[1][0] == "talks.jsonl, line 7"
    assert "nowhere.png: No such file" in wheres[1][1]
    assert wheres[2][0] == "talks.jsonl, line 9"
    assert "no valid JSON" in wheres[2][1]
    assert [entry["where"].rpartition(", ")[2] for entry in captions["problems"]] == ["row 3", "row 7"]
    assert captions["share_of_draws"] == 0.75
    assert captions["share_of_tokens"] + talks["share_of_tokens"] == pytest.approx(1)


def test_tokens_are_the_targets_and_resolutions_those_of_upright_images(recipe: Path, tiny: Tiny) -> None:
    found = document(recipe, "--samples", "all")
    assert (found["visual_tokens"], found["max_tokens"]) == (4, 120)
    captions, talks = found["train"]["sources"]
    tokenizer = open_tokenizer(str(tiny.target_llm))
    rows = [f"a {colour} {thing}" for thing in THINGS[:5] for colour in COLOURS]
    said = [len(tokenizer.encode(text)) + 1 for place, text in enumerate(rows) if place not in (3, 7)]
    answer = captions["tokens"]["answer"]
    assert answer["mean"] == pytest.approx(np.mean(said))
    assert (answer["min"], answer["max"]) == (min(said), max(said))
    # <s>, four visual tokens, a line break, the answer and its end
    assert captions["tokens"]["length"]["mean"] == pytest.approx(np.mean(said) + 6)
    assert captions["tokens"]["text"]["mean"] == pytest.approx(np.mean(said) + 2)
    assert captions["tokens"]["visual"] == {"mean": 4.0, "min": 4, "median": 4, "p95": 4, "max": 4}
    assert talks["tokens"]["length"]["max"] == 120
    assert talks["tokens"]["visual"] == {"mean": 4.0, "min": 0, "median": 4, "p95": 8, "max": 8}
    # a.png three times, and b.jpg, which lies on its side
    assert talks["width"] == {"mean": 37.5, "min": 30, "median": 40, "p95": 40, "max": 40}
    assert talks["height"] == {"mean": 32.5, "min": 30, "median": 30, "p95": 40, "max": 40}
    assert captions["width"]["mean"] == 32
    # the mixture as it is drawn: three of four draws are captions, of 20 rows each
    brought = [0.75 * 18 / 20, 0.25 * 4 / 9]
    mean = np.average([part["tokens"]["length"]["mean"] for part in (captions, talks)], weights=brought)
    assert found["train"]["mixture"]["tokens"]["length"]["mean"] == pytest.approx(mean)


def test_padding_is_that_of_the_runs_own_batches(recipe: Path, tiny: Tiny) -> None:
    from vpgtrans.data.mixture import open_mixture
    from vpgtrans.recipe import load_recipe
    from vpgtrans.runs.data import open_prompter

    found = document(recipe, "--samples", "all")["padding"]
    checked = load_recipe(recipe)
    mixture, prompter = open_mixture(checked.data.train), open_prompter(checked)
    for stage, first in zip(found, (0, 16), strict=True):
        lengths = []
        for sample in mixture.draws(0, first, first + 16):
            try:
                lengths.append(len(prompter.encode(mixture.sample(int(sample)).text)))
            except DataError:
                continue
        assert (stage["samples"], stage["at_once"]) == (len(lengths), 4)
        for key, order in (("as_drawn", lengths), ("if_sorted", sorted(lengths))):
            batches = [order[start : start + 4] for start in range(0, len(order), 4)]
            places = sum(max(batch) * len(batch) for batch in batches)
            assert stage[key] == pytest.approx(1 - sum(order) / places)
    assert found[0]["if_sorted"] < found[0]["as_drawn"]


def test_a_sample_says_that_it_is_one_and_is_always_the_same(recipe: Path) -> None:
    found = document(recipe, "--samples", "5")
    assert [source["seen"] for source in found["train"]["sources"]] == [5, 5]
    assert found["train"]["mixture"]["measured"] == "sample"
    assert found["samples"] == 5
    assert document(recipe, "--samples", "5") == found
    text = stats(recipe, "--samples", "5").stdout
    assert "train: a sample, 10 of 29 rows measured; figures are estimates" in text
    assert "all 29 rows measured" in stats(recipe).stdout


# --- samples, bars, page ------------------------------------------------------------------------


def test_shown_samples_have_the_loss_in_brackets(recipe: Path) -> None:
    text = stats(recipe, "--show", "9", "prompt.max_tokens=null").stdout
    assert re.search(rf"<s>{VISUAL}\n【a (red|white|blue|yellow) \w+</s>】\n", text)
    assert f"<|user|>{VISUAL}{VISUAL}\nWhat is there?<|end|><|assistant|>【A <red> sofa.<|end|>】\n" in text
    assert "<|user|>What is red?<|end|><|assistant|>【A flag.<|end|>】\n" in text
    long = f"<|user|>{VISUAL}\nWhat is it?<|end|><|assistant|>【A cat.<|end|>】<|user|>And now?<|end|><|assistant|>【It"
    assert long in text
    assert re.search(r"talks.jsonl, t0: \d+ ids, \d+ learnt, 2 images\n", text)
    shown = document(recipe, "--show", "9")["shown"]
    cut = next(entry for entry in shown if entry["id"] == "t3")
    assert (cut["ids"], cut["cut"]) == (120, "answer")
    for entry in shown:
        assert sum(piece["visual"] for piece in entry["pieces"]) == entry["images"]
    sources = [entry["source"] for entry in shown]
    assert len(set(sources[:2])) == 2  # in turn


def test_the_mask_shows_in_colour_too_on_a_terminal(recipe: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "stats", str(recipe), "--show", "1"], color=True)
    assert re.search(r"\x1b\[32m\x1b\[1m【[^】]*】\x1b\[0m\n", result.stdout)


def test_bars_stand_for_shares(recipe: Path) -> None:
    text = stats(recipe, "--samples", "all").stdout
    bars = document(recipe, "--samples", "all")["train"]["histograms"]["width"]
    assert sum(bar["share"] for bar in bars) == pytest.approx(1)
    lines = text.split("\nwidth of images\n")[1].split("\n\n")[0].splitlines()
    largest = max(bars, key=lambda bar: bar["share"])
    drawn = [re.match(r"\s*([\d,–]+)\s+([█▏▎▍▌▋▊▉]*)\s+([\d.]+)%", line) for line in lines]
    assert len(drawn) == len(bars)
    longest = max((match for match in drawn if match), key=lambda match: len(match[2]))
    assert longest[1].startswith(f"{largest['from']:,}")
    assert len(longest[2]) == 40


def test_the_page_is_whole_in_itself_and_shows_pictures_masks_and_problems(recipe: Path, tmp_path: Path) -> None:
    page = tmp_path / "data.html"
    result = stats(recipe, "--html", str(page), "--samples", "all")
    assert result.exit_code == 0, result.stderr
    assert f"page: {page}" in result.stdout
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", html)
    assert html.count('<img src="data:image/png;base64,') >= 20
    assert "<mark>A &lt;red&gt; sofa.&lt;|end|&gt;</mark>" in html
    assert f'<span class="visual">{VISUAL}</span>' in html
    assert html.count("<svg") == 4
    for words in ("29 training samples", "too long", "no valid JSON", "nowhere.png", "later turns left out"):
        assert words in html
    assert list(tmp_path.iterdir()) == [page]


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "0 is neither a number of rows above zero nor all"),
        (["--samples", "few"], "few is neither"),
        (["--show", "-1"], "-1 is not in the range"),
        (["--html", "{tmp}/nowhere/x.html"], "there is no directory"),
        (["seeed=1"], "did you mean seed?"),
        (['data.train=[{dataset: "nowhere.parquet"}]'], "nowhere.parquet"),
        (["target.llm={tmp}"], "config.json"),
        (["prompt.format=chat", "target.llm={source_llm}"], "no chat template"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    recipe: Path, tiny: Tiny, tmp_path: Path, arguments: list[str], words: str
) -> None:
    given = [a.replace("{tmp}", str(tmp_path)).replace("{source_llm}", str(tiny.source_llm)) for a in arguments]
    result = stats(recipe, *given)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verb_is_answered_with_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["data", "stat"], prog_name="vpgtrans")
    assert result.exit_code == 2
    assert "Did you mean stats?" in result.stderr


def test_help_loads_no_torch() -> None:
    code = """if True:
        import sys
        from vpgtrans.cli import cli
        try:
            cli(["data", "stats", "--help"], prog_name="vpgtrans")
        except SystemExit:
            print("HEAVY", sorted({"torch", "transformers", "numpy", "pydantic"} & set(sys.modules)))
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("HEAVY []\n")
    assert "vpgtrans data stats recipes/quickstart.yaml --show 3" in out


# --- without weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_blip2, tiny_llava])
def test_visual_tokens_and_prompt_of_others_vlms_are_known_without_their_weights(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "vlm")
    opened = open_source(str(path), seed=0)
    for file in path.glob("*.safetensors"):
        file.unlink()
    outline = open_outline(str(path))
    assert (outline.visual_tokens, outline.prompt) == (opened.vpg.tokens, opened.prompt)


@pytest.mark.parametrize("connector", [QFORMER, {"kind": "identity"}])
def test_visual_tokens_of_a_vpg_to_be_built_are_known(tiny: Tiny, connector: dict[str, Any]) -> None:
    config = VPGConfig.model_validate(
        {"encoder": {"kind": "huggingface", "reference": str(tiny.encoder)}, "connector": connector}
    )
    assert open_outline(config).visual_tokens == open_source(config, seed=0).vpg.tokens


# --- before a run -------------------------------------------------------------------------------


def test_a_run_says_first_what_its_sources_yield(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vpgtrans.recipe import load_recipe

    with caplog.at_level(logging.INFO, logger="vpgtrans"):
        runs.transfer(load_recipe(recipe), output=tmp_path / "run", dry_run=True, device="cpu")
    table = next(record.getMessage() for record in caplog.records if "training data" in record.getMessage())
    lines = table.splitlines()
    row = next(line for line in lines if "75.0%" in line).split()
    # without its headers, every caption counts as used
    assert row[-6:-4] == ["20", "75.0%"]
    row = next(line for line in lines if "25.0%" in line).split()
    assert row[-6:-4] == ["9", "25.0%"]
    # t6 is in, whose image isn't there: five samples with five images, over nine rows
    assert row[-2] == f"{5 / 9:.1f}"


# --- figures ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_histograms_hold_every_value_once(values: list[int]) -> None:
    array = np.array(values)
    bars = histogram(array, np.ones(len(array)))
    for bar in bars:
        inside = ((array >= bar["from"]) & (array <= bar["to"])).mean()
        assert bar["share"] == pytest.approx(inside)
    assert sum(bar["share"] for bar in bars) == pytest.approx(1)
    assert len(bars) <= 13
    assert all(first["to"] + 1 == second["from"] for first, second in pairwise(bars))


def test_figures_of_weighted_values() -> None:
    assert figures(np.array([], dtype=int), np.array([])) is None
    found = figures(np.array([1, 2, 30]), np.array([1.0, 1.0, 6.0]))
    assert found == {"mean": 183 / 8, "min": 1, "median": 30, "p95": 30, "max": 30}


def test_padding_of_nothing_and_of_equals() -> None:
    assert padding(np.array([], dtype=int), 4) is None
    assert padding(np.array([7, 7, 7]), 2) == 0
    assert padding(np.array([1, 3, 2]), 2) == pytest.approx(1 - 6 / 8)


def test_a_damaged_image_whose_header_is_whole_counts_as_used(recipe: Path, tmp_path: Path) -> None:
    # stated on the page and in the help: nothing is decoded
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue()[:-900])
    (tmp_path / "a.txt").write_text("a cat")
    found = document(recipe, f"data.train=[{{dataset: {tmp_path}, format: folder}}]")
    assert found["train"]["mixture"]["used"] == 1
    assert found["train"]["mixture"]["width"]["max"] == 64
