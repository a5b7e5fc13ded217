"""Guesses from the text itself: they are what stood there before, and never change an answer."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_edge.decode import guess
from colm_edge.decode.guess import LENGTHS, MOST, Guessing, Lookup
from colm_edge.llama.costs import CostTable
from colm_edge.options import Options

FREE = CostTable((1, 64), (0.03, 0.031))  # a batch costs hardly more than a token
DEAR = CostTable((1, 64), (0.03, 1.92))
texts = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda ids: array("i", ids))


def guessed(text: array[int], table: CostTable = FREE) -> array[int]:
    lookup = Lookup()
    for n in range(1, len(text) + 1):
        lookup.follow(text[:n])
    return lookup.guess(100, table)


@given(texts)
def test_a_guess_followed_the_same_tokens_before(text):
    found = guessed(text)
    assert len(found) <= MOST
    if found:
        n = min(LENGTHS)
        whole = [*text[-n:], *found]
        assert any(list(text[i : i + len(whole)]) == whole for i in range(len(text) - n))


@given(texts, texts, st.integers(0, 60))
def test_what_is_taken_back_leaves_no_trace_in_the_text(text, other, keep):
    """After a rollback a guess still is what stands in the text by now."""
    lookup = Lookup()
    lookup.follow(text)
    changed = text[:keep] + other
    lookup.follow(changed)
    found = lookup.guess(100, FREE)
    if found:
        n = min(LENGTHS)
        whole = [*changed[-n:], *found]
        assert any(list(changed[i : i + len(whole)]) == whole for i in range(len(changed) - n))


def test_a_text_that_repeats_itself_is_guessed_on_and_on():
    period = array("i", range(20))
    assert guessed(period + period[:3]) == period[3 : 3 + len(guessed(period + period[:3]))]
    long = guessed(period * 3 + period[:3])
    assert len(long) == MOST
    assert long == (period + period)[3 : 3 + MOST]


def test_nothing_is_guessed_where_a_batch_is_dear_or_guesses_fail():
    period = array("i", range(20))
    assert not guessed(period * 3 + period[:3], DEAR)
    lookup, text = Lookup(), array("i", [])
    for i in range(200):  # two tokens recur; what follows them never does
        text.extend([1, 2, 10 + i])
        lookup.follow(text)
    text.extend([1, 2])
    lookup.follow(text)
    assert not lookup.guess(100, CostTable((1, 64), (0.03, 0.6)))


@pytest.fixture
def guesses(monkeypatch):
    """Let tiny models guess, as if a batch cost them next to nothing; return the timelines."""
    made: list[Guessing] = []

    class Kept(Guessing):
        def __init__(self, session, costs):
            super().__init__(session, lambda: FREE)
            made.append(self)

    monkeypatch.setattr(guess, "Guessing", Kept)
    return made


PROMPT = "one two three one two three one two three one two"
WAYS = {
    "greedy": {"temperature": 0.0, "defer_rate": 0.2},
    "sampled": {"seed": 1, "defer_rate": 0.2},
    "compose": {"seed": 5, "strategy": "compose", "threshold": 0.4},
    "review": {"temperature": 0.0, "defer_rate": 0.2, "review": 0.5, "review_window": 4},
    "floor": {"temperature": 0.0, "defer_rate": 0.2, "review": 0.5, "review_floor": 0.9},
    "lossless": {"temperature": 0.0, "defer_rate": 0.2, "review": 0.0},
    "doubt": {"temperature": 0.0, "defer_rate": 0.3, "doubt": 0.5},
    "base alone": {"temperature": 0.0, "threshold": 1.0},
    "expert alone": {"temperature": 0.0, "threshold": 0.0},
    "penalised": {"temperature": 0.0, "defer_rate": 0.2, "repeat_penalty": 1.2},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_that_without_guesses(tiny_pair, guesses, way):
    options = {**WAYS[way], "max_tokens": 60}
    plain = tiny_pair.generate(PROMPT, **options, schedule="sequential")
    assert not guesses
    answer = tiny_pair.generate(PROMPT, **options)
    assert [(s.token, s.source) for s in answer.steps] == [(s.token, s.source) for s in plain.steps]
    # A batch rounds otherwise than its tokens one by one.
    p = [s.p_defer for s in plain.steps]
    assert [s.p_defer for s in answer.steps] == pytest.approx(p, rel=1e-3, abs=1e-6)
    assert answer.text == plain.text
    (timeline,) = guesses
    assert timeline.n_guessed > 0


def test_right_guesses_save_calls(tiny_pair, guesses):
    """A model that repeats itself is called less often than it writes tokens."""
    answer = tiny_pair.generate("aaaaaaaaaaaaaaaa", temperature=0.0, threshold=0.0, max_tokens=80)
    assert answer.stats.n_generated == 80
    assert answer.stats.expert_calls < 80


def test_two_answers_by_turns_do_not_read_each_others_states(tiny_pair, guesses):
    options = Options(temperature=0.0, defer_rate=0.2, max_tokens=30)
    tokens = [tiny_pair.base.tokenize(text) for text in (PROMPT, "so so so so so so so")]
    alone = [[s.token for s in tiny_pair.stream_tokens(t, options)] for t in tokens]
    streams = [tiny_pair.stream_tokens(t, options) for t in tokens]
    written: list[list[int]] = [[], []]
    for _ in range(30):
        for own, stream in zip(written, streams, strict=True):
            own += [s.token for s in [next(stream, None)] if s is not None]
    assert written == alone
