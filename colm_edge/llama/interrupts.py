"""Ctrl-C while llama.cpp works and calls back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], None]]:
    """Note SIGINT instead of raising it; give a function that raises what was noted.

    Python may raise KeyboardInterrupt where a callback from C begins, and there it is printed and
    lost. What was noted and not raised by then is raised at the end. Signals come to the main
    thread alone; on another this does nothing.
    """
    noted: list[FrameType | None] = []
    before: Any = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield lambda: None
        return

    def raise_it() -> None:
        if noted:
            before(signal.SIGINT, noted.pop())

    signal.signal(signal.SIGINT, lambda _, frame: noted.append(frame))
    try:
        yield raise_it
    finally:
        signal.signal(signal.SIGINT, before)
        raise_it()
