"""The events of answers, and how they are counted, with no HTTP between."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest
from serving import GREEDY, wait_for

from colm_edge.decode.loop import Step
from colm_edge.errors import ColmError
from colm_edge.llama.context import Context
from colm_edge.options import ServerOptions
from colm_edge.pair import load
from colm_edge.serve.answers import Began, Ended, Job, Server
from colm_edge.serve.errors import RefusalError
from colm_edge.slots import SharedTimeline


@pytest.fixture(scope="module")
def pair(tiny):
    with load(
        tiny["endless"],
        tiny["endless"],
        "margin",
        n_threads=1,
        n_ctx=256,
        defaults=GREEDY.with_changes(threshold=0.0),
    ) as pair:
        yield pair


@pytest.fixture
def server(pair):
    server = Server(pair, ServerOptions(n_slots=2, queue=1), "tiny")
    yield server
    server.close()


def job(server: Server, prompt: str = "hello", max_tokens: int = 5, **more) -> Job:
    tokens = server.pair.base.tokenize(prompt)
    return Job(tokens, server.pair.defaults.with_changes(max_tokens=max_tokens), **more)


def value(server: Server, name: str, **labels: str) -> float:
    return server.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def gate(monkeypatch):
    """Answers go on while it is set."""
    gate, sync = threading.Event(), SharedTimeline.sync
    gate.set()

    def waiting(*args, **more):
        assert gate.wait(60)
        return sync(*args, **more)

    monkeypatch.setattr(SharedTimeline, "sync", waiting)
    yield gate
    gate.set()


async def until(condition) -> None:
    await asyncio.to_thread(wait_for, condition)


async def read(server: Server, jobs: list[Job]) -> list[tuple[int, object]]:
    async with aclosing(server.stream(jobs)) as events:
        return [event async for event in events]


def test_each_answer_begins_takes_steps_and_ends(server):
    jobs = [job(server, "hello"), job(server, "other", 8, reads_from=1), job(server, "x", 3)]
    events = asyncio.run(read(server, jobs))
    for i, expected in enumerate(jobs):
        began, *steps, ended = [event for j, event in events if j == i]
        assert isinstance(began, Began)
        assert all(isinstance(step, Step) for step in steps)
        assert isinstance(ended, Ended)
        assert began.prompt_tokens == expected.tokens
        assert len(began.prompt_steps) == (len(expected.tokens) - 1 if i == 1 else 0)
        assert (ended.began, ended.answer.steps) == (began, steps)
        assert ended.answer.finish_reason == "length"
        alone = list(server.pair.stream_tokens(expected.tokens, expected.options))
        assert [step.token for step in steps] == [step.token for step in alone]
    assert server.n_busy == server.n_waiting == 0


def test_whole_answers_come_in_the_order_of_their_jobs(server):
    jobs = [job(server, "hello", 9), job(server, "other", 1)]
    ended = asyncio.run(server.generate(jobs))
    assert [e.answer.prompt_tokens for e in ended] == [j.tokens for j in jobs]
    assert [len(e.answer.steps) for e in ended] == [9, 1]


def test_an_abandoned_answer_has_its_expert_calls_counted(server):
    async def leave() -> None:
        async with aclosing(server.stream([job(server, max_tokens=200)])) as events:
            async for _, event in events:
                if isinstance(event, Step):
                    break
        await until(lambda: server.n_busy == 0)

    asyncio.run(leave())
    n_tokens = value(server, "colm_tokens_total", source="expert")
    # The expert writes every token here; the last one may have been evaluated for nobody.
    assert 1 <= n_tokens <= value(server, "colm_expert_calls_total") <= n_tokens + 1 < 200


def test_an_answer_that_fails_is_counted_and_raised(server, pair, monkeypatch):
    decode, n_decoded = Context.decode, 0

    def broken(*args, **more) -> None:
        nonlocal n_decoded
        n_decoded += 1
        if n_decoded > 4:  # of the expert, which is alone
            raise ColmError("out of order")
        decode(*args, **more)

    monkeypatch.setattr(Context, "decode", broken)
    with pytest.raises(ColmError, match="out of order"):
        asyncio.run(server.generate([job(server, max_tokens=50)]))
    assert value(server, "colm_expert_calls_total") == 4
    assert server.n_busy == 0


def test_requests_wait_for_slots_and_are_counted_once(server, gate):
    async def fill() -> None:
        jobs = [job(server, text, 100) for text in ("one", "two", "three")]
        gate.clear()
        async with aclosing(server.stream(jobs)) as events:
            await anext(events)
            # The third answer waits, but the request does not.
            await until(lambda: server.n_busy == 2)
            assert server.n_waiting == 0
            server.check_queue("a client")
            server.leave("a client")
            other = asyncio.ensure_future(server.generate([job(server), job(server)]))
            await until(lambda: server.n_waiting == 1)
            assert value(server, "colm_busy_slots") == 2
            assert value(server, "colm_waiting_requests") == 1
            with pytest.raises(RefusalError, match="1 requests are already waiting"):
                server.check_queue("a client")
            server.leave("a client")
            other.cancel()
            gate.set()
            await asyncio.wait([other])
        assert server.n_waiting == 0  # the one that waited is gone at once
        server.check_queue("a client")
        server.leave("a client")
        await until(lambda: server.n_busy == 0)

    asyncio.run(fill())
    assert len(asyncio.run(server.generate([job(server)]))[0].answer.steps) == 5


def test_a_slot_goes_to_who_has_the_fewest(server, gate):
    """One connection's many answers do not keep another's waiting."""
    ended: list[str] = []

    async def ask(owner: str, n: int) -> None:
        async with aclosing(server.stream([job(server, owner, 30)] * n, owner)) as events:
            async for _, event in events:
                if isinstance(event, Ended):
                    ended.append(owner)

    async def go() -> None:
        gate.clear()
        asked = asyncio.gather(ask("many", 8), ask("few", 1), ask("other", 1))
        await until(lambda: (server.n_busy, server.n_waiting) == (2, 2))
        gate.set()
        await asked

    asyncio.run(go())
    assert sorted(ended) == ["few", *["many"] * 8, "other"]
    # Two of the many have the slots first; then each of the others has its turn.
    assert {"few", "other"} <= set(ended[:5])


def test_a_server_that_stops_ends_its_answers_with_an_error(server):
    async def go() -> None:
        async with aclosing(server.stream([job(server, max_tokens=200)])) as events:
            await anext(events)
            server.stop(0)
            with pytest.raises(RefusalError, match="the server was stopped"):
                async for _ in events:
                    pass
        await until(lambda: server.n_busy == 0)

    asyncio.run(go())


def test_the_first_token_is_timed_from_the_requests_arrival(server):
    """The time that it waits for a slot is part of it; what the prompt holds is counted."""

    async def go() -> None:
        await server.generate([job(server, text, 20) for text in ("one", "two", "three")])

    asyncio.run(go())
    assert value(server, "colm_first_token_seconds_count") == 3
    assert value(server, "colm_answer_seconds_count") == 3
    first, whole = (value(server, f"colm_{x}_seconds_sum") for x in ("first_token", "answer"))
    assert 0 < first <= whole
    n = sum(len(server.pair.base.tokenize(text)) for text in ("one", "two", "three"))
    assert value(server, "colm_prompt_tokens_total") == n


def test_an_answer_that_is_cancelled_while_it_waits_never_begins(server, pair, monkeypatch):
    begun: list[list[int]] = []
    stream_tokens = pair.stream_tokens

    def noted(tokens, *more):
        begun.append(tokens)
        return stream_tokens(tokens, *more)

    monkeypatch.setattr(pair, "stream_tokens", noted)

    async def go() -> None:
        under_way, waits = [job(server, "one", 200), job(server, "two", 200)], job(server, "three")
        async with aclosing(server.stream(under_way)) as events:
            await anext(events)
            waiting = asyncio.ensure_future(server.generate([waits]))
            await until(lambda: server.n_waiting == 1)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert server.n_waiting == 0
        await until(lambda: server.n_busy == 0)
        await server.generate([job(server, "last", 1)])
        assert waits.tokens not in begun
        assert len(begun) == 3

    asyncio.run(go())
