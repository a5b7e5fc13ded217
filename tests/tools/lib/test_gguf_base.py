"""A GGUF base as a transformers model: the same function, and the same file when written back."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import gguf
import numpy as np
import pytest
from lib.llama_gguf import Shape
from lib.random_model import write_model

import colm_edge
from colm_edge.errors import ModelError

pytest.importorskip("torch", reason="needs the extra finetune")
pytest.importorskip("transformers", reason="needs the extra finetune")
gguf_base = import_module("lib.gguf_base")


@pytest.mark.parametrize(("mix", "step"), [("F32", 0), ("Q8_0", 3e-4)])
def test_writing_a_base_unchanged_gives_the_same_file(tmp_path, mix, step):
    write_model(tmp_path / "a.gguf", Shape(64, 2, 4, 2, 96, n_vocab=300, n_ctx=64), mix)
    source = gguf_base.GgufBase(tmp_path / "a.gguf")
    assert source.write(tmp_path / "b.gguf", dict(source.load().named_parameters())) == []
    a, b = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "b.gguf")
    assert list(a.fields) == list(b.fields)
    assert all(a.fields[n].contents() == b.fields[n].contents() for n in a.fields)
    for old, new in zip(a.tensors, b.tensors, strict=True):
        assert (old.name, old.tensor_type) == (new.name, new.tensor_type)
        left, right = (gguf.quants.dequantize(t.data, t.tensor_type) for t in (old, new))
        assert np.abs(left - right).max() <= step  # random bytes are no rounding of themselves


@pytest.fixture
def decided(tmp_path) -> Path:
    """A base with grouped heads whose attention is far from uniform: wrong rows would show."""
    write_model(tmp_path / "a.gguf", Shape(64, 2, 4, 2, 96, n_vocab=300, n_ctx=64), gain=20.0)
    file = gguf.GGUFReader(tmp_path / "a.gguf", "r+")
    for tensor in file.tensors:
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            tensor.data[:] *= 20
    file.data.flush()
    return tmp_path / "a.gguf"


def test_transformers_computes_what_llama_cpp_does(decided, monkeypatch):
    source = gguf_base.GgufBase(decided)
    assert source.check(source.load()) < 0.005
    shipped = gguf_base.GgufBase(Path(colm_edge.__file__).parent / "data/base.gguf")
    assert shipped.check(shipped.load()) < 0.05
    monkeypatch.setattr(gguf_base, "INTERLEAVED", ())
    for path in (source.path, shipped.path):
        with pytest.raises(ModelError, match="deviations from"):
            gguf_base.GgufBase(path).load()
