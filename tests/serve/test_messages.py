"""Anthropic's Messages API, by plain HTTP; tests/serve/test_clients.py has Anthropic's client."""

from __future__ import annotations

import json

import httpx
import jsonschema
import pytest

from colm_edge.serve.errors import RefusalError, anthropic

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
TOOLS = [{"name": "pick", "description": "d", "input_schema": SCHEMA}]
ASKED = {"model": "any", "max_tokens": 12, "messages": [{"role": "user", "content": "hello"}]}


def post(url: str, path: str = "/v1/messages", **more) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={**ASKED, **more}, timeout=60)


def events_of(url: str, **more) -> list[dict]:
    body = {**ASKED, **more, "stream": True}
    with httpx.stream("POST", f"{url}/v1/messages", json=body, timeout=60) as response:
        text = "".join(response.iter_text())
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_an_empty_answer_is_an_empty_text_streamed_or_not(url):
    assert post(url, max_tokens=0).json()["content"] == [{"type": "text", "text": ""}]
    started = [e for e in events_of(url, max_tokens=0) if e["type"] == "content_block_start"]
    assert [e["content_block"] for e in started] == [{"type": "text", "text": ""}]


def test_the_text_is_that_of_a_chat(url):
    given = {"messages": ASKED["messages"], "max_tokens": 12}
    system = [{"role": "system", "content": "be short"}]
    given["messages"] = system + given["messages"]
    chat = httpx.post(f"{url}/v1/chat/completions", json=given, timeout=60).json()
    for asked in ("be short", [{"type": "text", "text": "be short"}]):
        message = post(url, system=asked).json()
        text = chat["choices"][0]["message"]["content"]
        assert message["content"] == [{"type": "text", "text": text}]
        assert (message["type"], message["role"]) == ("message", "assistant")
        assert message["stop_reason"] == "max_tokens"
        n = chat["usage"]["prompt_tokens"]
        assert message["usage"] == {"input_tokens": n, "output_tokens": 12}
        counted = post(url, "/v1/messages/count_tokens", system=asked).json()
        assert counted == {"input_tokens": n}


def test_a_stream_has_anthropics_events_in_order(url):
    whole = post(url).json()
    events = events_of(url)
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    assert kinds == [
        "message_start", "content_block_start", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"text_delta"}
    assert "".join(delta["text"] for delta in deltas) == whole["content"][0]["text"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]


def test_a_tool_is_used_and_told_in_a_stream_too(roomy):
    choice = {"type": "tool", "name": "pick", "disable_parallel_tool_use": True}
    asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 90}
    message = post(roomy, **asked).json()
    (block,) = message["content"]
    assert (block["type"], block["name"]) == ("tool_use", "pick")
    jsonschema.validate(block["input"], SCHEMA)
    assert message["stop_reason"] == "tool_use"
    events = events_of(roomy, **asked)
    begun = next(e for e in events if e["type"] == "content_block_start")
    assert begun["content_block"]["input"] == {}
    told = "".join(e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta")
    assert json.loads(told) == block["input"]


def test_earlier_uses_and_results_are_told(url):
    """As a chat's messages of the same conversation are."""
    used = {"type": "tool_use", "id": "a", "name": "pick", "input": {"n": 1}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "one"}
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": [{"type": "text", "text": "I pick."}, used]},
        {"role": "user", "content": [result, {"type": "text", "text": "and now"}]},
    ]
    call = {"id": "a", "type": "function", "function": {"name": "pick", "arguments": '{"n": 1}'}}
    chat = [
        *ASKED["messages"],
        {"role": "assistant", "content": "I pick.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "user", "content": "and now"},
    ]
    n = post(url, "/v1/messages/count_tokens", messages=messages).json()["input_tokens"]
    told = {"messages": chat, "max_tokens": 1}
    expected = httpx.post(f"{url}/v1/chat/completions", json=told, timeout=60).json()
    assert n == expected["usage"]["prompt_tokens"]


def test_a_stop_sequence_is_named(url):
    text = post(url, max_tokens=12).json()["content"][0]["text"]
    stop = text[3:5]
    message = post(url, stop_sequences=["never", stop]).json()
    assert message["stop_reason"] == "stop_sequence"
    assert message["stop_sequence"] == stop
    assert message["content"][0]["text"] == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "the context holds 256"),
    ],
)
def test_errors_are_anthropics(url, more, words):
    refused = post(url, **more)
    assert refused.status_code == 400
    told = refused.json()
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert words in told["error"]["message"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_the_types_of_errors_are_anthropics(status, kind):
    """Its clients try again by these names."""
    assert anthropic(RefusalError(status, "why"))["error"] == {"type": kind, "message": "why"}
