"""A real server on a free port, for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from colm_edge.options import Options, ServerOptions
from colm_edge.pair import Pair
from colm_edge.serve.answers import Server
from colm_edge.serve.app import config_of, listen

GREEDY = Options(temperature=0.0, threshold=0.4)


@contextmanager
def serving(pair: Pair, **settings) -> Iterator[tuple[str, Server]]:
    """Run a real server on a free port."""
    server = Server(pair, ServerOptions(port=0, **settings), "tiny")
    running, listening = uvicorn.Server(config_of(server)), listen("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    wait_for(lambda: running.started)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        running.should_exit = True
        thread.join(60)


def sent(url: str, body: bytes, length: int | None = None) -> socket.socket:
    """Return a connection on which this was sent to /v1/completions, and nothing read. length: what
    the request says that its body has, if more is to come."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 60)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (length or len(body), body)
    )
    return connection


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.01)


def metrics_of(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}
