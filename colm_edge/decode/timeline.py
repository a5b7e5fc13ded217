"""What the loop needs of a model, wherever it runs: a timeline of token ids."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel
from colm_edge.llama.account import Account


class Timeline(Protocol):
    """One model's token prefix and its state; `llama.session.Session` documents the methods."""

    @property
    def n_ctx(self) -> int: ...
    @property
    def account(self) -> Account:
        """What it has cost so far, as of its last `sync`."""

    def turn_to(self, prompt: array[int]) -> None: ...

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int: ...

    def state(self, i: int) -> tuple[Floats, Floats]: ...


class Around:
    """What a timeline around another one passes on: its size, its account and its states."""

    def __init__(self, inner: Timeline) -> None:
        self._inner = inner

    @property
    def n_ctx(self) -> int:
        return self._inner.n_ctx

    @property
    def account(self) -> Account:
        return self._inner.account

    def turn_to(self, prompt: array[int]) -> None:
        self._inner.turn_to(prompt)

    def state(self, i: int) -> tuple[Floats, Floats]:
        return self._inner.state(i)

    def keeps(self, tokens: Sequence[int], n: int) -> bool:
        """Return whether these tokens can be evaluated, and what is told after the first n of them
        is then what is told without the others. It is, unless a `Bridge` spells both again."""
        return keeps(self._inner, tokens, n)


def keeps(timeline: Timeline, tokens: Sequence[int], n: int) -> bool:
    """Return what `Around.keeps` does."""
    return not isinstance(timeline, Around) or timeline.keeps(tokens, n)


class Expert(Timeline, Protocol):
    """The timeline of an expert: in this process, on a thread of its own, or on a server."""

    @property
    def name(self) -> str:
        """Its file, or its server's address."""

    @property
    def fingerprint(self) -> str:
        """Identifies the model."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every token that ends a generation for it."""

    def open(self, cancel: Cancel | None = None) -> None:
        """Load now rather than at the first `sync`."""

    def follow(self, tokens: array[int]) -> None:
        """Start to catch up with written tokens in the background, if it can; return at once."""

    def close(self) -> None:
        """Free what it holds."""
