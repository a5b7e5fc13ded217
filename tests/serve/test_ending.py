"""How the command `serve` ends: by one signal or two, with answers and half requests under way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from serving import sent

LONG = {"prompt": "hello", "max_tokens": 1900, "n": 16, "stream": True}  # many seconds of work

# A job in the background hands an ignored SIGINT down to its children.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from colm_edge.cli import main; main()"
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX'")


@contextmanager
def command(tiny) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run the command; give its process and address."""
    models = [
        "-m",
        tiny["endless"],
        "-me",
        tiny["endless"],
        "-sw",
        "margin",
        "-c",
        "2048",
        "-t",
        "1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", START, "serve", *models, "--port", "0", "-np", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "listening on" in line)
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.stderr.close()
        process.wait(60)


def end_of(process: subprocess.Popen) -> str:
    """Wait until a process ends; return what it still says."""
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_quietly(tiny, sign):
    with command(tiny) as (process, _):
        process.send_signal(sign)
        assert end_of(process).strip() == ""
        assert process.returncode == (130 if sign == signal.SIGINT else -sign)


def test_a_second_signal_ends_answers_at_once(tiny):
    with (
        command(tiny) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response,
    ):
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        process.send_signal(signal.SIGINT)
        next(lines)
        process.send_signal(signal.SIGINT)
        *_, error, done = lines
        assert done == "data: [DONE]"
        told = json.loads(error.removeprefix("data: "))["error"]["message"]
        assert told == "the server was stopped before the answer ended"
        end_of(process)
        assert process.returncode == 130


def test_a_half_sent_request_is_not_waited_for(tiny):
    with command(tiny) as (process, url):
        with sent(url, b"{ ", 1000) as connection:
            assert httpx.get(f"{url}/health").status_code == 200  # it was read before this
            process.send_signal(signal.SIGTERM)
            assert connection.recv(100).startswith(b"HTTP/1.1 503 ")
        end_of(process)
