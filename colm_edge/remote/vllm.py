"""The dialect of vLLM's OpenAI-compatible server.

`ask` and `ask_scores` are what its API shares with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colm_edge.remote.dialect import Body, Dialect, Reply, Scored, Scoring

# Else a generation_config.json in the model's folder would say, and a server may tell what its
# samplers make of the probabilities (--logprobs-mode).
_NEUTRAL: Body = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
}


def tokenize(model: str, text: str) -> Body:
    return {"model": model, "prompt": text, "add_special_tokens": False}


def ask(model: str, tokens: list[int], n_probs: int) -> Body:
    return {
        "model": model,
        "prompt": tokens,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": n_probs,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }


def _ask(model: str, tokens: list[int], n_probs: int) -> Body:
    return ask(model, tokens, n_probs) | _NEUTRAL


def read_top(answer: Any) -> dict[int, float]:
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): float(x) for name, x in top.items()}


def _read(answer: Any) -> Reply:
    return read_top(answer), _n_evaluated(answer.get("usage") or {})


def _n_evaluated(usage: Any) -> int | None:
    """Return how many tokens were not in the prefix cache, which is told if the server was started
    with --enable-prompt-tokens-details."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return None if cached is None else int(usage["prompt_tokens"]) - int(cached)


def ask_scores(model: str, documents: list[list[int]]) -> Body:
    return {
        "model": model,
        "prompt": documents,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 1,
        "stream": False,
    }


def _ask_scores(model: str, documents: list[list[int]]) -> Body:
    return ask_scores(model, documents) | _NEUTRAL


def read_scores(answer: Any, documents: list[list[int]], starts: Sequence[int]) -> list[Scored]:
    told = {int(choice["index"]): choice["prompt_logprobs"] for choice in answer["choices"]}
    return [
        _scores_of(told[i], document, start)
        for i, (document, start) in enumerate(zip(documents, starts, strict=True))
    ]


def _scores_of(told: list[Any], document: list[int], start: int) -> Scored:
    if len(told) != len(document):
        raise ValueError(f"{len(told)} log-probabilities of {len(document)} tokens")
    logprobs, right = list[float](), list[bool]()
    for token, entries in zip(document[start:], told[start:], strict=True):
        own = entries[str(token)]
        logprobs.append(float(own["logprob"]))
        right.append(own["rank"] == 1)
    return logprobs, right


DIALECT = Dialect(
    name="vLLM",
    owner="vllm",
    path="/v1/completions",
    tokenize=tokenize,
    ask=_ask,
    read=_read,
    n_probs=20,  # the most that it allows by default (--max-logprobs)
    scoring=Scoring(_ask_scores, read_scores),
)
