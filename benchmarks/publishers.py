"""Eight publishers at once on one index, some of them killed: is anything lost, doubled, or ever not valid?

    python benchmarks/publishers.py --output results/publishers.json

Each publisher is a process of its own that writes its entries' files to a directory and names them in the index, the
last two steps of `vpgtrans registry publish`; the steps before touch nothing that is shared. At random moments one is
killed with SIGKILL and started anew; it goes on with the first entry that it has not yet reported. Meanwhile another
process reads the index all the time. What a publisher has reported must be in the index once; what it was killed in may
be there or not, and is there once after it was tried again. `kills` says in which step each one came.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from vpgtrans.errors import RegistryError
from vpgtrans.registry import edit
from vpgtrans.registry.describe import describe_files
from vpgtrans.registry.entry import Entry
from vpgtrans.registry.index import load_index
from vpgtrans.registry.pull import pull
from vpgtrans.registry.stores import location_of, open_store

BASE = {"llm": {"reference": "pip:llm", "width": 8, "vocabulary": 9, "tokenizer_sha256": "a" * 64}}
INTERFACE = {"visual_tokens": 4, "width": 16, "image_size": 32, "prompt": "Repeat:<image>\nRepeat:"}


def publish_one(index: Path, who: int, number: int) -> None:
    """Files of its own into a directory, then their entry into the index."""
    step = index.parent / f"step-{who}"
    step.write_text("writing files")
    with tempfile.TemporaryDirectory(dir=index.parent) as scratch:
        directory = Path(scratch)
        (directory / "manifest.json").write_text(json.dumps({"publisher": who, "entry": number}))
        (directory / "README.md").write_text(f"# Publisher {who}, entry {number}\n" * 100)
        files = describe_files(directory)
        destination = location_of(index.parent / "out" / f"p{who}-{number}", index=str(index))
        location = open_store(destination, index=str(index)).write(directory, files)
    entry = Entry.model_validate({
        "id": f"p{who}-{number}", "version": "1.0.0", "kind": "vlm", "description": f"entry {number} of {who}",
        "locations": (location,), "files": files, "base": BASE, "interface": INTERFACE, "licence": {"spdx": "MIT"},
    })  # fmt: skip
    step.write_text("waiting for the index, or changing it")
    try:
        edit.append(index, entry)
    except RegistryError:
        # it was killed between writing the entry and reporting it
        if load_index(str(index)).entry(entry.name) != entry:
            raise


def publisher(index: Path, who: int, entries: int) -> None:
    """Publish what this one has not yet reported, a line of its report each."""
    report = index.parent / f"reported-{who}"
    done = len(report.read_text().split()) if report.exists() else 0
    for number in range(done, entries):
        publish_one(index, who, number)
        (index.parent / f"step-{who}").write_text("reporting")
        with report.open("a") as file:
            file.write(f"p{who}-{number}\n")
            file.flush()
            os.fsync(file.fileno())


def reader(index: Path) -> None:
    """Read the index until told to stop; report how often, and how often it was not valid or lost an entry."""
    looks, wrong, seen = 0, 0, set()
    while not (index.parent / "stop").exists():
        if index.exists():
            looks += 1
            try:
                names = {entry.name for entry in load_index(str(index))}
                wrong += not seen <= names
                seen = names
            except RegistryError as error:
                wrong += 1
                print(error, file=sys.stderr)
    print(json.dumps({"looks": looks, "wrong": wrong}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishers", type=int, default=8)
    parser.add_argument("--entries", type=int, default=25, help="of each publisher")
    parser.add_argument("--kills", type=int, default=60, help="at most; they end when the publishers have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--as", dest="role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        role, place, *numbers = arguments.role
        reader(Path(place)) if role == "reader" else publisher(Path(place), *map(int, numbers))
        return
    with tempfile.TemporaryDirectory() as home:
        os.environ["VPGTRANS_CACHE"] = f"{home}/cache"
        result = measure(Path(home) / "shared" / "checkpoints_registry.yaml", arguments)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")
    if result["lost"] or result["duplicated"] or result["reads_not_valid"] or result["pulled_wrong"]:
        sys.exit("failed: see above")


def start(index: Path, *role: object) -> "subprocess.Popen[str]":
    if role[0] == "publisher":
        (index.parent / f"step-{role[1]}").write_text("starting")
    command = [sys.executable, __file__, "--as", str(role[0]), str(index), *map(str, role[1:])]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE if role[0] == "reader" else None)


def measure(index: Path, arguments: argparse.Namespace) -> dict[str, object]:
    index.parent.mkdir()
    draw = random.Random(arguments.seed)
    begun = time.perf_counter()
    looking = start(index, "reader")
    running = {who: start(index, "publisher", who, arguments.entries) for who in range(arguments.publishers)}
    kills: Counter[str] = Counter()
    failed = 0
    while running:
        time.sleep(draw.uniform(0.05, 0.5))
        begun_to = [who for who in running if (index.parent / f"step-{who}").read_text() != "starting"]
        for who, process in list(running.items()):
            if process.poll() is not None:
                failed += process.returncode != 0
                del running[who]
        victims = sorted(who for who in begun_to if who in running)
        if victims and kills.total() < arguments.kills:
            who = draw.choice(victims)
            running[who].send_signal(signal.SIGKILL)
            if running[who].wait() == -signal.SIGKILL:
                kills[(index.parent / f"step-{who}").read_text() or "between two steps"] += 1
                running[who] = start(index, "publisher", who, arguments.entries)
    seconds = time.perf_counter() - begun
    (index.parent / "stop").touch()
    looks = json.loads(looking.communicate()[0])
    wanted = {f"p{who}-{number}" for who in range(arguments.publishers) for number in range(arguments.entries)}
    entries = load_index(str(index)).entries
    found = Counter(entry.id for entry in entries)
    return {
        "publishers": arguments.publishers,
        "entries_each": arguments.entries,
        "kills": dict(kills),
        "publishers_that_failed": failed,
        "lost": len(wanted - set(found)),
        "duplicated": sum(count > 1 for count in found.values()),
        "of_nobody": len(set(found) - wanted),
        "reads": looks["looks"],
        "reads_not_valid": looks["wrong"],
        "pulled_wrong": sum(not pull(entry, index=str(index)).is_dir() for entry in entries),
        "seconds": round(seconds, 1),
        "index_bytes": index.stat().st_size,
    }


if __name__ == "__main__":
    main()
