"""An answer as it is written: its steps and text, cut at stop strings, for threads and asyncio."""

from __future__ import annotations

import asyncio
import codecs
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from colm_edge.cancel import Cancel
from colm_edge.decode.loop import Decoder
from colm_edge.decode.step import Drafted, Event, Stats, Step, Undone
from colm_edge.errors import ColmError
from colm_edge.llama.model import Model


@dataclass
class Answer:
    """An answer: its text, one record per token, why it ended, and its statistics."""

    text: str
    steps: list[Step] = field(repr=False)
    finish_reason: Literal["stop", "length"]
    stats: Stats
    prompt_tokens: list[int] = field(repr=False)
    threshold: float
    undone: list[Undone] = field(default_factory=list, repr=False)  # by review or doubt
    stopped_by: str | None = None  # the stop string that it ended at


class Stream:
    """An answer as it is written: an iterator of steps, with `answer()` at any time.

    A step that ends inside a character, or whose text may begin a stop string, is held back until
    later tokens decide. You can stop iterating at any time; the pair can answer again at once.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: Model,
        stop: Sequence[str],
        cancel: Cancel,
        unreadable: str = "",
    ) -> None:
        """cancel: the decoder's own. unreadable: why the prompt cannot be read back."""
        self._decoder, self._model, self._stop = decoder, model, stop
        self._cancel = cancel
        self._unreadable = unreadable
        self.prompt_tokens = list(decoder.tokens)
        self.steps: list[Step] = []  # already handed out
        self._finish: Literal["stop", "length"] | None = None
        self._stopped_by: str | None = None
        self._begun = False
        self._iterator = self._run()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(event for event in self._iterator if isinstance(event, Step))

    def events(self) -> Iterator[Event]:
        """Iterate over the steps and, where tokens can be taken back, what happens before: each
        draft, and each time that the last ones are undone. A step is final; if there are drafts, it
        is the first of them. What is left of them at the end is not in the answer."""
        return self._iterator

    def close(self) -> None:
        """End the answer and keep what was written so far. Only for the thread that reads it."""
        self._iterator.close()

    def cancel(self) -> None:
        """End the answer from any thread: the reader gets at most one more step, and no error.

        This interrupts the load of the expert's weights, unless other answers share it, but not a
        running evaluation of a token or of one batch of a prompt.
        """
        self._cancel.request()

    @property
    def end(self) -> Step | None:
        """The end token, if the answer ended with one; it is not one of the steps."""
        return self._decoder.ended_by if self._finish is None else None

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts, as steps name them in `source`."""
        return self._decoder.sources

    @property
    def threshold(self) -> float:
        """The threshold of the last token; it moves where a defer rate is followed."""
        return self._decoder.policy.threshold

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the answer ended; also "stop" when the reader ended it."""
        return self._finish or self._decoder.finish_reason or "stop"

    def read_prompt(self, first: int = 1) -> list[Step]:
        """Return a step for each token of the prompt from number `first` on, as if it had been
        written: which model would have written it, and how likely it was. Call it before the first
        step. first: at least 1.

        Raises ColmError if the expert is on a server, which gives only the last token's state, and
        where it is called otherwise.
        """
        if self._unreadable:
            raise ColmError(self._unreadable)
        if first < 1 or self._begun:
            raise ColmError("read_prompt begins at token 1 at the earliest, before the first step")
        steps = self._decoder.read_prompt(first)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self.prompt_tokens[:first]:
            utf8.decode(self._model.piece(token))
        for step in steps:
            step.text = utf8.decode(self._model.piece(step.token), final=step is steps[-1])
        return steps

    def answer(self, n_steps: int | None = None) -> Answer:
        """Return what was written so far, or its first n_steps. Once the stream is exhausted, that
        is the whole answer."""
        is_whole = n_steps is None or n_steps >= len(self.steps)
        steps = self.steps[:n_steps]
        written = Counter(step.source for step in steps)
        deferred = len(steps) - written["base"]
        stats = replace(self._decoder.stats, n_generated=len(steps), n_deferred=deferred)
        stats.experts = {
            source: replace(expert, n_deferred=written[source])
            for source, expert in stats.experts.items()
        }
        stats.finish()
        text = "".join(step.text for step in steps)
        undone = [one for one in self._decoder.undone if one.at <= len(steps)]
        stats.n_undone = sum(len(one.steps) for one in undone)
        return Answer(
            text,
            steps,
            self.finish_reason if is_whole else "stop",
            stats,
            self.prompt_tokens,
            self.threshold,
            undone,
            self._stopped_by if is_whole else None,
        )

    def _hand_out(self, step: Step) -> Step:
        self.steps.append(step)
        return step

    def _run(self) -> Generator[Event, None, None]:
        self._begun = True
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        drafts = DraftTexts()
        held: list[Step] = []  # a later token may complete or cut their text
        n_shown = 0  # of these, that the reader has as drafts: the first ones
        for event in self._decoder.events():
            if isinstance(event, Drafted):
                if not self._cancel.requested:
                    yield from map(Drafted, held[n_shown:])  # they come before it
                n_shown = len(held)
                drafts.add(event.step, self._model.piece(event.step.token))
            elif isinstance(event, Undone):
                drafts.drop(len(event.steps))
            if not isinstance(event, Step):
                if not self._cancel.requested:
                    yield event
                continue
            event.text = utf8.decode(self._model.piece(event.token))
            n_shown += drafts.passed(utf8.getstate())
            held.append(event)
            if self._cut_at_stop(held):
                self._finish = "stop"
                break
            if utf8.getstate()[0]:
                continue  # inside a character
            while held and not self._cancel.requested and not self._may_begin_stop(held):
                yield self._hand_out(held.pop(0))
                n_shown = max(0, n_shown - 1)
        if self._cancel.requested:
            self._finish = "stop"
            return
        if held and self._finish is None:
            held[-1].text += utf8.decode(b"", final=True)  # the answer may end inside a character
        for step in held:
            if self._cancel.requested:
                self._finish = "stop"
                return
            yield self._hand_out(step)

    def _cut_at_stop(self, held: list[Step]) -> bool:
        """Cut the held steps at the first stop string in them; return whether there was one."""
        text = "".join(step.text for step in held)
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return False
        left, self._stopped_by = min(found)
        for i, step in enumerate(held):
            if left <= 0:
                del held[i:]
                break
            step.text = step.text[:left]
            left -= len(step.text)
        return True

    def _may_begin_stop(self, held: list[Step]) -> bool:
        """Return whether a stop string may begin inside the first held step's text."""
        text = "".join(step.text for step in held)
        return any(
            stop.startswith(text[at : at + len(stop)])
            for at in range(len(held[0].text))
            for stop in self._stop
        )


