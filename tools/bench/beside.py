"""Measure how many tokens per second a pair writes beside a busy program, by its threads.

    python tools/make_random_pair.py --out build/random
    python tools/bench/beside.py -m build/random/base.gguf -me build/random/expert.gguf

The busy program is a Python loop that never waits: on any core, or held on one of ours (Linux).
Its start is part of what is measured. With `--replay f=0` the base writes alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from time import perf_counter

from colm_edge.bench.methods import measured_on
from colm_edge.bench.replay import Process, replay
from colm_edge.llama.threads import cores, n_cores
from colm_edge.pair import Pair, load

LOADS = ("quiet", "beside one", "beside one, held")
# It ends by itself if we are killed.
BUSY = "import os, time\nbegun = time.time()\n{held}\nwhile time.time() < begun + {seconds}: pass"
HELD = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
TOKENS = 96  # of a trace; the next one follows


def writing(pair: Pair, process: Process) -> Iterator[None]:
    """Write traces for ever, a token at a time."""
    for seed in count():
        trace = process.draw(TOKENS, pair.n_shared, seed)
        read = pair.switch.reader(pair.base, pair.n_shared)
        for _ in replay(pair.base_session, pair.expert, read, trace, 0.5, pair.n_shared):
            yield


def speed_beside(writer: Iterator[None], kind: str, seconds: float) -> float:
    """Return the tokens per second of `seconds` beside a load of a kind."""
    other = None
    if kind != "quiet":
        code = BUSY.format(held=HELD if kind == LOADS[2] else "", seconds=2 * seconds + 10)
        other = subprocess.Popen([sys.executable, "-c", code])
    try:
        begun, n = perf_counter(), 0
        while perf_counter() - begun < seconds:
            next(writer)
            n += 1
        return n / (perf_counter() - begun)
    finally:
        if other is not None:
            other.kill()
            other.wait()


def seconds_until_full(writer: Iterator[None], seconds: float) -> float:
    """Write until every core is in use again, `seconds` at most; return how long that took."""
    begun, most = perf_counter(), n_cores()
    while cores().threads(most) < most and perf_counter() - begun < seconds:
        next(writer)
    return perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--threads", default=f"1,{n_cores()},0", help="0: as many as are free")
    parser.add_argument("--replay", default="f=0.2", type=Process.parse, metavar="f=RATE")
    parser.add_argument("-s", "--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("-r", "--rounds", type=int, default=3)
    args = parser.parse_args()
    kinds = LOADS if hasattr(os, "sched_setaffinity") else LOADS[:2]
    settings = [int(n) for n in args.threads.split(",")]
    speeds: dict[tuple[int, str], list[float]] = {}
    back: list[float] = []
    for _ in range(args.rounds):
        for n in settings:
            with load(args.model, args.model_expert, n_ctx=192, n_threads=n) as pair:
                writer = writing(pair, args.replay)
                for _ in range(TOKENS // 4):
                    next(writer)  # warms up
                for kind in kinds:
                    seconds_until_full(writer, args.seconds)
                    found = speed_beside(writer, kind, args.seconds)
                    speeds.setdefault((n, kind), []).append(found)
                    if n == 0 and kind != "quiet":
                        back.append(seconds_until_full(writer, args.seconds))
                machine = measured_on(pair)
    print(f"| threads | {' | '.join(kinds)} |\n| --- |{' ---: |' * len(kinds)}")
    for n in settings:
        row = [sorted(speeds[n, kind]) for kind in kinds]
        cells = [f"{statistics.median(x):.1f} ({x[0]:.0f}–{x[-1]:.0f})" for x in row]
        print(f"| {n or 'auto'} | {' | '.join(cells)} |")
    print("\nseconds until every core was in use again:", ", ".join(f"{s:.2f}" for s in back))
    print("\n" + machine)


if __name__ == "__main__":
    main()
