"""What a model tells of its vocabulary."""

from __future__ import annotations


def test_a_text_names_special_tokens(tiny_pair):
    model = tiny_pair.base
    tokens = model.tokenize("hello there")
    assert model.text(tokens).strip() == "hello there"
    end = min(model.end_tokens)
    assert model.text([*tokens, end]) == model.text(tokens) + model.text([end])
    assert len(model.text([end])) > 0
    assert model.text([]) == ""
