"""Bad input: one message (what, where, what would be right), exit code 2, or 4 for integrity; nothing is written."""

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import invoke
from PIL import Image
from tiny import tiny_llm
from tiny_runs import Tiny, build_tiny, source_keys, write_captions
from tiny_vlms import tiny_llava

from vpgtrans import recipe_file

GREEK = (
    "η γάτα κοιμάται στον κόκκινο καναπέ ενώ έξω βρέχει",
    "το ρολόι στον τοίχο δείχνει έντεκα και μισή",
    "ένας άντρας κάνει ποδήλατο στην παραλία",
    "η σημαία της Ελλάδας είναι γαλάζια και λευκή",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("bad-input")
        patch.setenv("VPGTRANS_CACHE", str(root / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield build_tiny(root)


@dataclass
class Bench:
    """An empty working directory, the tiny models, and a recipe that is fine but for the given keys."""

    tiny: Tiny
    here: Path

    def recipe(self, keys: dict[str, Any] | None = None, **changes: Any) -> str:
        path = self.here / "bad.yaml"
        with path.open("w") as stream:
            recipe_file.parser(typ="safe").dump(keys or self.tiny.transfer_keys(**changes), stream)
        return str(path)

    def llm(self, name: str, **options: Any) -> str:
        """Another LLM, made once."""
        path = self.tiny.root / name
        return str(path if path.exists() else tiny_llm("qwen3", path, width=48, **options))

    def vlm(self, name: str = "vlm") -> Path:
        """A copy of the source VLM, to be damaged."""
        return Path(shutil.copytree(self.tiny.source / "vlm", self.here / name))

    def data(self, path: Path) -> dict[str, Any]:
        return {"train": [{"dataset": str(path)}], "validation": [{"dataset": str(self.tiny.validation)}]}


@pytest.fixture
def bench(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tiny, tmp_path)


def snapshot(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of a file, "" for a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }


def refused(bench: Bench, *arguments: str, code: int = 2, saying: tuple[str, ...], cache: bool = True) -> str:
    """Run a command that must fail: with this code, these words, no traceback, and the file system as before."""
    before, cached = snapshot(bench.here), snapshot(bench.tiny.root / "cache")
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    message = result.stderr
    for words in saying:
        assert words in message, f"{words!r} is not in: {message}"
    assert message.count("error:") + message.count("Error:") == 1, f"one message: {message}"
    assert "Traceback" not in message
    assert snapshot(bench.here) == before, "something was written"
    if cache:
        assert snapshot(bench.tiny.root / "cache") == cached, "something was cached"
    return message


# --- the recipe ---------------------------------------------------------------------------------


def stage(**changes: Any) -> list[dict[str, Any]]:
    base = {"name": "warmup", "trainable": {"projector": "full"}, "budget": {"samples": 8}, "batch_size": 4}
    return [base | changes]


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"stagess": []}, ("bad.yaml", "stagess", "stages")),
        ({"stages": stage(lrr=1e-3)}, ("bad.yaml", "stages.0", "lrr", "lr")),
        ({"seed": "zero"}, ("bad.yaml", "seed", "zero", "whole number")),
        ({"stages": stage(budget={"samples": 1.5})}, ("bad.yaml", "budget.samples")),
        ({"stages": stage(trainable={"projector": "frozen"})}, ("bad.yaml", "trains nothing", "full or lora")),
        ({"stages": stage(trainable={"projector": "ful"})}, ("bad.yaml", "ful", "frozen", "full", "lora")),
        ({"initialiser": "magic"}, ("bad.yaml", "initialiser", "magic", "converter")),
        ({"prompt": {"template": "no image"}}, ("bad.yaml", "prompt", "<image>")),
    ],
    ids=["unknown-key", "misspelt-key", "wrong-type", "not-whole", "trains-nothing", "mode", "initialiser", "prompt"],
)
@pytest.mark.parametrize("verb", ["transfer", "validate"])
def test_a_wrong_recipe(bench: Bench, verb: str, changes: dict[str, Any], saying: tuple[str, ...]) -> None:
    refused(bench, verb, bench.recipe(**changes), saying=saying)


