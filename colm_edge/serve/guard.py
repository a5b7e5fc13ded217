"""What is checked before a request is read: its host and the size of its body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from colm_edge.serve.protocol import (
    RefusalError,
)

if TYPE_CHECKING:
    pass
from colm_edge.serve.answers import Server

MAX_BODY = 4 << 20  # bytes of a request


class Guard:
    """Count requests, and refuse bodies that are too large and hosts that are another's name."""

    def __init__(self, app: Any, server: Server) -> None:
        self._app, self._server = app, server
        local = server.settings.host in ("127.0.0.1", "localhost", "::1")
        # A page elsewhere could make its own name point here; a local server has but these.
        self._hosts = {"127.0.0.1", "localhost", "[::1]", "testserver"} if local else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path, metrics = scope["path"], self._server.metrics
        known = path if path in KNOWN_PATHS else "other"

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                metrics.requests.labels(known, message["status"]).inc()
            await send(message)

        async def refuse(e: RefusalError) -> None:
            await JSONResponse(e.body, e.status, e.headers)(scope, receive, counting)

        host = headers.get(b"host", b"").decode("latin-1")
        name = host[: host.index("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._hosts is not None and name not in self._hosts:
            await refuse(
                RefusalError(400, f"this server is not {name!r}; ask 127.0.0.1 or localhost")
            )
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            await refuse(
                RefusalError(413, f"the body has {length.decode()} bytes, at most {MAX_BODY}")
            )
            return
        read, answered = 0, False

        async def bounded() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:  # it comes in pieces, its length untold
                return {"type": "http.disconnect"}
            return message

        async def answering(message: Any) -> None:
            nonlocal answered
            if read <= MAX_BODY:
                await counting(message)
            elif not answered:
                answered = True
                await refuse(RefusalError(413, f"the body has more than {MAX_BODY} bytes"))

        await self._app(scope, bounded, answering)
        if read > MAX_BODY and not answered:
            await refuse(RefusalError(413, f"the body has more than {MAX_BODY} bytes"))


KNOWN_PATHS = (
    "/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions",
    "/tokenize",
)  # fmt: skip
