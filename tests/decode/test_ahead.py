"""The base goes on while the expert is away: the same text, and less waiting."""

from __future__ import annotations

import random
import time
from array import array
from concurrent.futures import Future

import pytest
from expert_servers import faking
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    END,
    N_VOCAB,
    Bold,
    Later,
    Scripted,
    Sometimes,
    agreeing,
    decoder,
    reader,
    writer,
)

from colm_edge.cancel import Cancel, CancelledError
from colm_edge.decode import ahead as ahead_module
from colm_edge.decode.ahead import Ahead, Awaited
from colm_edge.decode.fast import Fast
from colm_edge.errors import AbsentExpertError, ModelError
from colm_edge.pair import load


class Distant(Scripted):
    """An expert whose replies come late, by a drawn number of polls, or are errors."""

    def __init__(self, choose, n_ctx=64, seed=0, longest=6, failing=0.0) -> None:
        super().__init__(choose, n_ctx)
        self.draw, self.longest, self.failing = random.Random(seed), longest, failing

    def begin(self, tokens, outputs=(), cancel=None):
        return Later(self.draw.randrange(self.longest + 1))

    def sync(self, tokens, outputs=(), cancel=None) -> int:
        # By the prefix, so that it fails at the same places under every schedule.
        if random.Random(hash(tuple(tokens))).random() < self.failing:
            raise AbsentExpertError("not there")
        return super().sync(tokens, outputs, cancel)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(0, 1),
    agree=st.floats(0, 1),
    n_prompt=st.integers(1, 20),
    n_ctx=st.integers(20, 90),
    max_tokens=st.integers(-1, 60),
    end_every=st.sampled_from([0, 5, 20]),
    longest=st.integers(0, 40),
    failing=st.sampled_from([0.0, 0.3]),
    bets=st.sampled_from([None, 0.0, 0.7]),
    sampled=st.booleans(),
    compose=st.booleans(),
)
def test_going_on_never_changes_the_text(
    seed, rate, agree, n_prompt, n_ctx, max_tokens, end_every, longest, failing, bets, sampled,
    compose,
):  # fmt: skip
    base_choose = writer(seed, end_every)
    expert_choose = agreeing(seed + 1, base_choose, agree)
    read, _ = reader(seed, rate)
    prompt = [1 + i % (N_VOCAB - 1) for i in range(n_prompt)]
    failing = 0.0 if bets is not None else failing  # bets are for experts in this process

    def answer(ahead: bool):
        base = Scripted(base_choose, n_ctx)
        expert = Distant(expert_choose, n_ctx, seed, longest, failing)
        first = Ahead(base, frozenset({END}), N_VOCAB) if ahead else base
        second = Awaited(expert, first) if ahead else expert
        run = decoder(
            first, second, read, prompt, max_tokens=max_tokens, compose=compose,
            schedule=None if bets is None else Fast([Bold(seed, bets)]),
            sampler=Sometimes(seed) if sampled else None,
        )  # fmt: skip
        steps = list(run)
        assert run.stats.base_tokens <= base.account.n_evaluated
        return steps, run.finish_reason, run.stats.expert_failures, expert.batches

    assert answer(True) == answer(False)


def both(base_choose, expert_choose, rate=0.3, longest=40, **options):
    """Return the base's and the expert's timelines after an answer, and the answer."""
    base, expert = Scripted(base_choose), Distant(expert_choose, longest=longest)
    ahead = Ahead(base, frozenset({END}), N_VOCAB)
    read, _ = reader(3, rate)
    run = decoder(ahead, Awaited(expert, ahead), read, [1, 2, 3], max_tokens=40, **options)
    list(run)
    return base, ahead, run


def test_where_the_expert_agrees_nothing_is_evaluated_twice():
    choose = writer(1)
    base, ahead, run = both(choose, choose)
    assert run.stats.n_deferred > 5
    assert ahead.n_won > 5
    # A few may be evaluated ahead of the end and never be written.
    assert 42 <= base.account.n_evaluated <= 42 + 32
    # After a deferral, so not one of the base's own calls was needed for these.
    assert base.account.n_calls == base.account.n_evaluated - 2


