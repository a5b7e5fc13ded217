"""OpenAI's Responses API: one text from a conversation, as a body or as its events.

Nothing is stored, so what refers to an earlier response is refused; tools are refused too.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, field_validator, model_validator

from colm_edge.decode.step import Step
from colm_edge.serve.answers import Ended, Job
from colm_edge.serve.completions import jobs_of
from colm_edge.serve.errors import REFUSALS
from colm_edge.serve.formats import colm_of, usage_of
from colm_edge.serve.guard import TheServer, check_key
from colm_edge.serve.requests import Body, Message, ResponseFormat, Sampling
from colm_edge.serve.streaming import EventStream, sse, while_connected

if TYPE_CHECKING:
    from colm_edge.pair import Pair

# What this server keeps nothing for, or cannot do, and what would change the answer.
STATEFUL = ("previous_response_id", "conversation", "prompt", "background", "tools")
router = APIRouter(dependencies=[Depends(check_key)], responses=REFUSALS)


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]

    def as_message(self) -> Message:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return Message(role=self.role, content=text)


class TextFormat(Body):
    """The form of the answer: as in chats, with the schema one level higher."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for a text."""
        given = {"type": self.type, "schema": self.schema_}
        return ResponseFormat.model_validate(given).wanted

    @model_validator(mode="after")
    def has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("schema is missing; expected an object")
        return self


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(Sampling):
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=0)
    text: TextOptions = TextOptions()
    n: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def is_stateless(cls, given: Any) -> Any:
        for name in STATEFUL if isinstance(given, dict) else ():
            if given.get(name):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return given

    @field_validator("input")
    @classmethod
    def is_not_empty(cls, given: str | list[InputMessage]) -> str | list[InputMessage]:
        if isinstance(given, str) and not given.strip():
            raise ValueError("expected a text, or a list of messages")
        return given

    def limit(self) -> int | None:
        return self.max_output_tokens

    def schema_wanted(self) -> dict[str, Any] | None:
        return self.text.format.wanted if self.text.format is not None else None

    def prompt_tokens(self, pair: Pair) -> list[list[int]]:
        """Return the token ids of the one prompt, the conversation."""
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            messages.append(Message(role="user", content=self.input))
        else:
            messages += [one.as_message() for one in self.input]
        conversation = [message.as_dict() for message in messages]
        return [pair.prompt_tokens(conversation, raw=pair.defaults.raw)]


@router.post(
    "/v1/responses",
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
)
async def responses(body: ResponsesRequest, server: TheServer, request: Request) -> Response:
    server.check_queue()
    (job,) = jobs_of(server, body)
    head = Head(server.name, body, len(job.tokens))
    if body.stream:
        return EventStream(_events(server, job, head))
    ended = await while_connected(request, server.generate([job]))
    if ended is None:
        return Response(status_code=499)
    return JSONResponse(head.whole(ended[0]))


class Head:
    """What all objects of one response share."""

    def __init__(self, model: str, body: ResponsesRequest, n_prompt: int) -> None:
        self._n_prompt, self.item_id = n_prompt, "msg_" + secrets.token_hex(12)
        self._fields: dict[str, Any] = {
            "id": "resp_" + secrets.token_hex(12),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": "none",
            "tools": [],
            "error": None,
            **body.model_dump(include={"temperature", "top_p"}),
        }

    def unfinished(self) -> dict[str, Any]:
        """Return the response before its answer is whole."""
        return {
            **self._fields,
            "status": "in_progress",
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }

    def whole(self, ended: Ended) -> dict[str, Any]:
        """Return the response with its answer."""
        cut = ended.answer.finish_reason == "length"
        usage = usage_of(self._n_prompt, [ended])
        return {
            **self._fields,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self.item(ended.answer.text, "incomplete" if cut else "completed")],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "colm": colm_of([ended]),
        }

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        """Return the message that is the answer; without content where there is no text yet."""
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [part_of(text)],
        }


def part_of(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _events(server: TheServer, job: Job, head: Head) -> AsyncGenerator[str, None]:
    """Yield the events of a response that is streamed, each with its number."""
    number = -1

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return f"event: {kind}\n" + sse({"type": kind, "sequence_number": number, **fields})

    item = {"output_index": 0, "item_id": head.item_id}
    part = {**item, "content_index": 0}
    yield event("response.created", response=head.unfinished())
    yield event("response.in_progress", response=head.unfinished())
    begun = head.item(None, "in_progress")
    yield event("response.output_item.added", output_index=0, item=begun)
    yield event("response.content_part.added", **part, part=part_of(""))
    async with aclosing(server.stream([job])) as events:
        async for _, one in events:
            if isinstance(one, Step) and one.text:
                yield event("response.output_text.delta", **part, delta=one.text, logprobs=[])
            elif isinstance(one, Ended):
                text, whole = one.answer.text, head.whole(one)
                yield event("response.output_text.done", **part, text=text, logprobs=[])
                yield event("response.content_part.done", **part, part=part_of(text))
                done = whole["output"][0]
                yield event("response.output_item.done", output_index=0, item=done)
                yield event(f"response.{whole['status']}", response=whole)
