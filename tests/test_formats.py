"""Every format on a real file of its kind, written by the format's own library."""

import base64
import csv
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    CAPTIONS,
    COLORS,
    COUNT,
    IMAGES,
    captioned,
    check_squares,
    counts,
    opened,
    png,
    write_csv,
    write_images,
    write_json,
    write_jsonl,
    write_parquet,
)
from PIL import Image

from vpgtrans.data import streams, tables
from vpgtrans.data.config import DataSource
from vpgtrans.data.formats import Opened, open_rows
from vpgtrans.data.sources import Source
from vpgtrans.data.streams import StreamRows
from vpgtrans.data.tables import ArrowRows, ParquetRows
from vpgtrans.errors import DataError
from vpgtrans.prompts import IMAGE, Turn

pytestmark = pytest.mark.usefixtures("own_cache")


# --- tables -------------------------------------------------------------------------------------


def test_a_parquet_file_and_a_directory_of_them(tmp_path: Path):
    file = write_parquet(tmp_path / "set/train.parquet", image=IMAGES, caption=CAPTIONS)
    write_parquet(tmp_path / "set/extra/test-00000-of-00001.parquet", image=IMAGES[:1], caption=["another"])
    check_squares(opened(file))
    check_squares(opened(tmp_path / "set"))
    with pytest.raises(DataError, match=r"split 'valid'.*train\.parquet"):
        opened(tmp_path / "set", split="valid")


def test_parquet_files_of_one_split_in_row_groups(tmp_path: Path):
    for number in range(3):
        write_parquet(
            tmp_path / f"train-{number}.parquet", group=2, image=IMAGES, caption=[f"{number} {c}" for c in CAPTIONS]
        )
    source = opened(tmp_path)
    assert [source.caption(row) for row in range(9)] == [f"{number} {c}" for number in range(3) for c in CAPTIONS]
    assert source.rows.stretches.tolist() == [0, 2, 3, 5, 6, 8]
    assert source.rows.where(7).endswith("train-2.parquet, row 1")
    write_parquet(tmp_path / "train-3.parquet", picture=IMAGES, caption=CAPTIONS)
    with pytest.raises(DataError, match=r"train-3\.parquet: columns picture, caption; .*has image, caption"):
        opened(tmp_path)


def test_parquet_keeps_as_many_row_groups_as_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_parquet(tmp_path / "a.parquet", group=1, number=list(range(50)))
    monkeypatch.setattr(tables, "WINDOW_BYTES", 300)
    rows = ParquetRows([file], "a")
    assert 1 <= rows.window < 25
    assert [rows.read(row)["number"] for row in range(50)] == list(range(50))
    assert len(rows._groups) == rows.window + 1
    assert pickle.loads(pickle.dumps(rows)).read(7) == {"number": 7}


def test_parquet_pages_with_checksums_are_verified(tmp_path: Path):
    table = pa.table({"image": IMAGES, "caption": CAPTIONS})
    pq.write_table(table, tmp_path / "a.parquet", write_page_checksum=True, compression="none")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"a green", b"a greem"))
    with pytest.raises(DataError, match=r"a\.parquet: not readable as parquet: .*CRC"):
        opened(tmp_path / "a.parquet")


def test_parquet_with_row_groups_too_large_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_parquet(tmp_path / "a.parquet", image=IMAGES, caption=CAPTIONS)
    monkeypatch.setattr(tables, "GROUP_LIMIT", 10)
    source = opened(file)
    assert isinstance(source.rows, ArrowRows)
    check_squares(source)


def test_parquet_with_hub_style_image_structs(tmp_path: Path):
    structs = [{"bytes": image, "path": "x.png"} for image in IMAGES]
    check_squares(opened(write_parquet(tmp_path / "a.parquet", image=structs, caption=CAPTIONS)))


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_delimited_tables(tmp_path: Path, ending: str, delimiter: str):
    paths = write_images(tmp_path)
    rows = [["image", "caption"], *map(list, zip(paths, CAPTIONS, strict=True))]
    check_squares(opened(write_csv(tmp_path / f"a.{ending}", *rows, delimiter=delimiter)))


def test_images_in_the_cells_of_a_table(tmp_path: Path):
    content = IMAGES[0] + bytes(200_000)  # as base64 longer than csv's own limit
    limit = csv.field_size_limit()
    source = opened(
        write_csv(tmp_path / "a.csv", ["image", "caption"], [base64.b64encode(content).decode(), CAPTIONS[0]])
    )
    assert source.sample(0).images == (content,)
    assert csv.field_size_limit() == limit


