"""Servers on loopback: one that misbehaves in every way, a real S3 one, and a real OCI registry. Not a test file."""

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from urllib.parse import unquote, urlsplit

HTTP_WAYS = (
    "stall", "stall-inside", "drip", "drip-headers", "endless-header", "truncate", "cut", "shorter", "longer",
    "endless", "endless-chunk", "chunked", "gzip", "redirect", "redirect-here", "redirect-loop", "redirect-file",
    "busy", "failing", "no-ranges", "wrong-range", "other", "missing", "forbidden", "nonsense", "closed",
)  # fmt: skip
"""What comes first in a path says how the rest is served."""
HARMLESS = frozenset({"cut", "chunked", "redirect-here", "busy", "no-ranges"})
"""Those that a patient reader gets the file from."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HttpServer"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.headers_seen.append(dict(self.headers))
        way, _, name = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        body = self.server.files.get(name)
        if way == "plain" and body is not None:
            self._send(body)
        elif way == "plain":
            self._answer(404)
        else:
            serve = getattr(self, "way_" + way.replace("-", "_"), self.way_fuzz)
            with suppress(OSError):
                serve(name, body or b"")
            self.close_connection = True

    do_HEAD = do_GET  # what asks so is no friend of bodies either

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content_Length": "0", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def _start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def _head(self, body: bytes) -> bytes:
        """Status and headers of what is asked for; its bytes are returned."""
        start = self._start()
        if start and start >= len(body):
            self._answer(416)
            return b""
        if start:
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._answer(206, Content_Length=str(len(body) - start), Content_Range=span)
        else:
            self._answer(200, Content_Length=str(len(body)))
        return body[start:]

    def _send(self, body: bytes) -> None:
        self.wfile.write(self._head(body))

    def way_stall(self, name: str, body: bytes) -> None:
        self.server.over.wait(60)

    def way_stall_inside(self, name: str, body: bytes) -> None:
        rest = self._head(body)
        self.wfile.write(rest[: len(rest) // 2])
        self.server.over.wait(60)

    def way_drip(self, name: str, body: bytes) -> None:
        for byte in self._head(body):
            self.wfile.write(bytes([byte]))
            if self.server.over.wait(0.02):
                return

    def way_drip_headers(self, name: str, body: bytes) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self.server.over.wait(0.02):
            self.wfile.write(b"x")

    def way_endless_header(self, name: str, body: bytes) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.server.over.is_set():
            self.wfile.write(b"x" * 65536)

    def way_truncate(self, name: str, body: bytes) -> None:
        """Promises all and never sends the last byte."""
        self.wfile.write(self._head(body)[:-1])

    def way_cut(self, name: str, body: bytes) -> None:
        """Breaks off once in the middle of each file."""
        rest = self._head(body)
        first = name not in self.server.seen
        self.server.seen.add(name)
        self.wfile.write(rest[: len(rest) // 2] if first else rest)

    def way_shorter(self, name: str, body: bytes) -> None:
        self._send(body[:-1])

    def way_longer(self, name: str, body: bytes) -> None:
        self._send(body + b"x")

    def way_endless(self, name: str, body: bytes) -> None:
        self._answer(200, Content_Length=str(1 << 60))
        while not self.server.over.is_set():
            self.wfile.write(b"x" * 65536)

    def way_endless_chunk(self, name: str, body: bytes) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not self.server.over.is_set():
            self.wfile.write(b"0" * 65536)

    def way_chunked(self, name: str, body: bytes) -> None:
        body = body[self._start() :]
        status = b"206 OK\r\nContent-Range: bytes %d-/*" % self._start() if self._start() else b"200 OK"
        self.wfile.write(b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
        for place in range(0, len(body), 1000):
            piece = body[place : place + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def way_gzip(self, name: str, body: bytes) -> None:
        """Ten bytes that say they become a thousand million."""
        self._answer(200, Content_Length="10", Content_Encoding="gzip")
        self.wfile.write(b"\x1f\x8b\x08\0\0\0\0\0\0\0")

    def way_redirect(self, name: str, body: bytes) -> None:
        self._answer(302, Location=f"http://localhost:{self.server.server_port}/plain/{name}")

    def way_redirect_here(self, name: str, body: bytes) -> None:
        self._answer(302, Location=f"/plain/{name}")

    def way_redirect_loop(self, name: str, body: bytes) -> None:
        self._answer(302, Location=self.path)

    def way_redirect_file(self, name: str, body: bytes) -> None:
        self._answer(302, Location="file:///etc/passwd")

    def way_busy(self, name: str, body: bytes) -> None:
        """Answers three times that it failed, then serves."""
        self.server.counts[name] = self.server.counts.get(name, 0) + 1
        if self.server.counts[name] <= 3:
            self._answer(500)
        else:
            self._send(body)

    def way_failing(self, name: str, body: bytes) -> None:
        self._answer(500)

    def way_no_ranges(self, name: str, body: bytes) -> None:
        """Knows no ranges, and breaks off once."""
        first = name not in self.server.seen
        self.server.seen.add(name)
        self._answer(200, Content_Length=str(len(body)))
        self.wfile.write(body[: len(body) // 2] if first else body)

    def way_wrong_range(self, name: str, body: bytes) -> None:
        """Sends half, then the beginning again and calls it the rest."""
        if not self._start():
            self._answer(200, Content_Length=str(len(body)))
            self.wfile.write(body[: len(body) // 2])
        else:
            self._answer(206, Content_Length=str(len(body)), Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}")
            self.wfile.write(body)

    def way_other(self, name: str, body: bytes) -> None:
        self._send(bytes(255 - byte for byte in body))

    def way_missing(self, name: str, body: bytes) -> None:
        self._answer(404)

    def way_forbidden(self, name: str, body: bytes) -> None:
        self._answer(403)

    def way_nonsense(self, name: str, body: bytes) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(range(256)))

    def way_closed(self, name: str, body: bytes) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def way_fuzz(self, name: str, body: bytes) -> None:
        """An answer drawn at random; what asks for any other address gets one, too."""
        self.wfile.write(fuzzed_answer(self.server.random, body))
        if self.server.random.random() < 0.05:
            self.server.over.wait(2)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def fuzzed_answer(random: Random, body: bytes) -> bytes:
    """An HTTP answer that is wrong in a few places, or in none."""
    statuses = ["200 OK", "206 X", "301 X", "302 X", "307 X", "401 X", "404 X", "416 X", "429 X", "500 X", "999 X", ""]
    numbers = ("-1", "0", "1", str(len(body)), str(1 << 63), "x", "1, 2", "0x10", "")
    urls = [
        "/plain/f",
        "//",
        "http://[",
        "http://127.0.0.1:1/",
        "file:///etc/passwd",
        "ftp://x/",
        "\x00",
        "//x@y",
        "http:",
    ]
    fields = {
        "Content-Length": numbers,
        "Content-Range": ("bytes 0-0/1", f"bytes 0-{len(body)}/*", "bytes */*", "bytes -1-", "x", ""),
        "Transfer-Encoding": ("chunked", "gzip, chunked", "x", "chunked, chunked"),
        "Content-Encoding": ("gzip", "br", "zstd", "identity", "x" * 1000),
        "Location": urls,
        "WWW-Authenticate": (
            'Bearer realm="http://127.0.0.1:1/"', 'Bearer realm="file:///etc/passwd"', "Basic", "Bearer", "x" * 5000,
        ),
        "Content-Type": ("application/json", "text/html", "x"),
        "ETag": ('"x"', ""),
        "Retry-After": ("0", "-1", "1e999", "100000"),
        "Set-Cookie": ("a=b; domain=.", "x" * 9000),
    }  # fmt: skip
    lines = [f"HTTP/1.{random.randrange(3)} {random.choice(statuses)}"]
    for name in random.sample(sorted(fields), random.randrange(5)):
        lines.append(f"{name}: {random.choice(fields[name])}")
    if random.random() < 0.5:
        lines.append(f"Content-Length: {len(body)}")
    chunks = (b"5\r\n12345\r\n0\r\n\r\n", b"ffffffffffff\r\n", b"-5\r\n")
    rest = random.choice((body, body[:-1], body * 2, b"", b"<Error/>", *chunks))
    answer = bytearray("\r\n".join(lines).encode() + b"\r\n\r\n" + rest)
    for _ in range(random.choice((0, 0, 1, 5))):
        answer[random.randrange(len(answer))] = random.randrange(256)
    return bytes(answer)


class HttpServer(ThreadingHTTPServer):
    """`url`/WAY/NAME serves a file in one of the `HTTP_WAYS`, or as it is where the way is `plain`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.asked: list[str] = []
        """Paths, in order."""
        self.headers_seen: list[dict[str, str]] = []
        self.seen: set[str] = set()
        self.counts: dict[str, int] = {}
        self.over = threading.Event()
        self.random = Random(0)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error here."""


@contextmanager
def http_server(files: Mapping[str, bytes]) -> Iterator[HttpServer]:
    server = HttpServer(files)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


# --- processes ----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _process(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server process that listens; it is gone when the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} doesn't listen: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def s3_server(directory: Path) -> Iterator[str]:
    """The endpoint of a `moto_server`, which speaks S3's protocol."""
    port = free_port()
    program = shutil.which("moto_server", path=str(Path(sys.executable).parent)) or shutil.which("moto_server")
    if program is None:
        raise RuntimeError("moto_server is not installed: pip install 'moto[server]'")
    with _process([program, "-H", "127.0.0.1", "-p", str(port)], port, directory / "moto.log"):
        yield f"http://127.0.0.1:{port}"


OCI_REGISTRY = shutil.which("docker-registry")


@contextmanager
def oci_registry(directory: Path, *, htpasswd: Path | None = None) -> Iterator[str]:
    """HOST:PORT of Debian's docker-registry, with the users of a file or for everybody."""
    assert OCI_REGISTRY is not None
    port = free_port()
    auth = f"auth: {{htpasswd: {{realm: tests, path: {htpasswd}}}}}\n" if htpasswd else ""
    config = directory / f"registry-{port}.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {directory / 'blobs'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n{auth}"
    )
    with _process([OCI_REGISTRY, "serve", str(config)], port, directory / "registry.log"):
        yield f"127.0.0.1:{port}"
