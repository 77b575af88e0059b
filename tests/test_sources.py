"""A data set as samples by number: columns, names, limits, fingerprints, and what is wrong with a row."""

import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from data_files import (
    CAPTIONS,
    COLORS,
    COUNT,
    IMAGES,
    captioned,
    counts,
    opened,
    png,
    write_images,
    write_json,
    write_jsonl,
    write_parquet,
    write_tar,
)
from PIL import Image

from vpgtrans.errors import DataError, Dropped

pytestmark = pytest.mark.usefixtures("own_cache")


def test_several_captions_per_image_are_references(tmp_path: Path):
    texts = [["one", "two "], ["three"], []]
    source = opened(write_parquet(tmp_path / "a.parquet", image=IMAGES, caption=texts))
    assert [source.sample(row).references for row in range(2)] == [("one", "two"), ("three",)]
    assert [source.caption(row) for row in range(2)] == ["one", "three"]
    with pytest.raises(Dropped, match=r"a\.parquet, row 2: no caption"):
        source.sample(2)
    assert counts(source) == (2, 0, 1)


def test_limit_takes_the_first_rows(tmp_path: Path):
    file = write_parquet(
        tmp_path / "a.parquet", image=IMAGES[:1] * 4, caption=["w", "x", "y", "z"], id=["i", "j", "k", "l"]
    )
    source = opened(file, limit=2)
    assert [(source.id(row), source.caption(row)) for row in range(len(source))] == [("i", "w"), ("j", "x")]
    assert len(opened(file, limit=9)) == 4


