"""Several processes that train together: started by the command itself or by torchrun, and what they may not do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_runs import Tiny

from vpgtrans import processes, runs
from vpgtrans.cli import cli
from vpgtrans.errors import RecipeError, TrainingError
from vpgtrans.recipe import Recipe, dump
from vpgtrans.runs.parts import pick_device
from vpgtrans.training.config import TrainerConfig
from vpgtrans.training.devices import check_devices, trainer_devices

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}
CPU = torch.device("cpu")


def stages() -> list[dict[str, Any]]:
    """Two short stages without dropout, whose random numbers differ from device to device."""
    common = {"batch_size": 4, "validate_every": 8, "lora": {"dropout": 0.0}}
    return [
        {"name": "warmup", "trainable": {"projector": "full"}, "lr": 5e-3, "budget": {"samples": 16}, **common},
        {"name": "finetune", "trainable": {"projector": "full", "llm": "lora"}, "lr": 1e-3, "budget": {"samples": 16},
         **common},
    ]  # fmt: skip


def write(recipe: Recipe, directory: Path) -> str:
    path = directory / "recipe.yaml"
    path.write_text(dump(recipe))
    return str(path)


def environment() -> dict[str, str]:
    """This process's, without what Lightning left in it for processes that train along."""
    names = {*TORCHRUN, "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in names}


def losses(run: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["update"], line["val_loss"]) for line in lines if "val_loss" in line]


# --- two real processes -------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["itself", "torchrun"])
def test_two_processes_give_one_run_with_the_losses_of_one(tiny: Tiny, tmp_path: Path, launcher: str) -> None:
    recipe = tiny.transfer_recipe(stages=stages())
    alone = losses(runs.transfer(recipe, output=tmp_path / "one", device="cpu"))
    assert len(alone) == 6
    command = [write(recipe, tmp_path), "-o", str(tmp_path / "two"), "--device", "cpu", "--json"]
    start = [sys.executable, "-m"]
    if launcher == "itself":
        command += ["trainer.devices=2", "trainer.strategy=ddp"]
    else:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        command += ["trainer.devices=auto"]
    done = subprocess.run(
        [*start, "vpgtrans", "transfer", *command],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert json.loads(done.stdout) == {**summary, "output": str(tmp_path / "two")}  # one document, of one process
    assert done.stderr.count("warmup: 8 samples, validation loss") == 1
    assert (tmp_path / "two/vlm/manifest.json").is_file()
    both = losses(tmp_path / "two")
    assert [place[:2] for place in both] == [place[:2] for place in alone]
    assert [place[2] for place in both] == pytest.approx([place[2] for place in alone], rel=1e-5)


def test_a_signal_to_the_first_of_two_processes_stops_both_with_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    long = [stage | {"budget": {"samples": 4000}, "validate_every": 400} for stage in stages()[:1]]
    run = tmp_path / "run"
    recipe = write(tiny.transfer_recipe(stages=long), tmp_path)
    command = [sys.executable, "-m", "vpgtrans", "transfer", recipe, "trainer.devices=2", "-o", str(run), "--device",
               "cpu"]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and "loss_caption" in (run / "metrics.jsonl").read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=100)  # also waits for the second process, which has the same stderr
    assert process.returncode == 143, stderr[-3000:]
    assert stderr.count("stopped by SIGTERM") == 1
    assert "Traceback" not in stderr
    progress = json.loads((max((run / "checkpoints").iterdir()) / "progress.json").read_text())
    assert 0 < progress["update"] < 1000


