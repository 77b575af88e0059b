"""Training from packs: it changes how samples lie in rows, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from PIL import Image
from tiny_runs import Tiny
from tiny_training import FINETUNE, PACKING, all_tensors, build_vlm, data_keys, lines, make_recipe, mixtures, train

from vpgtrans.config import PromptConfig
from vpgtrans.data.packs import measure
from vpgtrans.errors import RecipeError
from vpgtrans.recipe import dump
from vpgtrans.training.samples import Batch, Samples
from vpgtrans.vlm import VLM

STAGE = {**FINETUNE, "lora": {}, "losses": {"caption": 1.0, "words": 0.3}}


def logged(run: Path, key: str) -> list[float]:
    return [line[key] for line in lines(run / "metrics.jsonl") if key in line]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_packed_update_is_the_padded_update_of_the_same_samples(root, tmp_path, monkeypatch, attention, cached):
    recipe = make_recipe(
        [{**STAGE, "cache_features": cached}],
        data=data_keys(packing=PACKING),
        trainer={"precision": "fp32", "devices": 1, "attention": attention},
    )
    packed = build_vlm(root, dropout=0.0)
    sizes = []
    finish = Samples.finish

    def looked_at(self: Samples, *arguments: Any, **named: Any) -> Batch:
        batch = finish(self, *arguments, **named)
        if self.role == "train":
            sizes.append([len(part) for part in batch.parts(None)])
        return batch

    monkeypatch.setattr(Samples, "finish", looked_at)
    [result] = train(packed, recipe, tmp_path / "packed")
    assert all(len(parts) == 2 for parts in sizes)  # packs in an update
    assert max(max(parts) for parts in sizes) > 1
    assert result.samples == sum(map(sum, sizes))

    def without_packs(self: Samples, *arguments: Any, **named: Any) -> Batch:
        batch = finish(self, *arguments, **named)
        batch.packs = None
        return batch

    monkeypatch.setattr(Samples, "finish", without_packs)
    monkeypatch.setattr(Batch, "packed", lambda self, max_tokens: self)
    padded = build_vlm(root, dropout=0.0)
    train(padded, recipe, tmp_path / "padded")
    for key in ("loss", "loss_words", "val_loss", "grad_norm"):
        assert logged(tmp_path / "packed", key) == pytest.approx(logged(tmp_path / "padded", key), rel=1e-4), key
    for key in ("samples", "text_tokens"):
        assert logged(tmp_path / "packed", key) == logged(tmp_path / "padded", key)
    expected = all_tensors(padded)
    for name, tensor in all_tensors(packed).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


def test_what_no_pack_holds_is_counted_as_left_out(root, tmp_path):
    vlm = build_vlm(root)
    tokens = measure(mixtures()["train"], vlm.splice.prompter).tokens
    longest = int(tokens.max())
    recipe = make_recipe([STAGE], data=data_keys(packing={"max_tokens": longest - 1}))
    train(vlm, recipe, tmp_path)
    too_long = int((tokens == longest).sum())
    counts = json.loads((tmp_path / "data.json").read_text())
    assert counts["dropped"] == too_long
    assert counts["rules"] == {f"longer than a pack of {longest - 1} tokens": too_long}
    assert not (tmp_path / "quarantine.jsonl").exists()


def table_with_faults(directory: Path, *, malformed: int) -> Path:
    """48 samples of one image, three without a caption, and some whose caption is no text."""
    Image.new("RGB", (8, 8), "red").save(directory / "a.png")
    captions: list[Any] = ["a red cat"] * 48 + [None] * 3 + [7] * malformed
    table = directory / "rows.jsonl"
    table.write_text("".join(json.dumps({"image": "a.png", "caption": caption}) + "\n" for caption in captions))
    return table


@pytest.mark.parametrize("packing", ["null", "{max_tokens: 64}"])
def test_rows_that_are_no_samples_are_counted_packed_as_padded(recipe, tmp_path, packing):
    table = table_with_faults(tmp_path, malformed=2)
    changes = [f"data.train=[{{dataset: {table}}}]", f"data.packing={packing}", "data.max_bad_fraction=0.1"]
    done = invoke(
        "transfer", recipe, "--output", tmp_path / "run", *changes, "stages.finetune.budget.samples=64",
        "stages.warmup.budget.samples=64", "stages.warmup.cache_features=false", "stages.finetune.cache_features=false",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    counts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (counts["quarantined"], counts["dropped"], counts["rules"]) == (2, 3, {"no caption": 3})
    assert counts["seen"] == counts["used"] + 5
    reasons = [line["reason"] for line in lines(tmp_path / "run" / "quarantine.jsonl")]
    assert all(f"line {number}" in reason for number, reason in zip((52, 53), sorted(reasons), strict=True))


def test_too_many_rows_that_are_no_samples_stop_a_packed_run(recipe, tmp_path):
    table = table_with_faults(tmp_path, malformed=12)
    result = invoke("transfer", recipe, "--output", tmp_path / "run", f"data.train=[{{dataset: {table}}}]", PACKED)
    assert result.exit_code == 1
    assert "12 of 63 samples are unreadable, more than data.max_bad_fraction = 0.01 allows" in result.stderr


def test_an_unreadable_image_leaves_the_rest_of_its_pack(root, tmp_path):
    recipe = make_recipe(
        [{**STAGE, "cache_features": False, "budget": {"samples": 40}}],
        data=data_keys(packing=PACKING, max_bad_fraction=0.9),
    )
    [result] = train(build_vlm(root), recipe, tmp_path, unreadable=(1, 2))
    assert {line["id"] for line in lines(tmp_path / "quarantine.jsonl")} == {"s0-01", "s0-02"}
    assert result.updates == len(logged(tmp_path, "loss"))


def test_a_vlm_whose_images_see_in_both_directions(root, tmp_path):
    """It trains packed as padded, and writes as it was trained."""
    made = build_vlm(root, dropout=0.0)
    both = PromptConfig(image_attention="bidirectional")
    losses = []
    for packing in (PACKING, None):
        vlm = VLM(build_vlm(root, dropout=0.0).vpg, made.projector, made.llm, prompt=both)
        with torch.no_grad():
            texts = ["a cat", "a clock on the wall", "a sofa"]
            prompts = torch.randn(3, vlm.vpg.tokens, vlm.llm.width, generator=torch.Generator().manual_seed(0))
            losses.append(vlm.splice.token_nll(prompts, texts, packed=packing is not None)[0])
    torch.testing.assert_close(losses[0], losses[1])
    causal = made.splice.token_nll(prompts, texts)[0]
    assert (losses[0] - causal).abs().max() > 1e-5


PACKED, BOTH_WAYS = "data.packing.max_tokens=64", "prompt.image_attention=bidirectional"


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(tiny.transfer_recipe()))
    return file


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        (["data.packing.max_tokens=0"], ["data.packing.max_tokens", "0", "above 0"]),
        (["data.packing={}"], ["data.packing", "max_tokens", "missing"]),
        ([PACKED, "stages.0.micro_batch_size=1"], ["micro_batch_size", "a pack is what goes"]),
        ([PACKED, "trainer.attention=flash"], ["trainer.attention", "flash_attention_2", "blocks"]),
        ([PACKED, "trainer.attention=flash_attention_2"], ["flash_attention_2 needs", "not installed"]),
        ([PACKED, "trainer.attention=varlen"], ["varlen needs a GPU", "right here would be auto"]),
        (["trainer.attention=flash_attention_2"], ["flash_attention_2 needs", "not installed"]),
        (["stages.0.lora.dropout=1.5"], ["lora.dropout", "1.5", "below 1"]),
        ([BOTH_WAYS, "trainer.attention=sdpa"], ["sdpa knows no images", "auto or blocks"]),
        (["data.packing.max_tokens=3"], ["no sample fits a pack of 3 tokens", "the shortest has"]),
    ],
    ids=[
        "zero", "no-limit", "micro-batch", "unknown", "not-installed", "no-gpu", "unpacked", "dropout", "both-ways",
        "nothing-fits",
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(recipe, tmp_path, changes, saying):
    result = invoke("transfer", recipe, "--output", tmp_path / "run", *changes)
    assert result.exit_code == 2, result.output
    for words in saying:
        assert words in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_probe_packs_nothing(recipe):
    """So it asks nothing of packs: it may run on another machine than the training."""
    result = invoke("probe", recipe, PACKED, "trainer.devices=3", "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout) if row["chosen"]]


def test_validate_warns_of_a_back_end_that_this_machine_lacks(recipe):
    result = invoke("validate", recipe, PACKED, "trainer.attention=flash_attention_2")
    assert result.exit_code == 0, result.output
    assert "trainer.attention: flash_attention_2 needs flash-attn 2" in result.stderr
    assert "trainer.attention" not in invoke("validate", recipe, PACKED).stderr


def test_without_padding_the_update_is_the_padded_one(root, tmp_path):
    rows = {}
    for unpad in (True, False):
        recipe = make_recipe([STAGE], trainer={"precision": "fp32", "devices": 1, "unpad": unpad})
        vlm = build_vlm(root, dropout=0.0)
        shapes: list[int] = []
        join = vlm.splice.join

        def seen(*arguments: Any, join: Any = join, shapes: list[int] = shapes, **named: Any) -> Any:
            joined = join(*arguments, **named)
            shapes.append(len(joined.embeddings))
            return joined

        vlm.splice.join = seen  # type: ignore[method-assign]
        train(vlm, recipe, tmp_path / str(unpad))
        assert (max(shapes) > 1) is not unpad
        rows[unpad] = all_tensors(vlm)
    for key in ("loss", "loss_words", "val_loss", "grad_norm"):
        assert logged(tmp_path / "True", key) == pytest.approx(logged(tmp_path / "False", key), rel=1e-4), key
    for name, tensor in rows[True].items():
        torch.testing.assert_close(tensor, rows[False][name], atol=1e-4, rtol=1e-3)


def test_a_family_that_mixes_samples_keeps_its_padding(tmp_path, monkeypatch, root):
    monkeypatch.setattr("vpgtrans.isolation.isolation_error", lambda llm, isolation: (0.5, 0.5))
    vlm = build_vlm(root)
    [result] = train(vlm, make_recipe([STAGE]), tmp_path)
    assert result.samples
    assert not vlm.splice.unpadded


def test_a_family_that_mixes_samples_is_refused(tmp_path, monkeypatch, root):
    monkeypatch.setattr("vpgtrans.isolation.isolation_error", lambda llm, isolation: (0.5, 0.5))
    with pytest.raises(RecipeError, match=r"can't be isolated in one row .* leave out data\.packing"):
        train(build_vlm(root), make_recipe([STAGE], data=data_keys(packing=PACKING)), tmp_path)