def test_own_column_names_and_other_columns(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", picture=IMAGES[:1], text=["x"], kind=["animal"])
    source = opened(file, image="picture", caption="text")
    assert source.caption(0) == "x"
    assert source.sample(0).images == (IMAGES[0],)
    with pytest.raises(DataError, match=r"'nope'.*; the columns are picture, text, kind"):
        opened(file, image="nope", caption="text")


def test_rows_without_a_name_are_numbered(tmp_path: Path):
    records = [{"image": "a.png", "caption": "x"}, {"image": "a.png", "caption": "x", "id": 7}]
    source = opened(write_jsonl(tmp_path / "a.jsonl", *records))
    assert [source.id(0), source.id(1)] == [f"{tmp_path}/a.jsonl/0", "7"]
    assert [source.sample(row).id for row in range(2)] == [source.id(0), source.id(1)]


@pytest.mark.parametrize("missing", ["image", "caption"])
@pytest.mark.parametrize("form", ["parquet", "jsonl", "json"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, missing: str, form: str):
    columns: dict[str, Any] = {"image": ["a.png"], "caption": ["x"], "other": ["1"]}
    del columns[missing]
    write = {"parquet": lambda path: write_parquet(path, **columns),
             "jsonl": lambda path: write_jsonl(path, *captioned(**columns)),
             "json": lambda path: write_json(path, captioned(**columns))}[form]  # fmt: skip
    with pytest.raises(DataError, match=rf"a\.{form}.*no '?(column )?'{missing}'.*'?other'?.*`{missing}:`"):
        opened(write(tmp_path / f"a.{form}"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image": "caption", "caption": "image"}, "row 0: 'image' holds bytes; right would be a string"),
        ({"conversation": "caption"}, "row 0: 'caption' is no list of turns"),
        ({"question": "caption", "answer": "number"}, "row 0: 'number' holds int"),
        ({"document": "number"}, "row 0: 'number' holds int"),
        ({"text": "image"}, "row 0: 'image' holds bytes"),
        ({"image": "number"}, "row 0: 'number' holds int; right would be encoded image bytes"),
    ],
    ids=["swapped", "turns", "answer", "document", "text", "image"],
)
def test_a_wrong_mapping(tmp_path: Path, keys: dict[str, str], message: str):
    file = write_parquet(tmp_path / "a.parquet", image=IMAGES, caption=CAPTIONS, number=[1, 2, 3])
    with pytest.raises(DataError, match=rf"a\.parquet, {message}.*none of the first 3 rows is a sample"):
        opened(file, **keys)


def test_a_few_wrong_rows_at_the_start_are_no_wrong_mapping(tmp_path: Path):
    records = [{"image": 7, "caption": "x"}] * 3 + [{"image": "a.png", "caption": "x"}]
    assert len(opened(write_jsonl(tmp_path / "a.jsonl", *records))) == 4
    with pytest.raises(DataError, match="none of the first 3 rows"):
        opened(write_jsonl(tmp_path / "a.jsonl", *records), limit=3)


def test_rows_that_are_dropped_first_are_no_wrong_mapping_either(tmp_path: Path):
    records = [{"image": "a.png", "caption": ""}] * 30
    with pytest.raises(DataError, match="line 16: no caption; none of the first 16 rows"):
        opened(write_jsonl(tmp_path / "a.jsonl", *records[:16]))
    source = opened(write_jsonl(tmp_path / "a.jsonl", *records, {"image": "a.png", "caption": "x"}))
    assert source.caption(30) == "x"


def test_an_unreadable_image_names_file_and_row(tmp_path: Path):
    source = opened(write_parquet(tmp_path / "a.parquet", image=[png(), b"no image"], caption=["x", "y"]))
    with pytest.raises(DataError, match=r"a\.parquet, row 1: 8 bytes of image data: not a readable image"):
        source.image(1)
    paths = write_images(tmp_path)
    for name, path, write in [
        ("a.jsonl, line 2", tmp_path / "a.jsonl", lambda path, records: write_jsonl(path, *records)),
        (r"a.json, element 1 \(line 1\)", tmp_path / "a.json", write_json),
    ]:
        (tmp_path / "images/1.png").write_bytes(IMAGES[1])
        source = opened(write(path, captioned(image=paths, caption=CAPTIONS)))
        assert counts(source) == (3, 0, 0)
        (tmp_path / "images/1.png").unlink()
        with pytest.raises(DataError, match=rf"{name}: .*images/1\.png: No such file"):
            source.image(1)
        assert counts(source) == (2, 1, 0)


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 1000, "images", "."], ids=["null", "long", "folder", "dot"])
def test_an_image_path_that_no_file_can_have(tmp_path: Path, path: str):
    write_images(tmp_path)
    source = opened(write_jsonl(tmp_path / "a.jsonl", {"image": path, "caption": "x"}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: "):
        source.image(0)
    assert source.fingerprint


def test_the_one_image_of_a_sample(tmp_path: Path):
    records = [{"image": write_images(tmp_path)[:n], "question": "?", "answer": "!"} for n in (0, 2)]
    source = opened(write_jsonl(tmp_path / "a.jsonl", *records), question="question", answer="answer")
    for row, number in enumerate((0, 2)):
        with pytest.raises(Dropped, match=rf"line {row + 1}: {number} images"):
            source.image(row)
    assert not source.single


def test_the_fingerprint_follows_content_not_place(tmp_path: Path):
    def fingerprint(name: str, limit: int | None = None, **changed: list[Any]) -> str:
        columns = {"image": IMAGES, "caption": CAPTIONS, "id": ["a", "b", "c"]} | changed
        return opened(write_parquet(tmp_path / name, **columns), limit=limit).fingerprint

    first = fingerprint("a.parquet")
    assert fingerprint("b.parquet") == first
    assert fingerprint("a.parquet", image=[png((1, 2, 3)), *IMAGES[1:]]) != first
    assert fingerprint("a.parquet", caption=[*CAPTIONS[:2], "other"]) != first
    assert fingerprint("a.parquet", limit=2) != first
    assert fingerprint("a.parquet") == first


def test_the_fingerprint_sees_a_changed_image_file(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", *captioned(image=write_images(tmp_path), caption=CAPTIONS))
    first = opened(path).fingerprint
    Image.new("RGB", (9, 9)).save(tmp_path / "images/1.png")
    assert opened(path).fingerprint != first


def test_the_fingerprint_sees_images_wherever_rows_name_them(tmp_path: Path):
    folder = tmp_path / "data"
    paths = write_images(folder)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "x"}]}
    turns = [[{"role": "user", "content": [{"type": "image", "image": path}]}, answer] for path in paths]
    struct = [{"bytes": None, "path": path} for path in paths]
    typed = pa.array(struct, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    datasets.Dataset.from_dict({"image": paths, "caption": CAPTIONS}).save_to_disk(str(folder / "saved"))
    write_images(folder / "saved")
    write_jsonl(folder / "turns.jsonl", *captioned(c=turns))
    made: dict[Path, dict[str, str]] = {
        folder / "saved": {},
        folder / "turns.jsonl": {"conversation": "c"},
        write_parquet(folder / "a.parquet", image=paths, caption=CAPTIONS): {},
        write_parquet(folder / "lists.parquet", image=[[path] for path in paths], caption=CAPTIONS): {},
        write_parquet(folder / "struct.parquet", image=struct, caption=CAPTIONS): {},
        write_parquet(folder / "typed.parquet", image=typed, caption=CAPTIONS): {},
        write_parquet(folder / "turns.parquet", c=turns): {"conversation": "c"},
    }
    before = {file: opened(file, **keys) for file, keys in made.items()}
    for source in before.values():
        assert counts(source) == (COUNT, 0, 0)
        assert source.fingerprint
    for place in (folder, folder / "saved"):
        Image.new("RGB", (9, 9)).save(place / "images/1.png")
    for file, keys in made.items():
        assert opened(file, **keys).fingerprint != before[file].fingerprint, file


def test_the_fingerprint_reads_no_rows_that_hold_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    struct = [{"bytes": image, "path": "a.png"} for image in IMAGES]
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]] * COUNT
    files = [
        write_parquet(tmp_path / "bytes.parquet", image=IMAGES, caption=CAPTIONS),
        write_parquet(tmp_path / "struct.parquet", image=struct, caption=CAPTIONS),
        write_parquet(tmp_path / "lists.parquet", image=[[image] for image in struct], caption=CAPTIONS),
        write_tar(tmp_path / "a.tar", *({"__key__": str(n), "png": IMAGES[n], "txt": "x"} for n in range(COUNT))),
    ]
    datasets.Dataset.from_dict({"image": struct, "caption": CAPTIONS}).save_to_disk(str(tmp_path / "saved"))
    sources = [opened(file) for file in (*files, tmp_path / "saved")]
    chats = write_parquet(tmp_path / "chat.parquet", turns=turns)
    sources.append(opened(chats, conversation="turns"))

    def refuse(*_: Any) -> Any:
        raise AssertionError("reads rows")

    for rows in {type(source.rows) for source in sources}:
        monkeypatch.setattr(rows, "read", refuse)
        monkeypatch.setattr(rows, "values", refuse)
    for source in sources:
        assert source.fingerprint


