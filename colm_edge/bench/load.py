"""Busy processes beside a measurement, as on a machine that has other work to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# The pipe to it closes whenever the parent ends, however that happens, and on every system.
BUSY = """
import os, sys, threading
def watch():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
while True:
    pass
"""


@contextmanager
def busy(n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep n processes busy inside the `with` block, each as much of a core as it gets.

    They end with the block, also by an error, and with this process, even if that is killed.
    """
    with ExitStack() as running:
        yield [running.enter_context(_started()) for _ in range(n)]


@contextmanager
def _started() -> Iterator[subprocess.Popen[bytes]]:
    # What Ctrl-C makes a child say is of no use.
    with subprocess.Popen(
        [sys.executable, "-I", "-c", BUSY], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()
