"""A context that memory has no room for is refused, before it fills it."""

from __future__ import annotations

import logging
import re

import pytest
from real_models import files

from colm_edge.errors import ModelError
from colm_edge.llama import memory
from colm_edge.llama.context import Context, ContextOptions
from colm_edge.llama.model import Model


def test_the_size_is_that_of_keys_and_values(model):
    """Two layers, two heads of keys and values, 32 numbers each, of two bytes; of 256 tokens."""
    assert memory.cache_bytes(model, 512) == 2 * 2 * 32 * 512 * 2 * 2
    assert memory.cache_bytes(model, 257, 8.5, 16) == 2 * 2 * 32 * 512 * (8.5 + 16) / 8
    options = ContextOptions(cache_type_k="q8_0", cache_type_v="f32")
    assert options.cache_bytes(model, 512) == memory.cache_bytes(model, 512, 8.5, 32)


class Header:
    """What a model's header says."""

    n_embd = 640

    def __init__(self, **keys) -> None:
        self.keys = {"general.architecture": "any"} | {f"any.{k}": str(v) for k, v in keys.items()}
        self.metadata = self.keys.get

    def number(self, key: str) -> int:
        return int(self.keys.get(f"any.{key}", "0"))


GEMMA = {
    "block_count": 18, "attention.head_count": 4, "attention.head_count_kv": 1,
    "attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        (GEMMA, 18 * (256 + 256)),
        (GEMMA | {"attention.value_length": 128}, 18 * (256 + 128)),
        (GEMMA | {"block_count": 3, "attention.head_count_kv": "[2, 0, 3]"}, 5 * 512),
        ({"block_count": 2, "attention.head_count": 10}, 2 * 10 * 128),
        ({"block_count": 2, "attention.head_count": "[10, 5]"}, 15 * 128),
        ({"block_count": 2, "attention.head_count": 0}, 0),
        ({"block_count": 2, "attention.head_count": "many"}, 0),
    ],
)
def test_layers_with_a_window_or_heads_of_their_own_count_in_full(keys, numbers):
    assert memory.cache_bytes(Header(**keys), 1000) == 1024 * numbers * 2


@pytest.mark.parametrize("name", ["smollm2", "gemma-3", "qwen2.5-coder"])
def test_the_size_of_real_models_is_what_llama_cpp_says(name, caplog):
    """Of keys in 8 bits and values in 16, of 1,024 tokens."""
    model = Model(files(name)[0])
    options = ContextOptions(n_threads=1, flash_attn="on", cache_type_k="q8_0")
    context = Context(model, options, 1000, 32)
    with caplog.at_level(logging.DEBUG, "colm_edge"):
        context.open()
    said = re.findall(r"KV buffer size = +([\d.]+) MiB", caplog.text)
    context.close()
    assert said
    told = sum(map(float, said)) * (1 << 20)
    assert options.cache_bytes(model, 1000) == pytest.approx(told, rel=0.01)
    model.close()


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
