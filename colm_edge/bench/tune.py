"""Find the settings that make a pair's models fastest on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from colm_edge.llama.context import PLAIN_TYPES, ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.llama.threads import n_cores

if TYPE_CHECKING:
    from colm_edge.pair import Pair


ROUNDS = 5
N_PAST = 512  # tokens in the KV cache, so that attention takes its part of the time
PROMPT_ROUNDS = 3
CATCH_UP = 5  # tokens an expert evaluates at once, at a defer rate of 0.2
# A setting must save the first share, since less is noise; no other time may rise by more than the
# second.
WORTH, DEARER = 0.03, 0.1


def tune(pair: Pair, note: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each tried setting, in milliseconds, and lines of advice.

    Settings are varied one after the other, and the best value is kept: threads, flash attention,
    the type of the KV cache, n_ubatch. The base is judged by decodes of one token, the expert by
    decodes of CATCH_UP tokens, and n_ubatch by the prompt. A value that makes one of these much
    slower is not kept.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, ContextOptions] = {}
    for role, session in (("base", pair.base_session), ("expert", pair.expert_session)):
        options = replace(
            session.options,
            n_threads=session.n_threads,
            n_ubatch=session.n_ubatch,
            flash_attn=session.flash_attn,
        )
        for field, values in (
            ("n_threads", _thread_counts()),
            ("flash_attn", ("on", "off")),
            ("cache_type", ("f16", "q8_0")),
            ("n_ubatch", (64, 128, 256, 512)),
        ):
            tried = [options, *(o for o in (_with(options, field, v) for v in values))]
            tried = [o for i, o in enumerate(tried) if o not in tried[:i]]
            note(f"{role}: {field.replace('_', ' ')} …")
            times = _times([(session.model, o) for o in tried])
            keep = _best(times, 2 if field == "n_ubatch" else 0 if role == "base" else 1)
            rows += [
                {
                    "model": role,
                    "threads": o.n_threads,
                    "flash_attention": o.flash_attn,
                    "cache_type": o.cache_type_k,
                    "ubatch": o.n_ubatch,
                    "ms_1_token": 1e3 * one,
                    f"ms_{CATCH_UP}_tokens": 1e3 * several,
                    "ms_prompt": 1e3 * prompt,
                    "kept": "yes" if i == keep else "",
                }
                for i, (o, (one, several, prompt)) in enumerate(zip(tried, times, strict=True))
            ]
            options = tried[keep]
        best[role] = options
    advice = [f"{role}: {_flags(o)}" for role, o in best.items()]
    return rows, advice


def _best(times: Sequence[tuple[float, ...]], judged: int) -> int:
    """Return the index of the best row by column `judged`: the first, unless another one saves
    enough."""
    first = times[0]
    better = [
        i
        for i, row in enumerate(times)
        if row[judged] < (1 - WORTH) * first[judged]
        and all(x <= (1 + DEARER) * y for x, y in zip(row, first, strict=True))
    ]
    return min(better, key=lambda i: times[i][judged], default=0)


def _thread_counts() -> tuple[int, ...]:
    cores = n_cores()
    return tuple(n for n in range(1, cores + 1) if n == cores or n & (n - 1) == 0)


def _with(options: ContextOptions, field: str, value: Any) -> ContextOptions:
    if field == "cache_type":
        # llama.cpp needs flash attention for a quantised value cache.
        flash = "on" if options.flash_attn == "off" and value != "f16" else options.flash_attn
        return replace(options, cache_type_k=value, cache_type_v=value, flash_attn=flash)
    if value == "off" and options.cache_type_v not in PLAIN_TYPES:
        return options
    return replace(options, **{field: value})


def _flags(options: ContextOptions) -> str:
    return (
        f"-t {options.n_threads} -fa {options.flash_attn} -ctk {options.cache_type_k} "
        f"-ctv {options.cache_type_v} -ub {options.n_ubatch}"
    )


def _times(tried: Sequence[tuple[Model, ContextOptions]]) -> list[tuple[float, float, float]]:
    """Return the median seconds of (one token, CATCH_UP tokens, a prompt of about N_PAST) for each
    setting; all take turns."""
    sessions = []
    for model, options in tried:
        n_ctx = min(options.n_ctx, N_PAST + CATCH_UP + 1)
        sessions.append(Session(model, replace(options, n_ctx=n_ctx)))
    taken: list[tuple[list[float], list[float]]] = [([], []) for _ in sessions]
    prompts: list[list[float]] = [[] for _ in sessions]
    try:
        for session in sessions:
            session.open()
        for _ in range(PROMPT_ROUNDS):
            for session, found in zip(sessions, prompts, strict=True):
                session.forget()
                before = session.account.seconds
                session.sync(_prompt(session))
                found.append(session.account.seconds - before)
        for i in range(1, ROUNDS + 1):
            for session, times in zip(sessions, taken, strict=True):
                for n, found in zip((1, CATCH_UP), times, strict=True):
                    before = session.account.seconds
                    session.sync([*_prompt(session), *[i % 7 + n] * n])
                    found.append(session.account.seconds - before)
    finally:
        for session in sessions:
            session.close()
    return [
        (statistics.median(one), statistics.median(more), statistics.median(prompt))
        for (one, more), prompt in zip(taken, prompts, strict=True)
    ]


def _prompt(session: Session) -> list[int]:
    n = session.n_ctx - CATCH_UP - 1
    return [31 * i % session.model.n_vocab for i in range(max(1, n))]
