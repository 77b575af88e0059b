"""The verbs on tiny models: what `transfer`, `compare`, `probe`, `evaluate`, `caption` and `validate` really do."""

import hashlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import Tiny, build_tiny, write_captions

import vpgtrans as vt
from vpgtrans import runs
from vpgtrans.cli.root import cli
from vpgtrans.errors import OutputError, RecipeError
from vpgtrans.projector import Projector
from vpgtrans.recipe import Recipe, dump
from vpgtrans.runs import journey
from vpgtrans.runs.compare import arm_recipe, speedups
from vpgtrans.training.samples import Samples

COMPARE = importlib.import_module("vpgtrans.runs.compare")
"""The module: `runs.compare` is the verb."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        patch.setenv("VPGTRANS_CACHE", str(root / "cache"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are so small that a second thread costs more than it gives
        yield build_tiny(root)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tiny: Tiny) -> Path:
    """A run of `tiny.transfer_recipe()`."""
    return runs.transfer(tiny.transfer_recipe(), output=tiny.root / "finished", device="cpu")


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

WARMUP = {"name": "warmup", "trainable": {"projector": "full"}, "lr": 1e-3, "budget": {"samples": 4}, "batch_size": 4}
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


def test_unreadable_images_are_skipped_counted_and_listed(tiny: Tiny, tmp_path: Path) -> None:
    train = write_captions(tmp_path / "train.parquet", count=24, unreadable={3, 10})
    held_out = write_captions(tmp_path / "validation.parquet", count=8, unreadable={1})
    data = {"train": [{"dataset": str(train)}], "validation": [{"dataset": str(held_out)}], "max_bad_fraction": 0.2}
    stage = WARMUP | {"budget": {"samples": 24}}
    recipe = tiny.transfer_recipe(data=data, stages=[stage], evaluation={"samples": 8, "max_new_tokens": 3})
    run = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
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
    monkeypatch.setattr(journey, "score", lambda predictions, references: given_.append(references) or {})
    data = tiny.data() | {"validation": [{"dataset": str(several)}]}
    runs.transfer(tiny.transfer_recipe(data=data, stages=[WARMUP]), output=tmp_path / "run", device="cpu")
    assert given_ == [both[:4]]


# --- interruption -------------------------------------------------------------------------------

LONG = 48
"""Updates of each stage: long enough for a signal to come in between."""


def long_recipe(tiny: Tiny) -> Recipe:
    keys = tiny.transfer_keys()
    for stage in keys["stages"]:
        stage |= {"budget": {"samples": 4 * LONG}, "validate_every": 4 * 16}
    return tiny.transfer_recipe(stages=keys["stages"])


def vpgtrans(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", "from vpgtrans.cli import main; main()", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def wait_for_update(process: subprocess.Popen[str], run: Path, stage: str, update: int) -> None:
    """Until the log of the run holds an update of a stage."""
    while process.poll() is None:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        if any(line["stage"] == stage and line["update"] >= update for line in whole):
            return
        time.sleep(0.01)
    pytest.fail(f"the process ended early: {process.communicate()}")


def test_an_interrupted_transfer_resumes_to_the_same_result(tiny: Tiny, tmp_path: Path) -> None:
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

        runs.transfer(recipe, output=run, resume=True, device="cpu")
        resumed, expected = read(run / "summary.json"), read(whole / "summary.json")
        assert resumed["val_loss"] == expected["val_loss"]
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


def test_stdout_is_one_json_document_and_stderr_a_readable_log(tiny: Tiny, tmp_path: Path) -> None:
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


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments, prog_name="vpgtrans")


# --- compare ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tiny: Tiny) -> tuple[Recipe, Path, dict[str, list[list[str]]]]:
    """A comparison, and the sample ids of every training batch of each of its arms."""
    batches: dict[str, list[list[str]]] = {}
    fetch = Samples.fetch

    def record(self: Samples, rows: Any) -> Any:
        batch = fetch(self, rows)
        if len(self.mixture) == 24:  # training, not validation
            batches.setdefault(current[-1], []).append(batch.ids)
        return batch

    module = COMPARE
    current: list[str] = []
    recipe_of = module.arm_recipe

    def note(recipe: Recipe, arm: str, *, seed: int, factor: float) -> Recipe:
        current.append(f"{arm}-{seed}-{factor:g}")
        return recipe_of(recipe, arm, seed=seed, factor=factor)

    recipe = tiny.transfer_recipe(compare={"seeds": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "fetch", record)
        patch.setattr(module, "arm_recipe", note)
        runs.compare(recipe, output=tiny.root / "compared", device="cpu")
    return recipe, tiny.root / "compared", batches


def test_all_arms_see_the_same_samples_in_the_same_order(compared: Any) -> None:
    _, _, batches = compared
    assert len(batches) == 8, "scratch and inherit: two rates on the first seed, one on the second; transfer: one each"
    for seed in ("0", "1"):
        orders = [value for name, value in batches.items() if name.split("-")[1] == seed]
        assert len(orders) == (5 if seed == "0" else 3)
        assert all(order == orders[0] for order in orders)
        assert [len(ids) for ids in orders[0]] == [4] * 8
    assert batches["transfer-0-1"] != batches["transfer-1-1"]


def test_the_comparisons_summary_has_the_designs_keys(compared: Any) -> None:
    _, path, _ = compared
    summary = read(path / "summary.json")
    assert list(summary["arms"]) == ["scratch", "inherit", "transfer"]
    for name, arm in summary["arms"].items():
        assert set(arm) == {
            "val_loss", "final_val_loss", "curve", "curves", "seconds", "lr_factor", "initialiser",
        }  # fmt: skip
        assert len(arm["val_loss"]) == len(arm["curves"]) == len(arm["seconds"]) == 2
        assert arm["val_loss"] == [min(loss for _, loss in curve) for curve in arm["curves"]]
        assert [samples for samples, _ in arm["curve"]] == [0, 8, 16, 24, 32], "every arm has the whole budget"
        for samples, loss in arm["curve"]:
            assert loss == median(dict(map(tuple, curve))[samples] for curve in arm["curves"])
        assert arm["lr_factor"] in ((1.0, 2.0) if name != "transfer" else (1.0,))
    assert summary["arms"]["scratch"]["initialiser"] == "random"
    assert summary["arms"]["transfer"]["initialiser"].startswith("ridge")
    assert set(summary["speedup"]) == {"inherit", "transfer"}
    assert set(summary["speedup_over_inherit"]) == {"scratch", "transfer"}
    for ratio in summary["speedup"].values():
        assert ratio is None or set(ratio) >= {"median", "min", "max"}
    curves = {name: [[tuple(point) for point in c] for c in arm["curves"]] for name, arm in summary["arms"].items()}
    assert summary["speedup"] == speedups(curves, "scratch", floor=4)
    assert set(summary["definitions"]) == set(summary["arms"])
    assert summary["budget"] == {"samples": 32}
    assert (path / "report.html").exists()
    assert (path / "curves.png").exists()


def test_the_first_seeds_better_rate_counts_and_serves_the_others(compared: Any) -> None:
    _, path, _ = compared
    for arm in ("scratch", "inherit"):
        tried = [read(path / "arms" / f"{arm}-seed0-lr{factor}" / "result.json") for factor in (1, 2)]
        best = min(tried, key=lambda result: min(loss for _, loss in result["curve"]))
        summary = read(path / "summary.json")["arms"][arm]
        assert summary["lr_factor"] == best["lr_factor"]
        assert summary["curves"][0] == best["curve"]
        assert {p.name for p in (path / "arms").glob(f"{arm}-seed1*")} == {f"{arm}-seed1-lr{best['lr_factor']:g}"}


def test_a_resumed_comparison_keeps_finished_arms(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    module = COMPARE
    recipe, path, _ = compared
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    before = read(copy / "summary.json")
    (copy / "summary.json").unlink()
    (copy / "arms" / "inherit-seed1-lr2" / "result.json").unlink(missing_ok=True)
    (copy / "arms" / "inherit-seed1-lr1" / "result.json").unlink(missing_ok=True)
    trained: list[Path] = []
    run_stages = module.run_stages

    def record(vlm: Any, recipe: Any, run: Any, **options: Any) -> Any:
        trained.append(run.path)
        return run_stages(vlm, recipe, run, **options)

    monkeypatch.setattr(module, "run_stages", record)
    after = runs.compare(recipe, output=copy, resume=True, device="cpu")
    assert [where.name.rsplit("-", 1)[0] for where in trained] == ["inherit-seed1"]
    for arm in after["arms"].values():
        arm.pop("seconds")
    for arm in before["arms"].values():
        arm.pop("seconds")
    assert json.loads(json.dumps(after)) == before


def test_scratch_and_inherit_put_the_whole_budget_into_the_fine_tune(tiny: Tiny) -> None:
    recipe = tiny.transfer_recipe()
    for arm in ("scratch", "inherit"):
        (stage,) = arm_recipe(recipe, arm, seed=3, factor=2.0).stages
        assert (stage.name, stage.budget.samples, stage.lr) == ("finetune", 32, 2e-3)
        assert stage.trainable == recipe.stages[-1].trainable
    assert arm_recipe(recipe, "scratch", seed=3, factor=1.0).initialiser.kind == "random"
    assert arm_recipe(recipe, "transfer", seed=3, factor=1.0) == recipe.model_copy(update={"seed": 3})
    named = arm_recipe(recipe, "caption-fit", seed=0, factor=1.0)
    assert (named.initialiser.kind, named.initialiser.fit, named.stages) == ("caption-fit", "ridge", recipe.stages)


def test_scratch_has_a_connector_of_its_own(tiny: Tiny) -> None:
    from vpgtrans.runs.parts import fresh_connector, open_source

    source = open_source(str(tiny.source), seed=0)
    fresh, again = (fresh_connector(source.vpg, seed=0) for _ in range(2))
    pairs = [(fresh.connector.state_dict()[k], v) for k, v in source.vpg.connector.state_dict().items() if v.ndim > 1]
    assert pairs
    assert not any(torch.equal(mine, trained) for mine, trained in pairs)
    assert fresh.encoder is source.vpg.encoder
    for name, tensor in fresh.connector.state_dict().items():
        assert torch.equal(tensor, again.connector.state_dict()[name])


def test_compare_names_what_it_can_not_compare(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.transfer_recipe()
    with pytest.raises(RecipeError, match="no arm sideways; known: scratch"):
        runs.compare(recipe, arms=["sideways"], output=tmp_path / "run")
    tokens = tiny.transfer_recipe(stages=[WARMUP | {"budget": {"tokens": 100}}])
    with pytest.raises(RecipeError, match="budget"):
        runs.compare(tokens, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- speed-ups ----------------------------------------------------------------------------------


def test_a_speed_up_is_scratchs_samples_over_the_arms() -> None:
    scratch = [[(0, 5.0), (100, 3.0), (200, 2.0), (300, 2.5)], [(0, 5.0), (100, 4.0), (200, 3.0), (300, 2.0)]]
    transfer = [[(0, 4.0), (50, 2.0), (100, 1.0)], [(0, 4.0), (50, 3.0), (100, 1.9)]]
    # seed 0: scratch's best 2.0 at 200, reached at 50. seed 1: 2.0 at 300, reached at 100
    found = speedups({"scratch": scratch, "transfer": transfer}, "scratch")
    assert found == {"transfer": {"median": 3.5, "min": 3.0, "max": 4.0, "per_seed": [4.0, 3.0]}}


def test_an_arm_that_never_gets_there_is_null() -> None:
    scratch = [[(0, 5.0), (100, 2.0)]] * 3
    never, once = [(0, 4.0), (100, 2.1)], [(0, 4.0), (50, 2.0), (100, 2.0)]
    assert speedups({"scratch": scratch, "x": [never] * 3}, "scratch") == {"x": None}
    assert speedups({"scratch": scratch, "x": [never, once, never]}, "scratch") == {"x": None}
    found = speedups({"scratch": scratch, "x": [once, once, never]}, "scratch")["x"]
    assert found == {"median": 2.0, "min": None, "max": 2.0, "per_seed": [2.0, 2.0, None]}


def test_an_arm_that_starts_there_counts_with_one_batch() -> None:
    curves = {"scratch": [[(0, 5.0), (160, 2.0)]], "x": [[(0, 1.0), (160, 0.5)]]}
    found = speedups(curves, "scratch", floor=16)["x"]
    assert found is not None
    assert found["median"] == 10.0


def test_without_the_base_there_is_no_speed_up() -> None:
    assert speedups({"transfer": [[(0, 1.0)]]}, "scratch") == {}


LOSSES = st.floats(min_value=0.1, max_value=10, allow_nan=False)
CURVES = st.lists(
    st.lists(LOSSES, min_size=2, max_size=6).map(lambda ys: [(100 * k, y) for k, y in enumerate(ys)]),
    min_size=1, max_size=5,
)  # fmt: skip


@given(CURVES)
def test_an_arm_against_itself_gains_nothing(runs_: list[list[tuple[int, float]]]) -> None:
    found = speedups({"scratch": runs_, "same": runs_}, "scratch", floor=10)["same"]
    assert found is not None
    assert found["per_seed"] == [1.0] * len(runs_)


@given(CURVES, st.data())
def test_a_lower_curve_is_never_slower(runs_: list[list[tuple[int, float]]], data: st.DataObject) -> None:
    lower = [[(s, y - data.draw(st.floats(0, 0.05))) for s, y in run] for run in runs_]
    found = speedups({"scratch": runs_, "lower": lower}, "scratch", floor=10)["lower"]
    assert found is not None
    assert all(ratio >= 1 for ratio in found["per_seed"])
    assert found["min"] <= found["median"] <= found["max"]
    assert math.isfinite(found["max"])


@given(CURVES, st.integers(2, 9))
def test_twice_the_samples_halve_the_speed_up(runs_: list[list[tuple[int, float]]], times: int) -> None:
    slower = [[(s * times, y) for s, y in run] for run in runs_]
    found = speedups({"scratch": runs_, "slow": slower}, "scratch", floor=1)["slow"]
    assert found is not None
    for ratio, run in zip(found["per_seed"], runs_, strict=True):
        at_start = min(run, key=lambda point: point[1])[0] == 0
        assert ratio == pytest.approx(1.0 if at_start else 1 / times)


# --- probe, evaluate, caption, validate ---------------------------------------------------------


def test_probe_scores_every_initialiser_and_marks_one(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.transfer_recipe(initialiser="inherit")  # whatever the recipe takes, the table has all
    rows = runs.probe(recipe, output=tmp_path / "table", device="cpu")
    assert read(tmp_path / "table" / "initialisers.json") == rows
    assert {row["kind"] for row in rows} == {"converter", "caption-fit", "inherit"}
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
    written = str(write_recipe(tiny.transfer_recipe(), tmp_path))
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
    import shutil

    from tiny_vlms import tiny_blip2

    bare = tmp_path / "llm-without-weights"
    shutil.copytree(tiny.target_llm, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    imported = tiny_blip2(tmp_path / "blip2")
    (imported / "model.safetensors").unlink()
    found = runs.validate(tiny.transfer_recipe(target={"llm": str(bare)}))
    assert found["target_model"] == "qwen3"
    assert (found["train_samples"], found["validation_samples"], found["visual_tokens"]) == (24, 8, 4)
    found = runs.validate(tiny.transfer_recipe(target={"llm": str(bare)}, source={"vpg": str(imported)}))
    assert found["source_model"] == "blip-2"


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
    from lightning.pytorch.utilities import rank_zero_only

    from vpgtrans.runs.directory import check_run, create_run

    recipe = tiny.transfer_recipe()
    path = check_run(recipe, tmp_path / "run", resume=False, overwrite=False)
    create_run(recipe, path, resume=False)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    before = files(tmp_path)
    assert check_run(recipe, tmp_path / "run", resume=False, overwrite=False) == path
    create_run(recipe, path, resume=False).write("summary.json", {})
    assert files(tmp_path) == before