def test_lora_on_layers_that_are_not_there(bench: Bench) -> None:
    stages = stage(trainable={"llm": "lora"}, lora={"targets": ["q_projj", "q_proj"]})
    for verb in ("transfer", "compare"):
        refused(bench, verb, bench.recipe(stages=stages), saying=("lora.targets: q_projj:", "q_proj", "up_proj"))


def test_two_stages_that_want_different_adapters(bench: Bench) -> None:
    one, two = (stage(trainable={"llm": "lora"}, lora={"rank": rank})[0] for rank in (2, 4))
    refused(bench, "transfer", bench.recipe(stages=[one, two | {"name": "second"}]), saying=("second", "one adapter"))


def test_a_connector_without_parameters_as_all_that_trains(bench: Bench) -> None:
    llava = tiny_llava(bench.tiny.root / "llava-nothing")
    recipe = bench.recipe(source={"vpg": str(llava)}, stages=stage(trainable={"connector": "full"}))
    refused(bench, "transfer", recipe, saying=("trains nothing", "identity", "projector"))


def test_a_wrong_override_and_a_wrong_file(bench: Bench) -> None:
    recipe = bench.recipe()
    refused(bench, "transfer", recipe, "stages.warmup.lrr=1", saying=("stages", "lrr"))
    refused(bench, "transfer", recipe, "seed=zero", saying=("seed",))
    refused(bench, "transfer", "nowhere.yaml", saying=("nowhere.yaml",))
    (bench.here / "list.yaml").write_text("- a\n- b\n")
    refused(bench, "transfer", "list.yaml", saying=("list.yaml",))
    (bench.here / "broken.yaml").write_text("a: [1,\n")
    refused(bench, "transfer", "broken.yaml", saying=("broken.yaml",))


def test_the_wrong_verb_for_a_recipe(bench: Bench) -> None:
    scratch = source_keys(bench.tiny.encoder, bench.tiny.source_llm, bench.tiny.data())
    refused(bench, "transfer", bench.recipe(scratch), saying=("source.vpg", "vpgtrans train"))
    refused(bench, "compare", bench.recipe(scratch), saying=("source.vpg", "trained one"))
    refused(bench, "probe", bench.recipe(scratch), saying=("source.vpg",))
    refused(bench, "train", bench.recipe(), saying=("source.vpg", "vpgtrans transfer"))
    refused(bench, "train", bench.recipe(scratch | {"initialiser": "converter"}), saying=("initialiser", "random"))
    refused(bench, "compare", bench.recipe(), "--arms", "scratch,sideways", saying=("sideways", "inherit"))


# --- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["transfer", "validate", "probe", "compare"])
@pytest.mark.parametrize(
    ("reference", "saying"),
    [
        ("path/to/nowhere/at/all", ("path/to/nowhere/at/all", "Tried", "does not exist")),
        ("pip:no-such-distribution-here", ("no-such-distribution-here", "not installed", "pip install")),
        ("hff:ORG/NAME", ("hff", "hf:ORG/NAME")),
    ],
    ids=["path", "pip", "scheme"],
)
@pytest.mark.parametrize("role", ["source", "target"])
def test_a_reference_that_does_not_resolve(
    bench: Bench, verb: str, role: str, reference: str, saying: tuple[str, ...]
) -> None:
    key = {"source": "vpg", "target": "llm"}[role]
    refused(bench, verb, bench.recipe(**{role: {key: reference}}), saying=saying)


