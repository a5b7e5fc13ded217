"""Who may ask a server, from where, and how much: keys, hosts, other sites, sizes."""

from __future__ import annotations

import socket

import httpx
import openai
import pytest
from serving import serving, wait_for

from colm_edge.serve.guard import MAX_BODY

CHAT = [{"role": "user", "content": "hello"}]


def test_a_body_without_its_length_is_bounded_too(url):
    pieces = (b"x" * 65536 for _ in range(MAX_BODY // 65536 + 2))
    assert httpx.post(f"{url}/v1/completions", content=pieces, timeout=60).status_code == 413


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
    with serving(pair, api_key="sesame") as (url, _), half_sent(url) as connection:
        assert connection.recv(200).startswith(b"HTTP/1.1 401 ")


def half_sent(url: str) -> socket.socket:
    """Return a connection on which a request with a body of 1,000 bytes has sent two."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 60)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{ "
    )
    return connection


def test_a_request_that_is_half_sent_does_not_hold_up_the_servers_end(pair):
    with serving(pair) as (url, server), half_sent(url) as connection:
        wait_for(lambda: server.stopping._waiters)  # the request is there and waits for more
        server.stopping._loop.call_soon_threadsafe(server.stopping.set)
        assert connection.recv(200).startswith(b"HTTP/1.1 503 ")
