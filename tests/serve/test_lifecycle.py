"""Answers at once, a full queue, clients that leave, memory given back, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace

import httpx
import pytest
from serving import GREEDY, metrics_of, sent, serving, wait_for

from colm_edge.cli.terminal import Chat
from colm_edge.llama import measure
from colm_edge.llama.context import Context
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.slots import Slots


@pytest.fixture(scope="module")
def endless(tiny):
    with load(
        tiny["endless"], tiny["endless"], "margin", n_threads=1, n_ctx=512, defaults=GREEDY
    ) as pair:
        yield pair


@pytest.fixture
def slow(endless, monkeypatch) -> None:
    """Let an answer of the endless pair take seconds, as a real model's does."""
    decode = Context.decode

    def slowly(*args, **more) -> None:
        time.sleep(0.005)
        decode(*args, **more)

    monkeypatch.setattr(Context, "decode", slowly)


def parts_at_a_near_tie(one, other) -> bool:
    """Whether two texts are the same, or first differ where the two likeliest tokens are about as
    likely: batches of other sizes differ in the last bits."""
    places = range(min(len(one["tokens"]), len(other["tokens"])))
    at = next((i for i in places if one["tokens"][i] != other["tokens"][i]), None)
    if at is None:
        return len(one["tokens"]) == len(other["tokens"])
    best, second = sorted(one["top_logprobs"][at].values(), reverse=True)[:2]
    return best - second < 0.02


def test_answers_at_once_share_batches(endless):
    """Four streams together: the same text each, from fewer batches."""
    n = 400  # long enough that a late start does not matter
    with serving(endless, n_slots=4) as (url, _):
        prompts = ["one", "two and", "three or so", "four"]

        def ask(prompt):
            body = {"prompt": prompt, "max_tokens": n, "logprobs": 5}
            done = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
            return done["choices"][0]["logprobs"]

        before = endless.base_session.account.n_calls
        alone = [ask(prompt) for prompt in prompts]
        calls_alone = endless.base_session.account.n_calls - before
        results = [None] * 4
        threads = [
            threading.Thread(target=lambda i=i: results.__setitem__(i, ask(prompts[i])))
            for i in range(4)
        ]
        before = endless.base_session.account.n_calls
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for one, other in zip(alone, results, strict=True):
            assert parts_at_a_near_tie(one, other)
        assert endless.base_session.account.n_calls - before < 0.8 * calls_alone


def test_a_full_queue_refuses_with_retry_after(endless, slow):
    with serving(endless, n_slots=1, queue=0) as (url, server):
        body = {"prompt": "hello", "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=60)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "overloaded"
            assert server.n_busy == 1
        wait_for(lambda: server.n_busy == 0)  # the reader left
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=60).is_success


@pytest.mark.parametrize("streams", [False, True])
def test_a_burst_does_not_overfill_the_queue(endless, monkeypatch, streams):
    """Requests that come at once, none of which waits yet when the others are let in."""
    decode, gate = Context.decode, threading.Event()

    def held(*args, **more) -> None:
        assert gate.wait(60)
        decode(*args, **more)

    monkeypatch.setattr(Context, "decode", held)
    gate.set()
    first = {"prompt": "hello", "max_tokens": 480, "stream": True}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": streams}

    async def burst(url: str, server) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            async with client.stream("POST", "/v1/completions", json=first) as response:
                await anext(response.aiter_lines())
                gate.clear()  # it keeps the slot
                asked = [
                    asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
                    for _ in range(12)
                ]
                await asyncio.to_thread(wait_for, lambda: sum(a.done() for a in asked) >= 10)
                await asyncio.to_thread(wait_for, lambda: server.n_waiting == 2)
                gate.set()
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    with serving(endless, n_slots=1, queue=2) as (url, server):
        codes = asyncio.run(burst(url, server))
        assert (codes.count(200), codes.count(503)) == (2, 10)
        wait_for(lambda: server.n_busy == 0)
        wrong = {"messages": [{"role": "x", "content": "y", "tool_calls": 1}], "max_tokens": 3}
        for _ in range(4):  # a refused one leaves its place
            assert httpx.post(f"{url}/v1/chat/completions", json=wrong).status_code == 400
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200


