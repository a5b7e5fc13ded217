"""Anthropic's Messages API: text, thoughts and tools, as a body or as its events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import chain, groupby
from operator import itemgetter
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from colm_edge.serve.answers import Began, Ended, Events
from colm_edge.serve.completions import one_job
from colm_edge.serve.dialogue import Conversation, Dialogue
from colm_edge.serve.errors import ANTHROPIC_REFUSALS, RefusalError, anthropic
from colm_edge.serve.formats import colm_of
from colm_edge.serve.guard import JSONRoute, TheServer
from colm_edge.serve.parts import CallArguments, CallBegan, Part, Reply, Text, Thought
from colm_edge.serve.requests import Body, List, Objects, Sampling, Stop, TextPart, joined
from colm_edge.serve.streaming import BODY_OR_STREAM, EventStream, sse, while_connected
from colm_edge.serve.tools import Choice, Tool, use_of

router = APIRouter(route_class=JSONRoute, responses=ANTHROPIC_REFUSALS)
Json = dict[str, Any]


class TextBlock(TextPart):
    type: Literal["text"]


class ThinkingBlock(Body):
    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class UseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Objects[TextBlock] = ""
    is_error: bool = False


Texts = str | Objects[TextBlock]
Block = Annotated[TextBlock | ThinkingBlock | UseBlock | ResultBlock, Field(discriminator="type")]


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | Objects[Block]

    def as_dicts(self) -> list[Json]:
        """Return it as messages of OpenAI's: each tool's result is one of its own, before what
        the user says."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results, texts, calls, thoughts = [], "", list[Json](), ""
        for block in self.content:
            match block:
                case TextBlock():
                    texts += block.text
                case ThinkingBlock():
                    thoughts += block.thinking
                case UseBlock():
                    function = {"name": block.name, "arguments": block.input}
                    calls.append({"id": block.id, "type": "function", "function": function})
                case ResultBlock():
                    content = "Error: " * block.is_error + joined(block.content)
                    key = block.tool_use_id
                    results.append({"role": "tool", "content": content, "tool_call_id": key})
        more: Json = {"tool_calls": calls} if calls else {}
        if thoughts:
            more["reasoning_content"] = thoughts
        rest = {"role": self.role, "content": texts, **more}
        return [*results, rest] if texts or calls or not results else results


class OfferedTool(Body):
    name: str
    description: str = ""
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"  # Anthropic's own tools have other types


# Anthropic's words for what OpenAI's API says.
USE: dict[str, Choice] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class Format(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: Format | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class CountRequest(Body):
    """A conversation whose tokens a client wants to count."""

    messages: Objects[Message] = Field(min_length=1)
    system: Texts = ""
    tools: Objects[OfferedTool] = Field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice()
    output_config: OutputConfig = OutputConfig()
    output_format: Format | None = None  # its earlier name
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def conversation(self) -> Conversation:
        """Return the conversation. Raises ColmError for tools that cannot be."""
        system = joined(self.system)
        messages: list[Json] = [{"role": "system", "content": system}] if system else []
        tools = [Tool(tool.name, tool.description, tool.input_schema) for tool in self.tools]
        chosen, variables = self.tool_choice, Json()
        form = self.output_config.format or self.output_format
        if self.thinking is not None:
            variables["enable_thinking"] = self.thinking.type != "disabled"
        given = (one for message in self.messages for one in message.as_dicts())
        for role, group in groupby(given, itemgetter("role")):
            turns = list(group)
            messages += [_as_one(turns)] if role in ("user", "assistant") else turns
        return Conversation(
            messages,
            use_of(
                tools,
                USE[chosen.type],
                only=chosen.name if chosen.type == "tool" else None,
                parallel=not chosen.disable_parallel_tool_use,
            ),
            form.schema_ if form is not None else None,
            {**variables, **self.chat_template_kwargs},
        )


def _as_one(turns: list[Json]) -> Json:
    """Return messages of one role as one, as Anthropic's API takes turns that follow."""
    whole: Json = {}
    for turn in reversed(turns):  # of thoughts, the first ones stay
        whole |= turn
    whole["content"] = "\n\n".join(turn["content"] for turn in turns if turn["content"])
    if calls := [call for turn in turns for call in turn.get("tool_calls", ())]:
        whole["tool_calls"] = calls
    return whole


class MessagesRequest(CountRequest, Sampling):
    elsewhere: ClassVar = {
        **dict.fromkeys(("stop", "json_schema", "response_format"), ()),
        **dict.fromkeys(("trace", "provisional"), (0,)),
    }

    max_tokens: int = Field(ge=0)
    stop_sequences: List[Stop] | None = None
    n: Literal[1] = 1

    def stops(self) -> tuple[str, ...] | None:
        return None if self.stop_sequences is None else tuple(self.stop_sequences)


@router.post("/v1/messages/count_tokens")
def count_tokens(body: CountRequest, server: TheServer) -> dict[str, int]:
    return {"input_tokens": len(Dialogue(server.pair, body.conversation()).prompt.tokens)}


@router.post("/v1/messages", responses=BODY_OR_STREAM)
async def messages(body: MessagesRequest, server: TheServer, request: Request) -> Response:
    dialogue, job = await one_job(server, body, body.conversation, request)
    head = {
        "id": "msg_" + secrets.token_hex(12),
        "type": "message",
        "role": "assistant",
        "model": server.name,
    }
    if body.stream:
        return EventStream(
            _events(server.stream([job], request.client), head, dialogue), failed=_failed
        )
    ended = await while_connected(request, server.generate([job], request.client))
    if ended is None:
        return Response(status_code=499)
    reply = dialogue.reply(ended[0].answer)
    whole = {**head, "content": blocks_of(reply), **end_of(ended[0], is_call=reply.is_call)}
    return JSONResponse({**whole, "usage": usage(ended[0]), "colm": colm_of(ended)})


def blocks_of(reply: Reply) -> list[Json]:
    blocks: list[Json] = []
    if reply.thought:
        blocks.append({"type": "thinking", "thinking": reply.thought, "signature": ""})
    if reply.text or not reply.calls:
        blocks.append({"type": "text", "text": reply.text})
    for call in reply.calls:
        try:
            given = json.loads(call.arguments)
        except ValueError:  # cut, by max_tokens or a stop text
            given = {}
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


def end_of(ended: Ended, *, is_call: bool) -> Json:
    """Return why an answer ended, in Anthropic's words. is_call: as for `finish_of`."""
    answer = ended.answer
    if answer.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if is_call:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if answer.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stopped_by}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def usage(ended: Ended) -> dict[str, int]:
    n = ended.answer.stats.n_generated
    return {"input_tokens": len(ended.began.prompt_tokens), "output_tokens": n}


