"""What an app needs from a pair: cancelling, asyncio, progress, locks, memory, and no output."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from scripted import Letters, Scripted, stream_of
from serving import wait_for

from colm_edge.cancel import Cancel
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.errors import ModelError
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.pair import Pair, load
from colm_edge.stream import Stream
from colm_edge.switch.load import load_switch

GREEDY = {"temperature": 0.0, "max_tokens": 40}
LONG = {"temperature": 0.0, "max_tokens": 200, "threshold": 0.6}
PROMPT = "hello world, this is a prompt of more tokens than one small batch would ever hold"


@pytest.fixture
def endless_pair(tiny):
    """A pair that writes until it is stopped."""
    with load(tiny["endless"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        pair.base.__dict__["end_tokens"] = pair.expert_session.model.__dict__["end_tokens"] = (
            frozenset()
        )
        yield pair


# Cancelling


@dataclass
class Gated:
    """A timeline whose every evaluation waits for the test to release it."""

    base: Scripted
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __getattr__(self, name):
        return getattr(self.base, name)

    def sync(self, tokens, *rest):
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        return self.base.sync(tokens, *rest)


@pytest.mark.parametrize("stop", [(), ("aaaaaab",)])
def test_cancel_from_another_thread_ends_within_one_token(stop):
    base = Gated(Scripted(lambda prefix: 97, n_ctx=1000, n_vocab=257))
    policy, cancel = Policy(lambda x, h: (0.0, int(x.argmax()), 0.0, 0), 0.5), Cancel()
    ends = frozenset({256})
    decoder = Decoder(base, [base], policy, Picker(257), [1], end_tokens=ends, cancel=cancel)
    stream = Stream(decoder, Letters(), stop, cancel)
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(step.text for step in stream))
    reader.start()
    for _ in range(10):
        assert base.entered.acquire(timeout=30)
        base.gate.release()
    assert base.entered.acquire(timeout=30)  # the eleventh token is being evaluated
    before = len(seen)
    stream.cancel()
    base.gate.release()
    reader.join(timeout=30)
    assert not reader.is_alive()
    assert base.account.n_calls == 11  # nothing was evaluated later
    assert before <= len(seen) <= before + 1
    assert stream.finish_reason == "stop"
    assert stream.answer().text == "a" * len(seen)


@pytest.mark.parametrize("schedule", ["fast", "sequential"])
def test_a_pair_works_after_a_cancelled_answer(tiny_pair, schedule):
    expected = tiny_pair.generate("hello", **GREEDY).text
    for n in range(1, 30, 4):
        stream = tiny_pair.stream("other " * (n % 3 + 1), schedule=schedule, **LONG)
        for i, _ in enumerate(stream):
            if i == n:
                stream.cancel()
        assert len(stream.steps) <= n + 1
        assert stream.finish_reason == "stop"
        assert tiny_pair.generate("hello", schedule=schedule, **GREEDY).text == expected


def test_cancel_before_the_first_step_evaluates_nothing(tiny_pair):
    stream = tiny_pair.stream("hello", **GREEDY)
    stream.cancel()
    assert list(stream) == []
    assert tiny_pair.base_session.account.n_evaluated == 0
    assert stream.answer().finish_reason == "stop"


def test_cancel_drops_what_a_stop_string_held_back():
    stream = stream_of(b"abcdef", ("cdeX",))
    texts = []
    for step in stream:
        texts.append(step.text)
        if step.text == "b":
            stream.cancel()
    assert "".join(texts) == stream.answer().text == "ab"


# Progress, with small batches, so that a prompt has several


@pytest.fixture
def told():
    return []


@pytest.fixture
def narrow_pair(tiny, told):
    models = [Model(tiny[name], progress=None) for name in ("base", "expert")]
    context = ContextOptions(n_ctx=256, n_threads=1, n_batch=8)
    progress = lambda what, share: told.append((what, share))  # noqa: E731
    with Pair(*models, load_switch("margin"), context, progress=progress) as pair:
        yield pair


def test_prompts_report_their_progress(narrow_pair, told):
    narrow_pair.generate(PROMPT, threshold=1e-9, **GREEDY)
    for what in ("base prompt", "expert prompt"):
        shares = [share for name, share in told if name == what]
        assert len(shares) > 2
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    del told[:]
    narrow_pair.generate(PROMPT, threshold=1e-9, **GREEDY)
    assert told == []  # everything was cached


def test_a_long_prompt_is_cancelled_between_two_batches(tiny, told):
    models = [Model(tiny[name]) for name in ("base", "expert")]
    context = ContextOptions(n_ctx=256, n_threads=1, n_batch=8)
    streams = []

    def progress(what, share):
        told.append(share)
        if streams:
            streams.pop().cancel()

    with Pair(*models, load_switch("margin"), context, progress=progress) as pair:
        streams.append(pair.stream(PROMPT, **GREEDY))
        assert list(streams[0]) == []
        assert pair.base_session.account.n_evaluated == 8
        del told[:]
        after = pair.generate(PROMPT, **GREEDY)
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        assert after.text == pair.generate(PROMPT, **GREEDY).text


def test_loading_reports_its_progress(tiny, told):
    progress = lambda what, share: told.append((what, share))  # noqa: E731
    with load(tiny["base"], tiny["expert"], n_threads=1, progress=progress) as pair:
        gc.collect()
        assert told[-1] == ("base", 1.0)
        assert {what for what, _ in told} == {"base"}
        pair.generate("hello", threshold=0.0, **GREEDY)
        assert told[-1] == ("expert", 1.0)
    shares = [share for what, share in told if what == "base"]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


class StopError(Exception):
    pass


def test_an_exception_in_progress_ends_the_load(tiny, capfd):
    def refuse(what, share):
        raise StopError(what)

    with pytest.raises(StopError, match="base"):
        load(tiny["base"], tiny["expert"], n_threads=1, progress=refuse)

    def refuse_once(what, share):
        if what == "expert" and refused:
            raise refused.pop()

    refused = [StopError("expert")]
    with load(tiny["base"], tiny["expert"], n_threads=1, progress=refuse_once) as pair:
        with pytest.raises(StopError, match="expert"):
            pair.generate("hello", threshold=0.0, **GREEDY)
        assert pair.generate("hello", threshold=0.0, **GREEDY).steps
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("overlap", [False, True])
def test_cancel_ends_the_load_of_the_expert(tiny, told, overlap, monkeypatch, tmp_path):
    """Also where the costs of its decodes are measured first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    streams = []

    def progress(what, share):
        told.append(what)
        if what == "expert" and streams:
            streams.pop().cancel()

    with load(
        tiny["base"], tiny["expert"], n_threads=1, overlap=overlap, progress=progress
    ) as pair:
        stream = pair.stream("hello", threshold=0.0, **GREEDY)
        streams.append(stream)
        assert list(stream) == []
        assert not pair.expert_is_loaded
        assert told.count("expert") < 3
        assert pair.generate("hello", threshold=0.0, **GREEDY).steps


