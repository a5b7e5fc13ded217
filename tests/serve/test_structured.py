"""Answers in a form that the request gives: JSON, a schema, a grammar."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from pydantic import BaseModel

CHAT = [{"role": "user", "content": "hello"}]


RECORD = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
}


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": RECORD}}},
        {"response_format": {"type": "json_object", "schema": RECORD}},
        {"json_schema": RECORD},
    ],
)
@pytest.mark.parametrize("colm", [{"threshold": 0.5}, {"threshold": 0.5, "review": 1.0}])
def test_an_answer_is_json_of_the_schema(url, asked, colm):
    body = {"messages": CHAT, "max_tokens": 120, "seed": 3, "colm": colm, **asked}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    found = json.loads(answer["choices"][0]["message"]["content"])
    assert set(found) == {"n", "ok"}
    assert isinstance(found["n"], int)
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_openais_client_parses_into_a_class(url):
    class Record(BaseModel):
        n: int
        ok: bool

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    completion = client.chat.completions.parse(
        model="any", messages=CHAT, response_format=Record, max_tokens=120, seed=1
    )
    assert isinstance(completion.choices[0].message.parsed, Record)


@pytest.mark.parametrize(
    "asked",
    [
        {"json_schema": {}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object", "schema": {}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    ],
)
def test_an_empty_schema_is_any_object(url, asked):
    body = {"messages": CHAT, "max_tokens": 9, **asked}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_a_grammar_is_taken_as_it_is(url):
    body = {"prompt": "hello", "max_tokens": 9, "grammar": 'root ::= "yes" | "no"'}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] in ("yes", "no")
