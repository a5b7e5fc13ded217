"""A server that speaks the Hub's protocol and can simulate its faults."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """repos: name -> file -> content. Requests are recorded; tests set the faults."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.gated: set[str] = set()
        self.token: str | None = None
        self.break_after: list[int] = []  # bytes after which a transfer is cut, once each
        self.reset = False  # cut by a reset instead of a normal close
        self.wrong_hash = False
        self.status = 0  # if set, the status of every response
        self.commit = COMMIT

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(body))))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self) -> None:
        hub = self.server
        path = urlsplit(self.path).path
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.status:
            self.send(hub.status, {})
            return
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            self.content(hub.repos["/".join(parts[1:3])]["/".join(parts[3:])])
            return
        at = 2 if parts[:2] == ["api", "models"] else 0
        repo = "/".join(parts[at : at + 2])
        if repo not in hub.repos:
            self.fail(401, "RepoNotFound")
        elif repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.fail(401, "GatedRepo")
        elif at:
            siblings = [{"rfilename": name} for name in hub.repos[repo]]
            body = {"id": repo, "sha": hub.commit, "siblings": siblings, "private": False}
            body |= {"downloads": 0, "likes": 0, "tags": []}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())
        elif "/".join(parts[4:]) not in hub.repos[repo]:
            self.fail(404, "EntryNotFound")
        else:
            name = "/".join(parts[4:])
            content = hub.repos[repo][name]
            digest = hashlib.sha256(content + (b"x" if hub.wrong_hash else b"")).hexdigest()
            headers = {
                "X-Repo-Commit": hub.commit,
                "X-Linked-Etag": f'"{digest}"',
                "ETag": '"other"',
                "X-Linked-Size": str(len(content)),
                "Location": f"http://localhost:{hub.server_address[1]}/cdn/{repo}/{name}",
            }
            self.send(302, headers)

    def content(self, content: bytes) -> None:
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        rest = content[begin:]
        headers = {"Content-Length": str(len(rest)), "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        is_cut = self.command == "GET" and bool(self.server.break_after)
        if is_cut:
            rest = rest[: self.server.break_after.pop(0)]
            self.close_connection = True
        self.send(206 if begin else 200, headers, rest)
        if is_cut and self.server.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
