"""Several answers at once: slots that share each model's context and are evaluated together.

Every answer runs the same loop as ever, on a thread of its own, over timelines whose `sync` waits.
Once all answers under way wait, the worker, the one thread that touches llama.cpp, evaluates what
they ask of one model in one batch, and they go on. So a batch is as large as it can be.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import llama_cpp as llama
import numpy as np
import numpy.typing as npt

from colm_edge.errors import ColmError, ModelError, PromptError
from colm_edge.llama.context import Batch
from colm_edge.llama.session import Session, common_prefix
from colm_edge.remote.client import RemoteSession

if TYPE_CHECKING:
    from colm_edge.decode.loop import Timeline
    from colm_edge.pair import Pair
    from colm_edge.remote.client import RemoteExpert


Floats = npt.NDArray[np.float32]
# Tokens of one request that a batch takes before it takes part of a longer one, a new prompt.
SHORT = 64


@dataclass(eq=False)
class _Request:
    """What a slot waits for: its timeline equal to `tokens`, outputs from `outputs` on current."""

    slot: int
    tokens: array[int]
    outputs: Sequence[int]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class SharedContext:
    """One context of a model with a sequence for each slot. Only the worker calls its methods.

    The context is made at the first evaluation; `close` gives its memory back.
    """

    def __init__(self, session: Session, n_slots: int) -> None:
        self.session, self._n_slots = session, n_slots
        self.n_ctx, self.n_batch = session.n_ctx, max(session.n_batch, 4 * SHORT)
        self._context: Any = None
        self.held = [array("i") for _ in range(n_slots)]
        self._rows: dict[tuple[int, int], int] = {}  # (slot, position) -> place in the last batch

    @property
    def created(self) -> bool:
        return self._context is not None

    def _open(self) -> None:
        if self._context is None:
            # The slots share the cells, so that a long answer may take what short ones leave.
            self._context = self.session.new_context(
                self.n_ctx * self._n_slots, self.n_batch, self._n_slots
            )
            self._memory = llama.llama_get_memory(self._context)
            self._batch = Batch(self.n_batch)
            self._embeddings = self._early = False

    def evaluate(self, requests: Sequence[_Request]) -> list[_Request]:
        """Evaluate one batch of what is asked for; return the requests that are done with it.

        Short requests go first and whole; what room is left takes the beginning of longer ones.
        """
        self._open()
        plans = []
        for request in requests:
            keep = min(common_prefix(self.held[request.slot], request.tokens), request.outputs[0])
            self._drop(request.slot, keep)
            plans.append((len(request.tokens) - keep, keep, request))
        plans.sort(key=lambda plan: plan[0])
        # With embeddings on every token of a batch is an output, so where hidden states are wanted,
        # what is no output is evaluated in batches of its own, which take turns with the others.
        hidden = self.session.wants_hidden
        ready = [plan for plan in plans if plan[1] == plan[2].outputs[0]]
        self._early = hidden and (not ready or (len(ready) < len(plans) and not self._early))
        if hidden:
            plans = [plan for plan in plans if (plan in ready) is not self._early]
        room, chosen, done = self.n_batch, [], []
        for n, keep, request in plans:
            first = request.outputs[0]
            take = first - keep if self._early else n
            if take > room:  # outputs are all of the batch that ends the request
                take = min(room, first - keep)
            if take > 0:
                chosen.append((request, keep, keep + take))
                room -= take
            if take == n:
                done.append(request)
        self._decode(chosen, done, embeddings=hidden and not self._early)
        return done

    def _decode(
        self, chosen: Sequence[tuple[_Request, int, int]], done: Sequence[_Request],
        *, embeddings: bool,
    ) -> None:  # fmt: skip
        batch, at = self._batch, 0
        self._rows = {}
        for request, start, end in chosen:
            n = end - start
            batch.token[at : at + n] = request.tokens[start:end]
            batch.position[at : at + n] = np.arange(start, end, dtype=np.int32)
            batch.sequence[at : at + n] = request.slot
            batch.output[at : at + n] = 0
            if request in done:
                for i in request.outputs:
                    batch.output[at + i - start] = 1
                    self._rows[request.slot, i] = at + i - start
            at += n
        if embeddings != self._embeddings:
            llama.llama_set_embeddings(self._context, embeddings)
            self._embeddings = embeddings
        for request, start, _ in chosen:
            del self.held[request.slot][start:]
        self.session.decode_batch(self._context, batch.head(at))
        llama.llama_synchronize(self._context)
        for request, start, end in chosen:
            self.held[request.slot] += request.tokens[start:end]

    def _drop(self, slot: int, keep: int) -> None:
        if keep < len(self.held[slot]):
            del self.held[slot][keep:]
            if not llama.llama_memory_seq_rm(self._memory, slot, keep, -1):
                raise ModelError(f"{self.session.model.path}: the end of a state cannot be dropped")

    def state(self, slot: int, i: int) -> tuple[Floats, Floats]:
        row = self._rows[slot, i]
        model, hidden = self.session.model, np.empty(0, np.float32)
        logits = llama.llama_get_logits_ith(self._context, row)
        if self.session.wants_hidden:
            pointer = llama.llama_get_embeddings_ith(self._context, row)
            hidden = np.ctypeslib.as_array(pointer, (model.n_embd,))
        return np.ctypeslib.as_array(logits, (model.n_vocab,)), hidden

    def close(self) -> None:
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = None
            self.held = [array("i") for _ in self.held]
            self._rows = {}


class SharedTimeline:
    """A slot's timeline of one model, with a session's methods; `sync` waits for the worker."""

    def __init__(self, slots: Slots, context: SharedContext, slot: int) -> None:
        self._slots, self._context, self._slot = slots, context, slot
        self.n_ctx = context.n_ctx
        self.n_evaluated = self.n_calls = 0
        self.seconds = self.load_seconds = 0.0

    def sync(self, tokens: Sequence[int], outputs: Sequence[int] = ()) -> int:
        if not tokens:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if len(tokens) > self.n_ctx:
            raise PromptError(f"{len(tokens)} tokens do not fit the context of {self.n_ctx}")
        tokens = tokens if isinstance(tokens, array) else array("i", tokens)
        outputs = tuple(outputs) or (len(tokens) - 1,)
        before = self._context.session.seconds
        keep = min(common_prefix(self._context.held[self._slot], tokens), outputs[0])
        self._slots.wait_for(self._context, _Request(self._slot, tokens, outputs))
        self.seconds += self._context.session.seconds - before
        self.n_calls += 1
        self.n_evaluated += len(tokens) - keep
        return len(tokens) - keep

    def state(self, i: int) -> tuple[Floats, Floats]:
        # While this slot waits for its other model, the others' batches overwrite what stands here.
        logits, hidden = self._context.state(self._slot, i)
        return logits.copy(), hidden.copy()


class AwayTimeline(RemoteSession):
    """A slot's timeline of an expert on a server; no other slot waits for what is asked there."""

    def __init__(self, slots: Slots, expert: RemoteExpert) -> None:
        super().__init__(expert)
        self._slots = slots

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: object = None
    ) -> int:
        with self._slots.away():
            return super().sync(tokens, outputs, cancel)


