"""Whole runs of tiny models on other data than captions: several images a sample, documents, text, long talks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import WARMUP, Tiny

from vpgtrans import runs
from vpgtrans.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    for place in range(2):
        Image.new("RGB", (20, 20), ("red", "blue")[place]).save(path.parent / f"{place}.png")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def pairs(path: Path, count: int = 8) -> dict[str, Any]:
    rows = [
        {"image": ["0.png", "1.png"], "said": said(f"<image> or <image>: {row}?", f"the one of {row}")}
        for row in range(count)
    ]
    return {"dataset": write(path, rows), "conversation": "said"}


def captions(path: Path, **more: Any) -> dict[str, Any]:
    rows = [{"image": f"{row % 2}.png", "caption": f"number {row}"} for row in range(8)]
    return {"dataset": write(path, rows), **more}


def finished(tiny: Tiny, output: Path, train: dict[str, Any], validation: dict[str, Any], **changes: Any) -> Any:
    stage = {**WARMUP, "batch_size": 2, "budget": {"samples": 8}, "validate_every": 4}
    keys: dict[str, Any] = {
        "stages": [stage | changes.pop("stage", {})],
        "data": {"train": [train], "validation": [validation]},
    }
    path = runs.transfer(tiny.transfer_recipe(**(keys | changes)), output=output, device="cpu")
    return json.loads((path / "summary.json").read_text()), path


def test_samples_of_several_images_alone(tiny: Tiny, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl")
    for initialiser in ("auto", {"kind": "converter", "fit": "ridge"}):
        summary, path = finished(tiny, tmp_path / str(len(str(initialiser))), data, data, initialiser=initialiser)
        assert summary["metrics"]["count"] == 4
        assert json.loads((path / "data.json").read_text())["quarantined"] == 0
        shown = json.loads((path / "samples.json").read_text())
        assert {row["reference"] for row in shown} == {f"the one of {row}" for row in range(8)}


@pytest.mark.parametrize("kind", ["document", "text"])
def test_a_validation_set_with_nothing_to_ask_is_measured_by_its_loss(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    body = {"document": "one <image> and more {row}", "text": "only words {row}"}[kind]
    rows = [{"image": "0.png", "body": body.format(row=row)} for row in range(6)]
    held_out = {"dataset": write(tmp_path / "held-out.jsonl", rows), kind: "body"}
    summary, path = finished(tiny, tmp_path / "run", captions(tmp_path / "train.jsonl"), held_out)
    assert summary["val_loss"] > 0
    assert summary["metrics"] == {"count": 0}
    assert (path / "vlm/manifest.json").is_file()
    assert (path / "report.html").is_file()


def test_what_is_too_long_is_cut_or_left_out_everywhere(tiny: Tiny, tmp_path: Path) -> None:
    """Budgets in tokens, training, validation, scoring of starts and evaluation see the same samples."""
    long = "and " * 80
    rows = [{"image": ["0.png"], "said": said(f"<image>what is {row}?", f"number {row}")} for row in range(6)] + [
        {"image": ["0.png", "1.png"], "said": said("<image>what?", "a cat") + said(f"<image>{long}?", "a dog")},
        {"image": ["0.png"], "said": said(f"<image>{long}?", "a dog")},
    ]
    data = {"dataset": write(tmp_path / "long.jsonl", rows), "conversation": "said"}
    prompt = {"format": "plain", "max_tokens": 60}
    summary, path = finished(
        tiny, tmp_path / "run", data, data, prompt=prompt, initialiser="auto", stage={"budget": {"tokens": 60}}
    )
    assert summary["metrics"]["count"] <= 6
    counts = json.loads((path / "data.json").read_text())
    assert (counts["quarantined"], counts["rules"]) == (0, {"too long": counts["dropped"]})
    found = runs.evaluate(str(path), data=[data["dataset"]], keys={"conversation": "said"}, device="cpu")
    (figures,) = found.values()
    assert (figures["count"], figures["dropped"]) == (6, 2)


def test_an_image_in_an_answer_never_shifts_the_images_of_others(tiny: Tiny, tmp_path: Path) -> None:
    """A document that ends in an image, without an end token, beside a caption: each sees its own image."""
    _, path = finished(tiny, tmp_path / "run", captions(tmp_path / "a.jsonl"), captions(tmp_path / "b.jsonl"))
    from vpgtrans.config import PromptConfig
    from vpgtrans.prompts import Turn
    from vpgtrans.runs.parts import open_vlm
    from vpgtrans.vlm import Splice

    vlm = open_vlm(str(path), device="cpu")
    splice = Splice(vlm.llm, PromptConfig(end=False), visual_tokens=vlm.vpg.tokens)
    prompts = vlm.prompts([Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")])
    texts = [(Turn("assistant", "look: so many words <image>"),), "a caption"]
    nll, rows = splice.token_nll(prompts, texts)
    alone, _ = splice.token_nll(prompts[1:], texts[1:])
    torch.testing.assert_close(nll[rows == 1], alone, atol=2e-2, rtol=1e-2)
    with pytest.raises(ValueError, match=r"\[2, 4\] for 4 places"):
        splice.token_nll(prompts, texts[1:])
    with pytest.raises(DataError, match="<image> 2 times; right would be once"):
        vlm.generate([Image.new("RGB", (20, 20))], "<image> and <image>")
