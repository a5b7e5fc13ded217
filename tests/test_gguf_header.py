"""Heads of GGUF files, whole and mutated: what is read, or why nothing is."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import colm_edge
from colm_edge.errors import SwitchError
from colm_edge.gguf_header import Header, Skipped, Tensor, check_model, read_header, read_tensor
from colm_edge.switch.file import Switch

DATA = Path(colm_edge.__file__).parent / "data"


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.gguf")), ids=lambda path: path.name)
def test_it_reads_what_the_package_gguf_reads(path):
    found, expected = read_header(path), GGUFReader(path)
    keys = {k: f.contents() for k, f in expected.fields.items() if not k.startswith("GGUF.")}
    assert found.keys.keys() == keys.keys()
    for key, value in found.keys.items():
        if isinstance(value, Skipped):
            assert value == Skipped(len(keys[key]), has_bytes=value.has_bytes)
        else:
            assert value == (pytest.approx(keys[key]) if isinstance(value, float) else keys[key])
    for tensor in expected.tensors:
        mine = found.tensors[tensor.name]
        assert (mine.at, mine.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        if mine.kind == 0:
            np.testing.assert_array_equal(read_tensor(path, mine), tensor.data.reshape(mine.shape))


@pytest.fixture
def switch(tmp_path) -> Path:
    path = tmp_path / "s.gguf"
    weight, bias = np.ones((1, 9), np.float32), np.zeros(1, np.float32)
    Switch(("hidden", "entropy"), weight, bias, 8, name="s").save(path)
    return path


def test_a_count_that_the_file_has_no_room_for_is_refused_at_once(switch):
    """However large: nothing is looped over or allocated for it."""
    whole = switch.read_bytes()
    at = whole.index(b"colm.switch.features") + len("colm.switch.features") + 4 + 4
    for count in (1 << 62, 1 << 40, len(whole)):
        switch.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
        with pytest.raises(SwitchError, match="no room for"):
            Switch.load(switch)


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_switch_is_read_or_refused_in_one_line(switch, data):
    whole = bytearray(switch.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        whole[at : at + len(piece)] = piece
    cut = data.draw(st.none() | st.integers(0, len(whole)))
    path = switch.with_name("mutated.gguf")
    path.write_bytes(bytes(whole[:cut]))
    try:
        Switch.load(path)
    except SwitchError as e:
        told = str(e).removeprefix(str(path))
        assert len(told) <= 300
        assert told.isprintable()


def of_deci(*head_counts: int) -> Header:
    keys = {"general.architecture": "deci", "deci.attention.head_count": list(head_counts)}
    return Header(keys, {})


def named(**keys) -> Header:
    return Header({"general.architecture": "llama", **{f"llama.{k}": v for k, v in keys.items()}})


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (named(block_count=100_000), "block_count"),
        (named(block_count=0), "block_count"),
        (named(block_count="four"), "block_count"),
        (named(**{"attention.layer_norm_rms_epsilon": -1e-5}), "epsilon"),
        (named(**{"attention.layer_norm_rms_epsilon": float("nan")}), "epsilon"),
        (named(**{"attention.head_count": [4, 0]}), "head_count"),
        (of_deci(0, 0), "head_count"),
        (named(**{"rope.dimension_count": 33}), "even"),
        (Header({"tokenizer.ggml.tokens": ["a", "b", "a"]}), "comes twice"),
        (Header({"tokenizer.ggml.tokens": ["a", "b", "a\0c"]}), "comes twice"),
        (Header({"tokenizer.ggml.tokens": Skipped(9000, repeats=True)}), "comes twice"),
        (
            Header({"tokenizer.ggml.tokens": Skipped(9000), "tokenizer.ggml.model": "llama"}),
            "<0xFF>",
        ),
        (Header({"tokenizer.ggml.model": "none"}), "no vocabulary"),
        (Header({"tokenizer.chat_template": 0.0}), "tokenizer.chat_template' is not a text"),
        (Header({"tokenizer.ggml.pre": 1}), "tokenizer.ggml.pre' is not a text"),
        (Header(tensors={"n": Tensor("output_norm.weight", (4,), 26, 4096, 16)}), "has integers"),
        (Header(tensors={"a": Tensor("a", (4,), 0, 4096 + 16, 16)}), "'a' is not at a multiple"),
        (Header({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "llama"}), "<0xFF>"),
    ],
)
def test_a_model_that_would_end_the_process_is_refused(header, words):
    with pytest.raises(ValueError, match=words):
        check_model(header)


def test_keys_that_only_begin_like_texts_may_be_lists():
    check_model(
        Header(
            {"tokenizer.chat_templates": ["tool_use"], "tokenizer.ggml.precompiled_charsmap": [1]}
        )
    )


def test_the_shipped_models_are_models():
    for path in (DATA / "base.gguf", DATA / "expert.gguf"):
        check_model(read_header(path))


def test_tensors_end_in_the_file(tmp_path):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("a", np.zeros((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    assert read_header(path).tensors["a"].shape == (4, 64)
    sizes = struct.pack("<2Q", 64, 4)
    for wide in (struct.pack("<2Q", 1 << 40, 1 << 40), struct.pack("<2Q", 64, 5)):
        path.write_bytes(whole.replace(sizes, wide, 1))
        with pytest.raises(ValueError, match="beyond the file"):
            read_header(path)


def test_layers_without_attention_are_no_fault_where_the_architecture_has_them():
    check_model(of_deci(4, 0))
