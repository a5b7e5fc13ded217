"""Many prompts answered at once, for data files: the batches of `Slots`, one thread each answer."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING

from colm_edge.slots import Slots, Writer

if TYPE_CHECKING:
    from colm_edge.decode.step import Step
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.stream import Answer
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

    seconds: that it took, without reading the expert's weights; of several answers at once, its
    share of the time that they were written in.
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

    The texts are those of one answer at a time, except at near-ties. Closing the generator ends the
    answers that are being written. Raises what goes wrong in any of them.
    """
    running: dict[Future[Done], Writer] = {}
    shares: dict[Future[Done], float] = {}
    waiting = iter(tasks)
    with closing(Slots(pair, n_slots)) as slots, ThreadPoolExecutor(n_slots, "answer") as threads:
        since, loaded = perf_counter(), slots.load_seconds
        try:
            while True:
                for task in islice(waiting, n_slots - len(running)):
                    writer = Writer(slots, task.tokens, task.options, task.switch)
                    future = threads.submit(_write, task, writer)
                    running[future], shares[future] = writer, 0.0
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                now, load = perf_counter(), slots.load_seconds
                for future in running:
                    shares[future] += (now - since - (load - loaded)) / len(running)
                since, loaded = now, load
                for future in done:
                    del running[future]
                    answer, share = future.result(), shares.pop(future)
                    yield replace(answer, shared_seconds=share) if n_slots > 1 else answer
        finally:
            for writer in running.values():
                writer.cancel()


def _write(task: Task, writer: Writer) -> Done:
    with writer.stream() as stream:
        for _ in stream:
            pass
        return Done(task, stream.answer(), stream.end)
