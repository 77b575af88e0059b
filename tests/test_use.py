"""What `probe`, `evaluate`, `caption` and `validate` really do on tiny models."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from commands import invoke
from PIL import Image
from tiny_runs import Tiny, source_keys
from tiny_vlms import tiny_blip2

import vpgtrans as vt
from vpgtrans import runs
from vpgtrans.errors import ReferenceError_
from vpgtrans.recipe import dump, parse_recipe
from vpgtrans.references import file_sha256
from vpgtrans.runs.parts import check_references


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_probe_scores_every_initialiser_and_marks_one(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.transfer_recipe(initialiser="inherit")  # whatever the recipe takes, the table has all
    rows = runs.probe(recipe, output=tmp_path / "table", device="cpu")
    assert read(tmp_path / "table" / "initialisers.json") == rows
    assert {row["kind"] for row in rows} == {"converter", "caption-fit", "inherit", "random"}
    assert any(row["name"].startswith("omp") for row in rows)
    assert any(row["name"].startswith("sgd") for row in rows)
    assert sum(row["chosen"] for row in rows) == 1
    for row in rows:
        assert row["step0_loss"] > 0
        assert row["image_gap_low"] <= row["image_gap"] <= row["image_gap_high"]
        if row["kind"] == "converter":
            assert row["pairs"] == 496
            assert row["coverage"] == 1.0
            assert row["copy_nll"] > 0
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)


def test_probe_prints_a_table_that_fits_and_json_alone(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "recipe-as-written.yaml"
    file.write_text(dump(tiny.transfer_recipe()))
    written = str(file)
    result = invoke("probe", written, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    result = invoke("probe", written, "--device", "cpu")
    assert result.exit_code == 0
    body = [line for line in result.stdout.splitlines() if line.strip()]
    assert max(map(len, body)) <= 160
    for row in rows:
        assert any(row["name"] in line for line in body), "a name is not folded over several lines"
    assert sum("*" in line.split()[:1] for line in body) == 1


def test_evaluate_gives_the_runs_own_validation_loss(tiny: Tiny, finished: Path) -> None:
    found = vt.evaluate(finished, data=[str(tiny.validation)], device="cpu")[str(tiny.validation)]
    assert found.keys() >= {"val_loss", "exact_match", "token_f1", "cider", "count"}
    assert found["count"] == 8
    # the run has its LLM in float32, a loaded VLM in bf16
    assert found["val_loss"] == pytest.approx(read(finished / "summary.json")["val_loss"], rel=2e-2)
    few = vt.evaluate(finished, data=[str(tiny.validation)], samples=3, device="cpu")[str(tiny.validation)]
    assert few["count"] == 3


def test_caption_one_and_several_and_json(finished: Path, tmp_path: Path) -> None:
    images = []
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
        images.append(str(tmp_path / f"{name}.png"))
    expected = vt.load(str(finished)).generate([Path(image) for image in images], max_new_tokens=4)
    one = invoke("caption", str(finished), images[0], "--max-new-tokens", "4", "--device", "cpu")
    assert (one.exit_code, one.stdout) == (0, f"{expected[0]}\n")
    both = invoke("caption", str(finished / "vlm"), *images, "--max-new-tokens", "4", "--device", "cpu")
    assert both.stdout == "".join(f"{image}: {text}\n" for image, text in zip(images, expected, strict=True))
    as_json = invoke("caption", str(finished), *images, "--max-new-tokens", "4", "--json", "--device", "cpu")
    assert json.loads(as_json.stdout) == [
        {"image": image, "caption": text} for image, text in zip(images, expected, strict=True)
    ]
    asked = vt.caption(finished, images[:1], prompt="What is in the picture?", max_new_tokens=4, device="cpu")
    assert asked[0]["image"] == images[0]


def test_validate_reads_no_weights(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "llm-without-weights"
    shutil.copytree(tiny.target_llm, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    imported = tiny_blip2(tmp_path / "blip2")
    (imported / "model.safetensors").unlink()
    found = runs.validate(tiny.transfer_recipe(target={"llm": str(bare)}))
    assert found["target_model"] == "qwen3"
    assert (found["train_samples"], found["validation_samples"], found["visual_tokens"]) == (24, 8, 4)
    found = runs.validate(tiny.transfer_recipe(target={"llm": str(bare)}, source={"vpg": str(imported)}))
    assert found["source_model"] == "blip-2"


def test_validate_downloads_no_weights(
    tiny: Tiny, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hub references of the target, an imported source, a VLM's encoder and an encoder to start from."""
    models = {"org/llm": tiny.target_llm, "org/blip2": tiny_blip2(tmp_path / "blip2"), "org/vit": tiny.encoder}
    asked: list[str] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not {"model.safetensors", "pytorch_model.bin"} & set(
            huggingface_hub.utils.filter_repo_objects(
                ["config.json", "model.safetensors", "pytorch_model.bin"], allow_patterns=allow_patterns
            )
        )
        asked.append(repo)
        snapshot = tmp_path / "hub" / repo / "0123abc"
        shutil.copytree(models[repo], snapshot, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    llm = {"llm": "hf:org/llm"}
    assert runs.validate(tiny.transfer_recipe(target=llm, source={"vpg": "hf:org/blip2"}))["source_model"] == "blip-2"
    check_references(tiny.transfer_recipe(target=llm, source={"vpg": "hf:org/blip2"}))
    assert set(asked) == {"org/llm", "org/blip2"}

    ours = shutil.copytree(finished / "vlm", tmp_path / "vlm")
    written = read(ours / "encoder" / "config.json")
    written["encoder"]["reference"] = "hf:org/vit"
    (ours / "encoder" / "config.json").write_text(json.dumps(written))
    manifest = read(ours / "manifest.json")
    file = ours / "encoder" / "config.json"
    manifest["files"]["encoder/config.json"] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    (ours / "manifest.json").write_text(json.dumps(manifest))
    asked.clear()
    assert runs.validate(tiny.transfer_recipe(target=llm, source={"vpg": str(ours)}))["visual_tokens"] == 4
    assert set(asked) == {"org/llm", "org/vit"}

    scratch = source_keys(Path("org/vit"), Path("org/llm"), tiny.data())
    asked.clear()
    assert runs.validate(parse_recipe(scratch))["target_model"] == "qwen3"
    assert set(asked) == {"org/llm", "org/vit"}
    with pytest.raises(ReferenceError_, match="absent"):
        runs.validate(parse_recipe(source_keys(Path("absent"), Path("org/llm"), tiny.data())))
