"""The collaborative loop: token ids in, one `Step` per token out.

The exact Co-LLM procedure (arXiv 2403.03870, section 2): the base is evaluated at every position,
the switch reads its state, and only where p_defer > threshold does the expert catch up, in one
batch, and write the token. Then control is the base's again. `speculate` has its fast twin.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.errors import AbsentExpertError, ModelError
from colm_edge.switch.reading import Reader

if TYPE_CHECKING:
    from colm_edge.llama.session import Session


Floats = npt.NDArray[np.float32]
Source = Literal["base", "expert"]


@dataclass(slots=True)
class Step:
    """One written token: who wrote it, how sure the switch was, and what it cost."""

    token: int
    source: Source
    p_defer: float
    logprob: float  # of the token, under the model (or mixture) that wrote it, unfiltered
    text: str = ""  # whole characters only: a split one arrives with its last token
    # The likeliest tokens, best first, and their log-probabilities, where they were asked for.
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Stats:
    """What an answer took; `base_tokens` and `expert_tokens` count every token that was evaluated,
    the prompt and what was rolled back included. Where the expert works in the background, its
    seconds are partly the base's as well."""

    n_prompt: int = 0
    n_generated: int = 0
    n_deferred: int = 0
    defer_rate: float = 0.0
    base_tokens: int = 0
    expert_calls: int = 0
    expert_tokens: int = 0
    expert_failures: int = 0  # deferrals that the base wrote, for a remote expert was absent
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


# Of a prompt whose tokens are to be told, so many are outputs at once: each takes n_vocab floats.
PROMPT_OUTPUTS = 64


class Timeline(Protocol):
    """What the loop needs of a session; a scripted or a remote one has the same members."""

    n_evaluated: int
    n_calls: int
    seconds: float
    load_seconds: float

    @property
    def n_ctx(self) -> int: ...
    def sync(self, tokens: Sequence[int], outputs: Sequence[int] = ()) -> int: ...
    def state(self, i: int) -> tuple[Floats, Floats]: ...


class Sampler(Protocol):
    """Picks a token from logits (n_choose,). `copy` is one that would pick the same from now on."""

    def __call__(self, logits: Floats) -> int: ...
    def copy(self) -> Sampler: ...


class _CancelledError(Exception):
    """The reader wants no more; raised between two evaluations."""


