"""What must hold for review, tested on scripted sessions with random logits."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import END, N_VOCAB, Bold, Drawn, Scripted, decoder, reader

from colm_edge.decode.fresh import Fresh
from colm_edge.decode.loop import Decoder, ExpertAlone
from colm_edge.decode.planner import Planner
from colm_edge.decode.review import ByRule, Exact, Loose, Review, Tolerance, Verdict, top_entropy
from colm_edge.decode.step import Drafted, Undone
from colm_edge.llama.costs import CostTable, best_window
from colm_edge.llama.sampling import ChainSampler
from colm_edge.options import Options

THRESHOLD = 0.5


def reference(base, expert, p_of, prompt, nats, window, max_tokens, floor):
    """Co-LLM's loop with review in its simplest form: no caches, no states kept."""
    final, steps = list(prompt), []
    limit = base.n_ctx + 1
    if max_tokens >= 0:
        limit = min(limit, len(prompt) + max_tokens)
    while len(final) < limit:
        drafts, deferred = [], False
        while True:
            prefix = (*final, *drafts)
            deferred = p_of(len(prefix)) > THRESHOLD
            if deferred:
                break
            drafts.append(int(base.logits(prefix).argmax()))
            if drafts[-1] == END or len(drafts) == window or len(prefix) + 1 == limit:
                break
        written = []
        for i, token in enumerate(drafts):
            theirs = expert.logits((*final, *drafts[:i]))
            looked_at = token == END or p_of(len(final) + i) >= floor
            if looked_at and theirs.max() - theirs[token] > nats:
                written.append((int(theirs.argmax()), "expert"))
                break
            written.append((token, "base"))
        else:
            if deferred:
                written.append((int(expert.logits((*final, *drafts)).argmax()), "expert"))
        for token, source in written:
            if token == END:
                return steps, "stop"
            steps.append((token, source))
            final.append(token)
    return steps, "length"


parts = {
    "seed": st.integers(0, 10_000),
    "rate": st.floats(0, 1),
    "nats": st.sampled_from([0.0, 0.5, 2.0, math.inf]),
    "window": st.sampled_from([1, 2, 7, 100]),
    "n_prompt": st.integers(1, 20),
    "n_ctx": st.integers(20, 60),
    "max_tokens": st.integers(-1, 40),
    "likes_end": st.sampled_from([-2.0, 4.0, 8.0]),
    "floor": st.sampled_from([0.0, 0.0, 0.2, 0.4, 1.1]),
}


def reviewed(seed, rate, nats, window, n_prompt, n_ctx, max_tokens, likes_end, floor=0.0, **more):
    base, expert = (Drawn(seed + i, n_ctx, likes_end=likes_end) for i in (0, 1))
    prompt = [1 + i % (N_VOCAB - 1) for i in range(n_prompt)]
    schedule = Review(ByRule(Tolerance(nats)), window, floor=floor, **more)
    return decoder(
        base, expert, reader(seed, rate)[0], prompt, max_tokens=max_tokens, schedule=schedule
    )


@settings(max_examples=300)
@given(**parts)
def test_review_is_the_plain_loop_with_review(**given):
    run = reviewed(**given)
    steps = [(step.token, step.source) for step in run]
    base, expert, *_ = run._base, *run._experts
    _, p_of = reader(given["seed"], given["rate"])
    prompt = [1 + i % (N_VOCAB - 1) for i in range(given["n_prompt"])]
    expected = reference(
        base, expert, p_of, prompt,
        *(given[name] for name in ("nats", "window", "max_tokens", "floor")),
    )  # fmt: skip
    assert (steps, run.finish_reason) == expected
    assert list(run.tokens) == prompt + [token for token, _ in steps]
    assert run.stats.n_undone == sum(len(one.steps) for one in run.undone)
    assert all(one.regret > given["nats"] for one in run.undone)


