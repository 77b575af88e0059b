"""`vpgtrans data filter` and `filter:` in a recipe: scores against independent ones, choices, sidecars, stops."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import invoke
from filters import drawing, filtered, png, texts, write_table
from PIL import Image

import vpgtrans as vt
from vpgtrans.data.config import DataSource
from vpgtrans.data.filter import run as run_module
from vpgtrans.data.filter.choose import Rule, choose
from vpgtrans.data.filter.run import filter_data
from vpgtrans.data.filter.scorers import Batch, Length, image_hash, text_hash
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.sources import open_dataset
from vpgtrans.errors import DataError

NAN = float("nan")


# --- choosing -----------------------------------------------------------------------------------


def test_a_fraction_keeps_the_best_and_of_equals_the_earlier():
    scores = np.array([3.0, 1.0, 2.0, NAN, 2.0])
    assert Rule(fraction=0.5).keep(scores).tolist() == [True, False, True, False, False]
    assert Rule("low", fraction=0.5).keep(scores).tolist() == [False, True, True, False, False]
    assert Rule(fraction=0).keep(scores).sum() == 0
    assert Rule(fraction=1).keep(scores).sum() == 4


def test_thresholds_keep_their_ends():
    scores = np.array([3.0, 1.0, 2.0, NAN])
    assert Rule(minimum=2).keep(scores).tolist() == [True, False, True, False]
    assert Rule("low", maximum=2).keep(scores).tolist() == [False, True, True, False]
    assert Rule(minimum=2, maximum=2).keep(scores).tolist() == [False, False, True, False]


def test_intersection_union_and_rules_that_always_hold():
    scores = {
        "a": np.array([1.0, 1.0, 0.0, 0.0, NAN, NAN]),
        "b": np.array([1.0, 0.0, 1.0, 0.0, 0.0, NAN]),
        "length": np.array([0.0, 5.0, 5.0, 5.0, 5.0, 5.0]),
    }
    rules = {"a": Rule(minimum=1), "b": Rule(minimum=1), "length": Rule(minimum=5, always=True)}
    assert choose(scores, rules, union=False).tolist() == [False, False, False, False, False, True]
    assert choose(scores, rules, union=True).tolist() == [False, True, True, False, False, True]
    assert choose(scores, {"a": Rule()}, union=True).all()  # a score that nothing is asked of


# --- `filter:` in a recipe ----------------------------------------------------------------------


def test_rows_that_are_not_kept_are_not_there(tmp_path: Path):
    data = texts(tmp_path / "data.parquet", 11)
    keep = [n % 3 == 0 for n in range(11)]  # 0 3 6 9: of the second row group 6 alone, of the third 9
    write_table(tmp_path / "keep.parquet", row=list(range(11)), keep=keep)
    source = DataSource(dataset=str(data), text="body", filter=str(tmp_path / "keep.parquet"))
    opened = open_dataset(source)
    assert [opened.sample(row).id for row in range(len(opened))] == ["t0", "t3", "t6", "t9"]
    assert list(opened.rows.values("body")) == ["text 0", "text 3", "text 6", "text 9"]
    assert opened.rows.where(2).endswith("row 6")
    assert opened.rows.stretches is not None
    assert opened.rows.stretches.tolist() == [0, 2, 3]
    mixture = Mixture([(opened, 1.0)])
    assert sorted(mixture.order(0, 0).tolist()) == [0, 1, 2, 3]
    limited = open_dataset(source.model_copy(update={"limit": 3}))
    assert [limited.id(row) for row in range(len(limited))] == ["t0", "t3", "t6"]
    whole = open_dataset(source.model_copy(update={"filter": None}))
    assert whole.fingerprint != opened.fingerprint
    write_table(tmp_path / "keep.parquet", row=list(range(11)), keep=[*keep[:-2], False, False])
    assert open_dataset(source).fingerprint != opened.fingerprint


def test_a_row_without_an_id_keeps_the_number_that_it_has_in_the_file(tmp_path: Path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"body": f"text {n}"}) + "\n" for n in range(4)))
    write_table(tmp_path / "keep.parquet", row=[0, 1, 2, 3], keep=[False, False, True, True])
    opened = open_dataset(DataSource(dataset=str(file), text="body", filter=str(tmp_path / "keep.parquet")))
    assert [opened.id(row).rpartition("/")[2] for row in (0, 1)] == ["2", "3"]


def test_a_file_of_others_goes_by_id(tmp_path: Path):
    data = texts(tmp_path / "data.parquet")
    write_table(tmp_path / "keep.parquet", id=["t8", "t1", "elsewhere", "t2"], keep=[True, True, True, None])
    opened = open_dataset(DataSource(dataset=str(data), text="body", filter=str(tmp_path / "keep.parquet")))
    assert [opened.id(row) for row in range(len(opened))] == ["t1", "t8"]


def test_rows_without_an_id_are_not_those_without_one_in_a_file(tmp_path: Path):
    data = write_table(tmp_path / "data.parquet", id=[None, "b", None], body=["x", "y", "z"])
    file = write_table(tmp_path / "keep.parquet", id=pa.array([None, "b"]), keep=[True, True], score=[1.0, 2.0])
    opened = open_dataset(DataSource(dataset=str(data), text="body", filter=str(file)))
    assert [opened.id(row) for row in range(len(opened))] == ["b"]
    filtered(data, "--text", "body", "--scores", tmp_path / "s.parquet", "--scorer", f"column:{file}:score")
    assert pq.read_table(tmp_path / "s.parquet")["column:keep.parquet:score"].to_pylist() == [None, 2, None]
    write_table(tmp_path / "none.parquet", id=pa.array([None], pa.string()), keep=[True])
    with pytest.raises(DataError, match="keeps none"):
        open_dataset(DataSource(dataset=str(data), text="body", filter=str(tmp_path / "none.parquet")))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"row": [0, 1], "kept": [True, True]}, "no boolean column `keep`"),
        ({"row": [0, 1], "keep": [1, 1]}, "no boolean column `keep`"),
        ({"name": ["t0"], "keep": [True]}, "no column `row` or `id`"),
        ({"row": [0, 10], "keep": [True, True]}, "row 10 of a data set of 10 rows"),
        ({"row": [0, 1], "keep": [False, False]}, "keeps none of the 10 rows"),
        ({"id": ["x", "y"], "keep": [True, True]}, "none of the ids that it keeps"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_one_message(tmp_path: Path, columns: dict[str, Any], message: str):
    data = texts(tmp_path / "data.parquet")
    file = write_table(tmp_path / "keep.parquet", **columns)
    with pytest.raises(DataError, match=message):
        open_dataset(DataSource(dataset=str(data), text="body", filter=str(file)))


def test_scores_of_another_data_set_are_refused(tmp_path: Path):
    data, other = texts(tmp_path / "data.parquet"), texts(tmp_path / "other.parquet", 10, more=list(range(10)))
    arguments = ("--text", "body", "--scores", tmp_path / "s.parquet", "--scorer", "length", "--words", "1:")
    filtered(data, *arguments)
    assert len(open_dataset(DataSource(dataset=str(data), text="body", filter=str(tmp_path / "s.parquet")))) == 10
    with pytest.raises(DataError, match="made for another data set"):
        open_dataset(DataSource(dataset=str(other), text="body", filter=str(tmp_path / "s.parquet")))
    refused = invoke("data", "filter", other, *arguments)
    assert refused.exit_code == 2
    assert "scores of another data set" in refused.output
    (tmp_path / "s.parquet").write_text("notes")
    notes = invoke("data", "filter", data, *arguments)
    assert notes.exit_code == 2
    assert (tmp_path / "s.parquet").read_text() == "notes"


# --- rules without a model ----------------------------------------------------------------------


def test_length_and_bad_rows_add_up(tmp_path: Path):
    image = png(Image.new("RGB", (8, 8)))
    captions = ["one", "one two", "one two three", None, "one two", "one  two three four"]
    data = write_table(tmp_path / "d.parquet", image=[image] * 4 + [b"broken", image], caption=captions)
    found = filtered(
        data, "--scores", tmp_path / "s.parquet", "--scorer", "length", "--words", "2:3", "--scorer", "duplicate-image"
    )
    assert {key: found[key] for key in ("rows", "kept", "left_out", "unreadable", "dropped")} == {
        "rows": 6, "kept": 0, "left_out": 4, "unreadable": 1, "dropped": 1
    }  # fmt: skip
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert list(table) == ["id", "row", "length", "duplicate-image", "problem", "keep"]
    assert table["length"] == [1, 2, 3, None, None, 4]
    assert table["duplicate-image"] == [0, 1, 2, None, None, 3]
    assert "no caption" in table["problem"][3]
    assert "d.parquet, row 4: " in table["problem"][4]
    found = filtered(data, "--scores", tmp_path / "s.parquet", "--scorer", "length", "--words", "2:3")
    assert found["kept"] == 2  # of the rows' images nothing is asked now
    assert pq.read_table(tmp_path / "s.parquet")["keep"].to_pylist() == [False, True, True, False, False, False]


def test_duplicates_are_found_through_size_quality_and_spelling(tmp_path: Path):
    stream = io.BytesIO()
    drawing("red", size=200).save(stream, "JPEG", quality=60)
    images = [png(drawing("red")), png(drawing("blue")), stream.getvalue(), png(drawing("red", side="right"))]
    captions = ["A red ball.", "a red ball", "a  RED ball", "a red ball"]
    data = write_table(tmp_path / "d.parquet", image=images, caption=captions)
    filtered(
        data, "--scores", tmp_path / "s.parquet", "--scorer", "duplicate", "--scorer", "duplicate-image",
        "--scorer", "duplicate-text",
    )  # fmt: skip
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert table["duplicate-image"] == [0, 0, 1, 0]
    assert table["duplicate-text"] == [0, 1, 2, 3]
    assert table["duplicate"] == [0, 0, 1, 0]
    assert table["keep"] == [True, False, False, False]


def test_hashes_tell_apart_what_differs():
    assert text_hash("Ein Café!") == text_hash("ein  cafe\u0301")
    assert text_hash("a cat") != text_hash("a bat")
    assert text_hash("!!!") != text_hash("???")
    flat = [image_hash(Image.new("RGB", (20, 20), colour)) for colour in ("red", "blue", "white", "black")]
    assert min((a ^ b).bit_count() for n, a in enumerate(flat) for b in flat[:n]) > 3


def test_a_column_of_a_file_goes_by_id_or_by_row(tmp_path: Path):
    data = write_table(tmp_path / "d.parquet", id=["a", "b", "a", "c"], body=["w", "x", "y", "z"])
    write_table(tmp_path / "by-id.parquet", id=["c", "a", "zzz"], dfn=[0.5, 0.25, 9.0])
    write_table(tmp_path / "by-row.parquet", row=[3, 1, 99], dfn=[1, 2, 3])
    arguments = (data, "--text", "body", "--scores", tmp_path / "s.parquet")
    by_id = f"column:{tmp_path / 'by-id.parquet'}:dfn"
    filtered(*arguments, "--scorer", by_id, "--threshold", "0.3")
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert table["column:by-id.parquet:dfn"] == [0.25, None, 0.25, 0.5]
    assert table["keep"] == [False, True, False, True]  # what the file doesn't know it doesn't judge
    by_row = f"column:{tmp_path / 'by-row.parquet'}:dfn:low"
    filtered(*arguments, "--scorer", by_row, "--keep-fraction", "0.5")
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert table["column:by-row.parquet:dfn"] == [None, 2, None, 1]
    assert table["keep"] == [True, False, True, True]
    assert table["column:by-id.parquet:dfn"] == [0.25, None, 0.25, 0.5]  # earlier scores stay
    write_table(tmp_path / "none.parquet", id=["x"], dfn=[1.0])
    refused = invoke("data", "filter", *arguments, "--scorer", f"column:{tmp_path / 'none.parquet'}:dfn")
    assert refused.exit_code == 2
    assert "none of its `id`s" in refused.output


def test_a_column_of_our_own_scores_goes_by_row(tmp_path: Path):
    data = write_table(tmp_path / "d.parquet", body=["one", "one two", "one two three"])
    arguments = (data, "--text", "body", "--scorer")
    filtered(*arguments, "length", "--words", "1:", "--scores", tmp_path / "ours.parquet")
    column = f"column:{tmp_path / 'ours.parquet'}:length"
    assert filtered(*arguments, column, "--threshold", "2", "--scores", tmp_path / "s.parquet")["kept"] == 2
    assert pq.read_table(tmp_path / "s.parquet")["column:ours.parquet:length"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorer", "vlm-gpa"], "did you mean vlm-gap?"),
        (["--scorer", "vlm-gap"], "needs --vlm"),
        (["--scorer", "clip"], "needs --clip"),
        (["--scorer", "length"], "needs --words"),
        (["--scorer", "length", "--words", "3"], "right would be MIN:MAX"),
        (["--scorer", "duplicate", "--words", "3:"], "no scorer that takes it"),
        (["--scorer", "duplicate", "--threshold", "duplicate=1"], "no score 'duplicate'"),
        (["--scorer", "length", "--words", "3:", "--keep-fraction", "0.5"], "no scorer that takes it"),
        (["--scorer", "column:x.parquet:y", "--threshold", "nan"], "'nan' is no number"),
        (["--scorer", "column:x.parquet"], "right would be column:FILE.parquet:COLUMN"),
        (["--scorer", "column:x.parquet:y", "--scorer", "column:x.parquet:z", "--threshold", "1"], "of which score?"),
        (["--scorer", "column:x.parquet:y", "--threshold", "much"], "'much' is no number"),
        (["--scorer", "column:x.parquet:y"], "x.parquet"),
        (["--scorer", "column:x.parquet:y", "--scorer", "column:a/x.parquet:y"], "two files of one name"),
        (["--scorer", "duplicate", "--limit", "3"], "leave out `filter` and `limit`"),
    ],
)
def test_wrong_arguments_are_one_message(tmp_path: Path, arguments: list[str], message: str):
    data = texts(tmp_path / "data.parquet")
    result = invoke("data", "filter", data, "--text", "body", "--scores", tmp_path / "s.parquet", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("error") == 1
    assert not (tmp_path / "s.parquet").exists()


# --- stopped and repeated runs ------------------------------------------------------------------


class Counting(Length):
    """Notes what it was asked, and stops in the middle if told."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.stop = stop
        self.rows: list[int] = []

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        if len(self.rows) == self.stop:
            raise KeyboardInterrupt
        self.rows += batch.rows
        return super().measure(batch)


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "PART_SECONDS", 0.0)
    data = texts(tmp_path / "data.parquet", 4 * run_module.UNIT + 5)
    source = DataSource(dataset=str(data), text="body")

    def run(file: str, scorer: Counting, **rule: Any) -> dict[str, list[Any]]:
        filter_data(source, tmp_path / file, lambda _: [scorer], rules={"length": Rule(**rule)})
        return pq.read_table(tmp_path / file).to_pydict()

    whole = run("whole.parquet", Counting(), minimum=2)
    with pytest.raises(KeyboardInterrupt):
        run("stopped.parquet", Counting(stop=2 * run_module.UNIT), minimum=2)
    assert not (tmp_path / "stopped.parquet").exists()
    rest = Counting()
    assert run("stopped.parquet", rest, minimum=2) == whole
    assert rest.rows == list(range(2 * run_module.UNIT, 4 * run_module.UNIT + 5))
    again = Counting()
    assert not any(run("stopped.parquet", again, minimum=3)["keep"])
    assert again.rows == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", "stopped.parquet", "whole.parquet"]


