"""Compare the collaboration with either model alone and with simpler switches, on one data file.

Teacher-forced: both models score the data once, and every method is a way to mix or choose
between the two log-probabilities of each token. Generated: every method answers every prompt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colm_edge.arrays import Bools, Doubles, Ints
from colm_edge.decode.policy import running_rate
from colm_edge.errors import ColmError, MismatchError
from colm_edge.evaluate.generate import ANSWERS_FILE, Facts, Generated, RandomSwitch, answers
from colm_edge.evaluate.metrics import METRICS, Metric, check_rows
from colm_edge.evaluate.proxy_tuning import Proxy
from colm_edge.journal import Journal
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import AnySwitch, FeatureSwitch, log_shares
from colm_edge.switch.rules import Only, Untrained
from colm_edge.tables import Table
from colm_edge.train.documents import Documents, Row, read_rows, tokenized
from colm_edge.train.prompts import answer_prompts, pace_of, read_prompts
from colm_edge.train.scores import Scores
from colm_edge.train.scoring import MakeProgress, Recorded, score, score_each
from colm_edge.train.team import of_chosen

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.pair import Pair

METHODS = (
    "base", "expert", "colm", "review", "compose", "random", "entropy", "margin", "weak", "proxy",
)  # fmt: skip
TEAM_METHODS = METHODS[:5]
SWITCHED = METHODS[2:-1]  # they choose a model for each token
Z = 1.96  # standard deviations that 95 % of a normal distribution lie within
BOOTSTRAPS = 1000
SEED = 0
# The smallest threshold above 0, which would defer tokens with p = 0 too.
ABOVE_ZERO = float(np.nextafter(0.0, 1.0))


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how.

    metric: a name in METRICS, to judge generated answers too. limit: use only so many lines of the
    data, from the first on. methods: the rows wanted; none means all that are possible.

    thresholds: colm and compose defer at each of them; the other switches then defer as often as
    colm does on the same teacher-forced tokens. defer_rates, instead: every switch's threshold is
    the quantile of its own p_defer on the scored tokens of this data, so that each rate is met
    exactly there (except at ties), and about so in generation. With neither there is one threshold,
    that of the decoding options.

    reviews: at each point, the method `review` answers with each of these tolerances, in nats.
    weak, proxy: a switch and three models, for the methods of these names.
    on_expert: score the expert's own greedy answers to the data's prompts, not its completions.
    n_slots: how many answers are written at once.

    Raises ColmError for names that are unknown, and for methods that lack what they need.
    """

    metric: str | None = None
    limit: int | None = None
    methods: Collection[str] = ()
    thresholds: Sequence[float] = ()
    defer_rates: Sequence[float] = ()
    reviews: Sequence[float] = ()
    weak: Switch | None = None
    proxy: Proxy | None = None
    on_expert: bool = False
    n_slots: int = 1

    def __post_init__(self) -> None:
        if self.thresholds and self.defer_rates:
            raise ColmError("thresholds and defer rates are two ways to say one thing; give one")
        if self.metric is not None and self.metric not in METRICS:
            raise ColmError(f"no metric {self.metric!r}; known: {', '.join(METRICS)}")
        missing = self._missing()
        for name in self.methods:
            if name not in METHODS:
                raise ColmError(f"no method {name}; known: {', '.join(METHODS)}")
            if name in missing:
                raise ColmError(f"the method {name} needs {missing[name]}")

    def _missing(self) -> dict[str, str]:
        """Return the methods that are not possible, and what each needs."""
        needs = {
            "review": ((self.reviews and self.metric) or None, "--reviews, and a --metric"),
            "weak": (self.weak, "a switch (--weak)"),
            "proxy": (self.proxy, "a third model (--anti-expert)"),
        }
        return {name: what for name, (given, what) in needs.items() if given is None}

    def check_team(self) -> None:
        """Raise ColmError for what does not go with several experts."""
        for name in self.methods:
            if name not in TEAM_METHODS:
                raise ColmError(
                    f"the method {name} names no expert; with several there are "
                    f"{', '.join(TEAM_METHODS)}"
                )
        given = {
            "Proxy Tuning": self.proxy is not None,
            "--weak": self.weak is not None,
            "--score-on expert": self.on_expert,
        }
        for what in (name for name, asked in given.items() if asked):
            raise ColmError(f"{what} works with one expert; give -me once")

    @property
    def names(self) -> tuple[str, ...]:
        """The methods of the table's rows, in their order."""
        wanted = self.methods or [name for name in METHODS if name not in self._missing()]
        return tuple(name for name in METHODS if name in wanted)

    @property
    def judge(self) -> Metric | None:
        """The metric itself."""
        return None if self.metric is None else METRICS[self.metric]

    @property
    def is_sweep(self) -> bool:
        """Whether a method may have several rows."""
        return len(self.thresholds) + len(self.defer_rates) > 1


