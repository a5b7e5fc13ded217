"""The dialect of vLLM's OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colm_edge.remote.dialect import Body, Dialect, Reply, Scored, Scoring


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


def read(answer: Any) -> Reply:
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): float(x) for name, x in top.items()}, None


def ask_scores(model: str, documents: list[list[int]]) -> Body:
    return {
        "model": model,
        "prompt": documents,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 1,
        "stream": False,
    }


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
    ask=ask,
    read=read,
    n_probs=20,  # the most that it allows by default (--max-logprobs)
    scoring=Scoring(ask_scores, read_scores),
)
