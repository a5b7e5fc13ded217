"""What decodes cost: the table, and how it cuts tokens into batches."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_edge.cancel import Cancel, CancelledError
from colm_edge.llama import measure as costs
from colm_edge.llama.context import Context, ContextOptions
from colm_edge.llama.costs import CostTable, break_even, seconds_per_token, slowness_note
from colm_edge.llama.measure import cost_table, kept_table, refine
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session

# As on a CPU whose kernels are fast for multiples of four, in milliseconds.
FOURS = CostTable((1, 2, 3, 4, 5, 7, 8, 12, 16), (19.3, 29.9, 40.4, 28.2, 40.7, 63.5, 56.6, 73, 78))


def test_costs_between_and_beyond_the_measured_sizes():
    table = CostTable((1, 2, 4, 10), (1.0, 1.5, 2.0, 6.0))
    assert [table(n) for n in (1, 2, 4, 10, 20)] == [1.0, 1.5, 2.0, 6.0, 12.0]
    assert table(7) == 4.0
    assert CostTable((1, 4), (1.0, 4.0))(3) == 3.0


def test_a_size_that_was_not_measured_costs_its_blocks_and_its_single_tokens():
    """Measured on a Zen 4: 13, 14 and 15 tokens took 4.75, 5.39 and 6.14 times one, and 16 took
    4.15; the interpolated costs, 4.05 to 4.12, would not have padded any of them."""
    table = CostTable((1, 2, 4, 5, 8, 12, 16), (1.0, 1.7, 1.63, 2.34, 2.83, 4.02, 4.15))
    for n, taken in ((3, 2.38), (6, 3.03), (7, 3.72), (13, 4.75), (14, 5.39), (15, 6.14)):
        assert table(n) == pytest.approx(taken, rel=0.02)
    assert [table.chunks(n, 100, whole=True)[0][1] for n in (3, 13, 14, 15)] == [4, 16, 16, 16]
    assert table.chunks(15, 15, whole=True) == [(15, 15)]  # no room left


def test_more_outputs_never_cost_less():
    """Both were measured, and the larger batch happened to seem cheaper."""
    table = CostTable((1, 4, 16), (1.0, 2.0, 5.0), (0.02, 0.0))
    costs = [table.outputs(n) for n in range(1, 200)]
    assert costs == sorted(costs)
    assert costs[0] == 0.0
    assert costs[-1] == 0.02


def test_padding_is_weighed_with_its_outputs_where_they_are_computed_too():
    table = CostTable((1, 2, 3, 4), (1.0, 1.7, 2.4, 1.63), (3.0,))
    assert table.padded(3, 8) == 4
    assert table.padded(3, 8, all_states=True) == 3


def test_a_batch_is_padded_if_a_larger_one_costs_less():
    assert FOURS.chunks(3, 100) == [(3, 4)]
    assert FOURS.chunks(3, 3) == [(3, 3)]  # no room left
    assert FOURS.chunks(7, 100, whole=True) == [(7, 8)]
    assert FOURS.chunks(7, 100) in ([(7, 8)], [(4, 4), (3, 4)])
    assert FOURS.chunks(500, 512) == [(500, 500)]


@given(
    seconds=st.lists(st.floats(0.1, 100), min_size=6, max_size=6),
    n=st.integers(1, 40),
    room=st.integers(40, 60),
    whole=st.booleans(),
)
def test_pieces_add_up_and_cost_no_more_than_one(seconds, n, room, whole):
    table = CostTable((1, 2, 4, 8, 16, 32), tuple(seconds))
    pieces = table.chunks(n, room, whole=whole)
    assert sum(size for size, _ in pieces) == n
    assert all(size <= padded for size, padded in pieces)
    done = 0
    for size, padded in pieces:
        assert done + padded <= room
        done += size
    if whole:
        assert len(pieces) == 1
    cost = sum(table(padded) for _, padded in pieces)
    assert cost <= table(n) * (1 + 1e-9)
    if n <= 32:
        assert table.best(n) <= table(n) * (1 + 1e-9)


@pytest.fixture
def session(tiny):
    model = Model(tiny["base"])
    session = Session(model, ContextOptions(n_ctx=128, n_threads=1, n_batch=64))
    yield session
    session.close()
    model.close()


@pytest.mark.parametrize("hidden", [True, False])
def test_cut_and_padded_batches_do_not_change_a_state(tiny, session, hidden):
    """Random walks through prefixes, with and without a table that cuts and pads batches."""
    odd = CostTable((1, 2, 3, 4, 6, 8, 64), (1.0, 9.0, 5.0, 2.0, 9.0, 3.0, 60.0))
    other = Session(session.model, session.options, hidden=hidden)
    session.want_hidden(hidden)
    session.costs, draw, tokens = odd, random.Random(4), [3]
    filled = 0
    for _ in range(60):
        tokens = tokens[: draw.randint(1, len(tokens))]
        tokens += [draw.randrange(1, 400) for _ in range(draw.randint(0, 12))]
        tokens = tokens[:128]
        n = draw.randint(1, min(len(tokens), 10))
        outputs = sorted(draw.sample(range(len(tokens) - n, len(tokens)), draw.randint(1, n)))
        outputs = [*outputs, len(tokens) - 1] if outputs[-1] < len(tokens) - 1 else outputs
        if draw.random() < 0.5:
            outputs = []
        filled += session.sync(tokens, outputs) - other.sync(tokens, outputs)
        for i in outputs or [len(tokens) - 1]:
            for ours, theirs in zip(session.state(i), other.state(i), strict=True):
                assert np.allclose(ours, theirs, atol=2e-2)
    assert filled > 0
    other.close()


def test_more_outputs_than_a_batch_are_refused(session):
    with pytest.raises(ValueError, match="65 outputs, but a batch of at most 64"):
        session.sync([1] * 70, range(5, 70))


def test_costs_are_measured_once_per_model_and_settings(tiny, session, tmp_path, monkeypatch):
    # Other tests may have measured a model of this content.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    assert kept_table(session) is None
    table = cost_table(session, note=said.append)
    assert table.sizes[0] == 1
    assert len(said) == 1
    assert "base.gguf" in said[0]
    assert not session.created  # its own timeline does not change
    assert cost_table(session, note=said.append).seconds == table.seconds
    assert kept_table(session).sizes == table.sizes
    assert kept_table(session).more == table.more
    assert len(table.more) == 2
    assert min(table.more) >= 0
    assert len(said) == 1
    other = Session(session.model, ContextOptions(n_ctx=128, n_threads=2, n_batch=64))
    assert kept_table(other) is None
    file = costs._cache_file(session)
    file.write_text("{")
    assert kept_table(session) is None
    cost_table(session, note=said.append)
    assert json.loads(file.read_text())["sizes"] == list(table.sizes)
    assert len(said) == 2


def test_a_slow_model_is_measured_in_bounded_time(session):
    assert costs.measure(session, seconds=0.0)[0].sizes == (1,)


def test_in_a_hurry_a_rough_picture_comes_first(session, monkeypatch):
    """Every decode takes a tenth of a second of a made-up clock: sizes from 1 to 16 are known when
    a rising order would have come to 6."""
    clock = [0.0]
    monkeypatch.setattr(costs, "perf_counter", lambda: clock[0])
    decode = Context.decode

    def slow(context, n, *, hidden=False):
        clock[0] += 0.1
        decode(context, n, hidden=hidden)

    monkeypatch.setattr(Context, "decode", slow)
    monkeypatch.setattr(costs, "LONG", 0.0)
    assert costs.measure(session, seconds=costs.HASTY)[0].sizes == (1, 4, 16)
    assert costs.measure(session, seconds=0.85)[0].sizes == (1, 2, 4, 8, 16)


def test_what_was_measured_in_a_hurry_is_measured_again_when_nobody_waits(
    session, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[float] = []
    measure = costs.measure
    monkeypatch.setattr(costs, "measure", lambda *a: (asked.append(a[2]), measure(*a))[1])
    assert not refine((session, None), Cancel())  # nothing was measured yet
    cost_table(session, hasty=True)
    cost_table(session, hasty=True)  # kept
    assert asked == [costs.HASTY]
    session.model.unload()
    assert not refine((session,), Cancel())  # it is not in memory any more
    session.open()
    assert refine((session, None), Cancel())
    assert asked == [costs.HASTY, costs.SECONDS]
    assert not refine((session,), Cancel())
    cost_table(session, hasty=True)
    cost_table(session)
    assert len(asked) == 2


def test_whoever_does_not_hurry_is_not_content_with_less(session, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    cost_table(session, hasty=True, note=said.append)
    cost_table(session, note=said.append)
    cost_table(session, note=said.append)
    assert len(said) == 2


def test_an_interrupted_measurement_leaves_the_hasty_table(session, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hasty = cost_table(session, hasty=True)
    session.open()
    cancel = Cancel()
    cancel.request()
    with pytest.raises(CancelledError):
        refine((session,), cancel)
    assert kept_table(session).seconds == hasty.seconds


def test_a_measurement_is_cancelled_between_two_decodes(session, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cancel, n_asked = Cancel(), []
    decode = Context.decode

    def asked(context, n, *, hidden=False):
        n_asked.append(n)
        if len(n_asked) == 4:
            cancel.request()
        decode(context, n, hidden=hidden)

    monkeypatch.setattr(Context, "decode", asked)
    with pytest.raises(CancelledError):
        cost_table(session, cancel=cancel)
    assert len(n_asked) <= 6  # those of one size are not interrupted
    assert kept_table(session) is None


def test_sizes_slower_than_a_larger_one_are_measured_again():
    times = {(n, False): [1.0 * n] for n in (1, 8, 17, 20, 24, 32, 64)}
    small = [(1, False), (8, False)]
    assert costs._again(times) == small
    times[24, False] = [40.0]  # more than 32 tokens took
    assert costs._again(times) == [*small, (24, False)]
    times[24, False] += [24.0]
    assert costs._again(times) == small
    assert costs._table(times)(24) == 24.0


def test_a_table_that_cannot_be_cached_is_still_measured(session, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cost_table(session).sizes[0] == 1


def test_a_predicted_speed_is_that_of_the_batches():
    base, expert = CostTable((1, 64), (1.0, 64.0)), CostTable((1, 64), (10.0, 640.0))
    assert seconds_per_token(base, [expert], 0.0) == 1.0
    for rate in (0.1, 0.5, 1.0):  # batches cost in proportion: every token, once, of both
        assert seconds_per_token(base, [expert], rate) == pytest.approx(11, rel=1e-3)
    flat = CostTable((1, 64), (10.0, 10.0))
    assert seconds_per_token(base, [flat], 0.2) == pytest.approx(1 + 0.2 * 10, rel=0.02)


def test_a_pair_pays_up_to_its_break_even():
    base, flat = CostTable((1, 64), (1.0, 64.0)), CostTable((1, 64), (10.0, 10.0))
    rate = break_even(base, flat)
    assert rate == pytest.approx(0.9, abs=0.02)
    assert seconds_per_token(base, [flat], rate - 0.01) < flat(1)
    assert seconds_per_token(base, [flat], rate + 0.01) > flat(1)
    assert break_even(flat, base) == 0.0
    assert break_even(CostTable((1,), (0.0,)), flat) is None


def test_a_pair_slower_than_its_expert_is_told_so():
    base, expert = CostTable((1, 64), (0.02, 0.1)), CostTable((1, 64), (0.03, 0.3))
    assert "tokens per second at 90% deferred, 33.3 alone" in slowness_note(base, expert, 0.9)
    assert slowness_note(base, expert, 0.01) == ""
    for unknown in ((None, expert, 0.9), (base, None, 0.9), (base, expert, None)):
        assert slowness_note(*unknown) == ""
