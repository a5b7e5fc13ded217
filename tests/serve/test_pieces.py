"""What the server tells of tokens: their ids, what they spell, and the prompt's from one on."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from colm_edge.options import ServerOptions
from colm_edge.serve.answers import Server
from colm_edge.serve.app import create_app

END = "<|end|>"


@pytest.fixture(scope="module")
def client(pair):
    server = Server(pair, ServerOptions(n_slots=1), "tiny")
    with TestClient(create_app(server), base_url="http://localhost") as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def raw(piece: str | list[int]) -> bytes:
    return piece.encode() if isinstance(piece, str) else bytes(piece)


def test_tokens_are_told_with_what_they_spell(client, pair):
    text = f"hello é€😀 {END}"
    told = post(client, "/tokenize", prompt=text, parse_special=False, with_pieces=True)["tokens"]
    assert [token["id"] for token in told] == pair.base.tokenize(text, special=False)
    assert b"".join(raw(token["piece"]) for token in told) == text.encode()
    kinds = {type(token["piece"]) for token in told}
    assert kinds == {str, list}  # a part of a character is no text
    named = post(client, "/tokenize", prompt=text, with_pieces=True)["tokens"]
    assert named[-1] == {"id": pair.base.token_id(END), "piece": END}
    plain = post(client, "/tokenize", prompt=text)["tokens"]
    assert plain == [token["id"] for token in named] == pair.base.tokenize(text)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_a_prompts_last_tokens_are_told_as_all_are(client, pair, threshold):
    tokens = pair.base.tokenize("hello world, and so on")
    asked = {
        "prompt": tokens, "max_tokens": 1, "logprobs": 3, "prompt_logprobs": 3,
        "return_tokens_as_token_ids": True, "colm": {"threshold": threshold},
    }  # fmt: skip
    (whole,) = post(client, "/v1/completions", **asked)["choices"]
    assert "pieces" not in whole
    for first in (1, 5, len(tokens) - 1, len(tokens), len(tokens) + 9):
        more = {"prompt_logprobs_from": first, "with_pieces": True}
        (part,) = post(client, "/v1/completions", **asked, **more)["choices"]
        inside = part["prompt_logprobs"]
        assert len(inside) == len(tokens)
        assert inside[:first] == [None] * min(first, len(tokens))
        for one, same in zip(inside[first:], whole["prompt_logprobs"][first:], strict=True):
            assert one.keys() == same.keys()
            for token, entry in one.items():
                assert entry["logprob"] == pytest.approx(same[token]["logprob"], abs=5e-2)
        ids = {int(token) for entry in inside if entry for token in entry}
        ids |= {int(name.split(":")[1]) for name in part["logprobs"]["top_logprobs"][0]}
        assert ids <= {int(token) for token in part["pieces"]}
        for token, piece in part["pieces"].items():
            assert raw(piece) == pair.base.piece(int(token))


def test_what_a_stream_cannot_tell_is_refused(client):
    body = {"prompt": "a", "stream": True, "with_pieces": True, "logprobs": 1}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert "with_pieces cannot be streamed" in response.json()["error"]["message"]
