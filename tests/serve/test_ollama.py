"""Ollama's paths, by plain HTTP, as its clients use them."""

from __future__ import annotations

import json
import random
from copy import deepcopy

import httpx
import jsonschema
import pytest

from colm_edge.serve.ollama import ChatRequest, GenerateRequest, with_ids
from colm_edge.serve.tools import plain_messages

CHAT = [{"role": "user", "content": "hello"}]
OPTIONS = {"num_predict": 12, "temperature": 0, "num_ctx": 4096}
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
TOOL = {"type": "function", "function": {"name": "pick", "description": "d", "parameters": SCHEMA}}


def post(url: str, path: str, **body) -> dict:
    answer = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def lines_of(url: str, path: str, **body) -> list[dict]:
    with httpx.stream("POST", f"{url}{path}", json=body, timeout=60) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in response.iter_lines()]


def text_of_chat(url: str, n: int = 12) -> str:
    body = {"messages": CHAT, "max_tokens": n, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    return answer["choices"][0]["message"]["content"]


def test_a_chat_streams_unless_told_otherwise(url):
    asked = {"model": "any", "messages": CHAT, "options": OPTIONS}
    *lines, last = lines_of(url, "/api/chat", **asked)
    assert "".join(line["message"]["content"] for line in lines) == text_of_chat(url)
    assert not any(line["done"] for line in lines)
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "length", 12)
    assert last["eval_duration"] > 0
    assert last["prompt_eval_duration"] > 0
    assert last["prompt_eval_duration"] + last["eval_duration"] <= last["total_duration"]
    whole = post(url, "/api/chat", **asked, stream=False)
    assert whole["message"] == {"role": "assistant", "content": text_of_chat(url)}
    assert whole["prompt_eval_count"] == last["prompt_eval_count"] > 0


def test_a_prompt_is_one_turn_unless_raw(url, pair):
    whole = post(url, "/api/generate", prompt="hello", options=OPTIONS, stream=False)
    assert whole["response"] == text_of_chat(url)
    lines = lines_of(url, "/api/generate", prompt="hello", options=OPTIONS)
    assert "".join(line["response"] for line in lines) == whole["response"]
    raw = post(url, "/api/generate", prompt="hello", raw=True, options=OPTIONS, stream=False)
    assert raw["prompt_eval_count"] == len(pair.base.tokenize("hello"))


def test_an_empty_request_is_one_to_load(url):
    for path, body in (("/api/generate", {}), ("/api/chat", {"messages": []})):
        answer = post(url, path, model="any", **body)
        assert (answer["done"], answer["done_reason"]) == (True, "load")


@pytest.mark.parametrize("form", ["json", SCHEMA])
def test_a_format_is_kept_to(url, form):
    options = {"num_predict": 200, "temperature": 0}
    asked = {"messages": CHAT, "options": options, "stream": False, "format": form}
    answer = post(url, "/api/chat", **asked)
    text = answer["message"]["content"]
    assert text.startswith("{")
    if form is SCHEMA:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_tools_are_told_and_their_history_too(roomy):
    call = {"function": {"name": "pick", "arguments": {"n": 1}}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "one"},
    ]
    asked = {"tools": [TOOL], "options": OPTIONS, "stream": False}
    shorter = post(roomy, "/api/chat", messages=CHAT, **asked)
    longer = post(roomy, "/api/chat", messages=messages, **asked)
    assert longer["prompt_eval_count"] > shorter["prompt_eval_count"] > 40


@pytest.mark.parametrize("named", [True, False])
def test_each_result_is_its_own_tools(named):
    """Named by the tool, in another order than the calls; unnamed, in theirs."""
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("weather", "time")]
    results = [("time", "12:00"), ("weather", "rain")] if named else [(None, "rain"), (None, "12")]
    messages = [
        *CHAT,
        {"role": "assistant", "tool_calls": calls, "content": None},
        *({"role": "tool", "content": text, "tool_name": name} for name, text in results),
    ]
    found = ChatRequest.model_validate({"messages": messages}).conversation().messages
    names = {call["id"]: call["function"]["name"] for call in found[1]["tool_calls"]}
    assert len(names) == 2
    told_names = [(names[m["tool_call_id"]], m["name"]) for m in found[2:]]
    order = ["time", "weather"] if named else ["weather", "time"]
    assert told_names == [(name, name) for name in order]
    # A template that knows no tools has roles in turns.
    assert [m["role"] for m in plain_messages(found, ())] == ["user", "assistant", "user"]


