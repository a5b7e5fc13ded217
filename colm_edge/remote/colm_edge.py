"""The dialect of another colm-edge server: vLLM's, asked for the expert alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from colm_edge.remote import vllm
from colm_edge.remote.dialect import AskPieces, AskRows, AskScores, Body, Successors
from colm_edge.remote.llama_cpp import piece_of, read_spelt

# The expert's own probabilities, whatever the server's defaults are.
_EXPERT_ALONE: Body = {
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "stop": [],
    "colm": {"threshold": 0, "strategy": "defer"},
}


def _tokenize(
    model: str, text: str, *, special: bool = False, begin: bool = False, pieces: bool = False
) -> Body:
    body: Body = {"model": model, "prompt": text, "add_special_tokens": begin}
    return body | {"parse_special": special} | ({"with_pieces": True} if pieces else {})


def _ask(model: str, tokens: list[int], n_probs: int) -> Body:
    return vllm.ask(model, tokens, n_probs) | _EXPERT_ALONE


def _read(answer: Any) -> Successors:
    return Successors(vllm.read_top(answer["choices"][0]), _n_evaluated(answer))


def _n_evaluated(answer: Any) -> int | None:
    if answer["colm"]["expert_failures"]:
        raise ValueError("its own expert is absent")
    n = answer["colm"]["expert_tokens"]
    return None if n is None else int(n)


def _ask_rows(model: str, tokens: list[int], places: Sequence[int], n_probs: int) -> Body:
    """Ask for all in one evaluation: what follows the prompt, and of its own tokens those behind
    the first place."""
    inside = {"prompt_logprobs": n_probs, "prompt_logprobs_from": places[0] + 1}
    asked = _ask(model, tokens, n_probs) | {"with_pieces": True}
    return asked | (inside if len(places) > 1 else {})


def _read_rows(answer: Any, places: Sequence[int]) -> list[Successors]:
    choice, last = answer["choices"][0], _read(answer)
    inside = vllm.read_inside(choice, places)[:-1] if len(places) > 1 else []
    pieces = {int(token): piece_of(piece) for token, piece in choice["pieces"].items()}
    return [*inside, last._replace(pieces=pieces)]


def _ask_scores(model: str, documents: list[list[int]]) -> Body:
    return vllm.ask_scores(model, documents) | _EXPERT_ALONE | {"max_tokens": 0}


DIALECT = replace(
    vllm.DIALECT,
    name="colm-edge",
    owner="colm-edge",
    tokenize=_tokenize,
    ask=_ask,
    read=_read,
    n_answer=0,
    spelling=AskPieces(read_spelt, about="/tokenizer_info"),
    scoring=AskScores(_ask_scores, vllm.read_scores),
    rows=AskRows(_ask_rows, _read_rows),
)