def test_an_unknown_registry_entry(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = bench.recipe(source={"vpg": "registry:openmoji-qformer-smollm2-135n"})
    refused(bench, "transfer", recipe, saying=("openmoji-qformer-smollm2-135n",))


def test_a_target_that_is_no_llm(bench: Bench) -> None:
    refused(bench, "transfer", bench.recipe(target={"llm": str(bench.tiny.encoder)}), saying=("encoder", "vit"))
    llava = bench.tiny.root / "llava"
    llava = llava if llava.exists() else tiny_llava(llava)
    refused(bench, "transfer", bench.recipe(target={"llm": str(llava)}), saying=("llava",))
    refused(bench, "transfer", bench.recipe(target={"llm": str(bench.tiny.source)}), saying=("source",))
    (bench.here / "weights.bin").write_bytes(b"0" * 64)
    refused(bench, "transfer", bench.recipe(target={"llm": "weights.bin"}), saying=("weights.bin",))


def test_a_source_that_is_no_vlm(bench: Bench) -> None:
    saying = ("qwen3", "blip-2", "llava")
    refused(bench, "transfer", bench.recipe(source={"vpg": str(bench.tiny.target_llm)}), saying=saying, cache=False)
    refused(bench, "validate", bench.recipe(source={"vpg": str(bench.tiny.target_llm)}), saying=saying, cache=False)


def test_an_encoder_that_is_none(bench: Bench) -> None:
    keys = source_keys(bench.tiny.source_llm, bench.tiny.source_llm, bench.tiny.data())
    refused(bench, "train", bench.recipe(keys), saying=("source-llm",), cache=False)


# --- things that do not belong together ---------------------------------------------------------


def rewrite_hashes(vlm: Path) -> None:
    """Make the manifest true again, as someone who swaps parts by hand would."""
    manifest = json.loads((vlm / "manifest.json").read_text())
    for name in manifest["files"]:
        file = vlm / name
        manifest["files"][name] = {
            "size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }  # fmt: skip
    (vlm / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("verb", ["transfer", "validate", "compare"])
def test_a_vpg_and_a_projector_whose_widths_differ(bench: Bench, verb: str) -> None:
    from vpgtrans.config import ProjectorConfig
    from vpgtrans.projector import Projector

    vlm = bench.vlm()
    Projector(ProjectorConfig(), 20, 32).save(vlm / "projector")
    rewrite_hashes(vlm)
    saying = ("width 16", "20", "do not belong together")
    refused(bench, verb, bench.recipe(source={"vpg": str(vlm)}), saying=saying, cache=False)


@pytest.mark.parametrize("kind", ["auto", "converter", "caption-fit"])
@pytest.mark.parametrize("verb", ["transfer", "compare"])
def test_tokenizers_that_share_too_few_tokens(bench: Bench, verb: str, kind: str) -> None:
    greek = bench.llm("greek", sentences=GREEK)
    recipe = bench.recipe(target={"llm": greek}, initialiser=kind)
    saying = ("share", "at least 100", "initialiser: inherit")
    refused(bench, verb, recipe, "--device", "cpu", saying=saying, cache=False)


def test_keep_without_a_shared_table(bench: Bench) -> None:
    saying = ("initialiser keep", "embedding table", "converter")
    refused(bench, "transfer", bench.recipe(initialiser="keep"), saying=saying, cache=False)


def test_a_checksum_that_differs(bench: Bench) -> None:
    vlm = bench.vlm()
    weights = vlm / "projector" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for verb in ("transfer", "validate", "probe", "compare"):
        saying = ("projector/model.safetensors", "sha256")
        refused(bench, verb, bench.recipe(source={"vpg": str(vlm)}), code=4, saying=saying, cache=False)
    Image.new("RGB", (8, 8)).save(bench.here / "image.png")
    refused(bench, "caption", str(vlm), "image.png", code=4, saying=("projector/model.safetensors", "sha256"))


@pytest.mark.parametrize("damage", ["missing", "extra", "manifest", "version"])
def test_a_damaged_vlm_directory(bench: Bench, damage: str) -> None:
    vlm = bench.vlm()
    manifest = json.loads((vlm / "manifest.json").read_text())
    if damage == "missing":
        (vlm / "connector" / "model.safetensors").unlink()
    elif damage == "extra":
        (vlm / "connector" / "more.safetensors").write_bytes(b"")
    elif damage == "manifest":
        (vlm / "manifest.json").write_text("{")
    else:
        (vlm / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    saying = {
        "missing": ("connector/model.safetensors", "missing"),
        "extra": ("connector/more.safetensors", "not in the manifest"),
        "manifest": ("manifest.json",),
        "version": ("version 99", "reads version 1"),
    }[damage]
    refused(bench, "evaluate", str(vlm), "--data", str(bench.tiny.validation), code=4, saying=saying, cache=False)
    refused(bench, "transfer", bench.recipe(source={"vpg": str(vlm)}), code=4, saying=saying, cache=False)


def test_another_source_llm_than_the_vpg_was_trained_with(bench: Bench) -> None:
    hidden = bench.tiny.source_llm.with_name("moved-away")
    bench.tiny.source_llm.rename(hidden)
    try:
        tiny_llm("llama", bench.tiny.source_llm, seed=77)
        saying = ("belongs to another LLM", "embeddings_sha256")
        refused(bench, "transfer", bench.recipe(), "--device", "cpu", code=4, saying=saying, cache=False)
    finally:
        shutil.rmtree(bench.tiny.source_llm)
        hidden.rename(bench.tiny.source_llm)


def test_a_checkpoint_of_a_run_that_is_damaged(bench: Bench) -> None:
    recipe = bench.recipe()
    assert invoke("transfer", recipe, "-o", "run", "--device", "cpu").exit_code == 0
    for state in (bench.here / "run" / "checkpoints").glob("*/state.safetensors"):
        state.write_bytes(b"damaged")
    result = invoke("transfer", recipe, "-o", "run", "--device", "cpu", "--resume")
    assert result.exit_code == 4, result.output
    assert "state.safetensors" in result.stderr


# --- data ---------------------------------------------------------------------------------------


def empty_table(path: Path) -> Path:
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), path)
    return path


def no_captions(path: Path) -> Path:
    pq.write_table(pa.table({"image": [b"x", b"y"], "caption": pa.array([None, ""], pa.string())}), path)
    return path


def no_bytes(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def other_columns(path: Path) -> Path:
    pq.write_table(pa.table({"picture": [b"x"], "text": ["a cat"]}), path)
    return path


@pytest.mark.parametrize(
    ("make", "saying"),
    [
        (empty_table, ("captions.parquet", "no samples")),
        (no_captions, ("captions.parquet, row 1: no caption", "none of the first 2 rows is a sample")),
        (no_bytes, ("captions.parquet", "empty")),
        (other_columns, ("captions.parquet", "no column 'image'", "picture, text")),
        (lambda path: path, ("captions.parquet", "no file or directory")),
        (lambda path: write_captions(path, count=4, unreadable=range(4)), ("none of 4 images", "s00")),
    ],
    ids=["no-rows", "no-captions", "no-bytes", "no-column", "no-file", "no-image"],
)
def test_a_data_set_that_is_empty_or_wrong(bench: Bench, make: Callable[[Path], Path], saying: tuple[str, ...]) -> None:
    data = bench.data(make(bench.here / "captions.parquet"))
    for verb in ("transfer", "compare", "probe"):
        refused(bench, verb, bench.recipe(data=data), "--device", "cpu", saying=saying, cache=False)


def test_too_many_unreadable_images_stop_the_run(bench: Bench) -> None:
    train = write_captions(bench.here / "captions.parquet", count=24, unreadable=range(0, 24, 3))
    recipe = bench.recipe(data=bench.data(train))
    result = invoke("transfer", recipe, "-o", "run", "--device", "cpu")
    assert result.exit_code == 1, result.output
    assert "data.max_bad_fraction = 0.01" in result.stderr
    assert "Traceback" not in result.stderr
    listed = [json.loads(line)["id"] for line in (bench.here / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert listed
    assert set(listed) <= {f"s{row:03d}" for row in range(0, 24, 3)}
    assert any(name in result.stderr for name in listed)
    assert not (bench.here / "run" / "vlm").exists()


# --- the output directory -----------------------------------------------------------------------


def test_an_output_directory_that_holds_something_else(bench: Bench) -> None:
    recipe = bench.recipe()
    assert invoke("transfer", recipe, "-o", "run", "--device", "cpu").exit_code == 0
    saying = ("run holds a run already", "--resume", "--overwrite")
    for verb in ("transfer", "compare"):
        refused(bench, verb, recipe, "-o", "run", saying=saying)
    (bench.here / "files").mkdir()
    (bench.here / "files" / "recipe.yaml").write_text("name: my own\n")
    for option in ([], ["--overwrite"], ["--resume"]):
        refused(bench, "transfer", recipe, "-o", "files", *option, saying=("files", "no run of vpgtrans"))
    refused(bench, "transfer", recipe, "-o", "bad.yaml", saying=("bad.yaml is a file",))
    refused(bench, "transfer", recipe, "-o", "bad.yaml/run", saying=("bad.yaml/run", "can't be written"))


def test_a_resume_of_nothing_or_of_another_recipe(bench: Bench) -> None:
    recipe = bench.recipe()
    refused(bench, "transfer", recipe, "-o", "run", "--resume", saying=("run holds no run to resume",))
    refused(bench, "compare", recipe, "-o", "run", "--resume", saying=("run holds no run to resume",))
    both = refused(bench, "transfer", recipe, "--resume", "--overwrite", saying=("--resume", "--overwrite"))
    assert "exclude each other" in both
    assert invoke("transfer", recipe, "-o", "run", "--device", "cpu").exit_code == 0
    other = ("seed=1", "stages.warmup.lr=1e-4")
    saying = ("another recipe", "seed", "stages.0.lr")
    refused(bench, "transfer", recipe, *other, "-o", "run", "--resume", saying=saying)


# --- devices, images, evaluation ----------------------------------------------------------------


@pytest.mark.parametrize(("device", "saying"), [("cuda:99", "cuda:99"), ("gpu", "auto, cpu, cuda"), ("meta", "auto")])
def test_a_device_that_is_not_there(bench: Bench, device: str, saying: str) -> None:
    recipe = bench.recipe()
    for verb in ("transfer", "compare", "probe"):
        refused(bench, verb, recipe, "--device", device, saying=(device, saying))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_on_a_machine_without_one(bench: Bench) -> None:
    refused(bench, "transfer", bench.recipe(), "--device", "cuda", saying=("no usable GPU", "vpgtrans doctor"))


def test_captioning_what_is_no_image_with_what_is_no_vlm(bench: Bench) -> None:
    (bench.here / "image.png").write_bytes(b"not a picture")
    Image.new("RGB", (8, 8)).save(bench.here / "fine.png")
    source = str(bench.tiny.source)
    refused(bench, "caption", source, "image.png", saying=("image.png",))
    refused(bench, "caption", source, "absent.png", saying=("absent.png",))
    refused(bench, "caption", str(bench.tiny.target_llm), "fine.png", saying=("target-llm", "manifest.json"))
    refused(bench, "caption", "path/to/nowhere/at/all", "fine.png", saying=("Tried",))
    saying = ("openmoji has no split", "validation-unseen")
    refused(bench, "evaluate", source, "--data", "openmoji:sideways", saying=saying)
    refused(bench, "evaluate", source, "--data", "nowhere.parquet", saying=("nowhere.parquet",))


# --- order and process --------------------------------------------------------------------------


def test_cheap_checks_come_before_expensive_ones(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing with weights is opened where a look at the recipe, a path or a data file is enough."""
    modules = [importlib.import_module(f"vpgtrans.runs.{name}") for name in ("journey", "compare", "use")]

    def too_early(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("weights are opened before the cheap checks are through")

    for module in modules:
        monkeypatch.setattr(module, "source_of", too_early)
        monkeypatch.setattr(module, "prepare", too_early)
    taken = bench.here / "taken"
    taken.mkdir()
    (taken / "file").write_text("")
    empty = bench.data(empty_table(bench.here / "empty.parquet"))
    nowhere = {"llm": "path/to/nowhere/at/all"}
    for verb in ("transfer", "compare"):
        refused(bench, verb, bench.recipe(), "-o", "taken", saying=("no run of vpgtrans",))
        refused(bench, verb, bench.recipe(), "--device", "cuda:99", saying=("cuda:99",))
        refused(bench, verb, bench.recipe(target=nowhere), saying=("Tried",))
        refused(bench, verb, bench.recipe(data=empty), saying=("no samples",), cache=False)
        # the output directory comes before all that
        refused(bench, verb, bench.recipe(target=nowhere, data=empty), "-o", "taken", saying=("no run of vpgtrans",))
    refused(bench, "probe", bench.recipe(data=empty), saying=("no samples",), cache=False)


def test_the_process_itself_ends_with_the_code_and_one_message(bench: Bench) -> None:
    recipe = bench.recipe(target={"llm": "path/to/nowhere/at/all"})
    done = subprocess.run(
        [sys.executable, "-c", "from vpgtrans.cli import main; main()", "transfer", recipe],
        capture_output=True, text=True, check=False, cwd=bench.here,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: path/to/nowhere/at/all")
    assert not (bench.here / "runs").exists()
