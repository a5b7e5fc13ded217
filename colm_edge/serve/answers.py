"""A pair that answers requests: each answer runs on a thread and reports events.

The events of an answer are one `Began`, a `Step` for each token, and one `Ended`. Every endpoint
reads them, whether it sends tokens as they come or one body at the end. A job may also ask for
drafts, and for what is undone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from colm_edge.cancel import Cancel, CancelledError
from colm_edge.decode.step import Drafted, Step, Undone
from colm_edge.errors import ColmError
from colm_edge.options import Options, ServerOptions
from colm_edge.serve.errors import RefusalError
from colm_edge.serve.metrics import Metrics
from colm_edge.slots import Slots, Writer
from colm_edge.stream import Answer

if TYPE_CHECKING:
    from colm_edge.pair import Pair

IDLE = 2.0  # seconds without an answer before something is measured


@dataclass(frozen=True)
class Job:
    """One answer to write."""

    tokens: list[int]  # of the prompt
    options: Options
    reads_from: int = 0  # the prompt's first token that Began reports a step for, from 1 on
    provisional: bool = False  # whether drafts and what is undone are events


@dataclass(frozen=True)
class Began:
    """An answer has its slot, and its prompt is read if the job asks for that."""

    prompt_tokens: list[int]
    prompt_steps: list[Step]  # of the tokens after the first, if the job asks for them
    at: float  # when it got its slot, by time.monotonic()


@dataclass(frozen=True)
class Ended:
    """An answer is complete."""

    began: Began
    answer: Answer
    end: Step | None  # the end token, if it wrote one; not a step of the answer


Event = Began | Step | Drafted | Undone | Ended
Events = AsyncGenerator[tuple[int, Event], None]  # each with the index of its job


@dataclass
class Waiting:
    """An answer that waits for a slot. owner: who asked, a connection. request: its number."""

    owner: object
    request: int
    begin: Callable[[], None]  # on a thread of its own


class Server:
    """A pair behind HTTP: what all requests share."""

    def __init__(self, pair: Pair, settings: ServerOptions, name: str) -> None:
        pair.check_options(pair.defaults)
        self.pair, self.settings, self.name = pair, settings, name
        self.slots = Slots(pair, settings.n_slots)
        self.slots.open()
        self.created = int(time.time())
        # One thread for each slot, so a thread that runs finds a slot free.
        self._threads = ThreadPoolExecutor(settings.n_slots, "colm-edge-answer")
        # Changed by the event loop alone:
        self._waiting: list[Waiting] = []
        self._arriving = set[object]()  # who has asked for an answer that does not wait yet
        self._running = Counter[object]()  # answers that are written, by who asked
        # When who asked had a slot last, counted in slots; of those who still want one.
        self._had: dict[object, int] = {}
        self._slots_given = count(1)
        self._requests = count()
        self._begun: set[int] = set()  # requests of which an answer has begun
        self._queues: set[asyncio.Queue[tuple[int, Event | BaseException]]] = set()
        self.stopping = asyncio.Event()
        self._last_use = time.monotonic()
        self._measuring = Cancel()
        self.metrics = Metrics()
        self.metrics.busy.set_function(lambda: self.n_busy)
        self.metrics.waiting.set_function(lambda: self.n_waiting)
        self.metrics.expert_loaded.set_function(lambda: self.slots.expert_loaded)

    @property
    def n_busy(self) -> int:
        """How many answers are being written."""
        return self._running.total()

    @property
    def n_waiting(self) -> int:
        """How many requests wait for a slot; none of their answers has begun."""
        return len({one.request for one in self._waiting} - self._begun)

    def check_queue(self, owner: object) -> None:
        """Count a request whose prompt is not known yet, until `stream` has it or `leave` is called
        for its owner. Raises RefusalError when it would have to wait and the queue is full."""
        beyond = self.n_busy + len(self._arriving) - self.settings.n_slots
        n_before = self.n_waiting + max(0, beyond)
        if beyond >= 0 and n_before >= self.settings.queue:
            raise RefusalError(
                503,
                f"{n_before} requests are already waiting; try again later",
                "server_error",
                "overloaded",
                headers={"Retry-After": "1"},
            )
        self._arriving.add(owner)

    def leave(self, owner: object) -> None:
        """Count a request no longer whose prompt is not known yet."""
        self._arriving.discard(owner)

    async def stream(self, jobs: Sequence[Job], owner: object = None) -> Events:
        """Write the answers of a request side by side; yield (index of the job, event).

        owner: who asks. A slot that becomes free goes to the one who has the fewest, of several to
            the one who has had none for longest. None: nobody else.

        Closing the generator cancels the answers: each frees its slot after the token that it is
        writing. Raises what goes wrong in any of them.
        """
        self._measuring.request()
        self.leave(owner)  # it is counted among those that wait from here on
        owner = object() if owner is None else owner
        arrived, request = time.monotonic(), next(self._requests)
        loop = asyncio.get_running_loop()
        queue = asyncio.Queue[tuple[int, Event | BaseException]]()

        def call(function: Callable[..., Any], *arguments: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nothing reads the answer any more
                loop.call_soon_threadsafe(function, *arguments)

        def write(i: int, writer: Writer) -> None:
            def put(event: Event | BaseException) -> None:
                call(queue.put_nowait, (i, event))

            last: Ended | BaseException
            try:
                last = self._write(jobs[i], writer, arrived, put)
            except BaseException as e:  # raised below, in the event loop
                last = e
            call(self._left, owner)
            put(last)

        writers = [Writer(self.slots, job.tokens, job.options) for job in jobs]
        mine = [
            Waiting(owner, request, partial(write, i, writer)) for i, writer in enumerate(writers)
        ]
        self._queues.add(queue)
        try:
            self._waiting += mine
            self._begin()
            n_left = len(jobs)
            while n_left:
                i, event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                n_left -= isinstance(event, Ended)
                yield i, event
        finally:
            self._queues.discard(queue)
            for writer in writers:
                writer.cancel()
            self._waiting = [one for one in self._waiting if one not in mine]
            self._begun.discard(request)

    def _begin(self) -> None:
        """Let answers begin while slots are free: first of who has the fewest, then of who has had
        none for longest, then the oldest."""
        while self._waiting and self.n_busy < self.settings.n_slots:
            chosen = min(
                self._waiting,
                key=lambda one: (self._running[one.owner], self._had.get(one.owner, 0)),
            )
            self._waiting.remove(chosen)
            self._running[chosen.owner] += 1
            self._had[chosen.owner] = next(self._slots_given)
            self._begun.add(chosen.request)
            self._threads.submit(chosen.begin)

    def _left(self, owner: object) -> None:
        """Count an answer as written."""
        self._running[owner] -= 1
        self._running += Counter()  # forgets who has none
        wanted = {one.owner for one in self._waiting} | self._running.keys()
        self._had = {who: when for who, when in self._had.items() if who in wanted}
        self._last_use = time.monotonic()
        self._begin()

    def stop(self, seconds: float) -> None:
        """Refuse requests that are not whole yet, and end every answer after so many seconds."""
        self.stopping.set()
        asyncio.get_running_loop().call_later(seconds, self.end_answers)

    async def all_told(self, seconds: float) -> None:
        """Wait until nobody reads an answer, at most so many seconds."""
        end = time.monotonic() + seconds
        while self._queues and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def end_answers(self) -> None:
        """End every answer with an error, which its client is told."""
        ended = RefusalError(503, "the server was stopped before the answer ended", "server_error")
        for queue in self._queues:
            queue.put_nowait((0, ended))

    async def generate(self, jobs: Sequence[Job], owner: object = None) -> list[Ended]:
        """Write the answers of a request side by side; return them once all are complete."""
        ended: dict[int, Ended] = {}
        async with aclosing(self.stream(jobs, owner)) as events:
            async for i, event in events:
                if isinstance(event, Ended):
                    ended[i] = event
        return [ended[i] for i in range(len(jobs))]

    async def unload_when_idle(self) -> None:
        """Free the expert's memory whenever no answer was written for long enough; never return."""
        limit = self.settings.expert_idle_unload
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            idle = time.monotonic() - self._last_use
            if not self.n_busy and idle >= limit and self.slots.expert_loaded:
                await asyncio.to_thread(self.slots.unload_expert)

    async def measure_when_idle(self) -> None:
        """Measure at length what was measured in a hurry, once after each time that no answer was
        written for a while; never return. An answer interrupts it."""
        measured = self._last_use
        while True:
            await asyncio.sleep(IDLE / 2)
            if (
                self.n_busy
                or time.monotonic() < self._last_use + IDLE
                or self._last_use == measured
            ):
                continue
            measured, self._measuring = self._last_use, Cancel()
            with suppress(ColmError, CancelledError):
                await asyncio.to_thread(self.pair.measure_at_length, self._measuring)

    def close(self) -> None:
        """End every answer with an error, and free the slots' contexts."""
        self._measuring.request()
        self.slots.close()
        self._threads.shutdown()

    def _write(
        self, job: Job, writer: Writer, arrived: float, put: Callable[[Event], None]
    ) -> Ended:
        """Write an answer; tell `put` of each event but the last, which is returned."""
        since, metrics = time.monotonic(), self.metrics
        with writer.stream() as stream:
            try:
                prompt_steps = stream.read_prompt(job.reads_from) if job.reads_from else []
                began = Began(job.tokens, prompt_steps, since)
                put(began)
                for event in stream.events() if job.provisional else stream:
                    if isinstance(event, Step):
                        if len(stream.steps) == 1:
                            metrics.first_token.observe(time.monotonic() - arrived)
                        metrics.tokens.labels(event.source).inc()
                    put(event)
            finally:  # an answer that nobody waits for, or that fails, has cost its calls as well
                answer = stream.answer()
                metrics.expert_calls.inc(answer.stats.expert_calls)
                for source, expert in answer.stats.experts.items():
                    metrics.calls_by_expert.labels(source.partition(":")[2]).inc(expert.calls)
                metrics.prompt_tokens.inc(len(job.tokens))
                metrics.answer.observe(time.monotonic() - arrived)
        return Ended(began, answer, stream.end)