# Threads


def test_a_second_caller_waits(endless_pair):
    """A caller that asks while an answer is written gets its own complete answer afterwards."""
    pair = endless_pair
    alone = pair.generate("hello", **GREEDY).text
    order: list[str] = []
    inside, go_on = threading.Event(), threading.Event()
    sync = pair.base_session.sync

    def slow(tokens, *rest):
        inside.set()
        assert go_on.wait(30)
        return sync(tokens, *rest)

    pair.base_session.sync = slow

    def ask(name: str, prompt: str) -> None:
        text = pair.generate(prompt, **GREEDY).text
        order.append(name)
        if name == "second":
            order.append(text)

    first = threading.Thread(target=ask, args=("first", "other"))
    first.start()
    assert inside.wait(30)
    second = threading.Thread(target=ask, args=("second", "hello"))
    second.start()
    time.sleep(0.05)
    assert order == []
    go_on.set()
    first.join(30)
    second.join(30)
    del pair.base_session.sync
    assert order == ["first", "second", alone]


def test_closing_while_another_thread_writes(endless_pair):
    raised: list[BaseException] = []
    begun = threading.Event()

    def read() -> None:
        try:
            while True:
                for _ in endless_pair.stream("hello", **LONG):
                    begun.set()
        except ModelError as e:
            raised.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    endless_pair.close()
    reader.join(30)
    assert not reader.is_alive()
    assert "closed" in str(raised[0])


# asyncio


def test_astream_is_the_stream(tiny_pair):
    expected = tiny_pair.generate("hello", **GREEDY)

    async def read():
        stream = tiny_pair.astream("hello", **GREEDY)
        steps = [step async for step in stream]
        assert [step async for step in stream] == []
        return steps, stream.answer()

    steps, answer = asyncio.run(read())
    assert [(s.token, s.source) for s in steps] == [(s.token, s.source) for s in expected.steps]
    assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)

    async def chat():
        messages = [{"role": "user", "content": "hello"}]
        return [step.text async for step in tiny_pair.astream_chat(messages, **GREEDY)]

    assert "".join(asyncio.run(chat())) == expected.text


def no_answer_left() -> bool:
    """Wait for the threads of answers; return whether all of them have ended."""
    writing = [t for t in threading.enumerate() if t.name == "colm-edge-answer"]
    for thread in writing:
        thread.join(30)
    return not any(thread.is_alive() for thread in writing)


