"""Where one model's scores are stored as they come: in memory, or in a work folder.

Either store says which documents are `to_do`, takes the columns of the next few of these with
`append`, and gives back the `columns` of all documents, in the documents' order.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from colm_edge.arrays import Ints
from colm_edge.errors import DataError
from colm_edge.files import replacing
from colm_edge.npy_files import read_array
from colm_edge.train.columns import Columns, check_columns
from colm_edge.train.documents import Documents

# Of each column, the type of a row: a number, or several, as in np.dtype((np.float32, (n_embd,))).
RowTypes = dict[str, np.dtype[Any]]
SAVE_SECONDS = 5.0  # between two notes of how far a pass has come
INDEX_FILE, DONE_FILE = "documents.npy", "done.int64"
ENTRY = np.dtype([("key", np.uint64), ("rows", np.int64)])
MOST_ROWS = 1 << 31  # of a document


class MemoryStore:
    """One model's columns in memory."""

    def __init__(self, types: RowTypes, documents: Documents) -> None:
        self.to_do: Ints = np.arange(len(documents))
        self._columns = {name: np.empty(documents.n_scored, kind) for name, kind in types.items()}
        self._n_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def append(self, columns: Columns, n_documents: int) -> None:
        """Store the rows of the next documents to do."""
        begin = self._n_rows
        for name, rows in columns.items():
            self._n_rows = begin + len(rows)
            self._columns[name][begin : self._n_rows] = rows

    def columns(self) -> Columns:
        return self._columns


