"""Ctrl-C while llama.cpp reads weights and calls back is never lost."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from colm_edge.llama import model
from colm_edge.llama.interrupts import interrupts_noted
from colm_edge.llama.model import Model
from colm_edge.llama.owners import Alone, HomeLock

pytestmark = pytest.mark.usefixtures("interruptible")


def test_it_is_raised_where_that_is_asked_for():
    with interrupts_noted() as raise_it:
        raise_it()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_it()
        raise_it()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_or_at_the_end():
    with pytest.raises(KeyboardInterrupt), interrupts_noted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_on_another_thread_nothing_changes():
    told = []

    def work() -> None:
        with interrupts_noted() as raise_it:
            raise_it()
            told.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [signal.default_int_handler]


def test_a_load_ends_with_it_every_time(tiny, capfd):
    reading = Model(tiny["base"], progress=lambda share: signal.raise_signal(signal.SIGINT))
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            reading.load()
        assert not reading.loaded
    reading.close()
    assert "ignored" not in capfd.readouterr().err


def test_one_that_comes_when_all_is_read_leaves_nothing_in_memory(tiny, monkeypatch):
    read, free = model.llama.llama_model_load_from_file, model.llama.llama_model_free
    opened, freed = [], []

    def interrupted(*args) -> object:
        opened.append(read(*args))
        signal.raise_signal(signal.SIGINT)
        return opened[-1]

    monkeypatch.setattr(model.llama, "llama_model_load_from_file", interrupted)
    monkeypatch.setattr(
        model.llama, "llama_model_free", lambda handle: (freed.append(handle), free(handle))
    )
    with pytest.raises(KeyboardInterrupt):
        Model(tiny["base"])
    assert freed == opened != []


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="a POSIX system")
@pytest.mark.parametrize("kind", [Alone, HomeLock])
def test_what_is_taken_is_given_back_wherever_an_interrupt_comes(kind):
    """A context that stays taken would refuse every later answer; a pair, keep others waiting."""
    lock, n_interrupts = kind(), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        while n_interrupts < 400:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + n_interrupts % 7))
                while True:
                    with lock.held():
                        pass
            except KeyboardInterrupt:
                n_interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with ThreadPoolExecutor() as others:
        assert others.submit(lock.held().acquire, timeout=10).result()
