"""Several answers at once: slots that share one context per model and are evaluated in one batch.

Every answer runs the usual loop on a thread of its own, over timelines whose `sync` waits. Once all
running answers wait, the worker, the only thread that evaluates, takes their requests to one model
in one batch, and they go on. So batches are as large as possible.

A single slot uses the pair's own sessions, and so the fast schedule.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel, CancelledError
from colm_edge.decode.timeline import Around, Timeline
from colm_edge.errors import ColmError, ModelError, PromptError
from colm_edge.llama.account import Account
from colm_edge.llama.owners import close_each
from colm_edge.llama.session import check_outputs
from colm_edge.llama.shared import Request, SharedContext
from colm_edge.remote.client import RemoteSession

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.stream import Stream
    from colm_edge.switch.reading import AnySwitch
    from colm_edge.team import Member


class SharedTimeline:
    """A slot's timeline of one model, with a session's methods; `sync` waits for the worker.

    seconds: of the batches that it waited for, which other slots' tokens are part of.
    """

    def __init__(self, slots: Slots, shared: SharedContext, slot: int) -> None:
        self._slots, self._shared, self._slot = slots, shared, slot
        self.n_ctx = shared.n_ctx
        self.account = Account()
        self._prompt: array[int] | None = None

    def turn_to(self, prompt: array[int]) -> None:
        self._prompt = prompt

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        if not tokens:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if len(tokens) > self.n_ctx:
            raise PromptError(f"{len(tokens)} tokens do not fit the context of {self.n_ctx}")
        tokens = tokens if isinstance(tokens, array) else array("i", tokens)
        outputs = tuple(outputs) or (len(tokens) - 1,)
        check_outputs(len(tokens) - outputs[0], self._shared.n_batch)
        before = self._shared.context.account.copy()
        request = Request(self._slot, tokens, outputs, cancel, self._prompt)
        self._prompt = None
        try:
            self._slots.wait_for(self._shared, request)
        finally:  # a cancelled evaluation counts as far as it came
            took, n = self._shared.context.account - before, request.n_evaluated
            self.account += Account(n, int(n > 0), took.seconds, took.load_seconds)
        return n

    def state(self, i: int) -> tuple[Floats, Floats]:
        # Batches of other slots overwrite these views while this slot waits for its other model.
        logits, hidden = self._shared.state(self._slot, i)
        return logits.copy(), hidden.copy()


class AwayTimeline(Around):
    """A slot's timeline of an expert on a server; the other slots go on while it waits."""

    def __init__(self, slots: Slots, inner: Timeline) -> None:
        super().__init__(inner)
        self._slots = slots

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        with self._slots.away():
            return self._inner.sync(tokens, outputs, cancel)