def test_a_client_that_goes_away_frees_its_slot(endless, slow):
    with serving(endless, n_slots=1) as (url, server):
        body = {"prompt": "hello", "max_tokens": 480}

        def leave_a_stream():
            streamed = body | {"stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=streamed, timeout=60) as r:
                next(r.iter_lines())

        def leave_an_answer():
            with sent(url, json.dumps(body).encode()):
                wait_for(lambda: server.n_busy == 1)

        for leave in (leave_a_stream, leave_an_answer):
            evaluated = endless.base_session.account.n_evaluated
            leave()
            wait_for(lambda: server.n_busy == 0)
            assert endless.base_session.account.n_evaluated - evaluated < 470


def test_the_expert_calls_of_a_client_that_goes_away_are_counted(endless, slow):
    body = {"prompt": "hello", "max_tokens": 480, "colm": {"threshold": 0}}
    with serving(endless, n_slots=2) as (url, server):
        for n in (1, 2):
            streamed = body | {"stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=streamed, timeout=60) as r:
                next(r.iter_lines())
            wait_for(lambda: server.n_busy == 0)
            values = metrics_of(url)
            written = values['colm_tokens_total{source="expert"}']
            assert written >= n
            # Each time the expert may evaluate one token more, which nobody reads.
            assert written <= values["colm_expert_calls_total"] <= written + n
        with sent(url, json.dumps(body).encode()):
            called = endless.expert_session.account.n_evaluated
            wait_for(lambda: endless.expert_session.account.n_evaluated > called)
        wait_for(lambda: server.n_busy == 0)
        assert metrics_of(url)["colm_expert_calls_total"] > values["colm_expert_calls_total"]


def test_what_was_measured_in_a_hurry_is_measured_while_nobody_asks(tiny, monkeypatch, tmp_path):
    """A single slot plans by what decodes cost."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("colm_edge.serve.answers.IDLE", 0.2)
    with load(tiny["template"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        sessions = pair.base_session, pair.expert_session

        def are_hasty() -> list[bool]:
            kept = [measure._kept(session) for session in sessions]
            return [one[1] for one in kept if one is not None]

        with serving(pair, n_slots=1) as (url, _):
            assert are_hasty() == []
            body = {"prompt": "hello", "max_tokens": 8, "colm": {"defer_rate": 0.5}}
            httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
            wait_for(lambda: are_hasty() == [False, False])
            again = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert again.status_code == 200


def test_a_chat_measures_while_somebody_types(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with load(
        tiny["template"], tiny["expert"], "margin", n_threads=1, n_ctx=128, defaults=GREEDY
    ) as pair:

        def is_hasty() -> bool:
            kept = measure._kept(pair.base_session)
            return kept is None or kept[1]

        def typed(prompt: str) -> str:
            if not pair.base_session.account.n_evaluated:
                return "hello"
            assert is_hasty()
            wait_for(lambda: not is_hasty())
            raise EOFError

        monkeypatch.setattr("builtins.input", typed)
        Chat(pair).loop()
    assert "measuring base" not in capsys.readouterr().out


def test_an_idle_experts_memory_is_given_back(tiny):
    always = replace(GREEDY, threshold=0.0)
    files = tiny["template"], tiny["expert"]
    with (
        load(*files, "margin", n_threads=1, n_ctx=128, defaults=always) as pair,
        serving(pair, expert_idle_unload=0.2) as (url, _),
    ):
        body = {"prompt": "hello", "max_tokens": 3}
        first = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        wait_for(lambda: not pair.expert_is_loaded)
        again = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert again["choices"] == first["choices"]


def test_a_stream_under_way_ends_before_the_server_does(endless, slow):
    """A server that is stopped while a stream is being written completes the stream."""
    body = {"prompt": "hello", "max_tokens": 300, "stream": True}
    rest: list[str] = []
    with httpx.Client(timeout=60) as client:
        with serving(endless, n_slots=1) as (url, server):
            request = httpx.Request("POST", f"{url}/v1/completions", json=body)
            lines = client.send(request, stream=True).iter_lines()
            next(lines)
            assert server.n_busy == 1
            reading = threading.Thread(target=lambda: rest.extend(line for line in lines if line))
            reading.start()
        reading.join(60)
    assert rest[-1] == "data: [DONE]"
    assert len(rest) > 290


def test_one_slot_is_the_pairs_own_sessions(tiny):
    """So the fast schedule prices, and the answer's own thread measures, what is evaluated."""
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        slots = Slots(pair, 1)
        with slots.take([1]) as timelines:
            assert timelines is None
            assert list(pair.stream_tokens([1, 2], Options(max_tokens=3), timelines))
        assert pair.base_session.created
        slots.close()


def test_several_slots_share_one_context_of_the_base(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        slots = Slots(pair, 2)
        slots.open()
        assert slots.base.context.created
        assert not pair.base_session.created
        slots.close()
