"""The files of `colm-edge score`: each holds the expert's scores of all documents, or of a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from colm_edge.errors import DataError
from colm_edge.files import replacing
from colm_edge.npy_files import read_arrays
from colm_edge.references import is_url
from colm_edge.train.columns import Columns, check_columns
from colm_edge.train.documents import Documents

EXPERT_COLUMNS = ("logprob", "right", "best", "choice")
MADE_BY = "`colm-edge score`"
# What is read of a file; of the others, its lines are for people.
KINDS = {
    "tokens": np.int32, "lengths": np.int64, "starts": np.int64, "part": np.int64,
    "logprob": np.float64, "right": np.bool_, "best": np.float64, "choice": np.float64,
    "model": str, "base": str,
}  # fmt: skip
OPTIONAL = {"part", "model"}


@dataclass(frozen=True)
class Part:
    """What one file holds: the scores of the documents from `first` to before `last`."""

    path: Path
    first: int
    last: int
    columns: Columns


def write_scores(
    path: Path, part: Documents, first: int, n: int, columns: Columns, model: str, base: str
) -> None:
    """Write the expert's columns of some documents, the first of which has the number `first` among
    all n.

    The file is numpy's .npz: tokens int32, those of all its documents one after the other; lengths,
    starts and lines int64, one for each document; logprob, best and choice float64 in nats and
    right bool, one for each scored token; model, the expert's file; base, the fingerprint of the
    base whose choices the expert was asked about; part int64, the numbers of its first document and
    of the one after its last, and n.

    Raises WriteError when it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            tokens=part.tokens,
            lengths=part.lengths,
            starts=part.starts,
            lines=part.lines,
            logprob=columns["logprob"],
            right=columns["right"],
            best=columns["best"],
            choice=columns["choice"],
            model=np.array(model),
            base=np.array(base),
            part=np.array([first, first + len(part), n], np.int64),
        )


def read_file(path: Path, *names: str) -> dict[str, Any]:
    """Return a file's arrays of these names, and texts, as `write_scores` describes them.

    Raises DataError where it cannot be read, or lacks one that must be there.
    """
    try:
        found: dict[str, Any] = read_arrays(path, {name: KINDS[name] for name in names})
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected a file of {MADE_BY}") from e
    except ValueError as e:
        raise DataError(f"{path}: not a file of {MADE_BY} ({e})") from e
    missing = [name for name in names if name not in found and name not in OPTIONAL]
    if missing:
        raise DataError(f"{path}: not a file of {MADE_BY} (it has no {missing[0]})")
    return found


def read_scores(paths: Sequence[Path], documents: Documents, base: str) -> Columns:
    """Return the expert's columns of all documents. base: the fingerprint of their base.

    Raises DataError for scores of other documents, beside another base or of several experts, and
    for documents that no file or more than one has.
    """
    parts = sorted((_read(path, documents, base) for path in paths), key=lambda part: part.first)
    _check_cover(parts, documents)
    scored_by(paths)
    return {name: np.concatenate([part.columns[name] for part in parts]) for name in EXPERT_COLUMNS}


def scored_by(paths: Sequence[Path]) -> str | None:
    """Return the expert that the files name; None where none is named.

    Raises DataError where they name several.
    """
    named = dict[str, tuple[Path, str]]()
    for path in paths:
        model = read_file(path, "model").get("model")
        if model is not None:
            # The same server may have another address from each machine.
            named.setdefault("a server" if is_url(model) else Path(model).name, (path, model))
    if len(named) > 1:
        listed = ", ".join(f"{path} by {model}" for path, model in named.values())
        raise DataError(f"the score files are of several experts: {listed}; give those of one")
    return next((model for _, model in named.values()), None)


def tell_choices(paths: Sequence[Path]) -> bool:
    """Return whether the files say what the expert thinks of the base's choices, as those of a
    server do not."""
    return not any(np.isnan(read_file(path, "choice")["choice"][:1]).any() for path in paths)


def _read(path: Path, documents: Documents, base: str) -> Part:
    file, n = read_file(path, *KINDS), len(documents)
    columns: Columns = {name: file[name] for name in EXPERT_COLUMNS}
    part = file.get("part", np.array([0, n, n]))
    first, last, n_all = part.tolist() if len(part) == 3 else (0, 0, 0)
    whole = n_all == n and 0 <= first < last <= n
    if not whole or not _is_same(file, documents, first, last):
        raise DataError(
            f"{path}: holds scores of other data, or of prompts in another base's chat template; "
            "score this data with this base"
        )
    if file["base"] != base:
        raise DataError(
            f"{path}: the expert was asked about the choices of another base; score this data with "
            "this base"
        )
    n_scored = int(documents.scored_offsets[last] - documents.scored_offsets[first])
    if any(column.shape != (n_scored,) for column in columns.values()):
        raise DataError(
            f"{path}: is broken: expected {n_scored} scores; write it again with {MADE_BY}"
        )
    try:
        check_columns(columns)
    except ValueError as e:
        raise DataError(f"{path}: {e}; score the data again") from e
    return Part(path, first, last, columns)


def _is_same(file: dict[str, Any], documents: Documents, first: int, last: int) -> bool:
    """Return whether a file's documents are these."""
    tokens = documents.tokens[documents.offsets[first] : documents.offsets[last]]
    return (
        np.array_equal(file["lengths"], documents.lengths[first:last])
        and np.array_equal(file["starts"], documents.starts[first:last])
        and np.array_equal(file["tokens"], tokens)
    )


def _check_cover(parts: Sequence[Part], documents: Documents) -> None:
    """Raise DataError unless the parts, in order, have every document once."""
    start, end = (Part(Path(), n, n, {}) for n in (0, len(documents)))
    gaps = []
    for before, part in pairwise([start, *parts, end]):
        if before.last > part.first:
            lines = _lines(documents, part.first, min(before.last, part.last))
            raise DataError(f"{before.path} and {part.path} both have {lines}; give one of them")
        if before.last < part.first:
            gaps.append(_lines(documents, before.last, part.first))
    if gaps:
        raise DataError(f"the score files lack {', '.join(gaps)}; give those of all shards")


def _lines(documents: Documents, first: int, last: int) -> str:
    begin, end = int(documents.lines[first]), int(documents.lines[last - 1])
    return f"line {begin}" if begin == end else f"lines {begin} to {end}"
