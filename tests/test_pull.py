"""Pulling: whole or not at all, resumed, once for all processes, and never outside the cache."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import invoke
from entries import FILES, entry, safetensors, write
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import HARMLESS, HTTP_WAYS, HttpServer, http_server

from vpgtrans.errors import IntegrityError, MachineError, RegistryError, StoreError
from vpgtrans.references import resolve
from vpgtrans.registry.entry import Entry
from vpgtrans.registry.pull import at_hand, pull
from vpgtrans.registry.stores import limits

LARGE = {"model.safetensors": safetensors(8 << 20)}
INTEGRITY = frozenset({"shorter", "longer", "endless", "other"})
"""Ways of serving after which it is known that the files are others."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(limits, "_WAITS", (0.01, 0.01, 0.01))


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with http_server(FILES) as server:
        yield server


@pytest.fixture
def index(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints_registry.yaml")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def visible(cache: Path) -> list[str]:
    """Checkpoints that somebody who looks into the cache takes for whole."""
    home = cache / "registry"
    return sorted(path.name for path in home.iterdir() if path.name != ".pulling") if home.exists() else []


# --- whole or not at all ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", *HTTP_WAYS])
def test_whatever_a_server_does_the_files_are_right_or_absent(way, server, index, own_cache, monkeypatch):
    before = time.monotonic()
    wanted = entry(FILES, [f"{server.url}/{way}"])
    if way in {"plain", *HARMLESS}:
        assert contents(pull(wanted, index=index)) == FILES
    else:
        monkeypatch.setenv("VPGTRANS_STORE_TIMEOUT", "0.4")
        with pytest.raises(IntegrityError if way in INTEGRITY else StoreError, match=r"owl@1\.0 can't be pulled"):
            pull(wanted, index=index)
        assert visible(own_cache) == []
        assert at_hand(wanted) is None
    assert time.monotonic() - before < 20


def test_what_is_there_needs_no_network(server, index, own_cache):
    wanted = entry(FILES, [f"{server.url}/plain"])
    path = pull(wanted, index=index)
    asked = len(server.asked)
    assert pull(wanted, index=index) == at_hand(wanted) == path
    assert len(server.asked) == asked
    assert visible(own_cache) == [path.name]
    assert list((own_cache / "registry" / ".pulling").glob("*/")) == []


def test_entries_of_one_name_with_other_files_lie_side_by_side(server, index):
    ours = pull(entry(FILES, [f"{server.url}/plain"]), index=index)
    server.files["manifest.json"] = b"{}"
    theirs = pull(entry({**FILES, "manifest.json": b"{}"}, [f"{server.url}/plain"]), index=index)
    assert contents(ours) == FILES
    assert contents(theirs)["manifest.json"] == b"{}"


def test_a_damaged_copy_is_mended_with_what_is_missing_alone(server, index, caplog):
    wanted = entry(FILES, [f"{server.url}/plain"])
    path = pull(wanted, index=index)
    server.asked.clear()
    (path / "manifest.json").write_bytes(b'{"format_version": 2}')
    assert contents(pull(wanted, index=index)) == FILES
    assert "damaged" in caplog.text
    assert server.asked == ["/plain/manifest.json"]
    (path / "projector" / "model.safetensors").unlink()
    server.shutdown()
    server.server_close()
    with pytest.raises(StoreError):
        pull(wanted, index=index)


def test_locations_are_tried_in_order(server, index, tmp_path):
    write(tmp_path / "near", FILES)
    locations = ["nowhere", f"{server.url}/other", "near", f"{server.url}/plain"]
    assert contents(pull(entry(FILES, locations), index=index)) == FILES
    assert all(path.startswith("/other/") for path in server.asked)


def test_what_one_location_began_another_ends(server, index):
    """Half of a file from a server that breaks off is not asked of the next one again."""
    server.files |= LARGE
    wanted = entry(LARGE, [f"{server.url}/truncate", f"{server.url}/plain"])
    assert contents(pull(wanted, index=index)) == LARGE
    (last,) = [place for place, path in enumerate(server.asked) if path == "/plain/model.safetensors"]
    assert server.headers_seen[last]["Range"] == f"bytes={len(LARGE['model.safetensors']) - 1}-"


def test_what_one_location_spoiled_another_sends_anew(server, index):
    """What lies here already is of another file, so the end alone doesn't mend it."""
    server.files |= LARGE
    with http_server({"model.safetensors": safetensors(8 << 20, fill=8)}) as other:
        wanted = entry(LARGE, [f"{other.url}/truncate", f"{server.url}/plain"])
        assert contents(pull(wanted, index=index)) == LARGE
    assert ["Range" in seen for seen in server.headers_seen] == [True, False]


def test_why_each_location_failed_is_said(server, index):
    with pytest.raises(IntegrityError) as caught:
        pull(entry(FILES, [f"{server.url}/missing", f"{server.url}/other", "nowhere"]), index=index)
    for said in ("404", "sha256", "nowhere"):
        assert said in str(caught.value)
    with pytest.raises(RegistryError, match="files of this machine"):
        pull(entry(FILES, ["file:///etc"]), index="https://example.org/index.yaml")


def test_weights_are_safetensors_whatever_they_are_called(server, index, own_cache):
    for content in (b"\x80\x04\x95pickled", b"PK\x03\x04zipped", (1 << 31).to_bytes(8, "little") + b"{}", b""):
        files = {"model.safetensors": content}
        server.files |= files
        with pytest.raises(IntegrityError, match=r"model\.safetensors"):
            pull(entry(files, [f"{server.url}/plain"]), index=index)
    assert visible(own_cache) == []


def test_a_size_that_no_disk_has_is_refused_before_a_byte_is_asked_for(server, index):
    honest = entry({"model.safetensors": b"x"}, [f"{server.url}/endless"])
    wanted = honest.model_copy(update={"files": (honest.files[0].model_copy(update={"size": 1 << 60}),)})
    with pytest.raises(MachineError, match="GB free"):
        pull(wanted, index=index)
    assert server.asked == []


def test_a_yanked_version_is_pulled_with_a_warning(server, index, caplog):
    pull(entry(FILES, [f"{server.url}/plain"], status="yanked", reason="learnt from the test split"), index=index)
    assert "yanked: learnt from the test split" in caplog.text


# --- interrupted, and several at once -----------------------------------------------------------

PULLING = """
import sys
sys.path.insert(0, sys.argv[1])
from vpgtrans.registry.entry import Entry
from vpgtrans.registry.pull import pull
print(pull(Entry.model_validate_json(sys.argv[2]), index=sys.argv[3]))
"""


def start(wanted: Entry, index: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", PULLING, here, wanted.model_dump_json(), index]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_after_a_kill_it_goes_on_from_there(server, index, own_cache):
    server.files |= LARGE
    wanted = entry(LARGE, [f"{server.url}/stall-inside"])
    process = start(wanted, index)
    size = wanted.size
    until = time.monotonic() + 60
    while not any(part.stat().st_size >= size // 2 for part in own_cache.rglob("part/*")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert visible(own_cache) == []
    server.asked.clear()
    server.headers_seen.clear()
    assert contents(pull(entry(LARGE, [f"{server.url}/plain"]), index=index)) == LARGE
    assert server.asked == ["/plain/model.safetensors"]
    assert server.headers_seen[0]["Range"] == f"bytes={size // 2}-"


def test_several_processes_pull_once(server, index, own_cache):
    server.files |= LARGE
    wanted = entry(LARGE, [f"{server.url}/plain"])
    processes = [start(wanted, index) for _ in range(3)]
    said = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert said == {str(at_hand(wanted))}
    assert server.asked == ["/plain/model.safetensors"]


def test_several_threads_pull_once(server, index):
    wanted = entry(FILES, [f"{server.url}/plain"])
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull(wanted, index=index))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(server.asked) == len(set(server.asked))


# --- nothing outside the cache ------------------------------------------------------------------


def parts_of(wanted: Entry, server: HttpServer, index: str, cache: Path) -> list[str]:
    """The directories and files that a pull of an entry makes on its way, relative to the cache."""
    made = set()

    def look(_: int) -> None:
        made.update(path.relative_to(cache).as_posix() for path in cache.rglob("*"))

    pull(wanted, index=index, progress=look)
    return sorted(made)


@pytest.mark.parametrize("kind", ["file", "directory", "dangling"])
def test_links_in_the_caches_way_are_not_followed(kind, server, index, tmp_path, monkeypatch):
    wanted = entry(FILES, [f"{server.url}/plain"])
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "first"))
    final = pull(wanted, index=index).relative_to(tmp_path / "first").as_posix()
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "second"))
    places = [*parts_of(wanted, server, index, tmp_path / "second"), final]
    assert len(places) > 8
    outside = write(tmp_path / "outside", {"kept.json": b"kept"})
    target = {"file": outside / "kept.json", "directory": outside, "dangling": outside / "absent"}[kind]
    for number, place in enumerate(places):
        cache = tmp_path / f"cache{number}"
        (cache / place).parent.mkdir(parents=True)
        (cache / place).symlink_to(target)
        monkeypatch.setenv("VPGTRANS_CACHE", str(cache))
        try:
            path = pull(wanted, index=index)
        except (IntegrityError, MachineError):
            path = None
        assert path is None or contents(path) == FILES
        assert contents(outside) == {"kept.json": b"kept"}


