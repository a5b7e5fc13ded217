"""How each kind of server is asked, and how its answers are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

N_PROBS = 64  # of llama.cpp: more than the usual top_k of 40 reads
N_PROBS_VLLM = 20  # what it allows unless told otherwise (--max-logprobs)
# The likeliest next tokens, id -> log-probability, and the tokens evaluated, if told.
Reply = tuple[dict[int, float], int | None]
# Of some tokens that follow each other: their log-probabilities, and whether each is the likeliest.
Scored = tuple[list[float], list[bool]]


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked.

    ask: (model, token ids, how many successors are wanted, if that can be said) -> body of a
        request to `path`; read: its answer -> Reply.
    tokenize: (model, text) -> body of a request to /tokenize, whose answer holds `tokens`.
    ask_scores: (model, documents) -> body of a request to `path` that is answered with vLLM's
        `prompt_logprobs` of each; None: the server tells only what comes after a prompt.
    """

    name: str
    path: str
    ask: Callable[[str, list[int], int], dict[str, Any]]
    read: Callable[[Any], Reply]
    tokenize: Callable[[str, str], dict[str, Any]]
    ask_scores: Callable[[str, list[list[int]]], dict[str, Any]] | None = None


def _ask_llama_cpp(model: str, tokens: list[int], n_probs: int) -> dict[str, Any]:
    return {
        "prompt": tokens, "n_predict": 1, "n_probs": n_probs, "temperature": 0,
        "cache_prompt": True, "return_tokens": True, "stream": False,
    }  # fmt: skip


def _read_llama_cpp(answer: Any) -> Reply:
    items = answer["completion_probabilities"][0]["top_logprobs"]
    top = {int(item["id"]): float(item["logprob"]) for item in items}
    return top, int(answer["timings"]["prompt_n"])


def _ask_vllm(model: str, tokens: list[int], _: int) -> dict[str, Any]:
    return {
        "model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0,
        "logprobs": N_PROBS_VLLM, "return_tokens_as_token_ids": True, "stream": False,
    }  # fmt: skip


def _read_vllm(answer: Any) -> Reply:
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): float(x) for name, x in top.items()}, None


# Its expert alone, whatever the server's own defaults are.
_EXPERT_ALONE = {
    "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "colm": {"threshold": 0, "strategy": "defer"},
}  # fmt: skip


def _ask_colm_edge(model: str, tokens: list[int], n_probs: int) -> dict[str, Any]:
    return _ask_vllm(model, tokens, n_probs) | _EXPERT_ALONE


def _read_colm_edge(answer: Any) -> Reply:
    if answer["colm"]["expert_failures"]:
        raise ValueError("its own expert is absent")
    return _read_vllm(answer)[0], int(answer["colm"]["expert_tokens"])


def _ask_scores_vllm(model: str, documents: list[list[int]]) -> dict[str, Any]:
    return {
        "model": model, "prompt": documents, "max_tokens": 1, "temperature": 0,
        "prompt_logprobs": 1, "stream": False,
    }  # fmt: skip


def _ask_scores_colm_edge(model: str, documents: list[list[int]]) -> dict[str, Any]:
    return _ask_scores_vllm(model, documents) | _EXPERT_ALONE | {"max_tokens": 0}


def _read_scores(told: list[Any], document: list[int], start: int) -> Scored:
    """Read vLLM's `prompt_logprobs` of a document's tokens from `start` on."""
    if len(told) != len(document):
        raise ValueError(f"{len(told)} log-probabilities of {len(document)} tokens")
    logprobs, right = list[float](), list[bool]()
    for token, entries in zip(document[start:], told[start:], strict=True):
        own = entries[str(token)]
        logprobs.append(float(own["logprob"]))
        right.append(own["rank"] == 1)
    return logprobs, right


def _tokenize_openai(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "prompt": text, "add_special_tokens": False}


# By what a server's list of models says of their owner.
DIALECTS = {
    "llamacpp": Dialect(
        "llama.cpp", "/completion", _ask_llama_cpp, _read_llama_cpp,
        lambda _, text: {"content": text, "add_special": False, "parse_special": False},
    ),
    "vllm": Dialect(
        "vLLM", "/v1/completions", _ask_vllm, _read_vllm, _tokenize_openai, _ask_scores_vllm
    ),
    "colm-edge": Dialect(
        "colm-edge", "/v1/completions", _ask_colm_edge, _read_colm_edge, _tokenize_openai,
        _ask_scores_colm_edge,
    ),
}  # fmt: skip
