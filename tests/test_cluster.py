"""The scripts of recipes/cluster, as far as one machine goes: real processes, real signals, a stand-in for SLURM."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import Tiny

from vpgtrans import runs
from vpgtrans.recipe import dump, load_recipe

SCRIPTS = Path(__file__).parent.parent / "recipes/cluster"

SRUN = """#!{python}
# Starts SLURM_NTASKS tasks, each as if on a machine of its own. STOP: when this file holds a loss, the time is over.
import os, signal, subprocess, sys, time
command = [word for word in sys.argv[1:] if not word.startswith("--") or word in ("--resume", "--device")]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank),
                     "SLURM_LOCALID": "0"}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
stop = os.environ.get("STOP")
while stop and all(task.poll() is None for task in tasks):
    if os.path.exists(stop) and '"loss"' in open(stop).read():
        for task in tasks:
            task.send_signal(signal.SIGTERM)
        break
    time.sleep(0.05)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks)))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$ASKED"
"""


def environment(**values: str) -> dict[str, str]:
    """This process's, without what a launcher or Lightning left in it, and with this Python first on the path."""
    names = {"LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"}
    kept = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("SLURM_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | values


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def recipe(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 44 updates, long enough to be stopped in; without dropout, whose numbers differ between processes."""
    common = {"lr": 1e-3, "batch_size": 2, "validate_every": 80, "lora": {"dropout": 0.0}}
    stages = [
        {"name": "warmup", "trainable": {"projector": "full"}, "budget": {"samples": 80}, **common},
        {"name": "finetune", "trainable": {"projector": "full", "llm": "lora"}, "budget": {"samples": 8}, **common},
    ]
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump(tiny.transfer_recipe(stages=stages, trainer={"precision": "fp32", "strategy": "fsdp"})))
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing stopped."""
    return runs.transfer(load_recipe(recipe), output=tmp_path_factory.mktemp("alone") / "run", device="cpu")


def assert_same(run: Path, expected: Path) -> None:
    for name in ("projector/model.safetensors", "adapter/adapter_model.safetensors"):
        found, right = load_file(run / "vlm" / name), load_file(expected / "vlm" / name)
        for tensor in right:
            torch.testing.assert_close(found[tensor], right[tensor], atol=2e-5, rtol=1e-4)


def test_two_machines_meet_by_torchrun(recipe: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["bash", str(SCRIPTS / "torchrun.sh"), "transfer", str(recipe), str(run), "--device", "cpu"]
    own = environment(NODES="2", HEAD=f"127.0.0.1:{free_port()}", PROCESSES="1", OMP_NUM_THREADS="1")
    machines: list[Any] = [subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [machine.communicate(timeout=200)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)[-4000:]
    assert_same(run, alone)


def test_a_job_whose_time_is_over_is_queued_again_and_comes_to_the_same_end(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    commands, run = tmp_path / "bin", tmp_path / "run"
    commands.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    own = environment(
        SLURM_JOB_ID="4242", SLURM_JOB_NAME="vpgtrans", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="2",
        SLURM_NODELIST="127.0.0.1", SLURM_CPUS_PER_TASK="1", MASTER_PORT=free_port(), ASKED=str(tmp_path / "asked"),
    )  # fmt: skip
    own["PATH"] = f"{commands}{os.pathsep}{own['PATH']}"

    def job(**values: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPTS / "slurm.sbatch"), "transfer", str(recipe), str(run), "--device", "cpu"],
            env=own | values, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    first = job(STOP=str(run / "metrics.jsonl"))
    assert first.returncode == 0, first.stderr[-4000:]
    assert "stopped by SIGTERM" in first.stderr
    assert (tmp_path / "asked").read_text() == "requeue 4242\n"
    assert not (run / "summary.json").exists()
    second = job(SLURM_RESTART_COUNT="1")
    assert second.returncode == 0, second.stderr[-4000:]
    assert "resuming at stage warmup" in second.stderr
    assert (tmp_path / "asked").read_text() == "requeue 4242\n"  # once
    assert_same(run, alone)


def test_scripts_say_what_they_want() -> None:
    for name in ("torchrun.sh", "slurm.sbatch"):
        done = subprocess.run(["bash", str(SCRIPTS / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "RECIPE RUN" in done.stderr
