"""Speed side by side: every way to answer, in one process, in rounds that interleave.

A trace says which tokens are written and which of them are deferred. It is imposed on real decodes
of real models: both are evaluated and the switch is read as ever, only the choices are the trace's.
So the speed of a pair can be measured whatever its weights say, and one trace serves every method.
"""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

from colm_edge.costs import CostTable, cost_table
from colm_edge.decode import Decoder, Floats
from colm_edge.errors import ColmError, DataError
from colm_edge.switch import Reader, Untrained

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.session import Session

SEED = 0
PROMPT_TOKENS = 32  # of a drawn trace
DRAWS = 100


@dataclass(frozen=True)
class Trace:
    """A prompt, and the tokens written after it with whether each is deferred, (n,) both."""

    prompt: list[int]
    tokens: list[int]
    deferred: list[bool]

    @property
    def catch_ups(self) -> list[int]:
        """How many tokens the expert evaluates at each call after its first."""
        at = [i for i, deferred in enumerate(self.deferred) if deferred]
        return [later - earlier for earlier, later in pairwise(at)]


def parse_replay(text: str) -> tuple[float, float]:
    """Return rate and run of f=0.2,run=2. Raises ValueError for anything else."""
    values = {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
    rate, run = values.pop("f", -1.0), values.pop("run", 0.0)
    if values or not 0 <= rate <= 1 or (run and run < 1):
        raise ValueError(text)
    return rate, run


def drawn_trace(n: int, n_vocab: int, rate: float, run: float = 0.0, seed: int = SEED) -> Trace:
    """Draw a trace of n tokens: a two-state process of a defer rate and a mean run of deferrals.

    run: 0 draws every token on its own. Of DRAWS draws the one of the nearest rate is taken, so
    that a short trace too defers as often as it says.
    """
    draw = random.Random(seed)
    stay = 1 - 1 / run if run else rate
    begin = min(1.0, (1 - stay) * rate / (1 - rate)) if rate < 1 else 1.0
    best: list[bool] = []
    for _ in range(DRAWS):
        deferred: list[bool] = []
        for i in range(n):
            p = rate if i == 0 else stay if deferred[-1] else begin
            deferred.append(draw.random() < p)
        if not best or abs(sum(deferred) - rate * n) < abs(sum(best) - rate * n):
            best = deferred
        if abs(sum(best) - rate * n) <= 0.5:
            break
    tokens = [draw.randrange(n_vocab) for _ in range(PROMPT_TOKENS + n)]
    return Trace(tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:], best)


def recorded_trace(path: str | os.PathLike[str]) -> Trace:
    """Read what `run --json` printed. Raises DataError when the file is not that."""
    try:
        with open(path, encoding="utf-8") as file:
            answer = json.load(file)
        tokens = answer["tokens"]
        trace = Trace(
            [int(token) for token in answer["prompt_tokens"]],
            [int(token["id"]) for token in tokens],
            [{"base": False, "expert": True}[token["source"]] for token in tokens],
        )
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected what `run --json` printed") from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: not what `run --json` printed ({e!r})") from e
    if not trace.prompt or not trace.tokens:
        raise DataError(f"{path}: the answer has no tokens")
    return trace


@dataclass(frozen=True)
class Sample:
    """One run of one method."""

    seconds: float
    first_token_seconds: float


class Imposed:
    """A trace at work in a loop: a reader and a sampler that answer from it."""

    def __init__(self, trace: Trace, read: Reader) -> None:
        self._trace, self._read, self._at = trace, read, -1

    def reader(self, logits: Floats, hidden: Floats) -> tuple[float, int, float]:
        _, _, logsumexp = self._read(logits, hidden)
        self._at += 1
        return float(self._trace.deferred[self._at]), self._trace.tokens[self._at], logsumexp

    def sampler(self, logits: Floats) -> int:
        return self._trace.tokens[self._at]


def _loop(base: Session, expert: Session, read: Reader, trace: Trace, threshold: float) -> Sample:
    for session in (base, expert):
        session.forget()
    imposed = Imposed(trace, read)
    begun = perf_counter()
    decoder = Decoder(
        base,
        expert,
        imposed.reader,
        trace.prompt,
        threshold=threshold,
        n_choose=min(base.model.n_vocab, expert.model.n_vocab),
        end_tokens=frozenset(),
        max_tokens=len(trace.tokens),
        sample=imposed.sampler,
    )
    next(decoder)
    first = perf_counter() - begun
    for _ in decoder:
        pass
    seconds = perf_counter() - begun
    return Sample(seconds, first)


