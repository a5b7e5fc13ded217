"""An OpenAI-compatible server over a pair, and its web page.

Every answer runs on a thread of its own over a slot (`slots`); the event loop only hands its tokens
on. Binds to this machine unless told otherwise, reads no file a request names, and allows no other
site's pages to ask.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from colm_edge.errors import ColmError, ContextError, ModelError
from colm_edge.options import Options, ServerOptions
from colm_edge.serve.protocol import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    Endpoint,
    ErrorBody,
    RefusalError,
    Sampling,
    TokenizeRequest,
    Written,
    colm_of,
    explained,
    record_of,
    usage_of,
)

if TYPE_CHECKING:
    from colm_edge.pair import Pair
from colm_edge.serve.answers import Server
from colm_edge.serve.guard import Guard


def create_app(server: Server) -> FastAPI:
    """Return the ASGI application of a server."""
    settings = server.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        unloading = None
        if settings.expert_idle_unload > 0:
            unloading = asyncio.create_task(server.unload_when_idle())
        yield
        if unloading is not None:
            unloading.cancel()
        await asyncio.to_thread(server.close)

    def authorised(request: Request) -> None:
        if settings.api_key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        if not secrets.compare_digest(given, settings.api_key.encode()):
            raise RefusalError(
                401, "give the server's key: Authorization: Bearer KEY",
                "authentication_error", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    app = FastAPI(
        title="colm-edge", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Two models, one answer: an OpenAI-compatible server.",
    )  # fmt: skip
    app.add_middleware(Guard, server=server)
    if settings.cors:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )  # fmt: skip
    _add_errors(app)
    refused = {
        code: {"description": text, "model": ErrorBody}
        for code, text in (
            (400, "The request is wrong"), (401, "No key, or a wrong one"), (404, "No such model"),
            (413, "The body is too large"), (415, "The body is no JSON"),
            (503, "Too many requests are waiting"),
        )
    }  # fmt: skip
    known: dict[str, Any] = {"dependencies": [Depends(authorised)], "responses": refused}

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(
            (Path(__file__).parent.parent / "data" / "chat.html").read_text(encoding="utf-8"),
            headers={"Content-Security-Policy": PAGE_POLICY, "X-Frame-Options": "DENY"},
        )

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False, dependencies=[Depends(authorised)])
    def metrics() -> Response:
        return Response(
            generate_latest(server.metrics.registry), media_type="text/plain; version=0.0.4"
        )

    @app.get("/v1/models", **known)
    def models() -> dict[str, Any]:
        model = {
            "id": server.name, "object": "model", "created": server.created,
            "owned_by": "colm-edge", "max_model_len": server.pair.n_ctx,
            "meta": {"n_vocab": server.pair.n_shared},
        }  # fmt: skip
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model}", **known)
    def one_model(model: str) -> dict[str, Any]:
        if model != server.name:
            raise RefusalError(404, f"no model {model!r}; this server has {server.name!r}",
                          code="model_not_found", param="model")  # fmt: skip
        return dict(models()["data"][0])

    piece = server.pair.base.piece
    kinds: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    answered: dict[str, Any] = {**known, "responses": {200: {"content": kinds}, **refused}}

    @app.post("/v1/chat/completions", **answered)
    async def chat(body: ChatRequest, request: Request) -> Response:
        prompt = [message.as_dict() for message in body.messages]
        return await _respond(server, Endpoint(True, piece), body, [prompt], request)

    @app.post("/v1/completions", **answered)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        prompts = body.prompts()
        if not prompts:
            raise RefusalError(400, "the prompt is empty; give a text or token ids", param="prompt")
        if body.stream and body.prompt_logprobs is not None:
            raise RefusalError(
                400, "no stream tells prompt_logprobs; leave out one of the two, or use echo and "
                "logprobs", param="prompt_logprobs",
            )  # fmt: skip
        return await _respond(server, Endpoint(False, piece), body, prompts, request)

    @app.post("/tokenize", **known)
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        tokens = server.pair.base.tokenize(body.prompt, bos=body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.pair.n_ctx}

    return app


PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def _add_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(RefusalError)
    async def refused(request: Request, e: RefusalError) -> JSONResponse:
        return JSONResponse(e.body, e.status, e.headers)

    @app.exception_handler(ColmError)
    async def mendable(request: Request, e: ColmError) -> JSONResponse:
        status = 500 if isinstance(e, ModelError) else 400
        kind = "invalid_request_error" if status == 400 else "server_error"
        code = "context_length_exceeded" if isinstance(e, ContextError) else None
        return JSONResponse(RefusalError(status, str(e), kind, code).body, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> JSONResponse:
        told, where = explained(e.errors()[0], request.headers.get("content-type", ""))
        return JSONResponse(RefusalError(400, told, param=where).body, 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, e: HTTPException) -> JSONResponse:
        return JSONResponse(
            RefusalError(e.status_code, str(e.detail)).body, e.status_code, e.headers
        )


async def _respond(
    server: Server, endpoint: Endpoint, body: Sampling, prompts: list[Any], request: Request
) -> Response:
    """Answer every prompt `n` times, as one body or as events."""
    server.admit()
    limit, defaults = server.settings.max_tokens, server.defaults
    if not isinstance(body, ChatRequest) and body.limit() is None:
        limit = min(limit, 16)  # OpenAI's default for plain completions
    jobs: list[tuple[list[int], Options]] = []
    n_prompt = 0
    if len(prompts) * body.n > MAX_CHOICES:
        raise RefusalError(400, f"at most {MAX_CHOICES} answers to a request", param="n")
    for prompt in prompts:
        tokens: list[int] = []
        for _ in range(body.n):
            options = body.options(defaults, len(jobs), limit)
            tokens = tokens or server.tokens_of(prompt, options)
            jobs.append((tokens, options))
        n_prompt += len(tokens)
    about = {
        "id": endpoint.prefix + secrets.token_hex(12), "created": int(time.time()),
        "model": server.name,
    }  # fmt: skip
    echoes = [""] * len(jobs)
    if isinstance(body, CompletionRequest) and body.echo:
        echoes = [server.text_of(tokens) for tokens, _ in jobs]
    answers = [server.write(tokens, options, body.tells_prompt) for tokens, options in jobs]
    if body.stream:
        events = _events(endpoint, about, answers, body, n_prompt, echoes)
        return StreamingResponse(
            _guarded(events, answers), media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )  # fmt: skip
    writing: asyncio.Future[Any] = asyncio.gather(*map(_exhaust, answers))
    leaving: asyncio.Future[Any] = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():  # nobody is there to read it
            return Response(status_code=499)
        choices = writing.result()
    finally:
        for task in (writing, leaving):
            task.cancel()
        await asyncio.gather(writing, leaving, return_exceptions=True)
    return JSONResponse({
        **about,
        "object": endpoint.kind,
        "choices": [
            endpoint.choice(i, written, body, echoes[i]) for i, written in enumerate(choices)
        ],
        "usage": usage_of(n_prompt, choices),
        "colm": colm_of(choices, body.colm.trace),
    })  # fmt: skip


async def _exhaust(answer: AsyncIterator[Written]) -> Written:
    last: Written | None = None
    async for written in answer:
        last = written
    assert last is not None
    return last


async def _left(request: Request) -> None:
    """Return once the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _guarded(events: AsyncIterator[str], answers: list[Any]) -> AsyncIterator[str]:
    """Close what is under way when the reader leaves; an error becomes the last event."""
    try:
        async for event in events:
            yield event
    except (ColmError, RefusalError) as e:
        yield _event(RefusalError(500, str(e), "server_error").body)
    finally:
        for answer in answers:
            await answer.aclose()


