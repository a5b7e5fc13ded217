"""A timeline of a remote expert by its own tokens, several of whose states are read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from time import perf_counter

from colm_edge.cancel import Cancel
from colm_edge.errors import PromptError
from colm_edge.llama.account import Account
from colm_edge.llama.held import common_prefix
from colm_edge.remote.client import RemoteExpert, RemoteSession
from colm_edge.remote.dialect import Top
from colm_edge.remote.vocabulary import RemoteVocabulary

KEPT = 64  # states before the first one that was asked for last
OTHERS = 100_000  # tokens that share the rest of the probability, about


class RowsSession(RemoteSession):
    """What is asked again is not sent again: the states of the last tokens stay."""

    def __init__(self, expert: RemoteExpert) -> None:
        """expert: with a bridge."""
        super().__init__(expert)
        assert expert.words is not None, "an expert with a bridge"
        self.words: RemoteVocabulary = expert.words
        self._rows: dict[int, Top] = {}

    def forget(self) -> None:
        super().forget()
        self._rows = {}

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        """Ask what follows each of the outputs, as far as that is not known, and what the tokens
        spell that are named; return how many tokens the server evaluated, 0 if it does not tell.

        outputs: rising; by default the last token's position. cancel: ignored.
        Raises what `RemoteExpert.ask_rows` raises.
        """
        wanted = array("i", tokens)
        if not wanted:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        places = list(outputs) or [len(wanted) - 1]
        keep, first = common_prefix(wanted, self._held), places[0] - KEPT
        self._rows = {at: top for at, top in self._rows.items() if first <= at < keep}
        self._held = wanted
        missing = [at for at in places if at not in self._rows]
        if not missing:
            return 0
        begun = perf_counter()
        try:
            replies = self.expert.ask_rows(wanted[: missing[-1] + 1].tolist(), missing)
            self.words.know(token for reply in replies for token in reply.top)
        finally:  # a server may fail, which takes time as well
            self.account += Account(0, 0, perf_counter() - begun)
        self._rows |= {at: reply.top for at, reply in zip(missing, replies, strict=True)}
        counts = [reply.n_evaluated for reply in replies if reply.n_evaluated is not None]
        self.account += Account(sum(counts) if counts else None, 1)
        return sum(counts)

    def top(self, at: int) -> Top:
        """Return the tokens that the server named as likely after one, and how likely."""
        return self._rows[at]

    def logprob(self, at: int, token: int) -> float:
        """Return how likely a token is there. What was not named shares the rest evenly."""
        top = self._rows[at]
        if token in top:
            return top[token]
        rest = max(1 - math.fsum(map(math.exp, top.values())), 1e-6)
        return min(math.log(rest / OTHERS), *top.values())
