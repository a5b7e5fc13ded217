"""Across a bridge, too, bets, going on and catching up never change the text."""

from __future__ import annotations

import random
from array import array
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Bold, Eager, Later, Sometimes, reader
from spellings import ALPHABET, MARK, Speaker, Spellings, vocabulary

from colm_edge.decode.ahead import Ahead, Awaited
from colm_edge.decode.background import MIN_GAP, Background
from colm_edge.decode.bridge import Bridge
from colm_edge.decode.fast import Fast
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.decode.spelling import Crossing
from colm_edge.decode.timeline import Around
from colm_edge.llama.account import Account
from colm_edge.pair import load


class Knowing(Speaker):
    """It knows a text, and mostly says the longest of its tokens that goes on with it; so two of
    them often agree. It counts as a session does."""

    def __init__(self, words: Spellings, seed: int, share: float, n_ctx: int = 400) -> None:
        super().__init__(words, seed)
        self.share, self.n_ctx = share, n_ctx
        draw = random.Random(1)
        self.text = b"".join(draw.choices(ALPHABET, k=9))
        self.n_outputs: list[int] = []

    def sync(self, tokens, outputs=(), cancel=None) -> int:
        assert 0 < len(tokens) <= self.n_ctx
        outputs = list(outputs) or [len(tokens) - 1]
        assert outputs == list(range(outputs[0], len(tokens)))
        held = list(self.held)
        if held == list(tokens) and self.outputs.issuperset(outputs):
            return 0  # the last batch has told them
        keep = next(
            (i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b), 10**6
        )
        keep = min(keep, len(held), len(tokens), outputs[0])
        super().sync(tokens, outputs)
        self.n_outputs.append(len(outputs))
        self.account += Account(len(tokens) - keep)
        return len(tokens) - keep

    def logits(self, prefix):
        found = super().logits(prefix)
        if random.Random(str((self.seed, prefix))).random() < self.share:
            done = len(b"".join(map(self.words.piece, prefix))) % len(self.text)
            rest = (self.text * 2)[done : done + len(self.text)]
            token = self.words.first(rest)
            if token is not None:
                found[token] = 9.0
        return found


class Distant(Knowing):
    """Its replies come late, by a drawn number of polls."""

    def begin(self, tokens, outputs=(), cancel=None) -> Future:
        return Later(random.Random(str((self.seed, len(tokens)))).randrange(6))


