"""What somebody types: messages of one line, or of several between triple quotes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import click

FIRST, MORE = ">>> ", "... "  # before a message, and before each line that continues it
LEAVE = "Use Ctrl-D or /bye to leave."
_QUOTES = '"""'


def is_open(text: str) -> bool:
    """Return whether a message that began with triple quotes still lacks those at its end."""
    closed = len(text) >= 2 * len(_QUOTES) and text.rstrip().endswith(_QUOTES)
    return text.startswith(_QUOTES) and not closed


def unquoted(text: str) -> str:
    """Return a message without the triple quotes around it."""
    if not text.startswith(_QUOTES):
        return text
    return text.strip().removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")


def read_lines() -> str | None:
    """Read one message as it comes, without editing; return None at the end of input."""
    if sys.stdin is None:  # a process can be started without one
        return None
    shown = sys.stdin.isatty()  # prompts between the answers to a file's lines are for nobody
    text = ""
    while True:
        prompt = (MORE if text else FIRST) if shown else ""
        if not sys.stdout.isatty():  # input() would write it there
            click.echo(prompt, nl=False, err=True)
            prompt = ""
        try:
            text += input(prompt)
        except EOFError:
            if text.strip() and not shown:  # a file that ends within quotes
                return unquoted(text)
            if shown:
                click.echo(err=True)
            return None
        except KeyboardInterrupt:
            text = ""
            click.echo(f"\n{LEAVE}", err=True)
            continue
        if not is_open(text):
            return unquoted(text)
        text += "\n"


def is_terminal(file: TextIO | None) -> bool:
    """Return whether a file is a terminal that can do more than print lines."""
    return file is not None and file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def unechoed() -> Iterator[None]:
    """Let the terminal not show what is typed meanwhile; who reads next gets it."""
    # A console of Windows shows what is typed only when it is read.
    if sys.platform == "win32" or not is_terminal(sys.stdout) or not _is_foreground():
        yield
        return
    import termios

    terminal = sys.stdout.fileno()
    before = termios.tcgetattr(terminal)
    unseen = [*before]
    unseen[3] &= ~(termios.ECHO | termios.ICANON)
    unseen[3] |= termios.NOFLSH  # Ctrl-C does not throw away what was typed before it

    def again(*_: object) -> None:  # after Ctrl-Z and fg: the shell has made it show what is typed
        if _is_foreground():
            termios.tcsetattr(terminal, termios.TCSANOW, unseen)

    handles = threading.current_thread() is threading.main_thread()
    before_stop = signal.getsignal(signal.SIGCONT)

    def restore() -> None:
        if handles:
            signal.signal(signal.SIGCONT, before_stop or signal.SIG_DFL)
        if _is_foreground():
            with suppress(termios.error):  # it was closed
                termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, unseen)
        if handles:
            signal.signal(signal.SIGCONT, again)
        yield
    finally:
        try:
            restore()
        except KeyboardInterrupt:  # a second Ctrl-C, in the middle of it
            restore()
            raise


def _is_foreground() -> bool:
    """Return whether stdout's terminal is ours: it stops a job in the background that changes its
    settings."""
    try:
        return os.tcgetpgrp(sys.stdout.fileno()) == os.getpgrp()
    except OSError:  # a terminal that controls no jobs
        return True
