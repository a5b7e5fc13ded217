"""What the official clients of each API send, and what they do with the answer."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from serving import serving

from colm_edge.decode.step import Step
from colm_edge.errors import ColmError, ModelError
from colm_edge.llama.chat_template import ChatTemplate
from colm_edge.pair import load
from colm_edge.serve import chat, messages, responses
from colm_edge.serve.dialogue import Conversation, Dialogue, finish_of
from colm_edge.serve.errors import refusal_of
from colm_edge.serve.messages import Message
from colm_edge.serve.ollama import _line
from colm_edge.serve.parts import Call, Reply, Splitter, reply_of
from colm_edge.serve.streaming import EventStream, sse
from colm_edge.serve.tools import GENERIC, HERMES, plain_messages

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def pair(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=512) as pair:
        yield pair


@pytest.fixture(scope="module")
def url(pair):
    with serving(pair) as (url, _):
        yield url


@pytest.mark.parametrize(
    "said",
    [lambda form: {"output_config": {"format": form}}, lambda form: {"output_format": form}],
)
def test_a_schema_in_anthropics_words_is_kept_to(url, said):
    schema = {"properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form = {"type": "json_schema", "schema": {"type": "object", **schema}}
    asked = {"messages": [USER], "max_tokens": 60, "temperature": 0, **said(form)}
    answer = httpx.post(f"{url}/v1/messages", json=asked, timeout=60).json()
    assert json.loads(answer["content"][0]["text"])["a"] in (1, 2)


CALLS = {
    '{"name": "f", "arguments": {"city": "Rome"}}': True,
    '{"name": "f", "arguments": {"city": "Ro': False,
    '{"name": "f", "arguments": {"city": "Rome"}}\n{"name": "f", "arguments": {"ci': False,
    '{"name": "f", "arguments": {}} {"name": "f", "arguments": {"a": 1}}': True,
    '{"name": "f", "argum': False,
    '{"name": "f", "arguments": {"a": 1}}\n{"name": "f", "argum': False,
    '{"name": "f", "arguments": {"a": 1}}\nI used {a: 1}.': True,
    "words": False,
}


@pytest.mark.parametrize("text", CALLS)
def test_an_answer_is_a_call_if_all_its_calls_are_whole(pair, text):
    """A stop text may cut one; nobody should run it with what is left."""
    splitter = Splitter(GENERIC, ["f"], thinks=False, thinking=False)
    reply = reply_of(splitter, text)
    assert reply.is_call == splitter.is_call == CALLS[text]
    answer = pair.generate("hello", max_tokens=400, stop=("e", "a", "i", " ", ".", "o", "t"))
    assert answer.finish_reason == "stop"
    finish = "tool_calls" if CALLS[text] else "stop"
    assert finish_of(answer, is_call=reply.is_call) == finish


def test_a_call_that_was_cut_is_none_of_ollamas(url, monkeypatch):
    """Its client takes nothing but an object for arguments, and would lose the whole answer."""
    calls = [Call("1", "f", '{"a": 1}'), Call("2", "f", '{"a": '), Call("3", "f", "")]
    monkeypatch.setattr(Dialogue, "reply", lambda *_: Reply("so", calls=calls))
    asked = {"messages": [USER], "stream": False, "options": {"num_predict": 2}}
    message = httpx.post(f"{url}/api/chat", json=asked, timeout=60).json()["message"]
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]


FOREIGN = [
    ("/v1/completions", {"prompt": "a"}, {"response_format": {"type": "json_object"}}),
    ("/v1/completions", {"prompt": "a"}, {"max_completion_tokens": 500}),
    ("/v1/completions", {"prompt": "a"}, {"tools": [{"type": "function"}]}),
    ("/v1/chat/completions", {"messages": [USER]}, {"echo": True}),
    ("/v1/chat/completions", {"messages": [USER]}, {"skip_special_tokens": False}),
    ("/v1/chat/completions", {"messages": [USER]}, {"chat_template": "{{ messages }}"}),
    ("/v1/responses", {"input": "a"}, {"response_format": {"type": "json_object"}}),
    ("/v1/responses", {"input": "a"}, {"top_logprobs": 3}),
    ("/v1/responses", {"input": "a"}, {"max_tokens": 0}),
    ("/v1/messages", {"messages": [USER], "max_tokens": 3}, {"json_schema": {}}),
    ("/v1/messages", {"messages": [USER], "max_tokens": 3}, {"response_format": {"a": 1}}),
    ("/api/chat", {"messages": [USER]}, {"logprobs": True}),
]


@pytest.mark.parametrize(("path", "asked", "more"), FOREIGN)
def test_what_would_change_the_answer_at_another_path_is_refused(url, path, asked, more):
    refused = httpx.post(f"{url}{path}", json={**asked, **more}, timeout=60)
    assert refused.status_code == 400
    assert next(iter(more)) in refused.text


def test_fields_that_mean_nothing_are_taken(url):
    form = {"type": "text", "json_schema": None}
    more = {"response_format": form, "tools": [], "t_max_predict_ms": -1, "samplers": []}
    asked = {"prompt": "a", "max_tokens": 1, "skip_special_tokens": True, **more}
    assert httpx.post(f"{url}/v1/completions", json=asked, timeout=60).status_code == 200


@pytest.mark.parametrize("error", [ColmError("no"), ModelError("no")])
def test_an_error_is_of_the_same_kind_in_a_stream(error):
    async def pieces():
        yield "begun"
        raise error

    async def read():
        return [piece async for piece in EventStream(pieces())._pieces]

    begun, failed = asyncio.run(read())
    assert begun == b"begun"
    told = json.loads(failed.decode().removeprefix("data: ").partition("\n")[0])
    assert told["error"] == refusal_of(error).body["error"]


def test_a_content_types_case_does_not_matter(url):
    asked = {"content": b'{"prompt": "hi"}', "headers": {"Content-Type": "Application/JSON"}}
    assert httpx.post(f"{url}/tokenize", **asked, timeout=60).status_code == 200


def test_ollamas_limit_of_zero_is_none(url):
    asked = {"prompt": "hello", "stream": False, "options": {"num_predict": 0, "temperature": 0}}
    assert httpx.post(f"{url}/api/generate", json=asked, timeout=60).json()["response"]


def test_a_tool_that_failed_is_told_so():
    result = {"type": "tool_result", "tool_use_id": "1", "content": "boom", "is_error": True}
    message = Message.model_validate({"role": "user", "content": [result]})
    assert message.as_dicts()[0]["content"] == "Error: boom"


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029", "\x1c", "\r\n", "é"])
def test_a_line_is_one_line_to_any_client(character):
    data = {"text": f"a{character}b"}
    for line in (_line(data), sse(data).removeprefix("data: ").rstrip("\n")):
        assert len(line.splitlines()) == 1
        assert json.loads(line) == data


@pytest.mark.parametrize(
    ("begun", "expected"),
    [
        ("The answer is", "hello<think>\n\n</think>\n\nThe answer is"),
        ("so</think>\nThe answer is", "hello<think>\nso</think>\nThe answer is"),
        ("", "hello<think>\n"),
    ],
)
def test_an_answer_that_goes_on_is_no_thought(pair, monkeypatch, begun, expected):
    """Where the template opens one itself."""
    text = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<think>{{ '\\n' }}"
    )
    monkeypatch.setattr(pair, "template", ChatTemplate(text, "", ""))
    talk = [USER, {"role": "assistant", "content": begun}] if begun else [USER]
    dialogue = Dialogue(pair, Conversation(talk))
    assert dialogue.text == expected
    reply = reply_of(dialogue.splitter(), " so</think>\n\nyes" if not begun else " yes")
    assert (reply.thought, reply.text) == ((" so", "yes") if not begun else ("", " yes"))


def test_thinking_is_left_out_in_each_apis_words():
    talk = {"messages": [USER], "max_tokens": 5}
    for body, effort in (
        (chat.ChatRequest(**talk, reasoning_effort="none"), "none"),
        (responses.ResponsesRequest(input="hello", reasoning={"effort": "none"}), "none"),
        (messages.MessagesRequest(**talk, thinking={"type": "disabled"}), None),
    ):
        variables = body.conversation().variables
        assert variables["enable_thinking"] is False
        assert variables.get("reasoning_effort") == effort
    low = chat.ChatRequest(**talk, reasoning_effort="low").conversation().variables
    assert low == {"reasoning_effort": "low"}
    asked = {"enable_thinking": True}
    both = chat.ChatRequest(**talk, reasoning_effort="none", chat_template_kwargs=asked)
    assert both.conversation().variables["enable_thinking"] is True
    assert messages.MessagesRequest(**talk).conversation().variables == {}


def test_turns_that_follow_each_other_are_one():
    text = {"type": "text", "text": "and now?"}
    result = {"type": "tool_result", "tool_use_id": "x", "content": "sunny"}
    use = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
    body = messages.MessagesRequest(
        max_tokens=5,
        messages=[
            {"role": "user", "content": "one"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "well"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result, text]},
            {"role": "system", "content": "be brief"},
        ],
    )
    talk = list(body.conversation().messages)
    assert [m["role"] for m in talk] == ["user", "assistant", "tool", "user", "system"]
    assert talk[0]["content"] == "one\n\ntwo"
    assert talk[1]["content"] == "well"
    assert talk[1]["tool_calls"][0]["function"]["name"] == "f"
    plain = plain_messages(talk[:4], ())
    assert [m["role"] for m in plain] == ["user", "assistant", "user"]
    assert plain[-1]["content"] == "f returned: sunny\nand now?"


def test_what_was_thought_stays_between_the_calls_of_a_response():
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}]}
    call = {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "x", "output": "1"}
    body = responses.ResponsesRequest(input=[USER, thought, call, result, thought, call, result])
    talk = body.conversation().messages
    assert [m["role"] for m in talk] == ["user", *["assistant", "tool"] * 2]
    assert [m.get("reasoning_content") for m in talk] == [None, "so", None, "so", None]
    empty = responses.ResponsesRequest(input=[USER, {"type": "reasoning", "summary": []}, call])
    assert empty.conversation().messages[1].get("reasoning_content") is None


def test_the_tokens_of_thoughts_are_counted():
    splitter = Splitter(HERMES, [], thinks=True, thinking=False)
    for text in ("<think>", " so", " it is", "</think>", "\n\n", "yes", "."):
        splitter.read(Step(0, "base", 0.0, 0.0, text))
    assert splitter.n_thought == 4
    inside = Splitter(HERMES, [], thinks=True, thinking=True)
    for text in ("so", "</think>", "yes"):
        inside.read(Step(0, "base", 0.0, 0.0, text))
    assert inside.n_thought == 2
