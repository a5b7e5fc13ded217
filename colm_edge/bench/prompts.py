"""Real prompts, which every method answers in its own words: speed, and how right the answers are.

Without a replay the models decide: what is deferred, where the two agree, and where an answer ends.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colm_edge.bench.memory import Note
from colm_edge.bench.peers import HighLevel, Tools
from colm_edge.bench.rounds import Sample, chosen, clocked, ratio, speed_columns
from colm_edge.bench.speculative import Speculative
from colm_edge.cancel import Cancel
from colm_edge.decode.background import Background
from colm_edge.decode.loop import Decoder, Schedule, Sequential
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.errors import DataError
from colm_edge.evaluate.metrics import METRICS, Metric, check_rows
from colm_edge.stream import Stream
from colm_edge.train.documents import read_rows
from colm_edge.train.prompts import read_prompts

if TYPE_CHECKING:
    from colm_edge.llama.costs import CostTable
    from colm_edge.options import Options
    from colm_edge.pair import Pair

ANSWER = {"completion", "answer", "tests"}  # what metrics compare with; a line may have none
Way = Callable[[list[int]], Sample]


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids. judge: says how right an answer is, from 0 to 1; None where the line
    has no answer to compare with, or nothing is judged."""

    tokens: list[int]
    judge: Callable[[str], float] | None = None


def read_judged_prompts(
    pair: Pair,
    path: str | os.PathLike[str],
    options: Options,
    *,
    limit: int | None = None,
    metric: str | None = None,
) -> list[Prompt]:
    """Return the prompts of a JSONL file, of its first `limit` lines.

    A line has prompt, a text, or messages; metric is a name in METRICS.

    Raises DataError, with the line's number, for a line that has no prompt, whose prompt and
    max_tokens more do not fit the context, or whose answer the metric cannot judge; and where there
    is no line, or none to judge.
    """
    rows = list(islice(read_rows(path), limit))
    found = []
    for (number, row), prompt in zip(rows, read_prompts(rows, pair, options.raw), strict=True):
        n = len(prompt.tokens) + options.max_tokens
        if n > pair.n_ctx:
            raise DataError(
                f"line {number}: {n} tokens with the answer do not fit the context of "
                f"{pair.n_ctx}; give a smaller -n or a larger -c"
            )
        judge = None
        if metric is not None and row.keys() & ANSWER:
            judge = _judge(METRICS[metric], number, row)
        found.append(Prompt(prompt.tokens, judge))
    if not found:
        raise DataError(f"{path}: no prompt; expected one JSON object a line")
    if metric is not None and not any(prompt.judge for prompt in found):
        raise DataError(
            f"{path}: no line has an answer for {metric} to compare with; expected completion, "
            "answer or tests"
        )
    return found


def _judge(metric: Metric, number: int, row: dict[str, Any]) -> Callable[[str], float]:
    check_rows([(number, row)], metric)
    return lambda text: metric(text, row)


