"""Damaged files of every kind: each row is a sample, malformed or dropped, or the whole file is refused with a message.

Nothing but DataError comes out, nothing hangs, and no row is lost without a word.
"""

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from data_files import (
    CAPTIONS,
    COUNT,
    IMAGES,
    captioned,
    counts,
    damaged,
    damages,
    opened,
    write_csv,
    write_images,
    write_json,
    write_jsonl,
    write_parquet,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vpgtrans.errors import DataError


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    for name in write_images(folder):
        shutil.copy(folder / name, (folder / name).with_suffix(".jpg"))  # GQA's ending
    return folder


@pytest.fixture(autouse=True)
def cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPGTRANS_CACHE", str(here / "cache"))


def records() -> list[dict[str, Any]]:
    return captioned(id=["a", "b", "c"], image=[f"images/{n}.png" for n in range(COUNT)], caption=CAPTIONS)


def coco() -> dict[str, Any]:
    return {
        "images": [{"id": n, "file_name": f"images/{n}.png"} for n in range(COUNT)],
        "annotations": [{"id": n, "image_id": n, "caption": caption} for n, caption in enumerate(CAPTIONS)],
    }


def gqa() -> dict[str, Any]:
    return {f"q{n}": {"imageId": f"images/{n}", "question": "Which?", "answer": c} for n, c in enumerate(CAPTIONS)}


def chats() -> list[dict[str, Any]]:
    said = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "this"}]
    return [{"id": n, "image": f"images/{n}.png", "conversations": said} for n in range(COUNT)]


def tar(path: Path) -> Path:
    samples = captioned(__key__=["a", "b", "c"], png=IMAGES, json=[{"caption": caption} for caption in CAPTIONS])
    return write_tar(path, *samples)


KINDS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "lines": ("a.jsonl", lambda path: write_jsonl(path, *records()), {}),
    "array": ("a.json", lambda path: write_json(path, records()), {}),
    "csv": ("a.csv", lambda path: write_csv(path, list(records()[0]), *(list(r.values()) for r in records())), {}),
    "parquet": (
        "a.parquet", lambda path: write_parquet(path, group=2, image=IMAGES, caption=CAPTIONS, id=["a", "b", "c"]), {}
    ),
    "tar": ("a.tar", tar, {}),
    "coco": ("a.json", lambda path: write_json(path, coco()), {"format": "coco"}),
    "gqa": ("a.json", lambda path: write_json(path, gqa()), {"format": "gqa"}),
    "llava": ("a.json", lambda path: write_json(path, chats()), {"format": "llava"}),
}  # fmt: skip
EXAMPLES = {"csv": 30, "parquet": 100, "tar": 60}


def survives(path: Path, **keys: Any) -> None:
    """Read everything, twice: what a row is must not depend on what was read before."""
    try:
        source = opened(path, **keys)
    except DataError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert str(path) in refused
        return
    used, bad, dropped = counts(source)
    assert used + bad + dropped == len(source)
    assert counts(source) == (used, bad, dropped)
    for row in range(len(source)):
        assert isinstance(source.id(row), str)
    assert source.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_reported(here: Path, kind: str) -> None:
    name, write, keys = KINDS[kind]
    path = write(here / name)
    whole = path.read_bytes()
    assert counts(opened(path, **keys)) == (COUNT, 0, 0)

    @settings(deadline=timedelta(seconds=10), max_examples=EXAMPLES.get(kind, 60))
    @given(damages)
    def check(damage: list[tuple[int, Any]]) -> None:
        path.unlink()
        path.write_bytes(damaged(whole, damage))
        survives(path, **keys)

    check()


@settings(deadline=timedelta(seconds=10), max_examples=60)
@given(st.data())
def test_a_damaged_folder(here: Path, data: st.DataObject) -> None:
    folder = here / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (image, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
        (folder / f"{number}.png").write_bytes(image)
        (folder / f"{number}.json").write_text(json.dumps({"caption": caption}))
    for name in data.draw(st.sets(st.sampled_from(sorted(folder.iterdir())), max_size=3)):
        change = data.draw(damages)
        name.write_bytes(damaged(name.read_bytes(), change))
        if change[0][1] == "delete":
            name.unlink()
    survives(folder)


@pytest.mark.parametrize("kind", ["parquet", "tar", "array", "coco", "gqa", "llava"])
def test_a_file_that_is_cut_anywhere_is_refused(here: Path, kind: str) -> None:
    name, write, keys = KINDS[kind]
    path = write(here / name)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) if kind == "tar" else len(whole)
    for length in range(0, end, max(1, end // 40)):
        path.unlink()
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=name):
            opened(path, **keys)


def test_a_file_of_lines_that_is_cut_loses_what_is_cut_off_alone(here: Path) -> None:
    path = write_jsonl(here / "a.jsonl", *records())
    whole = path.read_bytes()
    for length in range(len(whole) // 2, len(whole)):
        path.write_bytes(whole[:length])
        rows = len([line for line in whole[:length].split(b"\n") if line])
        used, bad, dropped = counts(opened(path))
        assert used + bad + dropped == rows
        assert used >= rows - 1
