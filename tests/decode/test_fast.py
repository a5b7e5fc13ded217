"""The fast schedule writes the same text as the sequential one, whatever its planner decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    FLAT,
    N_VOCAB,
    Bold,
    Eager,
    Scripted,
    Sometimes,
    agreeing,
    decoder,
    reader,
    writer,
)

from colm_edge import team
from colm_edge.bench.replay import Process, replay
from colm_edge.decode.fast import Fast
from colm_edge.decode.planner import Planner
from colm_edge.errors import ModelError
from colm_edge.llama.costs import CostTable
from colm_edge.llama.sampling import ChainSampler
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.team import Member

STEEP = CostTable((1, 64), (1.0, 64.0))


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(0, 1),
    agree=st.floats(0, 1),
    threshold=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    n_prompt=st.integers(1, 20),
    n_ctx=st.integers(20, 90),
    max_tokens=st.integers(-1, 60),
    end_every=st.sampled_from([0, 5, 20]),
    bets=st.floats(0, 1),
    sampled=st.booleans(),
    compose=st.booleans(),
)
def test_bets_never_change_the_text(
    seed,
    rate,
    agree,
    threshold,
    n_prompt,
    n_ctx,
    max_tokens,
    end_every,
    bets,
    sampled,
    compose,
):
    base_choose = writer(seed, end_every)
    expert_choose = agreeing(seed + 1, base_choose, agree)
    read, _ = reader(seed, rate)
    prompt = [1 + i % (N_VOCAB - 1) for i in range(n_prompt)]

    def answer(schedule=None):
        run = decoder(
            Scripted(base_choose, n_ctx),
            Scripted(expert_choose, n_ctx),
            read,
            prompt,
            threshold=threshold,
            max_tokens=max_tokens,
            compose=compose,
            schedule=schedule,
            sampler=Sometimes(seed) if sampled else None,
        )
        steps = list(run)
        assert list(run.tokens) == prompt + [step.token for step in steps]
        assert run.stats.n_deferred == sum(step.source == "expert" for step in steps)
        return steps, run.finish_reason

    assert answer(Fast([Bold(seed, bets)])) == answer()


def fast(base, expert, read, planner, **kwargs):
    return decoder(base, expert, read, [1, 2, 3], schedule=Fast([planner]), **kwargs)


def test_without_a_bet_both_evaluate_what_the_sequential_loop_does():
    read, _ = reader(3, 0.4)
    sessions = [(Scripted(writer(1)), Scripted(writer(2))) for _ in range(2)]
    list(fast(*sessions[0], read, Bold(0, 0.0), max_tokens=40))
    list(decoder(*sessions[1], read, [1, 2, 3], max_tokens=40))
    for ours, theirs in zip(*sessions, strict=True):
        assert ours.batches == theirs.batches


@pytest.mark.parametrize("compose", [False, True])
def test_a_deferral_after_a_repeated_choice_needs_no_call(compose):
    """The expert has evaluated that choice in the previous batch: it is called once for two
    deferrals in a row, and every token is evaluated once."""

    choose = writer(1)
    base, expert = Scripted(choose, 200), Scripted(choose, 200)
    read = lambda logits, hidden: (0.9, int(logits.argmax()), 0.0, 0)  # noqa: E731
    run = fast(base, expert, read, Eager(), max_tokens=100, compose=compose)
    assert {s.source for s in run} == {"expert"}
    assert run.stats.expert_calls == expert.account.n_calls == 50
    assert expert.account.n_evaluated == 3 + 99


def test_the_cost_of_several_outputs_counts():
    def planner(more):
        expert = CostTable((1, 64), (1.0, 1.1), (more,))
        found = Planner(lambda cancel: (CostTable((1, 64), (0.1, 6.4)), expert))
        found.prepare()
        for i in range(100):
            found.saw_agreement(0.9, True)
            found.saw_deferral(i % 3 < 2, i % 3 > 0)  # in pairs
        return found

    assert planner(0.0).saves(0.9, 4) > 0
    assert planner(9.0).saves(0.9, 4) == 0


@pytest.mark.parametrize("tables", [(STEEP, STEEP), (STEEP, FLAT), (FLAT, FLAT)])
def test_a_planner_that_never_agreed_does_not_bet(tables):
    planner = Planner(lambda cancel: tables)
    planner.prepare()
    for _ in range(200):
        planner.saw_agreement(0.4, False)
        planner.saw_deferral(True, False)
        planner.saw_deferral(False, True)
    assert planner.saves(planner.agrees(0.4), 2) == 0


def test_a_planner_bets_where_it_pays():
    planner = Planner(lambda cancel: (CostTable((1, 64), (0.1, 6.4)), FLAT))
    assert planner.saves(1.0, 5) == 0  # nothing measured yet
    planner.prepare()
    for _ in range(300):
        planner.saw_agreement(0.9, True)
        planner.saw_agreement(0.1, False)
        planner.saw_deferral(True, False)
        planner.saw_deferral(True, True)
        planner.saw_deferral(False, True)
        planner.saw_deferral(False, False)
    assert planner.agrees(0.9) > 0.8
    assert planner.agrees(0.1) < 0.2
    assert planner.saves(planner.agrees(0.9), 4) > 0
    # If the expert's state is already known, the longer batch is one call more.
    assert planner.saves(planner.agrees(0.9), 0) == 0
    # If costs are proportional to the size, a longer batch saves nothing.
    proportional = Planner(lambda cancel: (FLAT, STEEP))
    proportional.prepare()
    assert proportional.saves(1.0, 5) == 0


# Milliseconds of decodes of a small and a larger model: CPUs whose larger batches are hardly
# cheaper, are cheaper at multiples of four, or cost the same for two tokens as for five; and a GPU.
BASE = CostTable((1, 2, 4, 8, 16, 32), (6.2, 9, 12.5, 20, 32, 60))
SIZES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 32)
MACHINES = {
    "steep": (BASE, CostTable(SIZES, (22, 38, 50, 55, 67, 80, 85, 110, 130, 250))),
    "fours": (BASE, CostTable(SIZES, (19, 30, 40, 28, 41, 63, 57, 73, 78, 158))),
    "amx": (
        CostTable((1, 2, 5, 8, 16, 32), (7, 10, 12, 15, 20, 34)),
        CostTable((1, 2, 5, 8, 16, 32, 33, 64), (30, 53, 58, 71, 93, 155, 255, 315), (3.5,)),
    ),
    "gpu": (CostTable((1, 64), (2, 2.6)), CostTable((1, 8, 64), (10, 10.5, 13))),
}  # fmt: skip


class Priced(Scripted):
    """A scripted session with a table of costs. cuts: whether the table also cuts its batches."""

    def __init__(self, table: CostTable, cuts: bool) -> None:
        super().__init__(lambda prefix: 1, n_ctx=10**6)
        self.table, self.cuts, self.cost = table, cuts, 0.0

    def sync(self, tokens, outputs=(), cancel=None):
        n = super().sync(tokens, outputs)
        pieces = self.table.chunks(n, n + 64, whole=len(outputs) > 1) if self.cuts else [(n, n)]
        self.cost += sum(self.table(size) for _, size in pieces if n)
        self.cost += self.table.outputs(len(outputs)) if outputs else 0.0
        return n


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("agree", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("rate", "run"), [(0.05, 0), (0.2, 0), (0.4, 0), (0.2, 3), (0.8, 0)])
def test_the_fast_schedule_never_costs_more(machine, rate, agree, run):
    """By the costs in a table, not by time, and with learning: at most 2 % more, and less where
    the expert often agrees and tokens are often deferred."""
    tables = MACHINES[machine]
    read = lambda logits, hidden: (0.0, 1, 0.0, 0)  # noqa: E731

    def cost(seed, schedule=None):
        trace = Process(rate, agree, run).draw(256, N_VOCAB, seed)
        base, expert = Priced(tables[0], False), Priced(tables[1], schedule is not None)
        written = replay(base, expert, read, trace, 0.5, N_VOCAB, schedule)
        assert [step.token for step in written] == trace.tokens
        return base.cost + expert.cost

    seeds = range(10 if rate == 0.05 else 5)  # enough deferrals to average out luck
    fast = sum(cost(seed, Fast([Planner(lambda cancel: tables)])) for seed in seeds)
    plain = sum(cost(seed) for seed in seeds)
    assert fast <= 1.02 * plain
    if agree == 0.9 and rate >= 0.4 and machine in ("fours", "gpu"):
        assert fast < 0.95 * plain


def test_models_too_quick_for_planning_use_the_sequential_schedule():
    read, _ = reader(3, 0.4)
    quick = CostTable((1, 64), (1e-4, 1e-4))
    planner = Planner(lambda cancel: (quick, quick))
    sessions = [(Scripted(writer(1)), Scripted(writer(1))) for _ in range(2)]
    list(fast(*sessions[0], read, planner, max_tokens=40))
    list(decoder(*sessions[1], read, [1, 2, 3], max_tokens=40))
    assert planner.rests
    for ours, theirs in zip(*sessions, strict=True):
        assert ours.batches == theirs.batches


def test_an_answer_abandoned_after_a_bet_leaves_the_sessions_usable():
    read, _ = reader(5, 0.6)
    base, expert = Scripted(writer(1)), Scripted(writer(2))
    planner = Bold(1, 0.8)
    whole = [s.token for s in fast(base, expert, read, planner, max_tokens=20)]
    for n in range(1, 6):
        partial = fast(base, expert, read, planner, max_tokens=20)
        for _ in range(n):
            next(partial)
    assert [s.token for s in fast(base, expert, read, planner, max_tokens=20)] == whole


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.9, "repeat_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ],
)
@pytest.mark.parametrize("threshold", [1e-9, 0.3, 0.6])
def test_real_models_write_the_same_text(tiny, threshold, sampling):
    """Tiny float32 models with clear choices, so that near-ties are rare. A model with itself wins
    bets; with another model it loses them."""
    for expert in ("base", "expert"):
        with load(tiny["base"], tiny[expert], "margin", n_threads=1, n_ctx=256) as pair:
            options = {"temperature": 0.0, "seed": 5, "threshold": threshold, "max_tokens": 60}
            options |= sampling
            plain = pair.generate("hello", schedule="sequential", **options)
            for seed in range(3):
                pair.members[0].planner = Bold(seed, 0.7)
                answer = pair.generate("hello", **options)
                assert [(s.token, s.source) for s in answer.steps] == [
                    (s.token, s.source) for s in plain.steps
                ]
                assert [s.p_defer for s in answer.steps] == pytest.approx(
                    [s.p_defer for s in plain.steps], abs=1e-3
                )
                if threshold < 0.6 and expert == "base":
                    assert answer.stats.expert_calls < plain.stats.expert_calls


def test_stop_strings_and_bets(tiny):
    """A stop string ends the answer at the same place in both schedules."""
    with load(tiny["base"], tiny["base"], "margin", n_threads=1, n_ctx=256) as pair:
        options = {"temperature": 0.0, "threshold": 0.3, "max_tokens": 60}
        text = pair.generate("hello", schedule="sequential", **options).text
        for at in (5, 12, 30):
            options["stop"] = text[at : at + 2]
            plain = pair.generate("hello", schedule="sequential", **options)
            pair.members[0].planner = Bold(at, 0.9)
            answer = pair.generate("hello", **options)
            assert answer.text == plain.text == text[: text.index(options["stop"])]
            assert answer.stats.n_generated == plain.stats.n_generated
            assert answer.finish_reason == plain.finish_reason == "stop"


def test_a_sampler_and_its_copy_make_the_same_picks(tiny_pair):
    logits = tiny_pair.base_session
    logits.sync([1, 2, 3])
    row = logits.logits.copy()
    sampler = ChainSampler(Options(seed=3, repeat_penalty=1.3), len(row), [5, 6])
    for _ in range(5):
        sampler(row)
    twin = sampler.copy()
    assert [sampler(row) for _ in range(20)] == [twin(row) for _ in range(20)]


GREEDY = {"temperature": 0.0, "max_tokens": 40}
TABLE = CostTable((1, 2, 3, 4, 64), (1.0, 9.0, 9.0, 2.0, 60.0))  # four cost less than two


def test_only_the_fast_schedule_cuts_batches_by_their_costs(tiny, monkeypatch):
    monkeypatch.setattr(Member, "cost_tables", lambda member, **_: (TABLE, TABLE))
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        evaluated = []
        for schedule in ("sequential", "fast", "sequential", "fast"):
            pair.expert_session.forget()
            answer = pair.generate("hello", threshold=0.3, schedule=schedule, **GREEDY)
            evaluated.append(answer.stats.expert_tokens)
    assert evaluated[0] == evaluated[2] < evaluated[1]  # batches of two and three are padded
    assert evaluated[3] >= evaluated[2]


def test_what_cannot_be_measured_is_done_without(tiny, monkeypatch):
    """An answer does not fail because there is no memory for a measurement."""

    def refused(session, **_):
        raise ModelError("no memory for another context")

    notes = []
    with load(tiny["base"], tiny["expert"], n_threads=1, note=notes.append) as pair:
        whole = pair.generate("hello", schedule="sequential", threshold=0.3, **GREEDY)
        monkeypatch.setattr(team, "cost_table", refused)
        answer = pair.generate("hello", schedule="fast", threshold=0.3, **GREEDY)
    assert answer.text == whole.text
    assert notes == ["the fast schedule works without bets: no memory for another context"]
