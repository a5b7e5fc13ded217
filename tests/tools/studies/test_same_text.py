"""The study of same texts in small: what must be equal is, and what differs is a near-tie."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from studies.same_text import Judge, Written, drawn, near, study

from colm_edge.pair import load


def test_requests_are_answered_alike_in_any_order_and_schedule(demo):
    """The demo pair, with a float cache, to the last bit. Shared batches are left to the study:
    what they write depends on which answers meet in one."""
    draw = random.Random(3)
    requests = [drawn(demo, draw, 24, demo.n_ctx) for _ in range(12)]
    found = dict(study(demo, requests, 0, lambda name: True))
    alone = [
        "sequential, in turn",
        "resumed from a prompt cache",
        "fast, in turn",
        "server, 1 slot",
    ]
    for way in (*alone, "seeds, 1 slot(s)"):
        assert found[way]["bits"] == found[way]["equal"] == 12
    slots = found["server, 4 slots"]
    assert slots["equal"] + slots["near-ties"] == 12


def test_a_quantised_cache_repeats_itself(tiny):
    """Rounding is larger, but the same each time."""
    settings = {"n_ctx": 512, "n_threads": 1, "n_ubatch": 32, "flash_attn": "on"}
    cache = {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    with load(tiny["template"], tiny["expert"], "margin", **settings, **cache) as pair:
        draw = random.Random(3)
        requests = [drawn(pair, draw, 16, 512) for _ in range(8)]
        found = dict(study(pair, requests, 0, lambda name: "in turn" in name or "cache" in name))
    assert [counts["bits"] for counts in found.values()] == [8, 8, 8]


def test_what_is_no_near_tie_is_a_fault(demo):
    """An answer with a token that nothing explains."""
    request = drawn(demo, random.Random(5), 24, demo.n_ctx)
    answer = Written(list(demo.stream_tokens(request.tokens, request.options)))
    judge = Judge(demo, [request], 0)
    last = answer.steps[-1]
    wrong = Written([*answer.steps[:-1], replace(last, token=(last.token + 7) % demo.n_shared)])
    assert not judge.is_near_tie(request, answer, wrong)
    assert not judge.is_near_tie(request, answer, Written(answer.steps[:-1]))


@pytest.mark.parametrize(
    ("values", "bound", "is_near"),
    [
        ([1.0, 1.1], 0.0, False),
        ([-0.1, 0.2], 0.0, True),
        ([0.2, 0.35], 0.0, True),
        ([2.0] * 3, 2, True),
    ],
)
def test_a_near_tie_is_measured_by_how_far_batches_move_it(values, bound, is_near):
    assert near(values, bound) is is_near