def test_nothing_is_evaluated_ahead_of_a_reply_that_is_there():
    base, ahead, _ = both(writer(1), writer(2), longest=0)
    assert ahead.n_ahead == 0
    assert base.account.n_evaluated == 42


class Timed(Future):
    """A reply that is there at a time of a made-up clock."""

    def __init__(self, clock: list[float], at: float) -> None:
        super().__init__()
        self.clock, self.at = clock, at

    def done(self) -> bool:
        if not super().done() and self.clock[0] >= self.at:
            now, self.clock[0] = self.clock[0], self.at
            self.set_result(None)  # tells when that was
            self.clock[0] = now
        return super().done()


@pytest.mark.parametrize(("agrees", "reply"), [(False, 2.0), (True, 2.0), (False, 40.0)])
def test_a_decode_that_the_reply_would_wait_for_has_to_promise_more(monkeypatch, agrees, reply):
    """A decode takes 4 seconds here. Where the expert never agrees, none begins any more that would
    end 2 seconds late, and those that are over in time go on."""
    clock = [0.0]
    monkeypatch.setattr(ahead_module, "perf_counter", lambda: clock[0])
    choose = writer(1)
    base = Scripted(choose)
    expert = Scripted(choose if agrees else lambda prefix: 1 + choose(prefix) % (N_VOCAB - 1))
    replies: list[Timed] = []
    base_sync, expert_sync = base.sync, expert.sync

    def decode(*arguments):
        clock[0] += 4.0
        return base_sync(*arguments)

    def begin(*_):
        replies.append(Timed(clock, clock[0] + reply))
        return replies[-1]

    def wait(*arguments):
        clock[0] = max(clock[0], replies[-1].at)
        assert replies[-1].done()
        return expert_sync(*arguments)

    base.sync, expert.begin, expert.sync = decode, begin, wait
    ahead, (read, _) = Ahead(base, frozenset({END}), N_VOCAB), reader(3, 1.0)
    run = decoder(ahead, Awaited(expert, ahead), read, [1, 2, 3], max_tokens=40)
    for _ in range(20):
        next(run)
    before = ahead.n_ahead
    list(run)
    goes_on = agrees or reply > 4
    assert (ahead.n_ahead > before) is goes_on
    if reply > 4:
        assert replies[-1].at <= clock[0] < replies[-1].at + 4


def test_a_cancelled_answer_does_not_wait_ahead():
    cancel = Cancel()
    base = Scripted(writer(1))
    ahead = Ahead(base, frozenset({END}), N_VOCAB)
    expert = Distant(writer(2), longest=0)
    expert.begin = lambda *_: Later(10_000)
    read, _ = reader(3, 1.0)
    sync = base.sync

    def stop(tokens, outputs=(), check=None):
        if len(tokens) > 5:
            cancel.request()
        return sync(tokens, outputs, check)

    base.sync = stop
    run = decoder(ahead, Awaited(expert, ahead), read, [1, 2, 3], max_tokens=40, cancel=cancel)
    assert list(run) == []
    assert run.finish_reason == "stop"
    assert base.account.n_calls < 6
    with pytest.raises(CancelledError):
        cancel.check()


PROMPT = "hello world, this is a prompt"
WAYS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 5},
    "compose": {"seed": 5, "strategy": "compose"},
    "penalised": {"temperature": 0.0, "repeat_penalty": 1.2},
}


def written(answer):
    return [(s.token, s.source) for s in answer.steps]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("owner", ["llamacpp", "vllm", "colm-edge"])
