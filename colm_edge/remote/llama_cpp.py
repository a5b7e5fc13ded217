"""The dialect of llama.cpp's server (llama-server)."""

from __future__ import annotations

from typing import Any

from colm_edge.remote.dialect import Body, Dialect, Reply


def _tokenize(model: str, text: str) -> Body:
    return {"model": model, "content": text, "add_special": False, "parse_special": False}


def _ask(model: str, tokens: list[int], n_probs: int) -> Body:
    return {
        "model": model,  # of a server that has several
        "prompt": tokens,
        "n_predict": 1,
        "n_probs": n_probs,
        "temperature": 0,
        "cache_prompt": True,
        "return_tokens": True,
        "stream": False,
    }


def _read(answer: Any) -> Reply:
    items = answer["completion_probabilities"][0]["top_logprobs"]
    top = {int(item["id"]): float(item["logprob"]) for item in items}
    return top, int(answer["timings"]["prompt_n"])


DIALECT = Dialect(
    name="llama.cpp",
    owner="llamacpp",
    path="/completion",
    tokenize=_tokenize,
    ask=_ask,
    read=_read,
    n_probs=64,  # sampling usually reads the 40 likeliest (top_k)
)
