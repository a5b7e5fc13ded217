"""An expert on a thread of its own: it gives the same text and evaluates nothing twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from array import array

import pytest

from colm_edge.cancel import Cancel, CancelledError
from colm_edge.decode.background import MIN_GAP, Background
from colm_edge.decode.guess import Guessing, with_guesses
from colm_edge.errors import ModelError
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.options import Options
from colm_edge.pair import load

PROMPT = "hello world, this is a prompt of more tokens than a gap"


def answers(tiny, **options):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256, **options) as pair:
        settings = {"temperature": 0.0, "max_tokens": 60, "threshold": 0.6}
        return [
            [(s.token, s.source) for s in pair.generate(prompt, **settings).steps]
            for prompt in (PROMPT, "another " + PROMPT, PROMPT)
        ]


def test_the_text_is_the_same(tiny):
    assert answers(tiny, overlap=True) == answers(tiny, overlap=False)


def test_alone_the_expert_guesses(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, overlap=True) as pair:
        assert isinstance(pair.expert, Background)
        base, (expert,) = with_guesses(pair.base_session, [pair.expert], Options(), 0.0)
        assert base is pair.base_session
        assert isinstance(expert, Guessing)


def test_a_guessing_expert_waits_for_its_catch_up(session):
    """Two answers by turns, or a mixture at threshold 0, leave one running."""
    expert = Background(session)
    tokens = array("i", session.model.tokenize(PROMPT * 3))
    expert.sync(tokens[:5])
    inside, most, sync = set(), [], session.sync

    def counted(*arguments):
        inside.add(threading.get_ident())
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return sync(*arguments)
        finally:
            inside.discard(threading.get_ident())

    session.sync = counted
    _, (guessing,) = with_guesses(session, [expert], Options(), 0.0)
    expert.follow(tokens)
    guessing.turn_to(tokens[:7])
    expert.follow(tokens)
    guessing.sync(tokens)
    assert most == [1] * len(most)
    assert len(most) >= 2
    expert.close()


def test_a_cancelled_evaluation_counts_as_far_as_it_came(tiny, monkeypatch):
    session = Session(Model(tiny["expert"]), ContextOptions(n_ctx=256, n_batch=16, n_ubatch=16))
    expert = Background(session)
    tokens = session.model.tokenize(PROMPT * 3)
    cancel, decode = Cancel(), session._decode

    def decoded(*arguments):
        cancel.request()
        return decode(*arguments)

    monkeypatch.setattr(session, "_decode", decoded)
    with pytest.raises(CancelledError):
        expert.sync(tokens, (), cancel)
    assert expert.account.n_evaluated == session.account.n_evaluated == 16
    expert.close()
    session.model.close()


@pytest.fixture
def session(tiny):
    model = Model(tiny["expert"])
    session = Session(model, ContextOptions(n_ctx=256, n_threads=1))
    yield session
    session.close()
    model.close()


def test_it_catches_up_once_loaded_and_only_with_long_gaps(session):
    expert = Background(session)
    tokens = session.model.tokenize(PROMPT * 3)
    assert len(tokens) > 3 * MIN_GAP
    expert.follow(array("i", tokens))
    expert.wait()
    assert not session.created  # it was not called yet
    expert.sync(tokens[:5])
    expert.follow(array("i", tokens[: 5 + MIN_GAP - 1]))
    expert.wait()
    assert session.account.n_evaluated == 5
    expert.follow(array("i", tokens[: 5 + MIN_GAP]))
    expert.wait()
    assert session.account.n_evaluated == 5 + MIN_GAP
    assert expert.account.n_evaluated == 5  # work in the background counts in the next call
    expert.sync(tokens)
    assert expert.account.n_evaluated == session.account.n_evaluated == len(tokens)
    assert session.account.n_calls == expert.account.n_calls == 3
    expert.close()


def test_what_an_answer_left_running_counts_in_no_other(session):
    expert = Background(session)
    tokens = session.model.tokenize(PROMPT * 3)
    expert.sync(tokens[:5])
    expert.follow(array("i", tokens))  # until the answer's end, and no call waits for it
    expert.turn_to(array("i", tokens[:3]))
    before = expert.account.n_evaluated
    assert before == session.account.n_evaluated == len(tokens)
    expert.sync(tokens[:7])
    assert expert.account.n_evaluated - before <= 7


def test_the_base_continues_meanwhile(session, monkeypatch):
    """`follow` returns while a catch-up is running, and a second `follow` does nothing."""
    expert = Background(session)
    expert.sync([1])
    begun, may_end = threading.Event(), threading.Event()
    sync = session.sync

    def slow(tokens, *rest):
        begun.set()
        assert may_end.wait(30)
        return sync(tokens, *rest)

    monkeypatch.setattr(session, "sync", slow)
    expert.follow(array("i", range(1, 40)))
    assert begun.wait(30)
    expert.follow(array("i", range(1, 60)))  # returns at once, starts nothing
    monkeypatch.undo()
    may_end.set()
    expert.wait()
    assert session.account.n_evaluated == 39
    expert.close()


@pytest.mark.parametrize("ends", ["the next prompt", "the reader", "closing"])
def test_a_catch_up_that_nobody_wants_ends_at_its_next_batch(tiny, monkeypatch, ends):
    session = Session(Model(tiny["expert"]), ContextOptions(n_ctx=256, n_batch=16, n_ubatch=16))
    expert = Background(session)
    tokens = array("i", session.model.tokenize(PROMPT * 3))
    expert.sync(tokens[:5])
    inside, go_on, decode = threading.Event(), threading.Event(), session._decode
    n = []

    def decoded(*arguments):
        n.append(arguments)
        inside.set()
        assert go_on.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(session, "_decode", decoded)
    expert.follow(tokens)
    assert inside.wait(60)
    threading.Timer(0.3, go_on.set).start()
    if ends == "the next prompt":
        expert.turn_to(tokens[1:8])
    elif ends == "the reader":
        cancel = Cancel()
        cancel.request()
        with pytest.raises(CancelledError):
            expert.sync(tokens, (), cancel)
    expert.close()
    assert len(n) == 1
    session.model.close()


def test_a_catch_up_goes_on_for_a_prompt_that_goes_on(session):
    expert = Background(session)
    tokens = array("i", session.model.tokenize(PROMPT * 3))
    expert.turn_to(tokens[:5])
    expert.sync(tokens[:5])
    expert.follow(tokens[:60])
    expert.turn_to(tokens[:50])  # the same prompt again, without what was written
    expert.sync(tokens[:50])
    assert expert.account.n_evaluated <= 60 + 16
    expert.close()


def test_an_error_on_its_thread_is_raised_at_the_next_sync(session, monkeypatch):
    expert = Background(session)
    expert.sync([1])

    def broken(tokens, *rest):
        raise ModelError("out of order")

    monkeypatch.setattr(session, "sync", broken)
    expert.follow(array("i", range(1, 40)))
    with pytest.raises(ModelError, match="out of order"):
        expert.sync([1, 2])
    monkeypatch.undo()
    assert expert.sync([1, 2]) == 1
    expert.close()


def test_a_cancelled_answer_does_not_cancel_the_next(session):
    expert, cancel = Background(session), Cancel()
    cancel.request()
    job = expert.begin(array("i", [1, 2]), (), cancel)
    assert isinstance(job.exception(timeout=30), CancelledError)
    assert expert.sync(array("i", [1, 2])) == 2
    expert.close()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT, which Windows lacks")
def test_an_interrupt_lets_no_second_thread_into_the_context(session, monkeypatch, interruptible):
    expert = Background(session)
    expert.sync([1])
    waits, may_end = threading.Event(), threading.Event()
    sync, users, most = session.sync, [], []

    def slow(tokens, *rest):
        users.append(1)
        most.append(len(users))
        assert may_end.wait(30)
        try:
            return sync(tokens, *rest)
        finally:
            users.pop()

    def interrupt() -> None:
        assert waits.wait(30)
        time.sleep(0.1)  # so that it is most likely inside `sync`
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(session, "sync", slow)
    expert.follow(array("i", range(1, 40)))
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the signal must not come earlier)
        waits.set()
        expert.sync([1, 2])
    interrupting.join(30)
    may_end.set()
    assert expert.sync([1, 2, 3]) == 1  # the catch-up knew the others
    assert most == [1, 1]
    expert.close()


def test_it_is_off_if_both_models_need_the_same_cores(tiny):
    with load(tiny["base"], tiny["expert"], "margin") as pair:
        assert not isinstance(pair.expert, Background)
