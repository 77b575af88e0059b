"""Hashes of tensors, against bytes written out by hand; JSON objects that are none."""

import hashlib
import struct

import pytest
import torch

from vpgtrans.errors import CheckpointError, TransferError
from vpgtrans.fingerprint import embeddings_sha256
from vpgtrans.parts import read_object, tensors_sha256

TENSORS = {
    "b": torch.tensor([[1.0, -2.0], [0.5, 3.0]]),
    "a": torch.tensor(7),
    "half": torch.tensor([1.0, -1.5], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "none": torch.empty(0, 3),
}


def test_a_hash_covers_names_dtypes_shapes_and_bytes_in_the_order_of_names():
    written = (
        b"a torch.int64 []\n" + struct.pack("<q", 7)
        + b"b torch.float32 [2, 2]\n" + struct.pack("<4f", 1.0, -2.0, 0.5, 3.0)
        + b"half torch.bfloat16 [2]\n" + bytes.fromhex("803fc0bf")
        + b"mask torch.bool [2]\n" + bytes([1, 0])
        + b"none torch.float32 [0, 3]\n"
    )  # fmt: skip
    assert tensors_sha256(TENSORS) == hashlib.sha256(written).hexdigest()
    assert tensors_sha256(dict(reversed(TENSORS.items()))) == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"b": torch.tensor([[1.0, -2.0], [0.5, 3.5]])},
        {"b": TENSORS["b"].T},
        {"b": TENSORS["b"].flatten()},
        {"mask": TENSORS["mask"].to(torch.uint8)},
        {"more": torch.empty(0)},
    ],
    ids=["value", "order", "shape", "dtype", "name"],
)
def test_any_change_gives_another_hash(changes):
    assert tensors_sha256(TENSORS | changes) != tensors_sha256(TENSORS)


def test_how_a_tensor_lies_in_memory_makes_no_difference():
    strided = torch.stack([TENSORS["b"], TENSORS["b"] + 1], dim=2)[:, :, 0].requires_grad_()
    assert not strided.is_contiguous()
    assert tensors_sha256(TENSORS | {"b": strided}) == tensors_sha256(TENSORS)


def test_an_embedding_table_is_hashed_as_bf16_bytes():
    table = torch.tensor([[1.0, -1.5], [0.0, 2.0]])
    expected = hashlib.sha256(bytes.fromhex("803fc0bf00000040")).hexdigest()
    assert embeddings_sha256(table) == embeddings_sha256(table.bfloat16()) == expected
    many = torch.arange(40_000.0)[:, None]  # more rows than are taken at once
    whole = many.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    assert embeddings_sha256(many) == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("error", [CheckpointError, TransferError])
def test_what_is_no_json_object_is_the_callers_error(tmp_path, error):
    path = tmp_path / "config.json"
    with pytest.raises(error, match=r"config\.json: not a readable JSON file"):
        read_object(path, otherwise=error)
    for content, saying in ((b'{"a": ', "not a readable"), (b'"\xff"', "not a readable"), (b"[1]", "holds a list")):
        path.write_bytes(content)
        with pytest.raises(error, match=rf"config\.json: .*{saying}"):
            read_object(path, otherwise=error)
    path.write_text('{"a": "é"}', encoding="utf-8")
    assert read_object(path, otherwise=error) == {"a": "é"}
