"""What must hold for the collaborative loop, tested on scripted sessions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import END, N_VOCAB, Scripted, decoder, reader, writer

from colm_edge.cancel import CancelledError
from colm_edge.decode.loop import ExpertAlone
from colm_edge.decode.picker import mixture
from colm_edge.decode.policy import RatePolicy
from colm_edge.options import Options


def reference(base_choose, expert_choose, p_of, prompt, threshold, end, max_tokens, n_ctx):
    """Co-LLM's loop in its simplest form: no caches; both models get whole prefixes."""
    tokens, steps = list(prompt), []
    while True:
        if len(tokens) > n_ctx or len(steps) == max_tokens:
            return steps, "length"
        p = p_of(len(tokens))
        deferred = threshold <= 0 or p > threshold
        token = (expert_choose if deferred else base_choose)(tuple(tokens))
        if token in end:
            return steps, "stop"
        steps.append((token, "expert" if deferred else "base", p))
        tokens.append(token)


@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(0, 1),
    threshold=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    n_prompt=st.integers(1, 20),
    n_ctx=st.integers(20, 40),
    max_tokens=st.integers(-1, 30),
    end_every=st.sampled_from([0, 5, 20]),
)
def test_loop_is_the_plain_loop(seed, rate, threshold, n_prompt, n_ctx, max_tokens, end_every):
    base_choose, expert_choose = writer(seed, end_every), writer(seed + 1, end_every)
    read, p_of = reader(seed, rate)
    prompt = [1 + i % (N_VOCAB - 1) for i in range(n_prompt)]
    base, expert = Scripted(base_choose, n_ctx), Scripted(expert_choose, n_ctx)
    run = decoder(base, expert, read, prompt, threshold=threshold, max_tokens=max_tokens)
    steps = [(s.token, s.source, s.p_defer) for s in run]
    expected, reason = reference(
        base_choose, expert_choose, p_of, prompt, threshold, {END}, max_tokens, n_ctx
    )
    assert steps == expected
    assert run.finish_reason == reason


@given(seed=st.integers(0, 10_000), rate=st.floats(0, 1))
def test_every_token_is_evaluated_once(seed, rate):
    """The base evaluates one token per step; the expert catches up in one batch per deferral."""
    read, _ = reader(seed, rate)
    base, expert = Scripted(writer(seed)), Scripted(writer(seed + 1))
    run = decoder(base, expert, read, [1, 2, 3], max_tokens=40)
    steps = list(run)
    assert [len(b) for b in base.batches] == [3] + [1] * 39
    assert run.stats.base_tokens == 42
    deferrals = [i for i, s in enumerate(steps) if s.source == "expert"]
    assert expert.account.n_calls == run.stats.expert_calls == len(deferrals)
    if deferrals:
        assert expert.account.n_evaluated == run.stats.expert_tokens == 3 + deferrals[-1]
    assert run.stats.n_deferred == len(deferrals)


def test_threshold_one_never_calls_the_expert():
    read, _ = reader(1, 1.0)
    expert = Scripted(writer(2))
    steps = list(decoder(Scripted(writer(1)), expert, read, [1], threshold=1.0, max_tokens=9))
    assert expert.account.n_calls == 0
    assert {s.source for s in steps} == {"base"}


def test_threshold_is_strict():
    read = lambda logits, hidden: (0.5, 1, 0.0, 0)  # noqa: E731
    steps = list(decoder(Scripted(writer(1)), Scripted(writer(2)), read, [1], max_tokens=3))
    assert {s.source for s in steps} == {"base"}


def test_threshold_zero_always_defers_even_where_p_underflows():
    read = lambda logits, hidden: (0.0, 1, 0.0, 0)  # noqa: E731
    run = decoder(Scripted(writer(1)), Scripted(writer(2)), read, [1], threshold=0.0, max_tokens=3)
    assert {s.source for s in run} == {"expert"}


