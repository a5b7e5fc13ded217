"""Real pretrained models for tests, where they were fetched (`python tools/fetch_models.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fetch_models import MODELS, default_folder

# The folder before tests get a cache of their own.
FOLDER = Path(os.environ.get("COLM_EDGE_MODELS") or default_folder())


def files(name: str) -> list[str]:
    """Return the paths of a model's files; skip the test where they were not fetched."""
    paths = [FOLDER / file.name for file in MODELS[name]]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"needs real models: python tools/fetch_models.py {name}")
    return [str(path) for path in paths]
