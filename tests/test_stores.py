"""Stores: what was written is read again, from any byte on; what is there already stays; no message tells a secret."""

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from entries import FILES, listed, write
from servers import HARMLESS, HTTP_WAYS, OCI_REGISTRY, http_server, oci_registry, s3_server

from vpgtrans.errors import IntegrityError, RegistryError, StoreError, UserError
from vpgtrans.registry.stores import limits, location_of, open_store, read_small
from vpgtrans.registry.stores.http import fetch, new_session
from vpgtrans.registry.stores.messages import reason, scrubbed, shown

needs_registry = pytest.mark.skipif(
    OCI_REGISTRY is None, reason="needs docker-registry: apt-get install docker-registry"
)
KEY = "verysecretkeyofthetest"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_WAITS", (0.01, 0.01, 0.01))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://checkpoints` on a server of its own."""
    pytest.importorskip("s3fs", reason="needs the extra [s3]")
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        assert requests.put(f"{endpoint}/checkpoints", timeout=5).ok
        yield "s3://checkpoints"


@pytest.fixture(scope="module")
def oci(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a registry of its own."""
    with oci_registry(tmp_path_factory.mktemp("oci")) as host:
        yield host


@pytest.fixture(params=["directory", "file", "memory", "s3", pytest.param("oci", marks=needs_registry)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A location for each kind of store that can be written to here."""
    name = request.node.name.partition("[")[0].replace("_", "-")
    if request.param == "directory":
        return f"made/{name}"
    if request.param == "file":
        return (tmp_path / "a b" / name).as_uri()
    if request.param == "memory":
        request.getfixturevalue("memory")
        return f"memory://checkpoints/{name}"
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{name}"
    return f"oci:{request.getfixturevalue('oci')}/tests/{name}:1.0"


@pytest.fixture
def index(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints_registry.yaml")


def content(store, file, start: int = 0) -> bytes:
    return b"".join(store.read(file, start=start))


# --- what every store does ----------------------------------------------------------------------


def test_what_was_written_is_read_again(place, index, tmp_path):
    source = write(tmp_path / "source")
    location = open_store(place, index=index).write(source, listed(FILES))
    store = open_store(location, index=index)
    for file in listed(FILES):
        expected = FILES[file.path]
        assert content(store, file) == expected
        for start in {1, len(expected) // 2, max(0, len(expected) - 1), len(expected)}:
            assert content(store, file, start) == expected[start:]


def test_the_same_may_be_written_again_and_something_else_not(place, index, tmp_path):
    source = write(tmp_path / "source")
    location = open_store(place, index=index).write(source, listed(FILES))
    assert open_store(place, index=index).write(source, listed(FILES)) == location
    for other in ({**FILES, "manifest.json": b"other"}, {"manifest.json": FILES["manifest.json"]}):
        changed = write(tmp_path / f"other{len(other)}", other)
        with pytest.raises(StoreError, match="there already"):
            open_store(place, index=index).write(changed, listed(other))
    store = open_store(location, index=index)
    assert {file.path: content(store, file) for file in listed(FILES)} == FILES


def test_a_file_that_is_not_there_is_named(place, index, tmp_path):
    location = open_store(place, index=index).write(write(tmp_path / "source"), listed(FILES))
    (absent,) = listed({"absent.json": b"absent"})
    with pytest.raises(StoreError, match=r"absent\.json") as caught:
        content(open_store(location, index=index), absent)
    assert not caught.value.again


# --- directories --------------------------------------------------------------------------------


def test_no_link_is_followed(tmp_path, index):
    write(tmp_path / "outside", {"secret.json": b"secret"})
    (tmp_path / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "secret.json").symlink_to(tmp_path / "outside" / "secret.json")
    (tmp_path / "plain" / "deep").symlink_to(tmp_path / "outside")
    (secret,) = listed({"secret.json": b"secret"})
    for location, path in (("linked", "secret.json"), ("plain", "secret.json"), ("plain", "deep/secret.json")):
        with pytest.raises(IntegrityError, match="link"):
            content(open_store(location, index=index), secret.model_copy(update={"path": path}))


def test_what_is_no_file_is_not_waited_for(tmp_path, index):
    (tmp_path / "odd" / "directory.json").mkdir(parents=True)
    os.mkfifo(tmp_path / "odd" / "pipe.json")
    for name in ("directory.json", "pipe.json"):
        with pytest.raises(IntegrityError, match="no plain file"):
            content(open_store("odd", index=index), listed({name: b"x"})[0])
    (device,) = listed({"zero": b"x"})
    with pytest.raises(IntegrityError, match="no plain file"):
        content(open_store("file:///dev", index=index), device)


def test_an_interrupted_write_leaves_nothing_that_hinders(tmp_path, index):
    write(tmp_path / "made" / ".owl.part" / "whole", {"half.json": b"ha"})
    open_store("made/owl", index=index).write(write(tmp_path / "source"), listed(FILES))
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"owl"}
    assert not (tmp_path / "made" / "owl" / "half.json").exists()


def test_a_directory_is_named_as_its_index_sees_it(tmp_path, index):
    assert location_of(tmp_path / "a" / "b", index=index) == "a/b"
    elsewhere = tmp_path.parent / "else where"
    assert location_of(elsewhere, index=index) == elsewhere.as_uri()
    assert open_store(elsewhere.as_uri(), index=index).write(write(tmp_path / "source"), listed(FILES))
    assert (elsewhere / "manifest.json").is_file()
    with pytest.raises(RegistryError, match="files of this machine"):
        location_of(tmp_path, index="https://example.org/checkpoints_registry.yaml")


@pytest.mark.parametrize("location", ["file:relative", "file://host/path", "../up", "/root", "a/../b", "ftp://a/b", ""])
def test_locations_that_name_nothing_are_refused(location, index):
    with pytest.raises(RegistryError):
        open_store(location, index=index)


def test_an_index_elsewhere_names_its_own_neighbours(memory, tmp_path):
    index = "memory://team/index.yaml"
    open_store("owl/1.0", index=index).write(write(tmp_path / "source"), listed(FILES))
    assert memory.exists("/team/owl/1.0/manifest.json")
    with pytest.raises(RegistryError, match="files of this machine"):
        open_store("file:///etc", index=index)


# --- OCI ----------------------------------------------------------------------------------------


@needs_registry
def test_oras_reads_what_we_publish(oci, index, tmp_path):
    from oras.provider import Registry

    location = open_store(f"oci:{oci}/team/owl:1.0", index=index).write(write(tmp_path / "source"), listed(FILES))
    assert location.startswith(f"oci:{oci}/team/owl@sha256:")
    Registry(oci, insecure=True).pull(f"{oci}/team/owl:1.0", outdir=str(tmp_path / "theirs"))
    assert {path: (tmp_path / "theirs" / path).read_bytes() for path in FILES} == FILES


@needs_registry
def test_a_registry_that_wants_credentials_gets_those_of_docker_login(tmp_path, index, monkeypatch, capfd):
    # of the password "swordfish", by htpasswd -B
    hashed = "$2y$05$abcdefghijklmnopqrstuupWDwJQeCHYIBQy8WvkVB6ImhZ476YYy"
    htpasswd = tmp_path / "htpasswd"
    htpasswd.write_text(f"owl:{hashed}\n")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    source = write(tmp_path / "source")
    with oci_registry(tmp_path, htpasswd=htpasswd) as host:

        def log_in(password: str) -> None:
            auth = base64.b64encode(f"owl:{password}".encode()).decode()
            (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))

        with pytest.raises(StoreError, match=f"credentials; docker login {host}"):
            open_store(f"oci:{host}/team/owl:1.0", index=index).write(source, listed(FILES))
        log_in("sword-salmon")
        with pytest.raises(StoreError, match="credentials") as caught:
            open_store(f"oci:{host}/team/owl:1.0", index=index).write(source, listed(FILES))
        log_in("swordfish")
        location = open_store(f"oci:{host}/team/owl:1.0", index=index).write(source, listed(FILES))
        store = open_store(location, index=index)
        assert {file.path: content(store, file) for file in listed(FILES)} == FILES
    said = str(caught.value) + "".join(capfd.readouterr())
    assert "sword" not in said


@pytest.mark.parametrize("logged_in", [False, True])
def test_a_token_is_fetched_and_not_sent_to_where_blobs_lie(logged_in, index, tmp_path, monkeypatch):
    """As ghcr.io does it: a token for everybody or for a user, and blobs on another host."""
    (file, *_) = listed(FILES)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    seen = []
    with http_server({"blob": FILES[file.path]}) as elsewhere:

        class Registry(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                sent, port = self.headers.get("Authorization"), self.server.server_port
                seen.append((self.path.partition("?")[0], sent))
                if self.path.startswith("/token?"):
                    self.answer(200, json.dumps({"token": "sesame"}).encode())
                elif sent != "Bearer sesame":
                    realm = f'Bearer realm="http://127.0.0.1:{port}/token",service="x",scope="repository:a/b:pull"'
                    self.answer(401, **{"WWW-Authenticate": realm})
                else:
                    self.answer(307, Location=f"http://localhost:{elsewhere.server_port}/plain/blob")

            do_HEAD = do_GET

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        if logged_in:
            (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"auth": "b3dsOmhvb3Q="}}}))
        store = open_store(f"oci:{host}/a/b:1.0", index=index)
        assert content(store, file) == content(store, file) == FILES[file.path]
        server.shutdown()
        server.server_close()
    assert [sent for path, sent in seen if path == "/token"] == ["Basic b3dsOmhvb3Q=" if logged_in else None]
    assert {sent for path, sent in seen if path != "/token"} == {None, "Bearer sesame"}
    assert all("Authorization" not in headers for headers in elsewhere.headers_seen)


