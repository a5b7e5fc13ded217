"""Server-sent events, and clients that leave before their answer is complete."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from colm_edge.errors import ColmError
from colm_edge.serve.errors import RefusalError

T = TypeVar("T")


def sse(data: Any) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; the generator is closed when the client leaves.

    What goes wrong after the first event cannot change the status: it becomes the last event.
    """

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        self._events = _with_errors(events)
        super().__init__(
            self._events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _with_errors(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        async with aclosing(events):
            async for text in events:
                yield text
    except (ColmError, RefusalError) as e:
        yield sse(RefusalError(500, str(e), "server_error").body)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns; cancel it and return None if the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
