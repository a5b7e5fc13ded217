"""Requests are judged as OpenAI judges them, and paths that clients of other servers ask for."""

from __future__ import annotations

import json

import httpx
import pytest
from click.testing import CliRunner
from serving import serving

from colm_edge.cli import main
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.serve.chat import ChatRequest
from colm_edge.serve.requests import REFUSED, CompletionRequest

CHAT = [{"role": "user", "content": "hello"}]


def ask(url: str, **more) -> httpx.Response:
    body = {"messages": CHAT, "max_tokens": 4, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


NAMES = (
    "n",
    "stream",
    "temperature",
    "stop",
    "seed",
    "tools",
    "logprobs",
    "response_format",
    "colm",
)


@pytest.mark.parametrize("name", NAMES)
def test_null_means_not_given(url, name):
    assert ask(url, **{name: None}).json()["choices"] == ask(url).json()["choices"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused(url, name):
    refused = ask(url, **{name: "much"})
    assert refused.status_code == 400
    assert f"{name} is not supported" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "harmless"), [(n, v) for n, known in REFUSED.items() for v in known]
)
def test_what_changes_nothing_is_accepted(url, name, harmless):
    assert ask(url, **{name: harmless}).json()["choices"] == ask(url).json()["choices"]


HALF = chr(0xD83D)  # of an emoji


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/messages/count_tokens", {"system": None, "tools": None}),
        (
            "/v1/messages/count_tokens",
            {"tools": [{"name": "f", "description": None, "input_schema": {}}]},
        ),
        ("/api/chat", {"messages": [*CHAT, {"role": "assistant", "content": None}]}),
        ("/apply-template", {"tool_choice": None}),
        ("/v1/chat/completions", {"stream_options": {"include_usage": None}}),
    ],
)
def test_null_means_not_given_anywhere(url, path, more):
    body = {"messages": CHAT, "max_tokens": 2, "stream": False, **more}
    answer = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/responses", {"instructions": f"kind {HALF}"}),
        ("/v1/chat/completions", {"json_schema": {"enum": [HALF]}}),
        ("/v1/completions", {"grammar": f'root ::= "{HALF}"', "prompt": "x"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_no_failure_without_words(url, path, more, stream):
    limit = "max_output_tokens" if "responses" in path else "max_tokens"
    body = {"messages": CHAT, "input": "hi", limit: 2, "stream": stream, **more}
    data = json.dumps(body)  # as \ud83d
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}{path}", content=data, headers=headers, timeout=60)
    if answer.status_code == 200:  # the stream had begun
        assert "kind ?" in answer.text
        assert "response.incomplete" in answer.text  # by its limit
    else:
        assert answer.status_code == 400
        assert "half a character" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("/v1/chat/completions", {"stop": [""]}, "stop.0"),
        ("/v1/chat/completions", {"tool_choice": "any"}, "tool_choice"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input.0."),
        ("/v1/responses", {"input": [{"type": "function_call", "name": "f"}]}, "input.0."),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0"),
        ("/v1/chat/completions", {"colm": {"review": "much"}}, "colm.review"),
    ],
)
def test_an_error_names_a_place_in_the_body(url, path, more, param):
    body = {"messages": CHAT, **more}
    refused = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"].startswith(param)
    assert error["message"].startswith(error["param"])


def options_of(defaults: Options, choice: int = 0, limit: int = 50, **given) -> Options:
    return ChatRequest(messages=CHAT, **given).options(defaults, choice, limit)


@pytest.mark.parametrize(
    ("own", "asked", "written"),
    [(-1, None, 50), (-1, -1, 50), (-1, 9, 9), (-1, 99, 50), (7, None, 7), (7, -1, 50), (7, 9, 9)],
)
def test_the_limit_is_the_requests_or_else_the_servers_own(own, asked, written):
    """`serve -n 7` is what a request gets that says nothing; --max-tokens bounds every one."""
    assert options_of(Options(max_tokens=own), max_tokens=asked).max_tokens == written


def test_a_plain_completion_has_openais_limit():
    plain = CompletionRequest(prompt="x").options(Options(), 0, 50)
    assert plain.max_tokens == 16


