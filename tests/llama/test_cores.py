"""How many threads a decode gets beside other programs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_edge.llama import WAITS, threads
from colm_edge.llama import context as contexts
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.measure import cost_table, kept_table
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.llama.threads import CALM, LONGEST_CALM, WINDOW, Cores, others_seconds
from colm_edge.pair import load


class Machine:
    """A clock, and other programs that compute; `run` decodes until a time has passed."""

    def __init__(self, n: int) -> None:
        self.now, self.computed = 0.0, 0.0
        self.cores = Cores(n, lambda: self.computed, lambda: self.now)

    def run(self, seconds: float, busy: float, decode: float = 0.02, most: int = 64) -> list[int]:
        """Return the threads of each decode beside programs that use `busy` cores."""
        found, end = [], self.now + seconds
        while self.now < end:
            found.append(self.cores.threads(most))
            self.now += decode
            self.computed += decode * busy
        return found


decodes = st.floats(0.001, 0.6)


@given(n=st.integers(1, 64), busy=st.floats(0, 0.45), decode=decodes)
def test_a_quiet_machine_lends_every_core(n, busy, decode):
    assert set(Machine(n).run(5, busy, decode)) == {64}


@given(n=st.integers(2, 64), busy=st.integers(1, 80), decode=decodes)
def test_busy_programs_get_their_cores_at_once_and_give_them_back_within_two_seconds(
    n, busy, decode
):
    machine = Machine(n)
    machine.run(3, 0, decode)
    beside = machine.run(3, busy, decode)
    # The first look may see mostly the quiet time before; the second does not.
    n_late = int(2 * (WINDOW / decode + 1)) + 1
    assert set(beside[n_late:]) == {max(1, n - busy)}
    machine.run(2 - decode, 0, decode)
    assert machine.cores.threads(64) == 64


@given(loads=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 20), decodes), max_size=12))
def test_there_is_always_a_thread_and_never_more_than_asked_for(loads):
    machine = Machine(8)
    for seconds, busy, decode in loads:
        assert all(1 <= n <= 6 for n in machine.run(seconds, busy, decode, most=6))


def test_a_fixed_number_stays_while_there_are_cores_for_it():
    machine = Machine(16)
    assert set(machine.run(5, 3.0, most=4)) == {4}
    assert machine.run(2, 14.0, most=4)[-1] == 2


def test_programs_that_come_and_go_do_not_make_it_come_and_go_as_often():
    machine, changes = Machine(2), 0
    for _ in range(60):
        for busy in (1.0, 0.0):
            seen = machine.run(CALM + 2 * WINDOW, busy)
            changes += np.count_nonzero(np.diff(seen))
    assert changes < 60
    assert machine.run(LONGEST_CALM + 1, 0)[-1] == 64
    machine.run(2, 1.0)
    assert machine.run(2, 0)[-1] == 64  # soon again, once it had lasted


def test_a_system_that_does_not_tell_lends_every_core():
    now = iter(range(100))
    cores = Cores(4, lambda: None, lambda: next(now))
    assert {cores.threads(4) for _ in range(50)} == {4}


STAT = """cpu  999 999 999 999 999 999 999 999 0 0
cpu0 100 50 30 1000 7 2 3 5 0 0
cpu1 400 0 0 1000 0 0 0 0 0 0
cpu10 9000 0 0 0 0 0 0 0 0 0
intr 12 0 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="reads sysconf")
def test_the_busy_time_is_that_of_our_cores_without_programs_of_low_priority(monkeypatch):
    monkeypatch.setattr(threads.os, "sysconf", lambda name: 100)
    assert threads._busy_on_linux(STAT, {0}) == 1.4
    assert threads._busy_on_linux(STAT, {0, 1}) == 5.4
    monkeypatch.setattr(threads.os, "nice", lambda more: 5)  # ours is one of them
    assert threads._busy_on_linux(STAT, {0}) == 1.9


def test_what_others_computed_is_known_or_not_but_never_an_error(monkeypatch):
    assert isinstance(others_seconds(), float | None)

    def refuse(*_):
        raise OSError

    for name in ("_busy_on_linux", "_busy_on_windows", "_busy_on_macos"):
        monkeypatch.setattr(threads, name, refuse)
    assert others_seconds() is None


