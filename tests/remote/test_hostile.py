"""Answers without end, byte by byte, packed, or nested are bounded in time and memory."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from colm_edge.remote import http
from colm_edge.remote.http import RequestError, Server

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Run a server whose every answer is written so; give its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client left
                answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def begin(handler: BaseHTTPRequestHandler, **headers: str) -> None:
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def refused(answer: Answer, timeout: float = 30.0) -> RequestError:
    with answering(answer) as url:
        server = Server(url, timeout)
        with pytest.raises(RequestError) as caught:
            server.request("/v1/models")
        server.close()
    return caught.value


def test_an_endless_answer_is_cut(monkeypatch):
    monkeypatch.setattr(http, "MOST_BYTES", 1 << 20)

    def endless(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        while True:
            handler.wfile.write(b" " * 65536)

    e = refused(endless)
    assert "more than 1 MB" in str(e)
    assert e.final


def test_an_answer_that_trickles_ends_at_the_deadline():
    stop = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        while not stop.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    e = refused(trickle, timeout=0.5)
    stop.set()
    assert "no answer in 0.5 seconds" in str(e)
    assert not e.final


def test_a_packed_answer_is_not_unpacked():
    def packed(handler: BaseHTTPRequestHandler) -> None:
        assert handler.headers["Accept-Encoding"] == "identity"
        begin(handler, Content_Encoding="gzip")
        handler.wfile.write(gzip.compress(bytes(1 << 20)))

    assert "compressed" in str(refused(packed))


def test_a_nested_answer_is_no_json():
    def nested(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        handler.wfile.write(b"[" * 200_000)

    assert "not valid JSON" in str(refused(nested))


def test_another_host_is_not_followed():
    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "http://other.example/")
        handler.end_headers()

    assert "HTTP 302" in str(refused(elsewhere))


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there

    def whole(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        handler.wfile.write(b'{"data": []}')

    with answering(whole) as url:
        server = Server(url, 30.0)
        assert server.request("/v1/models") == {"data": []}
        server.close()
