"""One context of a model for several answers, which are evaluated in one batch."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel
from colm_edge.errors import ModelError
from colm_edge.llama.account import Account
from colm_edge.llama.context import SMALL_BATCH, is_small
from colm_edge.llama.costs import CostTable
from colm_edge.llama.held import Held
from colm_edge.llama.measure import cost_table
from colm_edge.llama.session import Session

# Tokens of one request that a batch takes before it takes part of a longer one, a new prompt.
SHORT = 64


@dataclass(eq=False)
class Request:
    """What a slot waits for: its timeline to hold `tokens`, with the states at `outputs`."""

    slot: int
    tokens: array[int]
    outputs: Sequence[int]
    cancel: Cancel | None = None
    prompt: array[int] | None = None  # to turn to first
    n_evaluated: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    @property
    def is_cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.requested


@dataclass
class Part:
    """The part of a request that a batch evaluates: tokens start to end. Tokens before the first
    output are prompt."""

    request: Request
    start: int
    end: int

    @property
    def first_output(self) -> int:
        return self.request.outputs[0]

    @property
    def in_prompt(self) -> bool:
        return self.start < self.first_output

    @property
    def is_last(self) -> bool:
        return self.end == len(self.request.tokens)


class SharedContext:
    """One context of a model with a sequence for each slot. One thread evaluates; the others read
    the states of their own slots while it waits for them.

    The context is made at the first evaluation, or by `open`; `close` gives its memory back.
    """

    def __init__(self, session: Session, n_slots: int) -> None:
        self.n_ctx, self.n_batch = session.n_ctx, max(session.n_batch, 4 * SHORT)
        # The slots share the cells, so that a long answer may take what short ones leave.
        self.context = session.new_context(self.n_ctx * n_slots, self.n_batch, n_slots)
        n_ubatch = session.options.n_ubatch_of(session.model, n_slots)
        self.held = [Held(min(n_ubatch, SMALL_BATCH)) for _ in range(n_slots)]
        self._session, self._wants_hidden = session, session.wants_hidden
        # What batches cost, once it was measured; None where they are not padded.
        self.costs: CostTable | None = None
        self._weighed = is_small(session.model)  # which takes longer than it saves
        self._rows: dict[tuple[int, int], int] = {}  # (slot, position) -> place in the last batch
        self._prompts_last = False  # were evaluated: they and outputs take turns

    def open(self) -> None:
        self.context.open()
        if not self._weighed:
            self._weighed = True
            self.costs = self._measured()

    def _measured(self) -> CostTable | None:
        begun = perf_counter()
        try:
            return cost_table(self._session, hasty=True)
        except ModelError:  # for example, no memory for another context
            return None
        finally:  # it is part of getting ready, and not of an answer
            seconds = perf_counter() - begun
            self.context.account += Account(seconds=seconds, load_seconds=seconds)

    def evaluate(self, requests: Sequence[Request]) -> list[Request]:
        """Evaluate one batch of the requests; return those that are complete after it.

        Short requests go first and whole; the room that is left takes the start of longer ones.
        """
        self.open()
        parts = sorted(map(self._rest_of, requests), key=lambda part: part.end - part.start)
        # With embeddings on every token of a batch is an output, so where hidden states are wanted,
        # prompts are evaluated in batches of their own, which take turns with the outputs'.
        prompts_only = self._wants_hidden and self._are_prompts_next(parts)
        if self._wants_hidden:
            parts = [part for part in parts if part.in_prompt is prompts_only]
        chosen, room = list[Part](), self.n_batch
        for part in parts:
            if prompts_only:
                part.end = part.first_output
            if part.end - part.start > room:  # outputs are all of the batch that ends the request
                part.end = min(part.start + room, part.first_output)
            if part.end > part.start:
                chosen.append(part)
                room -= part.end - part.start
        self._decode(chosen, hidden=self._wants_hidden and not prompts_only)
        return [part.request for part in parts if part.is_last]

    def _rest_of(self, request: Request) -> Part:
        """Drop what a slot holds beyond the common prefix; return what is left to evaluate."""
        held = self.held[request.slot]
        prompt, request.prompt = request.prompt, None
        # Behind a bridge the tokens need not begin with the prompt: its end may be spelt anew.
        keep = min(held.n_known(request.tokens), request.outputs[0])
        if prompt is not None:
            keep = min(keep, held.turn_to(prompt))
        if keep < len(held.tokens):
            held.drop(keep)
            self.context.drop(request.slot, keep)
        return Part(request, keep, len(request.tokens))

    def _are_prompts_next(self, parts: Sequence[Part]) -> bool:
        n_prompts = sum(part.in_prompt for part in parts)
        turn = n_prompts == len(parts) or (n_prompts > 0 and not self._prompts_last)
        self._prompts_last = turn
        return turn

    def _decode(self, chosen: Sequence[Part], *, hidden: bool) -> None:
        batch, row = self.context.batch, 0
        self._rows = {}
        for part in chosen:
            slot, start, end = part.request.slot, part.start, part.end
            positions = np.arange(start, end, dtype=np.int32)
            first, row = row, batch.put(row, part.request.tokens[start:end], positions, slot)
            for i in part.request.outputs if part.is_last else ():
                batch.output[first + i - start] = 1
                self._rows[slot, i] = first + i - start
        size = self._padded(row, all_states=hidden)
        if size > row:  # with the last token, once more and again
            token, after = part.request.tokens[end - 1 : end], np.arange(end, end + size - row)
            batch.put(row, token * (size - row), after.astype(np.int32), slot)
        try:
            self.context.decode(size, hidden=hidden)
            self.context.settle()
            if size > row:
                self.context.drop(slot, end)
        except BaseException:  # how much was evaluated is not known
            for part in chosen:
                self.context.drop(part.request.slot, part.start)
            raise
        for part in chosen:
            held = self.held[part.request.slot]
            held.tokens += part.request.tokens[part.start : part.end]
            part.request.n_evaluated += part.end - part.start
            held.evaluated_beside_others(part.end)

    def _padded(self, n: int, *, all_states: bool) -> int:
        """Return the cheapest size of a batch of n tokens that there is room for."""
        if self.costs is None:
            return n
        n_held = sum(len(held.tokens) for held in self.held)
        room = min(self.n_batch, self.n_ctx * len(self.held) - n_held)
        return self.costs.padded(n, room, all_states=all_states)

    def state(self, slot: int, i: int) -> tuple[Floats, Floats]:
        return self.context.state(self._rows[slot, i], hidden=self._wants_hidden)

    def close(self) -> None:
        self.context.close()
        for held in self.held:
            held.clear()
        self._rows = {}
