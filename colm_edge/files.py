"""Files of the user's: whether they can be written, and writing them whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from colm_edge.errors import SwitchError


def check_writable(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raise SwitchError now rather than after an hour's work.

    inputs: files that are read, which the result must not replace.
    """
    target = Path(path)
    folder = target.parent
    for file in inputs:
        if file is not None and target.exists() and Path(file).exists() and target.samefile(file):
            raise SwitchError(f"{target} is read by this command; give the result another name")
    if target.is_dir():
        raise SwitchError(f"{target} is a folder; give a file's name")
    if not folder.is_dir():
        raise SwitchError(f"{folder}: no such folder; make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise SwitchError(f"{target}: cannot write there: {e.strerror or e}") from e
