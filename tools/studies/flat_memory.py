"""Show that memory stays flat: answers that are broken off, cancelled or fail; loads; idle unloads.

    python tools/studies/flat_memory.py                       # the demo pair
    python tools/studies/flat_memory.py -m base.gguf -me expert.gguf --answers 200 --loads 20

Prints the memory that the process has (RSS, in MB), its open files and its threads along the way.
What grows without end grows between the last rows too.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm_edge.arrays import Floats
from colm_edge.errors import ColmError
from colm_edge.options import Options
from colm_edge.pair import Pair, load
from colm_edge.slots import Slots
from colm_edge.stream import Stream
from colm_edge.switch.reading import AnySwitch, Base, Reader

ROWS = 10  # of each part
WAYS = (
    "whole", "break", "close", "cancel", "error", "broken switch", "refused", "slot", "unread",
)  # fmt: skip
PROMPTS = (
    "What is the symbol of iron?",
    "List three facts about bees.",
    "a b c " * 40,
    "1 2 3 4 5",
)


@dataclass(frozen=True)
class Held:
    """What a process holds. rss: in MB."""

    rss: float
    n_files: int
    n_threads: int


def held() -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    rss = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return Held(rss, len(os.listdir("/proc/self/fd")), threading.active_count())


class BrokenError(Exception):
    """Raised by what reads an answer, or by what writes it."""


class BrokenSwitch:
    """A switch that fails after some tokens."""

    def __init__(self, switch: AnySwitch, after: int) -> None:
        self._switch, self._left = switch, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._switch, name)

    def reader(self, base: Base, n_choose: int) -> Reader:
        read = self._switch.reader(base, n_choose)

        def broken(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            self._left -= 1
            if self._left < 0:
                raise BrokenError
            return read(logits, hidden)

        return broken


def one_answer(pair: Pair, slots: Slots, draw: random.Random) -> str:
    """Write an answer, to its end or not, in one of several ways; return which way."""
    way, stop_at = draw.choice(WAYS), draw.randint(0, 10)
    options = Options(
        max_tokens=20,
        threshold=draw.choice((None, 0.0, 0.5, 1.0)),
        temperature=draw.choice((0.0, 0.8)),
        schedule=draw.choice(("fast", "sequential")),
    )
    tokens = pair.prompt_tokens([{"role": "user", "content": draw.choice(PROMPTS)}])
    switch = BrokenSwitch(pair.switch, stop_at) if way == "broken switch" else None
    if way == "refused":
        tokens *= 50
    try:
        if way == "slot":
            with slots.take(tokens) as timelines:
                read(pair.stream_tokens(tokens, options, timelines), way, stop_at)
        else:
            read(pair.stream_tokens(tokens, options, switch=switch), way, stop_at)
    except (BrokenError, ColmError):
        pass
    return way


def read(stream: Stream, way: str, stop_at: int) -> None:
    if way == "unread":
        return
    for i, _ in enumerate(stream):
        if i < stop_at:
            continue
        match way:
            case "error":
                raise BrokenError
            case "cancel":
                stream.cancel()
            case "close":
                stream.close()
            case "break":
                return


def answers(pair: Pair, n: int, seed: int) -> Iterator[None]:
    draw, ways = random.Random(seed), Counter[str]()
    with closing(Slots(pair, 1)) as slots:
        for _ in range(n):
            ways[one_answer(pair, slots, draw)] += 1
            yield
    print(f"({', '.join(f'{n} {way}' for way, n in sorted(ways.items()))})")


def loads(n: int, load_pair: Callable[[], Pair]) -> Iterator[None]:
    for i in range(n):
        with load_pair() as pair:
            pair.generate(PROMPTS[i % len(PROMPTS)], max_tokens=8, threshold=0.5)
        yield


def unloads(pair: Pair, n: int) -> Iterator[None]:
    """Free the idle expert again and again, as the server does, with one slot and with four."""
    for n_slots in (1, 4):
        with closing(Slots(pair, n_slots)) as slots:
            tokens = pair.prompt_tokens([{"role": "user", "content": PROMPTS[0]}])
            for _ in range(n // 2):
                with slots.take(tokens) as timelines:
                    list(pair.stream_tokens(tokens, Options(max_tokens=4, threshold=0), timelines))
                slots.unload_expert()
                yield


def watched(name: str, n: int, steps: Iterator[None]) -> list[Held]:
    """Run the steps; print and return what is held along the way."""
    seen = []
    for i, _ in enumerate(steps, 1):
        if i % max(1, n // ROWS) == 0:
            seen.append(held())
            one = seen[-1]
            print(f"| {name} | {i} | {one.rss:.1f} | {one.n_files} | {one.n_threads} |", flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--pair")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--unloads", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def load_pair() -> Pair:
        return load(
            args.model, args.model_expert, pair=args.pair, n_ctx=512, n_threads=args.threads
        )

    print("| part | done | RSS, MB | files | threads |\n| --- | ---: | ---: | ---: | ---: |")
    with load_pair() as pair:
        watched("answers", args.answers, answers(pair, args.answers, args.seed))
        watched("unloads", args.unloads, unloads(pair, args.unloads))
    watched("loads", args.loads, loads(args.loads, load_pair))


if __name__ == "__main__":
    main()
