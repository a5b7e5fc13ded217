"""Who may ask a server, from where, and how much: keys, hosts, other sites, sizes."""

from __future__ import annotations

import httpx
import openai
import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from serving import metrics_of, sent, serving, wait_for

from colm_edge.cli import main
from colm_edge.serve import app
from colm_edge.serve.answers import Server
from colm_edge.serve.chat import ChatRequest
from colm_edge.serve.dialogue import Dialogue
from colm_edge.serve.errors import RefusalError
from colm_edge.serve.guard import MAX_BODY
from colm_edge.serve.messages import CountRequest
from colm_edge.serve.ollama import ChatRequest as OllamaRequest
from colm_edge.serve.requests import CompletionRequest, DetokenizeRequest
from colm_edge.serve.responses import ResponsesRequest

CHAT = [{"role": "user", "content": "hello"}]


def test_a_body_without_its_length_is_bounded_too(url):
    pieces = (b"x" * 65536 for _ in range(MAX_BODY // 65536 + 2))
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=pieces, headers=headers, timeout=60)
    assert answer.status_code == 413


def test_a_key_is_asked_for_where_there_is_one(pair):
    with serving(pair, api_key="sesame") as (url, _):
        for headers, status in (
            ({}, 401), ({"Authorization": "Bearer x"}, 401), ({"Authorization": "sesame"}, 401),
            ({"Authorization": "Bearer sesame"}, 200),
        ):  # fmt: skip
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
            for path in ("/metrics", "/openapi.json", "/api/tags"):
                assert httpx.get(f"{url}{path}", headers=headers).status_code == status
        assert httpx.get(f"{url}/health").status_code == 200
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.completions.create(model="tiny", prompt="hello", max_tokens=1)


def test_a_key_that_no_header_carries_is_refused_at_the_start(tiny, monkeypatch):
    served = []
    monkeypatch.setattr(app, "serve", lambda pair, settings, *_: served.append(settings.api_key))
    args = ["serve", "-m", tiny["base"], "-me", tiny["expert"], "-t", "1"]
    refused = {"": "the API key is empty", " ": "the API key is empty", "schlüssel": "ASCII"}
    for key, words in refused.items():
        result = CliRunner().invoke(main, args, env={"COLM_EDGE_API_KEY": key})
        assert result.exit_code == 2
        assert words in result.stderr
    result = CliRunner().invoke(main, [*args, "--api-key", ""])
    assert result.exit_code == 2
    result = CliRunner().invoke(main, args, env={"COLM_EDGE_API_KEY": "sesame\n"})
    assert result.exit_code == 0, result.output
    assert served == ["sesame"]


@pytest.mark.parametrize(
    ("option", "wrong", "right"),
    [
        ("--allowed-host", ["foo:80", "http://foo", "foo/", "1.2.3.4:80", ""], ["foo.x", "::1"]),
        ("--cors-origin", ["foo", "http://a/", "http://"], ["http://a:3000", "*", "app://x"]),
    ],
)
def test_names_that_no_request_has_are_refused_at_the_start(
    tiny, monkeypatch, option, wrong, right
):
    monkeypatch.setattr(app, "serve", lambda *_: None)
    args = ["serve", "-m", tiny["base"], "-me", tiny["expert"], "-t", "1", option]
    for name in wrong:
        result = CliRunner().invoke(main, [*args, name])
        assert result.exit_code == 2
        assert f"{name!r}: expected " in result.stderr
    for name in right:
        assert CliRunner().invoke(main, [*args, name]).exit_code == 0


def test_what_is_wrong_with_a_body_is_named(url):
    asked = {"input": "x", "tools": [{"type": "web_search"}]}
    answer = httpx.post(f"{url}/v1/responses", json=asked).json()
    assert answer["error"]["message"].startswith("tools.0.type: Input should be 'function'")
    answer = httpx.post(f"{url}/v1/responses", json={"input": []}).json()
    assert "at least 1 item" in answer["error"]["message"]
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/responses", content=b'{"input": "\xff"}', headers=headers)
    assert (answer.status_code, "it is not UTF-8" in answer.text) == (400, True)
    asked = {"messages": CHAT, "max_tokens": 2, "functions": [], "function_call": "auto"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/chat/completions", "/api/chat", "/v1/messages"]
)
def test_numbers_that_are_not_jsons_are_refused(url, path, number):
    body = f'{{"model": "tiny", "max_tokens": 2, "tools": [{{"x": {number}}}]}}'
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}{path}", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert f"{number} is not a JSON number" in answer.text


