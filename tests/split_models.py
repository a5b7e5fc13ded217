"""Models in several files."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader, GGUFWriter
from gguf.scripts.gguf_new_metadata import copy_with_new_metadata


def split_into(folder: Path, source: str) -> list[Path]:
    """Write a model into an empty folder in parts of eight tensors; return them in order."""
    writer = GGUFWriter(str(folder / "m"), "llama", split_max_tensors=8)
    copy_with_new_metadata(GGUFReader(source), writer, {}, [])
    parts = sorted(folder.iterdir())
    assert len(parts) > 1
    return parts
