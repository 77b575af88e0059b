"""Scores that a model gives: against ones made by hand, and models that give none."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from commands import invoke
from filters import drawing, filtered, png
from tiny import SENTENCES, tiny_tokenizer
from tiny_runs import Tiny, write_captions

import vpgtrans as vt
from vpgtrans.data.config import DataSource
from vpgtrans.data.filter.build import plan
from vpgtrans.data.filter.run import filter_data
from vpgtrans.data.sources import open_dataset
from vpgtrans.prompts import VISUAL


def test_scores_of_a_vlm_are_losses_with_own_other_and_no_images(tmp_path: Path, tiny: Tiny):
    count = 6
    data = write_captions(tmp_path / "data.parquet", count=count)
    scorers = [text for name in ("vlm-loss", "vlm-gap", "vlm-blind-gap", "vlm-rank") for text in ("--scorer", name)]
    # with all other images there is nothing to draw
    filtered(data, "--scores", tmp_path / "s.parquet", *scorers, "--vlm", tiny.source, "--others", str(count - 1),
             "--keep-fraction", "0.5")  # fmt: skip
    table = pq.read_table(tmp_path / "s.parquet")

    vlm = vt.load(tiny.source)
    opened = open_dataset(DataSource(dataset=str(data)))
    prompts = vlm.prompts([opened.image(row) for row in range(count)])
    loss = np.empty((count, count))
    blind = np.empty(count)
    for row in range(count):
        encoded = vlm.splice.prompter.encode(opened.caption(row))
        for image in range(count):
            sums, tokens = vlm.splice.caption_nll(prompts[image : image + 1], [opened.caption(row)])
            loss[row, image] = float(sums / tokens)
        # without images the LLM's own class gives the loss
        words = encoded.ids != VISUAL
        ids = torch.from_numpy(encoded.ids[words])[None]
        labels = torch.where(torch.from_numpy(encoded.answer[words]), ids[0], -100)[None]
        with torch.no_grad():
            blind[row] = float(vlm.language_model(input_ids=ids, labels=labels).loss)
    own = np.diag(loss)
    others = [np.delete(loss[row], row) for row in range(count)]
    tolerance = 2e-2 if vlm.llm.model.dtype == torch.bfloat16 else 1e-4
    np.testing.assert_allclose(table["vlm-loss"], own, atol=tolerance)
    np.testing.assert_allclose(table["vlm-blind-gap"], blind - own, atol=tolerance)
    np.testing.assert_allclose(
        table["vlm-gap"], [o.mean() - s for o, s in zip(others, own, strict=True)], atol=tolerance
    )
    rank = table["vlm-rank"].to_numpy() * (count - 1)
    np.testing.assert_allclose(rank, np.round(rank), atol=1e-9)
    # but for others that are as likely to within the tolerance
    sure = [(o > s + tolerance).sum() for o, s in zip(others, own, strict=True)]
    most = [(o > s - tolerance).sum() for o, s in zip(others, own, strict=True)]
    assert all(low - 0.1 <= r <= high + 0.1 for low, r, high in zip(sure, rank, most, strict=True))


def test_a_vlm_judges_loss_but_no_gap_of_a_text_alone(tmp_path: Path, tiny: Tiny):
    rows = [
        {"image": [png(drawing("red")), png(drawing("blue"))], "conversation": [
            {"role": "user", "content": "<image> and <image>?"}, {"role": "assistant", "content": "a cat"}]},
        {"image": [], "conversation": [
            {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "a dog"}]},
        {"image": [png(drawing("green"))], "conversation": [
            {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a cat"}]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    filtered(
        tmp_path / "d.parquet", "--conversation", "conversation", "--scores", tmp_path / "s.parquet",
        "--scorer", "vlm-loss", "--scorer", "vlm-gap", "--vlm", tiny.source, "--others", "2",
    )  # fmt: skip
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert all(math.isfinite(value) for value in table["vlm-loss"])
    assert [value is None for value in table["vlm-gap"]] == [False, True, False]
    assert table["keep"] == [True] * 3


def tiny_clip(directory: Path) -> Path:
    """A random CLIP as a hub directory looks."""
    tokenizer = tiny_tokenizer(add_bos=True, sentences=SENTENCES)
    config = transformers.CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": 2},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.CLIPModel(config).save_pretrained(directory)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(directory)
    return directory


def test_clip_gives_what_its_own_class_gives(tmp_path: Path):
    clip = tiny_clip(tmp_path / "clip")
    data = write_captions(tmp_path / "data.parquet", count=5)
    found = filtered(
        data, "--scores", tmp_path / "s.parquet", "--scorer", "clip", "--clip", clip, "--keep-fraction", "0.4"
    )
    assert found["kept"] == 2
    table = pq.read_table(tmp_path / "s.parquet")
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    opened = open_dataset(DataSource(dataset=str(data)))
    for row in range(5):  # one by one: nothing is padded
        inputs = processor(text=[opened.caption(row)], images=[opened.image(row)], return_tensors="pt")
        with torch.no_grad():
            cosine = float(model(**inputs).logits_per_image / model.logit_scale.exp())
        assert table["clip"][row].as_py() == pytest.approx(cosine, abs=1e-5)
    assert len({round(score, 6) for score in table["clip"].to_pylist()}) == 5


def test_a_model_that_is_no_clip_is_one_message(tmp_path: Path, tiny: Tiny):
    data = write_captions(tmp_path / "data.parquet", count=2)
    for model in (tiny.target_llm, tmp_path):
        result = invoke("data", "filter", data, "--scores", tmp_path / "s.parquet", "--scorer", "clip", "--clip", model)
        assert result.exit_code == 2, result.output
    wrong = invoke(
        "data", "filter", data, "--scores", tmp_path / "s.parquet", "--scorer", "vlm-loss", "--vlm", tiny.target_llm
    )
    assert wrong.exit_code == 2
    assert "no VLM directory" in wrong.output


def test_models_are_opened_only_if_something_is_to_be_scored(tmp_path: Path, tiny: Tiny):
    data = write_captions(tmp_path / "data.parquet", count=3)
    scorers, rules = plan(
        scorers=["vlm-loss"], vlm=str(tiny.source), keep_fraction=0.7, open_vlm=vt.load, device=torch.device("cpu")
    )
    source = DataSource(dataset=str(data))
    made: list[Any] = []

    def build(opened: Any) -> list[Any]:
        made[:] = scorers(opened)
        return made

    filter_data(source, tmp_path / "s.parquet", build, rules=rules)
    assert "_vlm" in vars(made[0])
    assert filter_data(source, tmp_path / "s.parquet", build, rules=rules).kept == 2
    assert "_vlm" not in vars(made[0])
