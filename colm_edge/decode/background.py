"""An expert that catches up on a thread of its own while the base goes on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from colm_edge.llama.session import Session

Floats = npt.NDArray[np.float32]
# Shorter gaps are left for the deferral: several tokens cost less in one batch.
MIN_GAP = 16


class Background:
    """A session's methods, and `follow`, which evaluates without being waited for.

    What is evaluated so was written already, so a deferral that has to wait for it loses nothing.
    An expert that nobody has asked yet stays unloaded.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._worker = ThreadPoolExecutor(1, "colm-edge-expert")
        self._job: Future[int] | None = None
        self.n_ctx = session.n_ctx
        self.n_evaluated = self.n_calls = 0
        self.seconds = self.load_seconds = 0.0
        self._account()

    def follow(self, tokens: array[int]) -> None:
        """Begin to catch up with `tokens`, unless a catch-up is under way or the gap is small."""
        if self._job is not None and not self._job.done():
            return
        self.wait()
        session = self._session
        if session.created and len(tokens) - session.n_known(tokens) >= MIN_GAP:
            self._job = self._worker.submit(session.sync, tokens[:])

    def wait(self) -> None:
        """Return once nothing is under way. Raises what the catch-up raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def sync(self, tokens: Sequence[int], outputs: Sequence[int] = ()) -> int:
        """As a session's, after what is under way."""
        self.wait()
        n = self._session.sync(tokens, outputs)
        self._account()
        return n

    def state(self, i: int) -> tuple[Floats, Floats]:
        return self._session.state(i)

    def _account(self) -> None:
        # Copied, so that work in the background counts for the next call that needs it.
        session = self._session
        self.n_evaluated, self.n_calls = session.n_evaluated, session.n_calls
        self.seconds, self.load_seconds = session.seconds, session.load_seconds

    def close(self) -> None:
        """End the thread; the session stays open."""
        self._worker.shutdown(wait=True)
        self._job = None
