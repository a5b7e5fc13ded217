"""A grammar over an expert that names few tokens, as behind a bridge, where tokens are taken back:
it is asked in the state of each token's own place."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from scripted import END, N_VOCAB, Scripted, decoder

from colm_edge.decode.doubt import Doubt
from colm_edge.decode.fresh import Fresh
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.errors import ColmError
from colm_edge.llama.sampling import ChainSampler
from colm_edge.options import Options

N = 8
PROMPT = [7]
# 1 3, 2 3 or 2 4: what may follow what was written.
MAY_FOLLOW = {(): {1, 2}, (1,): {3}, (2,): {3, 4}, (1, 3): {END}, (2, 3): {END}, (2, 4): {END}}


class Rules:
    def __init__(self, written=()):
        self.written = written

    def allows(self, token):
        return token in MAY_FOLLOW.get(self.written, ())

    def accept(self, token):
        if not self.allows(token):
            raise ColmError("not allowed")
        if token != END:
            self.written = (*self.written, token)

    def copy(self):
        return Rules(self.written)

    def mask(self, candidates):
        for i in range(candidates.size):
            if not self.allows(candidates.data[i].id):
                candidates.data[i].logit = -math.inf


class Says(Scripted):
    """Has the logits that a function gives of what was written."""

    def __init__(self, logits):
        super().__init__(lambda prefix: END, n_vocab=N)
        self.logits = logits

    def state(self, i):
        written = tuple(self.held[len(PROMPT) : i + 1])
        return self.logits(written), np.array([i + 1], np.float32)


def few(**logits):
    """Return the logits of a bridge: -inf for all that the expert does not name."""
    row = np.full(N, -math.inf, np.float32)
    for name, logit in logits.items():
        row[int(name[1:])] = logit
    return row


def base(written):
    likeliest = {(): 1, (1,): 3, (2,): 3}.get(written, END)
    return np.where(np.arange(N) == likeliest, 4.0, -4.0).astype(np.float32)


def loop(expert, schedule, p_defer):
    sampler = Fresh(ChainSampler(Options(temperature=0.0), N, PROMPT, [], Rules()), Random(0))

    def read(logits, hidden):
        return p_defer, int(logits.argmax()), float(np.log(np.exp(logits).sum())), 0

    return decoder(
        Says(base), Says(expert), read, PROMPT,
        n_choose=N, sampler=sampler, schedule=schedule, max_tokens=6,
    )  # fmt: skip


def written(loop):
    return [(step.token, step.source) for step in loop]


def own_way(written):
    """The expert writes 2 4."""
    return {(): few(t2=0.0), (1,): few(t3=0.0), (2,): few(t4=0.0)}.get(written, few(t0=0.0))


def nothing_allowed(written):
    """What the expert names may follow the base's token, and not stand in its place."""
    return few(t3=0.0)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_review_without_tolerance_writes_the_experts_own_text(window):
    reviewed = loop(own_way, Review(ByRule(Tolerance(0.0)), window), 0.1)
    assert [token for token, _ in written(reviewed)] == [2, 4]


@pytest.mark.parametrize("window", [1, 2])
def test_review_keeps_what_the_expert_has_no_word_for(window):
    reviewed = loop(nothing_allowed, Review(ByRule(Tolerance(0.0)), window), 0.1)
    assert written(reviewed)[0] == (1, "base")


def test_doubt_lets_the_expert_write_what_may_stand_in_its_place():
    doubted = loop(own_way, Doubt(0.5, 4), 0.9)
    assert written(doubted) == [(2, "expert"), (4, "expert")]
    assert doubted.stats.expert_failures == 0


def test_doubt_lets_the_base_write_where_the_expert_names_nothing_allowed():
    doubted = loop(nothing_allowed, Doubt(0.5, 4), 0.9)
    assert written(doubted)[0] == (1, "base")
    assert doubted.stats.expert_failures > 0


def test_a_withdrawn_token_has_a_finite_regret():
    """Although the expert names six tokens, and gives all others no probability."""

    def drawn(written, n_named):
        draw = np.random.default_rng([n_named, *written])
        row = np.full(N_VOCAB, -math.inf, np.float32)
        row[draw.choice(N_VOCAB, n_named, replace=False)] = draw.normal(size=n_named)
        return row

    def read(logits, hidden):
        p_defer = 0.9 if int(hidden[0]) % 3 == 0 else 0.1
        return p_defer, int(logits.argmax()), float(np.log(np.exp(logits).sum())), 0

    undone = []
    for seed in range(20):
        base, expert = (
            Says(lambda written, n=n, seed=seed: drawn((seed, *written), n)) for n in (N_VOCAB, 6)
        )
        doubted = decoder(base, expert, read, PROMPT, schedule=Doubt(0.5, 4), max_tokens=30)
        list(doubted.events())
        undone += doubted.undone
    assert undone
    assert all(math.isfinite(one.regret) for one in undone)