def test_each_result_is_of_the_first_call_that_waits():
    rng = random.Random(0)
    for _ in range(300):
        messages: list[dict] = []
        for _ in range(rng.randrange(12)):
            if rng.random() < 0.4:
                calls = [{"function": {"name": rng.choice("ab")}} for _ in range(rng.randrange(4))]
                messages.append({"role": "assistant", "tool_calls": calls})
            else:
                name = {"name": rng.choice("ab")} if rng.random() < 0.6 else {}
                messages.append({"role": "tool", **name})
        waiting: list[dict] = []
        for asked, found in zip(messages, with_ids(deepcopy(messages)), strict=True):
            waiting += found.get("tool_calls", ())
            if asked["role"] == "tool":
                own = [
                    call
                    for call in waiting
                    if asked.get("name") in (None, call["function"]["name"])
                ]
                waiting = [c for c in waiting if c not in own[:1]]
                assert found.get("tool_call_id") == (own[0]["id"] if own else None)


@pytest.mark.parametrize("options", [{"mirostat": 2}, {"typical_p": 0.2}, {"repeat_last_n": 8}])
def test_options_that_would_change_the_answer_are_refused(url, options):
    asked = {"prompt": "hi", "stream": False, "options": {**OPTIONS, **options}}
    refused = httpx.post(f"{url}/api/generate", json=asked, timeout=60)
    assert refused.status_code == 400
    (name,) = options
    assert name in refused.json()["error"]
    asked["options"] |= {"mirostat": 0, "typical_p": 1, "repeat_last_n": 64}
    assert httpx.post(f"{url}/api/generate", json=asked, timeout=60).status_code == 200


def test_what_there_is(url):
    (model,) = httpx.get(f"{url}/api/tags").json()["models"]
    assert model["name"] == "tiny"
    assert len(model["digest"]) == 64  # Ollama's program shows a part of it
    shown = post(url, "/api/show", model="tiny")
    assert "completion" in shown["capabilities"]
    about = shown["model_info"]
    assert about[f"{about['general.architecture']}.context_length"] == 256
    assert about["general.parameter_count"] > 1000
    assert httpx.get(f"{url}/api/version").json()["version"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": CHAT, "options": {"temperature": -1}}, "temperature"),
        ({"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, "images"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "the context holds 256"),
    ],
)
def test_errors_are_one_text(url, body, words):
    refused = httpx.post(f"{url}/api/chat", json=body, timeout=60)
    assert refused.status_code == 400
    assert words in refused.json()["error"]


def test_a_seed_that_does_not_fit_is_refused(url):
    """Found by the test of the server's OpenAPI document: it was an error of the server's."""
    for seed, status in ((2**63 - 1, 200), (2**63, 400), (-(2**63) - 1, 400)):
        asked = {"prompt": "hi", "options": {"num_predict": 1, "seed": seed}, "stream": False}
        assert httpx.post(f"{url}/api/generate", json=asked, timeout=60).status_code == status


@pytest.mark.parametrize(
    ("think", "variables"),
    [
        (None, {}),
        (True, {"enable_thinking": True}),
        ("low", {"enable_thinking": True, "reasoning_effort": "low"}),
    ],
)
def test_how_much_to_think_is_told_to_the_template(think, variables):
    assert GenerateRequest(prompt="x", think=think).conversation().variables == variables


def test_a_type_is_not_needed_but_of_a_page(url):
    """As in Ollama's examples for curl. Another site's page may send text, and tells its origin."""
    body = json.dumps({"prompt": "hello", "stream": False, "options": OPTIONS})
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = httpx.post(f"{url}/api/generate", content=body, headers=form, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["done"]
    page = {"Content-Type": "text/plain", "Origin": "https://a.example"}
    untyped = {"Origin": "https://a.example"}
    for path, headers in (
        ("/api/generate", page), ("/api/generate", untyped), ("/v1/completions", form),
        ("/v1/completions", untyped),
    ):  # fmt: skip
        refused = httpx.post(f"{url}{path}", content=body, headers=headers, timeout=60)
        assert refused.status_code == 400
        assert "send Content-Type: application/json" in refused.text