class Slots:
    """A pair's models for several answers at once.

    `take` hands out a slot, and waits for none: it raises BusyError when all are taken.
    """

    def __init__(self, pair: Pair, n_slots: int) -> None:
        self.pair, self.n_slots = pair, n_slots
        self.base = SharedContext(pair.base_session, n_slots)
        self.expert: SharedContext | None = None
        self._remote: list[AwayTimeline] = []
        if pair.remote is None:
            self.expert = SharedContext(pair.expert_session, n_slots)
        else:
            self._remote = [AwayTimeline(self, pair.remote) for _ in range(n_slots)]
        self._changed = threading.Condition()
        self._taken: set[int] = set()
        self._n_away = 0  # of the slots taken, those whose expert's server is at work
        contexts = [self.base] if self.expert is None else [self.base, self.expert]
        self._waiting: dict[SharedContext, list[_Request]] = {c: [] for c in contexts}
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="colm-edge-slots", daemon=True)
        self._worker.start()

    @contextmanager
    def take(self, tokens: Sequence[int]) -> Iterator[tuple[Timeline, Timeline]]:
        """Have a free slot's timelines for a while: the one that knows most of these tokens."""
        wanted = array("i", tokens)
        with self._changed:
            free = [slot for slot in range(self.n_slots) if slot not in self._taken]
            if self._closed or not free:
                raise BusyError("every slot is taken; ask again later")
            slot = max(free, key=lambda slot: self._worth(slot, wanted))
            self._taken.add(slot)
        try:
            base = SharedTimeline(self, self.base, slot)
            if self.expert is None:
                yield base, self._remote[slot]
            else:
                yield base, SharedTimeline(self, self.expert, slot)
        finally:
            with self._changed:
                self._taken.discard(slot)
                self._changed.notify_all()

    def _worth(self, slot: int, wanted: array[int]) -> tuple[int, int]:
        """Rank a free slot for a prompt: what it knows of it, if that is a good part; and of those
        that know little, the one with the least to lose."""
        held = self.base.held[slot]
        known = common_prefix(held, wanted)
        return known if 2 * known >= len(wanted) else 0, -len(held)

    def wait_for(self, context: SharedContext, request: _Request) -> None:
        with self._changed:
            if self._closed:
                raise ColmError("the models are closed")
            self._waiting[context].append(request)
            self._changed.notify_all()
        request.done.wait()
        if request.error is not None:
            raise request.error

    def _next(self) -> SharedContext | None:
        """Return the context to evaluate next, or None while an answer is still at work.

        The base goes first: meanwhile more answers come to defer, and the expert's batch grows.
        Once three quarters wait for the expert it is its turn: later the base's own batches are
        too small, sooner the expert's are.
        """
        base = len(self._waiting[self.base])
        expert = len(self._waiting[self.expert]) if self.expert is not None else 0
        n = len(self._taken) - self._n_away
        if not base + expert or base + expert < n:
            return None
        return self.base if base and 4 * expert < 3 * n else self.expert

    def _work(self) -> None:
        while True:
            with self._changed:
                while (context := self._next()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
                requests = list(self._waiting[context])
            try:
                done, error = context.evaluate(requests), None
            except BaseException as e:  # raised where it was asked for
                done, error = requests, e
            with self._changed:
                for request in done:
                    self._waiting[context].remove(request)
                    request.error = error
                    request.done.set()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let the others go on meanwhile."""
        with self._changed:
            self._n_away += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._n_away -= 1

    @property
    def expert_loaded(self) -> bool:
        """Whether an expert takes memory here."""
        return self.expert is not None and self.expert.created

    def unload_expert(self) -> None:
        """Give the expert's memory back; it is read again when it is asked."""
        with self._changed:
            if self.expert is not None and not self._waiting[self.expert]:
                self.expert.close()
                self.pair.expert_session.close()
                self.pair.expert.unload()

    def close(self) -> None:
        """End the worker and free the contexts; answers under way end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()
        for context, requests in self._waiting.items():
            for request in requests:
                request.error = ColmError("the models are closed")
                request.done.set()
            context.close()


class BusyError(ColmError):
    """Every slot is taken."""
