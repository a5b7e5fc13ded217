"""The head of a GGUF file: its keys and its tensors' places, read within the file's own length.

Files come from anywhere. Every count and size is compared with the bytes that are there before
anything is allocated or looped over, so reading takes no longer than the file is long.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colm_edge.arrays import Floats

MAGIC = b"GGUF"
ARCHITECTURE_KEY = "general.architecture"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
MOST_LAYERS = 512  # llama.cpp's
ALIGNMENT = 32  # of tensors, ggml's
# Of the types of values, by their numbers: struct's letter.
SCALARS = "BbHhIif?"
TEXT, ARRAY = 8, 9
LONG_SCALARS = {10: "Q", 11: "q", 12: "d"}
# The tokens that a vocabulary of SentencePiece has for what it has no other token for.
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# Read as texts, and so are templates with names (tokenizer.chat_template.NAME).
TEXT_KEYS = ("tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre")
INTEGERS = range(24, 28)  # ggml's types of whole numbers
# Tensors that every architecture multiplies with or adds; a few others hold indices.
MULTIPLIED = re.compile(r"(norm|embd|output|attn_[qkv]|ffn_(up|down|gate))\.(weight|bias)$")
KEPT_ITEMS = 4096  # of an array; a longer one, such as a vocabulary, is only counted


@dataclass(frozen=True)
class Skipped:
    """An array that is too long to be kept. repeats: whether a text of it comes twice. has_bytes:
    whether each byte is among its texts (`BYTES`)."""

    n: int
    repeats: bool = False
    has_bytes: bool = False


@dataclass(frozen=True)
class Tensor:
    """shape: as numpy has it, the rows first. at: its first byte, counted from the file's."""

    name: str
    shape: tuple[int, ...]
    kind: int
    at: int
    n_bytes: int


