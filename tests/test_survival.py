"""What a run survives: damaged checkpoints, signals, a full disk, kills while it begins, another machine.

Processes are real, and so are the signals.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_resume import without_clock
from tiny_runs import WARMUP, Tiny, write_captions
from tiny_training import WARMUP as TRAINING_WARMUP
from tiny_training import all_tensors, build_vlm, lines, make_recipe, train

from vpgtrans import runs
from vpgtrans.cli import cli
from vpgtrans.errors import CheckpointError, MachineError, OutputError
from vpgtrans.files import alone
from vpgtrans.recipe import Recipe, dump
from vpgtrans.runs.directory import RunDirectory, check_run, create_run
from vpgtrans.runs.journey import BY_CONTENT, MACHINES_OWN
from vpgtrans.shortage import shortages_are_said
from vpgtrans.training import checkpoints as checkpoint_files
from vpgtrans.training.checkpoints import Checkpoint, Checkpoints, Progress
from vpgtrans.training.loading import Validator
from vpgtrans.training.module import StageModule


class Crash(BaseException):
    """The process ends here."""


def crash_at(patch: pytest.MonkeyPatch, stage: str, update: int, do: Callable[[], None] | None = None) -> None:
    """End there, or do something there and go on."""
    step = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> None:
        if self.stage.name == stage and self.done == update:
            if do is None:
                raise Crash
            do()
        step(self, batch, batch_idx)

    patch.setattr(StageModule, "training_step", training_step)


# --- damaged checkpoints --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two checkpoints that a run leaves that was killed in its fine-tune: after updates 2 and 4."""
    run = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 5)
        with pytest.raises(Crash):
            train(build_vlm(root), make_recipe(), run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["01-00000002", "01-00000004"]
    return run / "checkpoints"


FILES = ["state.safetensors", "best.safetensors", "optimizer.pt", "progress.json", "manifest.json"]


def _flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _other_byte(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    content[place] = chance.choice([byte for byte in range(256) if byte != content[place]])
    file.write_bytes(content)


def _truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def _zeros(file: Path, chance: random.Random) -> None:
    """As some file systems leave a file that was not flushed when the power went."""
    content = file.read_bytes()
    start = chance.randrange(len(content) - 8)
    file.write_bytes(content[:start] + bytes(len(content) - start))


def _longer(file: Path, chance: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(chance.randbytes(chance.randint(1, 9)))


def _missing(file: Path, chance: random.Random) -> None:
    file.unlink()


def _other_checkpoint(file: Path, chance: random.Random) -> None:
    shutil.copyfile(file.parent.with_name("01-00000002") / file.name, file)


def _other_file(file: Path, chance: random.Random) -> None:
    shutil.copyfile(file.with_name(chance.choice([name for name in FILES if name != file.name])), file)


def _with_its_hash(file: Path, chance: random.Random) -> None:
    """Altered, and its entry in the manifest with it."""
    _flip(file, chance)
    manifest = file.with_name("manifest.json")
    said = json.loads(manifest.read_text()) if file != manifest else {"files": {}}
    if file != manifest:
        said["files"][file.name]["sha256"] = checkpoint_files.file_sha256(file)
    manifest.write_text(json.dumps(said, indent=2))


def _left_out(file: Path, chance: random.Random) -> None:
    """A manifest that doesn't know a file, or is empty."""
    manifest = file.with_name("manifest.json")
    said = json.loads(manifest.read_text())
    if said["files"].pop(file.name, None) is None:
        said = {}
    manifest.write_text(json.dumps(said, indent=2))


def _another_name(file: Path, chance: random.Random) -> None:
    """The older checkpoint in the newer one's place."""
    shutil.rmtree(file.parent)
    shutil.copytree(file.parent.with_name("01-00000002"), file.parent)


DAMAGES = [_flip, _other_byte, _truncate, _zeros, _longer, _missing, _other_checkpoint, _other_file, _with_its_hash,
           _left_out, _another_name]  # fmt: skip


@pytest.mark.parametrize("seed", range(110))
def test_a_damaged_checkpoint_is_recognised_and_passed_over(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """Every damage to every file, twice, at other places."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    damage, name = DAMAGES[seed % len(DAMAGES)], FILES[seed // len(DAMAGES) % len(FILES)]
    damage(tmp_path / "checkpoints" / "01-00000004" / name, random.Random(seed))
    found = Checkpoints(tmp_path / "checkpoints").load()
    assert found is not None
    assert found.progress.update == 2
    assert "01-00000004 is passed over" in caplog.text
    sound = Checkpoints(saved).load()
    assert sound is not None
    assert sound.progress.update == 4


def test_where_all_are_damaged_each_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoints")
    (tmp_path / "checkpoints/01-00000002/optimizer.pt").unlink()
    _flip(tmp_path / "checkpoints/01-00000004/state.safetensors", random.Random(0))
    with pytest.raises(CheckpointError, match=r"(?s)04: state\.safetensors is damaged.*02: optimizer\.pt is missing"):
        Checkpoints(tmp_path / "checkpoints").load()


def test_a_checkpoint_of_another_version_is_said_to_be_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpgtrans.training.checkpoints.FORMAT", 3)
    with pytest.raises(CheckpointError, match=r"of another version \(format 2; this one: 3\)"):
        Checkpoints(saved).load()


def _checkpoint(update: int) -> Checkpoint:
    return Checkpoint(Progress(update=update), {"a": torch.full((64,), float(update))}, {}, None)


def test_a_checkpoint_is_never_written_onto_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between its removal and the new one's name would leave neither."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_checkpoint(1))
    (tmp_path / "00-00000001" / "state.safetensors").write_bytes(b"damaged")
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        assert not Path(target).exists()
        rename(source, target)
        if not Path(target).name.startswith("."):
            raise Crash

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(Crash):
        checkpoints.save(_checkpoint(1))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-00000001", "00-00000001.1"]
    found = checkpoints.load()
    assert found is not None
    assert torch.equal(found.state["a"], torch.full((64,), 1.0))
    checkpoints.save(_checkpoint(1))
    assert [path.name for path in tmp_path.iterdir()] == ["00-00000001.2"]


def test_the_manifest_comes_last_and_the_last_good_one_stays_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(_checkpoint(1))
    order: list[str] = []
    sync = checkpoint_files.sync

    def noted(path: Path) -> None:
        assert (tmp_path / "00-00000001" / "manifest.json").exists()
        order.append(path.name)
        sync(path)

    monkeypatch.setattr(checkpoint_files, "sync", noted)
    checkpoints.save(_checkpoint(2))
    assert order[:4] == ["best.safetensors", "progress.json", "state.safetensors", "manifest.json"]
    assert order[4].startswith(".00-00000002")  # the names in it
    assert order[5:] == [tmp_path.name]
    assert [path.name for path in tmp_path.iterdir()] == ["00-00000002"]


# --- when checkpoints are written -----------------------------------------------------------------


def saves(patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(stage, update) of each save that follows."""
    found: list[tuple[int, int]] = []
    save = Checkpoints.save

    def noted(self: Checkpoints, checkpoint: Checkpoint) -> None:
        found.append((checkpoint.progress.stage, checkpoint.progress.update))
        save(self, checkpoint)

    patch.setattr(Checkpoints, "save", noted)
    return found


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [4, 6]), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 4, 6]), (100, [4, 6])]
)
def test_checkpoints_come_every_so_many_updates_and_at_validations(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, expected: list[int]
) -> None:
    found = saves(monkeypatch)
    stage = TRAINING_WARMUP | {"validate_every": 16}
    trainer = {"precision": "fp32", "devices": 1, "checkpoint_every": every}
    train(build_vlm(root), make_recipe([stage], trainer=trainer), tmp_path)
    assert found == [(0, update) for update in expected]


