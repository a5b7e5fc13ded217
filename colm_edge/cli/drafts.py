"""Drafts at a terminal: shown dim after the text, and rewritten in place."""

from __future__ import annotations

import sys
import unicodedata

import click

SAVE, BACK, ERASE = "\x1b7", "\x1b8", "\x1b[K"  # the cursor's place, and what follows it


class Drafts:
    """What follows the cursor, which stays at the end of the final text. Drafts that do not
    fit this line are not shown: a terminal cannot take them back."""

    def __init__(self, width: int) -> None:
        self.width = width  # of the terminal, which may change
        # Of what is final. At the width the cursor waits in the last column, and wraps when more is
        # written: there is no place for drafts.
        self._column = 0
        self._texts: list[str] = []
        self._is_shown = False  # any of them

    def add(self, text: str) -> str:
        """Return what shows another draft."""
        self._texts.append(text)
        return self._shown()

    def undo(self, n: int) -> str:
        """Return what takes the last n back."""
        was = self._erased()
        del self._texts[len(self._texts) - n :]
        return was + self._shown()

    def step(self, text: str, marked: str) -> str:
        """Return what shows a final text, marked, in the place of the first draft, if any."""
        was = self._erased()
        del self._texts[:1]
        *before, last = text.split("\n")
        self._column = column_behind(last, 0 if before else self._column, self.width)
        return was + marked + self._shown()

    def interrupted(self) -> str:
        """Return what takes all of them back until the next event, before a line of its own."""
        was, self._column = self._erased(), 0
        return was

    def end(self) -> str:
        """Return what takes all of them back."""
        was = self._erased()
        self._texts.clear()
        return was

    def _fitting(self) -> str:
        fitting, room = "", self.width - self._column - 1
        for text in self._texts:
            if not text.isprintable() or column_behind(fitting + text) > room:
                break
            fitting += text
        return fitting

    def _shown(self) -> str:
        text = self._fitting()
        self._is_shown = bool(text)
        return f"{SAVE}{click.style(text, dim=True)}{BACK}" if text else ""

    def _erased(self) -> str:
        was, self._is_shown = self._is_shown, False
        return ERASE if was else ""


def column_behind(text: str, column: int = 0, width: int = sys.maxsize) -> int:
    """Return about the column of a terminal after a text that begins in one; the width itself
    where the text fills the line."""
    for c in text:
        if c == "\t":
            column = min(column + 8 - column % 8, max(column, width - 1))
        elif unicodedata.category(c) not in ("Mn", "Me", "Cf"):
            wide = 2 if unicodedata.east_asian_width(c) in "WF" else 1
            column = wide if column + wide > width else column + wide
    return column