@settings(max_examples=300)
@given(**parts, bets=st.floats(0, 1))
def test_bets_never_change_a_reviewed_text(bets, **given):
    plain, betting = reviewed(**given), reviewed(**given, planners=[Bold(given["seed"], bets)])
    assert list(betting) == list(plain)
    # How many drafts had been written behind a bad one is chance.
    first = [[(one.at, one.steps[0], one.regret) for one in run.undone] for run in (plain, betting)]
    assert first[0] == first[1]
    assert betting.finish_reason == plain.finish_reason


@settings(max_examples=200)
@given(**parts, bets=st.floats(0, 1))
def test_reviews_stay_where_they_are_if_the_policy_remembers_what_was_undone(bets, **given):
    plain, betting = reviewed(**given), reviewed(**given, planners=[Bold(given["seed"], bets)])
    betting.policy.remembers = True
    assert list(betting) == list(plain)
    assert betting.undone == plain.undone


@given(**parts)
def test_a_rejected_token_is_undone_once_a_position(**given):
    run = reviewed(**given)
    steps = list(run)
    places = [one.at for one in run.undone]
    assert places == sorted(set(places))
    for one in run.undone:
        if one.at < len(steps):  # an end token is not a step
            assert steps[one.at].source == "expert"
            assert steps[one.at].token != one.steps[0].token
            assert steps[one.at].p_defer == one.steps[0].p_defer


@settings(max_examples=200)
@given(**{**parts, "nats": st.just(0.0), "floor": st.just(0.0)}, bets=st.floats(0, 1))
def test_without_tolerance_the_text_is_the_experts_own(bets, **given):
    run = reviewed(**given, planners=[Bold(given["seed"], bets)])
    base, expert = (
        Drawn(given["seed"] + i, given["n_ctx"], likes_end=given["likes_end"]) for i in (0, 1)
    )
    prompt = [1 + i % (N_VOCAB - 1) for i in range(given["n_prompt"])]
    alone = decoder(
        base, expert, reader(0, 1)[0], prompt, 0.0,
        max_tokens=given["max_tokens"], schedule=ExpertAlone(),
    )  # fmt: skip
    assert [step.token for step in run] == [step.token for step in alone]
    assert run.finish_reason == alone.finish_reason


def plain_of(given) -> Decoder:
    """Return the plain loop over the same models and prompt."""
    base, expert = (
        Drawn(given["seed"] + i, given["n_ctx"], likes_end=given["likes_end"]) for i in (0, 1)
    )
    prompt = [1 + i % (N_VOCAB - 1) for i in range(given["n_prompt"])]
    read, _ = reader(given["seed"], given["rate"])
    return decoder(base, expert, read, prompt, max_tokens=given["max_tokens"])


@settings(max_examples=200)
@given(**{**parts, "nats": st.just(math.inf)})
def test_with_endless_tolerance_the_text_is_the_plain_loops(**given):
    run, plain = reviewed(**given), plain_of(given)
    assert list(run) == list(plain)
    assert run.stats.n_undone == 0


@settings(max_examples=200)
@given(**parts)
def test_only_what_is_looked_at_waits_and_is_asked_of_the_expert(**given):
    run, floor = reviewed(**given), given["floor"]
    _, p_of = reader(given["seed"], given["rate"])
    expert, asked, ends, straight, waiting = run._experts[0], set(), set(), [], 0
    state = expert.state
    expert.state = lambda i: asked.add(i + 1) or state(i)
    for event in run.events():
        if isinstance(event, Drafted):
            assert waiting or event.step.p_defer >= floor or event.step.token == END
            if event.step.token == END:
                ends.add(len(run.tokens) + waiting)
            waiting += 1
        elif isinstance(event, Undone):
            waiting -= len(event.steps)
        elif waiting:
            waiting -= 1
        elif event.source == "base":
            straight.append(event.p_defer)
    assert all(p_defer < floor for p_defer in straight)
    assert all(p_of(at) >= floor or p_of(at) > THRESHOLD or at in ends for at in asked)


FOURS = CostTable((1, 2, 4, 5, 8, 12, 16), (1.0, 1.7, 1.63, 2.34, 2.83, 4.02, 4.15), (0.3, 0.6))
BASE = CostTable((1,), (0.35,))