def test_a_table_with_two_columns_of_one_name(tmp_path: Path):
    file = write_csv(tmp_path / "a.csv", ["image", "caption", "caption"], ["a.png", "x", "y"])
    with pytest.raises(DataError, match=r"a\.csv: two columns 'caption'"):
        opened(file)


def test_cells_are_texts_as_they_are_written(tmp_path: Path):
    said = ['007 "quoted", with a comma', "NA", "two\nlines", "", "1e5"]
    rows = [["image", "caption"], *([write_images(tmp_path)[0], text] for text in said)]
    source = opened(write_csv(tmp_path / "a.csv", *rows))
    assert [source.caption(row) for row in (0, 1, 2, 4)] == [said[0], "NA", "two\nlines", "1e5"]
    assert counts(source) == (4, 0, 1)


@pytest.mark.parametrize("form", ["lines", "array"])
def test_json_with_paths(tmp_path: Path, form: str):
    records = captioned(image=write_images(tmp_path), caption=CAPTIONS)
    if form == "lines":
        check_squares(opened(write_jsonl(tmp_path / "a.jsonl", *records)))
    check_squares(opened(write_json(tmp_path / "a.json", records)))


def test_images_in_a_folder_of_their_own(tmp_path: Path):
    write_images(tmp_path / "elsewhere")
    file = write_jsonl(tmp_path / "a.jsonl", *captioned(image=["0.png", "1.png", "2.png"], caption=CAPTIONS))
    check_squares(opened(file, folder=str(tmp_path / "elsewhere/images")))
    with pytest.raises(DataError, match=r"'nowhere'.*is no directory"):
        opened(file, folder="nowhere")


def test_images_by_url(tmp_path: Path, memory: fsspec.AbstractFileSystem):
    paths = write_images(tmp_path)
    memory.pipe("/1.png", IMAGES[1])
    urls = [(tmp_path / paths[0]).as_uri(), "memory://1.png", str(tmp_path / paths[2])]
    source = opened(write_jsonl(tmp_path / "a.jsonl", *captioned(image=urls, caption=CAPTIONS)))
    check_squares(source)
    memory.rm("/1.png")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: memory://1\.png: no such file"):
        source.image(1)


@pytest.mark.parametrize("url", ["nosuchprotocol://a/b.png", "memory://absent.png"])
def test_an_image_url_that_leads_nowhere(tmp_path: Path, url: str, memory: fsspec.AbstractFileSystem):
    source = opened(write_jsonl(tmp_path / "a.jsonl", {"image": url, "caption": "x"}))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: {url}: "):
        source.image(0)


def test_a_rewritten_file_is_read_again(tmp_path: Path):
    for said in ("old", "new"):
        file = write_csv(tmp_path / "a.csv", ["image", "caption"], [write_images(tmp_path)[0], said])
        assert opened(file).caption(0) == said


# --- published layouts --------------------------------------------------------------------------


def llava(paths: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"l{number}",
            "image": path,
            "conversations": [
                {"from": "human", "value": "What is it?\n<image>"},
                {"from": "gpt", "value": caption},
            ],
        }
        for number, (path, caption) in enumerate(zip(paths, CAPTIONS, strict=True))
    ]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_llava(tmp_path: Path, form: str):
    records = llava(write_images(tmp_path))
    text_only = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    write = {"json": lambda path: write_json(path, [*records, text_only]),
             "jsonl": lambda path: write_jsonl(path, *records, text_only)}[form]  # fmt: skip
    source = opened(write(tmp_path / f"a.{form}"), format="llava")
    assert [source.id(row) for row in range(4)] == ["l0", "l1", "l2", "t"]
    first = source.sample(0)
    assert first.text == (Turn("user", "What is it?\n<image>"), Turn("assistant", CAPTIONS[0]))
    assert first.references == (CAPTIONS[0],)
    assert source.image(2).getpixel((0, 0)) == COLORS[2]
    assert source.sample(3).images == ()
    assert counts(source) == (4, 0, 0)


def coco() -> dict[str, Any]:
    return {
        "info": {"year": 2017},
        "images": [{"id": 10 + n, "file_name": f"{n}.png", "height": 4, "width": 4} for n in range(COUNT)],
        "annotations": [
            {"id": 7, "image_id": 10, "caption": "second of red"},
            {"id": 3, "image_id": 10, "caption": CAPTIONS[0]},
            {"id": 4, "image_id": 12, "caption": CAPTIONS[2]},
        ],
    }


