"""OpenAI's Responses API: items from a conversation, as a body or as their events.

Nothing is stored, so what refers to an earlier response is refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, field_validator, model_validator

from colm_edge.serve.answers import Ended, Event, Events
from colm_edge.serve.chat import Function, Message, ResponseFormat, ToolCall
from colm_edge.serve.completions import one_job
from colm_edge.serve.dialogue import Conversation, Dialogue, thinking_of
from colm_edge.serve.errors import REFUSALS, RefusalError
from colm_edge.serve.formats import colm_of, usage_of
from colm_edge.serve.guard import JSONRoute, TheServer
from colm_edge.serve.parts import CallArguments, CallBegan, Part, Text, Thought
from colm_edge.serve.requests import Body, Objects, Sampling, TextPart, joined, not_supported
from colm_edge.serve.streaming import BODY_OR_STREAM, EventStream, sse, while_connected
from colm_edge.serve.tools import use_of

# What this server keeps nothing for, or cannot do, and what would change the answer.
STATEFUL = ("previous_response_id", "conversation", "prompt", "background")
router = APIRouter(route_class=JSONRoute, responses=REFUSALS)
Json = dict[str, Any]


class InputText(TextPart):
    type: Literal["input_text", "output_text", "text"]


Texts = str | Objects[InputText]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Texts


class ReasoningText(Body):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class InputReasoning(Body):
    """What was thought before an earlier answer."""

    type: Literal["reasoning"]
    content: Objects[ReasoningText] = Field(default_factory=list)


class Reasoning(Body):
    effort: str | None = None


Item = InputMessage | InputCall | InputResult | InputReasoning


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


class FunctionTool(Function):
    type: Literal["function"]


class NamedTool(Body):
    type: Literal["function"]
    name: str


class ResponsesRequest(Sampling):
    elsewhere: ClassVar = {
        **dict.fromkeys(("max_tokens", "json_schema", "response_format"), ()),
        **dict.fromkeys(("top_logprobs", "trace", "provisional"), (0,)),
    }

    input: str | Annotated[Objects[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=0)
    text: TextOptions = TextOptions()
    tools: Objects[FunctionTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Reasoning()
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    n: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def is_stateless(cls, given: Any) -> Any:
        for name in STATEFUL if isinstance(given, dict) else ():
            if given.get(name):
                raise not_supported(name)
        return given

    @field_validator("input")
    @classmethod
    def is_not_empty(cls, given: str | list[Item]) -> str | list[Item]:
        if isinstance(given, str) and not given.strip():
            raise ValueError("expected a text, or a list of items")
        return given

    def limit(self) -> int | None:
        return self.max_output_tokens

    def conversation(self) -> Conversation:
        """Return the conversation. Raises ColmError for tools that cannot be."""
        choice = self.tool_choice
        return Conversation(
            [message.as_dict() for message in self._messages()],
            use_of(
                [tool.as_tool() for tool in self.tools],
                choice if isinstance(choice, str) else "required",
                only=None if isinstance(choice, str) else choice.name,
                parallel=self.parallel_tool_calls,
            ),
            self.text.format.wanted if self.text.format is not None else None,
            {**thinking_of(self.reasoning.effort), **self.chat_template_kwargs},
        )

    def _messages(self) -> list[Message]:
        found = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*found, Message(role="user", content=self.input)]
        thought: str | None = None
        for item in self.input:
            match item:
                case InputReasoning():
                    thought = "".join(part.text for part in item.content) or None
                case InputMessage():
                    found.append(Message(role=item.role, content=joined(item.content)))
                    if item.role == "assistant":
                        found[-1].reasoning_content, thought = thought, None
                case InputCall():  # of the assistant's message before it, if that is one
                    if thought or not found or found[-1].role != "assistant":
                        found.append(Message(role="assistant", tool_calls=[]))
                        found[-1].reasoning_content, thought = thought, None
                    function = {"name": item.name, "arguments": item.arguments}
                    call = ToolCall.model_validate({"id": item.call_id, "function": function})
                    found[-1].tool_calls = found[-1].tool_calls or []
                    found[-1].tool_calls.append(call)
                case InputResult():
                    output = joined(item.output)
                    found.append(Message(role="tool", content=output, tool_call_id=item.call_id))
        return found


@router.post("/v1/responses", responses=BODY_OR_STREAM)
async def responses(body: ResponsesRequest, server: TheServer, request: Request) -> Response:
    dialogue, job = await one_job(server, body, body.conversation, request)
    head = Head(server.name, body, len(job.tokens))
    if body.stream:
        answered = _events(server.stream([job], request.client), head, dialogue)
        return EventStream(answered, failed=head.failed)
    ended = await while_connected(request, server.generate([job], request.client))
    if ended is None:
        return Response(status_code=499)
    output, splitter = Output(), dialogue.splitter()
    events: list[Event] = [*ended[0].answer.steps, ended[0]]
    for event in events:
        for part in splitter.read(event):
            for _ in output.add(part):
                pass
    for _ in output.end(ended[0], in_call=splitter.in_call):
        pass
    return JSONResponse(head.whole(ended[0], output, splitter.n_thought))


class Head:
    """What all objects of one response share."""

    def __init__(self, model: str, body: ResponsesRequest, n_prompt: int) -> None:
        self._n_prompt, self._n_events = n_prompt, 0
        given = body.model_dump(
            include={"temperature", "top_p", "tools", "tool_choice", "parallel_tool_calls"}
        )
        self._fields: Json = {
            "id": "resp_" + secrets.token_hex(12),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "previous_response_id": None,
            "store": False,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "error": None,
            **given,
        }

    def event(self, kind: str, fields: Json) -> str:
        """Return an event of a stream, with its number."""
        self._n_events += 1
        data = {"type": kind, "sequence_number": self._n_events - 1, **fields}
        return f"event: {kind}\n" + sse(data)

    def failed(self, e: RefusalError) -> str:
        """Return the event that ends a stream which fails."""
        return self.event("error", {"code": e.code, "message": str(e), "param": e.param})

    def unfinished(self) -> Json:
        """Return the response before its answer is whole."""
        return {
            **self._fields,
            "status": "in_progress",
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }

    def whole(self, ended: Ended, output: Output, n_thought: int) -> Json:
        """Return the response with its answer. n_thought: tokens of thoughts in it."""
        status = status_of(ended)
        cut = status == "incomplete"
        usage = usage_of(self._n_prompt, [ended])
        return {
            **self._fields,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output.items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": n_thought},
                "total_tokens": usage["total_tokens"],
            },
            "colm": colm_of([ended]),
        }


def status_of(ended: Ended) -> str:
    return "incomplete" if ended.answer.finish_reason == "length" else "completed"


Emitted = tuple[str, Json]  # an event: its type and its fields


class Output:
    """The items of a response, which an answer's parts make, and the events that tell of it."""

    def __init__(self) -> None:
        self.items: list[Json] = []
        self._kind: type[Part] | None = None  # of the item that is open

    def add(self, part: Part) -> Iterator[Emitted]:
        kind = CallBegan if isinstance(part, CallArguments) else type(part)
        if isinstance(part, CallBegan) or kind is not self._kind:
            yield from self._close("completed")
            self._kind = kind
            yield from self._open(part)
        item = self.items[-1]
        match part:
            case CallArguments():
                item["arguments"] += part.text
                yield self._event("response.function_call_arguments.delta", delta=part.text)
            case Text():
                item["content"][0]["text"] += part.text
                if part.text:
                    yield self._event(
                        "response.output_text.delta", content_index=0, delta=part.text, logprobs=[]
                    )
            case Thought():
                item["content"][0]["text"] += part.text
                yield self._event("response.reasoning_text.delta", content_index=0, delta=part.text)

    def end(self, ended: Ended, *, in_call: bool) -> Iterator[Emitted]:
        """Close the last item; an empty answer has a message too. in_call: whether the answer ends
        inside a call."""
        if not self.items:
            yield from self.add(Text(""))
        yield from self._close("incomplete" if in_call else status_of(ended))

    def _event(self, kind: str, **fields: Any) -> Emitted:
        """Return an event about the item that is open."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return kind, {**place, **fields}

    def _open(self, part: Part) -> Iterator[Emitted]:
        item = _item_of(part)
        content = item.pop("content", None)
        self.items.append(item)
        empty = {**item, "content": []} if content is not None else dict(item)
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": empty}
        if content is not None:
            item["content"] = content
            yield self._event("response.content_part.added", content_index=0, part=dict(content[0]))

    def _close(self, status: str) -> Iterator[Emitted]:
        if self._kind is None:
            return
        item = self.items[-1]
        item["status"] = status
        if self._kind is CallBegan:
            arguments, name = item["arguments"], item["name"]
            yield self._event(
                "response.function_call_arguments.done", arguments=arguments, name=name
            )
        else:
            part = item["content"][0]
            of_text: Json = {"logprobs": []} if self._kind is Text else {}
            name = "output_text" if self._kind is Text else "reasoning_text"
            yield self._event(
                f"response.{name}.done", content_index=0, text=part["text"], **of_text
            )
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}


def _item_of(part: Part) -> Json:
    """Return the item that a part begins, empty."""
    key, status = secrets.token_hex(12), "in_progress"
    match part:
        case CallBegan():
            call = {"call_id": part.id, "name": part.name, "arguments": ""}
            return {"id": f"fc_{key}", "type": "function_call", "status": status, **call}
        case Thought():
            thought: Json = {"id": f"rs_{key}", "type": "reasoning", "status": status}
            content = [{"type": "reasoning_text", "text": ""}]
            return {**thought, "summary": [], "content": content}
    empty: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    head = {"id": f"msg_{key}", "type": "message", "role": "assistant", "status": status}
    return {**head, "content": [empty]}


async def _events(stream: Events, head: Head, dialogue: Dialogue) -> AsyncGenerator[str, None]:
    """Yield the events of a response that is streamed, each with its number."""
    output, splitter, event = Output(), dialogue.splitter(), head.event
    yield event("response.created", {"response": head.unfinished()})
    yield event("response.in_progress", {"response": head.unfinished()})
    async with aclosing(stream) as events:
        async for _, one in events:
            for part in splitter.read(one):
                for data in output.add(part):
                    yield event(*data)
            if isinstance(one, Ended):
                for data in output.end(one, in_call=splitter.in_call):
                    yield event(*data)
                whole = head.whole(one, output, splitter.n_thought)
                yield event(f"response.{whole['status']}", {"response": whole})