@pytest.mark.parametrize(
    ("expert", "undone", "window"),
    [
        (FOURS, lambda at: 0.005, 16),
        (FOURS, lambda at: 0.1, 4),
        (FOURS, lambda at: 0.1 if at < 1 else 0.005, 16),  # what is undone stands together
        (CostTable((1, 16), (1.0, 1.0)), lambda at: 0.0, 16),
        (CostTable((1, 16), (1.0, 16.0)), lambda at: 0.1, 1),
    ],
)
def test_reviews_begin_where_batches_are_cheapest_by_the_token(expert, undone, window):
    """By the times of a Zen 4, whose kernels evaluate four rows together; where a batch costs no
    more than a token; and where no batch saves anything."""
    assert best_window(BASE, expert, lambda at: 0.05, undone, 16) == window


def test_a_planner_learns_what_share_is_looked_at():
    """Where outputs cost most, fewer of them let longer batches pay."""
    dear = CostTable((1, 4, 8, 12, 16), (1.0, 1.4, 2.4, 3.4, 4.4), (0.0, 12.0))
    windows = []
    for looked_at in (True, False):
        planner = Planner(lambda cancel: (BASE, dear))
        planner.prepare()
        for _ in range(200):
            planner.saw_review(0, 20, undone=False)
            planner.looked_at.add(looked_at)
        windows.append(planner.window(16))
    assert windows[0] < windows[1] == 16


@pytest.mark.parametrize("window", [3, 8])
def test_the_best_window_is_that_of_many_drawn_answers(window):
    """Tokens and seconds of one window, drawn: at a limit of one less, another is the best only if
    it is slower."""
    defers, undoes = 0.1, (0.3, 0.05)
    draw, speeds = Random(window), {}
    for most in range(1, window + 1):
        tokens = seconds = since = 0.0
        for _ in range(20_000):
            n, deferred = 0, False
            while n < most and not deferred:
                deferred = draw.random() < defers
                n += not deferred
            bad = [draw.random() < undoes[since + i > 0] for i in range(n)]
            kept = bad.index(True) if any(bad) else n
            tokens += kept + (kept < n or deferred)
            seconds += (n + deferred) * BASE(1) + FOURS.reviewing(n + deferred)
            since = 0 if kept < n or deferred else since + n
        speeds[most] = tokens / seconds
    best = best_window(BASE, FOURS, lambda at: defers, lambda at: undoes[at > 0], window)
    assert speeds[best] > 0.9 * max(speeds.values())


def test_a_planner_learns_how_long_drafts_wait():
    planner = Planner(lambda cancel: (BASE, FOURS))
    assert planner.window(16) == 16  # nothing was measured yet
    planner.prepare()
    for _ in range(50):
        planner.saw_review(0, 20, undone=False)
    assert planner.window(16) == 16
    assert planner.window(6) <= 6
    for i in range(60):
        planner.saw_review(0, i % 6, undone=True)
    assert planner.window(16) == 4


@given(seed=st.integers(0, 1000), rate=st.floats(0, 0.5), window=st.integers(1, 20))
def test_no_more_than_a_window_waits_and_each_token_is_evaluated_once(seed, rate, window):
    run = reviewed(seed, rate, math.inf, window, 3, 64, 40, -50.0)
    steps, expert = list(run), run._experts[0]
    # Behind the prompt, each batch holds what was written since the last one.
    sizes = [len(batch) for batch in expert.batches[1:]]
    assert all(size <= window + 1 for size in sizes)
    assert expert.account.n_evaluated == 3 + len(steps) - 1
    assert run.stats.n_reviewed == sum(step.source == "base" for step in steps)


def verdict(token: int, *logits: float) -> Verdict:
    x = np.array(logits, np.float32)
    return Verdict(token, x, int(x.argmax()), float(np.log(np.exp(x).sum())))


