"""Ctrl-C in any command: exit code 130, no traceback, and nothing in the result's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import llama_cpp
import pytest
from click.testing import CliRunner
from lib.local_hub import local_hub

from colm_edge.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a signal from within")

# Ctrl-C comes at the n-th evaluation.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
left = int(sys.argv.pop(1))
from colm_edge.llama.context import Context
decode = Context.decode

def interrupted(*args, **more):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGINT)
    return decode(*args, **more)

Context.decode = interrupted
from colm_edge.cli import main
main()
"""
SHORT = ("-t", "1", "-c", "128")
COMMANDS = {
    "run": ["run", *SHORT, "--temp", "0", "hello"],
    "run --json": ["run", *SHORT, "--temp", "0", "--json", "hello"],
    "run --prompt-cache": ["run", *SHORT, "--temp", "0", "--prompt-cache", "out", "hello"],
    "score": ["score", *SHORT, "--data", "DATA", "--outfile", "out"],
    "train": ["train", *SHORT, "--data", "DATA", "--outfile", "out"],
    "train --prompts": [
        "train",
        *SHORT,
        "--prompts",
        "DATA",
        "--work-dir",
        "w",
        "--outfile",
        "out",
    ],
    "eval": ["eval", *SHORT, "--data", "DATA", "--metric", "exact", "--plot", "out.png"],
    "bench": ["bench", *SHORT, "-n", "4"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_ends_a_command_at_once(tiny, data, tmp_path, name):
    args = [data if arg == "DATA" else arg for arg in COMMANDS[name]]
    pair = ["-m", tiny["base"], "-me", tiny["expert"]]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "3", *args, *pair],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "KeyboardInterrupt" not in done.stderr
    here = {path.name for path in tmp_path.iterdir()} - {"w"}
    # Of an answer that was stopped, what was evaluated is kept.
    assert here == ({"out"} if name == "run --prompt-cache" else set())


def test_info_ends_at_once(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "3", "info", "--costs", "-t", "1", tiny["base"]],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_it_is_not_lost_while_llama_cpp_quantises(tiny, tmp_path, monkeypatch, interruptible):
    go_on, ended = threading.Event(), threading.Event()

    def quantise(*args):
        os.kill(os.getpid(), signal.SIGINT)
        go_on.wait()
        ended.set()
        return 0

    monkeypatch.setattr(llama_cpp, "llama_model_quantize", quantise)
    out = tmp_path / "out.gguf"
    done = CliRunner().invoke(main, ["quantize", tiny["base"], str(out), "Q8_0", "-t", "1"])
    go_on.set()
    ended.wait()
    assert done.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_it_ends_a_download_that_goes_on_later(tmp_path, monkeypatch, interruptible):
    from huggingface_hub import constants

    from colm_edge import hub

    content = b"GGUF" + bytes(1_000_000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    sha256, hashed = hub.sha256_of, list[Path]()

    def interrupted(path):
        hashed.append(path)
        if len(hashed) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return sha256(path)

    monkeypatch.setattr(hub, "sha256_of", interrupted)
    with local_hub(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        done = CliRunner().invoke(main, ["pull", "them/model:m.gguf"])
        assert done.exit_code == 130
        assert "Error" not in done.stderr
        done = CliRunner().invoke(main, ["pull", "them/model:m.gguf"])
        assert done.exit_code == 0
        assert Path(done.stdout.strip()).read_bytes() == content
        assert server.sent == len(content)


# Ctrl-C comes while the command line is imported.
EARLY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "colm_edge.cli.train":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.argv[1:] = ["models"]
from colm_edge.__main__ import start
start()
"""


def test_it_ends_the_start_without_a_word():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout + done.stderr == b""
