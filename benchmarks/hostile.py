"""What can a hostile index, file, link or server do to somebody who pulls?

    python benchmarks/hostile.py [--cases 900] [--seed 0] [--output results/hostile.json]
    python benchmarks/hostile.py --cases 11      # to try it

Each case is `vpgtrans registry pull NAME --index INDEX` in this process, drawn at random from a family: an index that
names paths or locations it must not, a damaged index, YAML that explodes or has tags, wrong sizes and hashes, pickles
and damaged headers under the name of safetensors, links among the files, links in the cache's way, a web server that
misbehaves, and answers at random from what calls itself a web server, an OCI registry or S3.

Counted are escapes (anything outside the cache that was made or changed, and files opened for writing elsewhere),
executions (a program started, a pickle loaded, a payload that ran), hangs (longer than --longest seconds), wrong files
(a pull that succeeds with others than the index says), half-done checkpoints that are to be seen, and crashes (anything
but the exit codes 0, 1, 2 and 4). Servers may be silent for 0.2 seconds, and the waits between tries are 20 ms.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from commands import invoke
from entries import entry, safetensors, write
from servers import HARMLESS, HTTP_WAYS, HttpServer, http_server

from vpgtrans.registry.entry import Entry
from vpgtrans.registry.pull import pull
from vpgtrans.registry.stores import limits

RESULTS = Path(__file__).parent / "results" / "hostile.json"
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class")
CODES = (0, 1, 2, 4)


@dataclass
class Case:
    """What is pulled, and how it may end."""

    text: bytes
    """Of the index."""
    files: Mapping[str, bytes]
    """What is right if the pull succeeds; without any it must not."""
    codes: tuple[int, ...]
    name: str = "owl"
    prepare: Callable[[], None] = lambda: None


@dataclass
class Watch:
    """What this process starts and where it writes, while it is `on`."""

    allowed: Path = Path("/nowhere")
    on: bool = False
    started: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in STARTS:
            self.started.append(f"{event} {arguments[:1]}")
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            place, writes = arguments[0], arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            # A relative one is opened below a directory that was opened before; the tree's comparison sees those.
            if writes and os.path.isabs(place) and place != os.devnull and not place.startswith(str(self.allowed)):
                self.written.append(place)


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@dataclass
class Sandbox:
    """A directory a case: the cache in it may change, the rest must not."""

    home: Path
    server: HttpServer
    draw: random.Random

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def canary(self) -> Path:
        return self.home / "outside" / "executed"

    def index(self, right: Mapping[str, bytes], /, *locations: str, **changes: Any) -> bytes:
        values = json.loads(entry(right, locations or (f"{self.server.url}/plain",)).model_dump_json())
        return json.dumps({"format_version": 2, "entries": [values | changes]}).encode()

    def some_files(self) -> dict[str, bytes]:
        sizes = (0, 1, 100, 70_000, 400_000)
        files = {"manifest.json": b"{}", "model.safetensors": safetensors(self.draw.choice(sizes))}
        if self.draw.random() < 0.5:
            files["deep/er/config.json"] = self.draw.randbytes(self.draw.choice(sizes))
        self.server.files = dict(files)
        return files

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Everything outside the cache."""
        found = {}
        for path in sorted(self.home.rglob("*")):
            if not path.is_relative_to(self.cache):
                content = b""
                if path.is_symlink():
                    content = os.readlink(path).encode()
                elif path.is_file():
                    content = path.read_bytes()
                found[str(path)] = (path.lstat().st_mode, hashlib.sha256(content).digest())
        return found


# --- families -----------------------------------------------------------------------------------

ODD_PARTS = (
    "..", ".", "", "/", "~", "C:", "c:\\x", "\\\\host\\share", "\0", "\n", "\u202e", "CON", "a ", " a", "a.", "%2e%2e",
    "..\\..", "x" * 300, "\ud800", "$HOME", "`touch x`", "-rf", "../" * 9, "outside", "é", "a:b", "/etc/passwd",
)  # fmt: skip


