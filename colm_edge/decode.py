"""The collaborative loop: token ids in, one `Step` per token out.

The exact Co-LLM procedure (arXiv 2403.03870, section 2): the base is evaluated at every position,
the switch reads its state, and only where p_defer > threshold does the expert catch up, in one
batch, and write the token. Then control is the base's again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.errors import ColmError
from colm_edge.switch import Reader

Floats = npt.NDArray[np.float32]
Source = Literal["base", "expert"]


@dataclass(frozen=True)
class Options:
    """How an answer is written. Every default of CLI, server and Python API stands here.

    Sampling follows llama.cpp: repeat penalty, top-k, top-p, min-p, temperature, in that order;
    a temperature of 0 is greedy.
    """

    max_tokens: int = -1  # -1: until an end token or the end of the context
    threshold: float | None = None  # None: the switch's own
    defer_rate: float | None = None  # turned into a threshold by the switch's calibration
    strategy: Literal["defer", "compose"] = "defer"
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = -1  # -1: another one each time
    stop: tuple[str, ...] = ()
    raw: bool = False  # no chat template

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        limits: tuple[tuple[str, float | None, float, float], ...] = (
            ("threshold", self.threshold, 0, 1),
            ("defer_rate", self.defer_rate, 0, 1),
            ("temperature", self.temperature, 0, math.inf),
            ("top_p", self.top_p, 0, 1),
            ("min_p", self.min_p, 0, 1),
        )
        for name, value, low, high in limits:
            if value is not None and not low <= value <= high:
                bounds = f"from {low} to {high}" if high < math.inf else f"{low} or more"
                raise ColmError(f"{name} is {value}; expected a number {bounds}")
        if self.repeat_penalty <= 0:
            raise ColmError(f"repeat_penalty is {self.repeat_penalty}; expected more than 0")
        if self.strategy not in ("defer", "compose"):
            raise ColmError(f"strategy is {self.strategy!r}; expected 'defer' or 'compose'")
        if self.threshold is not None and self.defer_rate is not None:
            raise ColmError("threshold and defer_rate are two ways to say one thing; give one")
        if "" in self.stop:
            raise ColmError("a stop text is empty; give at least one character")

    def with_changes(self, **changes: Any) -> Options:
        try:
            return replace(self, **changes)
        except TypeError as e:
            known = ", ".join(self.__dataclass_fields__)
            raise ColmError(f"unknown option in {sorted(changes)}; known: {known}") from e


@dataclass(slots=True)
class Step:
    """One written token: who wrote it, how sure the switch was, and what it cost."""

    token: int
    source: Source
    p_defer: float
    logprob: float  # of the token, under the model (or mixture) that wrote it, unfiltered
    text: str = ""  # whole characters only: a split one arrives with its last token


@dataclass(slots=True)
class Stats:
    """What an answer took; `expert_tokens` counts every token the expert evaluated."""

    n_prompt: int = 0
    n_generated: int = 0
    n_deferred: int = 0
    defer_rate: float = 0.0
    expert_calls: int = 0
    expert_tokens: int = 0
    base_seconds: float = 0.0
    expert_seconds: float = 0.0
    expert_load_seconds: float = 0.0  # of expert_seconds: weights and context, at its first call
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0

    def finish(self) -> None:
        if self.n_generated:
            self.defer_rate = self.n_deferred / self.n_generated
        if self.total_seconds > 0:
            self.tokens_per_second = self.n_generated / self.total_seconds


class Timeline(Protocol):
    """What the loop needs of a session; a scripted or a remote one has the same members."""

    n_ctx: int
    n_evaluated: int
    n_calls: int
    seconds: float
    load_seconds: float

    @property
    def logits(self) -> Floats: ...
    @property
    def hidden(self) -> Floats: ...
    def sync(self, tokens: Sequence[int]) -> int: ...


# Picks a token from logits (n_choose,) and hears of every token written.
Sampler = Callable[[Floats], int]


class Decoder:
    """Two timelines and a switch at work; an iterator of steps.

    n_choose: ids at or above it are never written while the two work together.
    end_tokens: they end the answer and are no step of it.
    sample: None writes the likeliest token.
    """

    def __init__(
        self,
        base: Timeline,
        expert: Timeline,
        read: Reader,
        prompt: Sequence[int],
        *,
        threshold: float,
        n_choose: int,
        end_tokens: frozenset[int],
        max_tokens: int = -1,
        compose: bool = False,
        sample: Sampler | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.stats = Stats(n_prompt=len(self.tokens))
        self.finish_reason: Literal["stop", "length"] | None = None
        self._base, self._expert, self._read = base, expert, read
        self._threshold, self._n_choose, self._end_tokens = threshold, n_choose, end_tokens
        self._max_tokens, self._compose, self._sample = max_tokens, compose, sample
        self._lock = lock or threading.RLock()
        self._expert_head = np.empty(len(readout.FEATURES), np.float32)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self.finish_reason is None and self._is_full():
            self.finish_reason = "length"
        if self.finish_reason is not None:
            raise StopIteration
        stats = self.stats
        begun = perf_counter()
        with self._lock:
            step = self._step()
        stats.total_seconds += perf_counter() - begun
        if step.token in self._end_tokens:
            self.finish_reason = "stop"
            raise StopIteration
        self.tokens.append(step.token)
        stats.n_generated += 1
        stats.n_deferred += step.source == "expert"
        return step

    def _is_full(self) -> bool:
        # The context must hold every token that is evaluated; the last one written is not.
        n_ctx = min(self._base.n_ctx, self._expert.n_ctx)
        return len(self.tokens) > n_ctx or 0 <= self._max_tokens <= self.stats.n_generated

    def _step(self) -> Step:
        base, expert, stats = self._base, self._expert, self.stats
        seconds = base.seconds
        base.sync(self.tokens)
        stats.base_seconds += base.seconds - seconds
        p_defer, choice, logsumexp = self._read(base.logits, base.hidden)
        # p > 0 holds for every finite state; where it underflows, 0 still means always.
        if not (p_defer > self._threshold or self._threshold <= 0):
            return self._write("base", p_defer, base.logits, choice, logsumexp)
        calls, seconds, loading = expert.n_calls, expert.seconds, expert.load_seconds
        stats.expert_tokens += expert.sync(self.tokens)
        stats.expert_calls += expert.n_calls - calls
        stats.expert_seconds += expert.seconds - seconds
        stats.expert_load_seconds += expert.load_seconds - loading
        logits = expert.logits
        if self._compose and p_defer < 1:
            logits = mixture(base.logits, expert.logits, p_defer, self._n_choose)
        choice, logsumexp = readout.read(
            logits, None, None, None, None, self._expert_head, min(self._n_choose, len(logits)), -1
        )
        return self._write("expert", p_defer, logits, choice, logsumexp)

    def _write(
        self, source: Source, p_defer: float, logits: Floats, choice: int, logsumexp: float
    ) -> Step:
        if self._sample is not None:
            choice = self._sample(logits[: self._n_choose])
        return Step(choice, source, p_defer, float(logits[choice]) - logsumexp)


def mixture(base: Floats, expert: Floats, p_defer: float, n_choose: int) -> Floats:
    """Return log((1−p)·P_base + p·P_expert), shape (n_choose,): Co-LLM's equation 1."""

    def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
        x = logits.astype(np.float64)
        x -= x.max()
        x -= math.log(np.exp(x).sum())
        return x

    ours = log_softmax(base)[:n_choose] + math.log1p(-p_defer)
    theirs = log_softmax(expert)[:n_choose] + (math.log(p_defer) if p_defer > 0 else -math.inf)
    return np.logaddexp(ours, theirs).astype(np.float32)
