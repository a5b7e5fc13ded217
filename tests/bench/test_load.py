"""Busy processes end with the block that started them, and with their parent."""

from __future__ import annotations

import subprocess
import sys

import pytest

from colm_edge.bench.load import busy

PARENT = """
import sys
from colm_edge.bench.load import busy
with busy(1):
    print("started", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("n", [0, 2])
def test_they_run_inside_the_block_only(n):
    with busy(n) as processes:
        assert [process.poll() for process in processes] == [None] * n
    assert all(process.returncode is not None for process in processes)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_them(error):
    with pytest.raises(error), busy(2) as processes:
        raise error
    assert all(process.returncode is not None for process in processes)


def test_they_do_not_outlive_a_parent_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        parent.kill()
        # The busy process has the other end of this pipe as well: it closes when both have ended.
        assert parent.stdout.read() == b""