def test_a_registry_that_never_ends_its_answer_is_left(index, monkeypatch):
    """Each address is answered with bytes without end, the first of all that says which credentials are wanted."""
    with http_server({}) as server:
        monkeypatch.setattr("servers._Handler.way_fuzz", lambda handler, name, body: handler.way_endless(name, body))
        with pytest.raises(StoreError, match="more than"):
            content(open_store(f"oci:127.0.0.1:{server.server_port}/a/b:1.0", index=index), listed(FILES)[0])


def test_without_a_tag_nothing_is_published(index, tmp_path):
    with pytest.raises(RegistryError, match="name a tag"):
        open_store("oci:127.0.0.1:1/team/owl", index=index).write(tmp_path, listed(FILES))
    for location in ("oci:localhost/team/owl", "oci:host.org/Team/owl", "oci:host.org"):
        with pytest.raises(RegistryError, match="oci:HOST"):
            open_store(location, index=index)


# --- the hub ------------------------------------------------------------------------------------


def test_the_hub_gets_the_token_and_the_hosts_it_redirects_to_do_not(index, monkeypatch):
    (file, *_) = listed(FILES)
    with http_server(FILES) as elsewhere, http_server(FILES) as hub:
        # The hub's addresses are /ORG/REPO/resolve/REVISION/PATH; `redirect` sends to another host.
        monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repo, path, revision: f"{hub.url}/redirect/{path}")
        assert content(open_store("hf:team/owl@1234567", index=index), file) == FILES[file.path]
        assert elsewhere.asked == []
    first, second = hub.headers_seen
    assert first["Authorization"] == "Bearer hf_averysecrettoken"
    assert "Authorization" not in second  # the same machine under another name is another host


