"""Opening image–caption sources of every kind, and the order of their mixture."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpgtrans.data.config import DataSource
from vpgtrans.data.sources import Captions, Mixture, open_captions
from vpgtrans.errors import DataError


def png(color: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "PNG")
    return stream.getvalue()


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
CAPTIONS = ["a red square", "a green square", "a blue square"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_jsonl(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    lines = []
    for index, (color, caption) in enumerate(zip(COLORS, CAPTIONS, strict=True)):
        (folder / f"images/{index}.png").write_bytes(png(color))
        lines.append(json.dumps({"image": f"images/{index}.png", "caption": caption}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def write_csv(folder: Path) -> Path:
    write_jsonl(folder)
    rows = [f'images/{i}.png,"{caption}"' for i, caption in enumerate(CAPTIONS)]
    (folder / "data.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    return folder / "data.csv"


def check(captions: Captions) -> None:
    assert captions.captions == CAPTIONS
    assert len(set(captions.ids)) == len(captions) == 3
    for index, color in enumerate(COLORS):
        assert captions.image(index).convert("RGB").getpixel((0, 0)) == color
    assert len({captions.image_bytes(i) for i in range(3)}) == 3


def test_parquet_file_and_directory(tmp_path: Path):
    images = [png(c) for c in COLORS]
    file = write_parquet(tmp_path / "set/train.parquet", image=images, caption=CAPTIONS)
    write_parquet(tmp_path / "set/extra/test-00000-of-00001.parquet", image=images[:1], caption=["another"])
    check(open_captions(DataSource(dataset=str(file))))
    check(open_captions(DataSource(dataset=str(tmp_path / "set"))))
    with pytest.raises(DataError, match=r"split 'valid'.*train\.parquet"):
        open_captions(DataSource(dataset=str(tmp_path / "set"), split="valid"))


def test_parquet_with_hub_style_image_structs(tmp_path: Path):
    images = [{"bytes": png(c), "path": "x.png"} for c in COLORS]
    check(open_captions(DataSource(dataset=str(write_parquet(tmp_path / "a.parquet", image=images, caption=CAPTIONS)))))


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_text_tables_with_relative_image_paths(tmp_path: Path, write):
    check(open_captions(DataSource(dataset=str(write(tmp_path / "set")))))


def test_several_captions_per_image_are_references(tmp_path: Path):
    texts = [["one", "two "], ["three"], []]
    file = write_parquet(tmp_path / "a.parquet", image=[png(c) for c in COLORS], caption=texts)
    captions = open_captions(DataSource(dataset=str(file)))
    assert captions.references == [["one", "two"], ["three"]]
    assert captions.captions == ["one", "three"]
    assert captions.dropped == 1


def test_limit_takes_the_first_with_a_caption(tmp_path: Path):
    file = write_parquet(
        tmp_path / "a.parquet", image=[png(COLORS[0])] * 4, caption=[None, "x", "y", "z"], id=["i", "j", "k", "l"]
    )
    captions = open_captions(DataSource(dataset=str(file), limit=2))
    assert (captions.captions, captions.ids, captions.dropped) == (["x", "y"], ["j", "k"], 1)


def test_own_column_names_and_other_columns(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", picture=[png(COLORS[0])], text=["x"], kind=["animal"])
    captions = open_captions(DataSource(dataset=str(file), image="picture", caption="text"))
    assert captions.column("kind") == ["animal"]
    with pytest.raises(DataError, match=r"'nope'; the columns are picture, text, kind"):
        captions.column("nope")


@pytest.mark.parametrize("missing", ["image", "caption"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, missing: str):
    columns = {"image": [png(COLORS[0])], "caption": ["x"], "other": [1]}
    del columns[missing]
    file = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=f"a.parquet: no column '{missing}'.*{', '.join(columns)}"):
        open_captions(DataSource(dataset=str(file)))


def test_empty_sets_and_wrong_files(tmp_path: Path):
    no_rows = write_parquet(tmp_path / "a.parquet", image=pa.array([], pa.binary()), caption=pa.array([], pa.string()))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"image": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "notes.txt").write_text("x")
    for name, message in [
        (no_rows.name, "no samples"),
        ("empty.jsonl", "the file is empty"),
        ("broken.jsonl", "not readable as json"),
        ("broken.parquet", "not readable as parquet"),
        ("notes.txt", "files end in .parquet"),
        ("nothing-here", "no file or directory"),
    ]:
        with pytest.raises(DataError, match=message):
            open_captions(DataSource(dataset=str(tmp_path / name)))


def test_captions_of_a_wrong_type(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", image=[png(COLORS[0])], caption=[7])
    with pytest.raises(DataError, match="row 0: column 'caption' holds int"):
        open_captions(DataSource(dataset=str(file)))


def test_an_unreadable_image_names_its_sample(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", image=[b"no image"], caption=["x"], id=["sample-7"])
    with pytest.raises(DataError, match="sample-7"):
        open_captions(DataSource(dataset=str(file))).image(0)
    path = write_jsonl(tmp_path / "set")
    (tmp_path / "set/images/1.png").unlink()
    captions = open_captions(DataSource(dataset=str(path)))
    with pytest.raises(DataError, match=r"jsonl/1: .*1\.png: No such file"):
        captions.image(1)


def test_the_fingerprint_follows_content_not_place(tmp_path: Path):
    images = [png(c) for c in COLORS]

    def fingerprint(name: str, limit: int | None = None, **changed: list) -> str:
        columns = {"image": images, "caption": CAPTIONS, "id": ["a", "b", "c"]} | changed
        file = write_parquet(tmp_path / name, **columns)
        return open_captions(DataSource(dataset=str(file), limit=limit)).fingerprint

    first = fingerprint("a.parquet")
    assert fingerprint("b.parquet") == first
    assert fingerprint("a.parquet", image=[png((1, 2, 3)), *images[1:]]) != first
    assert fingerprint("a.parquet", caption=[*CAPTIONS[:2], "other"]) != first
    assert fingerprint("a.parquet", limit=2) != first
    assert fingerprint("a.parquet") == first


def test_the_fingerprint_sees_a_changed_image_file(tmp_path: Path):
    path = write_jsonl(tmp_path / "set")
    first = open_captions(DataSource(dataset=str(path))).fingerprint
    Image.new("RGB", (9, 9)).save(tmp_path / "set/images/1.png")
    assert open_captions(DataSource(dataset=str(path))).fingerprint != first


def test_a_rewritten_file_is_read_again(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", image=[png(COLORS[0])], caption=["old"])
    assert open_captions(DataSource(dataset=str(file))).captions == ["old"]
    write_parquet(file, image=[png(COLORS[0])], caption=["new"])
    assert open_captions(DataSource(dataset=str(file))).captions == ["new"]


class FakeCaptions(Captions):
    """As many samples as asked for, with given weights; no images."""

    def __init__(self, size: int, *, weights: list[float] | None = None, name: str = "s"):
        self.captions = [f"{name}{i}" for i in range(size)]
        self.ids = self.captions
        self.weights = np.ones(size) if weights is None else np.asarray(weights)
        self.fingerprint = f"{name}{size}"


sizes = st.integers(min_value=1, max_value=40)
shares = st.floats(min_value=0.1, max_value=10)
mixtures = st.lists(st.tuples(sizes, shares), min_size=1, max_size=4).map(
    lambda parts: Mixture([(FakeCaptions(n, name=f"s{i}-"), w) for i, (n, w) in enumerate(parts)])
)


@given(mixtures, st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_holds_every_sample_as_often_as_its_share_says(mixture: Mixture, seed: int, epoch: int):
    order = mixture.order(seed, epoch)
    assert order.dtype == np.int64
    assert len(order) == len(mixture)
    counts = np.bincount(order, minlength=len(mixture))
    expected = mixture._share * len(mixture)
    assert (counts >= np.floor(expected - 1e-9)).all()
    assert (counts <= np.ceil(expected + 1e-9)).all()


@given(sizes, st.integers(0, 2**32))
def test_one_source_is_permuted(size: int, seed: int):
    mixture = Mixture([(FakeCaptions(size), 3.0)])
    assert sorted(mixture.order(seed, 0)) == list(range(size))


@settings(max_examples=50)
@given(mixtures, st.integers(0, 100), st.integers(0, 150), st.integers(1, 17))
def test_batches_resume_anywhere(mixture: Mixture, seed: int, start: int, batch_size: int):
    def stream(start: int, batch_size: int, amount: int) -> list[int]:
        out: list[int] = []
        for batch in mixture.batches(seed, start, batch_size=batch_size):
            assert batch.shape == (batch_size,)
            out.extend(batch.tolist())
            if len(out) >= amount:
                return out[:amount]
        raise AssertionError("batches ended")

    whole = stream(0, 7, start + 60)
    assert stream(start, batch_size, 60) == whole[start:]
    epoch, offset = divmod(start, len(mixture))
    assert whole[start] == mixture.order(seed, epoch)[offset]


def test_orders_differ_between_epochs_and_seeds():
    mixture = Mixture([(FakeCaptions(50), 1.0)])
    orders = [tuple(mixture.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(mixture.order(0, 0)) == orders[0]


def test_shares_of_sources_and_of_rows():
    mixture = Mixture([(FakeCaptions(10, name="a"), 3.0), (FakeCaptions(30, weights=[3.0] * 5 + [1.0] * 25), 1.0)])
    counts = Counter(int(i) for epoch in range(100) for i in mixture.order(0, epoch))
    first = sum(counts[i] for i in range(10))
    assert first / 4000 == pytest.approx(0.75, abs=0.01)
    heavy = sum(counts[i] for i in range(10, 15)) / 5
    light = sum(counts[i] for i in range(15, 40)) / 25
    assert heavy / light == pytest.approx(3, rel=0.1)


def test_samples_know_their_source():
    a, b = FakeCaptions(2, name="a"), FakeCaptions(3, name="b")
    mixture = Mixture([(a, 1.0), (b, 1.0)])
    assert [mixture.caption(i) for i in range(5)] == ["a0", "a1", "b0", "b1", "b2"]
    assert mixture.locate(2) == (b, 0)
    with pytest.raises(IndexError):
        mixture.locate(5)
    assert mixture.fingerprint != Mixture([(a, 1.0), (b, 2.0)]).fingerprint
