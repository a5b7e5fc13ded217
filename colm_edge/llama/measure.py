"""Measure what a decode of k tokens costs, once per model, machine and settings, and cache it.

The cost is not proportional to k, and on some CPUs not even monotonic, so a schedule that knows the
table beats a rule of thumb.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import statistics
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from colm_edge.cancel import Cancel
from colm_edge.errors import WriteError
from colm_edge.files import cache_folder, fingerprint, replacing
from colm_edge.llama.costs import OUTPUTS, CostTable

if TYPE_CHECKING:
    from colm_edge.llama.session import Session

VERSION = 10  # of the method and the key; tables of other versions are measured again
# Some CPUs have a step after each multiple of 16 tokens: 16 and 17, 32 and 33 are its two sides.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 17, 20, 24, 32, 33, 40, 48, 64)
N_PAST = 128  # tokens in the KV cache before each decode, if the context has room for them
# What is measured first: it gives a rough picture in a hurry.
COARSE = (1, 4, 16, 8, 2)
HASTY, SECONDS = 0.5, 3.0  # of measuring, plus the decode in flight: in a hurry, and at length
ROUNDS = 8
OFTEN = 16  # sizes up to this one are measured in every round
MOST_DECODE_SECONDS = 3600.0  # of a decode, that a kept table may tell
LONG = 0.005  # seconds of a decode that make the time to build a graph negligible


def kept_table(session: Session) -> CostTable | None:
    """Return a session's table from the cache, or None."""
    kept = _kept(session)
    return None if kept is None else kept[0]


