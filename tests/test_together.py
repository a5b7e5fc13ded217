"""Many answers at once: the texts of one at a time; no thread outlives an error or an ending."""

from __future__ import annotations

import threading
from dataclasses import replace
from time import perf_counter

import pytest

from colm_edge.errors import ContextError
from colm_edge.evaluate.generate import RandomSwitch
from colm_edge.options import Options
from colm_edge.together import Task, answer_together

GREEDY = Options(temperature=0.0, max_tokens=12, threshold=0.4)
PROMPTS = ["hello", "a long and winding beginning", "x", "hello there, you", "one more"]


@pytest.fixture(autouse=True)
def loaded(tiny_pair):
    """The weights are there already: a thread that reads them is its model's, not an answer's."""
    tiny_pair.expert_session.open()
    for thread in threading.enumerate():
        if thread.name == "colm-edge-load":
            thread.join(timeout=60)


def tasks(pair, options=GREEDY, switch=None):
    return [Task(i, pair.base.tokenize(text), options, switch) for i, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("n_slots", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_answers_are_those_of_one_at_a_time(tiny_pair, n_slots, threshold):
    options = GREEDY.with_changes(threshold=threshold)
    alone = []
    for task in tasks(tiny_pair, options):
        stream = tiny_pair.stream_tokens(task.tokens, options)
        alone.append([step.token for step in stream])
    found = {}
    for done in answer_together(tiny_pair, tasks(tiny_pair, options), n_slots):
        found[done.task.key] = [step.token for step in done.answer.steps]
        assert done.seconds > 0
    assert [found[i] for i in range(len(PROMPTS))] == alone


def test_the_answers_share_the_time_in_which_they_are_written(tiny_pair):
    """Also of a run that is stopped: what is written again then is not counted twice."""
    begun, sum_of_shares = perf_counter(), 0.0
    for i, done in enumerate(answer_together(tiny_pair, tasks(tiny_pair), 3)):
        sum_of_shares += done.seconds
        elapsed = perf_counter() - begun
        assert 0 < done.seconds < elapsed
        if i == 0:  # three were being written
            assert done.seconds <= elapsed / 3
    assert sum_of_shares <= elapsed


def test_each_task_may_have_a_switch_of_its_own(tiny_pair):
    """Random deferral: the same seed gives the same answer, whatever is written beside it."""
    with tiny_pair.switched(RandomSwitch()):
        for seeds in ([1, 2, 3, 4, 5], [3, 3, 3, 3, 3]):
            work = [
                replace(task, switch=RandomSwitch(seed))
                for task, seed in zip(tasks(tiny_pair), seeds, strict=True)
            ]
            sources = {}
            for done in answer_together(tiny_pair, work, 3):
                sources[done.task.key] = [step.source for step in done.answer.steps]
            if seeds[0] == 1:
                third = sources[2]
        assert sources[2] == third


def test_a_task_that_fails_ends_the_others(tiny_pair):
    work = tasks(tiny_pair)
    work.insert(1, Task(9, [1] * 300, GREEDY))
    with pytest.raises(ContextError, match="the prompt has 300 tokens"):
        list(answer_together(tiny_pair, work, 3))
    assert not [t for t in threading.enumerate() if t.name.startswith(("answer", "colm-edge"))]


def test_closing_ends_the_answers_that_are_being_written(tiny_pair):
    endless = GREEDY.with_changes(max_tokens=200)
    running = answer_together(tiny_pair, tasks(tiny_pair, endless), 3)
    next(running)
    running.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("answer", "colm-edge"))]
    assert tiny_pair.generate("hello", temperature=0.0, max_tokens=3).steps
