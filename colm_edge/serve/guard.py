"""What is checked before a request is answered: its host, the size of its body, and the key."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from colm_edge.serve.answers import Server
from colm_edge.serve.errors import RefusalError

MAX_BODY = 4 << 20  # bytes of a request
LOCAL = ("127.0.0.1", "localhost", "::1")


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


TheServer = Annotated[Server, Depends(server_of)]


def check_key(request: Request, server: TheServer) -> None:
    """Raise RefusalError unless the request carries the server's key, if it has one."""
    key = server.settings.api_key
    if key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    sent = given.strip().encode() if kind.lower() == "bearer" else b""
    if not secrets.compare_digest(sent, key.encode()):
        raise RefusalError(
            401,
            "the API key is missing or wrong; send Authorization: Bearer KEY",
            "authentication_error",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Guard:
    """Middleware that counts requests, and refuses foreign hosts and bodies that are too large."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._metrics = app, server.metrics
        # Any site can point its own name at 127.0.0.1, and its pages could then read what this
        # server answers. So a local server answers only to local names, and those it is given.
        allowed = [name.lower() for name in server.settings.allowed_hosts]
        names = {f"[{name}]" if ":" in name else name for name in (*LOCAL, *allowed)}
        self._hosts = names if allowed or server.settings.host in LOCAL else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route's own path: one label for each endpoint, whatever clients make up.
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            await refusal.response()(scope, receive, counted)
        else:
            await _bounded(self._app, scope, receive, counted)

    def _refusal(self, headers: Headers) -> RefusalError | None:
        """Return why a request with these headers is not answered, or None."""
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._hosts is not None and name.lower() not in self._hosts:
            return RefusalError(
                400,
                f"this server does not answer to the host {name[:100]!r}; use localhost, or start "
                "it with --allowed-host",
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return _too_large(length)
        return None


async def _bounded(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run an application on a body that comes in pieces, its length unknown: beyond MAX_BODY bytes
    the application sees the client leave, and the client receives a 413."""
    n_read, refused = 0, False

    async def refuse() -> None:
        nonlocal refused
        if not refused:
            refused = True
            await _too_large(f"more than {MAX_BODY}").response()(scope, receive, send)

    async def bounded_receive() -> Message:
        nonlocal n_read
        message = await receive()
        n_read += len(message.get("body", b""))
        return {"type": "http.disconnect"} if n_read > MAX_BODY else message

    async def bounded_send(message: Message) -> None:
        await (refuse() if n_read > MAX_BODY else send(message))

    await app(scope, bounded_receive, bounded_send)
    if n_read > MAX_BODY:
        await refuse()


def _too_large(length: str) -> RefusalError:
    return RefusalError(413, f"the body has {length} bytes; at most {MAX_BODY} are allowed")
