"""Seeded mutations: of bytes, of words, of JSON, and of numpy's .npy and .npz files."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import PurePath
from random import Random
from typing import Any

import numpy as np

from lib.fuzz.zip import bomb, members_of, zipped

Mutate = Callable[[bytes, Random], bytes]

COUNTS = (
    0, 1, 2, 127, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63,
    2**64 - 1,
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 0.5, -0.0, 2, 1e9, -1e9, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -1e308,
    5e-324, math.nan, math.inf, -math.inf,
)  # fmt: skip
FLOATS = (0.0, 1e-3, 1.0, -1.0, -0.0, 1e9, -1e9, 1e30, 1e308, 5e-324, math.nan, math.inf, -math.inf)
TEXTS = (
    "", " ", "\x00", "\x1b[31m", "a\nb", "\ud800", "\udfff\ud800", "\u202e", "x" * 20_000, "NaN",
    "../../etc/passwd", "/dev/zero", "\U0010ffff", "<|im_end|>", "{{ 1 }}", "0" * 5_000,
)  # fmt: skip
DEPTH = 100_000  # of nested lists and objects
_NESTED = {"@list@": ("[", "]"), "@object@": ('{"a":', "}")}


def mutated_files(files: Mapping[str, bytes], rng: Random) -> dict[str, bytes]:
    """Return an input with one of its files mutated, or exchanged with another, or left out."""
    changed = dict(files)
    name = rng.choice(sorted(files))
    if len(files) > 1 and rng.random() < 0.1:
        other = rng.choice(sorted(files))
        if other == name:
            del changed[name]
        else:
            changed[name], changed[other] = changed[other], changed[name]
        return changed
    changed[name] = mutated(name, files[name], rng)
    return changed


def mutated(name: str, data: bytes, rng: Random) -> bytes:
    """Return a file's bytes, mutated once or a few times, by its structure or blindly."""
    structured = MUTATORS.get(PurePath(name).suffix)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if structured is not None and rng.random() < 0.8:
            data = structured(data, rng)
        else:
            data = mutated_bytes(data, rng)
    return data


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """Return bytes with one blind change."""
    return rng.choice((_flip, _flip, _overwrite, _overwrite, _cut, _move, _insert))(data, rng)


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice(
        (
            rng.randbytes(rng.randint(1, 16)),
            struct.pack("<Q", rng.choice(COUNTS))[: rng.choice((1, 2, 4, 8))],
            struct.pack("<Q", max(0, len(data) + rng.randint(-2, 2))),
            struct.pack(rng.choice(("<f", "<d")), rng.choice((math.nan, math.inf, -1e30, 1.0))),
        )
    )
    return data[:at] + piece + data[at + len(piece) :]


