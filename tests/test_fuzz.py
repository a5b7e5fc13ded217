"""The fuzz tool tells faults from refusals, and its tries of every kind of file find none."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner

from colm_edge.errors import DataError

pytest.importorskip("resource", reason="limits of a process need a POSIX system")

import fuzz
from lib.fuzz import models, pool
from lib.fuzz.kind import Kind
from lib.fuzz.pool import input_of, try_kind
from lib.fuzz.table import KINDS


def words(needs: Path) -> list[dict[str, bytes]]:
    return [{"f.txt": b"read"}]


def next_word(files, rng):
    return {"f.txt": rng.choice(list(WORDS)).encode()}


def does_nothing() -> None:
    pass


def refuses() -> None:
    raise DataError("no")


def fails() -> None:
    raise KeyError("x")


def hangs() -> None:
    while True:
        pass


def aborts() -> None:
    os.kill(os.getpid(), signal.SIGABRT)


def takes_too_much() -> None:
    np.ones(3 << 30, np.uint8)


def exits() -> None:
    raise SystemExit(7)


WORDS = {
    "read": does_nothing,
    "refused": refuses,
    "KeyError": fails,
    "hang": hangs,
    "SIGABRT": aborts,
    "MemoryError": takes_too_much,
    "exit code 7": exits,
}


def reader(needs: Path):
    pool.CPU_SECONDS = 0  # in the child
    return lambda folder: WORDS[(folder / "f.txt").read_text()]()


def test_every_fault_is_told_and_its_input_kept(tmp_path):
    kind, n = Kind("words", words, reader, next_word), 14
    tally = try_kind(kind, tmp_path, n, n_children=2)
    made = [input_of(kind, words(tmp_path), 0, i)["f.txt"].decode() for i in range(n)]
    assert set(made) == set(WORDS)
    assert (tally.n_read, tally.n_refused) == (made.count("read"), made.count("refused"))
    for word in WORDS.keys() - {"read", "refused"}:
        (told,) = (told for told in tally.faults if word in told)
        assert tally.n_faults[told] == made.count(word)
        assert tally.faults[told] == {"f.txt": word.encode()}


def broken(needs: Path):
    return lambda folder: refuses()


def test_a_kind_whose_own_samples_are_refused_is_no_test(tmp_path):
    with pytest.raises(RuntimeError, match="a valid sample of broken: refused"):
        try_kind(Kind("broken", words, broken), tmp_path, 1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_mutated_file_is_read_or_refused_in_one_line(kind, tmp_path):
    tally = try_kind(kind, tmp_path, kind.n_tests)
    assert dict(tally.n_faults) == {}
    assert tally.n_refused > 0  # so it is mutated, and read


def test_the_command_prints_a_table(tmp_path):
    done = CliRunner().invoke(fuzz.main, ["hub", "-n", "3", "--keep", str(tmp_path)])
    assert done.stdout.startswith("| kind | tries | read | refused | faults | seconds |")
    assert "| hub | 3 |" in done.stdout


def test_a_count_that_was_made_up_is_mutated_again():
    value = struct.pack("<IQ", 4, 2**62) + bytes(8)  # two numbers of four bytes
    for seed in range(50):
        assert len(models._changed_array(value, Random(seed))) < 10_000
