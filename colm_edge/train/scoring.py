"""Scoring passes: what a model says of every token of the data, kept as it comes.

Each model evaluates the data once, several documents at a time. With a work folder the results are
files in it, mapped into memory once they are whole; a pass that was killed goes on where it stood.

    tokens.i32              the token ids of all documents
    token.npy, line.npy     of every scored token, in the documents' order
    base-<fingerprint>/     of every scored token hidden.npy, features.npy, logprob.npy, right.npy;
                            documents.npy tells whose rows they are, state.npy which are scored
    expert-<fingerprint>/   logprob.npy, right.npy, documents.npy, state.npy
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.errors import ColmError, DataError
from colm_edge.files import replacing
from colm_edge.remote.client import RemoteSession
from colm_edge.train.documents import Documents

if TYPE_CHECKING:
    from colm_edge.llama.scorer import Scorer
    from colm_edge.pair import Pair
    from colm_edge.remote.client import RemoteExpert
from colm_edge.train.store import (
    COPY_ROWS,
    KEPT,
    TO_DO,
    Columns,
    Kinds,
    Ledger,
    Memory,
    _disk,
    _write_header,
)

Array = npt.NDArray[np.float64]
PACK_TOKENS = 1024  # of short documents, evaluated together
# The largest log-probability that stands for none: vLLM's, llama.cpp's is lower.
ZERO_PROBABILITY = -9999.0


class Progress(Protocol):
    """A progress bar: `update(n)` says how many more tokens were scored."""

    def update(self, n_steps: int) -> None: ...


MakeProgress = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass
class Scores:
    """What both models said of every scored token, one row each."""

    hidden: npt.NDArray[np.float32]  # (n, n_embd)
    logit_features: npt.NDArray[np.float32]  # (n, 8)
    base: Array  # log-probability of the gold token, nats
    expert: Array
    base_right: npt.NDArray[np.bool_]  # the gold token is the model's likeliest
    expert_right: npt.NDArray[np.bool_]
    token: npt.NDArray[np.int32]  # the gold token
    line: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.bool_]) -> Scores:
        return Scores(**{name: value[rows] for name, value in vars(self).items()})


def score(
    pair: Pair,
    documents: Documents,
    progress: MakeProgress,
    *,
    work: Path | None = None,
    update: bool = False,
    expert_scores: Path | None = None,
) -> Scores:
    """Evaluate every document once with each model.

    work: a folder that keeps the results; a pass found there is taken up again, and one of another
    model or of other data is refused. update: other data and another expert are welcome there;
    documents that the folder knows are not evaluated again. expert_scores: a file that
    `score_expert` wrote, instead of the expert.

    Raises DataError for what does not belong to these documents and for a disk that is full,
    ColmError for a model that gives NaN.
    """
    base = _pass(pair, "base", documents, progress, work, update)
    if expert_scores is not None:
        expert = _read_expert(expert_scores, documents)
    else:
        expert = _pass(pair, "expert", documents, progress, work, update)
    return Scores(
        hidden=base["hidden"],
        logit_features=base["features"],
        base=base["logprob"],
        expert=expert["logprob"],
        base_right=base["right"],
        expert_right=expert["right"],
        **_whence(documents, work),
    )


def _whence(documents: Documents, work: Path | None) -> Columns:
    """Return token and line of every row, (n,) each; with a work folder from files in it."""
    n = len(documents)
    if work is None:
        return {
            "token": documents.scored(0, n),
            "line": np.repeat(documents.lines, documents.counts),
        }
    columns: Columns = {}
    for name, kind in (("token", np.int32), ("line", np.int64)):
        path = work / f"{name}.npy"
        with replacing(path) as temporary, _disk(work), temporary.open("wb") as file:
            _write_header(file, (documents.n_scored,), kind)
            starts = np.searchsorted(documents.rows, range(0, documents.n_scored, COPY_ROWS))
            for first, last in pairwise([*starts.tolist(), n]):
                if name == "token":
                    file.write(documents.scored(first, last).data)
                else:
                    some = slice(first, last)
                    file.write(np.repeat(documents.lines[some], documents.counts[some]).data)
        with _disk(work):
            columns[name] = np.load(path, mmap_mode="r")
    return columns


def score_expert(
    pair: Pair,
    documents: Documents,
    path: Path,
    progress: MakeProgress,
    *,
    work: Path | None = None,
    update: bool = False,
) -> dict[str, Any]:
    """Write the expert's log-probabilities of the documents to a file for `score`, elsewhere.

    The file is numpy's .npz: tokens int32, those of all documents one after the other; lengths,
    starts and lines int64, one for each document; logprob float64 in nats and right bool, one for
    each scored token; model, the expert's file. work, update: as in `score`.

    Returns what it did. Raises WriteError when the file cannot be written.
    """
    columns = _pass(pair, "expert", documents, progress, work, update)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            tokens=documents.tokens, lengths=documents.lengths, starts=documents.starts,
            lines=documents.lines, logprob=columns["logprob"], right=columns["right"],
            model=np.array(pair.expert.name),
        )  # fmt: skip
    return {
        "model": pair.expert.name,
        "n_documents": len(documents),
        "n_tokens": documents.n_scored,
        "n_cut": documents.n_cut,
        "n_dropped": documents.n_dropped,
        "nll": float(-columns["logprob"].mean()),
    }


def scored_by(path: Path | None) -> str | None:
    """Return the model that a file of `score_expert` names; None where none is named."""
    if path is None:
        return None
    with np.load(path) as file:
        return str(file["model"]) if "model" in file else None


def _read_expert(path: Path, documents: Documents) -> Columns:
    try:
        with np.load(path) as file:
            same = (
                np.array_equal(file["lengths"], documents.lengths)
                and np.array_equal(file["starts"], documents.starts)
                and np.array_equal(file["tokens"], documents.tokens)
            )
            columns: Columns = {name: file[name] for name in ("logprob", "right")}
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected a file of `colm-edge score`") from e
    except (KeyError, ValueError, EOFError) as e:
        raise DataError(f"{path}: not a file of `colm-edge score` ({e})") from e
    if not same:
        raise DataError(
            f"{path}: holds scores of other data, or of prompts that another base's chat template "
            "wrote; score this data with this base"
        )
    if any(column.shape != (documents.n_scored,) for column in columns.values()):
        raise DataError(f"{path}: is broken: expected {documents.n_scored} scores; write it again")
    return columns


def _pass(
    pair: Pair,
    name: Literal["base", "expert"],
    documents: Documents,
    progress: MakeProgress,
    work: Path | None,
    update: bool,
) -> Columns:
    """Return one model's columns: logprob (n,), right (n,), and for the base hidden, features."""
    kinds: Kinds = {"logprob": ((), np.float64), "right": ((), np.bool_)}
    if name == "base":
        kinds["hidden"] = ((pair.base.n_embd,), np.float32)
        kinds["features"] = ((len(readout.FEATURES),), np.float32)
    ledger: Memory | Ledger
    if work is None:
        ledger = Memory(kinds, documents)
    else:
        ledger = Ledger(_folder(work, name, pair, update), kinds, documents, update)
    with ExitStack() as stack:
        stack.enter_context(ledger)
        bar = stack.enter_context(progress(name, documents.n_tokens))
        bar.update(int(documents.lengths[ledger.state != TO_DO].sum()))
        scorer: Scorer | None = None
        for group in _groups(documents, ledger.state):
            if (ledger.state[group] != TO_DO).all():
                continue
            if name == "expert" and isinstance(pair.expert, RemoteSession):
                found = _score_there(pair.expert.expert, documents, group)
            else:
                scorer = scorer or stack.enter_context(_scorer(pair, name))
                found = _score_here(scorer, documents, group, pair.n_shared)
            ledger.write(group, found)
            bar.update(int(documents.lengths[group].sum()))
    return ledger.columns


