"""Models: heads of GGUF files mutated by their structure, described by `info` and really loaded."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import colm_edge
from colm_edge import info
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from lib.fuzz.kind import Files, Kind, Read
from lib.fuzz.mutate import COUNTS, FLOATS, TEXTS, mutated_bytes
from lib.fuzz.pairs import TEMPLATE
from lib.random_model import SHAPES, write_model

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class _Key:
    name: bytes
    kind: int
    value: bytes


@dataclass
class _Tensor:
    name: bytes
    sizes: list[int]
    kind: int
    offset: int


@dataclass
class _File:
    keys: list[_Key]
    tensors: list[_Tensor]
    body: bytes


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _end_of_text(data: bytes, at: int) -> int:
    return at + 8 + int(struct.unpack_from("<Q", data, at)[0])


def _end_of_value(data: bytes, at: int, kind: int) -> int:
    if kind == TEXT:
        return _end_of_text(data, at)
    if kind != ARRAY:
        return at + struct.calcsize(SCALARS[kind])
    inner, n = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner != TEXT:
        return at + int(n) * struct.calcsize(SCALARS[inner])
    for _ in range(n):
        at = _end_of_text(data, at)
    return at


def _parsed(data: bytes) -> _File:
    """Return the parts of a valid file. Raises what it may for another."""
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    at, keys, tensors = 24, [], []
    for _ in range(n_keys):
        end = _end_of_text(data, at)
        (kind,) = struct.unpack_from("<I", data, end)
        stop = _end_of_value(data, end + 4, kind)
        keys.append(_Key(data[at + 8 : end], kind, data[end + 4 : stop]))
        at = stop
    for _ in range(n_tensors):
        end = _end_of_text(data, at)
        (n,) = struct.unpack_from("<I", data, end)
        sizes = list(struct.unpack_from(f"<{n}Q", data, end + 4))
        kind, offset = struct.unpack_from("<IQ", data, end + 4 + 8 * n)
        tensors.append(_Tensor(data[at + 8 : end], sizes, kind, offset))
        at = end + 4 + 8 * n + 12
    return _File(keys, tensors, data[-(-at // ALIGNMENT) * ALIGNMENT :])


def _written(file: _File) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(file.keys))
    for key in file.keys:
        head += _text(key.name) + struct.pack("<I", key.kind) + key.value
    for t in file.tensors:
        sizes = [size % 2**64 for size in t.sizes]
        head += _text(t.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", t.kind % 2**32, t.offset % 2**64)
    return head + bytes(-len(head) % ALIGNMENT) + file.body


def _mutated(files: Files, rng: Random) -> dict[str, bytes]:
    """Return a model with one to four changes of its head, or a part of it cut or overwritten."""
    ((name, data),) = files.items()
    if rng.random() < 0.15:
        end = len(data) - len(_parsed(data).body)
        return {name: mutated_bytes(data[:end], rng) + data[end:]}
    file = _parsed(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        (_change_key if rng.random() < 0.7 else _change_tensor)(file, rng)
    return {name: _written(file)}


def _scalar(kind: int, rng: Random) -> bytes:
    letter = SCALARS[kind]
    if letter in "fd":
        number = rng.choice(FLOATS)
        return struct.pack(f"<{letter}", number if letter == "d" or abs(number) < 3e38 else 0.0)
    size = struct.calcsize(letter)
    number = int(rng.choice(COUNTS) % 256**size)
    return bytes(number >> 8 * i & 255 for i in range(size))


def _any_text(rng: Random) -> bytes:
    return _text(rng.choice(TEXTS).encode("utf-8", "surrogatepass"))


def _value(kind: int, rng: Random) -> bytes:
    if kind == TEXT:
        return _any_text(rng)
    if kind != ARRAY:
        return _scalar(kind, rng)
    inner, n = rng.choice((*SCALARS, TEXT)), rng.choice((0, 1, 2, 3, 400))
    one = _value(inner, rng)
    return struct.pack("<IQ", inner, n) + one * n


def _change_key(file: _File, rng: Random) -> None:
    keys = file.keys
    i = rng.randrange(len(keys)) if keys else 0
    if not keys:
        return
    key, what = keys[i], rng.random()
    if what < 0.1:
        del keys[i]
    elif what < 0.15:
        keys.append(_Key(rng.choice((key.name, b"general.alignment", b"split.count")), 4,
                         _scalar(4, rng)))  # fmt: skip
    elif what < 0.2:
        key.name = rng.choice(
            (keys[rng.randrange(len(keys))].name, b"\xff\xfe", b"", b"a" * 70_000)
        )
    elif what < 0.35:
        key.kind = rng.choice((*SCALARS, TEXT, ARRAY))
        key.value = _value(key.kind, rng)
    elif key.kind == TEXT:
        names = (
            b"gpt2",
            b"llama",
            b"bert",
            b"none",
            b"qwen2",
            b"gemma3",
            b"t5",
            b"mamba",
            b"gpt-4o",
        )
        key.value = _text(rng.choice(names)) if rng.random() < 0.5 else _any_text(rng)
    elif key.kind == ARRAY:
        key.value = _changed_array(key.value, rng)
    else:
        size = len(key.value)
        near = int.from_bytes(key.value, "little") + rng.choice((-1, 1, 2, 64))
        plain = (near % 256**size).to_bytes(size, "little")
        key.value = plain if rng.random() < 0.4 else _scalar(key.kind, rng)


def _changed_array(value: bytes, rng: Random) -> bytes:
    inner, n = struct.unpack_from("<IQ", value)
    at, items = 12, list[bytes]()
    while at < len(value) and len(items) < n:  # a mutation before may have made up the count
        end = _end_of_value(value, at, inner)
        items.append(value[at:end])
        at = end
    n = len(items)
    what = rng.random()
    if what < 0.15:
        return struct.pack("<IQ", inner, rng.choice(COUNTS)) + value[12:]
    if what < 0.3:
        items = items[: rng.randrange(n + 1)]
    elif items and what < 0.5:
        items[rng.randrange(n)] = items[rng.randrange(n)]
    elif items and what < 0.9:
        i = rng.choice((0, rng.randrange(n), n - 1))
        items[i] = _value(inner, rng)
    else:
        items += items[:1] * 1000
    return struct.pack("<IQ", inner, len(items)) + b"".join(items)


def _change_tensor(file: _File, rng: Random) -> None:
    tensors = file.tensors
    if not tensors:
        return
    i, other = rng.randrange(len(tensors)), rng.choice(tensors)
    tensor, what = tensors[i], rng.random()
    if what < 0.1:
        del tensors[i]
    elif what < 0.2:
        tensor.name = rng.choice(
            (other.name, b"", b"x" * 70, b"\xff\x1b[2J", b"blk.9.attn_q.weight")
        )
    elif what < 0.6:
        change = rng.choice(("one", "one", "order", "more", "other"))
        if change == "one":
            at = rng.randrange(len(tensor.sizes))
            near = tensor.sizes[at] + rng.choice((-32, -1, 1, 32))
            tensor.sizes[at] = near if rng.random() < 0.5 else rng.choice(COUNTS)
        elif change == "order":
            tensor.sizes.reverse()
        elif change == "more":
            tensor.sizes += [rng.choice((0, 1, 2))] * rng.choice((1, 2, 3))
        else:
            tensor.sizes = list(other.sizes)
    elif what < 0.8:
        tensor.kind = rng.choice((*range(45), 2**31, 2**32 - 1))
    else:
        tensor.offset = rng.choice((other.offset, *COUNTS, tensor.offset + 1, tensor.offset - 32))


# Samples, and how they are read


def _samples(needs: Path) -> Sequence[Files]:
    found = []
    for mix in ("F32", "Q8_0"):
        path = needs / f"{mix}.gguf"
        write_model(path, SHAPES["tiny"], mix, chat_template=TEMPLATE)
        found.append({"m.gguf": path.read_bytes()})
    shipped = Path(colm_edge.__file__).parent / "data" / "base.gguf"
    return [*found, {"m.gguf": shipped.read_bytes()}]


def _described(_: Path) -> Read:
    return lambda folder: info.as_text(info.describe_files([str(folder / "m.gguf")])[0])


def _loaded(_: Path) -> Read:
    options = ContextOptions(n_ctx=64, n_threads=1)

    def read(folder: Path) -> None:
        model = Model(folder / "m.gguf")
        try:
            tokens = model.tokenize("hello world")[:8] or [0]
            session = Session(model, options)
            try:
                session.sync(tokens)
                model.text(tokens)
            finally:
                session.close()
        finally:
            model.close()

    return read


def _kind(name: str, reader: Callable[[Path], Read]) -> Kind:
    return Kind(name, _samples, reader, _mutated, n_tests=60)


KINDS = (_kind("model-info", _described), _kind("model", _loaded))
