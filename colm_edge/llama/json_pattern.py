"""The regular expressions of JSON schemas (`pattern`), as grammars of the strings that they match.

What is written is JSON: characters that JSON escapes are written with a backslash, and those that
it cannot hold, or holds by their number alone, are left out.
"""

from __future__ import annotations

import re

Ranges = list[tuple[int, int]]  # first and last code point of each
LAST, SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)
DIGITS: Ranges = [(0x30, 0x39)]
WORD: Ranges = [*DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
SPACE: Ranges = [
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
    (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
LINE_ENDS: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
KINDS = {"d": DIGITS, "w": WORD, "s": SPACE}
CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0x00}
# Characters that JSON writes with a backslash, and the letter after it.
ESCAPED = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
APART: Ranges = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), SURROGATES]
# One character of a JSON string, in GBNF.
CHARACTER = r'([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))'
MOST_REPEATED = 1000  # llama.cpp refuses some repetitions from about twice as many on
_COUNT = re.compile(r"\{(\d+)(,?)(\d*)\}")


def string_of(pattern: str) -> str:
    """Return GBNF for the JSON strings in which a pattern is found, as ECMA 262 reads it.

    Raises ValueError for what is not valid, and for what a grammar cannot keep to: looking ahead
    or behind, references, and ^ or $ inside.
    """
    parser = _Parser(pattern)
    found = parser.choices(outside=True)
    if parser.next:
        raise ValueError("a ) without its (")
    return rf'"\"" ({found}) "\""'


def string_between(low: int, high: int | None) -> str:
    """Return GBNF for the JSON strings of low to high characters; no limit if high is None."""
    parts = _chunks(low, "{{{0}}}")
    parts += ["*"] if high is None else _chunks(high - low, "{{0,{0}}}")
    return " ".join([r'"\""', *(CHARACTER + times for times in parts), r'"\""'])


def _chunks(n: int, form: str) -> list[str]:
    """Return repetitions of n in all, none of them too large."""
    whole, rest = divmod(n, MOST_REPEATED)
    return [form.format(k) for k in [MOST_REPEATED] * whole + [rest] * (rest > 0)]


class _Parser:
    """Reads a pattern from left to right, and writes GBNF."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    @property
    def next(self) -> str:
        """The next character, empty at the end."""
        return self._text[self._at : self._at + 1]

    def _take(self, n: int = 1) -> str:
        taken = self._text[self._at : self._at + n]
        if len(taken) < n:
            raise ValueError("it ends too early")
        self._at += n
        return taken

    def _took(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def choices(self, *, outside: bool = False) -> str:
        """Return what stands between bars. outside: in no parentheses, where ^ and $ may stand, and
        anything where they do not."""
        found = [self._sequence(outside=outside)]
        while self._took("|"):
            found.append(self._sequence(outside=outside))
        return " | ".join(found)

    def _sequence(self, *, outside: bool) -> str:
        parts, ends = list[str](), False
        if outside and not self._took("^"):
            parts.append(f"{CHARACTER}*")
        while self.next not in ("", "|", ")"):
            if outside and self._took("$"):
                ends = True
                if self.next not in ("", "|"):
                    raise ValueError("a $ that is not at an end")
            else:
                parts.append(self._repeated())
        if outside and not ends:
            parts.append(f"{CHARACTER}*")
        return " ".join(parts) or '""'

    def _repeated(self) -> str:
        one = self._atom()
        times = ""
        if self.next in ("*", "+", "?"):
            times = self._take()
        elif counted := _COUNT.match(self._text, self._at):
            self._at = counted.end()
            low, comma, high = counted.groups()
            if max(int(low), int(high or 0)) > MOST_REPEATED:
                raise ValueError(f"more than {MOST_REPEATED:,} repetitions")
            if high and int(high) < int(low):
                raise ValueError(f"a repetition of {counted[0]}")
            times = f"{{{int(low)}{comma}{high and int(high)}}}"
        if times:
            self._took("?")  # the shortest match has the same language
        return one + times

    def _atom(self) -> str:
        character = self._take()
        if character == "(":
            return self._group()
        if character == "[":
            return _written(self._class())
        if character == ".":
            return _written(_others(LINE_ENDS))
        if character == "\\":
            return _written(self._escape())
        if character in "^$*+?":
            raise ValueError(f"a {character} that a grammar cannot keep to there")
        return _written([(ord(character), ord(character))])

    def _group(self) -> str:
        if self._took("?") and not self._took(":"):
            if self.next != "<" or self._text[self._at + 1 : self._at + 2] in ("=", "!", ""):
                raise ValueError("looking ahead or behind")
            name = self._text.find(">", self._at)
            if name < 0:
                raise ValueError("it ends too early")
            self._at = name + 1
        inside = self.choices()
        if not self._took(")"):
            raise ValueError("a ( without its )")
        return f"({inside})"

    def _class(self) -> Ranges:
        is_negated, found = self._took("^"), list[tuple[int, int]]()
        while not self._took("]"):
            first = self._member()
            is_range = self.next == "-" and self._text[self._at + 1 : self._at + 2] != "]"
            if is_range and first[0][0] == first[-1][1]:
                self._take()
                last = self._member()
                if len(last) != 1 or last[0][0] != last[0][1] or last[0][0] < first[0][0]:
                    raise ValueError("a range of characters that ends before it begins")
                first = [(first[0][0], last[0][0])]
            found += first
        return _others(found) if is_negated else found

    def _member(self) -> Ranges:
        """Return the next character of a class, or several by an escape."""
        character = self._take()
        if character != "\\":
            return [(ord(character), ord(character))]
        return [(8, 8)] if self._took("b") else self._escape()

    def _escape(self) -> Ranges:
        """Return what an escape stands for, whose backslash was read."""
        letter = self._take()
        if letter.lower() in KINDS:
            kind = KINDS[letter.lower()]
            return kind if letter.islower() else _others(kind)
        code = CONTROLS.get(letter, ord(letter))
        if letter in "xu":
            digits = self._take(2 if letter == "x" else 4)
            if not re.fullmatch("[0-9a-fA-F]+", digits):
                raise ValueError(f"the escape \\{letter}{digits}")
            code = int(digits, 16)
        elif letter.isascii() and letter.isalnum() and letter not in CONTROLS:
            raise ValueError(f"the escape \\{letter}")
        return [(code, code)]


def _others(ranges: Ranges) -> Ranges:
    """Return all characters but these."""
    found, at = list[tuple[int, int]](), 0
    for first, last in sorted(ranges):
        if first > at:
            found.append((at, first - 1))
        at = max(at, last + 1)
    return [*found, (at, LAST)] if at <= LAST else found


def _written(ranges: Ranges) -> str:
    """Return GBNF for one of these characters, as JSON writes it."""
    plain = _others([*_others(ranges), *APART])
    parts = [f"[{''.join(map(_range, plain))}]"] if plain else []
    for code, letter in ESCAPED.items():
        if any(first <= code <= last for first, last in ranges):
            shown = "\\" + letter if letter in '"\\' else letter
            parts.append(rf'"\\{shown}"')
    if not parts:
        raise ValueError("a character that JSON does not hold as it is")
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _range(ends: tuple[int, int]) -> str:
    first, last = map(_shown, ends)
    return first if first == last else f"{first}-{last}"


def _shown(code: int) -> str:
    """Return a character as it stands in brackets in GBNF."""
    if code < 0x80:
        return chr(code) if chr(code).isalnum() else f"\\x{code:02X}"
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