@dataclass(frozen=True)
class Method:
    """A row of the table: its losses on every scored token (n,), and what answers prompts.

    threshold: None where the method has none. deferred: which tokens are the expert's. nll: of the
    method's own distribution. nll_hard: of the one model that it names for a token.
    """

    name: str
    threshold: float | None
    deferred: Bools
    nll: Doubles
    nll_hard: Doubles
    switch: AnySwitch | Proxy
    compose: bool = False
    review: float | None = None  # the tolerance of its answers; teacher-forced there is no review


ALL_METHODS = Comparison()


def evaluate(
    pair: Pair,
    data: str | os.PathLike[str],
    options: Options,
    comparison: Comparison = ALL_METHODS,
    *,
    work: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: MakeProgress,
) -> Table:
    """Return a row for each method: base, expert, colm, compose, random, entropy, margin, and,
    where what they need is given, review, weak (a switch of that name) and proxy.

    In a sweep a method has a row for each threshold or defer rate, except base, expert and proxy,
    which do not depend on it.

    threshold is None and defer_rate 1 for proxy: its models all run at every token. It names no
    single model for a token, so its nll_hard is its nll. Intervals (…_low, …_high) are 95 %, by
    bootstrap over the data's lines. `cut` is the share of answers that max_tokens or the context
    ended; the metric judges what was written of them.

    work: a folder that keeps scores and answers; what is found there is not computed again. note:
    is told of documents that did not fit the context.

    Raises DataError for bad data, MismatchError when the pair's switch has no features to score.
    """
    if not comparison.thresholds and not comparison.defer_rates:
        comparison = replace(comparison, **_point(pair, options))
    rows = list(islice(read_rows(data), comparison.limit))
    _check(pair, rows, options, comparison)
    scoring, answering = (Journal(work and work / name) for name in ("proxy.jsonl", ANSWERS_FILE))
    by_expert = None
    if comparison.on_expert:
        by_expert = answer_prompts(
            pair, rows, progress,
            max_tokens=options.max_tokens, n_slots=comparison.n_slots, raw=options.raw,
            schedule=options.schedule, work=work,
        )  # fmt: skip
    documents = by_expert.documents if by_expert else tokenized(rows, pair, raw=options.raw)
    if documents.cut_note:
        note(documents.cut_note)
    recorded = by_expert.recorded if by_expert else None
    scores, found = _scored(pair, documents, comparison, recorded, progress, work)
    proxy, judge = comparison.proxy, comparison.judge
    if proxy is not None and "proxy" in comparison.names:
        found = chain(found, [_by_proxy(proxy, -proxy.score(documents, progress, scoring))])
    table = []
    for method in found:
        row = _teacher_forced(method, scores, tells_regret=len(pair.members) == 1)
        row |= {"review": method.review} if comparison.reviews else {}
        if judge is not None and by_expert and method.name == "expert" and options.is_plain:
            pace = [*pace_of(pair, comparison.n_slots), options.schedule]
            entries = [_facts(entry, pace) for entry in by_expert.entries]
            row |= _generated(Generated.of(entries, rows, judge))
        elif judge is not None:
            row |= _generated(
                _answers(pair, method, options, comparison, rows, progress, answering)
            )
        table.append(row)
    return table


