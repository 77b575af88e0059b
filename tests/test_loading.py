"""Loading in other processes: the same batches in the same order, nothing lost, nobody left behind."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from test_resume import without_clock
from tiny import tiny_tokenizer
from tiny_training import FINETUNE, WARMUP, _png, all_tensors, build_vlm, lines, make_recipe

from vpgtrans.config import ImageConfig, PromptConfig
from vpgtrans.data import streams
from vpgtrans.data.config import DataSource
from vpgtrans.data.formats import Opened
from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.data.sources import Source, open_dataset
from vpgtrans.data.streams import StreamRows
from vpgtrans.errors import TrainingError
from vpgtrans.prompts import Prompter
from vpgtrans.runs.directory import RunDirectory
from vpgtrans.runs.training import run_stages
from vpgtrans.training.draws import SampleDraws
from vpgtrans.training.features import FeatureCache, FrozenFront
from vpgtrans.training.loading import Updates
from vpgtrans.training.samples import BadSamples, Batch, Samples
from vpgtrans.vision.preprocess import ImageTransform

ROWS = 40
SIZE = 8
STAGE = make_recipe([{**WARMUP, "batch_size": 6}]).stages[0]


def colour(number: int) -> tuple[int, int, int]:
    return number, 255 - number, 7 * number % 256


def picture(number: int) -> bytes:
    """One colour, by which it is known again."""
    return _png(np.full((SIZE, SIZE, 3), colour(number), dtype=np.uint8))


def captions() -> list[str]:
    return [f"a cat and {row} clocks" for row in range(ROWS)]


def write_parquet(folder: Path) -> Source:
    columns = {"id": names(), "image": [picture(row) for row in range(ROWS)], "caption": captions()}
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=7)
    return open_dataset(DataSource(dataset=str(folder / "train.parquet")))


def names() -> list[str]:
    return [f"n{row}" for row in range(ROWS)]


def write_jsonl(folder: Path) -> Source:
    write_images(folder)
    records = [{"image": f"{row}.png", "caption": text} for row, text in enumerate(captions())]
    return open_jsonl(folder / "rows.jsonl", records)


def open_jsonl(file: Path, records: list[dict[str, Any]], **keys: Any) -> Source:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_dataset(DataSource(dataset=str(file), **keys))


def write_images(folder: Path) -> None:
    for row in range(ROWS):
        (folder / f"{row}.png").write_bytes(picture(row))


def write_tar(folder: Path) -> Source:
    with webdataset.ShardWriter(str(folder / "%02d.tar"), maxcount=15, verbose=0) as shards:
        for row, text in enumerate(captions()):
            shards.write({"__key__": f"k{row}", "png": picture(row), "txt": text})
    return open_dataset(DataSource(dataset=str(folder / "{00..02}.tar")))


def write_folder(folder: Path) -> Source:
    write_images(folder)
    for row, text in enumerate(captions()):
        (folder / f"{row}.txt").write_text(text)
    return open_dataset(DataSource(dataset=str(folder)))


def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [picture(row) for row in range(ROWS)], "caption": captions()})


def write_arrow(folder: Path) -> Source:
    table().save_to_disk(folder / "saved")
    return open_dataset(DataSource(dataset=str(folder / "saved")))


def write_stream(folder: Path) -> Source:
    file = folder / "rows.parquet"
    table().to_parquet(file)
    stream = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    return Source(Opened(StreamRows(stream, ROWS, "stream", state="s"), None, DataSource(dataset="unused")))


KINDS = {
    "parquet": write_parquet, "jsonl": write_jsonl, "tar": write_tar, "folder": write_folder, "arrow": write_arrow,
    "stream": write_stream,
}  # fmt: skip


def updates(mixture: Mixture, *, workers: int = 0, start: int = 0, stop: int = 9, limit: float = 0.0) -> Updates:
    """54 draws by default: into the second epoch of 40 rows."""
    vpg: Any = SimpleNamespace(transform=ImageTransform(ImageConfig(size=SIZE)))
    prompter = Prompter(tiny_tokenizer(), PromptConfig(), visual_tokens=2)
    samples = Samples(mixture, FrozenFront(vpg, "pixels"), prompter, bad=BadSamples(limit), cached=False)
    return Updates(samples, SampleDraws(samples.mixture, seed=3, stage=STAGE), start=start, stop=stop, workers=workers)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.ids, ours.texts, ours.skipped) == (theirs.ids, theirs.texts, theirs.skipped)
        assert torch.equal(ours.inputs, theirs.inputs)
        for one, other in zip(ours.encoded, theirs.encoded, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.answer.tolist() == other.answer.tolist()


def shown(batch: Batch) -> list[int]:
    """Numbers of the pictures in a batch, in order."""
    return batch.inputs[:, 0, 0, 0].tolist() if len(batch.inputs) else []


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_by_any_number_of_processes_from_anywhere(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(streams, "STRETCH", 8)
    mixture = Mixture([(KINDS[kind](tmp_path), 1.0)])
    whole = list(updates(mixture))
    first = [number for batch in whole for number in shown(batch)]
    assert sorted(first[:ROWS]) == list(range(ROWS))
    for batch in whole:
        assert [captions()[number] for number in shown(batch)] == batch.texts
    assert_same(list(updates(mixture, workers=2)), whole)
    for workers in (0, 2):
        assert_same(list(updates(mixture, workers=workers, start=4)), whole[4:])
        for rank in (0, 1):
            data = updates(mixture, workers=workers)
            data.rank, data.world = rank, 2
            for ours, expected in zip(list(data), whole, strict=True):
                assert ours.ids == expected.ids[rank::2]
                assert torch.equal(ours.inputs, expected.inputs[rank::2])


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]


def mixed(folder: Path) -> Mixture:
    """Captions, questions, conversations about two images, and plain text."""
    write_images(folder)
    pairs = [
        {
            "image": [f"{row}.png", f"{row + 1}.png"],
            "talk": conversation("<image> a cat? <image>", "two", "sure?", "yes"),
        }
        for row in range(0, 16, 2)
    ]
    asked = [{"image": f"{row}.png", "q": "red or blue?", "a": f"red {row}"} for row in range(16, 24)]
    plain = [{"said": f"the flag of Japan {row}"} for row in range(8)]
    told = [{"image": f"{row}.png", "caption": captions()[row]} for row in range(24, 32)]
    return Mixture(
        [
            (open_jsonl(folder / "told.jsonl", told), 1.0),
            (open_jsonl(folder / "asked.jsonl", asked, question="q", answer="a"), 1.0),
            (open_jsonl(folder / "pairs.jsonl", pairs, conversation="talk"), 1.0),
            (open_jsonl(folder / "plain.jsonl", plain, text="said"), 1.0),
        ]
    )


def test_samples_of_no_one_and_two_images_share_batches(tmp_path):
    mixture = mixed(tmp_path)
    whole = list(updates(mixture, stop=6))
    assert_same(list(updates(mixture, stop=6, workers=2)), whole)
    assert {text.images for batch in whole for text in batch.encoded} == {0, 1, 2}
    by_id = {mixture.sample(row).id: mixture.sample(row) for row in range(len(mixture))}
    for batch in whole:
        wanted = [Path(str(image)).stem for name in batch.ids for image in by_id[name].images]
        assert [str(number) for number in shown(batch)] == wanted
        assert len(batch.part(0, 2).inputs) == sum(text.images for text in batch.encoded[:2])


def test_a_batch_without_any_image_has_empty_inputs(tmp_path):
    source = open_jsonl(tmp_path / "plain.jsonl", [{"said": f"a cat {row}"} for row in range(12)], text="said")
    whole = list(updates(Mixture([(source, 1.0)]), stop=2))
    assert [len(batch) for batch in whole] == [6, 6]
    assert [len(batch.inputs) for batch in whole] == [0, 0]
    assert_same(list(updates(Mixture([(source, 1.0)]), stop=2, workers=2)), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_out_is_listed_and_counts_add_up(tmp_path, workers):
    write_images(tmp_path)
    rows = [json.dumps({"image": f"{row}.png", "caption": text}) for row, text in enumerate(captions())]
    rows[5] = '{"image": '
    rows[11] = json.dumps({"image": "absent.png", "caption": "x"})
    rows[12] = json.dumps({"image": "12.png", "caption": None})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    mixture = open_mixture([DataSource(dataset=str(tmp_path / "rows.jsonl"))])
    data = updates(mixture, workers=workers, stop=20, limit=0.5)  # three epochs: each row comes up thrice
    used = {name for batch in data for name in batch.ids}
    bad = data.samples.bad
    name = f"{tmp_path}/rows.jsonl"
    assert {entry.id: entry.reason.removeprefix(name) for entry in bad.bad.values()} == {
        f"{name}/5": ", line 6: no valid JSON (Expecting value: line 1 column 11 (char 10))",
        f"{name}/11": f", line 12: {tmp_path}/absent.png: No such file or directory",
    }
    assert {entry.id: entry.reason for entry in bad.dropped.values()} == {f"{name}/12": f"{name}, line 13: no caption"}
    assert (bad.seen, len(used)) == (ROWS, ROWS - 3)
    assert bad.seen == len(used) + bad.left_out


def test_samples_count_once_over_all_stages(tmp_path):
    mixture = Mixture([(write_jsonl(tmp_path), 1.0)])
    first, second = updates(mixture, stop=2), updates(mixture, stop=2)
    second.samples.bad = first.samples.bad
    assert len(list(first)) == len(list(second)) == 2
    assert first.samples.bad.seen == 12


# --- processes ----------------------------------------------------------------------------------


def gone(pids: list[int]) -> bool:
    """Whether processes end within some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not any(child.pid in pids for child in multiprocessing.active_children()):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def two(tmp_path) -> Mixture:
    return Mixture([(write_parquet(tmp_path), 1.0)])


