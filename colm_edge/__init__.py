"""A small language model that calls an expert only for the tokens it needs.

import colm_edge
with colm_edge.load() as pair:
    print(pair.generate("When did the last Caspian tiger die?").text)
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colm_edge.decode.step import Drafted, Stats, Step, Undone
    from colm_edge.errors import ColmError
    from colm_edge.llama.grammar import grammar_of
    from colm_edge.options import Options
    from colm_edge.pair import Pair, load
    from colm_edge.stream import Answer, AsyncStream, Stream
    from colm_edge.switch.file import Switch

__all__ = [
    "Answer",
    "AsyncStream",
    "ColmError",
    "Drafted",
    "Options",
    "Pair",
    "Stats",
    "Step",
    "Stream",
    "Switch",
    "Undone",
    "grammar_of",
    "load",
]

# A library must not write to stderr; without a handler, Python's logging would.
logging.getLogger("colm_edge").addHandler(logging.NullHandler())

# Before anything loads llama.cpp: it sets how its threads wait.
import_module("colm_edge.llama")

_HOMES = {
    "Answer": "stream",
    "AsyncStream": "stream",
    "ColmError": "errors",
    "Drafted": "decode.step",
    "Options": "options",
    "Pair": "pair",
    "Stats": "decode.step",
    "Step": "decode.step",
    "Stream": "stream",
    "Switch": "switch.file",
    "Undone": "decode.step",
    "grammar_of": "llama.grammar",
    "load": "pair",
}


def __getattr__(name: str) -> Any:
    # Keeps `import colm_edge` cheap: llama.cpp is loaded at the first use of a name that needs it.
    if name == "__version__":
        from importlib.metadata import version

        return version("colm-edge")
    if name in _HOMES:
        return getattr(import_module(f"colm_edge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'colm_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