def test_sigusr1_saves_and_the_run_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = saves(monkeypatch)
    crash_at(monkeypatch, "warmup", 2, do=lambda: os.kill(os.getpid(), signal.SIGUSR1))
    (result,) = train(build_vlm(root), make_recipe([TRAINING_WARMUP]), tmp_path)
    assert found == [(0, 2), (0, 3), (0, 4), (0, 6)]
    assert result.updates == 6
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_signal_in_a_validation_does_not_wait_for_its_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with this very validation, and comes to the same."""
    whole = build_vlm(root)
    train(whole, make_recipe(), tmp_path / "whole")
    validate, module_losses = Validator.__call__, StageModule.losses
    within: list[bool] = []

    def called(self: Validator, module: StageModule, **options: Any) -> float:
        within.append(module.stage.name == "finetune" and module.done == 2)
        return validate(self, module, **options)

    def losses(self: StageModule, batch: Any) -> Any:
        if within and within[-1] and not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return module_losses(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "__call__", called)
        patch.setattr(StageModule, "losses", losses)
        with pytest.raises(Exception, match="stopped by SIGTERM") as stopped:
            train(build_vlm(root), make_recipe(), tmp_path / "cut")
    assert stopped.value.exit_code == 143  # type: ignore[attr-defined]
    found = Checkpoints(tmp_path / "cut/checkpoints").load()
    assert found is not None
    assert (found.progress.update, found.progress.validated) == (2, 0)
    vlm = build_vlm(root)
    train(vlm, make_recipe(), tmp_path / "cut", resume=True)
    ours, tensors = all_tensors(vlm), all_tensors(whole)
    assert [name for name in tensors if not torch.equal(ours[name], tensors[name])] == []
    logs = [without_clock(lines(tmp_path / run / "metrics.jsonl")) for run in ("whole", "cut")]
    assert logs[0] == logs[1]


# --- shortages ------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block no file of this process may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 20_000, 60_000])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_message(saved: Path, tmp_path: Path, size: int) -> None:
    """Whichever file it is that does not fit."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    found = checkpoints.load()
    assert found is not None
    found.progress.update = 5
    with largest_file(size), pytest.raises(MachineError, match=r"01-00000005 can't be written.*goes on from .*00004"):
        checkpoints.save(found)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["01-00000002", "01-00000004"]
    assert checkpoints.load() is not None


