"""The collaborative loop: token ids in, one `Step` per token out.

It combines parts that do not know each other: timelines (what the models say), a policy (who
writes), a picker (which token is picked), and a schedule (in which batches the models run). The
schedule here is the exact Co-LLM procedure (arXiv 2403.03870, section 2). The base is evaluated at
every position, and the switch reads its state. Only where p_defer > threshold does the expert
catch up, in one batch, and write the token. `fast` has the fast twin of this schedule.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Literal, Protocol

from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel, CancelledError
from colm_edge.decode.picker import Picker, Prediction, Sampler
from colm_edge.decode.policy import BASE, Policy, Reading
from colm_edge.decode.step import Event, ExpertStats, Source, Stats, Step, Undone
from colm_edge.decode.timeline import Timeline, keeps
from colm_edge.errors import AbsentExpertError
from colm_edge.llama.owners import HomeLock

# The share of its threshold that p_defer reaches before the expert is likely to be called.
NEAR_THRESHOLD = 0.5
# Outputs evaluated at once when a prompt is read back; each takes n_vocab floats.
PROMPT_OUTPUTS = 64
Follow = Callable[["array[int]"], None]


class Schedule(Protocol):
    """In which batches the models are evaluated. It does not change what is written, unless it
    takes tokens back."""

    def next(self, loop: Decoder) -> Event:
        """Return the step of the token after those written, evaluating what that takes; or what
        happens before it, if the schedule takes tokens back."""


class Sequential:
    """The base evaluates every token by itself; the expert is called at each deferral.

    follow: called with the written tokens before each step, so that an expert on a thread of its
        own can catch up.
    """

    def __init__(self, follow: Follow | None = None) -> None:
        self._follow = follow

    def next(self, loop: Decoder) -> Step:
        tokens, picker = loop.tokens, loop.picker
        if self._follow is not None:
            self._follow(tokens)
        loop.evaluate_base(tokens)
        at = len(tokens)
        reading, logits = loop.read_base(at)
        if reading.writer == BASE:
            return picker.write_own(reading, logits)
        return write_deferred(loop, reading, logits)


def write_deferred(
    loop: Decoder, reading: Reading, logits: Floats, bet: Sequence[int] = ()
) -> Step:
    """Return the step that an expert writes; the base's own where it is absent.

    logits: the base's. bet: tokens that the expert evaluates after the written ones.
    """
    p_defer, writer = reading.p_defer, reading.writer
    tokens, at = loop.tokens, len(loop.tokens)
    if bet:
        tokens = tokens + array("i", bet)
    try:
        loop.evaluate_expert(writer, tokens, range(at - 1, len(tokens)) if bet else ())
        prediction = loop.read_expert(writer, at, logits, p_defer)
    except AbsentExpertError:  # the user was told why
        loop.stats.expert_failures += 1
        return loop.picker.write_own(reading, logits)
    return loop.picker.write(loop.sources[writer], p_defer, *prediction)


class ExpertAlone:
    """One expert writes every token; the base is evaluated only where it is absent."""

    def __init__(self, writer: int = 0) -> None:
        self.writer = writer

    def next(self, loop: Decoder) -> Step:
        writer = self.writer
        try:
            loop.evaluate_expert(writer, loop.tokens)
            prediction = loop.read_expert(writer, len(loop.tokens))
        except AbsentExpertError:
            loop.stats.expert_failures += 1
            loop.evaluate_base(loop.tokens)
            reading, logits = loop.read_base(len(loop.tokens))
            return loop.picker.write_own(reading, logits)
        return loop.picker.write(loop.sources[writer], 1.0, *prediction)


class Decoder:
    """An answer being written: an iterator of steps.

    base, experts: their timelines; the policy says which of them writes.
    sources: the experts, as their steps name them.
    end_tokens: end the answer and are not a step of it.
    cancel: ends the answer before its next evaluation, or within a long one.
    lock: held during each step, if other answers use the same timelines.
    near: called once for each expert, when p_defer first comes near its threshold where that one
        would write.
    """

    def __init__(
        self,
        base: Timeline,
        experts: Sequence[Timeline],
        policy: Policy,
        picker: Picker,
        prompt: Sequence[int],
        *,
        end_tokens: frozenset[int],
        max_tokens: int = -1,
        schedule: Schedule | None = None,
        cancel: Cancel | None = None,
        lock: HomeLock | None = None,
        near: Callable[[int], None] | None = None,
        sources: Sequence[Source] = ("expert",),
    ) -> None:
        self.tokens = array("i", prompt)
        self.stats = Stats(n_prompt=len(self.tokens))
        self.finish_reason: Literal["stop", "length"] | None = None
        self.ended_by: Step | None = None  # the end token, which is not a step of the answer
        self.undone: list[Undone] = []  # by a schedule that takes tokens back
        self.picker, self.end_tokens = picker, end_tokens
        self._base, self._experts, self.policy = base, tuple(experts), policy
        self._schedule = schedule or Sequential()
        self.cancel, self._lock = cancel or Cancel(), lock or HomeLock()
        self._near, self._far = near, set(range(len(self._experts)))  # those that are not near yet
        self._turned = False  # whether the models know of the prompt
        self.sources = tuple(sources)
        if len(self.sources) > 1:
            self.stats.experts = {source: ExpertStats() for source in self.sources}
        # The context must hold every token that is evaluated; the last one written is not. An
        # expert in this process has as much room; any other is absent beyond its own.
        self.end = base.n_ctx + 1
        if max_tokens >= 0:
            self.end = min(self.end, len(self.tokens) + max_tokens)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        while True:
            event = self._next_event()
            if isinstance(event, Step):
                return event

    def events(self) -> Iterator[Event]:
        """Iterate over the steps and what happens before them: drafts that wait for review, and
        those that are undone."""
        return iter(self._next_event, None)

    def _next_event(self) -> Event:
        """Return the next event. Raises StopIteration at the end."""
        if self.finish_reason is None and len(self.tokens) >= self.end:
            self.finish_reason = "length"
        if self.finish_reason is None and self.cancel.requested:
            self.finish_reason = "stop"
        if self.finish_reason is not None:
            raise StopIteration
        stats = self.stats
        begun = perf_counter()
        try:
            with self._lock.held():
                self._turn()
                event = self._schedule.next(self)
        except CancelledError:
            self.finish_reason = "stop"
            raise StopIteration from None
        finally:
            stats.total_seconds += perf_counter() - begun
        if not stats.first_token_seconds:
            stats.first_token_seconds = stats.total_seconds - stats.expert_load_seconds
        if not isinstance(event, Step):
            return event
        step = event
        if step.token in self.end_tokens:
            self.finish_reason, self.ended_by = "stop", step
            raise StopIteration
        self.tokens.append(step.token)
        stats.n_generated += 1
        stats.n_deferred += step.by_expert
        return step

    def _turn(self) -> None:
        """Tell the models of the prompt, once."""
        if not self._turned:
            for timeline in (self._base, *self._experts):
                timeline.turn_to(self.tokens[:])
            self._turned = True

    # Methods for schedules.

    def undo(self, position: int, gone: Sequence[Step], regret: float) -> Undone:
        """Note that drafts from `position` on are withdrawn; the schedule no longer counts them."""
        undone = Undone(position - self.stats.n_prompt, tuple(gone), regret)
        self.stats.n_undone += len(gone)
        self.undone.append(undone)
        return undone

    def evaluate_base(self, tokens: array[int], outputs: Sequence[int] = ()) -> None:
        """Evaluate the base so that its states after the tokens at `outputs` can be read; by
        default after the last token."""
        self.cancel.check()
        base, before = self._base, self._base.account.copy()
        try:
            base.sync(tokens, outputs, self.cancel)
        finally:  # a cancelled evaluation counts as far as it came
            self.stats.count_base(base.account - before)

    def read_base(self, at: int) -> tuple[Reading, Floats]:
        """Return the switch's reading for position `at`, and the base's logits for it."""
        logits, hidden = self._base.state(at - 1)
        reading = self.policy.read(at, logits, hidden)
        if self._near is not None and reading.p_defer > NEAR_THRESHOLD * self.policy.threshold:
            self._come_near(reading.expert)
        return reading, logits

    def _come_near(self, expert: int) -> None:
        if expert in self._far and self._near is not None:
            self._far.discard(expert)
            self._near(expert)

    def predicted_by_base(self, at: int) -> Prediction:
        """Return the base's logits for position `at`, their likeliest token and their log-sum-exp,
        without asking the switch."""
        logits, _ = self._base.state(at - 1)
        return logits, *self.picker.read(at, logits, of_base=True)

    def evaluate_expert(self, writer: int, tokens: array[int], outputs: Sequence[int] = ()) -> None:
        """Evaluate an expert so that its states after the tokens at `outputs` can be read; by
        default after the last token."""
        self.cancel.check()
        expert = self._experts[writer]
        before = expert.account.copy()
        try:
            expert.sync(tokens, outputs, self.cancel)
        finally:  # a server may fail, which takes time as well
            self.stats.count(expert.account - before, self.sources[writer])

    def keeps(self, writer: int, tokens: Sequence[int], n: int) -> bool:
        """Return whether an expert that evaluates these tokens says the same after the first n of
        them as without the others."""
        return keeps(self._experts[writer], tokens, n)

    def read_expert(
        self,
        writer: int,
        at: int,
        base: Floats | None = None,
        p_defer: float = 1.0,
        *,
        before: Sampler | None = None,
    ) -> Prediction:
        """Return an expert's logits for position `at`, their likeliest token and their log-sum-exp.

        base: the base's logits there; with them the mixture's logits are returned if the picker
        composes. before: the sampler's state there, if tokens after it were picked. Raises
        AbsentExpertError where the expert has no word for the base (`Bridge`), or names none that
        the grammar allows.
        """
        prediction = self.predicted_by_expert(writer, at, base, p_defer)
        if not self.picker.knows(prediction[0], before):
            raise AbsentExpertError("the expert names no token that the grammar allows")
        return prediction

    def predicted_by_expert(
        self, writer: int, at: int, base: Floats | None = None, p_defer: float = 1.0
    ) -> Prediction:
        """Return the same without asking the grammar."""
        logits, _ = self._experts[writer].state(at - 1)
        if base is not None:
            logits = self.picker.logits_of_deferred(base, logits, p_defer)
        return logits, *self.picker.read(at, logits)

    # Reading a prompt back.

    def read_prompt(self, first: int = 1) -> list[Step]:
        """Return a step for each token of the prompt from number `first` on, at least 1: which
        model would have written it, and how likely it was there. The expert must be in this
        process.

        Returns fewer steps if the answer is cancelled meanwhile.
        """
        begun, steps = perf_counter(), list[Step]()
        last, policy = len(self.tokens) - 1, self.policy
        self.policy = policy.copy()  # what is read here must not change the answer
        try:
            with self._lock.held():
                self._turn()
                for start in range(first - 1, last, PROMPT_OUTPUTS):
                    steps += self._read_tokens(start, min(start + PROMPT_OUTPUTS, last))
        except CancelledError:
            pass  # the next step ends the answer
        finally:
            self.policy = policy
        self.stats.total_seconds += perf_counter() - begun
        return steps

    def _read_tokens(self, start: int, end: int) -> list[Step]:
        """Return the steps of the tokens after positions start to end."""
        if isinstance(self._schedule, ExpertAlone):
            try:
                return self._read_by(self._schedule.writer, start, end)
            except AbsentExpertError:
                pass  # counted where it is asked again
        prefix, picker, steps = self.tokens[:end], self.picker, list[Step]()
        deferred: dict[int, dict[int, Floats]] = {}  # by writer and position, the base's logits
        self.evaluate_base(prefix, range(start, end))
        for i in range(start, end):
            (p_defer, _, logsumexp, writer, _), logits = self.read_base(i + 1)
            steps.append(picker.tell(self.tokens[i + 1], "base", p_defer, logits, logsumexp))
            if writer != BASE:
                kept = logits.copy() if picker.composes else logits
                deferred.setdefault(writer, {})[i] = kept
        for writer, places in deferred.items():
            last = max(places) + 1
            try:
                self.evaluate_expert(writer, prefix[:last], sorted(places))
            except AbsentExpertError:  # the base would have written it
                self.stats.expert_failures += 1
                continue
            for i, logits in places.items():
                p_defer = steps[i - start].p_defer
                try:
                    theirs, _, logsumexp = self.predicted_by_expert(writer, i + 1, logits, p_defer)
                except AbsentExpertError:
                    self.stats.expert_failures += 1
                    continue
                token = self.tokens[i + 1]
                source = self.sources[writer]
                steps[i - start] = picker.tell(token, source, p_defer, theirs, logsumexp)
        return steps

    def _read_by(self, writer: int, start: int, end: int) -> list[Step]:
        """Return the same steps where one expert writes every token."""
        picker, source, steps = self.picker, self.sources[writer], list[Step]()
        self.evaluate_expert(writer, self.tokens[:end], range(start, end))
        for i in range(start, end):
            logits, _, logsumexp = self.predicted_by_expert(writer, i + 1)
            steps.append(picker.tell(self.tokens[i + 1], source, 1.0, logits, logsumexp))
        return steps