SCHEDULES = {
    "fast": (lambda bold: Fast([bold]), lambda: None),
    "review": (
        lambda bold: Review(ByRule(Tolerance(2.0)), 6, planners=[bold]),
        lambda: Review(ByRule(Tolerance(2.0)), 6),
    ),
    "lossless": (
        lambda bold: Review(ByRule(Tolerance(0.0)), 3, planners=[bold]),
        lambda: Review(ByRule(Tolerance(0.0)), 3),
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(0, 1),
    share=st.sampled_from([0.0, 0.7, 0.95]),
    n_ours=st.integers(0, 30),
    n_theirs=st.integers(0, 30),
    n_ctx=st.integers(20, 60),
    max_tokens=st.integers(-1, 40),
    bets=st.floats(0, 1),
    sampled=st.booleans(),
    compose=st.booleans(),
    away=st.booleans(),
)
def test_bets_across_a_bridge_never_change_the_text(
    schedule, seed, rate, share, n_ours, n_theirs, n_ctx, max_tokens, bets, sampled, compose, away
):
    draw = random.Random(seed)
    ours, theirs = vocabulary(draw, n_ours), vocabulary(draw, n_theirs, begin=seed % 2 == 0)
    prompt = [ours.control(MARK), *ours.encode("ab a€".encode())]
    sampled = sampled and schedule == "fast"  # review copies logits, which this one does not know

    def written(bold):
        base = Knowing(ours, seed, share)
        expert = (Distant if away else Knowing)(theirs, seed + 1, share, n_ctx)
        bridge = Bridge(expert, Crossing(ours, theirs))
        if away and bold is not None and schedule == "fast":
            base = Ahead(base, ours.ends, ours.n_vocab)
            bridge = Awaited(bridge, base)
        made, plain = SCHEDULES[schedule]
        loop = Decoder(
            base, [bridge], Policy(reader(seed, rate)[0], 0.5),
            Picker(ours.n_vocab, Sometimes(seed) if sampled else None, composes=compose), prompt,
            end_tokens=ours.ends, max_tokens=max_tokens,
            schedule=plain() if bold is None else made(bold),
        )  # fmt: skip
        steps = list(loop)
        return [(s.token, s.source) for s in steps], loop.finish_reason, loop.stats.expert_failures

    assert written(Bold(seed, bets, steady=True)) == written(None)


def pieces(*raw: str) -> Spellings:
    return Spellings([one.encode() for one in raw])


def test_a_bet_that_the_expert_would_spell_otherwise_is_not_placed():
    """Behind "ca" the base would write "t"; the expert has one token for "cat"."""
    ours, theirs = pieces("c", "a", "t", "s"), pieces("c", "a", "t", "s", "cat")
    bridge = Bridge(Speaker(theirs, 1), Crossing(ours, theirs))
    around = Around(bridge)
    mark, c, a, t, s = 1, 2, 3, 4, 5
    assert not around.keeps([mark, c, a, t], 3)
    assert around.keeps([mark, c, a, s], 3)
    bridge._inner.n_ctx = 3
    assert not around.keeps([mark, c, a, s], 3)  # which does not fit
    assert Around(Speaker(theirs, 1)).keeps([mark, c, a, t], 3)


def saying(words, next_to):
    """Return logits that have one likeliest piece behind each piece."""

    def logits(prefix):
        found = np.full(words.n_vocab, -9.0, np.float32)
        found[words.first(next_to[words.piece(prefix[-1])])] = 9.0
        return found

    return logits


def test_what_a_bet_told_is_not_used_where_the_text_is_spelt_otherwise_by_then():
    """The expert prefers "a" behind "b", but has one token for the "bc" that the base writes."""
    ours, theirs = pieces("a", "b", "c", "x"), pieces("a", "b", "c", "x", "bc")
    read = lambda logits, n: (0.9 * (n[0] != 3), int(logits.argmax()), 9.0, 0)  # noqa: E731

    def written(planners):
        base, expert = Speaker(ours, 1), Speaker(theirs, 2)
        base.logits = saying(ours, {b"x": b"b", b"b": b"c", b"c": b"x", b"a": b"x"})
        expert.logits = saying(
            theirs, {b"x": b"b", b"b": b"a", b"bc": b"x", b"a": b"x", b"c": b"x"}
        )
        loop = Decoder(
            base, [Bridge(expert, Crossing(ours, theirs))], Policy(read, 0.5),
            Picker(ours.n_vocab), [ours.control(MARK), ours.first(b"x")], end_tokens=ours.ends,
            max_tokens=3, schedule=Review(ByRule(Tolerance(1.0)), 6, planners=planners),
        )  # fmt: skip
        return b"".join(ours.piece(step.token) for step in loop), loop.stats.expert_calls

    assert written([Bold(0, 1.0, steady=True)])[0] == written([])[0] == b"bcx"


class Merging(Spellings):
    """Spells as byte pair encoding does: "bc" is merged before "ab"."""

    def encode(self, raw):
        found = [bytes([byte]) for byte in raw]
        for pair in ((b"b", b"c"), (b"a", b"b")):
            i = 0
            while i < len(found) - 1:
                if (found[i], found[i + 1]) == pair:
                    found[i : i + 2] = [b"".join(pair)]
                i += 1
        return [self.first(piece) for piece in found]


def test_what_a_bet_told_is_not_used_where_the_text_that_is_evaluated_is_spelt_otherwise():
    """A review asks of "a" and "b" alone, which are one token "ab"; before a "c" they were not."""
    ours = pieces("a", "b", "c", "d", "x")
    theirs = Merging([piece.encode() for piece in ("a", "b", "c", "d", "x", "bc", "ab")])
    p_of = {2: 0.9, 3: 0.4, 4: 0.4}
    read = lambda logits, n: (p_of.get(int(n[0]), 0.0), int(logits.argmax()), 9.0, 0)  # noqa: E731

    def written(planners):
        base, expert = Speaker(ours, 1), Speaker(theirs, 2)
        base.logits = saying(ours, {b"x": b"a", b"a": b"b", b"b": b"c", b"c": b"d", b"d": b"d"})
        expert.logits = saying(
            theirs,
            {b"x": b"a", b"a": b"c", b"ab": b"c", b"bc": b"d", b"c": b"d", b"b": b"c", b"d": b"d"},
        )
        loop = Decoder(
            base, [Bridge(expert, Crossing(ours, theirs))], Policy(read, 0.5),
            Picker(ours.n_vocab), [ours.control(MARK), ours.first(b"x")], end_tokens=ours.ends,
            max_tokens=5,
            schedule=Review(ByRule(Tolerance(1.0)), 3, planners=planners, floor=0.3),
        )  # fmt: skip
        return b"".join(ours.piece(step.token) for step in loop)

    assert written([Bold(0, 1.0, steady=True)]) == written([])


@pytest.mark.parametrize("same", [True, False])
def test_a_deferral_after_a_bet_that_was_won_needs_no_call(same):
    """Of an expert that always agrees every token is evaluated once, in half as many calls."""
    ours = pieces("a", "b", "c", "d")
    theirs = ours if same else pieces("d", "c", "b", "a", "x")
    n = 100

    def written(schedule):
        base, expert = Knowing(ours, 1, 0.0), Knowing(theirs, 1, 0.0)

        def cyclic(words):
            def logits(prefix):
                found = np.full(words.n_vocab, -9.0, np.float32)
                found[words.first(b"abcd"[len(prefix) % 4 :])] = 9.0
                return found

            return logits

        base.logits, expert.logits = cyclic(ours), cyclic(theirs)
        read = lambda logits, hidden: (0.9, int(logits.argmax()), 0.0, 0)  # noqa: E731
        loop = Decoder(
            base, [Bridge(expert, Crossing(ours, theirs))], Policy(read, 0.5),
            Picker(ours.n_vocab), [ours.control(MARK)], end_tokens=ours.ends, max_tokens=n,
            schedule=schedule,
        )  # fmt: skip
        return [step.token for step in loop], expert

    plain, twin = written(None)
    fast, expert = written(Fast([Eager()]))
    assert fast == plain
    # No token goes on from another: what stands behind the last one is all that is asked for.
    assert twin.account.n_calls == n
    assert set(twin.n_outputs) == {1}
    assert twin.account.n_evaluated == n
    assert expert.account.n_calls == n // 2
    assert expert.account.n_evaluated == n


def test_what_the_expert_said_behind_its_last_token_is_not_asked_again():
    """Where tokens go on from the last one, the state before it is needed: of the call before."""
    ours, theirs = pieces("a", "b"), pieces("a", "b", "aab", "bba")
    expert = Knowing(theirs, 3, 0.0)
    expert.logits = lambda prefix: np.linspace(0, len(prefix) % 3, theirs.n_vocab, dtype=np.float32)
    bridge, fresh = Bridge(expert, Crossing(ours, theirs)), Crossing(ours, theirs)
    tokens = [1, 2, 3]
    for token in (2, 3, 2, 3, 2, 3):
        tokens.append(token)
        bridge.sync(tokens)
        anew = Knowing(theirs, 3, 0.0)
        anew.logits = expert.logits
        other = Bridge(anew, fresh)
        other.sync(tokens)
        assert np.array_equal(bridge.state(len(tokens) - 1)[0], other.state(len(tokens) - 1)[0])
    assert expert.n_outputs == [2, 1, 1, 1, 1, 1]
    expert.n_outputs.clear()
    bridge.sync(tokens)  # and what is known is not evaluated again
    bridge.sync([*tokens, 2, 3, 3])
    assert expert.n_outputs == [2]


GREEDY = {"temperature": 0.0, "max_tokens": 60}


def answers(tiny, expert, planner=None, **options) -> list[list[tuple]]:
    more = {"n_threads": 1, "n_ctx": 256, "bridge": True}
    with load(tiny["base"], expert, "margin", **more, **options) as pair:
        if planner is not None:
            pair.members[0].planner = planner
        schedule = "fast" if planner is not None or options.get("overlap") else "sequential"
        return [
            [
                (step.token, step.source)
                for step in pair.generate(
                    prompt, threshold=0.3, schedule=schedule, review=review, **GREEDY
                ).steps
            ]
            for prompt in ("hello", "another prompt of more tokens than a gap", "hello")
            for review in (None, 1.0)
        ]


@pytest.mark.parametrize("seed", range(2))
def test_real_models_bet_across_a_bridge(tiny, other, seed):
    assert answers(tiny, other, Bold(seed, 0.7, steady=True)) == answers(tiny, other)


@pytest.mark.parametrize("bets", [0.0, 0.7])
def test_an_expert_beside_the_base_catches_up_across_a_bridge(tiny, other, bets, monkeypatch):
    followed: list[array] = []
    follow = Background.follow

    def watched(background, tokens):
        followed.append(tokens)
        follow(background, tokens)

    monkeypatch.setattr(Background, "follow", watched)
    plain = answers(tiny, other)
    assert not followed
    assert answers(tiny, other, Bold(1, bets, steady=True), overlap=True) == plain
    assert len(max(followed, key=len)) > MIN_GAP


def test_it_follows_what_the_expert_will_hold(tiny, other):
    """What stands before the place that the next deferral asks at: none of that is dropped."""
    with load(
        other, tiny["expert"], "margin", n_threads=1, n_ctx=256, bridge=True, overlap=True
    ) as pair:
        tokens = pair.tokens_of("a prompt of many more tokens than a gap, and then a")
        member, background = pair.members[0], pair.expert
        assert isinstance(background, Background)
        member.follow(array("i", tokens))
        assert not background.session.created  # it was not called yet
        bridge = member.across(background)
        bridge.sync(array("i", tokens[:3]))
        member.follow(array("i", tokens))
        background.wait()
        held = background.session._held.tokens[:]
        assert len(held) > 3 + MIN_GAP
        bridge.sync(array("i", tokens))
        assert background.session._held.tokens[: len(held)] == held
        assert background.account.n_evaluated == len(background.session._held.tokens)  # once each
