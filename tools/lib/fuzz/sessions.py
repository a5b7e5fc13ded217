"""Kinds that belong to a model on this machine: prompt caches, and what decodes cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from colm_edge.errors import ColmError
from colm_edge.llama import measure
from colm_edge.llama.costs import break_even, seconds_per_token
from lib.fuzz.kind import Files, Kind, Read
from lib.fuzz.pairs import open_pair

PROMPT = "hello world, how are you?"
COSTS = (
    b'{"model": "m", "sizes": [1, 4, 16], "seconds": [0.001, 0.002, 0.004], "more": [0.001, 0.002]'
)


def _caches(needs: Path) -> Sequence[Files]:
    path, found = needs / "cache.npz", []
    with open_pair(needs) as pair:
        for threshold in (1.0, 0.3):
            pair.generate(PROMPT, temperature=0.0, max_tokens=4, threshold=threshold)
            pair.save_prompts(path)
            found.append({"cache.npz": path.read_bytes()})
    return found


def _read_cache(needs: Path) -> Read:
    pair = open_pair(needs)

    def read(folder: Path) -> None:
        pair.load_prompts(folder / "cache.npz")
        pair.generate(PROMPT + " well", temperature=0.0, max_tokens=2, threshold=0.0)

    return read


def _costs(needs: Path) -> Sequence[Files]:
    return [{"costs.json": COSTS + b', "hasty": false}\n'}]


def _read_costs(needs: Path) -> Read:
    pair = open_pair(needs)

    def read(folder: Path) -> None:
        os.environ["XDG_CACHE_HOME"] = str(folder)
        kept = measure._cache_file(pair.base_session)
        kept.parent.mkdir(parents=True)
        (folder / "costs.json").rename(kept)
        table = measure.kept_table(pair.base_session)
        if table is None:
            raise ColmError("a broken table counts as none")
        table.chunks(64, 512)
        table.all_states(64)
        break_even(table, table)
        seconds_per_token(table, [table], 0.1)

    return read


KINDS = (
    Kind("prompt-cache", _caches, _read_cache, n_tests=100),
    Kind("costs", _costs, _read_costs, n_tests=150),
)