def test_what_the_hub_downloaded_before_needs_no_network(index, tmp_path, monkeypatch):
    from huggingface_hub import constants

    revision = "1" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write(tmp_path / "models--team--owl" / "snapshots" / revision)
    (tmp_path / "models--team--owl" / "refs").mkdir()
    store = open_store(f"hf:team/owl@{revision}", index=index)
    assert {file.path: content(store, file) for file in listed(FILES)} == FILES
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE"):
        content(open_store("hf:team/hawk", index=index), listed(FILES)[0])


def test_one_commit_is_made_on_the_hub(index, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repository, *, exist_ok):
            assert exist_ok
            calls.append(repository)

        def create_commit(self, repository, operations, *, revision, commit_message):
            calls.append((repository, revision, {one.path_in_repo: Path(one.path_or_fileobj) for one in operations}))
            return type("Commit", (), {"oid": "f" * 40})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    source = write(tmp_path / "source")
    assert open_store("hf:team/owl", index=index).write(source, listed(FILES)) == f"hf:team/owl@{'f' * 40}"
    assert calls == ["team/owl", ("team/owl", None, {path: source / path for path in FILES})]


# --- web servers --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", HTTP_WAYS)
def test_an_index_from_a_server_that_misbehaves(way, monkeypatch):
    if way not in HARMLESS:
        monkeypatch.setenv("VPGTRANS_STORE_TIMEOUT", "0.4")
    body = b"format_version: 2\n" * 20
    with http_server({"index.yaml": body}) as server:
        if way in HARMLESS - {"cut", "no-ranges"}:  # a small file isn't resumed; it is read anew
            assert read_small(f"{server.url}/{way}/index.yaml", 1000) == body
        elif way in ("cut", "no-ranges"):
            assert read_small(f"{server.url}/{way}/index.yaml", 1000) == body
            assert len(server.asked) == 2
        elif way in ("shorter", "longer", "other"):
            assert read_small(f"{server.url}/{way}/index.yaml", 1000) != body
        else:
            with pytest.raises((StoreError, RegistryError)):
                read_small(f"{server.url}/{way}/index.yaml", 1000)


