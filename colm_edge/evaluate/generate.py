"""Answer every prompt of a data file, judge the answers, and keep them on disk as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.errors import DataError, SwitchError
from colm_edge.evaluate.metrics import Metric, check_rows
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import N_LOGIT, AnySwitch, Base, Floats, Reader

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.stream import Answer
    from colm_edge.train.documents import Row
    from colm_edge.train.scoring import MakeProgress

KEPT = {"text", "tokens", "deferred", "seconds", "cut"}  # of an answer in a journal


@dataclass(frozen=True)
class RandomSwitch:
    """Defer at random, whatever the base's state: p_defer is drawn uniformly.

    `answers` gives every line of the data its own seed, so that no answer depends on the ones
    before it.
    """

    seed: int = 0
    name: str = "random"
    threshold: float = 0.5
    needs_hidden: bool = False

    def reader(self, base: Base, n_choose: int) -> Reader:
        rng = np.random.default_rng(self.seed)
        out = np.empty(N_LOGIT, np.float32)

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float]:
            choice, logsumexp = readout.read(logits, None, None, None, None, out, n_choose, -1)
            return rng.random(), choice, logsumexp

        return read

    def threshold_for(self, defer_rate: float) -> float:
        raise SwitchError("random deferral has no calibration; give --threshold")


@dataclass(frozen=True)
class Generated:
    """A method's answers to the rows of the data, one entry each, shape (n_rows,)."""

    right: npt.NDArray[np.float64]  # the metric, 0 to 1
    tokens: npt.NDArray[np.int64]
    deferred: npt.NDArray[np.int64]  # of the tokens
    seconds: npt.NDArray[np.float64]  # of the generation, without reading the expert's weights
    cut: npt.NDArray[np.bool_]  # ended by max_tokens or the context, not by the model


class Journal:
    """Results kept in a JSONL file, one line each, so that a run that was stopped can go on.

    Raises DataError when the file holds something else or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                whole = 0
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the run was killed while it wrote this line
                    entry = json.loads(line)
                    self._entries[entry["key"]] = entry
                    whole += len(line)
                file.truncate(whole)
        except OSError as e:
            raise DataError(f"{path}: cannot keep results there: {e.strerror or e}") from e
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path}: not a file of kept results ({e}); remove it") from e

    def get(self, key: str) -> dict[str, Any] | None:
        return self._entries.get(key)

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep an entry; it is in the file when this returns."""
        self._entries[key] = entry
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **entry}) + "\n")
        except OSError as e:
            raise DataError(f"{self._path}: cannot keep a result: {e.strerror or e}") from e


def key_of(*parts: Any) -> str:
    """Return a key that identifies these parts, which JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def answers(
    pair: Pair,
    switch: AnySwitch,
    options: Options,
    rows: list[Row],
    metric: Metric,
    progress: MakeProgress,
    *,
    label: str = "answers",
    journal: Journal | None = None,
) -> Generated:
    """Answer every row's prompt with one switch and judge the answers.

    The threshold is that of the options, or the switch's own. label: names the progress bar and
    the journal's lines. journal: keeps the answers; an answer found in it is not generated again.
    Raises DataError, before the first answer, for rows that the metric cannot judge.
    """
    with pair.switched(switch):
        if pair.running_rate(options) is None:
            options = options.with_changes(threshold=pair.threshold(options))

        def ask(number: int, row: dict[str, Any]) -> Answer:
            message = {"role": "user", "content": row["prompt"]}
            if not isinstance(switch, RandomSwitch):
                return pair.chat([message], **vars(options))
            with pair.switched(replace(switch, seed=number)):
                return pair.chat([message], **vars(options))

        what: list[Any] = []
        if journal is not None:
            models = [pair.base.fingerprint, pair.expert.fingerprint]
            what = [*models, pair.n_ctx, _switch_key(switch), asdict(options)]
        return judged(ask, rows, metric, progress, label=label, journal=journal, what=what)


def judged(
    ask: Callable[[int, dict[str, Any]], Answer],
    rows: list[Row],
    metric: Metric,
    progress: MakeProgress,
    *,
    label: str,
    journal: Journal | None,
    what: list[Any],
) -> Generated:
    """Ask for an answer to every row and judge it.

    what: with the row, the key of an answer in the journal: all that it depends on.
    """
    check_rows(rows, metric)
    entries: list[dict[str, Any]] = []
    right: list[float] = []
    with progress(label, len(rows)) as bar:
        for number, row in rows:
            key = key_of(what, number, row["prompt"])
            entry = journal.get(key) if journal is not None else None
            if entry is None or not entry.keys() >= KEPT:
                entry = {"method": label, "line": number, **_facts(ask(number, row))}
                if journal is not None:
                    journal.add(key, entry)
            entries.append(entry)
            right.append(metric(entry["text"], row))
            bar.update(1)
    return Generated(
        right=np.array(right, np.float64),
        tokens=np.array([entry["tokens"] for entry in entries], np.int64),
        deferred=np.array([entry["deferred"] for entry in entries], np.int64),
        seconds=np.array([entry["seconds"] for entry in entries], np.float64),
        cut=np.array([entry["cut"] for entry in entries], np.bool_),
    )


def _facts(answer: Answer) -> dict[str, Any]:
    """Return what is kept of an answer."""
    stats = answer.stats
    return {
        "threshold": answer.threshold,
        "text": answer.text,
        "tokens": stats.n_generated,
        "deferred": stats.n_deferred,
        "seconds": stats.total_seconds - stats.expert_load_seconds,
        "cut": answer.finish_reason == "length",
    }


def _switch_key(switch: AnySwitch) -> str:
    if not isinstance(switch, Switch):
        return switch.name
    head = hashlib.sha256(switch.weight.tobytes() + switch.bias.tobytes()).hexdigest()
    return key_of(switch.features, head)
