"""What review would cost on a text, and which tolerance is recommended."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted, decoder

from colm_edge.decode.loop import Sequential
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.llama.costs import CostTable
from colm_edge.train.tolerance import TOLERANCES, course_of, review_figures

positions = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40
)


def written(deferred, rejected, looked_at, schedule):
    """Write a text with the real loop; the base is wrong at the rejected positions alone."""

    def read(logits, hidden):
        at = int(hidden[0]) - 1
        p_defer = 1.0 if at < len(deferred) and deferred[at] else 0.0
        if at < len(deferred) and looked_at[at]:
            p_defer = max(p_defer, 0.4)
        return p_defer, int(logits.argmax()), 0.0, 0

    n = len(deferred)
    base = Scripted(lambda prefix: 3 if len(prefix) <= n and rejected[len(prefix) - 1] else 2)
    expert = Scripted(lambda prefix: 2)
    run = decoder(base, expert, read, [1], max_tokens=n, schedule=schedule)
    steps = list(run)
    assert len(steps) == n
    return run, expert


@given(positions, st.sampled_from([1, 2, 5, 100]))
def test_the_course_is_that_of_the_loop(text, window):
    deferred, rejected, looked_at = (np.array(column) for column in zip(*text, strict=True))
    schedule = Review(ByRule(Tolerance(1.0)), window, floor=0.3)
    run, expert = written(deferred, rejected, looked_at, schedule)
    course = course_of(deferred, rejected, window, looked_at)
    assert [n for n, _ in course.calls] == [len(batch) for batch in expert.batches]
    assert course.n_undone == run.stats.n_undone
    assert [n for _, n in course.calls] == expert.n_outputs


@given(positions)
def test_the_course_without_review_is_that_of_the_plain_loop(text):
    deferred, rejected, looked_at = (np.array(column) for column in zip(*text, strict=True))
    _, expert = written(deferred, rejected, looked_at, Sequential())
    course = course_of(deferred, None, 16)
    assert [n for n, _ in course.calls] == [len(batch) for batch in expert.batches]
    assert course.n_undone == 0


def fitted(regret, better, seed=0, n=4_000):
    """A fit whose held-back text has this regret at a tenth of the tokens, where the expert is
    `better` by so many nats. The switch knows only that they are not of the surer three fifths."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.1
    p = rng.random(n)
    p[wrong] = 0.6 + 0.4 * p[wrong]
    scores = SimpleNamespace(
        regret=lambda rows: np.where(wrong, regret, 0.0)[rows],
        base=np.full(n, -3.0),
        expert=np.where(wrong, -3.0 + better, -3.0),
        line=np.repeat(np.arange(n // 50), 50),
    )
    switch = SimpleNamespace(threshold=float(np.quantile(p, 0.9)))
    return SimpleNamespace(scores=scores, valid=np.arange(n), p=p, switch=switch)


FLAT = CostTable((1, 64), (0.03, 0.04))  # a batch costs little more than a token
STEEP = CostTable((1, 64), (0.03, 1.92))  # as much as its tokens one by one
BASE = CostTable((1, 64), (0.002, 0.02))


def test_a_tolerance_is_recommended_where_batches_are_cheap():
    found = review_figures(fitted(regret=3.0, better=2.5), (BASE, FLAT), 16)
    assert found["recommended"] == 2.0  # those below undo the same tokens
    rows = {row["review"]: row for row in found["tolerances"]}
    assert list(rows) == list(TOLERANCES)
    assert rows[2.0]["nll_hard"] < found["off"]["nll_hard"] == rows[4.0]["nll_hard"]
    assert rows[2.0]["undone"] > 0 == rows[4.0]["undone"]
    assert rows[2.0]["tokens_per_second"] > found["expert_tokens_per_second"]


@pytest.mark.parametrize(
    ("better", "table"), [(2.5, STEEP), (-2.5, FLAT)], ids=["dear", "worse text"]
)
def test_off_is_recommended_where_review_does_not_pay(better, table):
    assert review_figures(fitted(3.0, better), (BASE, table), 16)["recommended"] is None
