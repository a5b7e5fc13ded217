"""Measure how fast one model writes from the first thread that decodes, and from a second one.

    python tools/bench/second_thread.py -m MODEL.gguf

Servers, windows and `eval` decode in another thread than the one that measured or scored. In a
process of its own each: with the waits that colm-edge sets, and with OpenMP's own.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import threading
from time import perf_counter

from colm_edge.bench.methods import cpu_name
from colm_edge.llama import WAITS
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.llama.threads import n_cores

# OpenMP's own spin count; that it is given keeps colm-edge from setting anything.
OWN = {"GOMP_SPINCOUNT": WAITS["GOMP_SPINCOUNT"]}
PROMPT = list(range(100, 164))


def write(session: Session, n: int, where: str) -> None:
    """Write n tokens greedily, and print how many that is per second."""
    tokens = PROMPT[:]
    session.sync(tokens)
    begun = perf_counter()
    for _ in range(n):
        tokens.append(int(session.logits.argmax()))
        session.sync(tokens)
    print(f"  {where}: {n / (perf_counter() - begun):.1f} tokens per second", flush=True)


def measure(path: str, n: int, n_threads: int) -> None:
    session = Session(Model(path), ContextOptions(n_ctx=1024, n_threads=n_threads))
    write(session, n // 4, "warming up")
    for _ in range(2):
        write(session, n, "first thread")
        second = threading.Thread(target=write, args=(session, n, "second thread"))
        second.start()
        second.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int, default=n_cores())
    parser.add_argument("-n", type=int, default=200, help="tokens of each measurement")
    parser.add_argument("--here", action="store_true", help="measure in this process alone")
    args = parser.parse_args()
    if args.here:
        measure(args.model, args.n, args.threads)
        return
    print(f"{cpu_name()}, {datetime.date.today()}")
    without = {name: value for name, value in os.environ.items() if name not in WAITS}
    for name, more in (("colm-edge's waits", {}), ("OpenMP's own", OWN)):
        print(f"{name}, {args.threads} threads", flush=True)
        command = [sys.executable, __file__, "--here", "-m", args.model]
        command += ["-t", str(args.threads), "-n", str(args.n)]
        subprocess.run(command, env=without | more, check=True)


if __name__ == "__main__":
    main()
