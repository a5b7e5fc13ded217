"""Whether a grammar allows a text, for tests."""

from __future__ import annotations

from colm_edge.llama.grammar import Grammar
from colm_edge.llama.model import Model


def accepts(model: Model, grammar: str, text: str) -> bool:
    """Whether a text is one that a grammar allows, to its end."""
    state = Grammar(grammar, model)
    for token in model.tokenize(text, special=False, bos=False):
        if not state.allows(token):
            return False
        state.accept(token)
    return state.allows(next(iter(model.end_tokens)))