def test_a_small_file_has_a_limit(memory):
    memory.pipe_file("/team/index.yaml", b"x" * 1001)
    for url in ("memory://team/index.yaml",):
        with pytest.raises(RegistryError, match="larger than 1,000 bytes"):
            read_small(url, 1000)
        assert len(read_small(url, 1001)) == 1001
    for url in ("hf:team/owl", "file:///etc/passwd", "ftp://host/index.yaml"):
        with pytest.raises(RegistryError, match="write the URL"):
            read_small(url, 1000)


def test_credentials_go_over_tls_only():
    request = requests.Request("GET", "http://example.org/x?sig=hidden", headers={"Authorization": "Bearer hidden"})
    session = new_session()
    with pytest.raises(StoreError, match="https") as caught:
        session.send(session.prepare_request(request))
    assert "hidden" not in str(caught.value)


def test_a_query_stays_behind_the_path(index):
    with http_server(FILES) as server:
        file = listed(FILES)[2]
        list(open_store(f"{server.url}/plain/?sig=hidden", index=index).read(file))
        assert server.asked == ["/plain/projector/a%20b.txt?sig=hidden"]
        with pytest.raises(StoreError) as caught:
            list(fetch(f"{server.url}/missing/x?sig=hidden"))
        assert "hidden" not in str(caught.value)


# --- messages and limits ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hidden00@host/x",
        "Max retries exceeded with url: /x?X-Amz-Signature=hidden00&a=b",
        "Authorization: Bearer hidden00",
        'headers {"x-token": "hidden00"}',
        "the key hidden00 of the environment",
        "bad token hf_hidden00hidden00",
    ],
)
def test_what_may_be_secret_is_not_told(text, monkeypatch):
    monkeypatch.setenv("SOME_SECRET_KEY", "hidden00")
    assert "hidden00" not in scrubbed(text)


def test_a_message_is_one_printable_line_of_the_cause():
    error = RuntimeError("a layer above")
    error.__cause__ = OSError(111, "Connection refused")
    assert reason(error) == "Connection refused"
    assert reason(ValueError("\x1b[31mred\nsecond line")) == " [31mred"
    assert shown("https://user@host:1/a?b=c") == "https://host:1/a?…"
    assert len(scrubbed("x" * 10_000)) < 1000


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_time_limit_is_seconds(text, monkeypatch):
    monkeypatch.setenv("VPGTRANS_STORE_TIMEOUT", text)
    with pytest.raises(UserError, match="VPGTRANS_STORE_TIMEOUT"):
        limits.patience()


def test_a_bucket_is_looked_for_where_the_environment_says_now(monkeypatch):
    pytest.importorskip("s3fs", reason="needs the extra [s3]")
    from vpgtrans.registry.stores.remote import RemoteStore

    opened = []
    for port in (1, 2):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        opened.append(RemoteStore("s3://eyes/owl").filesystem)
    assert opened[0] is not opened[1]
