"""Unreviewed tokens at a terminal: shown dim, and rewritten in place."""

from __future__ import annotations

import unicodedata

import click


class Drafts:
    """Tokens that wait for review, shown dim at the end of the line that is being written. Those
    that do not fit this line are not shown: a terminal cannot take them back."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0  # of what is final
        self._shown = 0  # columns of drafts behind it
        self._full = False

    def add(self, text: str) -> str:
        """Return what shows another draft."""
        wide = columns(text)
        self._full |= "\n" in text or self._column + self._shown + wide >= self._width
        if self._full:
            return ""
        self._shown += wide
        return click.style(text, dim=True)

    def erase(self) -> str:
        """Return what takes the drafts back."""
        n, self._shown, self._full = self._shown, 0, False
        return f"\x1b[{n}D\x1b[K" if n else ""

    def passed(self, text: str) -> None:
        """Count a text as written."""
        *before, last = text.split("\n")
        self._column = ((0 if before else self._column) + columns(last)) % self._width


def columns(text: str) -> int:
    """Return how many columns a terminal gives to a text."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
        if c.isprintable()
    )
