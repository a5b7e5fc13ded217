"""Every field that a request may have changes its answer, or how it is told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving import GREEDY
from starlette.testclient import TestClient

from colm_edge.options import ServerOptions
from colm_edge.pair import load
from colm_edge.serve import chat, messages, ollama, requests, responses
from colm_edge.serve.answers import Server
from colm_edge.serve.app import create_app

USER = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
DRAWN = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
# Of OpenAI's API, with the fields that each needs beside it.
SAMPLED: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (2.0, {"seed": 1}),
    "top_k": (1, DRAWN),
    "top_p": (0.0, DRAWN),
    "min_p": (1.0, DRAWN),
    "repeat_penalty": (1e6, {"max_tokens": 48}),
    "presence_penalty": (2.0, {"max_tokens": 24}),
    "frequency_penalty": (2.0, {"max_tokens": 24}),
    "grammar": ('root ::= "yes"', {}),
    "seed": (2, DRAWN),
    "stream": (True, {}),
    "colm": ({"threshold": 1.0}, {}),
}
OPENAI = SAMPLED | {
    "max_tokens": (2, {}),
    "stop": (["e", "a", "i", " ", "."], {"max_tokens": 24}),
    "n": (2, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "json_schema": ({"type": "boolean"}, {}),
}
THE_CHAT = {
    "messages": ([{"role": "user", "content": "other words"}], {}),
    "tools": (TOOLS, {}),
    "tool_choice": ("required", {"tools": TOOLS}),
    "chat_template_kwargs": ({"messages": 1}, {}),
}
LINE = {"stream": False, "options": {"num_predict": 5}}  # in Ollama's words
PATHS: dict[str, tuple[Any, dict[str, Any], dict[str, tuple[Any, dict[str, Any]]]]] = {
    "/v1/chat/completions": (chat.ChatRequest, {"messages": USER, "max_tokens": 5}, {
        **OPENAI, **THE_CHAT,
        "max_completion_tokens": (2, {}),
        "response_format": ({"type": "json_object"}, {}),
        "logprobs": (True, {}),
        "top_logprobs": (2, {"logprobs": True}),
    }),
    "/v1/completions": (requests.CompletionRequest, {"prompt": "hello", "max_tokens": 5}, {
        **OPENAI,
        "prompt": ("other words", {}),
        "logprobs": (2, {}),
        "prompt_logprobs": (1, {}),
        "prompt_logprobs_from": (3, {"prompt_logprobs": 1}),
        "echo": (True, {}),
        "return_tokens_as_token_ids": (True, {"logprobs": 1}),
        "special": (True, {"prompt": "<|end|>"}),
        "with_pieces": (True, {"logprobs": 1}),
    }),
    "/v1/messages": (messages.MessagesRequest, {"messages": USER, "max_tokens": 5}, {
        **SAMPLED, **THE_CHAT,
        "tools": ([{"name": "f", "input_schema": {"type": "object"}}], {}),
        "tool_choice": ({"type": "any"}, {"tools": [{"name": "f", "input_schema": {}}]}),
        "max_tokens": (2, {}),
        "system": ("Be brief.", {}),
        "output_config": ({"format": {"type": "json_schema", "schema": {"type": "boolean"}}}, {}),
        "output_format": ({"type": "json_schema", "schema": {"type": "boolean"}}, {}),
        "stop_sequences": (["e", "a", "i", " ", "."], {"max_tokens": 24}),
        "stop": ("e", {}),
        "n": (2, {}),
        "json_schema": ({"type": "boolean"}, {}),
    }),
    "/v1/responses": (responses.ResponsesRequest, {"input": "hello", "max_output_tokens": 5}, {
        **SAMPLED,
        "chat_template_kwargs": ({"messages": 1}, {}),
        "tools": ([{"type": "function", "name": "f"}], {}),
        "tool_choice": ("required", {"tools": [{"type": "function", "name": "f"}]}),
        "input": ("other words", {}),
        "instructions": ("Be brief.", {}),
        "max_output_tokens": (2, {}),
        "max_tokens": (2, {}),
        "repeat_penalty": (1e6, {"max_output_tokens": 48}),
        "presence_penalty": (2.0, {"max_output_tokens": 24}),
        "frequency_penalty": (2.0, {"max_output_tokens": 24}),
        "text": ({"format": {"type": "json_object"}}, {}),
        "stop": (["e", "a", "i", " ", "."], {"max_output_tokens": 24}),
        "n": (2, {}),
        "json_schema": ({"type": "boolean"}, {}),
    }),
    "/api/chat": (ollama.ChatRequest, {"messages": USER, **LINE}, {
        "messages": ([{"role": "user", "content": "other words"}], {}),
        "tools": (TOOLS, {}),
        "stream": (True, {}),
        "format": ("json", {}),
        "options": ({"num_predict": 2}, {}),
        "colm": ({"threshold": 1.0}, {}),
    }),
    "/api/generate": (ollama.GenerateRequest, {"prompt": "hello", **LINE}, {
        "prompt": ("other words", {}),
        "system": ("Be brief.", {}),
        "raw": (True, {}),
        "stream": (True, {}),
        "format": ("json", {}),
        "options": ({"num_predict": 2}, {}),
        "colm": ({"threshold": 1.0}, {}),
    }),
}  # fmt: skip
# One pair is served, whatever its clients call it. What the others change is shown where tools
# and templates are tested; Responses have no other stream than theirs.
ELSEWHERE = {
    "model", "parallel_tool_calls", "stream_options", "think", "thinking", "reasoning",
    "reasoning_effort",
}  # fmt: skip
# What changes from one answer to the next.
CHANGING = re.compile(
    r'"(id|item_id|created\w*|\w+_duration|tokens_per_second|expert_\w+)": ?("[^"]*"|[\d.e+-]+)'
)


@pytest.fixture(scope="module")
def client(tiny) -> Iterator[TestClient]:
    files = tiny["template"], tiny["expert"]
    with load(*files, "margin", n_threads=1, n_ctx=1536, defaults=GREEDY) as pair:
        server = Server(pair, ServerOptions(n_slots=1), "tiny")
        with TestClient(create_app(server), base_url="http://localhost") as client:
            yield client


def told(client: TestClient, path: str, body: dict[str, Any]) -> str:
    """Return what a request is answered, without what changes each time."""
    response = client.post(path, json=body)
    assert response.status_code in (200, 400), response.text
    return CHANGING.sub("", response.text)


@pytest.mark.parametrize("path", PATHS)
def test_every_field_has_a_line(path):
    kind, _, fields = PATHS[path]
    assert kind.model_fields.keys() - ELSEWHERE == fields.keys() - ELSEWHERE


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, (_, _, fields) in PATHS.items() for name in fields]
)
def test_a_field_changes_what_is_told(client, path, name):
    _, base, fields = PATHS[path]
    value, beside = fields[name]
    before, again = (told(client, path, {**base, **beside}) for _ in range(2))
    assert before == again
    changed = told(client, path, {**base, **beside, name: value})
    assert changed != before


@pytest.mark.parametrize("name", ["trace", "provisional"])
@pytest.mark.parametrize("path", PATHS)
def test_what_openais_completions_alone_can_tell_is_refused_elsewhere(client, path, name):
    _, base, _ = PATHS[path]
    response = client.post(path, json={**base, "colm": {name: True}})
    is_openais = path.endswith("/completions")
    assert response.status_code == (200 if is_openais else 400)
    assert is_openais or f"{name} " in json.dumps(response.json())
