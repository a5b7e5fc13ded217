"""The slow twin of `decode.spelling`: it spells a whole text anew each time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from colm_edge.decode.spelling import Crossing, Place


@dataclass
class Part:
    """Text between control tokens: the expert's tokens before it, where both's tokens end in it."""

    n_before: int
    raw: bytes = b""
    tokens: list[int] = field(default_factory=list)
    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)


def spell(
    crossing: Crossing, tokens: Sequence[int], wanted: Sequence[int]
) -> tuple[array, list[Place]]:
    """Return the expert's tokens of the base's, each part given to its tokenizer as a whole, and
    the places of the wanted positions."""
    ours, theirs = crossing.ours, crossing.theirs
    ids = array("i", () if theirs.begin is None else (theirs.begin,))
    found: list[tuple[Part, int] | Place] = []
    part = Part(len(ids))

    def close() -> Part:
        end = 0
        for token in part.tokens if crossing.is_same else theirs.encode(part.raw):
            end += len(theirs.piece(token))
            part.theirs.append(end)
            ids.append(token)
        return Part(len(ids))

    for token in tokens:
        if raw := ours.piece(token):
            part.raw += raw
            part.tokens.append(token)
            part.ours.append(len(part.raw))
            found.append((part, len(part.raw)))
        else:
            part = close()
            ids.extend(crossing.controls(token))
            part = Part(len(ids))
            found.append(Place(len(ids) - 1))
    close()
    return ids, [one if isinstance(one := found[i], Place) else place(*one, ids, crossing)
                 for i in wanted]  # fmt: skip


def place(part: Part, end: int, ids: array, crossing: Crossing) -> Place:
    """Return where the expert is asked for what follows so many bytes of a part."""

    def row(at: int) -> int:
        return part.n_before + sum(one <= at for one in part.theirs) - 1

    if end in part.theirs and crossing.is_same:
        return Place(row(end))
    last = max((one for one in part.theirs if one < end), default=0)
    agreed = max((one for one in part.ours if one <= last and one in part.theirs), default=0)
    at, given = row(agreed), part.raw[agreed:end]
    path = tuple(ids[at + 1 : row(end) + 1]) if end in part.theirs else None
    while path and (at < 0 or not any(goes_on(crossing, given))):
        at, given, path = at + 1, given[len(crossing.theirs.piece(path[0])) :], path[1:]
    return Place(at, given, path)


def goes_on(crossing: Crossing, given: bytes):
    """Yield the expert's tokens that begin with these bytes and go on."""
    for token in range(crossing.theirs.n_vocab):
        piece = crossing.theirs.piece(token)
        if piece != given and piece.startswith(given):
            yield token
