"""Models of the wrong kind, and texts that begin as files do, not as texts."""

from __future__ import annotations

import codecs
import os
import threading

import pytest
from gguf import GGUFWriter
from lib.random_model import SHAPES, write_model

from colm_edge.errors import DataError, ModelError
from colm_edge.llama.model import Model
from colm_edge.train.documents import read_rows


def test_an_encoder_is_refused(tmp_path, monkeypatch):
    """Its attention looks ahead, so what it writes is nonsense."""
    add = GGUFWriter.add_tokenizer_pre

    def add_both(writer: GGUFWriter, pre: str) -> None:
        add(writer, pre)
        writer.add_causal_attention(False)

    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", add_both)
    write_model(tmp_path / "encoder.gguf", SHAPES["tiny"], seed=0)
    with pytest.raises(ModelError, match="an encoder writes no text"):
        Model(tmp_path / "encoder.gguf")


def test_a_data_files_byte_order_mark_is_no_part_of_its_first_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"text": "a"}\n{"text": "b"}\n')
    assert [row for _, row in read_rows(path)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.skipif(os.name == "nt", reason="a POSIX pipe")
def test_data_may_come_from_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    lines = codecs.BOM_UTF8 + b'{"text": "a"}\n{"text": "b"}\n'
    writing = threading.Thread(target=path.write_bytes, args=(lines,))
    writing.start()
    assert [row for _, row in read_rows(path)] == [{"text": "a"}, {"text": "b"}]
    writing.join()


def test_utf_16_is_named_as_such(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(DataError, match="is UTF-16; save it as UTF-8"):
        list(read_rows(path))
