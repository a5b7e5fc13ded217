"""A bridge to an expert on a server, which names the likeliest of its tokens and no others."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from time import perf_counter

import numpy as np

from colm_edge.arrays import Doubles, Ints
from colm_edge.cancel import Cancel
from colm_edge.decode.bridge import NEAR_NATS, Bridge
from colm_edge.decode.spelling import Crossing
from colm_edge.remote.rows import RowsSession


class BridgeAway(Bridge):
    """As `Bridge`. What the expert did not name is left out, except for its own spelling of what is
    written: that shares the rest of the probability.

    Its `sync` raises AbsentExpertError too where the server cannot spell the text.
    """

    def __init__(
        self,
        session: RowsSession,
        crossing: Crossing,
        note: Callable[[str], None] | None = None,
    ) -> None:
        """session: this bridge's own. note: as for `Bridge`."""
        super().__init__(session, crossing, note)
        self._session = session
        self._begun: tuple[array[int], Future[int]] | None = None

    def turn_to(self, prompt: array[int]) -> None:
        """Do nothing: what a server keeps of earlier prompts is its own affair."""

    def begin(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> Future[int]:
        """Begin what `sync` does, several requests, and return at once; `sync` of the same tokens
        waits for it."""
        wanted, done = array("i", tokens), Future[int]()

        def work() -> None:
            try:
                done.set_result(self._sync(wanted, outputs, cancel))
            except BaseException as e:
                done.set_exception(e)

        self._begun = wanted, done
        # Not a pool's thread: the process may end while a server does not answer.
        threading.Thread(target=work, name="colm-edge-ask", daemon=True).start()
        return done

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        cancel, wanted = cancel or Cancel(), array("i", tokens)
        if self._begun is not None and self._begun[0] != wanted:
            with suppress(Exception):  # another answer's; it uses what this would use
                cancel.wait_for(self._begun[1])
            cancel.check()
            self._begun = None
        done = self._begun[1] if self._begun is not None else self.begin(tokens, outputs, cancel)
        try:
            return cancel.wait_for(done)
        finally:
            if done.done():
                self._begun = None

    def _sync(self, tokens: Sequence[int], outputs: Sequence[int], cancel: Cancel | None) -> int:
        account = self._session.account  # this bridge's own
        begun, before = perf_counter(), account.seconds
        try:
            return super().sync(tokens, outputs, cancel)
        finally:
            account.seconds = before + perf_counter() - begun  # spelling included

    def _goes_on(self, row: int, given: bytes) -> tuple[Ints, Doubles]:
        logprobs = self._session.top(row)
        least = max(logprobs.values()) - NEAR_NATS

        def goes_on(token: int) -> bool:
            piece = self._crossing.theirs.piece(token)
            return piece.startswith(given) and piece != given

        near = {
            token: logprob
            for token, logprob in logprobs.items()
            if logprob >= least and (not given or goes_on(token))
        }
        return np.array(list(near), np.int64), np.array(list(near.values()))

    def _logprob(self, row: int, token: int) -> float:
        return self._session.logprob(row, token)
