"""OpenAI's Responses API, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import openai
import pytest
from pydantic import BaseModel

from colm_edge.serve.dialogue import Conversation, Dialogue
from colm_edge.serve.errors import RefusalError
from colm_edge.serve.parts import Splitter
from colm_edge.serve.responses import STATEFUL, Head, Output, ResponsesRequest, _events
from colm_edge.serve.streaming import EventStream
from colm_edge.serve.tools import GENERIC


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def chat_text(client, messages, n: int) -> str:
    chat = client.chat.completions.create(model="any", messages=messages, max_tokens=n)
    return chat.choices[0].message.content


def test_the_text_is_that_of_a_chat(client):
    response = client.responses.create(
        model="any", instructions="be short", input="hello", max_output_tokens=12
    )
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hello"},
    ]
    assert response.output_text == chat_text(client, messages, 12)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 12
    assert response.usage.input_tokens > 0


def test_a_conversation_may_be_given(client):
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and now"},
    ]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}, *messages[1:]]
    expected = chat_text(client, messages, 9)
    for given in (messages, parts):
        response = client.responses.create(model="any", input=given, max_output_tokens=9)
        assert response.output_text == expected


def test_a_stream_has_openais_events_in_order(client):
    whole = client.responses.create(model="any", input="hello", max_output_tokens=12)
    with client.responses.stream(model="any", input="hello", max_output_tokens=12) as stream:
        events = list(stream)
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text


def test_a_class_is_parsed(client):
    class Record(BaseModel):
        n: int
        ok: bool

    response = client.responses.parse(
        model="any", input="hello", text_format=Record, max_output_tokens=120
    )
    assert isinstance(response.output_parsed, Record)
    assert response.status == "completed"


def test_json_alone_is_an_object(url):
    body = {"input": "hello", "max_output_tokens": 200, "text": {"format": {"type": "json_object"}}}
    answer = httpx.post(f"{url}/v1/responses", json=body, timeout=60).json()
    text = answer["output"][0]["content"][0]["text"]
    assert text.startswith("{")
    if answer["status"] == "completed":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_would_need_state_is_refused(url, name):
    body = {"input": "hello", name: "x"}
    refused = httpx.post(f"{url}/v1/responses", json=body, timeout=60)
    assert refused.status_code == 400
    assert f"{name} is not supported" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "x", "n": 2}, "n:"),
        ({"input": [{"role": "king", "content": "x"}]}, "input"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "schema is missing"),
        ({"input": "word " * 300}, "the context holds 256"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(url, body, words):
    refused = httpx.post(f"{url}/v1/responses", json=body, timeout=60)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]


def test_the_side_object_counts_the_experts_work(url):
    body = {"input": "hello", "max_output_tokens": 9, "colm": {"threshold": 0}}
    answer = httpx.post(f"{url}/v1/responses", json=body, timeout=60).json()
    assert answer["colm"]["n_deferred"] == 9


TOOL = {
    "type": "function",
    "name": "pick",
    "parameters": {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
    },
}


def test_a_tool_is_called_and_told_in_a_stream_too(roomy):
    client = openai.OpenAI(base_url=f"{roomy}/v1", api_key="any", max_retries=0)
    asked = {"input": "hello", "tools": [TOOL], "tool_choice": "required", "max_output_tokens": 90}
    asked["parallel_tool_calls"] = False
    (call,) = client.responses.create(model="any", **asked).output
    assert (call.type, call.name, call.status) == ("function_call", "pick", "completed")
    assert json.loads(call.arguments)["n"] in (1, 2)
    with client.responses.stream(model="any", **asked) as stream:
        events = list(stream)
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (streamed,) = events[-1].response.output
    assert streamed.arguments == call.arguments


def test_a_call_that_a_stop_text_cuts_is_incomplete():
    """A client would run half of it."""
    ended = SimpleNamespace(answer=SimpleNamespace(finish_reason="stop"))
    whole = 'Rome"}}'
    for rest, status in (
        (whole, "completed"), ("Ro", "incomplete"), (whole + '\n{"name": "f", "ar', "completed"),
    ):  # fmt: skip
        output, splitter = Output(), Splitter(GENERIC, ["f"], thinks=False, thinking=False)
        text = '{"name": "f", "arguments": {"city": "' + rest
        for part in [*splitter.feed(text), *splitter.end()]:
            list(output.add(part))
        list(output.end(ended, in_call=splitter.in_call))
        assert output.items[-1]["status"] == status


def test_earlier_calls_and_what_they_returned_are_told(url, pair):
    """As a chat's messages of the same conversation are."""
    call = {"name": "pick", "arguments": '{"n": 1}'}
    items = [
        {"role": "user", "content": "hello"},
        {"type": "function_call", "call_id": "a", **call},
        {"type": "function_call_output", "call_id": "a", "output": "one"},
    ]
    messages = [
        items[0],
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
    ]
    body = {"input": items, "max_output_tokens": 9}
    response = httpx.post(f"{url}/v1/responses", json=body, timeout=60).json()
    chat = {"messages": messages, "max_tokens": 9}
    expected = httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=60).json()
    assert response["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    text = response["output"][0]["content"][0]["text"]
    assert text == expected["choices"][0]["message"]["content"]


def test_a_stream_that_fails_ends_with_an_error_of_its_own_kind(tiny_pair):
    """Clients look for a type, and [DONE] is none."""

    async def failing():
        raise RefusalError(503, "the server is ending", code="ending")
        yield

    async def read(pieces: EventStream) -> list[str]:
        return [bytes(piece).decode() async for piece in pieces.body_iterator]

    head = Head("tiny", ResponsesRequest(input="hello"), 3)
    dialogue = Dialogue(tiny_pair, Conversation([{"role": "user", "content": "hello"}]))
    events = EventStream(_events(failing(), head, dialogue), failed=head.failed)
    *begun, last = asyncio.run(read(events))
    assert len(begun) == 2
    kind, data = last.rstrip("\n").split("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error", "sequence_number": 2, "code": "ending",
        "message": "the server is ending", "param": None,
    }  # fmt: skip
