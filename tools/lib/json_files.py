"""JSON of a checkpoint, which comes from anywhere: read, or refused in one line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from colm_edge.errors import ModelError

MOST_JSON_BYTES = 48 << 20  # more than any tokenizer or header has


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a plain file and give its size. Raises ModelError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path}: not a plain file; give the file itself")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror or e}") from e


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises ModelError."""
    with opened(path) as (file, size):
        if size > MOST_JSON_BYTES:
            raise ModelError(
                f"{path}: has {size:,} bytes, expected at most {MOST_JSON_BYTES:,}; download it "
                "again"
            )
        return parse_json(path, file.read())


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Return the JSON object in a text, which a file holds. Raises ModelError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: not valid JSON ({str(e)[:80]}); download it again") from e
    if not isinstance(value, dict):
        raise ModelError(
            f"{path}: expected a JSON object, found a {type(value).__name__}; download it again"
        )
    return value


@contextmanager
def as_written(path: Path, by: str) -> Iterator[None]:
    """Say of what goes wrong inside that a JSON file is not as `by` writes it."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        raise ModelError(
            f"{path}: cannot be read ({type(e).__name__}: {str(e)[:80]}), expected what {by} "
            "writes; save it again"
        ) from e