def test_self_collaboration_is_the_model_itself():
    choose = writer(7, 30)
    alone = [s.token for s in decoder(Scripted(choose), Scripted(choose), reader(0, 0)[0], [1, 2])]
    for rate in (0.2, 0.7, 1.0):
        read, _ = reader(3, rate)
        run = decoder(Scripted(choose), Scripted(choose), read, [1, 2])
        assert [s.token for s in run] == alone


def test_ids_the_expert_lacks_are_never_written():
    """If the expert lacks the base's likeliest id, the base writes its best shared one."""

    def read(logits, hidden):
        return 0.0, int(logits[: N_VOCAB - 2].argmax()), 0.0, 0

    base = Scripted(lambda prefix: N_VOCAB - 1)
    expert = Scripted(lambda prefix: N_VOCAB - 1)
    for threshold in (0.5, 0.0):
        steps = decoder(
            base, expert, read, [1], n_choose=N_VOCAB - 2, threshold=threshold, max_tokens=5
        )
        assert all(s.token < N_VOCAB - 2 for s in steps)


def test_an_abandoned_answer_leaves_the_sessions_usable():
    read, _ = reader(5, 0.5)
    base, expert = Scripted(writer(1)), Scripted(writer(2))
    whole = [s.token for s in decoder(base, expert, read, [1, 2], max_tokens=12)]
    partial = decoder(base, expert, read, [3, 4, 5], max_tokens=12)
    next(partial)
    assert [s.token for s in decoder(base, expert, read, [1, 2], max_tokens=12)] == whole


def test_two_answers_can_interleave():
    read, _ = reader(5, 0.5)
    fresh = lambda: (Scripted(writer(1)), Scripted(writer(2)))  # noqa: E731
    apart = [[s.token for s in decoder(*fresh(), read, p, max_tokens=8)] for p in ([1], [2, 3])]
    shared = fresh()
    one, two = (decoder(*shared, read, p, max_tokens=8) for p in ([1], [2, 3]))
    together = list(zip(one, two, strict=True))
    assert [[s.token for s in steps] for steps in zip(*together, strict=True)] == apart


def test_compose_picks_from_the_mixture():
    """A token that both models find fairly likely may win in the mixture."""
    base_p = np.array([0.5, 0.0, 0.45, 0.05])
    expert_p = np.array([0.0, 0.5, 0.45, 0.05])
    with np.errstate(divide="ignore"):
        logits = [np.log(p).astype(np.float32) for p in (base_p, expert_p)]
    mixed = np.exp(mixture(*logits, 0.5, 4))
    assert np.allclose(mixed, (base_p + expert_p) / 2, atol=1e-6)
    assert mixed.argmax() == 2
    assert np.allclose(np.exp(mixture(*logits, 0.0, 3)), base_p[:3], atol=1e-6)


def test_compose_differs_from_defer_only_at_deferrals():
    read, _ = reader(11, 0.5)
    base, expert = Scripted(writer(1)), Scripted(writer(2))
    steps = list(decoder(base, expert, read, [1], compose=True, max_tokens=10))
    sure = [s for s in steps if s.source == "base"]
    assert sure
    assert all(s.logprob > -0.05 for s in sure)
    assert all(s.logprob < -0.2 for s in steps if s.source == "expert" and 0.3 < s.p_defer < 0.7)


def test_logprob_is_that_of_the_model_that_wrote():
    read, _ = reader(1, 0.5)
    for s in decoder(Scripted(writer(1)), Scripted(writer(2)), read, [1], max_tokens=5):
        assert math.isclose(s.logprob, -math.log(1 + 31 * math.exp(-8)), rel_tol=1e-4)


