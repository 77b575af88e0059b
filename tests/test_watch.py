"""`vpgtrans watch`: a run seen through its directory alone, from its first line to its end; and what a run says."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console
from tiny_runs import Tiny

from vpgtrans import runs
from vpgtrans.cli import cli
from vpgtrans.errors import TrainingError, UserError
from vpgtrans.following import LEAST_QUIET, curve, view
from vpgtrans.progress import RunDisplay, duration, panel, sparkline
from vpgtrans.status import SILENT, Status, read_status, works

RECIPE = """
name: tiny
stages:
- {name: warmup, lr: 0.001, budget: {samples: 40}}
- {name: finetune, lr: 0.001, budget: {samples: 80}}
"""


def line(stage: str, update: int, **figures: object) -> dict[str, object]:
    place = {"samples": 4 * update + (40 if stage == "finetune" else 0), "text_tokens": 0}
    return {"stage": stage, "update": update, **place, "seconds": 2.0 * update, **figures}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Half of a warm-up, its process alive."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "environment.json").write_text("{}")
    log = [line("warmup", 0, val_loss=5.0)]
    log += [line("warmup", update, loss=5 - update / 5, lr=1e-3, memory_bytes=2**30) for update in (1, 2, 3, 4)]
    log += [
        line("warmup", 5, skipped="the loss is nan", skipped_loss=None, ids=["s1"]),
        line("warmup", 5, val_loss=4.0),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log) + '{"half')
    checkpoint = tmp_path / "checkpoints" / "00-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    alive(tmp_path)
    return tmp_path


def alive(run: Path, **facts: object) -> None:
    here = {"state": "running", "host": os.uname().nodename, "pid": os.getpid(), "time": time.time()}
    (run / "status.json").write_text(json.dumps(here | {"updates": {"warmup": 10}} | facts))


def shown(run: Path, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(panel(view(run), width=width))
    return console.export_text()


def test_a_run_under_way(run: Path) -> None:
    found = view(run)
    assert (found.state, found.over, found.stage) == ("running", False, "warmup")
    warmup, finetune = found.stages
    assert (warmup.updates, warmup.done, warmup.samples, warmup.val_loss, warmup.skipped) == (10, 5, 20, 4.0, 1)
    assert (finetune.updates, finetune.done) == (None, 0)
    assert (found.left, found.left_all) == (10.0, 10.0 + 80 * 0.5)  # 10 s for 5 updates of 4
    assert found.checkpoint == "00-00000005"
    assert found.skipped == [{"stage": "warmup", "update": 5, "skipped": "the loss is nan", "ids": ["s1"]}]
    text = shown(run)
    for said in ("tiny  running", "1/2 warmup", "5/10", "val 4.0000", "1 skipped", "stage: 10 s left", "about 50 s",
                 "loss 4.200", "memory 1.0 GiB", "checkpoint 00-00000005", "skipped: warmup, update 5: the loss is nan",
                 "training loss", "▁"):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, "running"),
        ({"pid": 2**22 + 1}, "killed"),
        ({"host": "elsewhere"}, "running"),
        ({"host": "elsewhere", "time": time.time() - SILENT - 60}, "killed"),
        ({"state": "failed", "message": "the loss is nan"}, "failed"),
        ({"state": "interrupted"}, "interrupted"),
        ({"state": "finished"}, "finished"),
    ],
)
def test_whether_it_is_alive(run: Path, facts: dict, state: str) -> None:
    alive(run, **facts)
    assert view(run).state == state
    assert state in shown(run)


def test_a_run_that_says_nothing_for_long_is_stalled(run: Path) -> None:
    assert view(run, now=time.time() + LEAST_QUIET - 30).state == "running"
    assert view(run, now=time.time() + LEAST_QUIET + 30).state == "stalled"


def test_before_and_after_the_stages(run: Path) -> None:
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").unlink()
    assert view(run).state == "starting"
    rest = [line("warmup", 10, val_loss=3.5), line("finetune", 20, val_loss=3.0)]
    (run / "metrics.jsonl").write_text(log.replace('{"half', "") + "".join(json.dumps(each) + "\n" for each in rest))
    alive(run, updates={"warmup": 10, "finetune": 20})
    assert view(run).state == "evaluating"
    alive(run, updates={"warmup": 20, "finetune": 20})
    assert [stage.stopped_early for stage in view(run).stages] == [True, False]


WRONG = ("null", "[]", "{}", '"x"', "true", "-1", "NaN", "1e400", "\udcff")


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "status.json", "summary.json", "trainable.json"])
def test_damaged_files_are_shown_as_far_as_they_go(run: Path, name: str) -> None:
    (run / "summary.json").write_text(json.dumps({"stages": [{"name": "warmup"}]}))
    (run / "trainable.json").write_text(json.dumps([{"stage": "warmup", "lr": 0.1}]))
    whole = (run / name).read_text()
    values = list(re.finditer(r"(?<=: )(\"[^\"]*\"|\[.*\]|\{[^{}]*\}|[\w.+-]+)", whole))[:24]
    assert values
    for value in values:
        for wrong in WRONG:
            damaged = whole[: value.start()] + wrong + whole[value.end() :]
            (run / name).write_bytes(damaged.encode(errors="surrogateescape"))
            assert view(run).path in str(run)
            shown(run)


def test_a_validation_without_a_number_is_on_no_curve(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as log:
        log.write("\n" + json.dumps(line("warmup", 8, val_loss=None)) + "\n")
    assert view(run).validation == [(0, 5.0), (20, 4.0)]
    assert "validation" in shown(run)


def test_an_empty_place_and_no_terminal(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["watch", str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert "there is no run here" in result.output
    with pytest.raises(UserError):
        view(tmp_path / "nothing")
    result = CliRunner().invoke(cli, ["watch", str(run)])  # once, since nobody would see it change
    assert (result.exit_code, "1/2 warmup" in result.output) == (0, True)
    found = json.loads(CliRunner().invoke(cli, ["watch", str(run), "--json"]).stdout)
    assert (found["state"], found["stages"][0]["done"], found["left"]) == ("running", 5, 10.0)


def test_watching_loads_nothing_heavy(run: Path) -> None:
    code = f"""if True:
        import sys
        from vpgtrans.cli import cli
        cli(["watch", {str(run)!r}, "--once"], standalone_mode=False)
        print(sorted({{"torch", "lightning", "transformers", "numpy", "pydantic"}} & set(sys.modules)))
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "finished"),
        (TrainingError("the loss is nan"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
    ],
)
def test_a_run_says_how_it_ended(tmp_path: Path, error: BaseException | None, state: str) -> None:
    try:
        with Status() as status:
            status.begin(tmp_path)
            status.say(updates={"warmup": 3})
            here = read_status(tmp_path)
            assert (here["state"], works(here, now=time.time())) == ("running", True)
            if error is not None:
                raise error
    except (TrainingError, KeyboardInterrupt, SystemExit):
        assert error is not None
    said = read_status(tmp_path)
    assert (said["state"], said["updates"], works(said, now=time.time())) == (state, {"warmup": 3}, False)
    assert ("loss is nan" in said["message"]) == (state == "failed")


