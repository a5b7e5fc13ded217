"""A server for a pair with OpenAI's, Anthropic's and Ollama's API, and its web page.

It listens on this machine only unless told otherwise, opens no file that a request names, and lets
no other site's pages ask.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from colm_edge.errors import ColmError
from colm_edge.options import ServerOptions
from colm_edge.serve import messages, ollama, page, responses, routes
from colm_edge.serve.answers import Server
from colm_edge.serve.errors import HANDLERS
from colm_edge.serve.guard import Guard

if TYPE_CHECKING:
    import uvicorn

    from colm_edge.pair import Pair

ROUTERS = (page.router, routes.router, responses.router, messages.router, ollama.router)
LAST_WORDS = 1.0  # seconds in which clients may be told that their answers end
SHUTDOWN = 30  # seconds in which streams may end when the server is told to stop


def create_app(server: Server) -> FastAPI:
    """Return the ASGI application of a server; its shutdown closes the server."""
    app = FastAPI(
        title="colm-edge",
        version="1",
        description="Two models, one answer: an OpenAI-compatible server.",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        exception_handlers=HANDLERS,
    )
    app.state.server = server
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Guard, server=server)
    if server.settings.cors:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients in a browser send many of their own
        )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    server: Server = app.state.server
    idling = []
    if server.settings.expert_idle_unload > 0:
        idling.append(asyncio.create_task(server.unload_when_idle()))
    if server.settings.n_slots == 1:  # several pad their batches by a first table
        idling.append(asyncio.create_task(server.measure_when_idle()))
    yield
    for task in idling:
        task.cancel()
    await asyncio.to_thread(server.close)


def config_of(server: Server) -> uvicorn.Config:
    """Return how uvicorn runs a server."""
    import uvicorn

    return uvicorn.Config(
        create_app(server),
        log_level="critical",  # it would report the tasks that it cancels
        timeout_graceful_shutdown=SHUTDOWN + 5,
        lifespan="on",
        access_log=False,
        proxy_headers=False,  # a proxy's clients would all be one, with one place in the queue
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raises ColmError when it is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on connections of a socket whose protocol is given. Without it a
    # small answer on a kept connection waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # from here on a client may connect
    except (OSError, TypeError, UnicodeError) as e:  # the last two of what cannot be a name
        listening.close()
        reason = getattr(e, "strerror", None) or e
        raise ColmError(
            f"cannot listen on {host}:{port}: {reason}; give another --host or --port"
        ) from e
    return listening


def serve(pair: Pair, settings: ServerOptions, name: str, note: Callable[[str], None]) -> None:
    """Answer requests until interrupted; streams under way then end first.

    note: called with the address, once the server listens there.

    Raises ColmError when the address is not available.
    """
    import uvicorn

    listening = listen(settings.host, settings.port)
    server = Server(pair, settings, name)

    class Uvicorn(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """End what is under way: in time, or at once at a second signal."""
            server.stop(SHUTDOWN)
            await super().shutdown(sockets)
            server.end_answers()
            await server.all_told(LAST_WORDS)

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    note(f"listening on http://{host}:{listening.getsockname()[1]}")
    try:
        Uvicorn(config_of(server)).run(sockets=[listening])
    finally:
        server.close()  # a second signal has left it open
