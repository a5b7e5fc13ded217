"""What is checked before a request is answered: its host, the size of its body, the key, and that
the body is JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import socket
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from colm_edge.serve.answers import Server
from colm_edge.serve.errors import INTERNAL, RefusalError

log = logging.getLogger("colm_edge")

MAX_BODY = 4 << 20  # bytes of a request
LOCAL = ("127.0.0.1", "localhost", "::1")
PUBLIC = ("/", "/health")  # paths that need no key, as those of the page's files
PAGE = "/page/"


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


TheServer = Annotated[Server, Depends(server_of)]


class JSONRequest(Request):
    """Reads its body as JSON alone: Python takes NaN and infinite numbers too, which no answer can
    repeat."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                text = (await self.body()).decode()
            except UnicodeDecodeError as e:
                raise json.JSONDecodeError("it is not UTF-8", "", e.start) from e
            self._json = json.loads(text, parse_constant=_finite, parse_float=_finite)
        return self._json


class JSONRoute(APIRoute):
    """A route whose requests are `JSONRequest`s."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            scope, of_type = request.scope, request.headers.get("content-type", "")
            # Ollama takes any type, and curl sends a form's. A browser tells the page's origin.
            if scope["path"].startswith("/api/") and "origin" not in request.headers:
                others = [(key, x) for key, x in scope["headers"] if key != b"content-type"]
                scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
            elif scope["method"] == "POST" and "json" not in of_type.lower():
                # A page of another site may send anything but this type without asking first.
                raise RefusalError(
                    400, "the body was not read as JSON; send Content-Type: application/json"
                )
            return await handle(JSONRequest(scope, request.receive))

        return read


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise json.JSONDecodeError(f"{text[:20]} is not a JSON number", text, 0)
    return number


class Guard:
    """Middleware that counts requests, until they are answered, and refuses foreign hosts, missing
    keys and bodies that are too large, before a body is read."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._metrics, self._leave = app, server.metrics, server.leave
        self._key, self._stopping = server.settings.api_key, server.stopping
        # Any site can point its own name at 127.0.0.1, and its pages could then read what this
        # server answers. So a local server answers only to local names, and those it is given.
        host, allowed = server.settings.host, server.settings.allowed_hosts
        names = [name.lower() for name in (*LOCAL, host, *allowed)]
        known = {f"[{name}]" if ":" in name else name for name in names}
        self._hosts = known if allowed or _is_local(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        has_begun = False

        async def counted(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                # The route's own path: one label for each endpoint, whatever clients make up.
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        path, headers = scope["path"], Headers(scope=scope)
        refusal = self._of_host(headers) or self._of_key(path, headers) or _of_length(headers)
        if refusal is not None:
            await refusal.response(path)(scope, receive, counted)
            return
        try:
            await self._bounded(scope, receive, counted)
        except Exception:  # here, so that it is counted too, and other sites' pages can read it
            log.exception("a request failed: %s", path)
            if has_begun:
                raise
            await INTERNAL.response(path)(scope, receive, counted)
        finally:
            client = scope.get("client")
            self._leave(client and tuple(client))

    def _of_host(self, headers: Headers) -> RefusalError | None:
        """Return why a request to this host is not answered, or None."""
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._hosts is None or name.lower() in self._hosts:
            return None
        return RefusalError(
            400,
            f"this server does not answer to the host {name[:100]!r}; use localhost, or start "
            "it with --allowed-host",
        )

    def _of_key(self, path: str, headers: Headers) -> RefusalError | None:
        """Return why a request with this key is not answered, or None."""
        if self._key is None or path in PUBLIC or path.startswith(PAGE):
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        sent = given.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if secrets.compare_digest(sent.encode(), self._key.encode()):
            return None
        return RefusalError(
            401,
            "the API key is missing or wrong; send Authorization: Bearer KEY, or x-api-key: KEY",
            "authentication_error",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on a body that comes in pieces, its length unknown. Beyond MAX_BODY
        bytes, or where the server is stopped before the body is whole, the application sees the
        client leave, and the client is told why."""
        n_read, whole, refusal, is_sent = 0, False, None, False

        async def bounded_receive() -> Message:
            nonlocal n_read, whole, refusal
            message = await (receive() if whole else self._received(receive))
            whole = not message.get("more_body", False)
            n_read += len(message.get("body", b""))
            if n_read > MAX_BODY:
                refusal = _too_large(f"more than {MAX_BODY}")
            elif message["type"] == "stopping":
                refusal = RefusalError(503, "the server is being stopped", "server_error")
            return message if refusal is None else {"type": "http.disconnect"}

        async def tell() -> None:
            nonlocal is_sent
            if refusal is not None and not is_sent:
                is_sent = True
                await refusal.response(scope["path"])(scope, receive, send)

        async def bounded_send(message: Message) -> None:
            await (tell() if refusal is not None else send(message))

        await self._app(scope, bounded_receive, bounded_send)
        await tell()

    async def _received(self, receive: Receive) -> Message:
        """Return the next piece of a body, or a message of type "stopping"."""
        receiving = asyncio.ensure_future(receive())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({receiving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "stopping"}
        finally:
            receiving.cancel()
            stopping.cancel()


def _is_local(host: str) -> bool:
    """Return whether a name or an address, however it is written, is this machine's own."""
    try:
        found = {address[0] for *_, address in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _of_length(headers: Headers) -> RefusalError | None:
    """Return why a body of this length is not read, or None."""
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY:
        return _too_large(length)
    return None


def _too_large(length: str) -> RefusalError:
    return RefusalError(413, f"the body has {length} bytes; at most {MAX_BODY} are allowed")
