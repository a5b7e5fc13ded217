"""Measure the speed of every way to answer, in one process, in rounds that interleave."""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colm_edge.bench.memory import Note, memory_of
from colm_edge.bench.peers import HighLevel, Tools
from colm_edge.bench.replay import Trace, replay
from colm_edge.bench.rounds import Sample, chosen, clocked, ratio, speed_columns
from colm_edge.bench.speculative import Speculative
from colm_edge.decode.background import Background
from colm_edge.decode.fast import Fast
from colm_edge.decode.loop import Decoder, Schedule
from colm_edge.decode.planner import Planner
from colm_edge.decode.review import ByRule, Review, Verdict
from colm_edge.decode.timeline import Timeline
from colm_edge.errors import ColmError
from colm_edge.options import OPTIONS
from colm_edge.switch.rules import Untrained

if TYPE_CHECKING:
    from colm_edge.llama.session import Session
    from colm_edge.pair import Pair


class Differs:
    """The rule of review without tolerance, where logits say nothing: undo what differs."""

    def first(self, verdicts: Sequence[Verdict]) -> int:
        differ = (i for i, verdict in enumerate(verdicts) if verdict.token != verdict.choice)
        return next(differ, len(verdicts))


class Methods:
    """Every way to write a trace's tokens in this process, by name."""

    def __init__(self, pair: Pair, trace: Trace) -> None:
        self._pair, self._trace = pair, trace
        self.tables = pair.cost_tables()
        self._read = pair.switch.reader(pair.base, pair.n_shared)
        self._high_level: HighLevel | None = None
        self.names: dict[str, Callable[[], Sample]] = {
            "base": partial(self._sequential, 1.0),
            "expert": self._expert_alone,
            "expert-llama-cpp-python": self._llama,
            "both": partial(self._sequential, 0.0),
            "colm": partial(self._sequential, 0.5),
            "colm-fast": self._fast,
            "speculative": self._speculative,
            "lossless": self._lossless,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._high_level is not None:
            self._high_level.close()

    def _replay(
        self,
        expert: Timeline,
        threshold: float,
        schedule: Schedule | None = None,
        *,
        everywhere: bool = False,
    ) -> Sample:
        pair = self._pair
        for session in (pair.base_session, pair.expert_session):
            session.forget()
        decoder = replay(
            pair.base_session,
            expert,
            self._read,
            self._trace,
            threshold,
            pair.n_shared,
            schedule,
            everywhere=everywhere,
        )
        return timed(decoder)

    def _sequential(self, threshold: float) -> Sample:
        return self._replay(self._pair.expert_session, threshold)

    def _speculative(self) -> Sample:
        schedule = Speculative(self.tables)
        with self._cheapest_batches():
            return self._replay(self._pair.expert_session, 0.0, schedule, everywhere=True)

    def _lossless(self) -> Sample:
        planners, window = [Planner(lambda cancel: self.tables)], OPTIONS["review_window"].default
        schedule = Review(ByRule(Differs()), window, planners=planners)
        with self._cheapest_batches():
            return self._replay(self._pair.expert_session, 0.5, schedule, everywhere=True)

    def _fast(self) -> Sample:
        expert = self._pair.expert
        # A new planner, which learns again in every round; batches of the cheapest sizes; and the
        # expert in the background, if the pair has it there.
        schedule = Fast([Planner(lambda cancel: self.tables)], expert.follow)
        if isinstance(expert, Background):
            expert.settle()  # other methods have used its session
        with self._cheapest_batches():
            return self._replay(expert, 0.5, schedule)

    @contextmanager
    def _cheapest_batches(self) -> Iterator[None]:
        """Cut and pad the expert's batches by what they cost, as the fast schedule has it."""
        session = self._pair.expert_session
        session.costs = None if self.tables[0].is_quick else self.tables[1]
        try:
            yield
        finally:
            session.costs = None

    def _expert_alone(self) -> Sample:
        expert, base = self._pair.expert_session, self._pair.base_session
        # Instead of the switch, any rule that also gives the likeliest token.
        read = Untrained("margin").reader(expert.model, self._pair.n_shared)
        expert.forget()
        sample = timed(replay(expert, base, read, self._trace, 1.0, self._pair.n_shared))
        n = len(self._trace.tokens)
        evaluated = len(self._trace.prompt) + n - 1
        return replace(sample, expert_calls=n, expert_tokens=evaluated)

    def decodes_alone(self, names: Collection[str]) -> dict[str, float]:
        """Return the seconds inside llama.cpp of each method's decodes when each model does all of
        its own in one go; for the fast schedule, those of the sequential one."""
        n_prompt, n = len(self._trace.prompt), len(self._trace.tokens)
        base, expert = self._pair.base_session, self._pair.expert_session
        one_by_one = range(n_prompt, n_prompt + n)
        deferred = [n_prompt + i for i, defers in enumerate(self._trace.deferred) if defers]
        base_alone = self._decode(base, one_by_one)
        found = {"base": base_alone}
        if set(names) & {"colm", "colm-fast"}:
            found["colm"] = found["colm-fast"] = base_alone + self._decode(expert, deferred)
        if set(names) & {"expert", "expert-llama-cpp-python", "both"}:
            expert_alone = self._decode(expert, one_by_one)
            found["expert"] = found["expert-llama-cpp-python"] = expert_alone
            found["both"] = base_alone + expert_alone
        return found

    def _decode(self, session: Session, lengths: Sequence[int]) -> float:
        """Return the seconds of evaluating the trace's prefixes of these lengths, in order."""
        tokens = [*self._trace.prompt, *self._trace.tokens]
        costs, session.costs = session.costs, None
        session.forget()
        before = session.account.seconds
        try:
            for n in lengths:
                session.sync(tokens[:n])
        finally:
            session.costs = costs
        return session.account.seconds - before

    def _llama(self) -> Sample:
        if self._high_level is None:
            self._high_level = HighLevel(self._pair.expert_session)
        return self._high_level.run(self._trace.prompt, len(self._trace.tokens))


def timed(decoder: Decoder) -> Sample:
    """Let a decoder write to its end."""
    steps, seconds, first = clocked(decoder)
    stats = decoder.stats
    # With the expert in the background, the two overlap.
    outside = max(0.0, seconds - stats.base_seconds - stats.expert_seconds)
    return Sample(
        len(steps), seconds, first, outside, stats.expert_calls, stats.expert_tokens,
        stats.n_deferred,
    )  # fmt: skip


def bench(
    pair: Pair,
    trace: Trace,
    rounds: int,
    note: Note,
    *,
    only: Sequence[str] = (),
    tools: Path | None = None,
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Return a row for each method: medians over the rounds, in which all methods take turns.

    ratio_limit compares with the time of the method's decodes (for the fast schedule: the
    sequential one's), n·c_base(1) + Σ c_expert(kᵢ), right before and after the round, each model
    on its own. docs/speed.md explains the other columns.

    only: names of methods, all by default. tools: the folder of llama.cpp's own programs, for two
    rows in any case. memory: whether to measure it, in a process for each method.

    Raises ColmError when the trace does not fit the context or the vocabulary, or for an unknown
    name.
    """
    n = len(trace.tokens)
    if len(trace.prompt) + n > pair.n_ctx:
        raise ColmError(
            f"{len(trace.prompt) + n} tokens do not fit the context of {pair.n_ctx}; "
            "give a smaller -n or a larger -c"
        )
    if max(*trace.prompt, *trace.tokens) >= pair.n_shared:
        raise ColmError(
            "the trace has tokens that this pair's models do not share; record it with this pair"
        )
    with Methods(pair, trace) as methods:
        programs = _programs(Tools(tools, pair), trace) if tools is not None else {}
        ways = chosen(methods.names | programs, only, programs)
        samples: dict[str, list[Sample]] = {name: [] for name in ways}
        alone: list[dict[str, float]] = []  # between the rounds
        for i in range(rounds + 1):
            for name, way in ways.items():
                note(f"round {i} of {rounds}: {name} …" if i else f"warming up: {name} …")
                sample = way()
                if i:
                    samples[name].append(sample)
            note(f"after round {i} of {rounds}: decodes alone …")
            alone.append(methods.decodes_alone(ways))
        # The mean of before and after a round, because machines drift.
        limits = [
            {name: (before[name] + after[name]) / 2 for name in before}
            for before, after in pairwise(alone)
        ]
        measured = [name for name in ways if memory and name in methods.names]
    peaks = {name: memory_of(pair, trace, name, note) for name in measured}
    return [_row(name, samples, trace, limits, peaks.get(name)) for name in ways]


def _programs(tools: Tools, trace: Trace) -> dict[str, Callable[[], Sample]]:
    """Return llama.cpp's own programs that fit a replay. They write texts of their own, to the
    trace's prompt if that is a text."""
    n, prompt = len(trace.tokens), "Once upon a time"
    if trace.is_text:
        prompt = tools.prompt_of(trace.prompt)
    return {
        "llama-bench": partial(tools.bench, n),
        "llama-speculative-simple": partial(tools.speculative, prompt, n),
    }


def _row(
    name: str,
    samples: Mapping[str, list[Sample]],
    trace: Trace,
    limits: list[dict[str, float]],
    peak: float | None,
) -> dict[str, Any]:
    n = len(trace.tokens)
    speeds = {name: [sample.speed for sample in taken] for name, taken in samples.items()}
    ours, last = speeds[name], samples[name][-1]
    outside = [s.outside_seconds for s in samples[name] if s.outside_seconds is not None]
    return {
        "method": name,
        **speed_columns(samples[name]),
        "ratio_expert": ratio(ours, speeds.get("expert", [])),
        "ratio_sequential": ratio(ours, speeds.get("colm", [])),
        "ratio_limit": ratio(ours, [n / alone[name] for alone in limits if name in alone]),
        "outside_us": 1e6 * statistics.median(outside) / n if outside else None,
        # The expert alone is a loop of one model, which defers nothing.
        "defer_rate": 1.0 if name == "expert" or last.deferred is None else last.deferred / n,
        "expert_calls": last.expert_calls,
        "calls_per_100": None if last.expert_calls is None else 100 * last.expert_calls / n,
        "expert_tokens": last.expert_tokens,
        "peak_memory_mb": peak,
    }


def measured_on(pair: Pair, n_busy: int = 0) -> str:
    """Return a line with the machine, the date and the settings.

    n_busy: how many other processes were kept busy meanwhile.
    """
    base, expert = pair.base_session, pair.expert_session
    options = base.options
    beside = f", beside busy processes: {n_busy}" if n_busy else ""
    return (
        f"Measured on {cpu_name()}, {datetime.date.today()}: {base.model.path.name} and "
        f"{expert.model.path.name}, {base.n_threads} and {expert.n_threads} threads, "
        f"{base.model.n_gpu_layers} and {expert.model.n_gpu_layers} GPU layers, flash attention "
        f"{base.flash_attn}, cache {options.cache_type_k}/{options.cache_type_v}, context "
        f"{pair.n_ctx}, llama-cpp-python {version('llama-cpp-python')}{beside}."
    )


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