def test_the_fingerprint_of_a_folder_goes_by_the_images_state_and_the_texts_content(tmp_path: Path):
    folder = tmp_path / "images"
    write_images(tmp_path)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.txt").write_text(caption)

    def rewritten(name: str, content: bytes, *, time: int) -> str:
        (folder / name).write_bytes(content)
        os.utime(folder / name, (time, time))
        return opened(folder).fingerprint

    first = rewritten("0.png", IMAGES[0], time=1)
    assert rewritten("0.png", bytes(len(IMAGES[0])), time=1) == first
    assert rewritten("0.png", IMAGES[0], time=2) != first
    first = rewritten("0.txt", b"a red square", time=1)
    assert rewritten("0.txt", b"a RED square", time=1) != first


# --- where rows may lack images -----------------------------------------------------------------

TURNS = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "question": ({"q": "?", "a": "x"}, {"question": "q", "answer": "a"}),
    "conversation": ({"c": TURNS}, {"conversation": "c"}),
    "document": ({"d": "x"}, {"document": "d"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_an_image_column_that_is_not_there(tmp_path: Path, layout: str, form: str, caplog: pytest.LogCaptureFixture):
    record, keys = LAYOUTS[layout]
    file = tmp_path / f"a.{form}"
    if form == "jsonl":
        write_jsonl(file, *[record] * 20)
    else:
        write_parquet(file, **{name: [value] * 20 for name, value in record.items()})
    with pytest.raises(
        DataError, match=rf"a\.{form}: .*'pictrue' for the image; there is {', '.join(record)} \(.*--image"
    ):
        opened(file, **keys, image="pictrue")
    assert not caplog.messages
    assert len(opened(file, **keys)) == 20
    warned = [message for message in caplog.messages if "learnt without images" in message]
    assert len(warned) == (layout == "question")


def test_rows_with_and_without_images(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    record, keys = LAYOUTS["question"]
    file = write_jsonl(tmp_path / "a.jsonl", *[record] * 30, record | {"image": "a.png", "photo": "b.png"})
    assert opened(file, **keys, image="photo").sample(30).images == (str(tmp_path / "b.png"),)
    assert opened(file, **keys).sample(30).images == (str(tmp_path / "a.png"),)
    assert not caplog.messages
    # shards have `images` where there are some
    samples = [{"__key__": str(n), "json": LAYOUTS["conversation"][0]} for n in range(3)]
    tar = write_tar(tmp_path / "a.tar", *samples)
    assert len(opened(tar, conversation="c", image="images")) == 3
    with pytest.raises(DataError, match="none of the first 3 rows has 'photo'"):
        opened(tar, conversation="c", image="photo")


def test_images_of_every_encoding(tmp_path: Path):
    encoded = []
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), COLORS[0]).save(stream, form)
        encoded.append(stream.getvalue())
    source = opened(write_parquet(tmp_path / "a.parquet", image=encoded, caption=["x"] * len(encoded)))
    assert counts(source) == (len(encoded), 0, 0)
    assert json.dumps([source.image(row).size for row in range(len(source))]) == json.dumps([(8, 8)] * len(encoded))