def _event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _events(
    endpoint: Endpoint, about: dict[str, Any], answers: list[AsyncIterator[Written]],
    body: Sampling, n_prompt: int, echoes: list[str],
) -> AsyncIterator[str]:  # fmt: skip
    """Yield server-sent events: an answer's tokens as they come, several answers interleaved."""
    kind = endpoint.kind + (".chunk" if endpoint.chat else "")
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(i: int, answer: AsyncIterator[Written]) -> None:
        sent = -1  # the beginning is something to send too
        try:
            async for written in answer:
                if sent < 0:
                    queue.put_nowait((i, written))
                    sent = 0
                for step in written.steps[sent:]:
                    queue.put_nowait((i, step))
                sent = len(written.steps)
            queue.put_nowait((i, written))
        except BaseException as e:
            queue.put_nowait((i, e))
            raise

    def chunk(choices: list[Any], **more: Any) -> str:
        usage = {"usage": None} if wants_usage else {}
        return _event({**about, "object": kind, "choices": choices, **usage, **more})

    pumps = [asyncio.create_task(pump(i, answer)) for i, answer in enumerate(answers)]
    try:
        done: dict[int, Written] = {}
        begun = set[int]()
        offsets = [len(echo) for echo in echoes]
        while len(done) < len(answers):
            i, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if not isinstance(item, Written):
                told = endpoint.logprobs([item], body, offsets[i])
                offsets[i] += len(item.text)
                more = {"colm": record_of(item)} if body.colm.trace else {}
                yield chunk([endpoint.delta(i, item.text, None, False, told)], **more)
            elif i in begun:
                done[i] = item
                end = item.stream.end
                told = (
                    None
                    if end is None or endpoint.chat
                    else endpoint.logprobs([], body, offsets[i], end)
                )
                more = {}
                if len(done) == len(answers):
                    choices = [done[i] for i in range(len(answers))]
                    more["colm"] = colm_of(choices, False)
                yield chunk([endpoint.delta(i, None, item.finish, False, told)], **more)
            else:
                begun.add(i)
                if endpoint.chat or echoes[i]:
                    told = endpoint.echo_logprobs(item, body)
                    yield chunk([endpoint.delta(i, echoes[i], None, True, told)])
        if wants_usage:  # OpenAI's clients expect a chunk without choices then, and only then
            yield chunk([], usage=usage_of(n_prompt, choices))
        yield "data: [DONE]\n\n"
    finally:
        for task in pumps:
            task.cancel()
        # Until they are done, their answers cannot be closed.
        await asyncio.gather(*pumps, return_exceptions=True)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound there. Raises ColmError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of one whose protocol is told does asyncio send small answers at once (TCP_NODELAY);
    # others wait 40 ms for an acknowledgement on every kept connection.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as e:
        listening.close()
        raise ColmError(
            f"cannot listen on {host}:{port}: {e.strerror or e}; give another --host or --port"
        ) from e
    return listening


def serve(pair: Pair, settings: ServerOptions, name: str, note: Callable[[str], None]) -> None:
    """Answer requests until interrupted; streams under way then end first.

    Raises ColmError when the address cannot be had.
    """
    import uvicorn

    listening = listen(settings.host, settings.port)
    server = Server(pair, settings, name)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    note(f"listening on http://{host}:{listening.getsockname()[1]}")
    config = uvicorn.Config(
        create_app(server), log_level="warning", timeout_graceful_shutdown=30,
        lifespan="on", access_log=False,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])
