"""Chat and plain completions, from the request to its response: one JSON body, or a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from colm_edge.decode.step import Drafted, Step, Undone
from colm_edge.serve.answers import Ended, Events, Job, Server
from colm_edge.serve.dialogue import Conversation, Dialogue, Prompt, dialogue_of
from colm_edge.serve.formats import Format, Json, colm_of, usage_of
from colm_edge.serve.requests import Sampling
from colm_edge.serve.streaming import DONE, EventStream, sse, while_connected


async def respond(
    server: Server, form: Format, body: Sampling, prompts: Sequence[Prompt], request: Request
) -> Response:
    """Answer each prompt `n` times, in the manner of OpenAI's API."""
    jobs = await asyncio.to_thread(jobs_of, server, body, prompts)
    head = {
        "id": form.prefix + secrets.token_hex(12),
        "created": int(time.time()),
        "model": server.name,
    }
    n_prompt = sum(len(job.tokens) for job in jobs[:: body.n])
    if body.stream:
        return EventStream(
            _chunks(server.stream(jobs, request.client), form, body, len(jobs), head, n_prompt)
        )
    ended = await while_connected(request, server.generate(jobs, request.client))
    if ended is None:
        return Response(status_code=499)
    colm = colm_of(ended)
    if body.colm.trace:
        colm["trace"] = [
            {"choice": i, **step.record()} for i, e in enumerate(ended) for step in e.answer.steps
        ]

    def whole() -> Response:
        choices = [form.choice(i, e) for i, e in enumerate(ended)]
        more = {"choices": choices, "usage": usage_of(n_prompt, ended), "colm": colm}
        return JSONResponse({**head, "object": form.kind, **more})

    # With log-probabilities of many tokens it takes seconds, for which nobody else is to wait.
    return await asyncio.to_thread(whole)


async def one_job(
    server: Server, body: Sampling, conversation: Callable[[], Conversation], request: Request
) -> tuple[Dialogue, Job]:
    """Return what a request for one answer becomes. Where the queue is full, the request is refused
    before its conversation is read.

    Raises RefusalError, and what `dialogue_of` and `jobs_of` raise.
    """
    server.check_queue(request.client)
    dialogue = await dialogue_of(server.pair, conversation)
    (job,) = await asyncio.to_thread(jobs_of, server, body, [dialogue.prompt])
    return dialogue, job


def jobs_of(server: Server, body: Sampling, prompts: Sequence[Prompt]) -> list[Job]:
    """Return one job for each choice: `n` of each prompt, one prompt after the other.

    Raises ColmError for options or a prompt that this pair cannot take.
    """
    jobs = list[Job]()
    limit = server.settings.max_tokens
    for prompt in prompts:
        for _ in range(body.n):
            options = body.options(server.pair.defaults, len(jobs), limit, prompt.grammar)
            server.pair.check_options(options)
            server.pair.check_prompt(prompt.tokens, server.pair.threshold(options))
            provisional = body.stream and body.colm.provisional
            jobs.append(Job(prompt.tokens, options, body.reads_from, provisional))
    return jobs


async def _chunks(
    stream: Events, form: Format, body: Sampling, n: int, head: Json, n_prompt: int
) -> AsyncGenerator[str, None]:
    """Yield a stream of OpenAI's API: a chunk for each token, the n choices interleaved."""
    wants_usage = body.stream_options is not None and body.stream_options.include_usage

    def chunk(choices: list[Json], **more: Any) -> str:
        usage = {"usage": None} if wants_usage else {}
        return sse({**head, "object": form.chunk_kind, "choices": choices, **usage, **more})

    ended: dict[int, Ended] = {}
    async with aclosing(stream) as events:
        async for i, event in events:
            more = {}
            if isinstance(event, Step) and body.colm.trace:
                more["colm"] = event.record()
            elif isinstance(event, Drafted):
                more["colm"] = {"draft": event.step.record()}
            elif isinstance(event, Undone):
                more["colm"] = {"undone": event.record()}
            elif isinstance(event, Ended):
                ended[i] = event
                if len(ended) == n:
                    more["colm"] = colm_of(list(ended.values()))
            delta = form.delta(i, event)
            if delta is not None:
                yield chunk([delta], **more)
    if wants_usage:  # OpenAI's clients expect a chunk without choices then, and only then
        yield chunk([], usage=usage_of(n_prompt, list(ended.values())))
    yield DONE
