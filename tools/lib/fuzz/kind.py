"""What a kind of file is to the fuzz tool: valid samples, how they are mutated, how they are read.

To add a kind: write a `Kind` with functions of a module (a child process imports them) and add it
to the KINDS of that module, and a new module to `lib/fuzz/table.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lib.fuzz.mutate import mutated_files

Files = Mapping[str, bytes]  # by their paths below a folder
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """samples: given an empty folder for what it needs besides, returns valid inputs.

    reader: given that folder, as `samples` left it, returns the function that reads the files in a
    folder as colm-edge does. It is called once in each process; what is slow, as loading a pair,
    belongs here. What is read may raise ColmError, and nothing else.

    mutate: changes an input; by default by the suffix of one of its files, as MUTATORS says.
    n_tests: how many tries the test suite makes: about two seconds of them.
    """

    name: str
    samples: Callable[[Path], Sequence[Files]]
    reader: Callable[[Path], Read]
    mutate: Callable[[Files, Random], Files] = mutated_files
    n_tests: int = 300
