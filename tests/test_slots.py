"""Several answers at once: the same texts as one after the other, in fewer batches."""

from __future__ import annotations

import threading
from array import array
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from lib.random_model import SHAPES, write_model

from colm_edge.errors import ColmError, ModelError
from colm_edge.llama.context import Context
from colm_edge.llama.costs import CostTable
from colm_edge.llama.held import common_prefix
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.slots import BusyError, SharedTimeline, Slots
from colm_edge.switch.file import Switch

PROMPTS = ["hello", "what is this about, and why", "one two three four five six seven", "so"]


@pytest.fixture(params=["margin", "hidden"])
def pair(request, tiny, tmp_path):
    switch = request.param
    if switch == "hidden":  # with hidden states, outputs need batches of their own
        weight = np.random.default_rng(2).normal(0, 0.3, (1, 64 + 8)).astype(np.float32)
        features = ("hidden", "entropy", "logp1", "margin", "p1", "p2", "p3", "p4", "p5")
        switch = str(tmp_path / "switch.gguf")
        Switch(features, weight, np.zeros(1, np.float32), 64).save(switch)
    files = tiny["base"], tiny["expert"], switch
    with load(*files, n_threads=1, n_ctx=128, n_ubatch=16) as pair:
        yield pair


def answer(pair, slots, prompt: str, options: Options):
    tokens = pair.base.tokenize(prompt)
    with slots.take(tokens) as timelines:
        stream = pair.stream_tokens(tokens, options, timelines)
        return [(step.token, step.source) for step in stream], stream.answer().stats


