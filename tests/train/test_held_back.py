"""Which lines are held back: by what they say, with a seed, and answers to one prompt together."""

from __future__ import annotations

import numpy as np
import pytest

from colm_edge.errors import DataError
from colm_edge.train.documents import held_back_lines, tokenized


def test_a_document_stays_on_its_side_when_others_are_added(tiny_pair):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(200)]
    some = held_back_lines(tokenized(list(enumerate(rows))[:100], tiny_pair), 0)
    more = held_back_lines(tokenized(list(enumerate(rows)), tiny_pair), 0)
    assert len(some) == 20
    assert len(more) == 40
    assert len(some & more) >= 15  # those at the border may cross it


def test_other_seeds_hold_back_other_lines(tiny_pair):
    rows = [(i, {"prompt": f"p{i}", "completion": f"c{i}"}) for i in range(300)]
    documents = tokenized(rows, tiny_pair)
    sides = [held_back_lines(documents, seed) for seed in range(12)]
    shared = [len(one & other) / 60 for i, one in enumerate(sides) for other in sides[:i]]
    assert all(len(side) == 60 for side in sides)
    assert np.mean(shared) == pytest.approx(0.2, abs=0.03)
    assert max(shared) < 0.45


def test_answers_to_one_prompt_are_on_one_side(tiny_pair):
    rows = [{"prompt": f"p{i % 50}", "completion": f"c{i}"} for i in range(200)]
    held_back = held_back_lines(tokenized(list(enumerate(rows)), tiny_pair), 0)
    assert len(held_back) == 40
    assert all((i % 50 in held_back) == (i in held_back) for i in range(200))


def test_a_prompt_with_most_of_the_lines_is_fitted_to(tiny_pair):
    rows = [(i, {"prompt": f"p{max(0, i - 94)}", "completion": f"c{i}"}) for i in range(100)]
    for seed in range(12):
        held_back = held_back_lines(tokenized(rows, tiny_pair), seed)
        assert 1 <= len(held_back) <= 20


def test_equal_lines_cannot_be_split(tiny_pair):
    rows = [(i, {"prompt": "p", "completion": "c"}) for i in range(20)]
    with pytest.raises(DataError, match="1 line; expected at least 5 different ones"):
        held_back_lines(tokenized(rows, tiny_pair), 0)


def test_a_prompt_stays_on_its_side_when_its_answer_changes(tiny_pair):
    sides = [
        held_back_lines(
            tokenized([(i, {"prompt": f"p{i}", "completion": c}) for i in range(50)], tiny_pair), 3
        )
        for c in ("one", "another")
    ]
    assert sides[0] == sides[1]


def test_answers_to_a_single_prompt_are_split(tiny_pair):
    rows = [(i, {"prompt": "p", "completion": f"c{i}"}) for i in range(20)]
    assert len(held_back_lines(tokenized(rows, tiny_pair), 0)) == 4