def _scored(
    pair: Pair,
    documents: Documents,
    comparison: Comparison,
    recorded: Recorded | None,
    progress: MakeProgress,
    work: Path | None,
) -> tuple[Scores, Iterator[Method]]:
    """Return the scores of the documents, and the methods that come of them."""
    if len(pair.members) > 1:
        each = score_each(pair, documents, progress, work=work)
        return each[0], _team_methods(pair, each, comparison)
    scores = score(pair, documents, progress, work=work, recorded=recorded)
    return scores, _methods(pair.switch, scores, comparison)


def _answers(
    pair: Pair,
    method: Method,
    options: Options,
    comparison: Comparison,
    rows: list[Row],
    progress: MakeProgress,
    journal: Journal,
) -> Generated:
    """Let a method answer the rows' prompts, and judge the answers."""
    judge = comparison.judge
    assert judge is not None
    if isinstance(method.switch, Proxy):
        given = method.switch.answers(options, rows, judge, progress, journal=journal)
        if comparison.n_slots > 1:  # it wrote one at a time, which is no speed to put beside theirs
            given = replace(given, seconds=np.full(len(rows), np.nan))
        return given
    strategy = "compose" if method.compose else "defer"
    chosen = options.with_changes(threshold=method.threshold, strategy=strategy)
    rate = f" {method.deferred.mean():.0%}" if comparison.is_sweep else ""
    if method.review is not None:
        chosen = chosen.with_changes(review=method.review)
        rate += f" {method.review:g}"
    elif options.review is None and pair.review(chosen, method.switch) < math.inf:
        chosen = chosen.with_changes(review=math.inf)  # deferral alone, whatever the switch says
    return answers(
        pair, method.switch, chosen, rows, judge, progress,
        label=method.name + rate, journal=journal, n_slots=comparison.n_slots,
    )  # fmt: skip


def _point(pair: Pair, options: Options) -> dict[str, Any]:
    """Return the one threshold, or rate, that the decoding options ask for."""
    rate = running_rate(pair.switch, options)
    if rate is None:
        return {"thresholds": (pair.threshold(options),)}
    return {"defer_rates": (rate,)}


def _check(pair: Pair, rows: list[Row], options: Options, comparison: Comparison) -> None:
    """Raise now what would be raised in the middle of the work."""
    if len(pair.members) > 1:
        comparison.check_team()
    if comparison.proxy is not None:
        if pair.members[0].crossing is not None:
            raise ColmError("Proxy Tuning adds logits of one vocabulary; leave out --bridge")
        if options.grammar:
            raise ColmError("Proxy Tuning is compared without a grammar; leave it out")
        if not pair.expert_is_here:
            raise ColmError("Proxy Tuning adds logits; give the expert as a GGUF file (-me)")
    for nats in comparison.reviews:
        pair.check_options(options.with_changes(review=nats))
    if "compose" in comparison.names and comparison.judge is not None:
        options.with_changes(strategy="compose")
    pair.check_options(options)
    if set(comparison.names) & set(SWITCHED):
        _scorable(pair.switch)
    if comparison.weak is not None:
        comparison.weak.reader(pair.base, pair.n_shared)  # checks its width
        if comparison.weak.n_experts > 1:
            raise MismatchError(
                f"{comparison.weak.name}: a switch for several experts; --weak takes one of one"
            )
    if comparison.judge is None:
        return
    check_rows(rows, comparison.judge)
    for _ in read_prompts(rows, pair, options.raw):
        pass  # each fits the context


