"""What a decode of k tokens costs: measured once for a model, a machine and its settings, and kept.

The cost is not proportional to k, and on some CPUs not even monotonic: a schedule that knows the
table beats a rule of thumb.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colm_edge.session import Session

VERSION = 1  # of how it is measured
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
N_PAST = 128  # tokens in the cache before each decode, where the context has room for them
SECONDS = 4.0  # of measuring, but for what one decode of each size takes
ROUNDS = 15


@dataclass(frozen=True)
class CostTable:
    """Seconds that one decode takes, by its number of tokens; rising sizes."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, n: int) -> float:
        """Return the seconds of a decode of n tokens, between measured sizes by interpolation and
        beyond the largest in proportion to it."""
        at = bisect_left(self.sizes, n)
        if at == len(self.sizes):
            return self.seconds[-1] * n / self.sizes[-1]
        if self.sizes[at] == n or at == 0:
            return self.seconds[at]
        low, high = self.sizes[at - 1], self.sizes[at]
        share = (n - low) / (high - low)
        return self.seconds[at - 1] * (1 - share) + self.seconds[at] * share


def cost_table(session: Session, *, fresh: bool = False) -> CostTable:
    """Return a session's table from the cache, or measure it and keep it there.

    The cache is a file for each model, machine and number of threads under $XDG_CACHE_HOME (or
    ~/.cache)/colm-edge. fresh: measure in any case. The session's timeline is overwritten.
    """
    session.open()
    path = _cache_file(session)
    if not fresh:
        try:
            kept = json.loads(path.read_text())
            return CostTable(tuple(kept["sizes"]), tuple(kept["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or a broken one: measured anew
    table = measure(session)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"model": str(session.model.path), "sizes": table.sizes, "seconds": table.seconds}
        temporary.write_text(json.dumps(kept) + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a cache that cannot be written is measured again
    return table


def measure(session: Session) -> CostTable:
    """Time decodes of every size behind the same prefix; medians.

    A size's decodes follow each other, as those of one token do in a loop: llama.cpp keeps its
    graph from one decode to the next of the same size, which for a very small model is a third of
    the time.
    """
    n_past = min(N_PAST, session.n_ctx // 2)
    sizes = [n for n in SIZES if n_past + n <= session.n_ctx]
    draw = random.Random(0)
    tokens = [draw.randrange(session.model.n_vocab) for _ in range(n_past + sizes[-1])]
    medians = []
    session.sync(tokens)  # warms up
    for n in sizes:
        times: list[float] = []
        begun = perf_counter()
        while len(times) < ROUNDS and (not times or perf_counter() - begun < SECONDS / len(sizes)):
            session.sync(tokens[:n_past])
            before = session.seconds
            session.sync(tokens[: n_past + n])
            times.append(session.seconds - before)
        medians.append(statistics.median(times))
    return CostTable(tuple(sizes), tuple(medians))


def _cache_file(session: Session) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    machine = f"{platform.node()}-{platform.machine()}-{session.n_threads}"
    name = f"{VERSION}-{session.model.fingerprint[:16]}-{machine}-{session.model.n_gpu_layers}.json"
    return Path(home) / "colm-edge" / "costs" / name
