"""Headers of safetensors files: as the library reads them, and every lie in one is refused."""

import json
import pickle
import random
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from vpgtrans.errors import IntegrityError
from vpgtrans.registry.safetensors_header import BYTES, MAX_HEADER, read_header

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path, header, data=b"\0" * 8, *, length=None):
    """A file with a header of our own making."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_says_what_the_library_says(tmp_path):
    tensors = {
        "a.weight": torch.zeros(3, 4, dtype=torch.bfloat16),
        "scalar": torch.zeros((), dtype=torch.float64),
        "empty": torch.zeros(0, 7),
        "flags": torch.zeros(5, dtype=torch.bool),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    with safe_open(path, framework="pt") as file:
        assert set(found) == set(file.keys())
        for name, info in found.items():
            assert list(info.shape) == file.get_slice(name).get_shape()
            assert info.dtype == file.get_slice(name).get_dtype()
    assert found["a.weight"].kind == "BF16 [3, 4]"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.int64])
def test_knows_the_size_of_a_value(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, dtype=dtype)}, path)
    assert BYTES[read_header(path)["a"].dtype] == dtype.itemsize


LIES = [
    ({"a": F32 | {"data_offsets": [0, 4]}}, "takes other than 4 bytes"),
    ({"a": F32 | {"shape": [3]}}, "takes other than"),
    ({"a": F32 | {"shape": [-2]}}, "whole numbers"),
    ({"a": F32 | {"shape": [2.0]}}, "whole numbers"),
    ({"a": F32 | {"shape": [True, 2]}}, "whole numbers"),
    ({"a": F32 | {"shape": [1 << 62, 4]}}, "whole numbers"),
    ({"a": F32 | {"shape": [1] * 17 + [2]}}, "whole numbers"),
    ({"a": F32 | {"dtype": "F4"}}, "unknown"),
    ({"a": F32 | {"dtype": []}}, "unknown"),
    ({"a": F32 | {"more": 1}}, "has not dtype"),
    ({"a": []}, "has not dtype"),
    ({"a": F32 | {"data_offsets": [8, 0]}}, "takes other than"),
    ({"a": F32, "b": F32}, "overlap"),
    ({"a": F32, "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "overlap"),
    ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "gap"),
    ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "end at byte 4 and its data at 8"),
    ({}, "end at byte 0 and its data at 8"),
    ({"a\x1b[2J": F32}, "control characters"),
    ({"__metadata__": {"a": 1}, "b": F32}, "not text"),
    ({"__metadata__": [], "b": F32}, "not text"),
    (b'{"a": 1, "a": 2}', "twice"),
    (b'{"a": ' + b"[" * 100_000, "no JSON"),
    (b'{"a": ' + b"9" * 5_000 + b"}", "no JSON"),
    (b'{"a": \xff}', "no JSON"),
    (b"{", "no JSON"),
]


@pytest.mark.parametrize(("header", "message"), LIES)
def test_a_lie_is_refused(tmp_path, header, message):
    with pytest.raises(IntegrityError, match=message):
        read_header(written(tmp_path / "model.safetensors", header))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (b"\x80\x02}q\x00.", "it has 6 bytes"),
        (pickle.dumps({"a": [1] * 20}), "a pickle"),
        (b"PK\x03\x04" + b"\0" * 40, "a zip archive"),
        (b"GGUF" + b"\0" * 40, "GGUF"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (struct.pack("<Q", 2 << 30) + b"{" + b" " * 100, "claims a header of 2,147,483,648 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{" + b" " * 100, "claims a header"),
        (struct.pack("<Q", 1_000) + b"{" + b" " * 100, "and has 109 in all"),
    ],
)
def test_another_file_is_refused(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=message):
        read_header(path)


def test_a_header_of_two_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30) + b"{")
        file.truncate((2 << 30) + 16)  # as large as it claims, and sparse on the disk
    with pytest.raises(IntegrityError, match=f"at most {MAX_HEADER:,}"):
        read_header(path)


def test_what_isnt_there_is_named(tmp_path):
    with pytest.raises(IntegrityError, match="No such file"):
        read_header(tmp_path / "model.safetensors")


def test_whatever_passes_opens_in_the_library_with_the_same_shapes(tmp_path):
    """2,000 damaged files: ours never raises anything else, and never accepts what the library refuses."""
    draw = random.Random(0)
    whole = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    path = tmp_path / "model.safetensors"
    passed = 0
    for _ in range(2_000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.choice([draw.randrange(8), draw.randrange(8, 8 + whole[0]), draw.randrange(len(data))])
            data[place % len(data)] = draw.choice([draw.randrange(256), draw.choice(b'0123456789{}[]",:F')])
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        path.write_bytes(data)
        try:
            found = read_header(path)
        except IntegrityError:
            continue
        passed += 1
        try:
            with safe_open(path, framework="pt") as file:
                assert {name: list(info.shape) for name, info in found.items()} == {
                    name: file.get_slice(name).get_shape()
                    for name in file.keys()  # noqa: SIM118
                }
        except SafetensorError as error:
            pytest.fail(f"the library refuses what passed: {error}")
    assert 0 < passed < 2_000
