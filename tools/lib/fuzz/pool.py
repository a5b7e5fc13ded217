"""Children that read mutated files, each within 10 seconds of CPU time and 2 GB.

Memory is limited by RLIMIT_DATA, which counts what a process may write to but no mapped files, so
that weights do not count. Time is the process's own: a busy machine makes no hang.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Self

from colm_edge.errors import LONGEST, ColmError
from lib.fuzz.kind import Files, Kind, Read

CPU_SECONDS = 10
MEMORY = 2 << 30  # more than what a process has before it reads
WALL_SECONDS = 120.0  # for what waits instead of working
READ, REFUSED = "read", "refused"
_ENDED_BY = {signal.SIGXCPU: "hang", signal.SIGKILL: "killed, out of memory or hanging"}


@dataclass
class Tally:
    """What became of a kind's tries. faults: what happened, and where, to its smallest input."""

    kind: str
    n_read: int = 0
    n_refused: int = 0
    n_faults: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Files] = field(default_factory=dict)
    seconds: float = 0.0


def try_kind(kind: Kind, home: Path, n: int, seed: int = 0, n_children: int = 1) -> Tally:
    """Read n mutated inputs of a kind. The same seed makes the same ones.

    home: a folder for samples and inputs.
    """
    begun, tally = perf_counter(), Tally(kind.name)
    (home / kind.name).mkdir(parents=True, exist_ok=True)
    with Child(kind, home) as first:
        # One alone makes the samples.
        others = [Child(kind, home) for _ in range(1, n_children)]
        samples = read_samples(home / kind.name)

        def work(i: int, child: Child) -> None:
            for number in range(i, n, n_children):
                _count(tally, child.attempt(seed, number), samples, kind, seed, number)

        with ThreadPoolExecutor(n_children) as threads:
            done = [threads.submit(work, i, c) for i, c in enumerate([first, *others])]
            for one in done:
                one.result()
        for child in others:
            child.close()
    tally.seconds = perf_counter() - begun
    return tally


def _count(
    tally: Tally, told: str, samples: Sequence[Files], kind: Kind, seed: int, number: int
) -> None:
    if told == READ:
        tally.n_read += 1
    elif told == REFUSED:
        tally.n_refused += 1
    else:
        tally.n_faults[told] += 1
        files = input_of(kind, samples, seed, number)
        if told not in tally.faults or _size(files) < _size(tally.faults[told]):
            tally.faults[told] = files


def _size(files: Files) -> int:
    return sum(map(len, files.values()))


def input_of(kind: Kind, samples: Sequence[Files], seed: int, number: int) -> Files:
    """Return the mutated input of a number."""
    rng = Random(f"{kind.name} {seed} {number}")
    return kind.mutate(rng.choice(samples), rng)


def write_files(folder: Path, files: Files) -> None:
    """Put an input's files into a folder, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_samples(home: Path) -> list[Files]:
    """Return a kind's valid inputs, as `_open` keeps them."""
    return [
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for folder in sorted((home / "samples").iterdir())
    ]


class Child:
    """A process that reads inputs of a kind, and another one after one that an input has ended.

    Raises RuntimeError where a valid sample cannot be read.
    """

    def __init__(self, kind: Kind, home: Path) -> None:
        self._kind, self._home = kind, home / kind.name
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._kind, self._home), daemon=True
        )
        self._process.start()
        theirs.close()
        told = self._told(10 * WALL_SECONDS)
        if told != READ:
            self.close()
            raise RuntimeError(f"a valid sample of {self._kind.name}: {told}")

    def attempt(self, seed: int, number: int) -> str:
        """Read an input; return READ, REFUSED, or what went wrong."""
        with suppress(OSError):
            self._connection.send((seed, number))
        told = self._told(WALL_SECONDS)
        if not self._process.is_alive() or told in _ENDED_BY.values():
            self.close()
            self._start()
        return told

    def _told(self, seconds: float) -> str:
        try:
            if self._connection.poll(seconds):
                return str(self._connection.recv())
            return "hang"
        except (EOFError, OSError):
            self._process.join()
            code = -(self._process.exitcode or 0)
            if code <= 0:
                return f"the process ends with exit code {-code}"
            return _ENDED_BY.get(signal.Signals(code), f"ended by {signal.Signals(code).name}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, kind: Kind, home: Path) -> None:
    """Read inputs as they are asked for, until the parent is gone."""
    _silence()
    read = _open(kind, home)
    folder = home / f"input-{os.getpid()}"
    samples = read_samples(home)
    for files in samples:
        write_files(folder, files)
        if (told := _outcome(read, folder)) != READ:
            break
    connection.send(told)
    _limit_memory()
    with suppress(EOFError):
        while True:
            seed, number = connection.recv()
            write_files(folder, input_of(kind, samples, seed, number))
            _limit_time()
            connection.send(_outcome(read, folder))
    shutil.rmtree(folder, ignore_errors=True)


def _open(kind: Kind, home: Path) -> Read:
    """Return what reads a kind, and make its samples if there are none."""
    needs = home / "needs"
    if not needs.exists():
        needs.mkdir(parents=True)
        for i, files in enumerate(kind.samples(needs)):
            write_files(home / "samples" / f"{i:03}", files)
    return kind.reader(needs)


def _outcome(read: Read, folder: Path) -> str:
    before = _peak()
    try:
        read(folder)
    except ColmError as e:
        told = str(e).replace(str(folder), "")
        if len(told) > LONGEST:
            return "a message that is too long"
        return REFUSED if told.isprintable() else "a message with control characters"
    except Exception as e:
        return f"{type(e).__name__} at {_place(e)}"
    return READ if _peak() - before < MEMORY // 2 else "more than 1 GB"


def _place(error: BaseException) -> str:
    """Return the last line of colm-edge's own that an error came through, and its last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "colm_edge" in Path(frame.filename).parts] or frames
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (own[-1], frames[-1])]
    return " in ".join(dict.fromkeys(reversed(places)))


def _silence() -> None:
    """Keep what llama.cpp and tracebacks print out of the table."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _limit_time() -> None:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(spent.ru_utime + spent.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_memory() -> None:
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, resource.RLIM_INFINITY))


def _peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