def _event(data: Json) -> str:
    return f"event: {data['type']}\n" + sse(data)


def _failed(e: RefusalError) -> str:
    return _event(anthropic(e))


class Blocks:
    """The blocks of a message that is streamed: the events that open, fill and close them."""

    def __init__(self) -> None:
        self._n = 0
        self.says_something = False  # a thought alone does not
        self._kind: type[Part] | None = None  # of the block that is open

    def add(self, part: Part) -> Iterator[Json]:
        kind = CallBegan if isinstance(part, CallArguments) else type(part)
        self.says_something |= kind is not Thought
        if isinstance(part, CallBegan) or kind is not self._kind:
            yield from self.close()
            self._kind = kind
            block = _empty(part)
            yield {"type": "content_block_start", "index": self._n, "content_block": block}
        delta: Json | None = None
        match part:
            case Text():
                delta = {"type": "text_delta", "text": part.text}
            case Thought():
                delta = {"type": "thinking_delta", "thinking": part.text}
            case CallArguments():
                delta = {"type": "input_json_delta", "partial_json": part.text}
        if delta is not None:
            yield {"type": "content_block_delta", "index": self._n, "delta": delta}

    def close(self) -> Iterator[Json]:
        if self._kind is not None:
            yield {"type": "content_block_stop", "index": self._n}
            self._kind = None
            self._n += 1


def _empty(part: Part) -> Json:
    match part:
        case CallBegan():
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
        case Thought():
            return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


async def _events(stream: Events, head: Json, dialogue: Dialogue) -> AsyncGenerator[str, None]:
    """Yield the events of a message that is streamed."""

    blocks, splitter = Blocks(), dialogue.splitter()
    async with aclosing(stream) as events:
        async for _, one in events:
            if isinstance(one, Began):
                counts = {"input_tokens": len(one.prompt_tokens), "output_tokens": 0}
                begun: Json = {"content": [], "stop_reason": None, "stop_sequence": None}
                message = {**head, **begun, "usage": counts}
                yield _event({"type": "message_start", "message": message})
            for part in splitter.read(one):
                for data in blocks.add(part):
                    yield _event(data)
            if isinstance(one, Ended):
                rest = () if blocks.says_something else blocks.add(Text(""))  # as in `blocks_of`
                for data in chain(rest, blocks.close()):
                    yield _event(data)
                delta = end_of(one, is_call=splitter.is_call)
                counts = {"output_tokens": one.answer.stats.n_generated}
                yield _event({"type": "message_delta", "delta": delta, "usage": counts})
                yield _event({"type": "message_stop", "colm": colm_of([one])})