@dataclass
class Header:
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def architecture(self) -> str | None:
        """The text of general.architecture, if there is one."""
        found = self.keys.get(ARCHITECTURE_KEY)
        return found if isinstance(found, str) else None


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return what stands at the head of a GGUF file.

    Raises ValueError where it is not such a file or is broken, OSError where it cannot be read.
    """
    with _opened(path) as reader:
        return reader.header()


def read_architecture(path: str | os.PathLike[str]) -> str | None:
    """Return general.architecture, if it is a text, without reading what follows it.

    Raises as `read_header` does.
    """
    with _opened(path) as reader:
        found = next((value for key, value in reader.entries() if key == ARCHITECTURE_KEY), None)
    return found if isinstance(found, str) else None


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_Reader]:
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("not a GGUF file")
        if os.fstat(file.fileno()).st_size < 24:
            raise ValueError("truncated")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Reader(data)


def check_model(header: Header) -> None:
    """Raise ValueError for what llama.cpp would end the process at, instead of refusing it."""
    name = header.architecture
    for key, low, high in (
        ("block_count", 1, MOST_LAYERS),
        ("embedding_length", 1, 1 << 20),
        ("attention.head_count", 1, 1 << 16),
        ("attention.layer_norm_rms_epsilon", 0, 1),
        ("attention.layer_norm_epsilon", 0, 1),
        ("rope.dimension_count", 2, 1 << 16),
    ):
        found = header.keys.get(f"{name}.{key}", low)
        values = found if isinstance(found, list) else [found]
        if name == "deci" and key == "attention.head_count" and any(values):
            values = list(filter(None, values))  # some of its layers have no attention
        for value in values:
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{key} is {str(value)[:40]}; expected {low} to {high}")
            if key.startswith("rope") and value % 2:
                raise ValueError(f"{key} is {value}; expected an even number")
    for key, text in header.keys.items():
        is_text = key in TEXT_KEYS or key.startswith("tokenizer.chat_template.")
        if is_text and not isinstance(text, str):
            raise ValueError(f"{_shown(key)} is not a text")
    for tensor in header.tensors.values():
        if tensor.kind in INTEGERS and MULTIPLIED.search(tensor.name):
            raise ValueError(f"the tensor {_shown(tensor.name)} has integers, which are no weights")
        if tensor.at % ALIGNMENT:
            raise ValueError(
                f"the tensor {_shown(tensor.name)} is not at a multiple of {ALIGNMENT}"
            )
    _check_vocabulary(header.keys)


def _check_vocabulary(keys: dict[str, Any]) -> None:
    kind, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    if kind in ("none", "no_vocab"):
        raise ValueError("it has no vocabulary")
    if isinstance(tokens, list):
        # llama.cpp reads each up to a zero byte.
        known = {token.partition("\0")[0] for token in tokens if isinstance(token, str)}
        tokens = Skipped(len(tokens), len(known) < len(tokens), known >= BYTES)
    if not isinstance(tokens, Skipped):
        return
    if tokens.repeats:
        raise ValueError("a token of the vocabulary comes twice")
    if kind == "llama" and not tokens.has_bytes:
        raise ValueError("the vocabulary lacks some of the tokens <0x00> to <0xFF>")


def read_tensor(path: str | os.PathLike[str], tensor: Tensor) -> Floats:
    """Return a tensor of float32 numbers. Raises ValueError where it has another type."""
    if tensor.kind != 0:
        raise ValueError(f"{tensor.name} has type {tensor.kind}; expected float32")
    data = np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.at)
    return data.astype(np.float32).reshape(tensor.shape)


class _Reader:
    """Reads one value after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._size = data, len(MAGIC), len(data)
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}")
        self._n_tensors, self._n_keys = self._count(24), self._count(13)

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield the keys with their values, before anything else is read."""
        for _ in range(self._n_keys):
            yield self._text(), self._value(self._number("I"))

    def header(self) -> Header:
        found = Header()
        for name, value in self.entries():
            if name in found.keys:
                raise ValueError(f"the key {_shown(name)} comes twice")
            found.keys[name] = value
        places = [self._tensor() for _ in range(self._n_tensors)]
        alignment = found.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {_shown(alignment)}; expected 1 to 1,048,576")
        data_at = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in places:
            n_bytes = _bytes_of(name, shape, kind)
            at = data_at + offset
            if at + n_bytes > self._size:
                raise ValueError(f"truncated: the tensor {_shown(name)} ends beyond the file")
            if name in found.tensors:
                raise ValueError(f"the tensor {_shown(name)} comes twice")
            found.tensors[name] = Tensor(name, shape, kind, at, n_bytes)
        return found

    def _take(self, n: int) -> int:
        """Return where the next n bytes begin. Raises ValueError where the file ends before."""
        at = self._at
        if n > self._size - at:
            raise ValueError("truncated")
        self._at = at + n
        return at

    def _number(self, letter: str) -> Any:
        form = f"<{letter}"
        return struct.unpack_from(form, self._data, self._take(struct.calcsize(form)))[0]

    def _count(self, least: int) -> int:
        """Return a number of things that take so many bytes each, at least."""
        n: int = self._number("Q")
        if n * least > self._size - self._at:
            raise ValueError(f"truncated, or a count of {n} that the file has no room for")
        return n

    def _text(self) -> str:
        n = self._count(1)
        at = self._take(n)
        return self._data[at : at + n].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == ARRAY:
            return self._array()
        return self._number(_letter(kind))

    def _array(self) -> list[Any] | Skipped:
        kind = self._number("I")
        if kind == ARRAY:
            raise ValueError("an array of arrays")
        letter = "" if kind == TEXT else _letter(kind)
        each = 8 if kind == TEXT else struct.calcsize(f"<{letter}")
        n = self._count(each)
        if n > KEPT_ITEMS and kind == TEXT:
            return self._skipped(n)
        if n > KEPT_ITEMS:
            self._take(n * each)
            return Skipped(n)
        read: Callable[[], Any] = self._text if kind == TEXT else lambda: self._number(letter)
        return [read() for _ in range(n)]

    def _skipped(self, n: int) -> Skipped:
        data, at, last = self._data, self._at, self._size - 8
        seen = set()
        for _ in range(n):
            if at > last:
                raise ValueError("truncated")
            length = int.from_bytes(data[at : at + 8], "little")
            text, *_ = data[at + 8 : at + 8 + length].partition(b"\0")
            seen.add(text)  # llama.cpp reads it up to there
            at += 8 + length
        if at > self._size:
            raise ValueError("truncated")
        self._at = at
        return Skipped(n, len(seen) < n, seen >= {name.encode() for name in BYTES})

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dimensions = self._text(), self._number("I")
        if not 0 < n_dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"the tensor {_shown(name)} has {n_dimensions} dimensions")
        sizes = [self._number("Q") for _ in range(n_dimensions)]
        return name, tuple(reversed(sizes)), self._number("I"), self._number("Q")


def _letter(kind: int) -> str:
    letter = SCALARS[kind] if kind < len(SCALARS) else LONG_SCALARS.get(kind)
    if letter is None:
        raise ValueError(f"a value of type {kind}, which GGUF does not have")
    return letter


def _bytes_of(name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):  # newer than the package gguf: llama.cpp may know it
        return 0
    if shape[-1] % block:
        raise ValueError(f"a row of the tensor {_shown(name)} is not a multiple of {block}")
    n_bytes: int = math.prod(shape) // block * size
    return n_bytes


def _shown(name: str) -> str:
    return ascii(name)[:60]