def _cut(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        return data[:at]
    return data[:at] + data[at + rng.randint(1, 64) :]


def _move(data: bytes, rng: Random) -> bytes:
    begin, to = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    return data[:to] + data[begin : begin + rng.randint(1, 64)] + data[to:]


def _insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice((b"\x00", b"\xff" * 9, b"\x1b[2J", b"\r\n", b"[" * DEPTH, rng.randbytes(40)))
    return data[:at] + piece + data[at:]


def mutated_json(data: bytes, rng: Random) -> bytes:
    """Return a JSON text with one value or key changed; of what is no JSON, its bytes changed."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutated_bytes(data, rng)
    text = json.dumps(_changed(value, rng))
    if rng.random() < 0.1:
        text = _key_twice(text, rng)
    for mark, (begin, end) in _NESTED.items():
        text = text.replace(f'"{mark}"', begin * DEPTH + "1" + end * DEPTH)
    return text.encode() + (b"\n" if data.endswith(b"\n") else b"")


def any_value(rng: Random) -> Any:
    """Return a value of any JSON type, likely an extreme one."""
    return rng.choice(
        (
            rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice((*_NESTED,)),
            None, rng.choice((True, False)), [], {}, [rng.choice(NUMBERS)], {"a": None},
        )
    )  # fmt: skip


def _changed(value: Any, rng: Random) -> Any:
    """Return a JSON value with one of its parts changed, removed, doubled or renamed."""
    parts = list(value) if isinstance(value, dict) else range(len(value) if _is_list(value) else 0)
    if not parts or rng.random() < 0.1:
        return any_value(rng)
    at, changed = rng.choice(parts), value.copy()
    what = rng.random()
    if what < 0.7:
        changed[at] = _changed(value[at], rng)
    elif what < 0.8:
        del changed[at]
    elif what < 0.9:
        other = rng.choice(parts)
        changed[at], changed[other] = value[other], value[at]
    elif isinstance(value, dict):
        changed[rng.choice((*TEXTS, str(at).upper()))] = changed.pop(at)
    else:
        changed += [value[at]] * rng.choice((1, 1000))
    return changed


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _key_twice(text: str, rng: Random) -> str:
    places = [(m.start(), m[0]) for m in re.finditer(r'"\w+": ', text)]
    if not places:
        return text
    at, key = rng.choice(places)
    return f"{text[:at]}{key}{json.dumps(any_value(rng))}, {text[at:]}"


def mutated_lines(data: bytes, rng: Random) -> bytes:
    """Return lines of JSON with one line changed, removed, doubled, moved or cut."""
    lines = data.splitlines(keepends=True) or [b""]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.random()
    if what < 0.8:
        lines[i] = mutated_json(lines[i], rng)
    elif what < 0.85:
        del lines[i]
    elif what < 0.9:
        lines[i] = lines[i] + lines[j]
    elif what < 0.95:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i] = mutated_bytes(lines[i], rng)
    return b"".join(lines)


def mutated_npy(data: bytes, rng: Random) -> bytes:
    """Return an array's file with another head, or other numbers in it."""
    if data[:6] != b"\x93NUMPY" or len(data) < 10:
        return mutated_bytes(data, rng)
    end = 10 + int.from_bytes(data[8:10], "little")
    head, body = data[10:end].decode("latin-1"), data[end:]
    what = rng.random()
    if what < 0.4:
        return data[:end] + mutated_numbers(body, rng)
    if what < 0.6:
        head = re.sub(r"\(.*\)", _shape(rng), head, count=1)
    elif what < 0.8:
        descr = f"'descr': {rng.choice(TYPES)}, 'f"
        head = re.sub(r"'descr': [^:]*, 'f", lambda _: descr, head, count=1)
    elif what < 0.9:
        head = rng.choice(HEADS)
    else:
        return data[:10] + mutated_bytes(data[10:end], rng) + body
    if rng.random() < 0.5:
        body = PICKLE + body
    return data[:8] + struct.pack("<H", min(len(head), 65535)) + head.encode("latin-1") + body


# What unpickling would run: a name that would be noticed.
PICKLE = b"cos\nabort\n(tR."
TYPES = (
    "'|O'", "'<f8'", "'<f4'", "'>i4'", "'<i8'", "'<U9999999'", "'|S0'", "'|V0'", "'<M8[ns]'",
    "[('a', '|O')]", "[('a', '<f8', (9999, 9999, 9999))]", "'<c16'", "9", "None", "'\\x00'",
    "'<f8'" * 500, "{}", "()", "[" * 200 + "]" * 200,
)  # fmt: skip
HEADS = (
    "", "\n", "{", "}", "(" * 5000, "[" * 5000 + "]" * 5000, "-" * 5000 + "1", "{'descr': '<f8'}\n",
    "'''", "\\", "\t\n  x\n y", "0x", "1_", "lambda: 0", "__import__('os').abort()", "\x00" * 60,
    "{'descr': '<f8', 'fortran_order': 2, 'shape': (1,), }\n", "{1: 2}", "9" * 5000, "é" * 100,
)  # fmt: skip


def _shape(rng: Random) -> str:
    sizes = [rng.choice((*COUNTS, -1, -(2**63), 10**30)) for _ in range(rng.randint(0, 4))]
    text = "".join(f"{size}, " for size in sizes)
    return rng.choice((f"({text})", f"({text})", "(True,)", "(1.5,)", "('a',)", "(1L,)", "()"))


def mutated_numbers(body: bytes, rng: Random) -> bytes:
    """Return the bytes of numbers with one of them, or all, made extreme."""
    form = rng.choice(("<f8", "<f4", "<i8", "<i4", "|u1"))
    size = int(form[2])
    if form[1] == "f":
        with np.errstate(over="ignore"):
            number = np.array(rng.choice(FLOATS)).astype(form).tobytes()
    else:
        number = (rng.choice(COUNTS) & (256**size - 1)).to_bytes(size, "little")
    if rng.random() < 0.1:
        return number * (len(body) // size)
    at = rng.randrange(len(body) // size + 1) * size
    return body[:at] + number + body[at + size :]


def mutated_npz(data: bytes, rng: Random) -> bytes:
    """Return an archive of arrays with one array changed, removed, doubled, renamed or packed."""
    members = members_of(data)
    if not members:
        return mutated_bytes(data, rng)
    i, j = rng.randrange(len(members)), rng.randrange(len(members))
    name, content = members[i]
    what = rng.random()
    if what < 0.7:
        members[i] = name, mutated_npy(content, rng)
    elif what < 0.75:
        del members[i]
    elif what < 0.8:
        members[i] = members[j][0], content
    elif what < 0.85:
        members[i] = rng.choice((*TEXTS[:6], name.upper(), "../x.npy", "x.npy")), content
    elif what < 0.87:
        return bomb(members, i)
    else:
        return zipped(members, packed=rng.random() < 0.5)
    return zipped(members)


def mutated_words(data: bytes, rng: Random) -> bytes:
    """Return lines of words with one word exchanged, doubled, removed, or made extreme."""
    lines = data.splitlines(keepends=True) or [b""]
    i = rng.randrange(len(lines))
    words = lines[i].split(b" ")
    others = [*data.split(), *(text.encode("utf-8", "surrogatepass") for text in TEXTS)]
    words[rng.randrange(len(words))] = rng.choice(others)
    if rng.random() < 0.2:
        words += words
    lines[i] = b" ".join(words)
    return b"".join(lines)


MUTATORS: dict[str, Mutate] = {
    ".json": mutated_json,
    ".jsonl": mutated_lines,
    ".npy": mutated_npy,
    ".npz": mutated_npz,
    ".txt": mutated_words,
}