class Slow:
    """Slows a session's evaluations down, and counts them."""

    def __init__(self, session, seconds: float = 0.02) -> None:
        self.n, self._sync, self._seconds = 0, session.sync, seconds
        session.sync = self

    def __call__(self, tokens, *rest):
        self.n += 1
        time.sleep(self._seconds)
        return self._sync(tokens, *rest)


def test_of_an_answer_that_was_left_it_tells_what_was_read(tiny_pair):
    """The thread that writes is ahead of the reader, here at the end."""

    def is_writing() -> bool:
        return any(thread.name == "colm-edge-answer" for thread in threading.enumerate())

    async def run(**options):
        async with tiny_pair.astream("hello", **GREEDY, **options) as stream:
            await anext(stream)
            await asyncio.to_thread(wait_for, lambda: not is_writing())
            return stream.answer()

    whole = tiny_pair.generate("hello", **GREEDY)
    word = whole.steps[2].text
    for options in ({}, {"stop": [word]}):
        answer = asyncio.run(run(**options))
        assert len(answer.steps) == 1
        assert (answer.finish_reason, answer.stopped_by) == ("stop", None)


@pytest.mark.parametrize("leave", ["break", "async with", "cancel", "task", "raise"])
def test_leaving_early_ends_the_answer_within_one_token(endless_pair, leave):
    pair = endless_pair
    options = LONG | {"threshold": 1.0, "schedule": "sequential"}
    expected = pair.generate("hello", **GREEDY).text
    slow = Slow(pair.base_session)

    async def run() -> int:
        n = 0
        if leave == "break":
            async for _ in pair.astream("other", **options):
                n += 1
                if n == 3:
                    break
            return slow.n
        if leave == "async with":
            async with pair.astream("other", **options) as stream:
                async for _ in stream:
                    n += 1
                    if n == 3:
                        break
            answer = stream.answer()
            assert len(answer.steps) == 3
            assert answer.finish_reason == "stop"
            return slow.n
        if leave == "cancel":
            stream = pair.astream("other", **options)
            async for _ in stream:
                n += 1
                if n == 3:
                    stream.cancel()
                    at = slow.n
            assert n == 3
            return at
        third = asyncio.Event()

        async def read() -> None:
            nonlocal n
            async for _ in pair.astream("other", **options):
                n += 1
                if n == 3:
                    third.set()
                    if leave == "raise":
                        raise StopError

        task = asyncio.create_task(read())
        await third.wait()
        if leave == "task":
            task.cancel()
        with pytest.raises((asyncio.CancelledError, StopError)):
            await task
        return slow.n

    at = asyncio.run(run())
    assert no_answer_left()
    assert slow.n <= at + 1
    del pair.base_session.sync
    assert pair.generate("hello", **GREEDY).text == expected


def test_the_event_loop_runs_while_an_answer_is_written(endless_pair):
    slow = Slow(endless_pair.base_session)

    async def run() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.002)
                ticks += 1

        ticking = asyncio.create_task(tick())
        async for _ in endless_pair.astream("hello", threshold=1.0, max_tokens=20):
            pass
        ticking.cancel()
        return ticks

    assert asyncio.run(run()) > 2 * slow.n
    assert slow.n >= 20


def test_errors_of_the_answer_reach_the_reader(tiny, tmp_path):
    pair = load(tiny["base"], tiny["expert"], n_threads=1)
    stream = pair.astream("hello", **GREEDY)
    pair.close()

    async def read() -> None:
        async for _ in stream:
            pass

    with pytest.raises(ModelError, match="closed"):
        asyncio.run(read())


def test_two_answers_in_one_event_loop(tiny_pair):
    expected = [tiny_pair.generate(p, **GREEDY).text for p in ("hello", "other")]

    async def read(prompt: str) -> str:
        return "".join([step.text async for step in tiny_pair.astream(prompt, **GREEDY)])

    async def both() -> list[str]:
        return await asyncio.gather(read("hello"), read("other"))

    assert asyncio.run(both()) == expected


# Memory and silence


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_close_returns_the_memory():
    def once() -> int:
        with load(n_threads=1) as pair:
            pair.generate("What is the symbol of tungsten?", **GREEDY)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    for _ in range(3):
        begun = once()
    ended = max(once() for _ in range(10))
    # A leaked pair would be 15 MB of weights and contexts each time.
    assert ended - begun < 10 << 20


ASK = """
import colm_edge
with colm_edge.load(n_threads=1) as pair:
    assert pair.generate("What is the symbol of tungsten?", temperature=0).text
"""


def test_nothing_is_written_to_stdout_or_stderr(capfd):
    exec(ASK)
    assert capfd.readouterr() == ("", "")
    # Without pytest's log handlers, and including the import.
    subprocess.run([sys.executable, "-c", ASK], check=True)
    assert capfd.readouterr() == ("", "")