def together(pair, slots, prompts, options):
    results = [None] * len(prompts)
    begin = threading.Barrier(len(prompts))

    def work(i: int) -> None:
        begin.wait()
        results[i] = answer(pair, slots, prompts[i], options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize(
    ("schedule", "strategy"),
    [("sequential", "defer"), ("fast", "defer"), ("sequential", "compose")],
)
def test_answers_together_are_the_answers_alone(pair, schedule, strategy):
    options = Options(
        temperature=0.0,
        max_tokens=40,
        threshold=0.5 if pair.switch.needs_hidden else 0.4,
        schedule=schedule,
        strategy=strategy,
    )
    alone = []
    for prompt in PROMPTS:
        stream = pair.stream_tokens(pair.base.tokenize(prompt), options)
        alone.append([(step.token, step.source) for step in stream])
    assert any(source == "expert" for steps in alone for _, source in steps)
    assert any(source == "base" for steps in alone for _, source in steps)
    slots = Slots(pair, 4)
    before = pair.base_session.account.n_calls
    results = together(pair, slots, PROMPTS, options)
    assert [steps for steps, _ in results] == alone
    n_steps = sum(map(len, alone))
    assert pair.base_session.account.n_calls - before < 0.7 * n_steps
    slots.close()


def test_padded_batches_have_the_texts_of_those_that_are_not(pair, monkeypatch):
    """Three answers at once, where a batch of four costs less than one of three."""
    options = Options(temperature=0.0, max_tokens=40, threshold=0.4)
    sizes, decode = list[int](), Context.decode

    def counted(context, n, *, hidden=False):
        sizes.append(n)
        decode(context, n, hidden=hidden)

    slots = Slots(pair, 3)
    plain = together(pair, slots, PROMPTS[:3], options)
    slots.close()
    slots = Slots(pair, 3)
    fours = CostTable((1, 2, 3, 4, 8), (1.0, 2.0, 3.0, 1.5, 2.5))
    for shared in (slots.base, *slots.experts):
        shared.costs = fours
    monkeypatch.setattr(Context, "decode", counted)
    padded = together(pair, slots, PROMPTS[:3], options)
    assert [steps for steps, _ in padded] == [steps for steps, _ in plain]
    for (_, stats), (_, other) in zip(padded, plain, strict=True):
        assert stats.base_tokens == other.base_tokens
    assert 4 in sizes
    assert 3 not in sizes
    slots.close()


@pytest.mark.parametrize("strategy", ["defer", "compose"])
def test_prompts_read_together_give_the_steps_of_each_alone(pair, strategy):
    options = Options(threshold=0.3, strategy=strategy, n_probs=1)
    prompts = ["x y z " * 30, "hello there", "what is this about " * 5, "seven " * 25]
    tokens = [pair.base.tokenize(prompt)[: 127 - 9 * i] for i, prompt in enumerate(prompts)]
    alone = [pair.stream_tokens(some, options).read_prompt() for some in tokens]
    assert {step.source for steps in alone for step in steps} == {"base", "expert"}
    slots, results = Slots(pair, 4), [None] * 4
    begin = threading.Barrier(4)

    def work(i: int) -> None:
        begin.wait()
        for _ in range(3):
            with slots.take(tokens[i]) as timelines:
                results[i] = pair.stream_tokens(tokens[i], options, timelines).read_prompt()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for steps, expected in zip(results, alone, strict=True):
        assert [step.token for step in steps] == [step.token for step in expected]
        for step, other in zip(steps, expected, strict=True):
            if abs(other.p_defer - 0.3) > 2e-2:  # not a near-tie of the two models
                assert step.source == other.source
                # Batches differ in the last bits; another slot's state would be nats away.
                assert step.logprob == pytest.approx(other.logprob, abs=0.3)
    slots.close()


def test_a_slot_keeps_its_prefix_for_the_next_request(pair):
    slots = Slots(pair, 2)
    options = Options(temperature=0.0, max_tokens=4, threshold=1e-9)
    prompt = "a long and winding beginning that many requests share"
    _, first = answer(pair, slots, prompt, options)
    answer(pair, slots, "something else", options)
    _, again = answer(pair, slots, prompt + " and more", options)
    n = len(pair.base.tokenize(prompt))
    assert first.base_tokens >= n
    assert again.base_tokens < n
    assert again.expert_tokens < n
    slots.close()


def test_more_outputs_than_a_batch_are_refused_as_by_one_session(pair):
    slots = Slots(pair, 2)
    tokens = array("i", [1 + i % 200 for i in range(120)])
    slots.base.n_batch = 64  # smaller than a context, as it is with longer ones
    with slots.take(tokens) as (base, _):
        with pytest.raises(ValueError, match="65 outputs, but a batch of at most 64"):
            base.sync(tokens, range(55, 120))
        assert base.sync(tokens, range(56, 120)) == 120
        for i in (56, 119):
            assert len(base.state(i)[0]) == pair.base.n_vocab
    slots.close()


def test_a_prompt_goes_to_the_slot_whose_expert_holds_it_behind_a_bridge(tiny, tmp_path):
    """Its tokens are its own: by the base's, chance would choose. At a threshold of 0 nobody else
    holds the prompt."""
    other = tmp_path / "other.gguf"
    write_model(other, replace(SHAPES["tiny"], n_vocab=268), seed=7, gain=20.0)
    options = Options(temperature=0.0, max_tokens=2, threshold=0.0)
    prompts = ["a long and winding beginning", "quite another story, and more of it"]
    with load(
        tiny["base"], str(other), "margin", n_threads=1, n_ctx=128, n_ubatch=8, bridge=True
    ) as pair:
        slots = Slots(pair, 2)
        together(pair, slots, prompts, options)
        for prompt in (prompts[1], prompts[0]):
            known = answer(pair, slots, prompt + " and so on", options)[1].expert_tokens
            assert known < len(prompt)  # it has a token for each letter
        slots.close()


def test_prompts_evaluated_side_by_side_share_their_beginning_later(pair):
    slots = Slots(pair, 2)
    options = Options(temperature=0.0, max_tokens=4, threshold=1e-9)
    start = "a long and winding beginning that many requests share"
    together(pair, slots, [start + " one", start + " two"], options)
    _, again = answer(pair, slots, start + " and more", options)
    n_shared = len(pair.base.tokenize(start)) // 16 * 16
    assert again.base_tokens == again.n_prompt + again.n_generated - 1 - n_shared
    slots.close()


def test_a_slot_is_free_as_soon_as_its_answer_is_abandoned(pair):
    slots = Slots(pair, 1)
    tokens = pair.base.tokenize("hello")
    with slots.take(tokens) as timelines:
        stream = pair.stream_tokens(tokens, Options(temperature=0.0), timelines)
        next(stream)
        with pytest.raises(BusyError, match="every slot is taken"), slots.take(tokens):
            pass
    steps, _ = answer(pair, slots, "hello", Options(temperature=0.0, max_tokens=5))
    assert len(steps) == 5
    slots.close()


def test_a_prompt_longer_than_a_batch_does_not_block_others(pair):
    """Each batch takes as much of it as the others leave room for."""
    slots = Slots(pair, 2)
    (expert,) = slots.experts
    slots.base.n_batch = expert.n_batch = 16
    options = Options(temperature=0.0, max_tokens=10, threshold=0.0)
    prompts = ["x y z " * 30, "hello"]
    alone = [
        [s.token for s in pair.stream_tokens(pair.base.tokenize(prompt)[:100], options)]
        for prompt in prompts
    ]
    results = [None, None]

    def work(i: int) -> None:
        tokens = pair.base.tokenize(prompts[i])[:100]
        with slots.take(tokens) as timelines:
            results[i] = [s.token for s in pair.stream_tokens(tokens, options, timelines)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == alone
    slots.close()


def test_an_error_of_the_worker_is_raised_in_the_answer(pair, monkeypatch):
    slots = Slots(pair, 2)

    def broken(context, n, *, hidden=False):
        raise ColmError("out of order")

    monkeypatch.setattr(Context, "decode", broken)
    with pytest.raises(ColmError, match="out of order"):
        answer(pair, slots, "hello", Options(temperature=0.0, max_tokens=3))
    monkeypatch.undo()
    assert answer(pair, slots, "hello", Options(temperature=0.0, max_tokens=3))[0]
    slots.close()
    with pytest.raises(ModelError, match="the slots are closed"):
        answer(pair, slots, "hello", Options(temperature=0.0, max_tokens=3))


def test_the_expert_is_unloaded_and_loaded_again(pair):
    slots = Slots(pair, 2)
    options = Options(temperature=0.0, max_tokens=6, threshold=0.0)
    first, _ = answer(pair, slots, "hello", options)
    assert pair.expert_is_loaded
    slots.unload_expert()
    assert not pair.expert_is_loaded
    assert not slots.expert_loaded
    assert answer(pair, slots, "hello", options)[0] == first
    slots.close()


@pytest.mark.parametrize("n", [1, 2])
def test_weights_that_were_read_ahead_are_unloaded_too(pair, n):
    """Before a deferral that came near, and was none."""
    slots = Slots(pair, n)
    slots.open()
    pair.members[0].model.load()
    assert slots.expert_loaded
    slots.unload_expert()
    assert not pair.expert_is_loaded
    slots.close()


@pytest.mark.parametrize("ends", ["close", "unload_expert"])
def test_no_context_is_freed_while_an_answer_reads_it(pair, monkeypatch, ends):
    slots, threads = Slots(pair, 2), []
    read = SharedTimeline.state

    def state(timeline, i):
        if not threads and timeline._shared in slots.experts:
            threads.append(threading.Thread(target=getattr(slots, ends)))
            threads[0].start()
            threads[0].join(0.2)  # it waits, or leaves the expert as it is
        return read(timeline, i)

    monkeypatch.setattr(SharedTimeline, "state", state)
    options = Options(temperature=0.0, max_tokens=5, threshold=0.0)
    tokens = pair.base.tokenize("hello there")
    written = []
    with slots.take(tokens) as timelines:
        stream = pair.stream_tokens(tokens, options, timelines)
        if ends == "close":
            with pytest.raises(ColmError, match="the models are closed"):
                written += stream
        written += stream
    assert len(stream.steps) == (1 if ends == "close" else 5)
    threads[0].join(60)
    assert not threads[0].is_alive()
    (expert,) = slots.experts
    assert expert.context.created is (ends != "close")
    slots.close()


def test_a_cancelled_prompt_ends_at_the_next_batch(pair, monkeypatch):
    slots = Slots(pair, 2)
    slots.base.n_batch = 16
    tokens = pair.base.tokenize("x y z " * 30)[:100]
    decode, n_decodes = Context.decode, []

    def decoded(context, n, *, hidden=False):
        n_decodes.append(n)
        if len(n_decodes) == 2:
            stream.cancel()
        decode(context, n, hidden=hidden)

    monkeypatch.setattr(Context, "decode", decoded)
    with slots.take(tokens) as timelines:
        stream = pair.stream_tokens(tokens, Options(temperature=0.0, max_tokens=5), timelines)
        assert list(stream) == []
    assert len(n_decodes) == 2
    assert answer(pair, slots, "hello", Options(temperature=0.0, max_tokens=3))[0]
    slots.close()


def test_a_cancelled_evaluation_counts_as_far_as_it_came(pair, monkeypatch):
    slots = Slots(pair, 2)
    slots.base.n_batch = 16
    tokens = pair.base.tokenize("x y z " * 30)[:100]
    decode = Context.decode

    def decoded(context, n, *, hidden=False):
        decode(context, n, hidden=hidden)
        stream.cancel()

    monkeypatch.setattr(Context, "decode", decoded)
    with slots.take(tokens) as timelines:
        stream = pair.stream_tokens(tokens, Options(temperature=0.0, max_tokens=5), timelines)
        assert list(stream) == []
        assert timelines[0].account.n_evaluated == 16
        assert stream.answer().stats.base_seconds > 0
    slots.close()


def test_tokens_need_not_begin_with_the_prompt(pair):
    """A bridge spells the end of a prompt anew with what follows it."""
    prompt = array("i", pair.base.tokenize("one two three"))
    last = len(prompt) + 2
    tokens = prompt + array("i", [7, 8, 9])
    slots = Slots(pair, 2)
    with slots.take(tokens) as (timeline, *_):
        timeline.turn_to(prompt[:])
        timeline.sync(prompt + array("i", [5, 6]))
        timeline.turn_to(prompt + array("i", [5, 6, 4]))  # goes on from the answer
        timeline.sync(tokens)
        logits, _ = timeline.state(last)
    pair.base_session.sync(tokens)
    np.testing.assert_allclose(logits, pair.base_session.state(last)[0], atol=1e-4)
    slots.close()


def test_common_prefixes():
    one = array("i", range(50))
    for n in (0, 1, 17, 49, 50):
        other = array("i", [*range(n), *[-1] * (50 - n)])
        assert common_prefix(one, other) == common_prefix(other, one) == n
    assert common_prefix(one, one[:20]) == 20


@pytest.mark.parametrize("doubt", [0.0, 0.5])
def test_doubt_reads_the_base_before_it_waits_for_the_expert(pair, doubt):
    """Other slots use the base meanwhile, and what was read of it is gone."""
    options = Options(temperature=0.0, max_tokens=24, doubt=doubt, threshold=0.4)
    with closing(Slots(pair, 4)) as slots:
        found = together(pair, slots, PROMPTS, options)
    undone = 0
    for prompt, (steps, stats) in zip(PROMPTS, found, strict=True):
        alone = pair.stream_tokens(pair.base.tokenize(prompt), options)
        assert steps == [(step.token, step.source) for step in alone]
        undone += stats.n_undone
    assert undone