def test_what_breaks_a_request_is_logged(url, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(Dialogue, "__init__", broken)
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": CHAT}, timeout=60)
    assert answer.status_code == 500
    assert "out of order" not in answer.text
    (record,) = [r for r in caplog.records if r.name == "colm_edge"]
    assert "/v1/chat/completions" in record.getMessage()
    assert str(record.exc_info[1]) == "out of order"


def test_what_breaks_is_counted_and_other_sites_can_read_it(pair, monkeypatch):
    monkeypatch.setattr(Dialogue, "__init__", lambda *_: 1 / 0)
    with serving(pair, cors=("http://page.example",)) as (url, _):
        asked = {"json": {"messages": CHAT}, "headers": {"Origin": "http://page.example"}}
        answer = httpx.post(f"{url}/v1/chat/completions", timeout=60, **asked)
        assert answer.status_code == 500
        assert answer.headers["access-control-allow-origin"] == "http://page.example"
        counted = 'colm_requests_total{path="/v1/chat/completions",status="500"}'
        assert metrics_of(url)[counted] == 1


def test_of_many_wrong_elements_one_is_named():
    """A body of 4 MB would else be made into millions of errors."""
    many: list[object] = [{}] * 1000
    for kind, given in (
        (CompletionRequest, {"prompt": many}),
        (DetokenizeRequest, {"tokens": many}),
        (ChatRequest, {"messages": many}),
        (ChatRequest, {"messages": [{"role": "user", "content": many}]}),
        (CountRequest, {"messages": [{"role": "user", "content": many}]}),
        (ResponsesRequest, {"input": many}),
        (OllamaRequest, {"messages": many}),
        (OllamaRequest, {"messages": CHAT, "options": {"stop": many}}),
    ):
        with pytest.raises(ValidationError) as wrong:
            kind.model_validate(given)
        assert wrong.value.error_count() < 20


def test_too_many_prompts_are_refused_before_they_are_read(pair, monkeypatch):
    monkeypatch.setattr(pair.base, "tokenize", None)
    with pytest.raises(RefusalError, match="asks for 100 answers; at most 16"):
        CompletionRequest(prompt=["a"] * 50, n=2).prompts(pair)


@pytest.mark.parametrize("depth", [150, 300, 900])
def test_what_is_nested_too_deep_is_the_requests_own_fault(url, depth):
    nested: dict[str, object] = {}
    for _ in range(depth):
        nested = {"a": nested}
    asked = {"messages": CHAT, "max_tokens": 1, "chat_template_kwargs": {"x": nested}}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code == (200 if depth < 200 else 400)


def test_the_clients_of_a_proxy_are_not_one(pair, monkeypatch):
    owners = set()
    monkeypatch.setattr(Server, "check_queue", lambda self, owner: owners.add(owner))
    with serving(pair) as (url, _):
        for _ in range(2):  # each on a connection of its own
            asked = {"json": {"prompt": "x", "max_tokens": 1}}
            httpx.post(f"{url}/v1/completions", headers={"X-Forwarded-For": "9.9.9.9"}, **asked)
    assert len(owners) == 2


@pytest.mark.parametrize("host", ["127.0.0.2", "LOCALHOST", "127.1", "0:0:0:0:0:0:0:1"])
def test_a_local_server_is_one_however_its_address_is_written(pair, host):
    written = f"[{host}]" if ":" in host else host
    with serving(pair, host=host) as (url, _):
        for name, status in (("evil.example", 400), ("localhost", 200), (written, 200)):
            answer = httpx.get(f"{url}/health", headers={"Host": f"{name}:80"})
            assert answer.status_code == status


def test_a_template_may_have_any_variable(url):
    asked = {"messages": CHAT, "max_tokens": 2, "chat_template_kwargs": {"self": 1, "raw": 0}}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code == 400
    assert "chat_template_kwargs holds raw" in answer.text
    asked["chat_template_kwargs"] = {"self": 1}
    assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code == 200


def test_other_sites_pages_may_ask_only_where_allowed(pair):
    origin = {"Origin": "http://page.example"}
    with serving(pair) as (url, _):
        assert (
            "access-control-allow-origin" not in httpx.get(f"{url}/health", headers=origin).headers
        )
    with serving(pair, cors=("http://page.example",)) as (url, _):
        headers = httpx.get(f"{url}/health", headers=origin).headers
        assert headers["access-control-allow-origin"] == "http://page.example"
        other = httpx.get(f"{url}/health", headers={"Origin": "http://evil.example"}).headers
        assert "access-control-allow-origin" not in other


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:1234", 200), ("[::1]:8080", 200), ("testserver", 400),
        ("evil.example", 400), ("[::1", 400), ("", 400),
    ],
)  # fmt: skip
def test_a_local_server_answers_to_local_names_alone(url, host, status):
    response = httpx.get(f"{url}/health", headers={"Host": host})
    assert response.status_code == status


def test_anthropics_header_carries_the_key_too(pair):
    with serving(pair, api_key="sesame") as (url, _):
        for key, status in (("sesame", 200), ("x", 401)):
            got = httpx.get(f"{url}/v1/models", headers={"x-api-key": key})
            assert got.status_code == status


def test_the_key_is_asked_for_before_the_body_is_read(pair):
    """The client is refused while it still has most of the body to send."""
    with serving(pair, api_key="sesame") as (url, _), sent(url, b"{ ", 1000) as connection:
        assert connection.recv(200).startswith(b"HTTP/1.1 401 ")


def test_a_request_that_is_half_sent_does_not_hold_up_the_servers_end(pair):
    with serving(pair) as (url, server), sent(url, b"{ ", 1000) as connection:
        wait_for(lambda: server.stopping._waiters)  # the request is there and waits for more
        server.stopping._loop.call_soon_threadsafe(server.stopping.set)
        assert connection.recv(200).startswith(b"HTTP/1.1 503 ")