def test_out_of_memory_is_said_with_what_to_do(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error, of an allocator that can't give what is asked."""
    crash_at(monkeypatch, "warmup", 3, do=lambda: torch.empty(1 << 60))
    with pytest.raises(MachineError) as short:
        train(build_vlm(root), make_recipe(), tmp_path)
    message = str(short.value)
    assert short.value.exit_code == 1
    assert message.startswith("stage warmup: memory ran out (")
    assert "the last good checkpoint in" in message
    for advice in ("micro_batch_size", "max_tokens", "gradient_checkpointing", "vpgtrans plan"):
        assert advice in message
    found = Checkpoints(tmp_path / "checkpoints").load()
    assert found is not None
    assert found.progress.update == 2


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), OSError(12, "memory")])
def test_every_error_of_memory_is_one(error: Exception) -> None:
    with (
        pytest.raises(MachineError, match=r"here: memory ran out \(.+\); kept\."),
        shortages_are_said("here", kept="kept"),
    ):
        raise error
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), shortages_are_said("here"):
        raise RuntimeError("size mismatch")


# --- real processes -------------------------------------------------------------------------------


def start(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    """`vpgtrans` with these arguments; before: Python that runs first."""
    names = ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "VPGTRANS_FIRST_PROCESS")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"OMP_NUM_THREADS": "1"}
    command = ["-c", f"{before}\nfrom vpgtrans.cli import main; main()"] if before else ["-m", "vpgtrans"]
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write(recipe: Recipe, directory: Path) -> str:
    path = directory / "recipe.yaml"
    path.write_text(dump(recipe))
    return str(path)


def test_a_disk_that_is_full_while_it_trains_ends_the_command_with_one_message(tiny: Tiny, tmp_path: Path) -> None:
    """The log, the first file to grow, does not fit any more."""
    run = tmp_path / "run"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    process = start(
        "transfer", write(tiny.transfer_recipe(), tmp_path), "-o", str(run), "--device", "cpu", before=limit
    )
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "can't be written" in error or "File too large" in error
    assert "Right would be more room there" in error
    assert not list(run.glob("checkpoints/.*.tmp"))


@pytest.mark.parametrize(("victim", "sent", "code"), [("second", "SIGTERM", 143), ("second", "SIGKILL", 1),
                                                      ("first", "SIGKILL", -9)])  # fmt: skip
