"""Compare the collaboration with either model alone and with simpler switches, on one data file.

Teacher-forced: both models score the data once, and every method is a way to mix or choose
between the two log-probabilities of each token. Generated: every method answers every prompt.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.documents import Row, read_rows, tokenized
from colm_edge.errors import DataError, MismatchError
from colm_edge.scoring import MakeProgress, Scores, score
from colm_edge.switch import HIDDEN, Base, Floats, Reader, Switch, Untrained

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.switch import AnySwitch

Array = npt.NDArray[np.float64]
BOOTSTRAPS = 1000
SEED = 0

# Did an answer get it right? (generated text, the data's line) -> 0 or 1
Metric = Callable[[str, dict[str, Any]], float]


def exact(text: str, row: dict[str, Any]) -> float:
    """The text is the completion, but for white space at the ends."""
    return float(text.strip() == row["completion"].strip())


def contains(text: str, row: dict[str, Any]) -> float:
    """The line's `answer` (or its completion) stands in the text as a whole: no letter or digit
    touches it, no sign or decimal changes it."""
    wanted = re.escape(row.get("answer", row["completion"]).strip())
    return float(re.search(rf"(?<![\w.+-]){wanted}(?!\w|[.,]\d)", text) is not None)


def gsm8k(text: str, row: dict[str, Any]) -> float:
    """The number after the last #### (or the last number) is the completion's."""
    return float(_final_number(text) == _final_number(row["completion"]) is not None)


def steps(text: str, row: dict[str, Any]) -> float:
    """The share of the completion's annotated results, <<…=result>>, that the text states."""
    wanted = re.findall(r"<<[^<>]*=([^<>]*)>>", row["completion"])
    if not wanted:
        raise DataError("the metric steps needs completions with annotations such as <<2+3=5>>")
    stated = re.findall(r"<<[^<>]*=([^<>]*)>>", text)
    return sum(result in stated for result in wanted) / len(wanted)


def _final_number(text: str) -> float | None:
    tail = text.rsplit("####", 1)[-1] if "####" in text else text
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", tail)
    if not numbers:
        return None
    return float((numbers[0] if "####" in text else numbers[-1]).replace(",", ""))


METRICS: dict[str, Metric] = {f.__name__: f for f in (exact, contains, gsm8k, steps)}


@dataclass(frozen=True)
class RandomSwitch(Untrained):
    """Defer at random, whatever the base's state: p_defer is drawn uniformly."""

    name: str = "random"

    def reader(self, base: Base, n_choose: int) -> Reader:
        rng = np.random.default_rng(SEED)
        out = np.empty(len(readout.FEATURES), np.float32)

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float]:
            choice, logsumexp = readout.read(logits, None, None, None, None, out, n_choose, -1)
            return rng.random(), choice, logsumexp

        return read


@dataclass(frozen=True)
class Method:
    """A row of the table: p_defer of every scored token (n,), and how it answers a prompt."""

    name: str
    p: Array
    threshold: float
    mix: Array  # the weight of the expert in the likelihood, mostly p itself
    switch: AnySwitch
    compose: bool = False


def evaluate(
    pair: Pair,
    data: str,
    options: Options,
    *,
    metric: str | None = None,
    limit: int | None = None,
    progress: MakeProgress,
) -> list[dict[str, Any]]:
    """Return a row for each of base, expert, colm, compose, random, entropy and margin.

    The three simple switches defer as often as colm does at its threshold, measured on the same
    teacher-forced tokens. Intervals are 95 %, by bootstrap over the data's lines.

    Raises DataError for bad data, MismatchError where the pair's switch has no features to score.
    """
    rows = list(islice(read_rows(data), limit))
    for number, row in rows if metric is not None else []:
        if not {"prompt", "completion"} <= set(row):
            raise DataError(f"line {number}: {metric} needs prompt and completion")
    scores = score(pair, tokenized(rows, pair, raw=options.raw), progress)
    table = []
    for method in _methods(pair, scores, options):
        table.append(_teacher_forced(method, scores))
        if metric is not None:
            table[-1] |= _generated(pair, method, options, rows, METRICS[metric], progress)
    return table