def test_coco_captions(tmp_path: Path):
    write_images(tmp_path)
    file = write_json(tmp_path / "annotations/captions_train.json", coco())
    source = opened(file, format="coco", folder=str(tmp_path / "images"))
    assert len(source) == COUNT
    assert source.sample(0).references == (CAPTIONS[0], "second of red")
    assert source.id(2) == "coco/12"
    assert source.image(2).getpixel((0, 0)) == COLORS[2]
    # an image without captions is a row, which is dropped
    assert counts(source) == (2, 0, 1)


QUESTIONS = {"questions": [{"image_id": n, "question": f"which colour {n}?", "question_id": 100 + n} for n in range(2)]}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 100, "image_id": 0, "multiple_choice_answer": "red",
         "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(["crimson", "red", "red"])]},
        # OK-VQA has no multiple_choice_answer
        {"question_id": 101, "image_id": 1, "answers": [{"answer": a} for a in ["lime", "green", "green"]]},
    ]
}  # fmt: skip


def vqa(tmp_path: Path, **keys: Any) -> Source:
    for number in range(2):
        (tmp_path / f"COCO_{number:03d}.png").write_bytes(IMAGES[number])
    questions = write_json(tmp_path / "questions.json", QUESTIONS)
    keys = {"image": "COCO_{image_id:03d}.png", "annotations": str(tmp_path / "annotations.json")} | keys
    return opened(questions, format="vqa", **keys)


def test_vqa_and_okvqa(tmp_path: Path):
    write_json(tmp_path / "annotations.json", ANNOTATIONS)
    source = vqa(tmp_path)
    assert source.sample(0).text == (Turn("user", "<image>\nwhich colour 0?"), Turn("assistant", "red"))
    assert source.sample(0).references == ("red", "crimson")
    assert source.sample(1).references == ("green", "lime")
    assert source.image(1).getpixel((0, 0)) == COLORS[1]
    assert counts(source) == (2, 0, 0)


def test_questions_and_answers_that_do_not_belong_together(tmp_path: Path):
    short = {"annotations": ANNOTATIONS["annotations"][:1]}
    more = {"annotations": [*ANNOTATIONS["annotations"], {"question_id": 9, "answers": []}]}
    for content, message in [(short, "no answer to question_id 101"), (more, "does not ask, such as question_id 9")]:
        write_json(tmp_path / "annotations.json", content)
        with pytest.raises(DataError, match=rf"annotations\.json: .*{message}"):
            vqa(tmp_path)
    with pytest.raises(DataError, match="needs the file of answers"):
        vqa(tmp_path, annotations=None)
    with pytest.raises(DataError, match="image_id"):
        vqa(tmp_path, image="image")
    with pytest.raises(DataError, match=r"questions\.json: not laid out as expected"):
        vqa(tmp_path, image="{}{image_id}")


def test_gqa(tmp_path: Path):
    for number in range(2):
        (tmp_path / f"n{number}.jpg").write_bytes(IMAGES[number])
    entries = {f"q{n}": {"imageId": f"n{n}", "question": "Is it red?", "answer": "no" if n else "yes",
                         "isBalanced": True} for n in range(2)}  # fmt: skip
    file = write_json(tmp_path / "testdev_questions.json", entries)
    source = opened(file, format="gqa")
    assert [source.caption(row) for row in range(2)] == ["yes", "no"]
    assert source.id(1) == "gqa/q1"
    assert source.image(0).getpixel((0, 0)) == COLORS[0]
    # the files have no columns that a recipe could name
    assert opened(file, format="gqa", image="picture").sample(0).images == source.sample(0).images


@pytest.mark.parametrize("form", ["coco", "gqa"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "not laid out as expected.*right would be"), ('{"images": [', r"no valid JSON.*line 1"),
     ('{"a": {"b": 1}}', "not laid out as expected.*KeyError")],
)  # fmt: skip
def test_other_json_under_these_names(tmp_path: Path, form: str, content: str, message: str):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=rf"a\.json: {message}"):
        opened(tmp_path / "a.json", format=form)