@pytest.mark.parametrize(
    ("own", "asked", "first", "second"),
    [
        (-1, None, -1, -1),
        (5, None, 5, 6),
        (5, -1, -1, -1),
        (-1, 7, 7, 8),
    ],
)
def test_each_choice_has_a_seed_of_its_own(own, asked, first, second):
    """-1 is a new one each time."""
    seeds = [options_of(Options(seed=own), choice=i, seed=asked).seed for i in range(2)]
    assert seeds == [first, second]


def test_the_limit_of_answers_is_not_the_length_of_one(monkeypatch):
    found = []
    monkeypatch.setattr(
        "colm_edge.serve.app.serve",
        lambda pair, settings, *_: found.append((pair.defaults.max_tokens, settings.max_tokens)),
    )
    for flags in (("--max-tokens", "3"), ("-n", "3"), ("-n", "2", "--max-tokens", "3")):
        assert CliRunner().invoke(main, ["serve", *flags]).exit_code == 0
    assert found == [(-1, 3), (3, 2048), (2, 3)]


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_head_answers_as_get_without_a_body(url, path):
    response = httpx.head(url + path)
    assert response.status_code == 200
    assert response.content == b""


def test_tokens_become_text_again(url, pair):
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": "hello there"}).json()["tokens"]
    back = httpx.post(f"{url}/detokenize", json={"tokens": tokens})
    assert back.json()["prompt"].strip() == "hello there"
    for bad in ([pair.base.n_vocab], [-1], ["x"]):
        assert httpx.post(f"{url}/detokenize", json={"tokens": bad}).status_code == 400


def test_a_harness_learns_the_tokenizer(url, pair):
    told = httpx.get(f"{url}/tokenizer_info").json()
    assert told["chat_template"] == pair.base.chat_template
    assert told["eos_token"] == pair.base.eos_text
    rendered = httpx.post(f"{url}/apply-template", json={"messages": CHAT}).json()
    assert rendered["prompt"] == pair.prompt_text(CHAT)


def test_a_wrong_path_is_told_the_right_ones(url):
    error = httpx.post(f"{url}/v1/chat/completion", json={}).json()["error"]["message"]
    assert "no endpoint '/v1/chat/completion'" in error
    assert "/v1/chat/completions" in error


def test_a_server_answers_to_names_that_it_is_given(pair):
    with serving(pair, allowed_hosts=("Box.local",)) as (url, _):
        for host, status in (
            ("box.LOCAL:8080", 200), ("localhost", 200), ("LOCALHOST", 200), ("other", 400),
        ):  # fmt: skip
            response = httpx.get(f"{url}/health", headers={"Host": host})
            assert response.status_code == status
        assert "--allowed-host" in response.json()["error"]["message"]


def test_a_server_with_a_seed_repeats_its_choices(pair):
    """`serve -s 42` and n: 3. A seed of -1 is another one each time."""
    own = Options(seed=42, temperature=1.5, threshold=0.4)

    def texts(url: str, **more: object) -> list[str]:
        answer = ask(url, **{"max_tokens": 12, "n": 3, **more}).json()
        return [choice["message"]["content"] for choice in answer["choices"]]

    before, pair.defaults = pair.defaults, own
    try:
        with serving(pair, n_slots=1) as (url, _):
            first = texts(url)
            assert len(set(first)) == 3
            drawn = [texts(url, seed=-1) for _ in range(3)]
            assert len(set(map(tuple, drawn))) == 3
            assert texts(url) == first
            assert texts(url, n=1, seed=43) == first[1:2]
    finally:
        pair.defaults = before


def test_an_answer_that_was_cut_says_so(tiny):
    """By the limit, and by the context."""
    greedy = Options(temperature=0.0)
    files = tiny["endless"], tiny["endless"], "margin"
    with (
        load(*files, n_threads=1, n_ctx=64, defaults=greedy) as pair,
        serving(pair, n_slots=1) as (url, _),
    ):
        n_prompt = len(pair.prompt_tokens(CHAT))
        for limit, n in ((5, 5), (-1, 65 - n_prompt)):
            told = ask(url, max_tokens=limit).json()
            assert told["choices"][0]["finish_reason"] == "length"
            assert told["usage"]["completion_tokens"] == n
