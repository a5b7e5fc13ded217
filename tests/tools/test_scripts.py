"""Every script of tools/ runs from any folder, and says what it is for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPTS = [
    path
    for path in sorted(TOOLS.rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(TOOLS)))
def test_every_script_has_help(path, tmp_path):
    run = subprocess.run(
        [sys.executable, path, "-h"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert re.match("usage: ", run.stdout, re.IGNORECASE)
    assert run.stderr == ""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(TOOLS)))
def test_every_script_names_the_command_that_runs_it(path):
    text = path.read_text(encoding="utf-8").partition('"""\n')[0]
    assert f"python tools/{path.relative_to(TOOLS).as_posix()}" in text


def test_a_model_that_is_there_is_never_replaced(tiny, tmp_path):
    """By a file of the same name among the results."""
    model, scores = tmp_path / "base.gguf", tmp_path / "scores.npz"
    content = Path(tiny["base"]).read_bytes()
    model.write_bytes(content)
    scores.touch()
    for arguments, words in (
        (["finetune_base.py", model, "--scores", scores, "--out", tmp_path], "is used by this"),
        (["make_random_pair.py", "--out", tmp_path], "base.gguf: exists already"),
    ):
        run = subprocess.run(
            [sys.executable, TOOLS / arguments[0], *arguments[1:]],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (run.returncode, run.stderr.count("\n")) == (1, 1)
        assert words in run.stderr
        assert model.read_bytes() == content