def test_coco_captions_of_unlisted_images(tmp_path: Path):
    content = coco()
    content["annotations"].append({"id": 9, "image_id": 99, "caption": "x"})
    with pytest.raises(DataError, match=r"a\.json: captions of images that it does not list, such as image_id 99"):
        opened(write_json(tmp_path / "a.json", content), format="coco")


# --- chats, documents, texts --------------------------------------------------------------------


def test_openai_style_chats(tmp_path: Path):
    import base64

    url = f"data:image/png;base64,{base64.b64encode(IMAGES[2]).decode()}"
    parts = [{"type": "text", "text": "Which colour has "}, {"type": "image_url", "image_url": {"url": url}},
             {"type": "text", "text": "?"}]  # fmt: skip
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
    ]
    source = opened(write_jsonl(tmp_path / "a.jsonl", {"messages": messages}), conversation="messages")
    assert source.sample(0).text == (
        Turn("system", "Be brief."), Turn("user", f"Which colour has {IMAGE}?"), Turn("assistant", "blue"),
    )  # fmt: skip
    assert source.image(0).getpixel((0, 0)) == COLORS[2]


def test_interleaved_documents(tmp_path: Path):
    paths = write_images(tmp_path)
    records = [
        {"text": f"First {IMAGE} then {IMAGE}.", "images": paths[:2]},
        {"text": ["First ", None, " then ", None, "."], "images": [None, paths[0], None, paths[1], None]},
        {"text": "Words alone.", "images": []},
    ]
    source = opened(write_jsonl(tmp_path / "a.jsonl", *records), document="text", image="images")
    assert source.sample(0).text == source.sample(1).text == (Turn("assistant", f"First {IMAGE} then {IMAGE}."),)
    assert source.sample(0).images == source.sample(1).images
    assert [image.getpixel((0, 0)) for image in source.open(source.sample(1))] == COLORS[:2]
    assert counts(source) == (3, 0, 0)


def test_plain_text(tmp_path: Path):
    source = opened(write_parquet(tmp_path / "a.parquet", said=["one", "", "two"]), text="said")
    assert source.sample(2).text == (Turn("assistant", "two"),)
    assert counts(source) == (2, 0, 1)


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_with_sidecars(tmp_path: Path):
    for name, content in [("a.png", IMAGES[0]), ("b/b.PNG", IMAGES[1]), ("c.png", IMAGES[2]), ("d.png", IMAGES[2])]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.txt").write_text(CAPTIONS[0] + "\n")
    (tmp_path / "b/b.caption").write_text(CAPTIONS[1])
    write_json(tmp_path / "c.json", {"caption": CAPTIONS[2], "id": "third"})
    source = opened(tmp_path)
    assert [source.caption(row) for row in range(3)] == CAPTIONS
    assert [source.id(row) for row in range(4)] == ["a.png", "b/b.PNG", "third", "d.png"]
    assert source.image(1).getpixel((0, 0)) == COLORS[1]
    assert counts(source) == (3, 0, 1)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "c.json").write_text("[]")
    source = opened(tmp_path)
    for row, message in [(0, r"a\.txt: not readable"), (2, r"c\.json: list; right would be an object")]:
        with pytest.raises(DataError, match=message):
            source.sample(row)


def test_a_folder_without_texts(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    with pytest.raises(DataError, match="1 images, and none has a text of the same name"):
        opened(tmp_path)


# --- datasets -----------------------------------------------------------------------------------


def squares() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4), c) for c in COLORS], "caption": CAPTIONS},
                                      features=features)  # fmt: skip


def test_what_datasets_saved(tmp_path: Path):
    squares().save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": squares(), "test": squares().select([1])}).save_to_disk(str(tmp_path / "several"))
    source = opened(tmp_path / "one")
    check_squares(source)
    check_squares(pickle.loads(pickle.dumps(source)))
    check_squares(opened(tmp_path / "several"))
    assert opened(tmp_path / "several", split="test").caption(0) == CAPTIONS[1]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        opened(tmp_path / "several", split="dev")
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(DataError, match="one, split 'train'"):
        opened(tmp_path / "one")


def test_a_data_set_with_lists_of_images(tmp_path: Path):
    features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    table = {"images": [[Image.new("RGB", (4, 4), c) for c in COLORS[:2]]], "caption": ["two squares"]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "set"))
    source = opened(tmp_path / "set", image="images")
    assert [image.getpixel((0, 0)) for image in source.open(source.sample(0))] == COLORS[:2]
    assert source.sample(0).text[0] == Turn("user", IMAGE * 2)


