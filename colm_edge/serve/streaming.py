"""Server-sent events, and clients that leave before their answer is complete."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from colm_edge.errors import ColmError
from colm_edge.serve.errors import INTERNAL, RefusalError, refusal_of

log = logging.getLogger("colm_edge")
T = TypeVar("T")
DONE = "data: [DONE]\n\n"
# In the API's document, of an endpoint that answers with a body or a stream.
BODY_OR_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}


def one_line(data: Any) -> str:
    """Return JSON without what a client that reads by lines may take for the end of one."""
    text = json.dumps(data, ensure_ascii=False)
    return text.replace("\x85", r"\u0085").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def sse(data: Any) -> str:
    """Return one server-sent event."""
    return f"data: {one_line(data)}\n\n"


def failed(e: RefusalError) -> str:
    """Return the end of a stream of OpenAI's that an error ends."""
    return sse(e.body) + DONE


class EventStream(StreamingResponse):
    """A response that comes in pieces; the generator is closed when the client leaves.

    What goes wrong after the first piece cannot change the status: `failed` makes it the last one.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[str, None],
        media_type: str = "text/event-stream",
        failed: Callable[[RefusalError], str] = failed,
    ) -> None:
        self._pieces = _with_errors(pieces, failed)
        super().__init__(
            self._pieces,
            media_type=media_type,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            await super().__call__(scope, receive, send)


async def _with_errors(
    pieces: AsyncGenerator[str, None], failed: Callable[[RefusalError], str]
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(pieces):
            async for text in pieces:
                yield text.encode(errors="replace")  # half a character, of a request's
    except RefusalError as e:
        yield failed(e).encode()
    except ColmError as e:
        yield failed(refusal_of(e)).encode()
    except Exception:  # the client is told, whatever it was
        log.exception("a stream failed")
        yield failed(INTERNAL).encode()


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
