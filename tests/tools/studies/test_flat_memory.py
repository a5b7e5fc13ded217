"""What answers, loads and unloads open is closed again, however they end."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from pathlib import Path

import llama_cpp
import pytest
from serving import wait_for
from studies.flat_memory import answers, loads, unloads

from colm_edge.pair import load

FILES = Path("/proc/self/fd")


@pytest.fixture
def live(monkeypatch) -> Counter[str]:
    """Count llama.cpp's contexts and models that exist."""
    found = Counter[str]()

    def counted(name: str, kind: str, by: int) -> None:
        real = getattr(llama_cpp, name)

        def call(*args):
            result = real(*args)
            found[kind] += by if by < 0 or result else 0
            return result

        monkeypatch.setattr(llama_cpp, name, call)

    counted("llama_init_from_model", "contexts", 1)
    counted("llama_free", "contexts", -1)
    counted("llama_model_load_from_file", "models", 1)
    counted("llama_model_free", "models", -1)
    return found


@pytest.mark.skipif(not FILES.exists(), reason="needs /proc")
def test_nothing_is_left_of_answers_loads_and_unloads(tiny, live):
    def load_pair():
        return load(tiny["template"], tiny["expert"], "margin", n_ctx=512, n_threads=1)

    gc.collect()
    start, n_threads, n_files = live.copy(), threading.active_count(), len(os.listdir(FILES))
    with load_pair() as pair:
        for _ in answers(pair, 120, seed=1):
            assert live["contexts"] - start["contexts"] <= 2
        for _ in unloads(pair, 8):
            assert live["models"] - start["models"] == 2
            assert not pair.expert_is_loaded
    for _ in loads(6, load_pair):
        assert live == start
    gc.collect()
    assert live == start
    wait_for(lambda: threading.active_count() == n_threads)
    assert len(os.listdir(FILES)) == n_files
