"""Time the fit of a switch on random features, scoring not included.

    python tools/bench/fit.py [--tokens 1000000] [--width 1024] [--objective best]

A planted head decides which of two models knows each token; the fit must find it again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time

import numpy as np

from colm_edge.bench.methods import cpu_name
from colm_edge.readout import FEATURES
from colm_edge.train.fit import Split, fit_head
from colm_edge.train.objectives import OBJECTIVES
from colm_edge.train.scores import Scores


def planted(n: int, width: int, rng: np.random.Generator) -> tuple[Scores, np.ndarray]:
    """Return the scores of n tokens, and the head on the hidden state that says who knows each."""
    hidden = np.empty((n, width), np.float32)
    for i in range(0, n, 50_000):
        rng.standard_normal(dtype=np.float32, out=hidden[i : i + 50_000])
    weight = rng.normal(size=width).astype(np.float32) * np.float32(2 / np.sqrt(width))
    by_expert = rng.random(n) < 1 / (1 + np.exp(1 - hidden @ weight))
    likely, unlikely = np.log(rng.uniform(0.6, 0.99, n)), np.log(rng.uniform(1e-4, 0.1, n))
    base, expert = np.where(by_expert, (unlikely, likely), (likely, unlikely))
    features = np.zeros((n, len(FEATURES)), np.float32)
    token, line = np.zeros(n, np.int32), np.arange(n)
    likely = np.maximum(base, expert)
    columns = (hidden, features, base, expert, likely, base, token - by_expert, by_expert)
    return Scores(*columns, token, line, np.ones(n)), weight


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--objective", choices=("best", *OBJECTIVES), default="best")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    n_valid = max(1000, args.tokens // 50)
    scores, weight = planted(args.tokens + n_valid, args.width, rng)
    rows = np.arange(args.tokens + n_valid)
    begun = time.perf_counter()
    split = Split(scores, rows[n_valid:], rows[:n_valid])
    trial, _ = fit_head(split, ("hidden",), args.objective)
    seconds, head = time.perf_counter() - begun, trial.head
    cosine = head.weight @ weight / np.linalg.norm(head.weight) / np.linalg.norm(weight)
    assert cosine > 0.9, f"the fit has not found the planted head: its cosine is {cosine:.4f}"
    print(
        f"{args.tokens:,} tokens of {args.width} features: {seconds:.1f} s, {trial.objective}, l2 "
        f"{trial.l2:g}, cosine with the planted head {cosine:.4f}; {cpu_name()}, "
        f"{os.cpu_count()} cores, {datetime.date.today()}"
    )


if __name__ == "__main__":
    main()
