"""How much it matters what a token is: what the expert regrets counts so many times.

A switch that counts all regrets alike spends its calls where models word things differently, which
is in prose. But another token in a program is another program; the first token decides how the
whole answer is laid out, though the expert may be of two minds about it; and an answer that does
not end where it should goes on for a hundred tokens that nobody asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import numpy as np

from colm_edge.arrays import Bools, Doubles, Tokens
from colm_edge.train.documents import Documents

PROSE, CODE, EDGE = 1.0, 5.0, 30.0
FENCE = re.compile(rb"`{3,}")


def importance(
    documents: Documents,
    likeliest: Tokens,
    piece: Callable[[int], bytes],
    ends: Collection[int],
    first: int,
    last: int,
) -> Doubles:
    """Return the importance of each scored token of the documents from `first` to before `last`,
    (n,): EDGE where the answer begins, where it ends, and where the base would end it, CODE in a
    program, else PROSE.

    likeliest (n_scored,): the base's choices, of all documents. piece: gives a token's bytes. ends:
    the tokens that end an answer.
    """
    chosen = likeliest[documents.scored_offsets[first] : documents.scored_offsets[last]]
    marks = list(ends)
    at_edge = np.isin(chosen, marks) | np.isin(documents.scored(first, last), marks)
    at_edge[documents.scored_offsets[first:last] - documents.scored_offsets[first]] = True
    inside = in_code(documents, piece, first, last)
    return np.where(at_edge, EDGE, np.where(inside, CODE, PROSE))


def in_code(documents: Documents, piece: Callable[[int], bytes], first: int, last: int) -> Bools:
    """Return whether each of these tokens begins in a block that a fence has opened, as Markdown
    has them, (n,). The fence that closes a block is still in it; those of the prompt do not count.
    """
    parts = [np.empty(0, np.bool_)]
    for i in range(first, last):
        pieces = [piece(token) for token in documents.span(i)[documents.starts[i] :].tolist()]
        begins = np.cumsum([0, *map(len, pieces)])[:-1]
        fences = [match.end() for match in FENCE.finditer(b"".join(pieces))]
        parts.append(np.searchsorted(fences, begins, side="right") % 2 == 1)
    return np.concatenate(parts)