@pytest.fixture
def machine(monkeypatch):
    """A machine of two cores, whose clock only `run` moves, and which contexts share."""
    machine = Machine(2)
    monkeypatch.setattr(contexts, "cores", lambda: machine.cores)
    return machine


@pytest.fixture
def session(tiny, machine):
    """Return a function that opens a session of two threads."""
    model, opened = Model(tiny["base"]), []

    def new(**options) -> Session:
        session = Session(model, ContextOptions(n_ctx=128, n_threads=2, n_batch=64, **options))
        opened.append(session)
        return session

    yield new
    for one in opened:
        one.close()
    model.close()


@pytest.fixture
def set_threads(monkeypatch):
    """What llama.cpp was told, each (threads of single tokens, of batches)."""
    told, tell = [], contexts.llama.llama_set_n_threads

    def record(handle, *n):
        told.append(n)
        tell(handle, *n)

    monkeypatch.setattr(contexts.llama, "llama_set_n_threads", record)
    return told


def test_a_context_changes_its_threads_and_says_so_once(session, machine, set_threads, caplog):
    caplog.set_level(logging.INFO, "colm_edge")
    adaptive, logits = session(threads_auto=True), []
    for busy in (0, 1, 0, 1, 0):
        machine.run(3, busy)
        adaptive.sync([1, 2, 3])
        logits.append(adaptive.logits.copy())
        adaptive.forget()
    assert set_threads == [(1, 1), (2, 2), (1, 1), (2, 2)]
    assert all(np.allclose(logits[0], other, atol=1e-4) for other in logits)
    assert [r.getMessage() for r in caplog.records if "threads" in r.getMessage()] == [
        f"{adaptive.model.path}: 1 instead of 2 threads while other programs use the cores"
    ]


def test_a_fixed_number_of_threads_stays_fixed(session, machine, set_threads):
    fixed = session()
    for busy in (0, 1, 0):
        machine.run(3, busy)
        fixed.sync([1, 2, 3, int(machine.now)])
    assert set_threads == []
    assert ContextOptions().adapts_threads
    assert not ContextOptions(n_threads=2).adapts_threads


def test_one_thread_does_not_look_at_other_programs(tiny, monkeypatch):
    monkeypatch.setattr(contexts, "cores", lambda: pytest.fail("looked"))
    model = Model(tiny["base"])
    session = Session(model, ContextOptions(n_ctx=128))  # a very small model
    session.sync([1, 2, 3])
    session.close()
    model.close()


@pytest.mark.parametrize("options", [{}, {"threads_auto": True}])
def test_costs_measured_beside_other_programs_are_not_kept(
    session, machine, options, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, said = session(**options), []
    machine.run(3, 1.0)
    assert cost_table(measured, note=said.append).sizes[0] == 1
    assert kept_table(measured) is None
    assert "other programs" in said[-1]
    machine.run(3, 0)
    table = cost_table(measured, note=said.append)
    assert kept_table(measured).seconds == table.seconds


def test_a_pair_adapts_unless_its_threads_are_fixed(tiny):
    for settings, adapts in (
        ({"n_threads": 2}, False),
        ({"n_threads": 2, "threads_auto": True}, True),
        ({}, True),
    ):
        with load(tiny["base"], tiny["expert"], "margin", n_ctx=128, **settings) as pair:
            for session in (pair.base_session, pair.expert_session):
                assert session.options.adapts_threads is adapts


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_child_that_has_ended_is_not_another_program(monkeypatch):
    monkeypatch.setattr(threads, "_busy_on_linux", lambda *_: 100.0)
    before = threads.others_seconds()
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-I", "-c", burn], check=True)
    assert threads.others_seconds() <= before - 0.15


WAITING = """
import os, sys
import colm_edge
assert "llama_cpp" not in sys.modules
names = {!r}
print([os.environ.get(name) for name in names])
from colm_edge.llama import environment
print([environment().get(name) for name in names])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the waits are set on Linux alone")
@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_of_a_second_team_wait_awake_unless_the_user_says_how(own):
    """Before llama.cpp is loaded, which reads it once."""
    names = list(WAITS)
    env = {name: value for name, value in os.environ.items() if name not in WAITS} | own
    code = WAITING.format(names)
    found = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    # Other programs get what the user has set, and nothing of ours.
    expected = [str([some.get(name) for name in names]) for some in (own or WAITS, own)]
    assert found.splitlines() == expected