def test_what_was_measured_otherwise_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "PART_SECONDS", 0.0)
    data = texts(tmp_path / "data.parquet", 2 * run_module.UNIT)
    source = DataSource(dataset=str(data), text="body")

    class Other(Counting):
        @property
        def settings(self) -> dict[str, Any]:
            return {"scorer": "length", "version": 2}

    for first, second in ((Counting(stop=run_module.UNIT), Other()), (Counting(), Other())):
        file = tmp_path / "s.parquet"
        file.unlink(missing_ok=True)
        try:
            filter_data(source, file, lambda _, scorer=first: [scorer], rules={})
        except KeyboardInterrupt:
            assert (tmp_path / "s.parquet.parts").is_dir()
        filter_data(source, file, lambda _, scorer=second: [scorer], rules={})
        assert second.rows == list(range(2 * run_module.UNIT))


class Slow(Counting):
    """Another score, of the same kind."""

    def __init__(self, stop: int | None = None):
        super().__init__(stop)
        self.names = {"slow": "high"}

    @property
    def settings(self) -> dict[str, Any]:
        return {"scorer": "slow"}

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        return {"slow": super().measure(batch)["length"]}


def test_a_scorer_that_is_added_costs_nothing_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "PART_SECONDS", 0.0)
    count = 4 * run_module.UNIT
    source = DataSource(dataset=str(texts(tmp_path / "data.parquet", count)), text="body")
    file, parts = tmp_path / "s.parquet", tmp_path / "s.parquet.parts"
    with pytest.raises(KeyboardInterrupt):
        filter_data(source, file, lambda _: [Slow(stop=3 * run_module.UNIT)], rules={})
    (parts / "mine").mkdir()
    (parts / "mine/task.json").write_text("[]")
    (parts / "notes.txt").write_text("mine")
    slow, length = Slow(), Counting()
    filter_data(source, file, lambda _: [length, slow], rules={})
    assert slow.rows == list(range(3 * run_module.UNIT, count))
    assert length.rows == list(range(count))
    assert pq.read_table(file)["slow"].to_pylist() == pq.read_table(file)["length"].to_pylist() == [2.0] * count
    assert sorted(str(path.relative_to(parts)) for path in parts.rglob("*")) == ["mine", "mine/task.json", "notes.txt"]