class Writers:
    """Every way to answer a prompt in this process, by name."""

    def __init__(self, pair: Pair, options: Options) -> None:
        self._pair, self._options = pair, options
        self._tables = pair.cost_tables()
        self._cheapest = None if self._tables[0].is_quick else self._tables[1]
        self._read = pair.switch.reader(pair.base, pair.n_shared)
        self._ends = pair.base.end_tokens | pair.expert.end_tokens
        self._high_level: HighLevel | None = None
        self.names: dict[str, Way] = {
            # One model, one token at a time: without guesses.
            "base": partial(self._stream, threshold=1.0, schedule="sequential"),
            "expert": partial(self._stream, threshold=0.0, schedule="sequential"),
            "expert-llama-cpp-python": self._llama,
            "both": partial(self._expert_text, Sequential, None),
            "colm": partial(self._stream, schedule="sequential"),
            "colm-fast": self._stream,
            "speculative": partial(
                self._expert_text, lambda: Speculative(self._tables), self._cheapest
            ),
            "lossless": partial(self._stream, review=0.0),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._high_level is not None:
            self._high_level.close()

    def _stream(self, prompt: list[int], **changes: Any) -> Sample:
        self._forget()
        # Deferral alone, whatever the switch says of review.
        options = self._options.with_changes(**{"review": math.inf, **changes})
        return _written(self._pair.stream_tokens(prompt, options))

    def _expert_text(
        self, schedule: Callable[[], Schedule], costs: CostTable | None, prompt: list[int]
    ) -> Sample:
        """Write the expert's own text by a schedule that also evaluates the base. costs: what the
        expert's batches are cut by."""
        pair = self._pair
        self._forget()
        decoder = Decoder(
            pair.base_session,
            [pair.expert],
            Policy(self._read, 0.0),
            Picker(pair.n_shared),
            prompt,
            end_tokens=self._ends,
            max_tokens=self._options.max_tokens,
            schedule=schedule(),
        )
        pair.expert_session.costs = costs
        try:
            return _written(Stream(decoder, pair.base, (), Cancel()))
        finally:
            pair.expert_session.costs = None

    def _llama(self, prompt: list[int]) -> Sample:
        if self._high_level is None:
            self._high_level = HighLevel(self._pair.expert_session)
        return self._high_level.run(prompt, self._options.max_tokens, self._ends)

    def _forget(self) -> None:
        """Let no method gain from what another has evaluated."""
        pair = self._pair
        for session in (pair.base_session, pair.expert_session):
            session.forget()
        if isinstance(pair.expert, Background):
            pair.expert.settle()  # a catch-up after the last answer is not this one's


def _written(stream: Stream) -> Sample:
    _, seconds, first = clocked(stream)
    answer = stream.answer()
    stats = answer.stats
    return Sample(
        stats.n_generated,
        seconds,
        first,
        expert_calls=stats.expert_calls,
        expert_tokens=stats.expert_tokens,
        deferred=stats.n_deferred,
        text=answer.text,
    )


def bench_prompts(
    pair: Pair,
    prompts: Sequence[Prompt],
    options: Options,
    rounds: int,
    note: Note,
    *,
    only: Sequence[str] = (),
    tools: Path | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each method, which answers every prompt in every round, greedily.

    Figures are of a round: all its tokens by all its seconds, and sums of the others; speeds are
    the median of the rounds. Within a round the methods take turns at each prompt. accuracy is the
    mean over the prompts that can be judged; the column is there if there are any.

    options: greedy ones, with max_tokens. only: names of methods, all by default. tools: the
    folder of llama.cpp's own programs, for rows in any case: llama-speculative-simple and, if it is
    there, llama-lookup. Both count the end token, and may write a few tokens more than the most.

    Raises ColmError for an unknown name, or a program that is missing or fails.
    """
    with Writers(pair, options) as writers:
        programs = _programs(Tools(tools, pair), options) if tools is not None else {}
        ways = chosen(writers.names | programs, only, programs)
        taken: dict[str, list[list[Sample]]] = {name: [] for name in ways}
        for name, way in ways.items():
            note(f"warming up: {name} …")
            way(prompts[0].tokens)
        for i in range(1, rounds + 1):
            for samples in taken.values():
                samples.append([])
            for k, prompt in enumerate(prompts, 1):
                note(f"round {i} of {rounds}: prompt {k} of {len(prompts)} …")
                for name, way in ways.items():
                    taken[name][-1].append(way(prompt.tokens))
    if any(prompt.judge for prompt in prompts):
        note("judging the answers …")
    sums = {name: [_total(samples) for samples in of_rounds] for name, of_rounds in taken.items()}
    return [_row(name, sums, len(prompts)) | _accuracy(taken[name][-1], prompts) for name in ways]


def _programs(tools: Tools, options: Options) -> dict[str, Way]:
    ways = {"llama-speculative-simple": tools.speculative}
    if tools.has("llama-lookup"):
        ways["llama-lookup"] = tools.lookup

    def answering(way: Callable[[str, int], Sample]) -> Way:
        return lambda prompt: way(tools.prompt_of(prompt), options.max_tokens)

    return {name: answering(way) for name, way in ways.items()}


def _total(samples: Sequence[Sample]) -> Sample:
    """Return the samples of a round as one: sums, but of the first tokens' times the median."""

    def total(values: Sequence[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    firsts = [s.first_token_seconds for s in samples if s.first_token_seconds is not None]
    return Sample(
        sum(sample.tokens for sample in samples),
        sum(sample.seconds for sample in samples),
        statistics.median(firsts) if firsts else None,
        expert_calls=total([sample.expert_calls for sample in samples]),
        expert_tokens=total([sample.expert_tokens for sample in samples]),
        deferred=total([sample.deferred for sample in samples]),
    )


def _row(name: str, sums: Mapping[str, Sequence[Sample]], n_prompts: int) -> dict[str, Any]:
    speeds = {name: [sample.speed for sample in rounds] for name, rounds in sums.items()}
    last = sums[name][-1]
    return {
        "method": name,
        **speed_columns(sums[name]),
        "tokens_per_answer": last.tokens / n_prompts,
        "ratio_expert": ratio(speeds[name], speeds.get("expert", [])),
        "defer_rate": None if last.deferred is None else last.deferred / max(1, last.tokens),
        "expert_calls": last.expert_calls,
        "expert_tokens": last.expert_tokens,
    }


def _accuracy(samples: Sequence[Sample], prompts: Sequence[Prompt]) -> dict[str, float]:
    pairs = zip(samples, prompts, strict=True)
    right = [prompt.judge(sample.text) for sample, prompt in pairs if prompt.judge is not None]
    return {"accuracy": statistics.fmean(right)} if right else {}
