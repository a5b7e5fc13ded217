"""The store in a work folder, without models: killed anywhere, the next run gives the same."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from colm_edge.errors import DataError
from colm_edge.train import store
from colm_edge.train.documents import Documents
from colm_edge.train.store import FolderStore

TYPES = {"logprob": np.dtype(np.float64), "hidden": np.dtype((np.float32, (3,)))}


class KilledError(BaseException):
    pass


def documents(numbers) -> Documents:
    """Return documents that their numbers tell apart, each of 2 to 6 tokens."""
    lengths = np.array([2 + number % 5 for number in numbers])
    tokens = np.repeat(np.array(numbers, np.int32), lengths)
    return Documents(tokens, lengths, np.ones_like(lengths), np.arange(len(numbers)))


def columns(of: Documents, chosen) -> dict[str, np.ndarray]:
    """Return what is to be stored of some documents: rows that tell where they come from."""
    rows = -1.0 - np.concatenate([of.span(i)[1:] * 10.0 + np.arange(of.counts[i]) for i in chosen])
    return {"logprob": rows, "hidden": np.stack([rows, -rows, rows + 1], 1).astype(np.float32)}


def run(folder, of: Documents) -> tuple[dict[str, np.ndarray], int]:
    """Store what is to do, three documents at a time; return all columns, and how many to do."""
    there = FolderStore(folder, TYPES, of)
    with there:
        for at in range(0, len(there.to_do), 3):
            group = there.to_do[at : at + 3]
            there.append(columns(of, group), len(group))
    return there.columns(), len(there.to_do)


@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere_it_goes_on_and_keeps_what_it_had(tmp_path, monkeypatch, seed):
    """Four sets of documents, one after the other; most runs are killed at some write or rename,
    half of those without a chance to note how far they have come."""
    chance = random.Random(seed)
    left = 0

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError

    class File(store.FileIO):
        def write(self, data):
            step()
            return super().write(data[: max(1, len(data) // chance.choice((1, 2)))])

    def replace(source, target, replace=os.replace):
        step()
        replace(source, target)

    monkeypatch.setattr(store, "FileIO", File)
    monkeypatch.setattr(store.os, "replace", replace)
    # It is slow, and helps against a power loss alone.
    monkeypatch.setattr(store.os, "fsync", lambda file: None)
    monkeypatch.setattr(store, "SAVE_SECONDS", chance.choice((0.0, 1e9)))
    whole = []
    for _ in range(4):
        of = documents([chance.randrange(40) for _ in range(chance.randrange(1, 30))])
        for _ in range(5):
            left = chance.randrange(1, 60)
            with monkeypatch.context() as patch:
                if chance.random() < 0.5:
                    patch.setattr(FolderStore, "_save", lambda self: None)
                try:
                    run(tmp_path / "base", of)
                except KilledError:
                    continue
        left = 1_000_000
        found, _ = run(tmp_path / "base", of)
        for name, rows in columns(of, range(len(of))).items():
            assert np.array_equal(found[name], rows)
        whole.append(of)
        for earlier in whole:
            found, n_done = run(tmp_path / "base", earlier)
            assert n_done == 0
            assert np.array_equal(
                found["logprob"], columns(earlier, range(len(earlier)))["logprob"]
            )
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0, -1e300])
def test_a_column_that_no_model_wrote_is_refused_before_the_pass(tmp_path, value):
    of, folder = documents(range(6)), tmp_path / "f"
    run(folder, of)
    with (folder / "logprob.float64").open("r+b") as file:
        file.seek(16)
        file.write(np.float64(value).tobytes())
    with pytest.raises(DataError, match=r"logprob\.float64: is missing or broken \(logprob holds"):
        FolderStore(folder, TYPES, documents(range(9)))


@pytest.mark.parametrize(("first", "second"), [(2, 0), (-1, 3), (1 << 62, 1 << 62), (2, 1)])
def test_an_index_that_counts_other_rows_is_refused(tmp_path, first, second):
    """Also where as many rows are counted in all."""
    of, folder = documents([0, 1]), tmp_path / "f"  # of 1 and 2 rows
    run(folder, of)
    index = np.load(folder / store.INDEX_FILE)
    assert index["rows"].tolist() == [1, 2]
    index["rows"] = first, second
    np.save(folder / store.INDEX_FILE, index)
    with pytest.raises(DataError, match=r"documents\.npy: is missing or broken .*rows"):
        FolderStore(folder, TYPES, of)