def test_a_real_run_is_followed_to_its_end(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.transfer_recipe()
    runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    found = view(tmp_path / "run")
    assert (found.state, found.over, found.left) == ("finished", True, None)
    assert [(stage.name, stage.done, stage.updates) for stage in found.stages] == [("warmup", 4, 4), ("finetune", 4, 4)]
    assert "finished" in shown(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")


def test_what_shows_itself_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked: list[int] = []
    display = RunDisplay()
    with display:
        display.show(lambda: asked.append(1))  # type: ignore[arg-type, return-value]
    assert (asked, capsys.readouterr().err) == ([], "")
    monkeypatch.setattr(display, "console", Console(force_terminal=True, stderr=True, width=80))
    with display:
        display.show(lambda: SimpleNamespace(stages=[], last={}, seconds=3.0, over=True))  # type: ignore[arg-type]
    assert "3 s so far" in capsys.readouterr().err


def test_figures_in_words() -> None:
    assert [duration(seconds) for seconds in (None, 3.4, 75, 3725)] == ["?", "3 s", "1 min 15 s", "1 h 02 min"]
    assert (sparkline([1, 2, 3]), sparkline([2, 2]), sparkline([])) == ("▁▅█", "▁▁", "")
    points = [(float(place), float(place % 7)) for place in range(100)]
    assert len(curve(points, 40)) == 40
    assert curve(points[:3], 40) == [0, 1, 2]
