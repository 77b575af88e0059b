"""Reading chosen tensors of a checkpoint directory: formats, preference, and what damaged files say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vpgtrans.checkpoint_files import CheckpointFiles
from vpgtrans.config import EfficientNetLite0Config
from vpgtrans.errors import CheckpointError, ReferenceError_
from vpgtrans.vision import encoders

STATE = {"llm.table": torch.arange(6.0).reshape(2, 3), "vision.weight": torch.ones(4), "vision.bias": torch.zeros(2)}


def indexed(directory: Path, places: dict[str, str], *, stem: str = "model.safetensors") -> None:
    (directory / f"{stem}.index.json").write_text(json.dumps({"weight_map": places}))


def safetensors(directory: Path) -> None:
    save_file(STATE, directory / "model.safetensors")


def safetensors_shards(directory: Path) -> None:
    save_file({"llm.table": STATE["llm.table"]}, directory / "1.safetensors")
    save_file({name: STATE[name] for name in ("vision.weight", "vision.bias")}, directory / "2.safetensors")
    indexed(directory, {name: f"{1 if name == 'llm.table' else 2}.safetensors" for name in STATE})


def pickled(directory: Path) -> None:
    torch.save(STATE, directory / "pytorch_model.bin")


def pickled_before_torch_1_6(directory: Path) -> None:
    torch.save(STATE, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pickled_shards(directory: Path) -> None:
    torch.save(STATE, directory / "1.bin")
    indexed(directory, dict.fromkeys(STATE, "1.bin"), stem="pytorch_model.bin")


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("write", [safetensors, safetensors_shards, pickled, pickled_before_torch_1_6, pickled_shards])
def test_every_format_gives_the_same_tensors(tmp_path, write):
    write(tmp_path)
    files = CheckpointFiles(tmp_path)
    assert sorted(files.names()) == sorted(STATE)
    assert "llm.table" in files
    assert "table" not in files
    assert same(files.read_all(STATE), STATE)
    assert torch.equal(files.first_of(["absent", "llm.table", "vision.bias"]), STATE["llm.table"])
    vision = {"weight": STATE["vision.weight"], "bias": STATE["vision.bias"]}
    assert same(files.under(["absent.", "vision.", "llm."]), vision)


def test_the_file_that_transformers_would_take_is_preferred(tmp_path):
    pickled(tmp_path)
    torch.save({"stale": torch.ones(1)}, tmp_path / "1.bin")
    indexed(tmp_path, {"stale": "1.bin"}, stem="pytorch_model.bin")
    assert sorted(CheckpointFiles(tmp_path).names()) == sorted(STATE)  # whole before its index
    safetensors_shards(tmp_path)
    torch.save({"stale": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert sorted(CheckpointFiles(tmp_path).names()) == sorted(STATE)  # safetensors before pickles


def test_nothing_but_the_file_asked_for_is_opened(tmp_path):
    safetensors_shards(tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"damaged")
    files = CheckpointFiles(tmp_path)
    assert torch.equal(files.read("llm.table"), STATE["llm.table"])
    with pytest.raises(CheckpointError, match=r"2\.safetensors: not readable"):
        files.read("vision.bias")
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2\.safetensors: missing, but the index says that vision\.bias"):
        files.read("vision.bias")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ReferenceError_, match="no weights"):
        CheckpointFiles(tmp_path).names()
    safetensors(tmp_path)
    files = CheckpointFiles(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor absent"):
        files.read_all(["llm.table", "absent"])
    with pytest.raises(CheckpointError, match=r"none of these .*: one, two"):
        files.first_of(["one", "two"])
    with pytest.raises(CheckpointError, match=r"below any of \['one\.'"):
        files.under(["one."])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../other/1.safetensors"}}', "must lie beside the index"),
        ('{"weight_map": {"a": "/etc/1.safetensors"}}', "must lie beside the index"),
        ('{"weight_map": {"a": 3}}', "weight_map must say"),
        ('{"weight_map": ["a"]}', "weight_map must say"),
        ("{}", "weight_map must say"),
        ("[]", "must hold a JSON object"),
        ("{", "not a readable JSON file"),
    ],
)
def test_an_index_that_says_something_else_is_refused(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFiles(tmp_path).names()


@pytest.mark.parametrize("write", [pickled, pickled_before_torch_1_6])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_is_never_a_raw_error(tmp_path, write):
    write(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, 300, 7)]
    cut = [whole[:length] for length in range(0, len(whole), len(whole) // 25)]
    refused = 0
    for damaged in [b"not a pickle", b"<html>", *flipped, *cut]:
        path.write_bytes(damaged)
        try:
            CheckpointFiles(tmp_path).read_all(STATE)
        except CheckpointError:
            refused += 1
    assert refused > 30


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        CheckpointFiles(tmp_path).names()
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no tensor a"):
        CheckpointFiles(tmp_path).read("a")


def test_damaged_weights_of_efficientnet_are_refused(tmp_path):
    (tmp_path / "lite0.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"lite0\.pth: not readable as weights"):
        encoders.build(EfficientNetLite0Config(reference=str(tmp_path / "lite0.pth")))
