"""The command line in a process of its own, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

BASE = Path(str(files("colm_edge"))) / "data" / "base.gguf"


def colm_edge(*args: str | Path) -> Any:
    """Run a command; return the JSON on its last line."""
    command = [sys.executable, "-m", "colm_edge", *map(str, args)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def exact(exam: Path, switch: Path, experts: Sequence[str | Path], method: str = "colm") -> float:
    """Return the share of questions that the demo pair's base answers with the exact fact, with
    these experts behind a switch."""
    given = [part for expert in experts for part in ("-me", expert)]
    rows = colm_edge(
        "eval", "--data", exam, "--metric", "contains", "--methods", method, "-o", "json",
        "-m", BASE, *given, "-sw", switch, "-t", "1", "-n", "60",
    )  # fmt: skip
    return float(rows[0]["accuracy"])
