"""Several processes that train together: started by the command itself or by torchrun, and what they may not do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from lightning.pytorch.plugins.environments import SLURMEnvironment
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
CLUSTER = Path(__file__).parent.parent / "recipes/cluster"


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
    path, run, options = write(recipe, tmp_path), str(tmp_path / "two"), ["--device", "cpu", "--json"]
    if launcher == "itself":
        itself = [sys.executable, "-m", "vpgtrans", "transfer", path, "-o", run]
        command = [*itself, "trainer.devices=2", "trainer.strategy=ddp", *options]
    else:
        command = ["bash", str(CLUSTER / "torchrun.sh"), "transfer", path, run, *options]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        command, env=environment() | {"PROCESSES": "2", "PATH": path}, capture_output=True, text=True, timeout=300,
        check=False,
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


# --- what is refused, and who is who ------------------------------------------------------------


SLURM = {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3", "SLURM_PROCID": "3",
         "SLURM_LOCALID": "1", "SLURM_JOB_NAME": "run"}  # fmt: skip


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_the_environment_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(**values: str) -> tuple[bool, int, tuple[int, int] | None]:
        set_environment(monkeypatch, **values)
        return processes.first_process(), processes.local_rank(), processes.launched()

    assert seen() == (True, 0, None)
    assert seen(LOCAL_RANK="1") == (False, 1, None)  # as Lightning starts it
    assert seen(**TORCHRUN | {"LOCAL_RANK": "0", "RANK": "2"}) == (False, 0, (2, 2))
    assert seen(**SLURM) == (False, 1, (2, 3))
    assert seen(**SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == (True, 0, (2, 3))
    # a shell in an allocation: nothing was started but the shell
    assert seen(**SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "bash"}) == (True, 0, None)
    # torchrun, which srun started on every machine
    assert seen(**SLURM | TORCHRUN) == (False, 1, (2, 2))
    assert processes.launcher() == "torchrun"


def test_srun_is_what_lightning_takes_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, **SLURM)
    given = trainer_devices(TrainerConfig(devices="auto"), CPU)
    assert (given["devices"], given["num_nodes"]) == (2, 3)
    (plugin,) = given["plugins"]
    assert isinstance(plugin, SLURMEnvironment)
    assert (plugin.world_size(), plugin.global_rank(), plugin.local_rank()) == (6, 3, 1)
    assert SLURMEnvironment.detect()
    assert not plugin.auto_requeue  # the run's own checkpoints, and the job's script, do that
    plugin.validate_settings(num_devices=2, num_nodes=3)
    for name, value in (SLURM | {"SLURM_JOB_NAME": "bash"}).items():
        monkeypatch.setenv(name, value)
    assert not SLURMEnvironment.detect()
    assert trainer_devices(TrainerConfig(devices="auto"), CPU)["plugins"] is None


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
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    refused("cuda", r"torchrun started 2 processes here, and each sees 1 GPU\(s\); give one each$")
    set_environment(monkeypatch, **SLURM)
    refused("cuda", r"srun started 2 processes here, and each sees 1 GPU\(s\).*with --gpus-per-node")
    refused("cpu", r"trainer\.devices is 1, but srun started 2 processes", devices=1)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    refused("cpu", "srun started 6 tasks; say how many a machine has: --ntasks-per-node")


def test_a_strategy_that_can_not_be_is_refused_before_anything_is_loaded(tiny: Tiny, monkeypatch: Any) -> None:
    def refused(device: str, saying: str, *, target: dict[str, Any] | None = None, **trainer: Any) -> None:
        recipe = tiny.transfer_recipe(trainer=trainer, stages=stages())
        if target:
            recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update=target)})
        with pytest.raises(RecipeError, match=saying):
            check_devices(recipe, torch.device(device))

    refused("cpu", "trainer.strategy: deepspeed-2 needs a GPU", strategy="deepspeed-2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("cuda", r"needs the package deepspeed: pip install 'vpgtrans\[deepspeed\]'", strategy="deepspeed-3")
    refused("mps", "trainer.strategy: fsdp is for CPUs and NVIDIA or AMD GPUs", strategy="fsdp")
    refused("cpu", "fsdp can't cut weights that target.quantise keeps", strategy="fsdp", target={"quantise": "nf4"})
    refused("cpu", "fsdp needs trainer.optimizer: adamw", strategy="fsdp", optimizer="adamw-8bit")
    refused("cpu", "deepspeed-2 would cast what trains to bf16", strategy="deepspeed-2", precision="bf16-mixed")


def test_a_process_that_is_killed_takes_the_other_along(tiny: Tiny, tmp_path: Path) -> None:
    long = [stage | {"budget": {"samples": 8000}, "validate_every": 8000} for stage in stages()[:1]]
    run = tmp_path / "run"
    recipe = write(tiny.transfer_recipe(stages=long), tmp_path)
    command = [sys.executable, "-m", "vpgtrans", "transfer", recipe, "trainer.devices=2", "trainer.strategy=fsdp", "-o",
               str(run), "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and "loss_caption" in (run / "metrics.jsonl").read_text():
            break
        time.sleep(0.1)
    children = psutil.Process(process.pid).children()
    try:
        # as Lightning starts it: -m vpgtrans.__main__
        (second,) = [each for each in children if any("vpgtrans" in word for word in each.cmdline())]
        second.kill()
        killed = time.monotonic()
        _, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode in (1, -signal.SIGKILL), stderr[-3000:]  # by what it saw itself, or what watches it
    assert time.monotonic() - killed < 60
    assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE


def test_validate_warns_of_a_strategy_that_this_machine_lacks(tiny: Tiny, tmp_path: Path) -> None:
    recipe = write(tiny.transfer_recipe(trainer={"strategy": "deepspeed-3"}, stages=stages()), tmp_path)
    result = CliRunner().invoke(cli, ["validate", recipe])
    assert result.exit_code == 0, result.stderr
    assert "trainer.strategy: deepspeed-3 needs a GPU" in result.stderr
    refused = CliRunner().invoke(cli, ["transfer", recipe, "-o", str(tmp_path / "run"), "--device", "cpu"])
    assert (refused.exit_code, (tmp_path / "run").exists()) == (2, False)
    assert "trainer.strategy: deepspeed-3 needs a GPU" in refused.stderr


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