def _scorable(switch: AnySwitch) -> FeatureSwitch:
    """Return the switch. Raises MismatchError when it reads what is not among the scores."""
    if not isinstance(switch, FeatureSwitch):
        raise MismatchError(f"eval cannot score the switch {switch.name}; train one for the pair")
    return switch


def _methods(switch: AnySwitch, scores: Scores, comparison: Comparison) -> Iterator[Method]:
    names, n = comparison.names, len(scores.base)

    def method(
        name: str, p: Doubles, threshold: float, mix: Doubles, switch: AnySwitch, **more: Any
    ) -> Method:
        with np.errstate(divide="ignore"):  # a mix of exactly 0 or 1 is one model alone
            d = np.log(mix) - np.log1p(-mix)
        nll = -np.logaddexp(scores.base - np.logaddexp(0, d), scores.expert - np.logaddexp(0, -d))
        deferred = _deferred(p, threshold)
        hard = -np.where(deferred, scores.expert, scores.base)
        return Method(name, threshold, deferred, nll, hard, switch, **more)

    def p_of(switch: AnySwitch) -> Doubles:
        return _scorable(switch).p_defer(scores.logit_features, scores.hidden)

    if "base" in names:
        yield method("base", np.zeros(n), 1.0, np.zeros(n), switch)
    if "expert" in names:
        yield method("expert", np.ones(n), 0.0, np.ones(n), switch)
    if not set(names) & set(SWITCHED):
        return
    p = p_of(switch)
    drawn = np.random.default_rng(SEED).random(n)
    rivals: dict[str, AnySwitch] = {name: Untrained(name) for name in ("entropy", "margin")}
    if comparison.weak is not None:
        rivals["weak"] = comparison.weak
    theirs = {name: p_of(rival) for name, rival in rivals.items() if name in names}
    points = [(at, int(_deferred(p, at).sum())) for at in comparison.thresholds]
    counts = [round(rate * n) for rate in comparison.defer_rates]
    points += [(threshold_at(p, k), k) for k in counts]
    for threshold, k in points:
        if "colm" in names:
            yield method("colm", p, threshold, p, switch)
        if "review" in names:
            for nats in comparison.reviews:
                yield method("review", p, threshold, p, switch, review=nats)
        if "compose" in names:
            mix = np.where(_deferred(p, threshold), p, 0.0)
            yield method("compose", p, threshold, mix, switch, compose=True)
        if "random" in names:
            rate = np.full(n, k / n)
            yield method("random", drawn, threshold_at(drawn, k), rate, RandomSwitch())
        for name, values in theirs.items():
            yield method(name, values, threshold_at(values, k), values, rivals[name])


def _team_methods(pair: Pair, each: Sequence[Scores], comparison: Comparison) -> Iterator[Method]:
    """Yield the methods for several experts: base, each expert alone, and what the switch makes of
    them. each: the scores with each expert."""
    switch, base, names = pair.switch, each[0], comparison.names
    assert isinstance(switch, Switch), "only a trained one chooses among experts"
    d = switch.d(base.logit_features, base.hidden)
    gold = np.column_stack([base.base, *(scores.expert for scores in each)])
    joint = -np.logaddexp.reduce(log_shares(d) + gold, axis=1)
    p, n = switch.p_defer(base.logit_features, base.hidden), len(d)
    theirs = of_chosen(gold, d)
    if "base" in names:
        yield Method("base", 1.0, np.zeros(n, np.bool_), -gold[:, 0], -gold[:, 0], switch)
    for k, member in enumerate(pair.members if "expert" in names else ()):
        alone, all_of = -gold[:, 1 + k], np.ones(n, np.bool_)
        yield Method(member.source, 0.0, all_of, alone, alone, Only(k))
    thresholds = [*comparison.thresholds]
    thresholds += [threshold_at(p, round(rate * n)) for rate in comparison.defer_rates]
    for threshold in thresholds:
        deferred = _deferred(p, threshold)
        hard = -np.where(deferred, theirs, gold[:, 0])
        if "colm" in names:
            yield Method("colm", threshold, deferred, joint, hard, switch)
        for nats in comparison.reviews if "review" in names else ():
            yield Method("review", threshold, deferred, joint, hard, switch, review=nats)
        if "compose" in names:
            with np.errstate(divide="ignore"):  # a share of exactly 0 or 1 is one model alone
                both = np.logaddexp(np.log1p(-p) + gold[:, 0], np.log(p) + theirs)
            mixed = -np.where(deferred, both, gold[:, 0])
            yield Method("compose", threshold, deferred, mixed, hard, switch, compose=True)