def test_a_server_that_takes_its_time(tiny, owner, way, monkeypatch):
    """The base goes on beside a real connection; the server is asked the same as without."""
    made: list[Ahead] = []

    class Kept(Ahead):
        def __init__(self, *parts):
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr("colm_edge.decode.parts.Ahead", Kept)
    options = {**WAYS[way], "max_tokens": 40, "threshold": 0.4}
    answers, asked = [], []
    for overlap in (False, True):
        with (
            faking(owner, tiny["expert"]) as (url, fake),
            load(tiny["base"], url, "margin", n_threads=1, n_ctx=256, overlap=overlap) as pair,
        ):
            answer = fake.answer

            def slow(path, body, answer=answer):
                if "completion" in path:
                    time.sleep(0.01)
                return answer(path, body)

            fake.answer = slow
            answers.append(pair.generate(PROMPT, **options))
            asked.append([body["prompt"] for body in fake.asked])
    assert written(answers[0]) == written(answers[1])
    assert asked[0] == asked[1]
    (ahead,) = made
    assert ahead.n_ahead > 0


def test_with_a_server_that_agrees_nothing_is_evaluated_twice(tiny):
    """The expert is the base itself, so every bet is won."""
    calls = []
    for overlap in (False, True):
        with (
            faking("llamacpp", tiny["base"]) as (url, _),
            load(tiny["base"], url, "margin", n_threads=1, n_ctx=256, overlap=overlap) as pair,
        ):
            answer = pair.generate(PROMPT, temperature=0.0, threshold=0.4, max_tokens=40)
            assert answer.stats.n_deferred > 0
            calls.append(answer.stats.base_tokens)
            assert pair.base_session.account.n_evaluated >= calls[-1]
    assert 0 <= calls[1] - calls[0] <= 32  # those ahead of the end


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_on_a_device_of_its_own(tiny, way):
    options = {**WAYS[way], "max_tokens": 40, "threshold": 0.4}
    answers = []
    for overlap in (False, True):
        with load(
            tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256, overlap=overlap
        ) as pair:
            answers.append([written(pair.generate(text, **options)) for text in (PROMPT, "abc")])
    assert answers[0] == answers[1]


def test_a_server_on_this_machine_is_not_beside_by_default(tiny):
    """It may use the same cores."""
    with faking("llamacpp", tiny["expert"]) as (url, _), load(tiny["base"], url, "margin") as pair:
        assert not pair.members[0].overlaps
        assert pair.expert.expert.is_local


def test_a_failure_is_told_as_without(tiny, monkeypatch):
    monkeypatch.setattr("colm_edge.remote.client.BACK_OFF", 0.0)
    with (
        faking("llamacpp", tiny["expert"]) as (url, fake),
        load(
            tiny["base"], url, "margin", n_threads=1, n_ctx=256, overlap=True, expert_required=True
        ) as pair,
    ):
        fake.always = "500"
        with pytest.raises(ModelError, match="the expert"):
            pair.generate(PROMPT, temperature=0.0, threshold=0.4, max_tokens=40)


def test_the_defer_row_is_never_bet_on():
    """At a deferral it is the likeliest row, and it is the switch, not a token."""
    row = N_VOCAB - 2
    base = Scripted(lambda held: row)
    state = base.state

    def logits(i):
        found, hidden = state(i)
        found[[3, N_VOCAB - 1]] = 2.0, 9.0  # the base's token, and one that the expert lacks
        return found, hidden

    base.state = logits
    ahead = Ahead(base, frozenset({END}), N_VOCAB - 1, row)
    tokens = array("i", [1, 2])
    ahead.sync(tokens)
    ahead.go_on(tokens, Later(5), None)
    assert len(base.held) > 2
    assert set(base.held[2:]) == {3}


def test_time_ahead_is_counted_as_the_tokens_are():
    """By whoever syncs next; `Scripted` takes a millisecond for each token."""
    choose = writer(1)
    _, ahead, run = both(choose, choose)
    assert ahead.n_ahead > 5
    assert run.stats.base_seconds == pytest.approx(1e-3 * run.stats.base_tokens)