def paths(box: Sandbox) -> Case:
    """A file's path that leads out, or that no system has."""
    files = box.some_files()
    path = "/".join(box.draw.choices(ODD_PARTS, k=box.draw.randint(1, 4)))
    path += box.draw.choice(("", ".json", ".safetensors", ".py", ".pkl"))
    listed = json.loads(box.index(files))["entries"][0]["files"]
    listed[-1]["path"] = path
    out = {"", ".", ".."} & set(path.split("/")) or set(path) & set("\\:\0\n\u202e\ud800")
    return Case(box.index(files, files=listed), {}, (2,) if out else (1, 2, 4))


def locations(box: Sandbox) -> Case:
    """A location that leads out or is none."""
    files = box.some_files()
    write(box.home / "outside" / "files", files)
    odd = (
        "../outside/files", str(box.home / "outside" / "files"), "near/../../outside/files", "linked", "near/linked",
        "http://user:word@127.0.0.1/x", "http:", "http://[", "http://127.0.0.1:99999/", "http://127.0.0.1:1/",
        "file://127.0.0.1/etc", "file:etc", "file:///proc/self/fd", "file:///dev", "ftp://127.0.0.1/x", "javascript:x",
        "::memory://x", "zip://x::file:///x", "memory://x::file:///etc", "simplecache::http://x", "data:,x", "near\0",
        "oci:", "oci:x", "oci:127.0.0.1:1/x", "hf:../x", "hf:a/b/c", "s3://../x", "", " ",
    )  # fmt: skip
    (box.home / "linked").symlink_to(box.home / "outside" / "files")
    (box.home / "near").mkdir()
    (box.home / "near" / "linked").symlink_to(box.home / "outside")
    location = box.draw.choice(odd)
    return Case(box.index(files, locations=[location]), {}, (1, 2, 4))


def damaged_index(box: Sandbox) -> Case:
    """A right index with some bytes that are others, fewer or more."""
    files = box.some_files()
    text = bytearray(box.index(files))
    for _ in range(box.draw.choice((1, 1, 2, 8))):
        place = box.draw.randrange(len(text))
        match box.draw.randrange(4):
            case 0:
                text[place] = box.draw.randrange(256)
            case 1:
                del text[place : place + box.draw.randint(1, 40)]
            case 2:
                odd = (b'"', b"{", b"[", b"*a", b"\0", b"\xff", b"&a ", b"!!python/name:os.system ")
                text[place:place] = box.draw.choice(odd)
            case _:
                other = box.draw.randrange(len(text))
                text[place:place] = text[other : other + box.draw.randint(1, 200)]
    return Case(bytes(text), files, CODES)


def yaml(box: Sandbox) -> Case:
    """What makes a parser's life short."""
    files = box.some_files()
    right = box.index(files).decode()
    depth = box.draw.choice((50, 5000, 100_000))
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    texts = (
        bomb + "format_version: 2\nentries: []\n",
        "format_version: 2\nentries: " + "[" * depth,
        "format_version: 2\nentries: " + "[" * depth + "]" * depth,
        "format_version: 2\nentries: !!python/object/apply:os.system ['touch " + str(box.canary) + "']\n",
        "format_version: 2\nentries:\n  - &x\n    <<: *x\n",
        right.replace('"id": "owl"', '"id": "owl", "id": "owl"'),
        right.replace('"format_version": 2', '"format_version": 2, "format_version": 2'),
        right + "\n---\n" + right,
        "%YAML 9.9\n---\n" + right,
        "%TAG ! tag:x,2000:\n---\n" + right.replace("[", "!x [", 1),
        right.replace('"1.0"', "1.0"),
        right.replace('"1.0"', "2020-01-01"),
        right.replace('"owl"', "yes"),
        "? [a, b]\n: c\n",
        "format_version: 1" + "0" * 100_000,
        "x" * (17 << 20),
        "\ufeff" * 9 + right,
        right.replace(": ", ":\t"),
        "",
        "\0",
    )
    text = box.draw.choice(texts)
    return Case(text.encode(), files if text.endswith(right) or "\t" in text else {}, CODES)


