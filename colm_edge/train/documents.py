"""Data lines: a JSONL file of prompts with completions, conversations or texts, as token ids."""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from colm_edge.arrays import Ints, Tokens
from colm_edge.errors import DataError, PromptError
from colm_edge.files import replacing
from colm_edge.llama.chat_template import on_one_day
from colm_edge.llama.tokenizer import PARTED

if TYPE_CHECKING:
    from colm_edge.pair import Pair


Row = tuple[int, dict[str, Any]]  # the line's number and its object
TOKENS_FILE = "tokens.int32"
VALID_SHARE = 0.2  # of the lines, held back
MIN_LINES = 5  # fewer leave none to hold back


@dataclass(frozen=True)
class Document:
    """Token ids, of which those from `start` on are scored; `line` is where they came from."""

    tokens: list[int]
    start: int
    line: int


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Document]):
    """Documents as arrays: the token ids of all in one, and three numbers for each.

    tokens: (n_tokens,), mapped from a file if there is a work folder. lengths, starts, lines:
    (n,) each. n_cut of them were longer than the context of n_ctx tokens; n_dropped more had no
    token left to score and are left out.
    """

    tokens: Tokens
    lengths: Ints
    starts: Ints
    lines: Ints
    n_ctx: int = 0
    n_cut: int = 0
    n_dropped: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> Document | Documents:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            parts = [self.span(i) for i in chosen]
            tokens = np.concatenate([np.empty(0, np.int32), *parts])
            columns = (self.lengths[index], self.starts[index], self.lines[index])
            return Documents(tokens, *columns, self.n_ctx)
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return Document(self.span(index).tolist(), int(self.starts[index]), int(self.lines[index]))

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_scored(self) -> int:
        """Tokens that are scored, the rows of `Scores`."""
        return int(self.counts.sum())

    @cached_property
    def counts(self) -> Ints:
        """How many tokens of each document are scored, (n,)."""
        return self.lengths - self.starts

    @cached_property
    def offsets(self) -> Ints:
        """Where each document's tokens begin, and where the last one's end, (n + 1,)."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @cached_property
    def scored_offsets(self) -> Ints:
        """Where each document's scored tokens begin among all scored ones, (n + 1,)."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    def span(self, index: int) -> Tokens:
        """Return one document's token ids, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def scored(self, first: int, last: int) -> Tokens:
        """Return the scored tokens of the documents from `first` to before `last`."""
        # Each row's place among all tokens: its own number, less the rows and plus the tokens
        # before its document's.
        shift = self.offsets[first:last] + self.starts[first:last] - self.scored_offsets[first:last]
        rows = np.arange(self.scored_offsets[first], self.scored_offsets[last])
        chosen: Tokens = self.tokens[rows + np.repeat(shift, self.counts[first:last])]
        return chosen

    def scored_lines(self, first: int, last: int) -> Ints:
        """Return the lines of these scored tokens."""
        lines: Ints = np.repeat(self.lines[first:last], self.counts[first:last])
        return lines

    def chunks(self, n_rows: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of successive documents with about n_rows scored tokens."""
        firsts = np.searchsorted(self.scored_offsets, range(0, self.n_scored, n_rows))
        yield from pairwise([*firsts.tolist(), len(self)])

    def key(self, index: int) -> int:
        """Return 64 bits that identify a document by its tokens and start, not by its place."""
        digest = blake2b(self.span(index).tobytes(), digest_size=8)
        digest.update(int(self.starts[index]).to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")

    @cached_property
    def keys(self) -> npt.NDArray[np.uint64]:
        """Every document's key, (n,)."""
        return np.fromiter((self.key(i) for i in range(len(self))), np.uint64, len(self))

    @property
    def cut_note(self) -> str:
        """What a user should know of documents that did not fit; empty if all did."""
        notes = []
        if self.n_cut:
            notes.append(
                f"{self.n_cut} longer than the context of {self.n_ctx} tokens and cut there (-c)"
            )
        if self.n_dropped:
            notes.append(f"{self.n_dropped} without a token left to score and left out")
        return f"documents: {len(self)}; {'; '.join(notes)}" if notes else ""


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yield a JSONL file's objects. Raises DataError with the number of a bad line."""
    try:
        with open(path, "rb") as file:
            head = file.peek(len(codecs.BOM_UTF8))  # a pipe cannot be read twice
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{path} is UTF-16; save it as UTF-8")
            if head.startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise DataError(f"{path}, line {number}: not JSON ({e})") from e
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise DataError(f"{path}, line {number}: expected a JSON object, got {kind}")
                yield number, row
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected a JSONL file") from e


def tokenized(
    rows: Iterable[Row], pair: Pair, *, raw: bool = False, work: Path | None = None
) -> Documents:
    """Return rows as token ids, prompts as `run` would write them.

    Documents longer than the context are cut at a token and counted. work: a folder that keeps the
    token ids in a file, so that memory use is 24 bytes a document, whatever its length.
    Raises DataError with the number of a line that cannot be scored, or when no line can.
    """
    return gathered(_documents_of(rows, pair, raw), pair.n_ctx, work)


def gathered(documents: Iterable[Document], n_ctx: int, work: Path | None = None) -> Documents:
    """Return documents as arrays, cut where a context of n_ctx tokens ends; work: as above."""
    if work is None:
        tokens = array("i")
        counts = _collect(documents, n_ctx, tokens.extend)
        return _checked(Documents(np.frombuffer(tokens, np.int32), *counts))
    path = work / TOKENS_FILE
    try:
        work.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                counts = _collect(documents, n_ctx, lambda new: file.write(array("i", new)))
            _checked(Documents(np.empty(0, np.int32), *counts))  # an empty file cannot be mapped
        return Documents(np.memmap(path, np.int32, "r"), *counts)
    except OSError as e:
        raise DataError(f"{work}: cannot keep the token ids there: {e.strerror or e}") from e


def _collect(
    documents: Iterable[Document], n_ctx: int, keep: Callable[[list[int]], object]
) -> tuple[Ints, Ints, Ints, int, int, int]:
    """Pass the tokens to `keep`, document by document; return the other fields of Documents."""
    lengths, starts, lines = array("q"), array("q"), array("q")
    n_cut = n_dropped = 0
    for document in documents:
        tokens = document.tokens[:n_ctx]
        if document.start >= len(tokens):
            n_dropped += 1
            continue
        n_cut += len(document.tokens) > len(tokens)
        keep(tokens)
        lengths.append(len(tokens))
        starts.append(document.start)
        lines.append(document.line)
    small = [np.frombuffer(column, np.int64) for column in (lengths, starts, lines)]
    return small[0], small[1], small[2], n_ctx, n_cut, n_dropped


def _checked(documents: Documents) -> Documents:
    if len(documents):
        return documents
    if documents.n_dropped:
        raise DataError(
            f"of {documents.n_dropped} documents, none has a token to score in a context of "
            f"{documents.n_ctx} tokens: raise -c, or give texts of two tokens or more"
        )
    raise DataError("the data has no documents; expected one JSON object a line")


def _documents_of(rows: Iterable[Row], pair: Pair, raw: bool) -> Iterator[Document]:
    for number, row in rows:
        try:
            yield from _documents(row, pair, raw, number)
        except (ValueError, PromptError) as e:
            raise DataError(f"line {number}: {e}") from e


def _documents(row: dict[str, Any], pair: Pair, raw: bool, line: int) -> Iterator[Document]:
    if "text" in row:
        tokens = pair.tokens_of(_text(row, "text"))
        # The first token has nothing before it to predict it from.
        yield _document(tokens, 1, pair, line)
        return
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError("messages must be a list of objects with role and content")
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        if not turns or turns[0] == 0:
            raise ValueError("messages must hold an assistant's turn after another role's")
    elif "prompt" in row and "completion" in row:
        messages = [
            {"role": "user", "content": _text(row, "prompt")},
            {"role": "assistant", "content": _text(row, "completion")},
        ]
        turns = [1]
    else:
        raise ValueError("expected prompt and completion, or messages, or text")
    prompt: list[int] = []
    for i in turns:
        if len(prompt) >= pair.n_ctx:
            # A longer conversation does not fit either, and to write it again for each of very many
            # turns would take very long.
            yield Document(prompt, len(prompt), line)
            continue
        prompt = prompt_of(pair, messages[:i], raw=raw)
        if not prompt:
            raise ValueError("the prompt has no tokens")
        text = _behind_prompt(pair, messages[: i + 1], raw=raw)
        completion = pair.base.tokenize(text, special=False, bos=False)
        if not completion:
            raise ValueError("the completion is empty")
        # The end of the turn is learnt too, where both models have a token for it.
        end = pair.base.end_token
        ends = [end] if 0 <= end < pair.n_shared else []
        yield _document([*prompt, *completion, *ends], len(prompt), pair, line)


def _behind_prompt(pair: Pair, messages: Sequence[dict[str, Any]], *, raw: bool) -> str:
    """Return the last message as it stands behind its prompt: without the space that some
    vocabularies put before the beginning of a text, and with one that the template puts there."""
    content = _text(messages[-1], "content")
    asked, told = (
        pair.prompt_text(some, raw=raw, strftime_now=on_one_day)
        for some in (messages[:-1], messages)
    )
    space = " " if told.startswith(f"{asked} {content}") else ""
    return PARTED + space + content


def prompt_of(pair: Pair, messages: Any, *, raw: bool) -> list[int]:
    """Return a conversation as token ids. Where the template writes the date, it is always the
    same: what a work folder keeps is found by these ids, on any day."""
    return pair.prompt_tokens(messages, raw=raw, strftime_now=on_one_day)


def _document(tokens: list[int], start: int, pair: Pair, line: int) -> Document:
    alone = [token for token in tokens if token >= pair.n_shared]
    if alone:
        raise ValueError(
            f"{pair.base.token_text(alone[0])!r} is a token of the base alone; leave it out"
        )
    return Document(tokens, start, line)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a text that is not empty")
    return value


def check_lines(n: int) -> None:
    """Raise DataError when there are too few lines, or different ones, to hold any back."""
    if n < MIN_LINES:
        lines = "1 line" if n == 1 else f"{n} lines"
        raise DataError(f"{lines}; expected at least {MIN_LINES} different ones, to hold one back")


def held_back_lines(documents: Documents, seed: int) -> set[int]:
    """Return the lines that are held back: those of a share whose prompts, or texts where they have
    none, have the smallest hashes with the seed.

    By content: answers to one prompt are on one side, and when others are added to the data,
    documents stay on theirs, except for a few near the border.

    Raises DataError for too few different lines.
    """
    lines, first = np.unique(documents.lines, return_index=True)
    check_lines(len(lines))
    hashes = [_hash(documents, i, seed, by_prompt=documents.starts[i] > 1) for i in first.tolist()]
    if len(set(hashes)) < MIN_LINES:  # so few prompts cannot be split
        hashes = [_hash(documents, i, seed, by_prompt=False) for i in first.tolist()]
    n_lines = Counter(hashes)
    check_lines(len(n_lines))
    room, chosen = round(VALID_SHARE * len(lines)), set[bytes]()
    for each in sorted(n_lines):
        if n_lines[each] <= room:
            chosen.add(each)
            room -= n_lines[each]
    chosen = chosen or {min(n_lines, key=n_lines.__getitem__)}
    return {line for line, each in zip(lines.tolist(), hashes, strict=True) if each in chosen}


def _hash(documents: Documents, index: int, seed: int, *, by_prompt: bool) -> bytes:
    tokens = documents.span(index)
    of = tokens[: documents.starts[index]] if by_prompt else tokens
    return blake2b(of.tobytes(), digest_size=8, key=str(seed).encode()).digest()
