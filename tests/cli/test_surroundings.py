"""Commands where the machine is not as expected: no home, no room, nobody who reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colm_edge.cli import terminal

DATA = Path(__file__).parents[1] / "data" / "demo_heldout.jsonl"
RUN = ["run", "-t", "1", "--temp", "0", "-n", "3", "hello"]
COMMANDS = (RUN, [*RUN, "--json"], ["models"], ["run", "-h"], ["--version"])
posix = pytest.mark.skipif(os.name != "posix", reason="files by their numbers")


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "colm_edge", *args]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full")
@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_full_output_is_one_line(args):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(*args), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: standard output: No space left on device"
    assert "Traceback" not in done.stderr


def test_versions_of_what_cannot_be_used_are_one_line():
    environment = os.environ | {"COLM_EDGE_NATIVE": "foo"}
    done = subprocess.run(
        command("--version"), env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: COLM_EDGE_NATIVE: expected ")
    assert done.stderr.count("\n") == 1


@posix
def test_statistics_do_not_go_on_in_the_line_of_an_answer_that_another_program_shows():
    """`colm-edge run … | cat`: it may show the end of the answer after them."""
    import pty

    shown, terminal = pty.openpty()
    ran = subprocess.run(command(*RUN), stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.close(terminal)
    said = os.read(shown, 1 << 16).decode().replace("\r", "")
    os.close(shown)
    assert ran.stdout.endswith(b"\n")
    assert re.search(r"\n\n3 tokens, .*\n$", said)
    both = subprocess.run(
        command(*RUN), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )  # here nothing can come out of order
    assert re.search(r"[^\n]\n3 tokens, .*\n$", both.stdout)


@posix
@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_reader_that_leaves_ends_it_in_silence(args):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command(*args), stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.returncode == 1
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_files_may_be_closed(tmp_path, closed):
    """A file that is written then is no standard file, in which what is printed would land."""
    out = tmp_path / "scores.npz"
    args = command("score", "--data", str(DATA), "--outfile", str(out), "-t", "1")
    script = f'exec "$@" {closed}'
    done = subprocess.run(["sh", "-c", script, "sh", *args], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    whole = tmp_path / "whole.npz"
    args[args.index(str(out))] = str(whole)
    subprocess.run(args, capture_output=True, check=True)
    assert out.read_bytes() == whole.read_bytes()


def test_a_chat_without_a_home_keeps_no_messages(monkeypatch, capsys):
    import platformdirs

    def nobody(*args, **more):
        raise RuntimeError("no home directory")

    monkeypatch.setattr(platformdirs, "user_data_path", nobody)
    monkeypatch.setattr(terminal, "is_terminal", lambda file: True)
    monkeypatch.setattr("colm_edge.cli.editor.Editor", lambda following, history: Reader(history))
    assert terminal.reader(keep=True)() == "None"
    assert capsys.readouterr().err == "Messages are not kept for later chats: no home directory\n"


class Reader:
    def __init__(self, history):
        self.read = lambda: str(history)


@posix
def test_nobody_has_a_home(tmp_path):
    """What is measured is not kept then, and the reason is told."""
    script = (
        "import pwd, sys\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from colm_edge.cli import main\n"
        f"main({RUN!r})"
    )
    keep = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=keep, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