class DraftTexts:
    """Gives drafts their texts: whole characters, as far as the bytes go that precede them."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._states: list[tuple[bytes, int]] = []  # before each draft

    def add(self, step: Step, piece: bytes) -> None:
        self._states.append(self._utf8.getstate())
        step.text = self._utf8.decode(piece)

    def drop(self, n: int) -> None:
        """Forget the last n drafts."""
        for _ in range(n):
            self._utf8.setstate(self._states.pop())

    def passed(self, state: tuple[bytes, int]) -> bool:
        """Count a step as written, after which the decoder of final texts is in this state; return
        whether it was a draft."""
        was_draft = bool(self._states)
        del self._states[:1]
        if not self._states:
            self._utf8.setstate(state)
        return was_draft


Put = Callable[[Step | BaseException | None], Any]


class AsyncStream:
    """An answer as it is written, for `async for` in one event loop, with `answer()` at any time.

    A thread writes the answer. It starts at the first step that is read, and may be ahead of the
    reader. Leaving the loop, or cancelling the task that reads, cancels the answer as
    `Stream.cancel` does. Use `async with` if something else still refers to this object: it always
    cancels at its end.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._queue: asyncio.Queue[Step | BaseException | None] | None = None
        self._read = 0  # steps
        self._done = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Step:
        if self._done:
            raise StopAsyncIteration
        if self._queue is None:
            self._queue = asyncio.Queue()
            self._start(self._queue.put_nowait)
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(item, Step):
            self._read += 1
            return item
        self._done = True
        if item is not None:
            raise item
        raise StopAsyncIteration

    def _start(self, put: Put) -> None:
        loop = asyncio.get_running_loop()

        def hand_over(item: Step | BaseException | None) -> None:
            with suppress(RuntimeError):  # the event loop was closed: nothing reads any more
                loop.call_soon_threadsafe(put, item)

        # The thread does not refer to this object, so it is freed, and cancels, with its reader.
        writing = threading.Thread(
            target=_write, args=(self._stream, hand_over), name="colm-edge-answer", daemon=True
        )
        writing.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def aclose(self) -> None:
        """End the answer, as leaving `async with` does."""
        self.cancel()

    def cancel(self) -> None:
        """End the answer, from any thread. Steps that were not read yet are lost."""
        self._done = True
        self._stream.cancel()

    def answer(self) -> Answer:
        """Return what was read so far; once the stream is exhausted, the whole answer."""
        return self._stream.answer(self._read)

    def __del__(self) -> None:
        self._stream.cancel()


def _write(stream: Stream, put: Put) -> None:
    try:
        for step in stream:
            put(step)
        put(None)
    except BaseException as e:  # raised by AsyncStream.__anext__
        put(e)
