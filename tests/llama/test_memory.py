"""A context that memory has no room for is refused, before it fills it."""

from __future__ import annotations

import pytest

from colm_edge.errors import ModelError
from colm_edge.llama import memory
from colm_edge.llama.context import Context, ContextOptions
from colm_edge.llama.model import Model


@pytest.fixture
def model(tiny):
    model = Model(tiny["base"])
    yield model
    model.close()


def test_the_size_is_that_of_keys_and_values(model):
    """Two layers, two heads of keys and values, 32 numbers each, of two bytes."""
    assert memory.cache_bytes(model, 100) == 2 * 2 * 32 * 100 * 2 * 2
    assert memory.cache_bytes(model, 100, 8.5, 16) == 2 * 2 * 32 * 100 * (8.5 + 16) / 8


def test_what_does_not_fit_is_refused(model, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(ModelError, match=r"a context of 5,000 tokens takes 0\.0 GB"):
        Context(model, ContextOptions(), 5000, 32).open()
    assert not model.loaded
    context = Context(model, ContextOptions(), 500, 32)
    context.open()
    context.close()


@pytest.mark.parametrize("facts", ["", "MemAvailable: much kB", "MemTotal: 5 kB"])
def test_a_system_that_does_not_tell_refuses_nothing(tmp_path, monkeypatch, facts):
    monkeypatch.setattr(memory, "MEMORY_FACTS", tmp_path / "facts")
    assert memory.available_bytes() is None
    (tmp_path / "facts").write_text(facts)
    assert memory.available_bytes() is None