class Slots:
    """A pair's models for several answers at once.

    `take` hands out a slot without waiting: it raises BusyError when all are taken.
    """

    def __init__(self, pair: Pair, n_slots: int) -> None:
        self.pair, self.n_slots = pair, n_slots
        self._changed = threading.Condition()
        self._taken: set[int] = set()
        self._n_away = 0  # taken slots that wait for an expert's server
        self._closed = False
        self._waiting: dict[SharedContext, list[Request]] = {}
        self.base: SharedContext | None = None
        self.experts: dict[SharedContext, Member] = {}  # those in this process
        self._worker: threading.Thread | None = None
        if n_slots > 1:
            self._share()

    def _share(self) -> None:
        pair, n_slots = self.pair, self.n_slots
        if pair.room is not None:
            pair.room.share(n_slots)
        for session in (pair.base_session, *(m.session for m in pair.members if m.here)):
            session.close()  # the slots have contexts of their own
        self.base = SharedContext(pair.base_session, n_slots)
        self._waiting[self.base] = []
        self._made: list[Callable[[int], Timeline]] = []  # of each expert, from a slot's number
        for member in pair.members:
            if isinstance(member.timeline, RemoteSession):
                self._made.append(partial(self._away_timeline, member))
            else:
                shared = SharedContext(member.session, n_slots)
                self.experts[shared] = member
                self._waiting[shared] = []
                self._made.append(partial(self._timeline, shared, member))
        self._worker = threading.Thread(target=self._work, name="colm-edge-slots", daemon=True)
        self._worker.start()

    def open(self) -> None:
        """Make the base's shared context now, not at the first answer."""
        if self.base is not None:
            self.base.open()

    @contextmanager
    def take(self, tokens: Sequence[int]) -> Iterator[tuple[Timeline, ...] | None]:
        """Take a free slot, the one that holds most of these tokens, and give its timelines of the
        base and of each expert. None stands for the pair's own sessions."""
        wanted = self._held_as(array("i", tokens))
        with self._changed:
            free = [slot for slot in range(self.n_slots) if slot not in self._taken]
            if self._closed:
                raise ModelError("the slots are closed; make new ones")
            if not free:
                raise BusyError("every slot is taken; ask again later")
            slot = max(free, key=lambda slot: self._worth(slot, wanted))
            self._taken.add(slot)
        try:
            yield self._timelines(slot)
        finally:
            with self._changed:
                self._taken.discard(slot)
                self._changed.notify_all()

    def _timelines(self, slot: int) -> tuple[Timeline, ...] | None:
        if self.base is None:
            return None
        return SharedTimeline(self, self.base, slot), *(made(slot) for made in self._made)

    def _away_timeline(self, member: Member, slot: int) -> Timeline:
        return AwayTimeline(self, member.another())

    def _timeline(self, shared: SharedContext, member: Member, slot: int) -> Timeline:
        return member.across(SharedTimeline(self, shared, slot))

    def _held_as(self, tokens: array[int]) -> dict[SharedContext, array[int]]:
        """Return tokens of the base's as each shared context would hold them."""
        found = {shared: member.own(tokens) for shared, member in self.experts.items()}
        return found if self.base is None else {self.base: tokens} | found

    def _worth(self, slot: int, wanted: Mapping[SharedContext, array[int]]) -> tuple[float, int]:
        """Rank a free slot for a prompt: by the share of it that is known, if that is at least
        half; otherwise the slot with the shortest cache is best, since it loses least."""
        known = max(  # an expert alone has it all
            (shared.held[slot].n_known(own) / max(1, len(own)) for shared, own in wanted.items()),
            default=0.0,
        )
        n_held = sum(len(shared.held[slot].tokens) for shared in wanted)
        return known if known >= 0.5 else 0.0, -n_held

    def wait_for(self, context: SharedContext, request: Request) -> None:
        context.context.home.check()  # a child of fork has no worker
        with self._changed:
            if self._closed:
                raise ModelError("the models are closed")
            self._waiting[context].append(request)
            self._changed.notify_all()
        request.done.wait()
        if request.error is not None:
            raise request.error

    def _next(self) -> SharedContext | None:
        """Return the context to evaluate next, or None while an answer still runs.

        The base goes first: meanwhile more answers defer, and the experts' batches grow. Once three
        quarters of the answers wait for an expert, the one that most wait for runs: later the
        base's batches would be too small, sooner the experts'.
        """
        base = len(self._waiting[self.base]) if self.base is not None else 0
        by_expert = {shared: len(self._waiting[shared]) for shared in self.experts}
        expert, n = sum(by_expert.values()), len(self._taken) - self._n_away
        if not base + expert or base + expert < n:
            return None
        if base and 4 * expert < 3 * n:
            return self.base
        return max(by_expert, key=by_expert.__getitem__)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (context := self._next()) is None and not self._closed:
                    self._changed.wait()
                if context is None or self._closed:
                    return
                requests = list(self._waiting[context])
            error: BaseException | None = None  # raised in the thread that waits
            done = [request for request in requests if request.is_cancelled]
            if done:
                error = CancelledError()
            else:
                try:
                    self._make_room(context)
                    done = context.evaluate(requests)
                except BaseException as e:
                    done, error = requests, e
            with self._changed:
                for request in done:
                    self._waiting[context].remove(request)
                    request.error = error
                    request.done.set()

    def _make_room(self, context: SharedContext) -> None:
        """Free other experts, if that is needed. Every answer waits now, and reads none of them."""
        member, room = self.experts.get(context), self.pair.room
        if member is not None and room is not None:
            room.enter(member, partial(_free, context, member))

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let the other slots go on inside the `with` block."""
        with self._changed:
            self._n_away += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._n_away -= 1

    @property
    def load_seconds(self) -> float:
        """Seconds of reading weights and creating the shared contexts."""
        return sum(shared.context.account.load_seconds for shared in self._waiting)

    @property
    def expert_loaded(self) -> bool:
        """Whether an expert takes memory here: its weights, or a context of them."""
        return self.pair.expert_is_loaded or any(shared.context.created for shared in self.experts)

    def unload_expert(self) -> None:
        """Free the experts' memory, unless an answer is being written, which may read it; the next
        call of each loads it again."""
        with self._changed:
            if self._taken or not self.expert_loaded:
                return
            if self.base is None:
                self.pair.unload_expert()
            close_each(*(partial(_free, *expert) for expert in self.experts.items()))

    def close(self) -> None:
        """End the worker, and free the contexts once no answer reads them. Answers in shared
        contexts end with an error at their next evaluation; a single slot's answer is completed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
        for requests in self._waiting.values():
            for request in requests:
                request.error = ModelError("the models are closed")
                request.done.set()
        with self._changed:
            while self._taken:
                self._changed.wait()
        closers: list[Callable[[], None]] = [context.close for context in self._waiting]
        if self.base is not None and self.pair.room is not None:
            closers.append(partial(self.pair.room.share, 1))
        close_each(*closers)


def _free(context: SharedContext, member: Member) -> None:
    """Give back the memory of an expert and its shared context."""
    context.close()
    member.unload()


class Writer:
    """Writes one answer in a slot, on the caller's thread; any thread may cancel it."""

    def __init__(
        self, slots: Slots, tokens: list[int], options: Options, switch: AnySwitch | None = None
    ) -> None:
        self._slots, self._tokens, self._options, self._switch = slots, tokens, options, switch
        self._stream: Stream | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """End the answer after the token that is being written, or before it begins."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    @contextmanager
    def stream(self) -> Iterator[Stream]:
        """Take a slot and give the stream of the answer. Raises BusyError when all are taken."""
        with self._slots.take(self._tokens) as timelines:
            stream = self._stream = self._slots.pair.stream_tokens(
                self._tokens, self._options, timelines, self._switch
            )
            if self._cancelled:  # before the stream was there to be cancelled
                stream.cancel()
            yield stream


class BusyError(ColmError):
    """Every slot is taken."""
