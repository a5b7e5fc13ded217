"""What the tokens of Hugging Face tokenizers spell, from the names that their vocabularies have.

A name stands for bytes in one of two ways. Byte-level BPE writes each byte as a character of its
own, a space as Ġ. SentencePiece writes a space as ▁, and a byte that no token spells as <0x0A>.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """Return the bytes that GPT-2's characters stand for: printable ones for themselves, the others
    in their order from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_characters()


def spelt_by(names: Sequence[str], text: str) -> list[bytes]:
    """Return the bytes of each token of a text. A name of neither kind stands for
    itself, as those of control tokens do."""
    raw = text.encode()
    level, pieces = list(map(_byte_level, names)), list(map(_sentence_piece, names))
    if b"".join(level) == raw:
        return level
    if b"".join(pieces) in (raw, b" " + raw):
        return pieces
    # Names of control tokens are among them; a tokenizer of bytes has no ▁.
    return pieces if any(SPACE in name or BYTE.fullmatch(name) for name in names) else level


def _byte_level(name: str) -> bytes:
    if all(c in BYTES for c in name):
        return bytes(BYTES[c] for c in name)
    return name.encode()


def _sentence_piece(name: str) -> bytes:
    found = BYTE.fullmatch(name)
    return bytes([int(found[1], 16)]) if found else name.replace(SPACE, " ").encode()
