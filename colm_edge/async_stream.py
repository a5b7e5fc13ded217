"""A stream for asyncio: written on a thread of its own, read by the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from colm_edge.decode import Step

if TYPE_CHECKING:
    from colm_edge.pair import Answer, Stream

Put = Callable[[Step | BaseException | None], Any]


class AsyncStream:
    """An answer as it is written, for `async for` in one event loop; `answer()` at any time.

    The thread begins at the first step that is asked for, and may be ahead of a slow reader.
    Leaving the loop or cancelling the task that reads cancels the answer as `Stream.cancel` does;
    `async with` does so for certain, also where something else still refers to this object.
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
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody is there to read
                loop.call_soon_threadsafe(put, item)

        # The thread knows the stream and not this object, which so goes when its reader does.
        writing = threading.Thread(
            target=_write, args=(self._stream, hand_over), name="colm-edge-answer", daemon=True
        )
        writing.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def aclose(self) -> None:
        """End the answer here, as leaving `async with` does."""
        self.cancel()

    def cancel(self) -> None:
        """End the answer; any thread may ask for it. Steps that were not read yet are lost."""
        self._done = True
        self._stream.cancel()

    def answer(self) -> Answer:
        """Return what was read so far (the whole answer, once the stream is exhausted)."""
        return self._stream.answer(self._read)

    def __del__(self) -> None:
        self._stream.cancel()


def _write(stream: Stream, put: Put) -> None:
    try:
        for step in stream:
            put(step)
        put(None)
    except BaseException as e:  # raised where the answer is read
        put(e)
