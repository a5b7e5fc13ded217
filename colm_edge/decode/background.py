"""An expert that catches up, or reads its weights, on a thread of its own beside the base."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_any

from colm_edge.arrays import Floats
from colm_edge.cancel import LOOK, Cancel, CancelledError
from colm_edge.llama.backend import supports_gpu
from colm_edge.llama.context import is_small
from colm_edge.llama.held import common_prefix
from colm_edge.llama.owners import Home
from colm_edge.llama.session import Session
from colm_edge.llama.threads import n_cores

# Shorter gaps wait for the deferral: one batch costs less than several.
MIN_GAP = 16


class Background:
    """An expert that catches up in the background: `follow` starts an evaluation and returns.

    It evaluates only tokens that are already written, so a deferral that waits for it loses
    nothing. An expert that was never called stays unloaded.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.name, self.n_ctx = session.name, session.n_ctx
        self._home = Home()  # a child of fork has no worker
        self._worker = ThreadPoolExecutor(1, "colm-edge-expert")
        self._job: Future[int] | None = None
        # What is caught up with, of which the first ones are known; and what ends that.
        self._ahead, self._n_known, self._stop = array("i"), 0, Cancel()
        # A copy, updated by `sync`: work in the background counts for the next call.
        self.account = session.account.copy()

    @property
    def fingerprint(self) -> str:
        return self.session.fingerprint

    @property
    def end_tokens(self) -> frozenset[int]:
        return self.session.end_tokens

    def open(self, cancel: Cancel | None = None) -> None:
        self.wait()
        self.session.open(cancel)

    def turn_to(self, prompt: array[int]) -> None:
        if common_prefix(prompt, self._ahead) - self._n_known < MIN_GAP:  # nobody wants it now
            self._stop.request()
        self.settle()  # what no call of the last answer waited for does not count for the next one
        self.session.turn_to(prompt)

    def follow(self, tokens: array[int]) -> None:
        """Start to catch up with `tokens`, unless a catch-up is running or the gap is small."""
        if self._job is not None and not self._job.done():
            return
        self.wait()
        session = self.session
        if session.created and len(tokens) - (n := session.n_known(tokens)) >= MIN_GAP:
            self._ahead, self._n_known, self._stop = tokens[:], n, Cancel()
            self._job = self._worker.submit(session.sync, self._ahead, (), self._stop)

    def begin(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> Future[int]:
        """Begin what `sync` does, and return at once; a `sync` of the same tokens then waits for it
        and has nothing left to evaluate."""
        self.wait()
        self._job = self._worker.submit(self.session.sync, tokens[:], outputs, cancel)
        return self._job

    def wait(self, cancel: Cancel | None = None) -> None:
        """Wait until no catch-up is running; cancel ends one that `follow` began. Raises what it
        raised, unless it was cancelled, with the answer that it was for; and ModelError in a child
        of fork."""
        self._home.check()
        if self._job is None:
            return
        while cancel is not None and not wait_for_any([self._job], LOOK).done:
            if cancel.requested:
                self._stop.request()
                break
        # An interrupt here keeps the job, so that no other thread uses the context meanwhile.
        error = self._job.exception()
        self._job = None
        if error is not None and not isinstance(error, CancelledError):
            raise error

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        """Wait for a running catch-up, then do what `Session.sync` does."""
        self.wait(cancel)
        try:
            return self.session.sync(tokens, outputs, cancel)
        finally:  # a cancelled evaluation counts as far as it came
            self.settle()

    def settle(self) -> None:
        """Take over the session's account as it is, whatever was evaluated for others."""
        self.wait()
        self.account = self.session.account.copy()

    def state(self, i: int) -> tuple[Floats, Floats]:
        return self.session.state(i)

    def close(self) -> None:
        """End the thread and close the session."""
        self._stop.request()
        self._worker.shutdown(wait=self._home.is_here)
        self._job = None
        self.session.close()


def can_overlap(base: Session, expert: Session) -> bool:
    """Return whether both models can run at once without slowing each other down."""
    if expert.model.rpc:
        return True
    on_gpu = [s.model.n_gpu_layers != 0 and supports_gpu() for s in (base, expert)]
    if on_gpu[0] != on_gpu[1]:
        return True
    # A decode of a small model is as fast as handing it to another thread.
    if any(on_gpu) or is_small(expert.model):
        return False
    return base.n_threads + expert.n_threads <= n_cores()


def prepare(expert: Session, base: Session) -> None:
    """Begin to read an expert's weights while the base goes on; return at once.

    Not where the user fixed the number of the base's threads, and they are as many as there are
    cores: llama.cpp's threads would wait busily for the one whose core is taken.
    """
    if base.options.adapts_threads or base.n_threads < n_cores():
        expert.model.prepare()
