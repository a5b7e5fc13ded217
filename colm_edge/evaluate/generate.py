"""Answer every prompt of a data file, judge the answers, and keep them on disk as they come."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Bools, Doubles, Floats, Ints
from colm_edge.decode.policy import review_floor, running_rate
from colm_edge.evaluate.metrics import Metric, check_rows
from colm_edge.journal import MOST_SECONDS, Journal, is_count, is_number, key_of
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import N_LOGIT, AnySwitch, Base, Reader
from colm_edge.together import Done, Task, answer_together
from colm_edge.train.documents import prompt_of
from colm_edge.train.prompts import asked, pace_of
from colm_edge.train.scoring import identity

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.train.documents import Row
    from colm_edge.train.scoring import MakeProgress

ANSWERS_FILE = "answers.jsonl"  # of a work folder: the answers of every method
Facts = dict[str, Any]


@dataclass(frozen=True)
class RandomSwitch:
    """Defer at random, whatever the base's state: p_defer is drawn uniformly.

    `answers` gives every line of the data its own seed, so that no answer depends on the ones
    before it.
    """

    seed: int = 0
    name: str = "random"
    threshold: float = 0.5
    needs_hidden: bool = False

    def reader(self, base: Base, n_choose: int) -> Reader:
        rng = np.random.default_rng(self.seed)
        out = np.empty(N_LOGIT, np.float32)

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            choice, logsumexp = readout.read_alone(logits, out, n_choose)
            return rng.random(), choice, logsumexp, 0

        return read


@dataclass(frozen=True)
class Generated:
    """A method's answers to the rows of the data, one entry each, shape (n_rows,)."""

    right: Doubles  # the metric, 0 to 1
    tokens: Ints
    deferred: Ints  # of the tokens
    seconds: Doubles  # that it took, without reading the expert's weights
    cut: Bools  # ended by max_tokens or the context, not by the model

    @classmethod
    def of(cls, entries: Sequence[Facts], rows: list[Row], metric: Metric) -> Self:
        """Judge the answers that were given to the rows."""
        pairs = zip(entries, rows, strict=True)
        return cls(
            np.array([metric(entry["text"], row) for entry, (_, row) in pairs], np.float64),
            np.array([entry["tokens"] for entry in entries], np.int64),
            np.array([entry["deferred"] for entry in entries], np.int64),
            np.array([entry["seconds"] for entry in entries], np.float64),
            np.array([entry["cut"] for entry in entries], np.bool_),
        )


def answers(
    pair: Pair,
    switch: AnySwitch,
    options: Options,
    rows: list[Row],
    metric: Metric,
    progress: MakeProgress,
    *,
    label: str = "answers",
    journal: Journal | None = None,
    n_slots: int = 1,
) -> Generated:
    """Answer every row's prompt with one switch and judge the answers.

    The threshold is that of the options, or the switch's own. label: names the progress bar and
    the journal's lines. journal: keeps the answers; an answer found in it is not generated again.
    n_slots: how many answers are written at once; their seconds then add up to those of all.
    Raises DataError, before the first answer, for rows that the metric cannot judge.
    """
    with pair.switched(switch):
        if running_rate(switch, options) is None:
            options = options.with_changes(threshold=pair.threshold(options))
        if pair.review(options) < math.inf:  # resolved here: a key must not depend on a default
            options = options.with_changes(review_floor=review_floor(switch, options))

        def task(i: int) -> Task:
            number, row = rows[i]
            tokens = prompt_of(pair, asked(row), raw=options.raw)
            own = replace(switch, seed=number) if isinstance(switch, RandomSwitch) else None
            return Task(i, tokens, options, own)

        def write(todo: list[int]) -> Iterator[tuple[int, Facts]]:
            with closing(answer_together(pair, map(task, todo), n_slots)) as written:
                for done in written:
                    yield done.task.key, facts_of(done)

        models, reviews = identity(pair, pair.members), pair.review(options) < math.inf
        # The pace belongs to the key because the speed does: it is kept with the answers.
        pace = pace_of(pair, n_slots)
        what = [
            *models, pair.n_ctx, pace,
            *_what_matters(switch, options, reviews, one_expert=len(pair.members) == 1),
        ]  # fmt: skip
        return judged(
            write, rows, metric, progress, label=label, journal=journal or Journal(), what=what,
            by_line=isinstance(switch, RandomSwitch),
        )  # fmt: skip


def judged(
    write: Callable[[list[int]], Iterable[tuple[int, Facts]]],
    rows: list[Row],
    metric: Metric,
    progress: MakeProgress,
    *,
    label: str,
    journal: Journal,
    what: list[Any],
    by_line: bool = False,
) -> Generated:
    """Have the rows answered, and judge the answers.

    write: yields (i, what is kept of the answer) for each place of `rows` that it is given, in any
    order. what: with the prompt, the key of an answer in the journal: all that it depends on.
    by_line: whether it depends on the line's number too.
    """
    check_rows(rows, metric)
    keys = [key_of(what, number if by_line else None, asked(row)) for number, row in rows]
    entries: dict[int, Facts] = {}
    for i, key in enumerate(keys):
        entry = journal.get(key, _is_kept)
        if entry is not None:
            entries[i] = entry
    todo = [i for i in range(len(rows)) if i not in entries]
    with progress(label, len(rows)) as bar:
        bar.update(len(entries))
        for i, facts in write(todo) if todo else ():
            entries[i] = {"method": label, "line": rows[i][0], **facts}
            journal.add(keys[i], entries[i])
            bar.update(1)
    return Generated.of([entries[i] for i in range(len(rows))], rows, metric)


def _is_kept(entry: Facts) -> bool:
    """Return whether an entry of a journal is what `facts_of` keeps."""
    return (
        isinstance(entry["text"], str)
        and is_count(entry["tokens"])
        and is_count(entry["deferred"], entry["tokens"] + 1)
        and is_number(entry["seconds"], 0, MOST_SECONDS)
        and isinstance(entry["cut"], bool)
    )


def facts_of(done: Done) -> Facts:
    """Return what is kept of an answer."""
    stats = done.answer.stats
    return {
        "threshold": done.answer.threshold,
        "text": done.answer.text,
        "tokens": stats.n_generated,
        "deferred": stats.n_deferred,
        "seconds": done.seconds,
        "cut": done.answer.finish_reason == "length",
    }


def _what_matters(
    switch: AnySwitch, options: Options, reviews: bool, *, one_expert: bool
) -> list[Any]:
    """Return what of the switch and the options an answer depends on. one_expert: whether there is
    but one; among several the switch chooses at every threshold below 1."""
    if reviews or options.doubts:
        return [_switch_key(switch), options.changed]
    changed = {name: x for name, x in options.changed.items() if not name.startswith("review")}
    by_expert_alone = one_expert and options.threshold == 0 and options.strategy == "defer"
    reads_switch = not (by_expert_alone or options.threshold == 1)
    return [_switch_key(switch) if reads_switch else None, changed]


def _switch_key(switch: AnySwitch) -> str:
    if not isinstance(switch, Switch):
        return switch.name
    head = hashlib.sha256(switch.weight.tobytes() + switch.bias.tobytes()).hexdigest()
    return key_of(switch.features, head)