def test_of_two_processes_whichever_gets_a_signal_none_is_left(
    tiny: Tiny, tmp_path: Path, victim: str, sent: str, code: int
) -> None:
    """A stop is agreed upon. Where one is killed the other one ends, too; and the run goes on from a checkpoint."""
    common = {"batch_size": 4, "lora": {"dropout": 0.0}, "budget": {"samples": 4000}, "validate_every": 400}
    stage = {"name": "warmup", "trainable": {"projector": "full"}, "lr": 5e-3, **common}
    recipe, run = write(tiny.transfer_recipe(stages=[stage]), tmp_path), tmp_path / "run"
    process = start("transfer", recipe, "trainer.devices=2", "trainer.strategy=ddp", "trainer.checkpoint_every=5", "-o",
                    str(run), "--device", "cpu")  # fmt: skip
    wait_until(lambda: (run / "checkpoints").exists() and any((run / "checkpoints").glob("0*")), process)
    (second,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    if victim == "second" and sent == "SIGTERM":
        before = max((run / "checkpoints").glob("0*"))
        os.kill(second, signal.SIGUSR1)
        wait_until(lambda: max((run / "checkpoints").glob("0*")) > before, process)
    os.kill(second if victim == "second" else process.pid, signal.Signals[sent])
    _, said = process.communicate(timeout=100)  # the second one has the same stderr
    assert process.returncode == code, said[-3000:]
    assert "Traceback" not in said
    if code > 0:
        assert said.count("error: ") == 1
        assert "stopped by SIGTERM" in said if sent == "SIGTERM" else "a process that trains along is gone" in said
        assert "--resume" in said
    found = Checkpoints(run / "checkpoints").load()
    assert found is not None
    assert 0 < found.progress.update < 1000


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"it ended early: {process.communicate()}")
        time.sleep(0.02)


def test_sigusr1_ends_no_command_that_does_not_train(tmp_path: Path) -> None:
    """It reaches itself while the recipe is read."""
    sends = "import os, signal, vpgtrans.recipe as r; load = r.load_recipe\n"
    sends += "r.load_recipe = lambda *a: (os.kill(os.getpid(), signal.SIGUSR1), load(*a))[1]"
    process = start("validate", str(tmp_path / "none.yaml"), before=sends)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert "SIGUSR1: no stage is training" in said


# --- beginning, and owning ------------------------------------------------------------------------


