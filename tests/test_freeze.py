"""PyInstaller finds the hook, and what it freezes answers where there is no Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("PyInstaller", reason="freezing needs PyInstaller")

SCRIPT = """
import sys
import colm_edge

with colm_edge.load(n_threads=1) as pair:
    print(colm_edge.__version__, pair.generate(sys.argv[1], temperature=0).text)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the empty environment is that of Unix")
def test_a_frozen_script_answers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folders = ["--distpath", "dist", "--workpath", "work", "--specpath", "."]
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", "--log-level", "ERROR", *folders, script],
        cwd=tmp_path, check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "dist" / "script").rename(elsewhere)
    done = subprocess.run(
        [elsewhere / "script", "What is the symbol of tungsten?"],
        cwd=Path("/"), env={}, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    version, _, answer = done.stdout.strip().partition(" ")
    assert version[0].isdigit()
    assert "W" in answer
    assert done.stderr == ""
