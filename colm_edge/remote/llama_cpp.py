"""The dialect of llama.cpp's server (llama-server)."""

from __future__ import annotations

from typing import Any

from colm_edge.remote.dialect import AskPieces, Body, Dialect, Spelt, Successors


def _tokenize(
    model: str, text: str, *, special: bool = False, begin: bool = False, pieces: bool = False
) -> Body:
    body: Body = {"model": model, "content": text, "add_special": begin, "parse_special": special}
    return body | ({"with_pieces": True} if pieces else {})


def piece_of(given: Any) -> bytes:
    """Return the bytes of a token, which come as a text or, where they are not one, as numbers."""
    if isinstance(given, str):
        return given.encode()
    if not all(isinstance(byte, int) for byte in given):
        raise TypeError("a piece that is neither a text nor bytes")
    return bytes(given)


def read_spelt(answer: Any, text: str) -> Spelt:
    return [(int(token["id"]), piece_of(token["piece"])) for token in answer["tokens"]]


def _ask(model: str, tokens: list[int], n_probs: int) -> Body:
    return {
        "model": model,  # of a server that has several
        "prompt": tokens,
        "n_predict": 1,
        "n_probs": n_probs,
        "temperature": 0,
        # Where the sampled token ends inside a character, the server tells no probabilities; those
        # that it tells are as before any bias.
        "logit_bias": [["\n", 1000]],
        "cache_prompt": True,
        "return_tokens": True,
        "stream": False,
    }


def _read(answer: Any) -> Successors:
    items = answer["completion_probabilities"][0]["top_logprobs"]
    top = {int(item["id"]): float(item["logprob"]) for item in items}
    pieces = {int(item["id"]): piece_of(item["bytes"]) for item in items if "bytes" in item}
    return Successors(top, int(answer["timings"]["prompt_n"]), pieces)


DIALECT = Dialect(
    name="llama.cpp",
    owner="llamacpp",
    path="/completion",
    tokenize=_tokenize,
    ask=_ask,
    read=_read,
    n_probs=64,  # sampling usually reads the 40 likeliest (top_k)
    spelling=AskPieces(read_spelt, about="/props"),
)
