"""The dialect of vLLM's OpenAI-compatible server.

`ask` and `ask_scores` are what its API shares with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from colm_edge.remote.byte_names import spelt_by
from colm_edge.remote.dialect import (
    AskPieces,
    AskRows,
    AskScores,
    Body,
    Dialect,
    Scored,
    Spelt,
    Successors,
    Top,
)

FEW = 16  # prompts of one request; more states of a text are asked for as those of a document

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


def _tokenize(
    model: str, text: str, *, special: bool = False, begin: bool = False, pieces: bool = False
) -> Body:
    body: Body = {"model": model, "prompt": text, "add_special_tokens": begin}
    return body | ({"return_token_strs": True} if pieces else {})


def _read_spelt(answer: Any, text: str) -> Spelt:
    tokens, names = answer["tokens"], answer["token_strs"]
    return list(zip(map(int, tokens), spelt_by(names, text), strict=True))


def _ask_pieces(model: str, tokens: Sequence[int], parting: tuple[str, int]) -> Body:
    """Ask for all tokens at once, parted by a control token: its name is in no other's text, and
    some tokenizers drop a space at the beginning."""
    spread = [parting[1], *(one for token in tokens for one in (token, parting[1]))]
    return {"model": model, "tokens": spread}


def _read_pieces(answer: Any, tokens: Sequence[int], parting: str) -> Mapping[int, bytes]:
    before, *texts, after = answer["prompt"].split(parting)
    if (before.strip(), len(texts), after.strip()) != ("", len(tokens), ""):
        raise ValueError(f"{len(texts)} texts of {len(tokens)} tokens")
    found = zip(tokens, texts, strict=True)
    return {token: text.encode() for token, text in found if "\ufffd" not in text}


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


def read_top(choice: Any) -> Top:
    top = choice["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): float(x) for name, x in top.items()}


def _read(answer: Any) -> Successors:
    return Successors(read_top(answer["choices"][0]), _n_evaluated(answer.get("usage") or {}))


def _ask_rows(model: str, tokens: list[int], places: Sequence[int], n_probs: int) -> Body:
    """Ask for a few as prompts of their own, which share the server's prefix cache. What it tells
    of a prompt's own tokens it evaluates again."""
    if len(places) > FEW:
        return _ask(model, tokens, n_probs) | {"prompt_logprobs": n_probs}
    return _ask(model, tokens, n_probs) | {"prompt": [tokens[: at + 1] for at in places]}


def _read_rows(answer: Any, places: Sequence[int]) -> list[Successors]:
    """Read what is told of several; how many tokens were evaluated is told of the last alone."""
    choices = {int(choice["index"]): choice for choice in answer["choices"]}
    if len(places) > FEW:
        return read_inside(choices[0], places)
    return [Successors(read_top(choices[i]), None) for i in range(len(places))]


def read_inside(choice: Any, places: Sequence[int]) -> list[Successors]:
    """Read what follows tokens of a prompt: the entry of the next one tells it, and after the last
    one the answer."""
    *inside, last = places
    entries = [choice["prompt_logprobs"][at + 1] for at in inside]
    if len(choice["prompt_logprobs"]) != last + 1:
        raise ValueError(f"{len(choice['prompt_logprobs'])} entries of {last + 1} tokens")
    tops = [{int(token): float(x["logprob"]) for token, x in entry.items()} for entry in entries]
    return [Successors(top, None) for top in (*tops, read_top(choice))]


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
    by_index = {int(choice["index"]): choice["prompt_logprobs"] for choice in answer["choices"]}
    return [
        _scores_of(by_index[i], document, start)
        for i, (document, start) in enumerate(zip(documents, starts, strict=True))
    ]


def _scores_of(positions: list[Any], document: list[int], start: int) -> Scored:
    if len(positions) != len(document):
        raise ValueError(f"{len(positions)} log-probabilities of {len(document)} tokens")
    logprobs, right = list[float](), list[bool]()
    for token, entries in zip(document[start:], positions[start:], strict=True):
        own = entries[str(token)]
        logprobs.append(float(own["logprob"]))
        right.append(own["rank"] == 1)
    return logprobs, right


DIALECT = Dialect(
    name="vLLM",
    owner="vllm",
    path="/v1/completions",
    tokenize=_tokenize,
    ask=_ask,
    read=_read,
    n_probs=20,  # the most that it allows by default (--max-logprobs)
    spelling=AskPieces(
        _read_spelt,
        keeps_names=False,
        pieces=_ask_pieces,
        read_pieces=_read_pieces,
        is_exact=False,  # some tokenizers tidy up spaces before a full stop
    ),
    scoring=AskScores(_ask_scores, read_scores),
    rows=AskRows(_ask_rows, _read_rows),
)
