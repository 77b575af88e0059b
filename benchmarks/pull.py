"""How long does a pull take, beside curl and sha256sum?

    python benchmarks/pull.py [--bytes 1000000000] [--repeats 7] [--output results/pull.json]
    python benchmarks/pull.py --bytes 1000000 --repeats 1      # to try it

One safetensors file from a web server on loopback (a process of its own, sendfile) to the same disk. `pull` counts,
hashes, flushes to the disk and looks at the header; `curl` writes and `sha256sum` reads it again. They take turns, in
an order that alternates, and a turn of each makes a ratio: curl's and sha256sum's seconds by pull's. Before each the
disk's queue is emptied, and what the one before wrote is removed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vpgtrans.references import file_sha256
from vpgtrans.registry.entry import Entry, FileEntry
from vpgtrans.registry.pull import pull

RESULTS = Path(__file__).parent / "results" / "pull.json"
NAME = "model.safetensors"


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with suppress(OSError):
            self.connection.sendfile(source)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def serve(directory: str, ports: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=directory))
    ports.put(server.server_port)
    server.serve_forever()


def write_model(path: Path, size: int) -> None:
    """A safetensors file of random bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for place in range(0, size, 1 << 24):
            file.write(os.urandom(min(1 << 24, size - place)))


def entry_of(path: Path, url: str) -> Entry:
    listed = FileEntry(path=NAME, size=path.stat().st_size, sha256=file_sha256(path))
    return Entry.model_validate(
        {
            "id": "large",
            "version": "1",
            "kind": "projector",
            "description": "Random bytes.",
            "locations": (url,),
            "files": (listed,),
            "base": {"llm": {"reference": "none", "width": 1, "vocabulary": 1, "tokenizer_sha256": "0" * 64}},
            "interface": {"visual_tokens": 1, "width": 1, "image_size": 1, "prompt": ""},
            "licence": {"spdx": "CC0-1.0"},
        }
    )


def by_pull(wanted: Entry, directory: Path) -> float:
    os.environ["VPGTRANS_CACHE"] = str(directory / "cache")
    before = time.perf_counter()
    pull(wanted, index=str(directory / "index.yaml"))
    return time.perf_counter() - before


def by_curl(wanted: Entry, directory: Path) -> float:
    url, (file,) = f"{wanted.locations[0]}/{NAME}", wanted.files
    directory.mkdir()
    command = f"curl -sSf -o {NAME} {url} && sha256sum {NAME}"
    before = time.perf_counter()
    printed = subprocess.run(command, shell=True, cwd=directory, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - before
    if printed.split()[0] != file.sha256:
        raise RuntimeError("curl got another file")
    return seconds


def measure(size: int, repeats: int, home: Path) -> dict[str, Any]:
    source = home / "source"
    source.mkdir()
    write_model(source / NAME, size)
    context = get_context("spawn")
    ports = context.SimpleQueue()
    server = context.Process(target=serve, args=(str(source), ports), daemon=True)
    server.start()
    try:
        wanted = entry_of(source / NAME, f"http://127.0.0.1:{ports.get()}")
        ways = {"pull": by_pull, "curl": by_curl}
        seconds: dict[str, list[float]] = {"pull": [], "curl": []}
        for turn in range(repeats):
            for way in ("pull", "curl") if turn % 2 == 0 else ("curl", "pull"):
                os.sync()
                seconds[way].append(ways[way](wanted, home / way))
                shutil.rmtree(home / way)
    finally:
        server.terminate()
        server.join()
    ratios = [curl / ours for curl, ours in zip(seconds["curl"], seconds["pull"], strict=True)]
    return {
        "bytes": wanted.size,
        "seconds": {way: [round(value, 3) for value in values] for way, values in seconds.items()},
        "curl_by_pull": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a JSON file; default: print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        result = measure(arguments.bytes, arguments.repeats, Path(home))
    result |= {
        "load": [round(value, 2) for value in os.getloadavg()],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