def _deferred(p: Doubles, threshold: float) -> Bools:
    return p > threshold if threshold > 0 else np.ones(len(p), np.bool_)


def threshold_at(p: Doubles, k: int) -> float:
    """Return a threshold that k of the p (n,) are above; fewer where the k-th is tied with others.

    It lies midway between two p, so that the last bits of a model's state decide nothing. 0 defers
    all of them, 1 none.
    """
    if k <= 0:
        return 1.0
    if k >= len(p):
        return 0.0
    lower, upper = np.partition(p, [len(p) - k - 1, len(p) - k])[len(p) - k - 1 : len(p) - k + 1]
    middle = (lower + upper) / 2
    return max(ABOVE_ZERO, float(middle if middle < upper else lower))


def _by_proxy(proxy: Proxy, nll: Doubles) -> Method:
    return Method("proxy", None, np.ones(len(nll), np.bool_), nll, nll, proxy)


def _teacher_forced(method: Method, scores: Scores, *, tells_regret: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": method.name,
        "threshold": method.threshold,
        "defer_rate": float(method.deferred.mean()),
        **_with_interval("nll", method.nll, scores.line),
        **_with_interval("nll_hard", method.nll_hard, scores.line),
    }
    if scores.tells_regret and tells_regret:
        regret = scores.regret(np.arange(len(scores.base)))
        removed = float(regret[method.deferred].sum() / max(regret.sum(), 1e-300))
        row["regret_removed"] = None if isinstance(method.switch, Proxy) else removed
    if method.review is not None:  # what it undoes is not known before it writes
        row |= dict.fromkeys(row.keys() - {"method", "threshold"})
    return row


def _facts(entry: dict[str, Any], pace: list[Any]) -> Facts:
    """Return what is kept of an answer that the expert wrote alone; its time only if it was written
    at this pace."""
    n = len(entry["tokens"]) - (not entry["cut"])  # without the end token
    seconds = entry["seconds"] if entry.get("pace") == pace else math.nan
    return {**entry, "tokens": n, "deferred": n, "seconds": seconds}


def _generated(given: Generated) -> dict[str, Any]:
    tokens, seconds = int(given.tokens.sum()), float(given.seconds.sum())
    speed = None if math.isnan(seconds) else tokens / seconds if seconds > 0 else 0.0
    return {
        **_with_interval("accuracy", given.right, np.arange(len(given.right))),
        "generated_defer_rate": int(given.deferred.sum()) / max(1, tokens),
        "tokens_per_answer": float(given.tokens.mean()),
        "tokens_per_second": speed,
        "cut": float(given.cut.mean()),
    }


def _with_interval(name: str, values: Doubles, group: Ints) -> dict[str, float]:
    """Return the mean and its 95 % bootstrap interval, whole groups (lines) drawn at a time."""
    _, group = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    rng = np.random.default_rng(SEED)
    means = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    if name == "accuracy" and values.min() == values.max() in (0, 1):
        low, high = _wilson(values[0], len(values))  # of equal values no draw tells anything
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n that is 0 or 1 (Wilson, 1927)."""
    most = Z**2 / (n + Z**2)
    return max(0.0, share - most), min(1.0, share + most)