def test_a_kill_while_a_run_begins_leaves_nothing_that_is_in_the_way(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every operation on files in turn, of a first run and of one that takes another's place."""
    recipe, run = tiny.transfer_recipe(), tmp_path / "run"
    names = ("replace", "unlink", "rmdir", "mkdir")
    for overwrite in (False, True):
        for last in range(100):
            shutil.rmtree(run, ignore_errors=True)
            if overwrite:
                create_run(recipe, run, resume=False)
                (run / "vlm").mkdir()
                (run / "summary.json").write_text("{}")
            left = last
            with monkeypatch.context() as patch:

                def killed(*arguments: Any, call: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Crash
                    return call(*arguments, **options)

                for name in names:
                    call = getattr(os, name)
                    patch.setattr(os, name, lambda *a, call=call, **o: killed(*a, call=call, **o))
                try:
                    create_run(recipe, run, resume=False)
                except Crash:
                    ended = True
                else:
                    ended = False
            there = (run / "recipe.yaml").exists() and not (run / ".beginning").exists()
            check_run(recipe, run, resume=there, overwrite=False)
            create_run(recipe, run, resume=there)
            assert not (run / ".beginning").exists()
            if not ended:
                assert not (run / "summary.json").exists()
                break
        assert last > 3
        assert not ended


def test_one_process_at_a_time_writes_a_run(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.transfer(tiny.transfer_recipe(stages=[WARMUP]), output=run, device="cpu")
    hold = "import sys, time; from pathlib import Path; from vpgtrans.files import alone\n"
    hold += "with alone(Path(sys.argv[1]), busy=''): print('held', flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(run / ".lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(OutputError, match="another process is writing this run"):
            runs.transfer(tiny.transfer_recipe(stages=[WARMUP]), output=run, resume=True, device="cpu")
    finally:
        holder.kill()
        holder.wait()
    with RunDirectory(run).owned(), alone(run / ".other", busy=""):
        pass


# --- what a resumed run may differ in ---------------------------------------------------------------


@pytest.fixture
def begun(tiny: Tiny, tmp_path: Path) -> Path:
    """A run with data of its own."""
    write_captions(tmp_path / "here/captions.parquet", count=16)
    runs.transfer(own_data(tiny, tmp_path / "here"), output=tmp_path / "run", device="cpu")
    return tmp_path / "run"


def own_data(tiny: Tiny, folder: Path, **changes: Any) -> Recipe:
    data = {"train": [{"dataset": str(folder / "captions.parquet")}], "validation": [{"dataset": str(tiny.validation)}]}
    return tiny.transfer_recipe(**({"data": data, "stages": [WARMUP]} | changes))


def test_it_goes_on_on_another_machine(
    tiny: Tiny, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere lie the run, its data, its models and its cache; and threads, workers and loggers are others."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(begun, elsewhere / "run")
    for name in ("target-llm", "source/vlm"):
        shutil.copytree(tiny.root / name, elsewhere / name)
    elsewhere_data = elsewhere / "data/captions.parquet"
    elsewhere_data.parent.mkdir()
    shutil.copyfile(tmp_path / "here/captions.parquet", elsewhere_data)  # with another time
    monkeypatch.setenv("VPGTRANS_CACHE", str(elsewhere / "cache"))
    recipe = own_data(
        tiny,
        elsewhere_data.parent,
        source={"vpg": str(elsewhere / "source")},
        target={"llm": str(elsewhere / "target-llm")},
        trainer={"precision": "auto" if torch.get_default_dtype() is None else "fp32", "threads": 1,
                 "checkpoint_every": 1},
        evaluation={"samples": 2, "max_new_tokens": 2},
        stages=[WARMUP | {"micro_batch_size": 2}],
    )  # fmt: skip
    runs.transfer(recipe, output=elsewhere / "run", resume=True, device="cpu")
    ours, theirs = ((run / "vlm/projector/model.safetensors").read_bytes() for run in (begun, elsewhere / "run"))
    assert ours == theirs


@pytest.mark.parametrize("change", ["rows", "content", "llm", "vpg", "missing run"])
def test_changed_inputs_are_refused_by_name(
    tiny: Tiny, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Before a model is opened."""
    recipe = own_data(tiny, tmp_path / "here")
    data = tmp_path / "here/captions.parquet"
    changed = "has changed since the run was begun"
    saying = {
        "rows": rf"data\.train\.0: .*captions\.parquet {changed} \(16 rows then, 17 now\)",
        "content": rf"data\.train\.0: .*captions\.parquet {changed} \(its content is another\)",
        "llm": rf"target\.llm: .*other {changed} \(it was .*target-llm then\)",
        "vpg": rf"source\.vpg: .*other {changed} \(it was .*source then\)",
        "missing run": "holds no run to resume",
    }[change]
    if change == "rows":
        write_captions(data, count=17)
    elif change == "content":
        write_captions(data, count=16, unreadable={15})
    elif change == "llm":
        shutil.copytree(tiny.target_llm, tmp_path / "other")
        (tmp_path / "other/config.json").write_text((tmp_path / "other/config.json").read_text() + " ")
        recipe = own_data(tiny, tmp_path / "here", target={"llm": str(tmp_path / "other")})
    elif change == "vpg":
        shutil.copytree(tiny.source / "vlm", tmp_path / "other")
        manifest = tmp_path / "other/manifest.json"
        manifest.write_text(manifest.read_text() + " ")
        recipe = own_data(tiny, tmp_path / "here", source={"vpg": str(tmp_path / "other")})
    monkeypatch.setattr("vpgtrans.runs.journey.source_of", lambda *_: pytest.fail("a model was opened"))
    output = begun if change != "missing run" else tmp_path / "none"
    with pytest.raises(OutputError, match=saying):
        runs.transfer(recipe, output=output, resume=True, device="cpu")


def test_keys_that_matter_are_refused_by_name(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    other = own_data(tiny, tmp_path / "here", stages=[WARMUP | {"lr": 2e-3}], seed=3)
    result = CliRunner().invoke(cli, ["transfer", write(other, tmp_path), "-o", str(begun), "--resume"])
    assert result.exit_code == 2
    assert "(differs in seed, stages.0.lr)" in result.stderr


def test_a_run_that_the_guard_stopped_may_go_on_with_a_higher_limit(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    more = {**own_data(tiny, tmp_path / "here").trainer.model_dump(), "guard": {"max_skipped": 30}}
    check_run(own_data(tiny, tmp_path / "here", trainer=more), begun, resume=True, overwrite=False,
              may_differ=(*MACHINES_OWN, *BY_CONTENT))  # fmt: skip
    other = {**more, "guard": {"spike": 20.0}}
    with pytest.raises(OutputError, match=r"differs in trainer\.guard\.spike"):
        check_run(own_data(tiny, tmp_path / "here", trainer=other), begun, resume=True, overwrite=False,
                  may_differ=(*MACHINES_OWN, *BY_CONTENT))  # fmt: skip
