"""The dialect of another colm-edge server: vLLM's, asked for the expert alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from colm_edge.remote import vllm
from colm_edge.remote.dialect import Body, Reply, Scoring

# The expert's own probabilities, whatever the server's defaults are.
_EXPERT_ALONE: Body = {
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "colm": {"threshold": 0, "strategy": "defer"},
}


def _ask(model: str, tokens: list[int], n_probs: int) -> Body:
    return vllm.ask(model, tokens, n_probs) | _EXPERT_ALONE


def _read(answer: Any) -> Reply:
    if answer["colm"]["expert_failures"]:
        raise ValueError("its own expert is absent")
    n_evaluated = answer["colm"]["expert_tokens"]
    return vllm.read_top(answer), None if n_evaluated is None else int(n_evaluated)


def _ask_scores(model: str, documents: list[list[int]]) -> Body:
    return vllm.ask_scores(model, documents) | _EXPERT_ALONE | {"max_tokens": 0}


DIALECT = replace(
    vllm.DIALECT,
    name="colm-edge",
    owner="colm-edge",
    ask=_ask,
    read=_read,
    n_answer=0,
    scoring=Scoring(_ask_scores, vllm.read_scores),
)