def test_the_loose_rule_lets_pass_what_an_unsure_expert_goes_on_from():
    unsure, sure = verdict(0, 1.0, 1.1, 1.0), verdict(0, 0.0, 9.0, 0.0)
    same = verdict(1, 0.0, 9.0, 0.0)
    assert top_entropy(unsure) == pytest.approx(math.log(3), abs=0.01)
    assert top_entropy(sure) < 0.01
    rule = Loose(entropy=0.3, n_next=2)
    assert rule.first([same, unsure, same, same, unsure]) == 5
    assert rule.first([same, sure, same, same]) == 1  # the expert is sure
    assert rule.first([same, unsure, same, unsure, same]) == 1  # it does not go on from there
    assert rule.first([]) == 0


class Fixed(Scripted):
    """A session whose logits depend on the last token only."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__(lambda prefix: 0, 8, len(rows))
        self.rows = rows.astype(np.float32)

    def state(self, i):
        return self.rows[self.held[i]], np.array([i + 1], np.float32)


@pytest.mark.parametrize(("seed", "bets"), [(0, False), (1, True)])
@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
        Options(temperature=0.7, top_k=3, top_p=0.9, min_p=0.05),
        Options(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.5),
    ],
)
def test_sampled_without_tolerance_the_text_is_distributed_as_the_experts(seed, bets, options):
    """Texts of three tokens from a vocabulary of five are counted, with review and alone."""
    rng = np.random.default_rng(seed)
    ours, theirs = (Fixed(1.5 * rng.normal(size=(5, 5))) for _ in range(2))
    random = Random(seed)

    def text(schedule: Review | None) -> tuple[int, ...]:
        more = {"threshold": 0.0} if schedule is None else {"schedule": schedule}
        run = decoder(
            ours, theirs, reader(random.randrange(10**6), 0.3)[0], [1],
            n_choose=5, sampler=Fresh(ChainSampler(options, 5, [1]), random), max_tokens=3, **more,
        )  # fmt: skip
        run.end_tokens = frozenset()
        return tuple(step.token for step in run)

    n = 6000
    planner = Bold(seed, 0.5) if bets else None
    found = Counter(
        text(Review(Exact(), 2, planners=[planner] if planner else ())) for _ in range(n)
    )
    expected = Counter(text(None) for _ in range(n))
    common = [key for key in found | expected if expected[key] >= 20]
    rest = n - sum(found[key] for key in common), n - sum(expected[key] for key in common)
    table = np.array([[found[key], expected[key]] for key in common] + [list(rest)], float)
    table = table[table.sum(1) > 0]
    # Two samples of the same size: each cell's difference has the variance of its sum.
    statistic = float(((table[:, 0] - table[:, 1]) ** 2 / table.sum(1)).sum())
    assert chi2_tail(statistic, len(table) - 1) > 1e-4


def test_a_sampled_token_that_is_undone_is_drawn_anew():
    """Not with the random number that gave the rejected one: what the expert puts there is
    distributed as it would draw it."""
    ours, theirs = (
        Fixed(np.log(np.tile(p, (4, 1)))) for p in ([0.5, 0.3, 0.15, 0.05], [0.7, 0.2, 0.07, 0.03])
    )
    options, random = Options(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0), Random(0)
    drawn: Counter[int] = Counter()
    for _ in range(20_000):
        run = decoder(
            ours, theirs, reader(0, 0.0)[0], [1], n_choose=4, max_tokens=1,
            sampler=Fresh(ChainSampler(options, 4, [1]), random),
            schedule=Review(ByRule(Tolerance(1.0)), 1),
        )  # fmt: skip
        run.end_tokens = frozenset()
        drawn.update(step.token for step in run if step.source == "expert")
    n = drawn.total()
    assert n > 5000
    found = np.array([drawn[i] for i in range(4)])
    expected = n * np.array([0.7, 0.2, 0.07, 0.03])
    assert chi2_tail(float(((found - expected) ** 2 / expected).sum()), 3) > 1e-4


def chi2_tail(statistic: float, freedom: int) -> float:
    """Return the probability of a larger chi-square, by Wilson and Hilferty's approximation."""
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
