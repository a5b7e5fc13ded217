"""The bytes of Hugging Face's tokens, from the names that vLLM tells."""

from __future__ import annotations

import pytest

from colm_edge.remote.byte_names import spelt_by


@pytest.mark.parametrize(
    ("text", "names", "pieces"),
    [
        (" a\né", ["Ġa", "Ċ", "Ã©"], [b" a", b"\n", "é".encode()]),
        ("🫠", ["ðŁ", "«", "ł"], [b"\xf0\x9f", b"\xab", b"\xa0"]),
        ("the end", ["▁the", "▁end"], [b" the", b" end"]),
        ("a\n🫠", ["▁a", "<0x0A>", "<0xF0>", "<0x9F>", "<0xAB>", "<0xA0>"],
         [b" a", b"\n", b"\xf0", b"\x9f", b"\xab", b"\xa0"]),
        ("é", ["é"], ["é".encode()]),  # SentencePiece's
        ("<|im_end|>\n</s>", ["<|im_end|>", "Ċ", "</", "s", ">"],
         [b"<|im_end|>", b"\n", b"</", b"s", b">"]),
        ("<｜end▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"], ["<｜end▁of▁sentence｜>".encode()]),
        ("", [], []),
    ],
)  # fmt: skip
def test_names_are_read_as_the_tokenizer_wrote_them(text, names, pieces):
    assert spelt_by(names, text) == pieces
