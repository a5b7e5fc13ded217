"""What tells one kind of server from another: the record that each dialect's module fills in.

A new kind of server is a new module with a `DIALECT`, and its name in `client.DIALECTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]  # of a request, as JSON
# The likeliest next tokens, id -> log-probability, and how many tokens were evaluated, if told.
Reply = tuple[dict[int, float], int | None]
# Of consecutive tokens: their log-probabilities, and whether each was the likeliest.
Scored = tuple[list[float], list[bool]]


@dataclass(frozen=True)
class Scoring:
    """How a server is asked how likely the tokens of documents are.

    ask: (model, documents) -> body of a request to the dialect's `path`.
    read: (answer, documents, for each the first token that is scored) -> what is said of each.
    """

    ask: Callable[[str, list[list[int]]], Body]
    read: Callable[[Any, list[list[int]], Sequence[int]], list[Scored]]


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked, and how its answers are read.

    Functions that read raise KeyError, IndexError, TypeError, ValueError or AttributeError for an
    answer of another shape.

    owner: the `owned_by` of a model in the server's /v1/models, which identifies the dialect.
    path: what `ask` and `scoring` are sent to.
    tokenize: (model, text) -> body of a request to /tokenize, whose answer has `tokens`.
    ask: (model, tokens, n_probs) -> body of a request for what follows the tokens.
    n_probs: how many successors are asked for; the rest of the probability is shared evenly.
    n_answer: tokens that an answer takes of the server's context.
    scoring: None for a server that tells only what follows a prompt.
    """

    name: str
    owner: str
    path: str
    tokenize: Callable[[str, str], Body]
    ask: Callable[[str, list[int], int], Body]
    read: Callable[[Any], Reply]
    n_probs: int
    n_answer: int = 1
    scoring: Scoring | None = None