class HighLevel:
    """The expert through llama-cpp-python's own `Llama`, what a user would pick."""

    def __init__(self, pair: Pair) -> None:
        from llama_cpp import Llama

        session = pair.expert_session
        self._llama = Llama(
            str(pair.expert.path), n_ctx=pair.n_ctx, n_batch=min(512, pair.n_ctx),
            n_threads=session.n_threads, n_threads_batch=session.n_threads,
            n_gpu_layers=pair.expert.n_gpu_layers, verbose=False,
        )  # fmt: skip

    def run(self, trace: Trace) -> Sample:
        self._llama.reset()  # else it would keep the prompt
        begun, n = perf_counter(), len(trace.tokens)
        generated = self._llama.generate(trace.prompt, temp=0.0, repeat_penalty=1.0)
        next(generated)
        first = perf_counter() - begun
        for _ in islice(generated, n - 1):
            pass
        seconds = perf_counter() - begun
        generated.close()
        return Sample(seconds, first)

    def close(self) -> None:
        self._llama.close()


def bench(
    pair: Pair, trace: Trace, rounds: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row for each method: medians over the rounds, in which all take turns.

    tokens_per_second is of the whole answer, its prompt included, and …_low and …_high are the
    slowest and fastest round; first_token_seconds from an empty cache; ratio_expert to the row
    expert; ratio_limit to what the decodes alone cost by the models' tables.

    Raises ColmError when the trace does not fit the context or the vocabulary.
    """
    n = len(trace.tokens)
    if len(trace.prompt) + n > pair.n_ctx:
        raise ColmError(
            f"{len(trace.prompt) + n} tokens do not fit the context of {pair.n_ctx}; "
            "give a smaller -n or a larger -c"
        )
    if max(*trace.prompt, *trace.tokens) >= pair.n_shared:
        raise ColmError("the trace has tokens that this pair does not share; record it with it")
    base, expert = pair.base_session, pair.expert_session
    read = pair.switch.reader(pair.base, pair.n_shared)
    # The expert alone reads no switch, but its own likeliest token.
    alone = Untrained("margin").reader(pair.expert, pair.n_shared)
    note("measuring decodes of both models")
    limits = _limits(trace, cost_table(base), cost_table(expert))
    high_level = HighLevel(pair)
    ways: dict[str, Callable[[], Sample]] = {
        "base": lambda: _loop(base, expert, read, trace, 1.0),
        "expert": lambda: _loop(expert, base, alone, trace, 1.0),
        "expert-llama-cpp-python": lambda: high_level.run(trace),
        "both": lambda: _loop(base, expert, read, trace, 0.0),
        "colm": lambda: _loop(base, expert, read, trace, 0.5),
    }
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    # What llama-cpp-python evaluates its own session does not count.
    calls = {"expert-llama-cpp-python": (n, len(trace.prompt) + n - 1)}
    try:
        for i in range(rounds + 1):
            for name, way in ways.items():
                note(f"round {i} of {rounds}: {name}" if i else f"warming up: {name}")
                before = expert.n_calls, expert.n_evaluated
                sample = way()
                if i:
                    samples[name].append(sample)
                done = expert.n_calls - before[0], expert.n_evaluated - before[1]
                calls.setdefault(name, done)
    finally:
        high_level.close()
    seconds = {name: [sample.seconds for sample in taken] for name, taken in samples.items()}
    rows = []
    for name, taken in samples.items():
        median = statistics.median(seconds[name])
        rate = {"colm": sum(trace.deferred) / n, "base": 0.0}.get(name, 1.0)
        rows.append({
            "method": name,
            "tokens_per_second": n / median,
            "tokens_per_second_low": n / max(seconds[name]),
            "tokens_per_second_high": n / min(seconds[name]),
            "first_token_seconds": statistics.median(s.first_token_seconds for s in taken),
            # Of rounds, so that what slowed a whole round down slows both sides of the ratio.
            "ratio_expert": statistics.median(
                alone / ours for ours, alone in zip(seconds[name], seconds["expert"], strict=True)
            ),
            "ratio_limit": limits[name] / median,
            "defer_rate": rate,
            "expert_calls": calls[name][0],
            "expert_tokens": calls[name][1],
        })  # fmt: skip
    return rows


def _limits(trace: Trace, base: CostTable, expert: CostTable) -> dict[str, float]:
    """Return the seconds that each method's decodes take by themselves."""
    n_prompt, n = len(trace.prompt), len(trace.tokens)
    base_alone = base(n_prompt) + (n - 1) * base(1)
    expert_alone = expert(n_prompt) + (n - 1) * expert(1)
    colm = base_alone + sum(expert(k) for k in trace.catch_ups)
    if any(trace.deferred):
        colm += expert(n_prompt + trace.deferred.index(True))
    return {
        "base": base_alone,
        "expert": expert_alone,
        "expert-llama-cpp-python": expert_alone,
        "both": base_alone + expert_alone,
        "colm": colm,
    }