@pytest.mark.parametrize("way", ["iteration", "owner"])
def test_processes_end_with_what_they_were_started_for(two, way):
    data = updates(two, workers=2, stop=40)
    batches = iter(data)
    next(batches)
    pids = [child.pid for child in multiprocessing.active_children()]
    assert len(pids) == 2
    if way == "iteration":
        batches.close()
    else:  # an exception keeps the iteration alive for as long as its traceback is looked at
        data.close()
    assert gone(pids)


def test_ctrl_c_reaches_every_process_and_leaves_loading_to_the_first(two):
    expected = list(updates(two, stop=30))
    batches = iter(updates(two, workers=2, stop=30))
    found = [next(batches)]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    assert_same(found + list(batches), expected)


def test_what_goes_wrong_in_a_process_comes_through_as_it_is(two, monkeypatch):
    def broken(self, rows, **_):
        raise RuntimeError("boom: a bug")

    monkeypatch.setattr(Samples, "load", broken)
    with pytest.raises(RuntimeError, match="boom: a bug"):
        list(updates(two, workers=2, stop=3))
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_one_clear_error(two):
    batches = iter(updates(two, workers=2, stop=500))
    next(batches)
    pids = [child.pid for child in multiprocessing.active_children()]
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"a process that loads data was killed .*data\.workers"):
        list(batches)
    assert gone(pids)


