"""Long work that resumes: results kept in a file, one line each, as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colm_edge.errors import DataError

MOST_SECONDS = 1e9  # of an answer
START = b'{"key": '  # of every line


class Journal:
    """Results kept in a JSONL file, one line each, so that a run that was stopped can go on;
    without a path, in memory.

    Raises DataError when the file holds something else or cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                whole = 0
                for line in file:
                    if not line.endswith(b"\n"):  # the run was killed while it wrote this line
                        if not (whole or line.startswith(START) or START.startswith(line)):
                            raise ValueError("somebody else's file")
                        break
                    entry = json.loads(line)
                    self._entries[str(entry["key"])] = entry
                    whole += len(line)
                file.truncate(whole)
        except OSError as e:
            raise DataError(f"{path}: cannot keep results there: {e.strerror or e}") from e
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(f"{path}: not a file of kept results; remove it") from e

    def get(self, key: str, is_whole: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """Return an entry; None if there is none, or an earlier version kept less.

        is_whole: whether an entry holds what it should; KeyError says that it holds less. Raises
        DataError where it does not.
        """
        entry = self._entries.get(key)
        try:
            if entry is None or is_whole(entry):
                return entry
        except KeyError:
            return None
        raise DataError(f"{self._path}: holds a result that cannot be one; remove it")

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep an entry; it is in the file when this returns."""
        self._entries[key] = entry
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **entry}) + "\n")
        except OSError as e:
            raise DataError(f"{self._path}: cannot keep a result: {e.strerror or e}") from e


def is_count(value: Any, below: int = 1 << 31) -> bool:
    """Return whether a value of a JSON text is a whole number from 0 to before `below`."""
    return type(value) is int and 0 <= value < below


def is_number(value: Any, low: float, high: float) -> bool:
    """Return whether a value of a JSON text is a number from low to high; NaN is none."""
    return type(value) in (int, float) and low <= value <= high


def key_of(*parts: Any) -> str:
    """Return a key that identifies these parts, which JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