def stream(table: datasets.Dataset, count: int | None = None) -> StreamRows:
    iterable = table.to_iterable_dataset()
    return StreamRows(iterable, table.num_rows if count is None else count, "streamed", state="one")


def test_a_stream_of_squares():
    check_squares(Source(Opened(stream(squares()), None, DataSource(dataset="hf:a/b", streaming=True))))


def test_a_stream_is_read_forwards_and_goes_back_where_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "STRETCH", 10)
    rows = stream(datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(47)]}))
    assert rows.stretches.tolist() == [0, 10, 20, 30, 40]
    assert rows.window == 0
    for row in [*range(47), 3, 46, 20, 19, 0]:
        assert rows.read(row) == {"text": f"t{row}"}
    assert len(rows._stretches) == 2
    assert pickle.loads(pickle.dumps(rows)).read(13) == {"text": "t13"}


def test_a_stream_that_ends_early_or_breaks():
    table = datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(7)]})
    short = stream(table, 9)
    assert counts(short) == (7, 2, 0)
    with pytest.raises(DataError, match="streamed, row 8: the stream ended after 7 rows"):
        short.read(8)

    def broken(row: dict[str, str]) -> dict[str, str]:
        if row["text"] == "t5":
            raise ConnectionResetError("the line is dead")
        return row

    rows = StreamRows(table.to_iterable_dataset().map(broken), 7, "streamed", state="one")
    with pytest.raises(DataError, match="streamed, row 0 or soon after: the line is dead"):
        rows.read(0)


# --- what is no data set ------------------------------------------------------------------------


def test_empty_sets_and_wrong_files(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", image=pa.array([], pa.binary()), caption=pa.array([], pa.string()))
    for name, content in [
        ("empty.jsonl", b""), ("empty.csv", b""), ("empty.parquet", b""), ("blank.jsonl", b"\n\n"),
        ("none.json", b"[]"), ("head.csv", b"image,caption\n"), ("broken.parquet", b"PAR1 no"), ("notes.txt", b"x"),
        ("two.csv", b"image,caption\na.png,x\nb.png,y,z\n"), ("empty.tar", bytes(10240)),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("a.parquet", "no samples"),
        ("empty.jsonl", "the file is empty"),
        ("empty.csv", "no samples"),
        ("empty.parquet", "the file is empty"),
        ("blank.jsonl", "no samples"),
        ("none.json", "no samples"),
        ("head.csv", "no samples"),
        ("two.csv", "not readable as csv: .*line 3"),
        ("broken.parquet", "not readable as parquet"),
        ("notes.txt", r"files end in \.parquet"),
        ("empty.tar", "no samples"),
        ("folder", "none has a text"),
        ("nothing-here", "no file or directory"),
    ]:
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            opened(tmp_path / name)


def test_every_format_needs_what_it_reads(tmp_path: Path):
    for form in ("table", "llava", "coco", "gqa", "folder", "huggingface"):
        with pytest.raises(DataError, match="nowhere"):
            open_rows(DataSource(dataset=str(tmp_path / "nowhere"), format=form))
    with pytest.raises(DataError, match="right would be openmoji"):
        open_rows(DataSource(dataset="other", format="openmoji"))
    with pytest.raises(DataError, match="no split 'side'"):
        open_rows(DataSource(dataset="openmoji", split="side"))


def test_parquet_texts_that_are_no_utf8(tmp_path: Path):
    said = pa.array([b"fine", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    file = write_parquet(tmp_path / "a.parquet", image=[png()] * 3, caption=said)
    source = opened(file)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: not readable"):
        source.sample(1)
    assert counts(source) == (2, 1, 0)
    assert json.dumps(source.id(1))


def test_parquet_paths_that_are_no_utf8(tmp_path: Path):
    paths = write_images(tmp_path)
    broken = pa.array([paths[0].encode(), b"\xff.png", paths[2].encode()]).cast(pa.binary()).view(pa.string())
    source = opened(write_parquet(tmp_path / "a.parquet", image=broken, caption=CAPTIONS))
    assert counts(source) == (2, 1, 0)
    assert list(source.rows.values("image")) == [paths[0], None, paths[2]]
    before = source.fingerprint
    (tmp_path / paths[2]).write_bytes(png((1, 2, 3)) * 2)
    assert opened(tmp_path / "a.parquet").fingerprint != before
