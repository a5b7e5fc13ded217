"""What a model tells of its vocabulary, and reading its weights ahead of time."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import Future

import pytest

from colm_edge.cancel import Cancel, CancelledError
from colm_edge.errors import ModelError
from colm_edge.llama import threads
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session


def test_a_text_names_special_tokens(tiny_pair):
    model = tiny_pair.base
    tokens = model.tokenize("hello there")
    assert model.text(tokens).strip() == "hello there"
    end = min(model.end_tokens)
    assert model.text([*tokens, end]) == model.text(tokens) + model.text([end])
    assert len(model.text([end])) > 0
    assert model.text([]) == ""


@pytest.fixture
def held(tiny, monkeypatch):
    """A model whose load waits for `may_go_on` once it has begun."""
    model = Model(tiny["expert"])
    begun, may_go_on = threading.Event(), threading.Event()
    load = model._open

    def slow(vocab_only, check=None, progress=None):
        if not vocab_only:
            begun.set()
            assert may_go_on.wait(30)
        return load(vocab_only, check, progress)

    monkeypatch.setattr(model, "_open", slow)
    model.begun, model.may_go_on = begun, may_go_on
    yield model
    may_go_on.set()
    model.close()


def test_weights_are_read_ahead_and_only_once(held):
    held.prepare()
    assert held.begun.wait(30)
    held.prepare()
    assert not held.loaded
    found = []
    waits = threading.Thread(target=lambda: found.append(held.load()))
    waits.start()
    held.may_go_on.set()
    waits.join(30)
    assert held.loaded
    assert found == [held.load()]


def test_a_core_is_left_to_the_thread_that_reads(held):
    free = threads.cores()
    before = free.threads(8)
    held.prepare()
    assert held.begun.wait(30)
    reader = held._preparing
    assert free.threads(8) == max(1, min(before, threads.n_cores()) - 1)
    held.may_go_on.set()
    reader.join(30)
    assert free.threads(8) == before


def test_a_check_ends_the_wait_for_another_thread(held):
    held.prepare()
    assert held.begun.wait(30)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        held.load(stop)
    assert not held.loaded


def test_a_context_that_waits_for_the_weights_can_be_cancelled(held):
    """Though the file's header, which says how large it will be, waits for them too."""
    context, cancel = Session(held, ContextOptions(n_ctx=64)), Cancel()
    held.prepare()
    assert held.begun.wait(30)
    threading.Timer(0.1, cancel.request).start()
    with pytest.raises(CancelledError):
        context.open(cancel)
    assert not held.loaded


def test_only_who_waits_is_told_the_progress(tiny):
    told = []
    with_progress = Model(tiny["expert"], progress=told.append)
    with_progress.prepare()
    reader = with_progress._preparing
    if reader is not None:
        reader.join(30)
    assert with_progress.loaded
    assert told == []
    with_progress.unload()
    with_progress.load()
    assert told[-1] == 1.0
    with_progress.close()


def test_closing_ends_a_load(held):
    held.prepare()
    assert held.begun.wait(30)
    reader = held._preparing
    closes = threading.Thread(target=held.close)
    closes.start()
    held.may_go_on.set()
    closes.join(30)
    reader.join(30)
    assert not closes.is_alive()
    assert not held.loaded
    with pytest.raises(ModelError, match="closed"):
        held.load()


def test_what_goes_wrong_ahead_of_time_is_raised_by_the_load(tiny, tmp_path):
    path = tmp_path / "broken.gguf"
    shutil.copy(tiny["expert"], path)
    model = Model(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    model.prepare()
    reader = model._preparing
    if reader is not None:
        reader.join(30)
    assert not model.loaded
    with pytest.raises(ModelError, match="cannot load"):
        model.load()
    model.close()


def test_what_the_progress_raises_reaches_who_waits(held):
    """It is called on the thread that reads ahead, for the caller that waits for it."""
    calls = []

    def progress(share: float) -> None:
        calls.append(share)
        if len(calls) == 1:
            raise RuntimeError("given up")

    held._progress = progress
    held.prepare()
    assert held.begun.wait(30)
    waits = Future()
    threading.Thread(target=lambda: called(waits, held.load)).start()
    while not held._n_waiting:
        time.sleep(0.001)
    held.may_go_on.set()
    with pytest.raises(RuntimeError, match="given up"):
        waits.result(30)
    assert len(calls) == 1
    assert held.load()  # it is told once


def called(future: Future, work) -> None:
    try:
        future.set_result(work())
    except BaseException as e:
        future.set_exception(e)