class Decoder:
    """Two timelines and a switch at work; an iterator of steps.

    n_choose: ids at or above it are never written while the two work together.
    n_probs: how many of the likeliest tokens each step tells.
    defer_row: the id in the base's vocabulary that is the switch and no token, or -1.
    end_tokens: they end the answer and are no step of it.
    sample: None writes the likeliest token.
    follow: told the written tokens before each next one, for an expert that works beside the loop.
    sessions: those whose load and long evaluations `cancel` ends as well, between two batches.
    """

    checks_every_token = False  # whether the expert has its say on tokens that are not deferred

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
        n_probs: int = 0,
        defer_row: int = -1,
        sample: Sampler | None = None,
        follow: Callable[[array[int]], None] | None = None,
        lock: threading.RLock | None = None,
        sessions: Sequence[Session] = (),
    ) -> None:
        self.tokens = array("i", prompt)
        self.stats = Stats(n_prompt=len(self.tokens))
        self.finish_reason: Literal["stop", "length"] | None = None
        self.end: Step | None = None  # the end token, which is no step of the answer
        self._base, self._expert, self._read = base, expert, read
        self._threshold, self._n_choose, self._end_tokens = threshold, n_choose, end_tokens
        self._compose, self._sample, self._defer_row = compose, sample, defer_row
        self._n_probs, self._follow = n_probs, follow
        self._lock = lock or threading.RLock()
        self._sessions = sessions
        self._cancelled = False
        self._thread = 0  # that evaluates
        self._expert_head = np.empty(len(readout.FEATURES), np.float32)
        # The context must hold every token that is evaluated; the last one written is not.
        self._end = min(base.n_ctx, expert.n_ctx) + 1
        if max_tokens >= 0:
            self._end = min(self._end, len(self.tokens) + max_tokens)

    def __iter__(self) -> Iterator[Step]:
        return self

    def cancel(self) -> None:
        """End the answer before its next evaluation; any thread may ask for it."""
        self._cancelled = True

    def _check(self) -> None:
        # An expert that catches up on a thread of its own does so for later answers too.
        if self._cancelled and self._thread == threading.get_ident():
            raise _CancelledError

    def __next__(self) -> Step:
        if self.finish_reason is None and len(self.tokens) >= self._end:
            self.finish_reason = "length"
        if self.finish_reason is None and self._cancelled:
            self.finish_reason = "stop"
        if self.finish_reason is not None:
            raise StopIteration
        stats = self.stats
        begun = perf_counter()
        try:
            with self._lock:
                self._begin_work()
                try:
                    step = self._step()
                finally:
                    self._end_work()
        except _CancelledError:
            self.finish_reason = "stop"
            raise StopIteration from None
        stats.total_seconds += perf_counter() - begun
        if step.token in self._end_tokens:
            self.finish_reason, self.end = "stop", step
            raise StopIteration
        self.tokens.append(step.token)
        stats.n_generated += 1
        stats.n_deferred += step.source == "expert"
        return step

    def _begin_work(self) -> None:
        """Let what the sessions do on this thread be broken off when the answer is cancelled."""
        self._thread = threading.get_ident()
        for session in self._sessions:
            session.check = self._check

    def _end_work(self) -> None:
        for session in self._sessions:
            session.check = None

    def _step(self) -> Step:
        at = len(self.tokens)
        self._work_ahead(self.tokens)
        self._evaluate_base(self.tokens)
        logits, hidden = self._base.state(at - 1)
        p_defer, choice, logsumexp = self._judge(at, logits, hidden)
        if not self._defers(p_defer):
            return self._write("base", p_defer, logits, choice, logsumexp)
        try:
            self._evaluate_expert(self.tokens)
        except AbsentExpertError:  # a remote one, which has said so
            self.stats.expert_failures += 1
            return self._write("base", p_defer, logits, choice, logsumexp)
        return self._write("expert", p_defer, *self._theirs(at, logits, p_defer))

    def _theirs(self, at: int, logits: Floats, p_defer: float) -> tuple[Floats, int, float]:
        """Return the expert's logits for the token at `at`, or the mixture's with the base's, their
        likeliest token and their log-sum-exp."""
        theirs, _ = self._expert.state(at - 1)
        if self._compose and p_defer < 1:
            theirs = mixture(logits, theirs, p_defer, self._n_choose, self._defer_row)
        return theirs, *self._likeliest(at, theirs)

    def read_prompt(self) -> list[Step]:
        """Return the prompt's tokens after the first as if they had been written: by whom each
        would have been, and how likely it was to that model. The expert must be here.

        Returns fewer when the answer is cancelled meanwhile.
        """
        begun, steps = perf_counter(), list[Step]()
        last = len(self.tokens) - 1
        try:
            with self._lock:
                self._begin_work()
                try:
                    for start in range(0, last, PROMPT_OUTPUTS):
                        steps += self._read_tokens(start, min(start + PROMPT_OUTPUTS, last))
                finally:
                    self._end_work()
        except _CancelledError:
            pass  # the next step says so
        self.stats.total_seconds += perf_counter() - begun
        return steps

    def _read_tokens(self, start: int, end: int) -> list[Step]:
        """Return the steps of the tokens after positions start to end."""
        prefix, steps = self.tokens[:end], list[Step]()
        deferred: dict[int, Floats] = {}  # the base's logits, if they are needed any more
        self._evaluate_base(prefix, range(start, end))
        for i in range(start, end):
            logits, hidden = self._base.state(i)
            p_defer, _, logsumexp = self._judge(i + 1, logits, hidden)
            steps.append(self._tell(self.tokens[i + 1], "base", p_defer, logits, logsumexp))
            if self._defers(p_defer):
                deferred[i] = logits.copy() if self._compose else logits
        if deferred:
            self._evaluate_expert(prefix, list(deferred))
        for i, logits in deferred.items():
            p_defer = steps[i - start].p_defer
            theirs, _, logsumexp = self._theirs(i + 1, logits, p_defer)
            steps[i - start] = self._tell(self.tokens[i + 1], "expert", p_defer, theirs, logsumexp)
        return steps

    def _defers(self, p_defer: float) -> bool:
        # p > 0 holds for every finite state; where it underflows, 0 still means always.
        return p_defer > self._threshold or self._threshold <= 0

    def _work_ahead(self, tokens: array[int]) -> None:
        if self._follow is not None:
            self._follow(tokens)

    def _evaluate_base(self, tokens: array[int], outputs: Sequence[int] = ()) -> None:
        self._check()
        base, stats = self._base, self.stats
        seconds = base.seconds
        stats.base_tokens += base.sync(tokens, outputs)
        stats.base_seconds += base.seconds - seconds

    def _evaluate_expert(self, tokens: array[int], outputs: Sequence[int] = ()) -> None:
        self._check()
        expert, stats = self._expert, self.stats
        calls, evaluated = expert.n_calls, expert.n_evaluated
        seconds, loading = expert.seconds, expert.load_seconds
        try:
            expert.sync(tokens, outputs)
        finally:  # a remote one may fail, which takes time as well
            stats.expert_calls += expert.n_calls - calls
            stats.expert_tokens += expert.n_evaluated - evaluated
            stats.expert_seconds += expert.seconds - seconds
            stats.expert_load_seconds += expert.load_seconds - loading

    def _judge(self, at: int, logits: Floats, hidden: Floats) -> tuple[float, int, float]:
        """Return p_defer, the base's likeliest token and the log-sum-exp, for the token at `at`."""
        try:
            return self._read(logits, hidden)
        except ValueError as e:
            raise ModelError(f"the base or the switch is broken: {e}; use another file") from e

    def _likeliest(self, at: int, logits: Floats) -> tuple[int, float]:
        """Return the likeliest token and the log-sum-exp of the expert's logits, or a mixture's,
        for the token at `at`."""
        n_choose = min(self._n_choose, len(logits))
        try:
            return readout.read(logits, None, None, None, None, self._expert_head, n_choose, -1)
        except ValueError as e:
            raise ModelError(f"the expert is broken: {e}; use another file") from e

    def _write(
        self, source: Source, p_defer: float, logits: Floats, choice: int, logsumexp: float
    ) -> Step:
        if self._sample is not None:
            choice = self._sample(logits[: self._n_choose])
        return self._tell(choice, source, p_defer, logits, logsumexp)

    def _tell(
        self, token: int, source: Source, p_defer: float, logits: Floats, logsumexp: float
    ) -> Step:
        step = Step(token, source, p_defer, float(logits[token]) - logsumexp)
        if self._n_probs:
            step.top = likeliest(logits[: self._n_choose], logsumexp, self._n_probs)
        return step


def likeliest(logits: Floats, logsumexp: float, n: int) -> tuple[tuple[int, float], ...]:
    """Return the n likeliest ids, best first, and their log-probabilities; none that is -inf."""
    n = min(n, len(logits))
    best = np.argpartition(-logits, n - 1)[:n]
    best = best[np.lexsort((best, -logits[best]))]
    return tuple((int(i), float(logits[i]) - logsumexp) for i in best if logits[i] > -math.inf)


def mixture(
    base: Floats, expert: Floats, p_defer: float, n_choose: int, defer_row: int = -1
) -> Floats:
    """Return log((1−p)·P_base + p·P_expert), shape (n_choose,): Co-LLM's equation 1.

    P_base is normalised without the defer row, if the base has one.
    """
    if defer_row >= 0:
        base = base.copy()
        base[defer_row] = -math.inf

    def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
        x = logits.astype(np.float64)
        x -= x.max()
        x -= math.log(np.exp(x).sum())
        return x

    ours = log_softmax(base)[:n_choose] + math.log1p(-p_defer)
    theirs = log_softmax(expert)[:n_choose] + (math.log(p_defer) if p_defer > 0 else -math.inf)
    return np.logaddexp(ours, theirs).astype(np.float32)
