"""Scoring passes: what a model says of every token of the data, kept as it comes.

Each model evaluates the data once. With a work folder the results are memory-mapped arrays in it,
and a pass that was killed goes on at the document where it stood.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.documents import Document
from colm_edge.errors import ColmError, DataError

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.session import Session

Array = npt.NDArray[np.float64]
Columns = dict[str, npt.NDArray[Any]]

SAVE_SECONDS = 5.0  # between two notes of how far a pass has come
FINGERPRINT_BYTES = 1 << 20  # of a model's file, at each end


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
    token: npt.NDArray[np.int64]  # the gold token
    line: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.bool_]) -> Scores:
        return Scores(**{name: value[rows] for name, value in vars(self).items()})


def score(
    pair: Pair,
    documents: list[Document],
    progress: MakeProgress,
    *,
    work: Path | None = None,
    expert_scores: Path | None = None,
) -> Scores:
    """Evaluate every document once with each model.

    work: a folder that keeps the results; a pass found there is taken up again, and one of
    another model or of other data is refused. expert_scores: a file that `score_expert` wrote,
    instead of the expert.

    Raises DataError for what does not belong to these documents, ColmError for a model that gives
    NaN.
    """
    base = _pass(pair, "base", pair.base_session, documents, progress, work)
    if expert_scores is not None:
        expert = _read_expert(expert_scores, documents)
    else:
        expert = _pass(pair, "expert", pair.expert_session, documents, progress, work)
    lengths = [len(d.tokens) - d.start for d in documents]
    return Scores(
        hidden=base["hidden"],
        logit_features=base["features"],
        base=base["logprob"],
        expert=expert["logprob"],
        base_right=base["right"],
        expert_right=expert["right"],
        token=np.array([token for d in documents for token in d.tokens[d.start :]], np.int64),
        line=np.repeat([d.line for d in documents], lengths),
    )


def score_expert(
    pair: Pair, documents: list[Document], path: Path, progress: MakeProgress
) -> dict[str, Any]:
    """Write the expert's log-probabilities of the documents to a file for `score`, elsewhere.

    Returns what it did. Raises DataError when the file cannot be written.
    """
    columns = _pass(pair, "expert", pair.expert_session, documents, progress, None)
    temporary = path.with_name(f".{path.name}.tmp.npz")
    try:
        key = np.array(_documents_key(documents))
        np.savez(temporary, logprob=columns["logprob"], right=columns["right"], documents=key)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot write the scores: {e.strerror or e}") from e
    return {
        "model": str(pair.expert.path),
        "n_documents": len(documents),
        "n_tokens": len(columns["logprob"]),
        "nll": float(-columns["logprob"].mean()),
    }


def _read_expert(path: Path, documents: list[Document]) -> Columns:
    try:
        with np.load(path) as file:
            columns: Columns = {name: file[name] for name in ("logprob", "right")}
            key = str(file["documents"])
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected a file of `colm-edge score`") from e
    except (KeyError, ValueError, EOFError) as e:
        raise DataError(f"{path}: not a file of `colm-edge score` ({e})") from e
    if key != _documents_key(documents):
        raise DataError(
            f"{path}: holds scores of other data, or of prompts that another base's chat template "
            "wrote; score this data with this base"
        )
    return columns


def _pass(
    pair: Pair,
    name: str,
    session: Session,
    documents: list[Document],
    progress: MakeProgress,
    work: Path | None,
) -> Columns:
    """Return one model's columns: logprob (n,), right (n,), and for the base hidden, features."""
    n = sum(len(d.tokens) - d.start for d in documents)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "logprob": ((n,), np.float64),
        "right": ((n,), np.bool_),
    }
    if name == "base":
        shapes["hidden"] = ((n, pair.base.n_embd), np.float32)
        shapes["features"] = ((n, len(readout.FEATURES)), np.float32)
    ledger = Ledger(work / name, shapes, session, documents) if work is not None else None
    columns = ledger.columns if ledger else {k: np.zeros(s, t) for k, (s, t) in shapes.items()}
    done = ledger.done if ledger else 0
    with progress(name, sum(len(d.tokens) for d in documents)) as bar:
        bar.update(sum(len(d.tokens) for d in documents[:done]))
        row = sum(len(d.tokens) - d.start for d in documents[:done])
        for i, document in enumerate(documents[done:], done + 1):
            row = _score_document(columns, session, document, row, pair.n_shared)
            if ledger is not None:
                ledger.note(i)
            bar.update(len(document.tokens))
    if ledger is not None:
        ledger.save(len(documents))
    return columns