def _methods(pair: Pair, scores: Scores, options: Options) -> Iterator[Method]:
    switch = pair.switch
    n = len(scores.base)
    features = {
        name: scores.logit_features[:, i].astype(np.float64)
        for i, name in enumerate(readout.FEATURES)
    }
    uncertain = {"entropy": -np.expm1(-features["entropy"]), "margin": 1 - features["margin"]}
    if isinstance(switch, Switch):
        parts = [
            scores.hidden if name == HIDDEN else features[name][:, None] for name in switch.features
        ]
        columns = np.concatenate(parts, axis=1).astype(np.float64)
        d = columns @ switch.weight[0].astype(np.float64) + float(switch.bias[0])
        p = np.exp(-np.logaddexp(0, -d))
    elif switch.name in uncertain:
        p = uncertain[switch.name]
    else:
        raise MismatchError(f"eval cannot score the switch {switch.name}; train one for the pair")
    threshold = pair.threshold(options)
    rate = float((p > threshold).mean()) if threshold > 0 else 1.0
    yield Method("base", np.zeros(n), 1.0, np.zeros(n), switch)
    yield Method("expert", np.ones(n), 0.0, np.ones(n), switch)
    yield Method("colm", p, threshold, p, switch)
    deferred = np.where(p > threshold, p, 0.0)
    yield Method("compose", p, threshold, deferred, switch, compose=True)
    drawn = np.random.default_rng(SEED).random(n)
    yield Method("random", drawn, 1 - rate, np.full(n, rate), RandomSwitch())
    for name, values in uncertain.items():
        at = float(np.quantile(values, 1 - rate))
        yield Method(name, values, at, values, Untrained(name))


def _teacher_forced(method: Method, scores: Scores) -> dict[str, Any]:
    deferred = method.p > method.threshold if method.threshold > 0 else np.ones(len(method.p), bool)
    with np.errstate(divide="ignore"):  # p of exactly 0 or 1: one model alone
        d = np.log(method.mix) - np.log1p(-method.mix)
    nll = -np.logaddexp(scores.base - np.logaddexp(0, d), scores.expert - np.logaddexp(0, -d))
    hard = -np.where(deferred, scores.expert, scores.base)
    low, high = _interval(nll, scores.line)
    return {
        "method": method.name,
        "threshold": method.threshold,
        "defer_rate": float(deferred.mean()),
        "nll": float(nll.mean()),
        "nll_low": low,
        "nll_high": high,
        "nll_hard": float(hard.mean()),
    }


def _generated(
    pair: Pair,
    method: Method,
    options: Options,
    rows: list[Row],
    metric: Metric,
    progress: MakeProgress,
) -> dict[str, Any]:
    chosen = options.with_changes(
        threshold=method.threshold, strategy="compose" if method.compose else "defer"
    )
    right, tokens, deferred, seconds = [], 0, 0, 0.0
    with pair.switched(method.switch), progress(method.name, len(rows)) as bar:
        for _, row in rows:
            answer = pair.chat([{"role": "user", "content": row["prompt"]}], **vars(chosen))
            right.append(metric(answer.text, row))
            tokens += answer.stats.n_generated
            deferred += answer.stats.n_deferred
            seconds += answer.stats.total_seconds
            bar.update(1)
    low, high = _interval(np.array(right), np.arange(len(right)))
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_low": low,
        "accuracy_high": high,
        "generated_defer_rate": deferred / max(1, tokens),
        "tokens_per_answer": tokens / len(rows),
        "tokens_per_second": tokens / seconds,
    }


def _interval(values: Array, group: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean, whole groups (lines) drawn at a time."""
    _, group = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    rng = np.random.default_rng(SEED)
    means = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def render(table: list[dict[str, Any]], form: str) -> str:
    """Return a table as md, csv or json."""
    if form == "json":
        return json.dumps(table)
    names = list(table[0])
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        return text.getvalue().rstrip()
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    for row in table:
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
