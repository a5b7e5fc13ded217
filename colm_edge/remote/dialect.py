"""What tells one kind of server from another: the record that each dialect's module fills in.

A new kind of server is a new module with a `DIALECT`, and its name in `greeting.DIALECTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

Body = dict[str, Any]  # of a request, as JSON
Top = dict[int, float]  # the likeliest next tokens: id -> log-probability
Spelt = list[tuple[int, bytes]]  # tokens, and the bytes of each
# Of consecutive tokens: their log-probabilities, and whether each was the likeliest.
Scored = tuple[list[float], list[bool]]


class Successors(NamedTuple):
    """What a server tells of what follows some tokens.

    n_evaluated: how many tokens it evaluated, if it tells. pieces: the bytes of tokens in `top`, if
    it tells them there.
    """

    top: Top
    n_evaluated: int | None
    pieces: Mapping[int, bytes] = MappingProxyType({})


class Tokenize(Protocol):
    """Returns the body of a request to /tokenize, whose answer has `tokens`.

    special: turn names of control tokens in the text into those, if the server lets one choose.
    begin: put the begin token first, if the vocabulary adds one. pieces: ask for their bytes too.
    """

    def __call__(
        self,
        model: str,
        text: str,
        *,
        special: bool = False,
        begin: bool = False,
        pieces: bool = False,
    ) -> Body: ...


@dataclass(frozen=True)
class AskScores:
    """How a server is asked how likely the tokens of documents are.

    ask: (model, documents) -> body of a request to the dialect's `path`.
    read: (answer, documents, for each the first token that is scored) -> what is said of each.
    """

    ask: Callable[[str, list[list[int]]], Body]
    read: Callable[[Any, list[list[int]], Sequence[int]], list[Scored]]


@dataclass(frozen=True)
class AskRows:
    """How a server is asked, in one request, what follows several of a text's tokens.

    ask: (model, tokens, rising places in them, n_probs) -> body of a request to the dialect's
        `path`; the last place is the last token.
    read: (answer, places) -> a reply for each.
    """

    ask: Callable[[str, list[int], Sequence[int], int], Body]
    read: Callable[[Any, Sequence[int]], list[Successors]]


@dataclass(frozen=True)
class AskPieces:
    """How a server tells what its tokens spell, which an expert of another vocabulary needs.

    read: (answer to /tokenize, the text) -> its tokens with their bytes.
    about: path of a GET whose answer has `eos_token`; "" for none.
    keeps_names: whether names of control tokens in a text stay text if that is asked for.
    pieces: (model, tokens, the name of a control token and its id) -> body of a request to
        /detokenize; None where `Successors.pieces` tells them. read_pieces: (answer, tokens, that
        name) -> their bytes, as far as known.
    is_exact: whether these are surely the bytes.
    """

    read: Callable[[Any, str], Spelt]
    about: str = ""
    keeps_names: bool = True
    pieces: Callable[[str, Sequence[int], tuple[str, int]], Body] | None = None
    read_pieces: Callable[[Any, Sequence[int], str], Mapping[int, bytes]] | None = None
    is_exact: bool = True


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked, and how its answers are read.

    Functions that read raise KeyError, IndexError, TypeError, ValueError or AttributeError for an
    answer of another shape.

    owner: the `owned_by` of a model in the server's /v1/models, which identifies the dialect.
    path: what `ask`, `rows` and `scoring` are sent to.
    ask: (model, tokens, n_probs) -> body of a request for what follows the tokens.
    n_probs: how many successors are asked for; the rest of the probability is shared evenly.
    n_answer: tokens that an answer takes of the server's context.
    scoring: None for a server that tells only what follows a prompt. rows: None for one that is
        better asked for each in turn.
    """

    name: str
    owner: str
    path: str
    tokenize: Tokenize
    ask: Callable[[str, list[int], int], Body]
    read: Callable[[Any], Successors]
    n_probs: int
    spelling: AskPieces
    n_answer: int = 1
    scoring: AskScores | None = None
    rows: AskRows | None = None