def claims(box: Sandbox) -> Case:
    """Sizes and hashes that are of other files."""
    files = box.some_files()
    listed = json.loads(box.index(files))["entries"][0]["files"]
    one = box.draw.choice(listed)
    if box.draw.random() < 0.5:
        one["size"] = max(0, one["size"] + box.draw.choice((-1, 1, -70_000, 70_000, 1 << 40, 1 << 62)))
    else:
        one["sha256"] = hashlib.sha256(box.draw.randbytes(8)).hexdigest()
    right = files[one["path"]]
    wrong = hashlib.sha256(right).hexdigest() != one["sha256"] or len(right) != one["size"]
    # What no disk has room for is refused before a file is asked for, and what is no size at all before that.
    huge = one["size"] > 1 << 39
    codes = (1, 2) if huge else (4,) if wrong else (0,)
    return Case(box.index(files, files=listed), {} if wrong else files, codes)


def contents(box: Sandbox) -> Case:
    """Files that the index is right about, and that are no safetensors."""
    pickled = pickle.dumps(Payload(box.canary), protocol=box.draw.choice((0, 2, 4)))
    good = bytearray(safetensors(1000))
    overlapping = json.dumps(
        {name: {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]} for name in ("a", "b")}
    ).encode()  # fmt: skip
    bad = (
        pickled,
        b"PK\x03\x04" + pickled,
        len(pickled).to_bytes(8, "little") + pickled,
        (1 << 31).to_bytes(8, "little") + b"{" + bytes(100),
        ((1 << 63) - 1).to_bytes(8, "little") + b"{}",
        len(overlapping).to_bytes(8, "little") + overlapping + bytes(9),
        bytes(good[:-1]),
        bytes(good) + b"x",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
        b"",
        b"\x1f\x8b\x08" + bytes(50),
    )
    draw = box.draw.randrange(len(bad) + 6)
    if draw < len(bad):
        content, files_right = bad[draw], False
    else:
        header = int.from_bytes(good[:8], "little")
        for _ in range(box.draw.choice((1, 3))):
            good[box.draw.randrange(8 + header)] = box.draw.randrange(256)
        content, files_right = bytes(good), True
    files = {"manifest.json": b"{}", "model.safetensors": content}
    box.server.files = dict(files)
    return Case(box.index(files), files if files_right else {}, CODES if files_right else (4,))


def links(box: Sandbox) -> Case:
    """A directory whose files are links, pipes or directories."""
    files = box.some_files()
    near, outside = write(box.home / "near", files), write(box.home / "outside" / "files", files)
    path = box.draw.choice([*files, "deep", "."] if "deep/er/config.json" in files else list(files))
    target = near / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    match box.draw.randrange(4):
        case 0 if path not in ("deep", "."):
            os.mkfifo(target)
        case 1 if path not in ("deep", "."):
            target.mkdir()
        case _:
            target.symlink_to(outside / path)
    return Case(box.index(files, "near"), {}, (4,))


def cache_links(box: Sandbox) -> Case:
    """A link somewhere on the way of a pull."""
    files = box.some_files()
    text, made = box.index(files), box.cache
    seen: set[str] = set()
    one = Entry.model_validate(json.loads(text)["entries"][0])
    pull(one, index=str(box.home / "index.yaml"), progress=lambda _: seen.update(map(str, made.rglob("*"))))
    seen.update(map(str, made.rglob("*")))
    outside = write(box.home / "outside" / "files", files)

    def plant() -> None:
        shutil.rmtree(made)
        place = Path(box.draw.choice(sorted(seen)))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(box.draw.choice((outside, outside / "manifest.json", outside / "absent", Path("/"))))

    return Case(text, files, CODES, prepare=plant)


def http_ways(box: Sandbox) -> Case:
    """A web server that misbehaves in a way of `tests/servers.py`."""
    files, way = box.some_files(), box.draw.choice(HTTP_WAYS)
    return Case(box.index(files, f"{box.server.url}/{way}"), files if way in HARMLESS or way == "drip" else {}, CODES)


def http_answers(box: Sandbox) -> Case:
    """A web server that answers at random."""
    files = box.some_files()
    return Case(box.index(files, f"{box.server.url}/fuzz"), files, CODES)


def other_stores(box: Sandbox) -> Case:
    """Answers at random, from what calls itself a registry or S3."""
    files = box.some_files()
    host = f"127.0.0.1:{box.server.server_port}"
    return Case(box.index(files, box.draw.choice((f"oci:{host}/team/owl:1.0", "s3://bucket/owl"))), files, CODES)