def test_the_mixture_leaves_a_defer_row_out():
    """P_base is normalised without the row that is the switch, however large that logit is."""
    base = np.array([0.0, 0.0, 9.0], np.float32)
    expert = np.array([0.0, 0.0], np.float32)
    assert np.allclose(np.exp(mixture(base, expert, 0.3, 2, defer_row=2)), [0.5, 0.5], atol=1e-6)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.05, 0.1, 0.2, 0.5]),
    power=st.floats(0.5, 6),
    scale=st.floats(0.1, 1),
)
def test_a_rate_is_held_whatever_p_defer_is_like(seed, rate, power, scale):
    draw = random.Random(seed)
    policy = RatePolicy(None, rate)
    n = 300
    deferred = [policy.defers(scale * draw.random() ** power) for _ in range(n)]
    assert abs(sum(deferred) / n - rate) < 0.02
    # Nowhere in a row is it far off either.
    for start in range(50, n - 100):
        assert abs(sum(deferred[start : start + 100]) / 100 - rate) < 0.1


def test_a_rate_asks_for_no_expert_where_the_base_is_certain():
    draw = random.Random(0)
    policy = RatePolicy(None, 0.1)
    p_defer = [0.0 if draw.random() < 0.85 else draw.random() for _ in range(300)]
    deferred = [p for p in p_defer if policy.defers(p)]
    assert min(deferred) > 0
    assert len(deferred) / len(p_defer) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_a_rate_are_one_model_alone(rate, share):
    policy = RatePolicy(None, rate)
    assert {policy.defers(p) for p in (0.0, 0.5, 1.0)} == {bool(share)}


def test_reading_a_prompt_back_leaves_a_followed_rate_as_it_is(tiny_pair):
    tokens = tiny_pair.base.tokenize("hello there, and some more words to be read")
    for rate in (0.1, 0.3, 0.6):
        options = Options(temperature=0.0, defer_rate=rate, max_tokens=12)
        read, plain = (tiny_pair.stream_tokens(tokens, options) for _ in range(2))
        sources = {step.source for step in read.read_prompt()}
        assert sources == {"base", "expert"}
        assert [step.source for step in read] == [step.source for step in plain]


def test_an_expert_alone_needs_no_base():
    base, expert = Scripted(writer(1)), Scripted(writer(2))
    read, _ = reader(1, 1.0)
    run = decoder(base, expert, read, [1, 2], threshold=0.0, max_tokens=9, schedule=ExpertAlone())
    alone = Scripted(writer(2))
    beside = decoder(Scripted(writer(1)), alone, read, [1, 2], threshold=0.0, max_tokens=9)
    steps = list(run)
    assert [s.token for s in steps] == [s.token for s in beside]
    assert {(s.source, s.p_defer) for s in steps} == {("expert", 1.0)}
    assert base.batches == []
    assert run.stats.expert_calls == 9


@given(
    seed=st.integers(0, 10_000), rate=st.floats(0, 1), threshold=st.sampled_from([0.3, 0.6, 0.9])
)
def test_near_is_called_once_at_the_first_reading_of_half_the_threshold(seed, rate, threshold):
    read, p_of = reader(seed, rate)
    base, calls = Scripted(writer(1)), list[int]()
    run = decoder(
        base, Scripted(writer(2)), read, [1, 2, 3], threshold, max_tokens=20,
        near=lambda expert: calls.append(len(base.held)),
    )  # fmt: skip
    list(run)
    places = [n for n in range(3, 23) if p_of(n) > threshold / 2]
    assert calls == places[:1]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_what_a_cancelled_answer_evaluated_is_counted(rate):
    """A prompt of several batches may be cancelled between two of them."""

    class Cancelled(Scripted):
        def sync(self, tokens, outputs=(), cancel=None):
            super().sync(tokens[:2], (), cancel)
            raise CancelledError

    model = Cancelled(writer(0))
    run = decoder(model, model, reader(0, rate)[0], [1, 2, 3, 4])
    assert not list(run)
    assert run.finish_reason == "stop"
    assert run.stats.base_tokens == model.account.n_evaluated == 2
    assert run.stats.base_seconds == model.account.seconds > 0
    assert run.stats.total_seconds > 0
