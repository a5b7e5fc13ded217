"""The likeliest tokens, against a plain sort."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_edge.decode import picker
from colm_edge.decode.picker import Picker, likeliest
from colm_edge.decode.review import Verdict
from colm_edge.llama.sampling import ChainSampler
from colm_edge.options import Options


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 60),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    n=st.integers(1, 12),
    holes=st.integers(0, 60),
    columns=st.sampled_from([4, 7, 2048]),
)
def test_the_likeliest_are_those_of_a_plain_sort(seed, size, spread, n, holes, columns):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.normal(size=size)).round(1).astype(np.float32)
    logits[: min(holes, size - 1)] = -np.inf
    order = sorted(range(size), key=lambda i: (-logits[i], i))
    expected = [(i, float(logits[i]) - 0.5) for i in order[:n] if logits[i] > -math.inf]
    with patch.object(picker, "COLUMNS", columns):
        found = likeliest(logits, 0.5, n)
    assert [logprob for _, logprob in found] == [logprob for _, logprob in expected]
    if len(set(logits.tolist())) == size:  # of equal ones any may be the last
        assert [i for i, _ in found] == [i for i, _ in expected]


def test_what_cannot_be_is_told_in_numbers_that_json_has():
    """A bridge leaves out what the expert has no word for."""
    logits = np.array([0.0, -np.inf], np.float32)
    step = Picker(2).tell(1, "expert", 0.5, logits, 0.0)
    verdict = Verdict(1, logits, 0, 0.0)
    assert (step.logprob, verdict.regret) == (-9999, 9999)


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1.0])
def test_a_tiny_temperature_draws_what_is_likeliest(temperature):
    """By which logits are divided until they are infinite."""
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    ids, p = ChainSampler(Options(temperature=temperature, seed=1), 3).probabilities(logits)
    assert p.sum() == pytest.approx(1)
    assert ids[p.argmax()] == 1
    assert (p.max() == 1) == (temperature < 1)


@pytest.mark.parametrize("of_base", [True, False])
def test_the_defer_row_is_never_written(of_base):
    """Nor by an expert whose vocabulary is padded to that id."""
    logits = np.array([1.0, 3.0, 2.0, 0.0], np.float32)
    logits[3] = 9.0
    choice, logsumexp = Picker(4, None, defer_row=3).read(5, logits, of_base=of_base)
    assert choice == 1
    assert logsumexp == pytest.approx(np.log(np.exp(logits[:3]).sum()))
    assert Picker(4, None, defer_row=9).read(5, logits, of_base=of_base)[0] == 3
    assert picker.mixture(logits, logits, 0.5, 4, 3).argmax() == 1
