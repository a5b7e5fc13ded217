"""A stand-in of the Hugging Face Hub on loopback: one file, any part of it, at a bounded speed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = 1 << 18  # bytes between two waits
COMMIT = "0" * 40


class LocalHub(ThreadingHTTPServer):
    """Every path is the same file. sent: the bytes of all answers so far."""

    daemon_threads = True

    def __init__(self, content: bytes, wait: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.wait, self.sent = content, wait, 0
        self.etag = hashlib.sha256(content).hexdigest()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that were killed."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        for part in self._answer():
            try:
                self.wfile.write(part)
            except OSError:  # the client was killed
                self.close_connection = True
                return
            self.server.sent += len(part)
            time.sleep(self.server.wait)

    def _answer(self) -> Iterator[bytes]:
        hub = self.server
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        rest = memoryview(hub.content)[begin:]
        self.send_response(206 if begin else 200)
        for name, value in (
            ("X-Repo-Commit", COMMIT),
            ("ETag", f'"{hub.etag}"'),
            ("Accept-Ranges", "bytes"),
            ("Content-Length", str(len(rest))),
            ("Content-Range", f"bytes {begin}-{len(hub.content) - 1}/{len(hub.content)}"),
        ):
            self.send_header(name, value)
        self.end_headers()
        return (bytes(rest[at : at + PIECE]) for at in range(0, len(rest), PIECE))


@contextmanager
def local_hub(content: bytes, wait: float = 0.0) -> Iterator[LocalHub]:
    """Serve the content inside the `with` block, waiting so many seconds after each PIECE."""
    hub = LocalHub(content, wait)
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