def test_the_cache_itself_may_be_a_link(server, index, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "linked"))
    pull(entry(FILES, [f"{server.url}/plain"]), index=index)
    assert visible(tmp_path / "disk")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["a", "b.json", "é", "a b", "x" * 200, "%2e%2e", "~", "-rf"]), min_size=1, max_size=5))
def test_odd_names_come_through(parts):
    files = {"/".join(parts) + "/f.json": b"content"}
    with (
        tempfile.TemporaryDirectory() as directory,
        pytest.MonkeyPatch.context() as patch,
        http_server(files) as server,
    ):
        patch.setenv("VPGTRANS_CACHE", directory)
        write(Path(directory) / "near", files)
        for location in (f"{server.url}/plain", "near"):
            path = pull(entry(files, [location]), index=f"{directory}/index.yaml")
            assert contents(path) == files
            shutil.rmtree(path)


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path, server: HttpServer) -> Path:
    """An index with entries that can be pulled, and that can't for each reason."""
    entries = {
        "owl": entry(FILES, [f"{server.url}/plain"]),
        "mouse": entry(FILES, [f"{server.url}/other"]),
        "bat": entry(FILES, [f"{server.url}/missing"]),
    }
    document = {
        "format_version": 2,
        "entries": [json.loads(one.model_copy(update={"id": id}).model_dump_json()) for id, one in entries.items()],
    }
    path = tmp_path / "checkpoints_registry.yaml"
    path.write_text(json.dumps(document))
    return path


