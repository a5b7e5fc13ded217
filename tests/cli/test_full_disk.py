"""A disk that takes no more: one line that names the file, and nothing half-written there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lib.local_hub import local_hub

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a limit on the size of files")

# No file may grow beyond 100 bytes, as on a disk that is full.
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from colm_edge.cli import main
main()
"""
SHORT = ("-t", "1", "-c", "128")
# The command, and the file or folder that its message names.
COMMANDS = {
    "score": (["score", *SHORT, "--data", "DATA", "--outfile", "out.npz"], "out.npz"),
    "score, work": (
        ["score", *SHORT, "--data", "DATA", "--work-dir", "w", "--outfile", "out.npz"], "w/",
    ),
    "train": (["train", *SHORT, "--data", "DATA", "--outfile", "out.gguf"], "out.gguf"),
    "train, work": (
        ["train", *SHORT, "--data", "DATA", "--work-dir", "w", "--outfile", "out.gguf"], "w/",
    ),
    "train --prompts": (
        ["train", *SHORT, "--prompts", "DATA", "-n", "4", "--outfile", "out.gguf"],
        "out.gguf.work/expert-answers.jsonl",
    ),
    "eval": (
        ["eval", *SHORT, "--data", "DATA", "--metric", "exact", "-n", "4", "--work-dir", "w"], "w/",
    ),
    "eval --plot": (["eval", *SHORT, "--data", "DATA", "--plot", "out.png"], "out.png"),
    "run --prompt-cache": (
        ["run", *SHORT, "-n", "4", "--temp", "0", "--prompt-cache", "out", "hello"], "out",
    ),
}  # fmt: skip


def limited(args: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *args],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def left(folder: Path) -> set[str]:
    """What lies in a folder, except for work folders and what they hold."""
    return {path.name for path in folder.iterdir() if path.name not in ("w", "out.gguf.work")}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_is_told_where_a_command_writes(tiny, data, tmp_path, name):
    args, told = COMMANDS[name]
    args = [data if arg == "DATA" else arg for arg in args]
    code, line = limited([*args, "-m", tiny["base"], "-me", tiny["expert"]], tmp_path)
    assert code == 1
    assert line.startswith(f"Error: {told}")
    assert "File too large" in line or "file too large" in line
    assert left(tmp_path) == set()


def test_it_is_told_of_a_quantised_model(tiny, tmp_path):
    code, line = limited(["quantize", tiny["base"], "out.gguf", "Q8_0", "-t", "1"], tmp_path)
    assert (code, line) == (
        1, "Error: out.gguf: cannot be written to its end; make room on the disk",
    )  # fmt: skip
    assert left(tmp_path) == set()


def test_it_is_told_of_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    with local_hub(b"GGUF" + bytes(1000)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        code, line = limited(["pull", "them/model:m.gguf"], tmp_path)
    assert code == 1
    assert line.startswith("Error: them/model:m.gguf: cannot be downloaded: ")
    assert "File too large" in line
    assert not list((tmp_path / "hub").rglob("m.gguf"))


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--temp", "0", "-n", "3", "--prompt-cache", "absent/out", "hello"],
        ["train", "--data", "DATA", "--outfile", "absent/out"],
        ["score", "--data", "DATA", "--outfile", "absent/out"],
        ["train", "--data", "DATA", "--outfile", "/dev/null", "--report-dir", "file"],
    ],
    ids=lambda args: args[0],
)
def test_what_cannot_be_written_is_told_before_the_work(tiny, data, tmp_path, args):
    (tmp_path / "file").write_text("")
    models = ["-m", tiny["base"], "-me", tiny["expert"], *SHORT]
    done = subprocess.run(
        [sys.executable, "-m", "colm_edge", *(data if a == "DATA" else a for a in args), *models],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert "base" not in done.stderr.replace(tiny["base"], "")  # no bar of a pass