def _kept(session: Session) -> tuple[CostTable, bool] | None:
    try:
        kept = json.loads(_cache_file(session).read_text())
        sizes, seconds, more = kept["sizes"], kept["seconds"], kept["more"]
        if (
            len(sizes) != len(seconds)
            or not all(isinstance(n, int) and 0 < n <= SIZES[-1] for n in sizes)
            or sizes[:1] != [1]
            or sorted(set(sizes)) != sizes
            or not all(isinstance(x, float) and 0 < x < MOST_DECODE_SECONDS for x in seconds)
            or len(more) > len(OUTPUTS)
            or not all(isinstance(x, float) and 0 <= x < MOST_DECODE_SECONDS for x in more)
        ):
            return None
        return CostTable(tuple(sizes), tuple(seconds), tuple(more)), bool(kept["hasty"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError):
        return None  # missing or broken: it is measured again


def cost_table(
    session: Session,
    *,
    hasty: bool = False,
    note: Callable[[str], None] = lambda text: None,
    cancel: Cancel | None = None,
) -> CostTable:
    """Return a session's table from the cache, or measure it, and cache it unless other programs
    used the cores meanwhile.

    The cache has a file per model, machine and settings under $XDG_CACHE_HOME (or
    ~/.cache)/colm-edge. hasty: somebody waits, so measure for half a second, or take what was
    measured so; otherwise a table takes seconds. note: called with a message before a measurement.
    cancel: ends the load of the weights or the measurement. The session's own timeline does not
    change.
    """
    kept = _kept(session)
    if kept is not None and (hasty or not kept[1]):
        return kept[0]
    name = session.model.path.name
    note(f"measuring {name} on this machine, once …")
    table, crowded = measure(session, cancel, HASTY if hasty else SECONDS)
    if crowded:
        note(f"other programs use the cores, so {name} will be measured again the next time")
        return table
    content = {
        "model": str(session.model.path),
        "sizes": table.sizes,
        "seconds": table.seconds,
        "more": table.more,
        "hasty": hasty,
    }
    try:
        path = _cache_file(session)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")
    except (OSError, WriteError, RuntimeError) as e:  # RuntimeError: nobody has a home here
        note(f"the measurement cannot be kept ({e}); XDG_CACHE_HOME may name another folder")
    return table


def refine(sessions: Iterable[Session | None], cancel: Cancel) -> bool:
    """Measure at length what was measured in a hurry; return whether there was such a table.

    Models that are not in memory are left out. Raises CancelledError.
    """
    hasty = False
    for session in sessions:
        if session is not None and session.model.loaded:
            kept = _kept(session)
            if kept is not None and kept[1]:
                cost_table(session, cancel=cancel)
                hasty = True
    return hasty


def measure(
    session: Session, cancel: Cancel | None = None, seconds: float = SECONDS
) -> tuple[CostTable, bool]:
    """Time decodes of every size after the same prefix, in a context of their own; return the
    table, and whether other programs wanted the threads' cores meanwhile.

    The sizes take turns, and the (lower) median of a size's times counts, so that a short
    disturbance does not spoil a size. A few sizes come first, the rest in rising order, until the
    seconds are over: a large model may lack the largest ones. Later rounds measure the small sizes
    again, and those that took longer than a larger one.
    """
    largest = min(SIZES[-1], session.n_batch)
    n_past = max(1, min(N_PAST, session.n_ctx - largest))
    with session.twin(n_past + largest) as twin:
        draw = random.Random(0)
        n_vocab = twin.model.n_vocab
        prefix = [draw.randrange(n_vocab) for _ in range(n_past)]
        # Two continuations that differ in their first token, so that each is evaluated whole.
        one = [draw.randrange(n_vocab - 1) for _ in range(largest)]
        turns = (one, [token + 1 for token in one])
        twin.want_hidden(False)  # with hidden states every token of a batch is an output
        order = [*COARSE, *(n for n in SIZES if n not in COARSE)]
        kinds = [(n, False) for n in order if n <= min(largest, twin.n_ctx - n_past)]
        for n in OUTPUTS:
            if (n, False) in kinds:
                kinds.insert(kinds.index((n, False)) + 1, (n, True))
        times: dict[tuple[int, bool], list[float]] = {}
        twin.open(cancel)
        twin.sync(prefix)
        twin.sync(prefix + turns[0][:1])  # warms up
        begun, turn = perf_counter(), 0
        for i in range(ROUNDS):
            for kind in _again(times) if i else kinds:
                # llama.cpp reuses its graph when the next decode has the same size, as in a loop of
                # single tokens. Building it takes a third of the time of a very small model.
                n, all_states = kind
                if cancel is not None:
                    cancel.check()
                for _ in range(3):
                    before, turn = twin.account.seconds, 1 - turn
                    tokens = prefix + turns[turn][:n]
                    twin.sync(tokens, range(n_past, n_past + n) if all_states else ())
                    times.setdefault(kind, []).append(twin.account.seconds - before)
                    if n > 1 and times[kind][-1] > LONG:
                        break
                if perf_counter() - begun > seconds:
                    return _table(times), twin.crowded
        return _table(times), twin.crowded


def _again(times: dict[tuple[int, bool], list[float]]) -> list[tuple[int, bool]]:
    """Return what to measure again: the small sizes, and those slower than a larger one."""
    found, least = list[tuple[int, bool]](), math.inf
    for kind, taken in sorted(times.items(), reverse=True):
        took = statistics.median_low(taken)
        if kind[0] <= OFTEN or took > least:
            found.append(kind)
        least = min(least, took)
    return found[::-1]


def _table(times: dict[tuple[int, bool], list[float]]) -> CostTable:
    found = {kind: statistics.median_low(taken) for kind, taken in sorted(times.items())}
    more = list[float]()
    for n in OUTPUTS:
        outputs = found.pop((n, True), None)
        if outputs is not None and len(more) == OUTPUTS.index(n):
            more.append(max(0.0, outputs - found[n, False]))
    return CostTable(tuple(n for n, _ in found), tuple(found.values()), tuple(more))


@cache
def _build() -> str:
    """Return a hash of llama.cpp's code for CPUs: the same version may be built another way."""
    from colm_edge.llama.ggml import cpu_libraries

    return fingerprint(*cpu_libraries())


def _cache_file(session: Session) -> Path:
    import llama_cpp

    from colm_edge.llama.backend import model_params

    settings = (
        VERSION,
        platform.node(),
        llama_cpp.__version__,
        _build(),
        model_params().use_extra_bufts,
        llama_cpp.llama_print_system_info(),
        session.model.n_gpu_layers,
        session.model.rpc,
        session.n_threads,
        session.n_batch,
        session.n_ubatch,
        session.flash_attn,
        session.options.cache_type_k,
        session.options.cache_type_v,
    )
    key = hashlib.sha256(repr((session.model.fingerprint, settings)).encode()).hexdigest()
    return cache_folder() / "costs" / f"{key[:24]}.json"
