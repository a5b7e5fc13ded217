"""What evaluations have cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Account:
    """The cost of a timeline's evaluations. Several contexts may count into the same one.

    n_evaluated: tokens, rolled back ones included; None where a server does not tell.
    n_calls: decodes, or a server's answers.
    seconds: that all this took, load_seconds included.
    load_seconds: of reading weights and creating contexts.
    """

    n_evaluated: int | None = 0
    n_calls: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0

    def copy(self) -> Account:
        return Account(self.n_evaluated, self.n_calls, self.seconds, self.load_seconds)

    def __iadd__(self, more: Account) -> Account:
        self.n_evaluated = plus(self.n_evaluated, more.n_evaluated)
        self.n_calls += more.n_calls
        self.seconds += more.seconds
        self.load_seconds += more.load_seconds
        return self

    def __add__(self, more: Account) -> Account:
        both = self.copy()
        both += more
        return both

    def __sub__(self, before: Account) -> Account:
        now, then = self.n_evaluated, before.n_evaluated
        return Account(
            None if now is None or then is None else now - then,
            self.n_calls - before.n_calls,
            self.seconds - before.seconds,
            self.load_seconds - before.load_seconds,
        )


def plus(one: int | None, other: int | None) -> int | None:
    """Return the sum of two numbers, None where either is not known."""
    return None if one is None or other is None else one + other
