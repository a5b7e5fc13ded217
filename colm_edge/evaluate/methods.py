"""Compare the collaboration with either model alone and with simpler switches, on one data file.

Teacher-forced: both models score the data once, and every method is a way to mix or choose
between the two log-probabilities of each token. Generated: every method answers every prompt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.errors import ColmError, DataError, MismatchError
from colm_edge.evaluate.generate import Generated, Journal, RandomSwitch, answers
from colm_edge.evaluate.metrics import METRICS, check_rows
from colm_edge.evaluate.proxy_tuning import Proxy
from colm_edge.switch.file import Switch
from colm_edge.switch.rules import Untrained
from colm_edge.train.documents import Row, read_rows, tokenized
from colm_edge.train.scoring import MakeProgress, Scores, score

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.switch.load import AnySwitch
from colm_edge.tables import Table

Array = npt.NDArray[np.float64]
METHODS = (
    "base", "expert", "colm", "compose", "random", "entropy", "margin", "weak", "proxy",
)  # fmt: skip
SWITCHED = METHODS[2:-1]  # they choose a model for each token
BOOTSTRAPS = 1000
SEED = 0
# The least threshold above 0, which would defer what has p = 0 as well.
ABOVE_ZERO = float(np.nextafter(0.0, 1.0))


@dataclass(frozen=True)
class Method:
    """A row of the table: its losses on every scored token (n,), and what answers prompts.

    threshold: None where nothing is compared with one. deferred: the tokens that are the
    expert's. nll: of the method's own distribution. nll_hard: of the one model that it names.
    """

    name: str
    threshold: float | None
    deferred: npt.NDArray[np.bool_]
    nll: Array
    nll_hard: Array
    switch: AnySwitch | Proxy
    compose: bool = False


def evaluate(
    pair: Pair,
    data: str | os.PathLike[str],
    options: Options,
    *,
    metric: str | None = None,
    limit: int | None = None,
    methods: Collection[str] = (),
    thresholds: Sequence[float] = (),
    defer_rates: Sequence[float] = (),
    weak: Switch | None = None,
    proxy: Proxy | None = None,
    work: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: MakeProgress,
) -> Table:
    """Return a row for each method: base, expert, colm, compose, random, entropy, margin, and,
    where they are given, weak (a switch of that name) and proxy.

    colm and compose defer at the options' threshold, or at each of `thresholds`; the other
    switches then defer as often as colm does on the same teacher-forced tokens. With
    `defer_rates` every switch's threshold is the quantile of its own p_defer on the scored tokens
    of this data, so that each rate is met exactly there (but for ties), and about so in
    generation. base, expert and proxy do not depend on it and have one row each.

    threshold is None and defer_rate 1 for proxy, whose models all run at every token; it names
    no one model for a token, so that its nll_hard is its nll. Intervals (…_low, …_high) are 95 %,
    by bootstrap over the data's lines. `cut` is the share of answers that max_tokens or the
    context ended; the metric judges what was written of them.

    methods: the rows wanted; without any, all there are. metric: a name in METRICS, for generation.
    work: a folder that keeps scores and answers; what is found there is not computed again. note:
    is told of documents that did not fit the context.

    Raises DataError for bad data, MismatchError where the pair's switch has no features to score,
    ColmError for methods that are unknown or lack what they need.
    """
    if thresholds and defer_rates:
        raise ColmError("thresholds and defer rates are two ways to say one thing; give one")
    if metric is not None and metric not in METRICS:
        raise ColmError(f"no metric {metric!r}; known: {', '.join(METRICS)}")
    names = _names(methods, weak, proxy)
    rows = list(islice(read_rows(data), limit))
    if metric is not None:
        check_rows(rows, METRICS[metric])
    if set(names) & set(SWITCHED):
        _check_scored(pair.switch)
    if weak is not None:
        weak.reader(pair.base, pair.n_shared)  # checks its width
    if not thresholds and not defer_rates:
        thresholds = [pair.threshold(options)]
    scoring = Journal(work / "proxy.jsonl") if work is not None else None
    answering = Journal(work / "answers.jsonl") if work is not None else None
    if metric is not None:
        _check_prompts(pair, rows, options)
    documents = tokenized(rows, pair, raw=options.raw)
    if documents.cut_note:
        note(documents.cut_note)
    # Kept scores of other lines are no mistake here: --limit may have changed.
    scores = score(pair, documents, progress, work=work, update=True)
    found = _methods(pair.switch, scores, names, thresholds, defer_rates, weak)
    if proxy is not None and "proxy" in names:
        found = chain(found, [_by_proxy(proxy, -proxy.score(documents, progress, scoring))])
    table = []
    for method in found:
        table.append(_teacher_forced(method, scores.line))
        if metric is None:
            continue
        if isinstance(method.switch, Proxy):
            given = method.switch.answers(
                options, rows, METRICS[metric], progress, journal=answering
            )
        else:
            label = method.name
            if len(thresholds) + len(defer_rates) > 1:
                label += f" {method.deferred.mean():.0%}"
            chosen = options.with_changes(
                threshold=method.threshold, strategy="compose" if method.compose else "defer"
            )
            given = answers(
                pair, method.switch, chosen, rows, METRICS[metric], progress,
                label=label, journal=answering,
            )  # fmt: skip
        table[-1] |= _generated(given)
    return table


def _check_prompts(pair: Pair, rows: list[Row], options: Options) -> None:
    for number, row in rows:
        message = {"role": "user", "content": row["prompt"]}
        n = len(pair.prompt_tokens([message], raw=options.raw))
        if n > pair.n_ctx:
            raise DataError(
                f"line {number}: the prompt has {n} tokens, the context holds {pair.n_ctx}; "
                "shorten it or raise -c"
            )


def _names(methods: Collection[str], weak: Switch | None, proxy: Proxy | None) -> tuple[str, ...]:
    missing = {"weak": weak is None, "proxy": proxy is None}
    if not methods:
        return tuple(name for name in METHODS if not missing.get(name))
    for name in methods:
        if name not in METHODS:
            raise ColmError(f"no method {name}; known: {', '.join(METHODS)}")
        if missing.get(name):
            needs = {"weak": "a switch (--weak)", "proxy": "a third model (--anti-expert)"}[name]
            raise ColmError(f"the method {name} needs {needs}")
    return tuple(name for name in METHODS if name in methods)


def _check_scored(switch: AnySwitch) -> None:
    if not isinstance(switch, Switch) and switch.name not in readout.FEATURES:
        raise MismatchError(f"eval cannot score the switch {switch.name}; train one for the pair")


def _methods(
    switch: AnySwitch,
    scores: Scores,
    names: Collection[str],
    thresholds: Sequence[float],
    defer_rates: Sequence[float],
    weak: Switch | None,
) -> Iterator[Method]:
    n = len(scores.base)

    def method(
        name: str, p: Array, threshold: float, mix: Array, switch: AnySwitch, compose: bool = False
    ) -> Method:
        with np.errstate(divide="ignore"):  # a mix of exactly 0 or 1: one model alone
            d = np.log(mix) - np.log1p(-mix)
        nll = -np.logaddexp(scores.base - np.logaddexp(0, d), scores.expert - np.logaddexp(0, -d))
        deferred = _deferred(p, threshold)
        hard = -np.where(deferred, scores.expert, scores.base)
        return Method(name, threshold, deferred, nll, hard, switch, compose)

    if "base" in names:
        yield method("base", np.zeros(n), 1.0, np.zeros(n), switch)
    if "expert" in names:
        yield method("expert", np.ones(n), 0.0, np.ones(n), switch)
    if not set(names) & set(SWITCHED):
        return
    p = probability(switch, scores)
    drawn = np.random.default_rng(SEED).random(n)
    rivals: dict[str, AnySwitch] = {name: Untrained(name) for name in ("entropy", "margin")}
    if weak is not None:
        rivals["weak"] = weak
    p_of = {name: probability(rivals[name], scores) for name in rivals if name in names}
    points = [(at, int(_deferred(p, at).sum())) for at in thresholds]
    points += [(threshold_at(p, round(rate * n)), round(rate * n)) for rate in defer_rates]
    for threshold, k in points:
        if "colm" in names:
            yield method("colm", p, threshold, p, switch)
        if "compose" in names:
            mix = np.where(_deferred(p, threshold), p, 0.0)
            yield method("compose", p, threshold, mix, switch, compose=True)
        if "random" in names:
            rate = np.full(n, k / n)
            yield method("random", drawn, threshold_at(drawn, k), rate, RandomSwitch())
        for name, values in p_of.items():
            yield method(name, values, threshold_at(values, k), values, rivals[name])


def _deferred(p: Array, threshold: float) -> npt.NDArray[np.bool_]:
    return p > threshold if threshold > 0 else np.ones(len(p), np.bool_)


def probability(switch: AnySwitch, scores: Scores) -> Array:
    """Return a switch's p_defer of every scored token, (n,).

    Raises MismatchError for a switch that reads what is not among the scores.
    """
    features = scores.logit_features
    if isinstance(switch, Switch):
        w_hidden, w_logit = switch.columns()
        d = features.astype(np.float64) @ w_logit[0] + float(switch.bias[0])
        if w_hidden is not None:
            d += scores.hidden @ w_hidden[0]
        return np.asarray(np.exp(-np.logaddexp(0, -d)), np.float64)
    _check_scored(switch)
    values = features[:, readout.FEATURES.index(switch.name)].astype(np.float64)
    return -np.expm1(-values) if switch.name == "entropy" else 1 - values


def threshold_at(p: Array, k: int) -> float:
    """Return a threshold above which k of the p (n,) are; fewer where the k-th has equals below.

    It lies midway between two p, so that the last bits of a model's state decide nothing. All of
    them are at 0, which defers always, and none at 1.
    """
    if k <= 0:
        return 1.0
    if k >= len(p):
        return 0.0
    lower, upper = np.partition(p, [len(p) - k - 1, len(p) - k])[len(p) - k - 1 : len(p) - k + 1]
    middle = (lower + upper) / 2
    return max(ABOVE_ZERO, float(middle if middle < upper else lower))


def _by_proxy(proxy: Proxy, nll: Array) -> Method:
    return Method("proxy", None, np.ones(len(nll), np.bool_), nll, nll, proxy)


def _teacher_forced(method: Method, line: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "method": method.name,
        "threshold": method.threshold,
        "defer_rate": float(method.deferred.mean()),
        **_with_interval("nll", method.nll, line),
        **_with_interval("nll_hard", method.nll_hard, line),
    }


def _generated(given: Generated) -> dict[str, Any]:
    tokens, seconds = int(given.tokens.sum()), float(given.seconds.sum())
    return {
        **_with_interval("accuracy", given.right, np.arange(len(given.right))),
        "generated_defer_rate": int(given.deferred.sum()) / max(1, tokens),
        "tokens_per_answer": float(given.tokens.mean()),
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "cut": float(given.cut.mean()),
    }


def _with_interval(name: str, values: Array, group: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the mean and its 95 % bootstrap interval, whole groups (lines) drawn at a time."""
    _, group = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    rng = np.random.default_rng(SEED)
    means = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
