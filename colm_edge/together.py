"""Many prompts answered at once, for data files: the batches of `Slots`, one thread each answer."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING

from colm_edge.slots import Slots

if TYPE_CHECKING:
    from colm_edge.decode.step import Step
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.stream import Answer, Stream
    from colm_edge.switch.reading import AnySwitch


@dataclass(frozen=True)
class Task:
    """A prompt to answer, as token ids. key: of the caller's, to know the answer by. switch: if it
    is not the pair's own."""

    key: int
    tokens: list[int]
    options: Options
    switch: AnySwitch | None = None


@dataclass(frozen=True)
class Done:
    """An answer, and the end token if it wrote one, which is not a step of it.

    seconds: that it took, without reading the expert's weights; of several answers at once, those
    since the one before was whole.
    """

    task: Task
    answer: Answer
    end: Step | None
    shared_seconds: float | None = None

    @property
    def seconds(self) -> float:
        stats = self.answer.stats
        if self.shared_seconds is not None:
            return self.shared_seconds
        return stats.total_seconds - stats.expert_load_seconds


def answer_together(pair: Pair, tasks: Iterable[Task], n_slots: int) -> Generator[Done, None, None]:
    """Answer the tasks, n_slots at a time, and yield each answer when it is whole.

    The texts are those of one answer at a time, but for near-ties. Closing the generator ends the
    answers that are being written. Raises what goes wrong in any of them.
    """
    running: dict[Future[Done], _Writer] = {}
    waiting = iter(tasks)
    with closing(Slots(pair, n_slots)) as slots, ThreadPoolExecutor(n_slots, "answer") as threads:
        since, loaded = perf_counter(), slots.load_seconds
        try:
            while True:
                for task in islice(waiting, n_slots - len(running)):
                    writer = _Writer(slots, task)
                    running[threads.submit(writer.write)] = writer
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    del running[future]
                    answer, now, load = future.result(), perf_counter(), slots.load_seconds
                    seconds = now - since - (load - loaded)
                    yield replace(answer, shared_seconds=seconds) if n_slots > 1 else answer
                    since, loaded = now, load
        finally:
            for writer in running.values():
                writer.cancel()


class _Writer:
    """Writes one answer on a thread of its own; any thread may end it."""

    def __init__(self, slots: Slots, task: Task) -> None:
        self._slots, self._task = slots, task
        self._stream: Stream | None = None
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    def write(self) -> Done:
        task, pair = self._task, self._slots.pair
        with self._slots.take(task.tokens) as timelines:
            options = task.options
            if timelines is not None:  # the fast schedule prices its bets for an answer alone
                options = options.with_changes(schedule="sequential")
            stream = pair.stream_tokens(task.tokens, options, timelines, task.switch)
            self._stream = stream
            if self._cancelled:  # before the stream was there to be ended
                stream.cancel()
            for _ in stream:
                pass
            return Done(task, stream.answer(), stream.end)