def _scorer(pair: Pair, name: str) -> Scorer:
    from colm_edge.llama.scorer import Scorer

    session = pair.base_session if name == "base" else pair.expert_session
    # No smaller than in use: some models scale their positions by the context's size.
    return Scorer(session, max(PACK_TOKENS, session.n_ctx), hidden=name == "base")


def _groups(documents: Documents, state: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the numbers of documents that are evaluated together, all that were not kept.

    They do not depend on how far a pass has come: the last bits of a score depend on what was
    evaluated beside it, and an interrupted pass gives the same scores.
    """
    from colm_edge.llama.scorer import MAX_SEQUENCES

    group: list[int] = []
    n_tokens = 0
    for i in np.flatnonzero(state != KEPT):
        n = int(documents.lengths[i])
        if group and (n_tokens + n > PACK_TOKENS or len(group) == MAX_SEQUENCES):
            yield np.array(group)
            group, n_tokens = [], 0
        group.append(int(i))
        n_tokens += n
    if group:
        yield np.array(group)


def _score_there(
    expert: RemoteExpert, documents: Documents, group: npt.NDArray[np.int64]
) -> Columns:
    """Return a group's columns as an expert on a server gives them."""
    spans = [documents.span(i) for i in group]
    logprobs, right = list[float](), list[bool]()
    for some, likeliest in expert.score(spans, documents.starts[group].tolist()):
        logprobs += some
        right += likeliest
    if not (np.array(logprobs) > ZERO_PROBABILITY).all():
        raise ColmError(f"{expert.url}: gives NaN or zero probability to a token of the data")
    return {"logprob": np.array(logprobs), "right": np.array(right, np.bool_)}


def _score_here(
    scorer: Scorer, documents: Documents, group: npt.NDArray[np.int64], n_shared: int
) -> Columns:
    """Return a group's columns; of a scorer of hidden states those of the base."""
    spans = [documents.span(i) for i in group]
    lengths, starts = documents.lengths[group], documents.starts[group]
    gold = np.concatenate([s[k:] for s, k in zip(spans, starts, strict=True)])
    found: dict[str, list[npt.NDArray[Any]]] = {}
    at = 0
    for logits, hidden in scorer.score(np.concatenate(spans), lengths, starts):
        n = len(logits)
        rows = gold[at : at + n]
        features = np.empty((n, len(readout.FEATURES)), np.float32) if hidden.size else None
        argmax, logsumexp = np.empty(n, np.int32), np.empty(n)
        try:
            readout.read_rows(logits, features, argmax, logsumexp, n_shared)
            logprob = logits[np.arange(n), rows] - logsumexp
            if not np.isfinite(logprob).all():
                raise ValueError("a token of the data has no probability")
        except ValueError as e:
            raise ColmError(
                f"{scorer.model.path}: gives NaN or zero probability to a token of the data; "
                f"the file is broken or not the model that the data needs ({e})"
            ) from e
        columns = {"logprob": logprob, "right": argmax == rows}
        if features is not None:
            columns |= {"hidden": hidden.copy(), "features": features}
        for name, column in columns.items():
            found.setdefault(name, []).append(column)
        at += n
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _folder(work: Path, name: str, pair: Pair, update: bool) -> Path:
    """Return the folder of a model's columns. Raises DataError where another model's stand.

    Each model has its own, by its fingerprint, so that no two are ever mixed; after an update the
    former expert's stay and are found again should it come back.
    """
    with _disk(work):
        work.mkdir(parents=True, exist_ok=True)
    is_base = name == "base"
    model = str(pair.base.path) if is_base else pair.expert.name
    mark = pair.base.fingerprint if is_base else pair.expert.fingerprint
    folder = work / f"{name}-{mark[:8]}"
    others = [p for p in work.glob(f"{name}-" + "[0-9a-f]" * 8) if p != folder]
    if folder.exists() or not others or (update and not is_base):
        return folder
    cure = "" if is_base else " or have it updated (--update)"
    raise DataError(
        f"{others[0]}: holds scores of another model than {model}; name another work folder, "
        f"remove this one{',' if cure else ''}{cure}"
    )
