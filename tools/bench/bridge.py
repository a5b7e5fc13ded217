"""Time what a bridge adds to a deferral, by the length of the text.

    python tools/bench/bridge.py -m BASE.gguf -me EXPERT.gguf [--every 8] [--text FILE]

Every EVERY tokens of a text the expert is asked, as at a deferral. Its evaluations are left out:
what it says is recorded once, from the first tokens of the text. The thread's own time is counted,
so that other programs matter little.
"""

# ruff: noqa: E402 (the thread counts come before numpy)

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before numpy is loaded

import argparse
import json
import statistics
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel
from colm_edge.decode.bridge import Bridge
from colm_edge.decode.spelling import Crossing
from colm_edge.llama.account import Account
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.llama.vocabulary import Vocabulary

LENGTHS = (500, 4000)  # tokens of the base
DEFERRALS = 40  # at each length
RECORDED = 24  # states


class Recorded:
    """A timeline that says in turn what an expert said once."""

    n_ctx = 1 << 20
    account = Account()

    def __init__(self, said: Sequence[Floats]) -> None:
        self._said = said
        self.n_rows = 0

    def turn_to(self, prompt: array[int]) -> None:
        pass

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        self.n_rows += len(outputs) or 1
        return 0

    def state(self, i: int) -> tuple[Floats, Floats]:
        return self._said[i % len(self._said)], np.empty(0, np.float32)


def recorded(expert: Model, raw: bytes) -> list[Floats]:
    """Return what an expert says after each of the first tokens of a text."""
    session = Session(expert, ContextOptions(n_ctx=64, n_threads=1))
    tokens = array("i", Vocabulary(expert).encode(raw)[:RECORDED])
    session.sync(tokens, range(len(tokens)))
    said = [session.state(i)[0].copy() for i in range(len(tokens))]
    session.close()
    return said


def measured(base: Model, expert: Model, text: str, every: int) -> list[dict[str, float]]:
    """Return a row for each length."""
    ours = Vocabulary(base)
    tokens = array("i", ours.encode(text.encode()))
    inner = Recorded(recorded(expert, text.encode()))
    bridge = Bridge(inner, Crossing(ours, Vocabulary(expert)))
    first = time.thread_time()
    bridge.sync(tokens[:10])
    bridge.state(9)
    rows = [{"tokens": 10.0, "first_ms": 1e3 * (time.thread_time() - first)}]
    for length in LENGTHS:
        sync, state, n_rows = [], [], inner.n_rows
        for n in range(length, length + DEFERRALS * every, every):
            begun = time.thread_time()
            bridge.sync(tokens[:n])
            between = time.thread_time()
            bridge.state(n - 1)
            sync.append(between - begun)
            state.append(time.thread_time() - between)
        rows.append({
            "tokens": float(length),
            "spelling_us": 1e6 * statistics.median(sync),
            "reading_us": 1e6 * statistics.median(state),
            "outputs": (inner.n_rows - n_rows) / DEFERRALS,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-me", "--model-expert", required=True)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "docs/speed.md")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    for row in measured(Model(args.model), Model(args.model_expert), text, args.every):
        print(json.dumps({name: round(value, 1) for name, value in row.items()}))


if __name__ == "__main__":
    main()