def test_scores_of_other_columns_or_images_are_not_taken(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(drawing(["red", "blue", "green"][number])))
    images = [f"{number}.png" for number in range(3)]
    data = write_table(tmp_path / "d.parquet", image=images, short=["a b"] * 3, long=["a b c d"] * 3)
    arguments = (data, "--scores", tmp_path / "s.parquet", "--scorer", "duplicate-image")
    assert filtered(*arguments, "--caption", "short")["kept"] == 3
    other = invoke("data", "filter", *arguments, "--caption", "long")
    assert other.exit_code == 2
    assert "by other columns" in other.output
    # `filter:` keeps rows, whatever is learnt of them
    kept = DataSource(dataset=str(data), caption="long", filter=str(tmp_path / "s.parquet"))
    assert len(open_dataset(kept)) == 3
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    changed = invoke("data", "filter", *arguments, "--caption", "short")
    assert changed.exit_code == 2
    assert "images as they were before" in changed.output


def test_a_row_that_one_scorer_cannot_read_stays_out(tmp_path: Path):
    images = [b"broken", *(png(drawing(colour)) for colour in ("red", "blue"))]
    data = write_table(tmp_path / "d.parquet", image=images, caption=["a b", "A b", "c d"])
    looks, length = ("--scorer", "duplicate-image"), ("--scorer", "length", "--words", "1:")
    expected = {"kept": 2, "unreadable": 1, "left_out": 0}

    def check(file: str, *scorers: str, **figures: int) -> dict[str, list[Any]]:
        found = filtered(data, "--scores", tmp_path / file, *scorers)
        assert {key: found[key] for key in expected} == expected | figures
        return pq.read_table(tmp_path / file).to_pydict()

    check("a.parquet", *looks)
    table = check("a.parquet", *looks, *length)
    assert table["keep"] == [False, True, True]
    assert table["length"] == [None, 2, 2]
    # nor is it the first of its duplicates
    assert check("a.parquet", "--scorer", "duplicate-text")["duplicate-text"] == [None, 0, 0]
    # also where that turns out later: what was compared with it is so anew
    assert check("b.parquet", "--scorer", "duplicate-text", *length, unreadable=0, left_out=1)["length"] == [2, 2, 2]
    table = check("b.parquet", "--scorer", "duplicate-text", *looks)
    assert table["duplicate-text"] == [None, 0, 0]
    assert table["length"] == [None, 2, 2]
    check("c.parquet", "--scorer", "duplicate-text", unreadable=0, left_out=1)
    assert "duplicate-text" not in check("c.parquet", *looks)


def test_data_knows_nothing_of_what_builds_on_it():
    upward = re.compile(r"^\s*(from|import) vpgtrans\.(runs|cli|training|transfer)\b", re.MULTILINE)
    files = list((Path(vt.__file__).parent / "data").rglob("*.py"))
    assert files
    assert [file.name for file in files if upward.search(file.read_text())] == []
