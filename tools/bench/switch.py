"""Time the switch on one core, for each implementation that this CPU runs.

    python tools/bench/switch.py [-o md|json]

head: a 4096-wide hidden state over a vocabulary of 8, so that the head is the cost.
features: the eight features, argmax and logsumexp over 128256 logits, without a head.
"""

# ruff: noqa: E402 (the thread counts come before numpy)

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before numpy is loaded
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

N_EMBD, N_VOCAB = 4096, 128256
REPEATS = 15
REPEAT_SECONDS = 0.05


def implementations() -> dict[str, Callable[..., tuple[int, float]]]:
    """Return `read` of every implementation by name, best first, the numpy twin last."""
    os.environ.pop("COLM_EDGE_NATIVE", None)
    from colm_edge.readout import read_numpy

    spec = importlib.util.find_spec("_colm_edge_native")
    if spec is None or spec.loader is None:
        raise SystemExit("_colm_edge_native is not built; `pip install .` builds it")
    readers = {}
    for name in importlib.import_module("_colm_edge_native").implementations:
        os.environ["COLM_EDGE_NATIVE"] = name  # the extension reads it when it is loaded
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        readers[name] = module.read
    return {**readers, "numpy": read_numpy}


def microseconds(function: Callable[..., Any], *arguments: Any) -> list[float]:
    """Return the time of one call in REPEATS repeats, each of about REPEAT_SECONDS."""
    n_calls, elapsed = 1, 0.0
    while elapsed < REPEAT_SECONDS:  # also warms up
        n_calls *= 2
        elapsed = run(function, arguments, n_calls)
    return [run(function, arguments, n_calls) / n_calls * 1e6 for _ in range(REPEATS)]


def run(function: Callable[..., Any], arguments: tuple[Any, ...], n_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(n_calls):
        function(*arguments)
    return time.perf_counter() - start


def measure() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, N_VOCAB).astype(np.float32)
    hidden, w_hidden = rng.normal(size=(2, N_EMBD)).astype(np.float32)
    w_logit, bias = np.zeros(8, np.float32), np.zeros(1, np.float32)
    tiny, out = logits[:8].copy(), np.empty(9, np.float32)
    cases: dict[str, tuple[Any, ...]] = {
        f"head {N_EMBD}": (tiny, hidden, w_hidden, w_logit, bias, out, 8, -1),
        f"features {N_VOCAB}": (logits, None, None, None, None, out[:8], N_VOCAB, -1),
    }
    rows = []
    readers = implementations()
    for case, arguments in cases.items():
        times = {name: microseconds(read, *arguments) for name, read in readers.items()}
        numpy_median = statistics.median(times["numpy"])
        for name, values in times.items():
            median = statistics.median(values)
            rows.append(
                {
                    "case": case,
                    "implementation": name,
                    "median_us": round(median, 2),
                    "min_us": round(min(values), 2),
                    "max_us": round(max(values), 2),
                    "ratio_numpy": round(numpy_median / median, 1),
                }
            )
    return rows


def machine() -> str:
    """Return the CPU model, numpy's version and the date in one line."""
    from colm_edge.bench.methods import cpu_name

    system, today = platform.system(), datetime.date.today()
    return f"{cpu_name()}, {system}, one core, numpy {np.__version__}, {today}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    output = parser.parse_args().output
    rows = measure()
    if output == "json":
        print(json.dumps({"machine": machine(), "repeats": REPEATS, "rows": rows}, indent=1))
        return
    print(f"{machine()}; median of {REPEATS} repeats (range)\n")
    print("| case | implementation | µs per call | times numpy |\n| --- | --- | --- | --- |")
    for row in rows:
        spread = f"{row['median_us']:.2f} ({row['min_us']:.2f}–{row['max_us']:.2f})"
        print(f"| {row['case']} | {row['implementation']} | {spread} | {row['ratio_numpy']:.1f} |")


if __name__ == "__main__":
    main()