class Ledger:
    """One model's columns in a folder, and how many documents of them are done."""

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[tuple[int, ...], type]],
        session: Session,
        documents: list[Document],
    ) -> None:
        self._notes = folder / "progress.json"
        self._key = {
            "model": _model_key(session.model.path),
            "documents": _documents_key(documents),
        }
        self._saved_at = time.monotonic()
        self.done = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._notes.exists():
                self._take_up(session.model.path)
            self.columns: Columns = dict(self._arrays(folder, shapes))
            if not self.done:
                self.save(0)
        except OSError as e:
            raise DataError(f"{folder}: cannot keep the scores there: {e.strerror or e}") from e

    def _take_up(self, model: Path) -> None:
        try:
            notes = json.loads(self._notes.read_text())
        except ValueError as e:
            raise DataError(f"{self._notes}: is broken ({e}); remove the work folder") from e
        for what, key in self._key.items():
            if notes.get(what) != key:
                other = "another model than " + str(model) if what == "model" else "other data"
                raise DataError(
                    f"{self._notes.parent}: holds scores of {other}; name another work folder, or "
                    "remove this one"
                )
        self.done = int(notes["done"])

    def _arrays(
        self, folder: Path, shapes: dict[str, tuple[tuple[int, ...], type]]
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name, (shape, kind) in shapes.items():
            path = folder / f"{name}.npy"
            if self.done:
                yield name, np.load(path, mmap_mode="r+")
            else:
                yield name, np.lib.format.open_memmap(path, "w+", kind, shape)

    def note(self, done: int) -> None:
        """Remember from time to time how far the pass has come."""
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save(done)

    def save(self, done: int) -> None:
        """Write the columns out, and then that so many documents of them are done."""
        for column in self.columns.values():
            if isinstance(column, np.memmap):
                column.flush()
        temporary = self._notes.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self._key, "done": done}) + "\n")
        os.replace(temporary, self._notes)
        self.done, self._saved_at = done, time.monotonic()


def _model_key(path: Path) -> str:
    """Tell models apart without reading all of them: size, beginning and end of the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def _documents_key(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(np.array([len(document.tokens), document.start], np.int64).tobytes())
        digest.update(np.array(document.tokens, np.int32).tobytes())
    return digest.hexdigest()


def _score_document(
    columns: Columns, session: Session, document: Document, row: int, n_shared: int
) -> int:
    """Fill the rows of one document; return the row after its last."""
    tokens = document.tokens
    # The state at position i predicts token i + 1.
    for at, logits, hidden in session.score(tokens[:-1], document.start - 1):
        n = len(logits)
        rows = slice(row, row + n)
        gold = np.array(tokens[at + 1 : at + 1 + n])
        peak = logits.max(axis=1, keepdims=True)
        lse = np.log(np.exp(logits - peak, dtype=np.float32).sum(axis=1, dtype=np.float64))
        logprob = logits[np.arange(n), gold] - peak[:, 0] - lse
        if not np.isfinite(logprob).all():
            raise ColmError(
                f"{session.model.path}: gives NaN or zero probability to a token of the data; "
                "the file is broken or not the model that the data needs"
            )
        columns["logprob"][rows] = logprob
        columns["right"][rows] = logits[:, :n_shared].argmax(axis=1) == gold
        if "hidden" in columns:
            columns["hidden"][rows] = hidden
            columns["features"][rows] = readout.logit_features(logits)
        row += n
    return row