def test_pull_prints_where_it_is(published, own_cache):
    result = invoke("registry", "pull", "owl", "--index", published)
    assert result.exit_code == 0
    assert contents(Path(result.stdout.strip())) == FILES
    again = json.loads(invoke("registry", "pull", "owl@1.0", "--index", published, "--json").stdout)
    assert again == {
        "name": "owl@1.0", "path": result.stdout.strip(), "files": 3, "bytes": sum(map(len, FILES.values()))
    }  # fmt: skip


def test_the_exit_code_says_why_not(published):
    for name, code in {"mouse": 4, "bat": 1, "cat": 2, "owl@2.0": 2}.items():
        result = invoke("registry", "pull", name, "--index", published)
        assert (name, result.exit_code) == (name, code)
        assert result.stdout == ""


def test_an_index_at_a_url_has_its_checkpoints_beside_it(published, server, own_cache):
    document = json.loads(published.read_text())
    document["entries"][0]["locations"] = ["owls/first"]
    server.files["checkpoints_registry.yaml"] = json.dumps(document).encode()
    server.files |= {f"owls/first/{path}": content for path, content in FILES.items()}
    result = invoke("registry", "pull", "owl", "--index", f"{server.url}/plain/checkpoints_registry.yaml?sig=hidden")
    assert contents(Path(result.stdout.strip())) == FILES
    assert not any("hidden" in path for path in server.asked[1:])


def test_a_reference_is_pulled(published, monkeypatch):
    monkeypatch.setenv("VPGTRANS_REGISTRY", str(published))
    found = resolve("registry:owl")
    assert (found.kind, found.revision) == ("vlm", "1.0")
    assert contents(found.path) == FILES
