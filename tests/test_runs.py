"""The verbs on tiny models: what `transfer`, `compare`, `probe`, `evaluate`, `caption` and `validate` really do."""

import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_llm
from tiny_runs import WARMUP, Tiny, write_captions

import vpgtrans as vt
from vpgtrans import runs
from vpgtrans.config import PromptConfig
from vpgtrans.errors import OutputError
from vpgtrans.projector import Projector
from vpgtrans.recipe import Recipe, SourceConfig, dump, load_recipe
from vpgtrans.runs import answers, journey
from vpgtrans.runs.directory import check_run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def files(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_recipe(recipe: Recipe, directory: Path) -> Path:
    path = directory / "recipe-as-written.yaml"
    path.write_text(dump(recipe))
    return path


# --- transfer -----------------------------------------------------------------------------------

INITIALISERS: list[dict[str, Any]] = [
    {"kind": "random"},
    {"kind": "inherit"},
    *({"kind": "converter", "fit": fit} for fit in ("ridge", "procrustes", "cca", "omp", "sgd")),
    {"kind": "caption-fit"},
    {"kind": "auto"},
]


@dataclass
class Seen:
    """What a transfer had in its hands right before its first update."""

    projector: dict[str, torch.Tensor]
    connector: dict[str, torch.Tensor]


def first_parts(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Filled by transfers that follow."""
    seen: list[Seen] = []
    run_stages = journey.run_stages

    def record(vlm: Any, *arguments: Any, **options: Any) -> Any:
        copies = [{k: v.clone() for k, v in part.state_dict().items()} for part in (vlm.projector, vlm.vpg.connector)]
        seen.append(Seen(*copies))
        return run_stages(vlm, *arguments, **options)

    monkeypatch.setattr(journey, "run_stages", record)
    return seen


@pytest.mark.parametrize("initialiser", INITIALISERS, ids=lambda config: "-".join(config.values()))
def test_a_transfer_starts_from_each_initialiser(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, initialiser: dict[str, Any]
) -> None:
    seen = first_parts(monkeypatch)
    recipe = tiny.transfer_recipe(initialiser=initialiser, stages=[WARMUP])
    run = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    summary, rows = read(run / "summary.json"), read(run / "initialisers.json")
    (chosen,) = [row for row in rows if row["chosen"]]
    assert summary["initialiser"] == chosen["name"]
    moved = chosen["kind"] in ("converter", "caption-fit")
    if initialiser["kind"] == "auto":
        assert len(rows) >= 6
    else:
        assert [row["kind"] for row in rows] == [initialiser["kind"]]
    assert (summary["converter"]["shared_tokens"] == 496) == moved
    if moved:
        assert -1 <= summary["converter"]["cosine"] <= 1
        assert 0 <= summary["converter"]["recall_at_1"] <= 1
    # the VPG is the source's in every case, and a moved projector has the converter behind the source's own layers
    source = Projector.load(tiny.source / "vlm" / "projector")
    trained = vt.load(str(tiny.source)).vpg.connector.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in seen[0].connector.items())
    layers = {name: tensor for name, tensor in source.state_dict().items() if name.startswith("layers")}
    assert layers
    kept = all(name in seen[0].projector and torch.equal(seen[0].projector[name], layers[name]) for name in layers)
    assert kept == moved


def test_keep_takes_the_projector_as_it_is_where_the_table_is_shared(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = first_parts(monkeypatch)
    recipe = tiny.transfer_recipe(target={"llm": str(tiny.source_llm)}, initialiser="keep", stages=[WARMUP])
    run = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    source = Projector.load(tiny.source / "vlm" / "projector").state_dict()
    assert seen[0].projector.keys() == source.keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in seen[0].projector.items())
    assert read(run / "summary.json")["initialiser"] == "keep"


def test_auto_keeps_a_projector_whose_table_is_shared(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.transfer_recipe(target={"llm": str(tiny.source_llm)}, initialiser="auto", stages=[WARMUP])
    run = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    assert read(run / "summary.json")["initialiser"] == "keep"


def test_inherit_needs_no_source_llm(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tiny.source_llm.with_name("moved-away")
    tiny.source_llm.rename(hidden)
    try:
        recipe = tiny.transfer_recipe(initialiser="inherit", stages=[WARMUP])
        assert runs.transfer(recipe, output=tmp_path / "run", device="cpu").exists()
    finally:
        hidden.rename(tiny.source_llm)


def test_the_run_directory_holds_what_the_design_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "report.html", "vlm"}
    assert names >= {"initialisers.json", "trainable.json", "lineage.json", "samples.json", "checkpoints"}
    environment = read(finished / "environment.json")
    assert environment["versions"]["torch"] == torch.__version__
    assert not list(finished.rglob("*.tmp"))
    samples = read(finished / "samples.json")
    assert {"id", "image", "reference", "before", "after"} == samples[0].keys()


def test_the_same_recipe_gives_the_same_model_bit_for_bit(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    again = runs.transfer(tiny.transfer_recipe(), output=tmp_path / "again", device="cpu")
    weights = {name: sha for name, sha in files(finished / "vlm").items() if name.endswith(".safetensors")}
    assert set(weights) >= {"projector/model.safetensors", "connector/model.safetensors"}
    assert weights == {name: sha for name, sha in files(again / "vlm").items() if name.endswith(".safetensors")}
    other = tiny.transfer_recipe(seed=1)
    changed = runs.transfer(other, output=tmp_path / "other", device="cpu")
    assert weights.items() != files(changed / "vlm").items()
    assert files(changed / "vlm")["projector/model.safetensors"] != weights["projector/model.safetensors"]


def test_a_run_can_be_overwritten_and_is_whole_until_then(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tiny.transfer_recipe(stages=[WARMUP])
    runs.transfer(recipe, output=run, device="cpu")
    (run / "left-over.txt").write_text("of the earlier run")
    with pytest.raises(OutputError, match="holds a run already"):
        runs.transfer(recipe, output=run, device="cpu")
    assert (run / "left-over.txt").exists()
    runs.transfer(recipe, output=run, device="cpu", overwrite=True)
    assert not (run / "left-over.txt").exists()
    assert (run / "summary.json").exists()


def test_a_dry_run_writes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="vpgtrans"):
        path = runs.transfer(tiny.transfer_recipe(), dry_run=True, device="cpu")
    assert path == Path("runs/tiny")
    assert list(tmp_path.iterdir()) == []
    assert "stage warmup: 16 samples in batches of 4" in caplog.text
    assert "4 visual tokens of width 16" in caplog.text
    tables = [record.message for record in caplog.records if record.message.startswith("stage ")]
    rows = [line.split() for line in "\n".join(tables).splitlines()]
    assert ["llm", "lora"] in [row[:2] for row in rows]  # of the fine-tune: the adapter was really put on
    connector = next(row for row in reversed(rows) if row[:1] == ["connector"])
    assert connector[1] == "full"
    assert connector[2] == connector[3] != "0"


def test_a_dry_run_of_auto_joins_a_converter(tiny: Tiny, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="vpgtrans"):
        runs.transfer(tiny.transfer_recipe(initialiser="auto"), dry_run=True, output=tmp_path / "run", device="cpu")
    assert "not scored in a dry run" in caplog.text
    row = next(line for line in caplog.text.splitlines() if line.split()[:2] == ["projector", "full"])
    caplog.clear()
    with caplog.at_level("INFO", logger="vpgtrans"):
        runs.transfer(tiny.transfer_recipe(), dry_run=True, output=tmp_path / "run", device="cpu")
    assert row in caplog.text  # as many parameters, the converter's included


def test_unreadable_images_are_skipped_counted_and_listed(tiny: Tiny, tmp_path: Path) -> None:
    train = write_captions(tmp_path / "train.parquet", count=24, unreadable={3, 10})
    held_out = write_captions(tmp_path / "validation.parquet", count=8, unreadable={1})
    data = {"train": [{"dataset": str(train)}], "validation": [{"dataset": str(held_out)}], "max_bad_fraction": 0.2}
    stage = WARMUP | {"budget": {"samples": 24}}
    recipe = tiny.transfer_recipe(data=data, stages=[stage], evaluation={"samples": 8, "max_new_tokens": 3})
    run = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {"s003", "s010", "s001"}
    assert all(line["reason"] for line in lines)
    assert read(run / "summary.json")["metrics"]["count"] == 7
    assert len(read(run / "samples.json")) == 7
    assert runs.evaluate(str(run), data=[str(held_out)], device="cpu")[str(held_out)]["unreadable"] == 1


def test_metrics_count_every_reference_of_an_image(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(tiny.validation)
    both = [[text, f"{text} again"] for text in table["caption"].to_pylist()]
    several = tmp_path / "several.parquet"
    pq.write_table(table.set_column(2, "caption", pa.array(both)), several)
    given_: list[Any] = []
    monkeypatch.setattr(answers, "score", lambda predictions, references: given_.append(references) or {})
    data = tiny.data() | {"validation": [{"dataset": str(several)}]}
    runs.transfer(tiny.transfer_recipe(data=data, stages=[WARMUP]), output=tmp_path / "run", device="cpu")
    assert given_ == [both[:4]]


@pytest.mark.parametrize("verb", ["transfer", "compare"])
@pytest.mark.parametrize("kind", ["converter", "auto"])
def test_nothing_holds_the_embedding_tables_while_it_trains(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, kind: str
) -> None:
    """Gemma's is scaled, so its table is a copy of the model's own."""
    module = importlib.import_module(f"vpgtrans.runs.{'journey' if verb == 'transfer' else 'compare'}")
    target = tiny_llm("gemma3", tmp_path / "gemma3", width=48, seed=2)
    tables: list[tuple[weakref.ref[torch.Tensor], int]] = []
    prepare, run_stages = module.prepare, module.run_stages

    def note(*arguments: Any, **options: Any) -> Any:
        prepared = prepare(*arguments, **options)
        tables[:] = [(weakref.ref(words.matrix), words.matrix.data_ptr())
                     for words in (prepared.context.source, prepared.context.target)]  # fmt: skip
        return prepared

    def look(vlm: Any, *arguments: Any, **options: Any) -> Any:
        assert len(tables) == 2
        assert [table() for table, _ in tables] == [None, None]
        shape, pointers = (vlm.llm.fingerprint.vocabulary, vlm.llm.width), {pointer for _, pointer in tables}
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        assert not [item for item in tensors if tuple(item.shape) == shape and item.data_ptr() in pointers]
        looked.append(1)
        return run_stages(vlm, *arguments, **options)

    looked: list[int] = []
    monkeypatch.setattr(module, "prepare", note)
    monkeypatch.setattr(module, "run_stages", look)
    recipe = tiny.transfer_recipe(target={"llm": str(target)}, initialiser={"kind": kind}, stages=[WARMUP])
    if verb == "transfer":
        runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    else:
        runs.compare(recipe, arms=["transfer"], seeds=1, output=tmp_path / "run", device="cpu")
    assert looked == [1]


# --- interruption -------------------------------------------------------------------------------

LONG = 48
"""Updates of each stage: long enough for a signal to come in between."""


def long_recipe(tiny: Tiny) -> Recipe:
    keys = tiny.transfer_keys()
    for stage in keys["stages"]:
        stage |= {"budget": {"samples": 4 * LONG}, "validate_every": 4 * 16}
    return tiny.transfer_recipe(stages=keys["stages"])


@pytest.fixture
def vpgtrans() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `vpgtrans` with the given arguments; whatever still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from vpgtrans.cli import main; main()", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for_update(process: subprocess.Popen[str], run: Path, stage: str, update: int) -> None:
    """Until the log of the run holds an update of a stage."""
    while process.poll() is None:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        if any(line["stage"] == stage and line["update"] >= update for line in whole):
            return
        time.sleep(0.01)
    pytest.fail(f"the process ended early: {process.communicate()}")


def test_an_interrupted_transfer_resumes_to_the_same_result(tiny: Tiny, tmp_path: Path, vpgtrans: Any) -> None:
    recipe = long_recipe(tiny)
    written = str(write_recipe(recipe, tmp_path))
    cases = {"SIGINT": (signal.SIGINT, 130, "warmup", 5), "SIGTERM": (signal.SIGTERM, 143, "finetune", 3)}
    running = {name: vpgtrans("transfer", written, "-o", str(tmp_path / name), "--device", "cpu") for name in cases}
    for name, (signum, _, stage, update) in cases.items():
        wait_for_update(running[name], tmp_path / name, stage, update)
        running[name].send_signal(signum)
    whole = runs.transfer(recipe, output=tmp_path / "whole", device="cpu")
    for name, (_, code, stage, _) in cases.items():
        out, err = running[name].communicate(timeout=600)
        run = tmp_path / name
        assert running[name].returncode == code, err
        assert name in err
        assert "--resume" in err
        assert "Traceback" not in err
        assert out == ""
        assert list((run / "checkpoints").iterdir()), "a checkpoint is left"
        assert not (run / "summary.json").exists()
        assert not (run / "vlm").exists()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["stage"] == stage
        assert lines[-1]["update"] < LONG, "the run was over before the signal came; make LONG longer"

        start = (run / "start.json").read_text()
        spent = max(read(file)["elapsed"] for file in (run / "checkpoints").glob("*/progress.json"))
        began = time.perf_counter()
        runs.transfer(recipe, output=run, resume=True, device="cpu")
        resumed, expected = read(run / "summary.json"), read(whole / "summary.json")
        assert resumed["val_loss"] == expected["val_loss"]
        assert (run / "start.json").read_text() == start, "its initialiser, and what that cost, is the first session's"
        both = spent + time.perf_counter() - began
        assert 0.5 * both < resumed["seconds"] < both, "the bill holds what both sessions took"
        assert spent > sum(line["seconds"] for line in lines[-1:])
        for mine, right in zip(resumed["stages"], expected["stages"], strict=True):
            assert {k: mine[k] for k in ("name", "updates", "samples", "val_loss", "best_samples", "text_tokens")} == {
                k: right[k] for k in ("name", "updates", "samples", "val_loss", "best_samples", "text_tokens")
            }
        weights = [{k: v for k, v in files(where / "vlm").items() if "safetensors" in k} for where in (run, whole)]
        assert weights[0] == weights[1]
        curves = [
            [(line["stage"], line["update"], line.get("loss"), line.get("val_loss")) for line in map(json.loads, text)]
            for text in ((where / "metrics.jsonl").read_text().splitlines() for where in (run, whole))
        ]
        assert curves[0] == curves[1], "the log is that of a run that was never interrupted"


def test_resuming_a_finished_run_changes_nothing_that_counts(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.transfer_recipe(stages=[WARMUP])
    run = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    before, log = read(run / "summary.json"), (run / "metrics.jsonl").read_text()
    runs.transfer(recipe, output=run, resume=True, device="cpu")
    after = read(run / "summary.json")
    assert (run / "metrics.jsonl").read_text() == log
    assert {k: after[k] for k in ("val_loss", "metrics", "initialiser")} == {
        k: before[k] for k in ("val_loss", "metrics", "initialiser")
    }


# --- what the command line shows ----------------------------------------------------------------


def test_arithmetic_is_as_before_after_a_run(finished: Path) -> None:
    assert sys.float_info.min / 2 > 0, "denormal numbers are flushed to zero during training alone"


def test_stdout_is_one_json_document_and_stderr_a_readable_log(tiny: Tiny, tmp_path: Path, vpgtrans: Any) -> None:
    written = str(write_recipe(tiny.transfer_recipe(), tmp_path))
    process = vpgtrans("transfer", written, "-o", str(tmp_path / "run"), "--device", "cpu", "--json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["output"] == str(tmp_path / "run")
    assert summary["val_loss"] == read(tmp_path / "run" / "summary.json")["val_loss"]
    lines = err.splitlines()
    assert all(line == line.rstrip() for line in lines), "no padding in a file"
    for noise in ("GPU available", "TPU", "Tip:", "Trainer.fit", "Warning", "warn(", "deprecated", "HPU"):
        assert noise not in err
    for expected in ("stage warmup", "stage finetune", "first projector: ridge", "validation loss"):
        assert expected in err
    # the table of what trains stands before the first validation of its stage
    for stage in ("warmup", "finetune"):
        table = next(i for i, line in enumerate(lines) if line.strip() == f"stage {stage}")
        first = next(i for i, line in enumerate(lines) if line.startswith(f"{stage}: ") and "validation loss" in line)
        assert table < first
    lora = next(line for line in lines if line.split()[:2] == ["llm", "lora"])
    assert lora.split()[-1] == "0.001"


# --- Python -------------------------------------------------------------------------------------


def test_transfer_and_load_from_python(tiny: Tiny, tmp_path: Path) -> None:
    written = write_recipe(tiny.transfer_recipe(stages=[WARMUP]), tmp_path)
    run = vt.transfer(written, {"seed": 1, "stages.warmup.budget.samples": 8}, output=tmp_path / "run", device="cpu")
    summary = read(run / "summary.json")
    assert summary["stages"][0]["updates"] == 2
    vlm = vt.load(run / "vlm")
    assert isinstance(vlm, vt.VLM)
    assert len(vlm.generate([Image.new("L", (10, 10))], max_new_tokens=2)) == 1
    assert read(run / "vlm" / "manifest.json")["lineage"]["seed"] == 1


def test_of_several_processes_one_writes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `strategy: ddp` the others are started with the same command line, after the first made the directory."""
    from vpgtrans.runs.directory import check_run, create_run

    recipe = tiny.transfer_recipe()
    path = check_run(recipe, tmp_path / "run", resume=False, overwrite=False)
    create_run(recipe, path, resume=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = files(tmp_path)
    assert check_run(recipe, tmp_path / "run", resume=False, overwrite=False) == path
    create_run(recipe, path, resume=False).write("summary.json", {})
    assert files(tmp_path) == before


def test_a_run_writes_out_the_prompt_that_it_takes_from_the_source(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny.source, source)
    manifest = json.loads((source / "vlm/manifest.json").read_text())
    manifest["prompt"] |= {"template": "Say:<image>\nSay:", "end": True}
    (source / "vlm/manifest.json").write_text(json.dumps(manifest))
    recipe = tiny.transfer_recipe().model_copy(update={"source": SourceConfig(vpg=str(source))})
    for stated, template, end in (
        (None, "Say:<image>\nSay:", True),
        (PromptConfig(end=False), "Say:<image>\nSay:", False),
        (PromptConfig(template="<image> is"), "<image> is", True),
    ):
        asked = recipe.model_copy(update={"prompt": stated})
        path = runs.transfer(asked, output=tmp_path / f"run{end}{len(template)}", device="cpu")
        written = load_recipe(path / "recipe.yaml").prompt
        assert written is not None
        assert (written.template, written.end) == (template, end)
        assert json.loads((path / "vlm/manifest.json").read_text())["prompt"]["template"] == template
        check_run(asked, path, resume=True, overwrite=False)  # the same recipe still
        with pytest.raises(OutputError, match=r"differs in prompt\.template"):
            check_run(recipe.model_copy(update={"prompt": PromptConfig(template="<image>?")}), path, resume=True,
                      overwrite=False)  # fmt: skip