FAMILIES: tuple[Callable[[Sandbox], Case], ...] = (
    paths, locations, damaged_index, yaml, claims, contents, links, cache_links, http_ways, http_answers, other_stores,
)  # fmt: skip


# --- running ------------------------------------------------------------------------------------


@contextlib.contextmanager
def alarmed(seconds: float) -> Iterator[None]:
    """TimeoutError in here after so long."""

    def ring(*_: Any) -> None:
        faulthandler.dump_traceback()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def half_done(cache: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a checkpoint is to be seen that is not whole."""
    home = cache / "registry"
    if not home.is_dir() or home.is_symlink():
        return False
    seen = [path for path in home.iterdir() if path.name != ".pulling" and not path.is_symlink()]
    return any(found(path) != dict(files) for path in seen)


def found(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def run_case(family: Callable[[Sandbox], Case], box: Sandbox, watch: Watch, *, longest: float) -> dict[str, Any]:
    """What became of one case."""
    write(box.home / "outside", {"kept.json": b"kept"})
    os.environ |= {"VPGTRANS_CACHE": str(box.cache), "HOME": str(box.home), "AWS_ENDPOINT_URL": box.server.url}
    case = family(box)
    case.prepare()
    index = box.home / "index.yaml"
    index.write_bytes(case.text)
    before = box.tree()
    watch.allowed, watch.started, watch.written, watch.on = box.cache, [], [], True
    began = time.monotonic()
    try:
        with alarmed(longest):
            result = invoke("registry", "pull", case.name, "--index", index)
    finally:
        watch.on = False
    seconds = time.monotonic() - began
    code, said = result.exit_code, result.output
    crashed = code not in CODES or (result.exception is not None and not isinstance(result.exception, SystemExit))
    right = code != 0 or (bool(case.files) and found(Path(result.stdout.strip().splitlines()[-1])) == dict(case.files))
    return {
        "family": family.__name__,
        "code": code,
        "seconds": seconds,
        "escaped": before != box.tree() or bool(watch.written),
        "executed": bool(watch.started) or box.canary.exists(),
        "hung": seconds > longest,
        "crashed": crashed and seconds <= longest,
        "wrong": not right or (not crashed and code not in case.codes),
        "half_done": half_done(box.cache, case.files),
        "detail": f"{said[-500:]} {result.exception!r} {watch.started} {watch.written} expected {case.codes}",
    }


COUNTED = ("escaped", "executed", "hung", "crashed", "wrong", "half_done")


def measure(cases: int, seed: int, longest: float) -> dict[str, Any]:
    limits._WAITS = (0.02, 0.02, 0.02)
    os.environ |= {"VPGTRANS_STORE_TIMEOUT": "0.2", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "secretsecret"}
    os.environ.pop("VPGTRANS_REGISTRY", None)
    watch = Watch()
    sys.addaudithook(watch)
    rows = []
    with tempfile.TemporaryDirectory() as root, http_server({}) as server:
        for number in range(-len(FAMILIES), cases):  # a round first in which libraries are loaded
            family = FAMILIES[number % len(FAMILIES)]
            home = Path(root) / str(number)
            home.mkdir()
            server.random = random.Random(f"{seed} {number}")
            row = run_case(family, Sandbox(home, server, random.Random(f"{number} {seed}")), watch, longest=longest)
            shutil.rmtree(home)
            if number >= 0:
                rows.append(row)
                for what in COUNTED:
                    if row[what]:
                        print(f"case {number} {what}: {row['family']}: {row['detail']}", file=sys.stderr)
    families = {}
    for family in FAMILIES:
        of = [row for row in rows if row["family"] == family.__name__]
        codes = Counter(str(row["code"]) for row in of)
        families[family.__name__] = {"cases": len(of), "exit_codes": dict(sorted(codes.items()))}
    return {
        "cases": len(rows),
        "seed": seed,
        **{what: sum(row[what] for row in rows) for what in COUNTED},
        "longest_seconds": round(max((row["seconds"] for row in rows), default=0.0), 2),
        "families": families,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds after which a case counts as hanging")
    parser.add_argument("--output", type=Path, help="a JSON file; default: print only")
    arguments = parser.parse_args()
    result = measure(arguments.cases, arguments.seed, arguments.longest)
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(result[what] for what in COUNTED))


if __name__ == "__main__":
    main()