class FolderStore:
    """One model's columns in a folder, to which scored documents are appended.

        documents.npy   key and number of rows of each document, in the order of their rows
        done.int64      how many of these documents are scored, the first ones: a single number
        <name>.<type>   a column: the rows of the scored documents, one after the other

    Rows count once `done.int64` says so; what a killed run wrote after them is cut off. Documents
    of other runs may follow those that are asked for, and keep their scores.

    Columns are written, not mapped, while a pass runs: memory use does not depend on their size,
    and a full disk is an error of `append`, not a crash.
    """

    def __init__(
        self,
        folder: Path,
        types: RowTypes,
        documents: Documents,
        *,
        n_choose: int | None = None,
    ) -> None:
        """Find what the folder has of these documents. n_choose: as in `check_columns`.

        Raises DataError for a folder that is broken.
        """
        self._folder, self._types, self._documents = folder, types, documents
        self._n_choose = n_choose
        self._new, self._old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
        self._files: dict[str, FileIO] = {}
        self._saved_at = time.monotonic()
        with disk_errors(folder.parent):
            if self._new.exists() and not folder.exists():  # killed between two renames
                os.replace(self._new, folder)
            shutil.rmtree(self._old, ignore_errors=True)
            self._read_index()
            self.to_do = self._plan()

    def __enter__(self) -> Self:
        """Open the columns where the rows that count end."""
        n = self._n_rows
        with disk_errors(self._folder.parent):
            for name, kind in self._types.items():
                file = self._files[name] = FileIO(self._path(name), "r+")
                file.truncate(n * kind.itemsize)
                file.seek(n * kind.itemsize)
            self._files[DONE_FILE] = FileIO(self._folder / DONE_FILE, "r+")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._save()
        finally:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def append(self, columns: Columns, n_documents: int) -> None:
        """Store the rows of the next documents to do."""
        with disk_errors(self._folder.parent):
            for name, rows in columns.items():
                _write(self._files[name], rows)
        self._n_done += n_documents
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save()

    def columns(self) -> Columns:
        """Return the columns, mapped, once nothing is left to do."""
        with disk_errors(self._folder.parent):
            if not self._matches():
                self._rearrange()
            return self._mapped(self._documents.n_scored)

    @property
    def _n_rows(self) -> int:
        return int(self._index["rows"][: self._n_done].sum())

    def _path(self, column: str, folder: Path | None = None) -> Path:
        return (folder or self._folder) / f"{column}.{self._types[column].base.name}"

    def _mapped(self, n: int) -> Columns:
        return {name: mapped(self._path(name), kind, n) for name, kind in self._types.items()}

    def _read_index(self) -> None:
        """Read which documents the folder has, and how many are scored; make it if it is new."""
        folder = self._folder
        if (folder / "state.npy").exists():
            raise DataError(
                f"{folder}: was written by an earlier version of colm-edge, which stored scores "
                "differently; name another work folder, or remove this one"
            )
        self._index, self._n_done = np.empty(0, ENTRY), 0
        if not (folder / INDEX_FILE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name in self._types:
                self._path(name).write_bytes(b"")
            (folder / DONE_FILE).write_bytes(_bytes(0))
            return
        with _broken(folder / INDEX_FILE):
            self._index = read_array(folder / INDEX_FILE, ENTRY)
            self._check_index()
        with _broken(folder / DONE_FILE):
            done = (folder / DONE_FILE).read_bytes()
            self._n_done = int.from_bytes(done, "little")
            if len(done) != len(_bytes(0)) or self._n_done > len(self._index):
                raise ValueError(f"expected a number of documents up to {len(self._index)}")
        if self._n_done:
            columns = self._mapped(self._n_rows)  # whole, or said to be broken now
            for name, column in columns.items():
                with _broken(self._path(name)):
                    check_columns({name: column}, self._n_choose)

    def _check_index(self) -> None:
        """Raise ValueError for invalid numbers of rows, or others than those of our documents."""
        rows, keys, ours = self._index["rows"], self._index["key"], self._documents.keys
        if len(rows) and not 0 < rows.min() <= rows.max() < MOST_ROWS:
            raise ValueError(f"expected 1 to {MOST_ROWS} rows of a document")
        by_key = np.argsort(ours)
        at = by_key[np.searchsorted(ours, keys, sorter=by_key).clip(max=len(ours) - 1)]
        if (rows != self._documents.counts[at])[ours[at] == keys].any():
            raise ValueError("it counts other rows than these documents have")

    def _plan(self) -> Ints:
        """Return the numbers of the documents to do; the index then ends with these."""
        documents = self._documents
        if self._matches():
            return np.arange(self._n_done, len(documents))
        known = self._index[: self._n_done]
        to_do = np.flatnonzero(~np.isin(documents.keys, known["key"]))
        self._index = np.concatenate([known, _entries(documents)[to_do]])
        if len(to_do):
            with replacing(self._folder / INDEX_FILE) as temporary, temporary.open("wb") as file:
                np.save(file, self._index)
        return to_do

    def _matches(self) -> bool:
        """Return whether the first documents are ours, in our order."""
        keys = self._documents.keys
        return np.array_equal(self._index["key"][: len(keys)], keys)

    def _save(self) -> None:
        """Get the columns onto the disk, and then note how many documents are done."""
        with disk_errors(self._folder.parent):
            for file in self._files.values():
                os.fsync(file.fileno())
            # Overwritten in place, for which a full disk still has space.
            self._files[DONE_FILE].seek(0)
            _write(self._files[DONE_FILE], np.frombuffer(_bytes(self._n_done), np.uint8))
        self._saved_at = time.monotonic()

    def _rearrange(self) -> None:
        """Rewrite the folder in the documents' order, and then the others that it has.

        The old columns stay until all is copied: the disk holds both for a while.
        """
        index, keys = self._index[: self._n_done], self._documents.keys
        by_key = np.argsort(index["key"], kind="stable")
        ours = by_key[np.searchsorted(index["key"], keys, sorter=by_key)]
        order = np.concatenate([ours, np.flatnonzero(~np.isin(index["key"], keys))])
        shutil.rmtree(self._new, ignore_errors=True)
        self._new.mkdir()
        for name in self._types:
            _write_file(self._path(name, self._new), self._rows_in(order, name))
        self._index, self._n_done = index[order], len(order)
        np.save(self._new / INDEX_FILE, self._index)
        (self._new / DONE_FILE).write_bytes(_bytes(self._n_done))
        os.replace(self._folder, self._old)
        os.replace(self._new, self._folder)
        shutil.rmtree(self._old)

    def _rows_in(self, order: Ints, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yield a column's rows of these documents, by their numbers in the index."""
        ends = np.cumsum(self._index["rows"])
        column = mapped(self._path(name), self._types[name], self._n_rows)
        for i in order:
            yield column[ends[i] - self._index["rows"][i] : ends[i]]


def stored(
    path: Path, kind: np.dtype[Any], n: int, parts: Iterable[npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """Write n rows, part by part, to a file that appears once it is whole; return it mapped."""
    with replacing(path) as temporary, disk_errors(path.parent):
        _write_file(temporary, parts)
    with disk_errors(path.parent):
        return mapped(path, kind, n)


def mapped(path: Path, kind: np.dtype[Any], n: int) -> npt.NDArray[Any]:
    """Return the first n rows of a file, mapped. Raises DataError when it does not have them."""
    with _broken(path):
        return np.memmap(path, kind, "r", shape=(n,))


@contextmanager
def disk_errors(work: Path) -> Iterator[None]:
    """Turn an error of the disk into a DataError."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"{work}: {reason.lower()}; the scores so far are kept: make space and run the "
                "same command again"
            ) from e
        raise DataError(f"{work}: cannot keep the scores there: {reason}") from e


@contextmanager
def _broken(path: Path) -> Iterator[None]:
    """Turn what a missing or broken file of a work folder raises into a DataError."""
    try:
        yield
    except (FileNotFoundError, ValueError, EOFError) as e:
        raise DataError(f"{path}: is missing or broken ({e}); remove the work folder") from e


def _entries(documents: Documents) -> npt.NDArray[Any]:
    """Return the documents' entries in an index, (n,)."""
    entries = np.empty(len(documents), ENTRY)
    entries["key"], entries["rows"] = documents.keys, documents.counts
    return entries


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _write_file(path: Path, parts: Iterable[npt.NDArray[Any]]) -> None:
    with FileIO(path, "w") as file:
        for part in parts:
            _write(file, part)
        os.fsync(file.fileno())


def _write(file: FileIO, values: npt.NDArray[Any]) -> None:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    while data:  # a disk that fills up takes a part
        data = data[file.write(data) :]
