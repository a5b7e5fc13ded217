"""Data lines: a JSONL file of prompts with completions, conversations or texts, as token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colm_edge.errors import DataError, PromptError

if TYPE_CHECKING:
    from colm_edge.pair import Pair

Row = tuple[int, dict[str, Any]]  # the line's number and its object


@dataclass(frozen=True)
class Document:
    """Token ids, of which those from `start` on are scored; `line` is where they came from."""

    tokens: list[int]
    start: int
    line: int


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yield a JSONL file's objects. Raises DataError with the number of a bad line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise DataError(f"line {number}: {e}") from e
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise DataError(f"line {number}: expected a JSON object, got {kind}")
                yield number, row
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected a JSONL file") from e


def tokenized(rows: Iterable[Row], pair: Pair, *, raw: bool = False) -> list[Document]:
    """Return rows as token ids, prompts as `run` would write them.

    Documents longer than the context are cut at a token. Raises DataError with the number of a
    line that cannot be scored, or when there is none that can.
    """
    documents: list[Document] = []
    for number, row in rows:
        try:
            documents += _documents(row, pair, raw, number)
        except (ValueError, PromptError) as e:
            raise DataError(f"line {number}: {e}") from e
    documents = [d for d in documents if d.start < len(d.tokens)]
    if not documents:
        raise DataError("the data has no documents; expected one JSON object a line")
    return documents


def _documents(row: dict[str, Any], pair: Pair, raw: bool, line: int) -> Iterator[Document]:
    if "text" in row:
        tokens = pair.base.tokenize(_text(row, "text"))
        # Nothing stands before the first token to predict it from.
        yield _document(tokens, 1, pair, line)
        return
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError("messages must be a list of objects with role and content")
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        if not turns or turns[0] == 0:
            raise ValueError("messages must hold an assistant's turn after another's")
    elif "prompt" in row and "completion" in row:
        messages = [
            {"role": "user", "content": _text(row, "prompt")},
            {"role": "assistant", "content": _text(row, "completion")},
        ]
        turns = [1]
    else:
        raise ValueError("expected prompt and completion, or messages, or text")
    for i in turns:
        prompt = pair.prompt_tokens(messages[:i], raw=raw)
        completion = pair.base.tokenize(_text(messages[i], "content"), special=False, bos=False)
        if not completion:
            raise ValueError("the completion is empty")
        # The end of the turn is learnt too, where both models have a token for it.
        end = pair.base.end_token
        ends = [end] if 0 <= end < pair.n_shared else []
        yield _document([*prompt, *completion, *ends], len(prompt), pair, line)


def _document(tokens: list[int], start: int, pair: Pair, line: int) -> Document:
    alone = [token for token in tokens if token >= pair.n_shared]
    if alone:
        raise ValueError(
            f"{pair.base.token_text(alone[0])!r} is a token of the base alone; leave it out"
        )
    return Document(tokens[: pair.n_ctx], start, line)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a text that is not empty")
    return value