def test_a_process_whose_share_has_no_image_keeps_step(tiny: Tiny, tmp_path: Path) -> None:
    """Of every batch each of two processes gets one sample, and two of three samples are text alone."""
    image = tmp_path / "one.png"
    Image.new("RGB", (20, 20), "red").save(image)
    rows = [
        {
            "image": [] if row % 3 else [str(image)],
            "said": [
                {"role": "user", "content": f"{'' if row % 3 else '<image>'}what is {row}?"},
                {"role": "assistant", "content": f"the number {row}"},
            ],
        }
        for row in range(12)
    ]
    table = tmp_path / "mixed.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"dataset": str(table), "conversation": "said"}]
    common = {"lr": 1e-3, "batch_size": 2, "budget": {"samples": 12}, "validate_every": 4, "lora": {"dropout": 0.0}}
    short = [
        {"name": "warmup", "trainable": {"projector": "full"}, "cache_features": True, **common},
        {"name": "finetune", "trainable": {"projector": "full", "llm": "lora"}, "cache_features": False, **common},
    ]
    recipe = tiny.transfer_recipe(stages=short, data={"train": data, "validation": data})
    alone = losses(runs.transfer(recipe, output=tmp_path / "one", device="cpu"))
    command = [write(recipe, tmp_path), "-o", str(tmp_path / "two"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "vpgtrans", "transfer", *command, "trainer.devices=2", "trainer.strategy=ddp"],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for (*place, loss), (*other, both) in zip(alone, losses(tmp_path / "two"), strict=True):
        assert place == other
        assert both == pytest.approx(loss, rel=1e-4)


# --- what is refused, and who is who ------------------------------------------------------------


def test_the_environment_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.first_process(), processes.local_rank(), processes.by_torchrun()) == (True, 0, None)
    monkeypatch.setenv("LOCAL_RANK", "1")  # as Lightning starts it
    assert (processes.first_process(), processes.local_rank(), processes.by_torchrun()) == (False, 1, None)
    for name, value in (TORCHRUN | {"LOCAL_RANK": "0", "RANK": "2"}).items():
        monkeypatch.setenv(name, value)
    assert (processes.first_process(), processes.local_rank(), processes.by_torchrun()) == (False, 0, (2, 2))


def test_devices_that_are_not_there_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: str, saying: str, **trainer: Any) -> None:
        recipe = tiny.transfer_recipe(trainer=trainer, stages=stages())
        with pytest.raises(RecipeError, match=saying):
            check_devices(recipe, torch.device(device))

    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    refused("cpu", "stage warmup: batch_size 4 is for all devices together, and there are 5", devices=5)
    refused("cuda", r"trainer\.devices is 4, but this machine has 3 GPU", devices=4)
    refused("cuda:1", "--device cuda:1 is one GPU; give trainer.devices=1", devices=2)
    refused("cuda:1", "--device cuda:1 is one GPU; give trainer.devices=1", devices="auto")
    check_devices(tiny.transfer_recipe(trainer={"devices": 3}), torch.device("cuda"))
    check_devices(tiny.transfer_recipe(trainer={"devices": 1}), torch.device("cuda:1"))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    refused("cpu", r"trainer\.devices is 1, but torchrun started 2 processes", devices=1)
    small = [stage | {"batch_size": 3} for stage in stages()]
    with pytest.raises(RecipeError, match="batch_size 3 is for all devices together, and there are 4"):
        check_devices(tiny.transfer_recipe(trainer={"devices": 2}, stages=small), CPU)


def test_more_devices_than_samples_end_the_command_before_a_file_is_written(tiny: Tiny, tmp_path: Path) -> None:
    recipe = write(tiny.transfer_recipe(stages=stages()), tmp_path)
    run = str(tmp_path / "run")
    result = CliRunner().invoke(cli, ["transfer", recipe, "trainer.devices=9", "-o", run, "--device", "cpu"])
    assert result.exit_code == 2
    assert "batch_size 4 is for all devices together, and there are 9" in result.stderr
    assert not Path(run).exists()


def test_devices_as_the_trainer_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(device: str, **config: Any) -> tuple[str, Any, int]:
        given = trainer_devices(TrainerConfig(**config), torch.device(device))
        return given["accelerator"], given["devices"], given["num_nodes"]

    assert of("cpu") == ("cpu", 1, 1)
    assert of("cpu", devices=2) == ("cpu", 2, 1)
    assert of("cuda:1", devices=1) == ("gpu", [1], 1)
    assert of("cuda:0", devices="auto") == ("gpu", "auto", 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert of("cpu", devices="auto") == ("cpu", 2, 2)
    assert of("cuda:1", devices=2) == ("gpu", 2, 2)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")


def test_what_all_processes_raise_is_reported_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(runs, "transfer", fail)
    recipe = write(tiny.transfer_recipe(), tmp_path)
    first = CliRunner().invoke(cli, ["transfer", recipe])
    assert (first.exit_code, first.stderr) == (1, "error: the loss is nan\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = CliRunner().invoke(cli, ["transfer", recipe])
    assert (second.exit_code, second.stderr) == (0, "")


def test_compare_is_not_for_several_processes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="start it without torchrun"):
        runs.compare(tiny.transfer_recipe(), output=tmp_path / "run", device="cpu")