# --- caches and whole runs ----------------------------------------------------------------------


def test_features_are_computed_from_other_processes_alike(root, tmp_path):
    write_images(tmp_path)
    records: list[dict[str, Any]] = [{"image": f"{row}.png", "caption": "x"} for row in range(12)]
    records[3]["image"] = "absent.png"
    records[7]["image"] = ["7.png", "8.png"]
    source = open_jsonl(tmp_path / "rows.jsonl", records)
    front = FrozenFront(build_vlm(root).vpg, "tokens")
    caches = [FeatureCache(source, front, directory=tmp_path / f"cache{workers}") for workers in (0, 2)]
    for cache, workers in zip(caches, (0, 2), strict=True):
        cache.ensure(range(12), batch_size=3, workers=workers)
    readable = [row for row in range(12) if row not in (3, 7)]
    assert torch.equal(caches[0][readable], caches[1][readable])
    assert caches[0].unreadable(range(12)) == caches[1].unreadable(range(12))
    assert list(caches[1].unreadable(range(12))) == [3]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_over_a_mixture_is_the_same_with_other_processes(root, tmp_path, cached):
    mixture = mixed(tmp_path)
    ends = {}
    for workers in (0, 2):
        entry = [{"dataset": "unused"}]
        recipe = make_recipe(
            [{**WARMUP, "cache_features": cached}, {**FINETUNE, "cache_features": cached}],
            data={"train": entry, "validation": entry, "workers": workers},
            trainer={"precision": "fp32", "devices": 1, "validate_samples": 6},
        )
        run, vlm = tmp_path / f"run{workers}", build_vlm(root)
        run.mkdir()
        run_stages(vlm, recipe, RunDirectory(run), train=mixture, validation=mixture, resume=False)
        ends[workers] = all_tensors(vlm), without_clock(lines(run / "metrics.jsonl"))
        assert multiprocessing.active_children() == []
    assert ends[0][1] == ends[2][1]
    assert [name for name, tensor in ends[0][0].items() if not torch.equal(tensor, ends[2][0][name])] == []
    losses = [line["loss"] for line in ends[0][1] if "loss" in line]
    assert len(losses) == 12
    assert all(np.isfinite(losses))
