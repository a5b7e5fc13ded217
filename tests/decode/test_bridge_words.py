"""An expert of another vocabulary that has no word for the base: the base goes on alone there."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scripted import Bold, reader
from spellings import MARK, SCHEDULES, Speaker, Spellings, vocabulary

from colm_edge.decode.bridge import Bridge
from colm_edge.decode.fast import Fast
from colm_edge.decode.loop import Decoder, ExpertAlone
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.decode.spelling import Crossing
from colm_edge.errors import AbsentExpertError


class Mute(Speaker):
    """Behind some prefixes it would write a control token that the base has no word for."""

    share = 0.5

    def is_mute(self, prefix) -> bool:
        return random.Random(str((self.seed, prefix))).random() < self.share

    def logits(self, prefix):
        found = super().logits(prefix)
        if self.is_mute(prefix):
            found[:] = -30.0
            found[self.words.control(MARK)] = 0.0
        return found


def bold() -> Bold:
    """Return a planner that bets at every deferral."""
    return Bold(0, 1.0, steady=True)


MUTE_SCHEDULES = {
    **SCHEDULES,
    "lossless": lambda: Review(ByRule(Tolerance(0.0)), 6),
    "alone": ExpertAlone,
    "fast": lambda: Fast([bold()]),
    "bets": lambda: Review(ByRule(Tolerance(0.0)), 6, planners=[bold()]),
}


@pytest.mark.parametrize("schedule", MUTE_SCHEDULES)
@pytest.mark.parametrize("seed", range(12))
def test_where_the_expert_has_no_word_for_the_base_the_base_writes(schedule, seed):
    """It does not end the answer; the schedules that write the expert's own text still do."""
    words = vocabulary(random.Random(seed), 10)
    prompt = [words.control(MARK), *words.encode(b"ab a")]

    def written(schedule, share, threshold=-1.0):
        base, expert = Speaker(words, seed), Mute(words, seed + 1)
        expert.share = share
        loop = Decoder(
            base, [Bridge(expert, Crossing(words, words))], Policy(reader(seed, 0.5)[0], threshold),
            Picker(words.n_vocab), prompt, end_tokens=frozenset(), max_tokens=25,
            schedule=MUTE_SCHEDULES[schedule](),
        )  # fmt: skip
        return [step.token for step in loop], loop, base, expert

    tokens, loop, base, _ = written(schedule, 1.0)
    assert loop.stats.expert_failures > 0
    assert {step.source for step in loop.read_prompt()} == {"base"}
    alone = [int(base.logits((*prompt, *tokens[:i])).argmax()) for i in range(25)]
    assert tokens == alone
    if schedule in ("review", "doubt"):  # they mix both, as they are made for
        return
    tokens, _, base, expert = written(schedule, 0.5)
    for i, token in enumerate(tokens):
        prefix = (*prompt, *tokens[:i])
        writer = base if expert.is_mute(prefix) else expert
        assert token == int(writer.logits(prefix).argmax())
    if schedule in ("fast", "bets"):
        twin = {"fast": "sequential", "bets": "lossless"}[schedule]
        assert written(schedule, 0.5, 0.5)[0] == written(twin, 0.5, 0.5)[0]


def test_bytes_that_the_expert_would_not_go_on_from_do_not_end_the_answer():
    """It knows one spelling of what is there, and finds that one unlikely."""
    ours, theirs = Spellings([b"a", b"b"]), Spellings([b"a", b"b", b"ab", b"aa"])
    expert = Speaker(theirs, 1)

    def logits(prefix):
        found = np.full(theirs.n_vocab, -40.0, np.float32)
        found[theirs.first(b"b")] = 0.0
        return found

    expert.logits = logits
    bridge = Bridge(expert, Crossing(ours, theirs))
    mark, a, b = ours.control(MARK), ours.first(b"a"), ours.first(b"b")
    tokens = [mark, a, b]  # "ab" is one token of its own, and "a" is in the middle of it
    bridge.sync(tokens, [1, 2])
    with pytest.raises(AbsentExpertError, match="no token for what the expert would write"):
        bridge.state(1)


def test_a_text_that_is_nothing_in_the_experts_tokens_is_the_bases_alone():
    ours = Spellings([b"a", b"b"], begin=True)
    theirs = Spellings([b"a", b"b"])
    base, bridge = Speaker(ours, 1), Bridge(Speaker(theirs, 2), Crossing(ours, theirs))
    with pytest.raises(AbsentExpertError, match="empty in the expert's tokens"):
        bridge.sync([ours.begin])
    policy = Policy(reader(1, 1.0)[0], 0.5)
    loop = Decoder(
        base, [bridge], policy, Picker(ours.n_vocab), [ours.begin], end_tokens=frozenset(),
        max_tokens=5,
    )  # fmt: skip
    assert [step.source for step in loop] == ["base", *["expert"] * 4]
