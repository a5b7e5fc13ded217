"""Ollama's paths, as far as its clients need them to chat."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from colm_edge.llama.chat_template import THINK_END
from colm_edge.serve.answers import Ended, Events, Server
from colm_edge.serve.chat import FunctionTool
from colm_edge.serve.completions import one_job
from colm_edge.serve.dialogue import Conversation, Dialogue, arguments_of
from colm_edge.serve.errors import OLLAMA_REFUSALS, RefusalError
from colm_edge.serve.formats import colm_of
from colm_edge.serve.guard import JSONRoute, TheServer
from colm_edge.serve.parts import Reply, Text, Thought
from colm_edge.serve.requests import (
    Body,
    BodyOptions,
    ColmFields,
    List,
    Objects,
    Sampling,
    Seed,
    Stop,
    not_supported,
    refuse_unsupported,
)
from colm_edge.serve.streaming import EventStream, one_line, while_connected
from colm_edge.serve.tools import use_of

router = APIRouter(route_class=JSONRoute, responses=OLLAMA_REFUSALS)
Json = dict[str, Any]
BODY_OR_LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "application/x-ndjson": {}}}
}
UNSUPPORTED = (
    "suffix", "template", "context", "images", "logprobs", "top_logprobs", "trace", "provisional",
)  # fmt: skip


class SamplingOptions(BodyOptions):
    """Ollama's `options`. Others, such as num_ctx, were settled when the server was started."""

    num_predict: int | None = Field(default=None, ge=-2)  # 0 and below: no limit
    seed: Seed | None = None
    stop: Stop | List[Stop] | None = None

    @model_validator(mode="before")
    @classmethod
    def is_known(cls, given: Any) -> Any:
        if isinstance(given, dict):
            refuse_unsupported(given)
        return given


class Asked(Body):
    """What both kinds of request hold."""

    model: str = ""
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: SamplingOptions = SamplingOptions()
    think: bool | str | None = None
    colm: ColmFields = ColmFields()

    @model_validator(mode="before")
    @classmethod
    def is_supported(cls, given: Any) -> Any:
        """Refuse what would change the answer."""
        if not isinstance(given, dict):
            return given
        colm = given["colm"] if isinstance(given.get("colm"), dict) else {}
        for name in UNSUPPORTED:
            if given.get(name) or colm.get(name):
                raise not_supported(name)
        return given

    @property
    def sampling(self) -> Sampling:
        """The options, under the names that they have in OpenAI's API."""
        given = self.options.model_dump(exclude={"num_predict"}, exclude_none=True)
        if (limit := self.options.num_predict) is not None:
            given["max_tokens"] = limit if limit > 0 else -1
        return Sampling.model_validate({**given, "stream": self.stream, "colm": self.colm})

    @property
    def schema_wanted(self) -> Json | None:
        """The JSON schema of the answer, if it has one."""
        return {} if self.format == "json" else self.format or None

    @property
    def variables(self) -> Json:
        """What the chat template reads besides the messages."""
        if self.think is None:
            return {}
        level = {"reasoning_effort": self.think} if isinstance(self.think, str) else {}
        return {"enable_thinking": bool(self.think), **level}


class CalledFunction(Body):
    name: str
    arguments: Json = Field(default_factory=dict)


class ToolCall(Body):
    function: CalledFunction


class Message(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: Objects[ToolCall] = Field(default_factory=list)
    images: list[Any] = Field(default_factory=list, max_length=0)
    tool_name: str | None = None  # whose result it is

    def as_dict(self) -> Json:
        """Return it as chat templates read it, except for the ids of calls."""
        more: Json = {}
        if self.thinking:
            more["reasoning_content"] = self.thinking
        if self.tool_name is not None:
            more["name"] = self.tool_name
        if self.tool_calls:
            calls = [call.function.model_dump() for call in self.tool_calls]
            more["tool_calls"] = [{"id": "", "type": "function", "function": c} for c in calls]
        return {"role": self.role, "content": self.content, **more}


def with_ids(messages: list[Json]) -> list[Json]:
    """Return a conversation whose calls have ids, and results the id and name of their calls: of
    the first one that waits, by its name where it is told."""
    names: dict[str, str] = {}  # of the calls that wait, by their ids
    in_order, by_name = deque[str](), defaultdict[str, deque[str]](deque)  # their ids
    n_calls = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["id"] = key = f"call_{n_calls}"
            n_calls += 1
            names[key] = name = call["function"]["name"]
            in_order.append(key)
            by_name[name].append(key)
        if message["role"] != "tool":
            continue
        queue = by_name[message["name"]] if "name" in message else in_order
        while queue and queue[0] not in names:  # its result came by the other queue
            queue.popleft()
        if queue:
            key = queue.popleft()
            message |= {"tool_call_id": key, "name": names.pop(key)}
    return messages


class ChatRequest(Asked):
    messages: Objects[Message] = Field(default_factory=list)
    tools: Objects[FunctionTool] = Field(default_factory=list)

    def conversation(self) -> Conversation:
        """Return the conversation. Raises ColmError for tools that cannot be."""
        messages = with_ids([message.as_dict() for message in self.messages])
        use = use_of([tool.function.as_tool() for tool in self.tools])
        return Conversation(messages, use, self.schema_wanted, self.variables)


class GenerateRequest(Asked):
    prompt: str = ""
    system: str = ""
    raw: bool = False

    def conversation(self) -> Conversation:
        """Return the prompt as a conversation."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": self.prompt})
        variables = self.variables
        return Conversation(messages, schema=self.schema_wanted, variables=variables, raw=self.raw)


@router.post("/api/chat", responses=BODY_OR_LINES)
async def chat(body: ChatRequest, server: TheServer, request: Request) -> Response:
    def written(reply: Reply) -> Json:
        message: Json = {"role": "assistant", "content": reply.text}
        if reply.thought:
            message["thinking"] = reply.thought
        # A call that was cut is none: the client would run it.
        given = [
            (call.name, arguments_of(call.arguments)) for call in reply.calls if call.arguments
        ]
        calls = [{"name": n, "arguments": a} for n, a in given if isinstance(a, dict)]
        if calls:
            message["tool_calls"] = [{"function": call} for call in calls]
        return {"message": message}

    if not body.messages:
        return _loaded(server, written)
    return await _respond(body, written, server, request)


@router.post("/api/generate", responses=BODY_OR_LINES)
async def generate(body: GenerateRequest, server: TheServer, request: Request) -> Response:
    def written(reply: Reply) -> Json:
        return {"response": reply.text, **({"thinking": reply.thought} if reply.thought else {})}

    if not body.prompt:
        return _loaded(server, written)
    return await _respond(body, written, server, request)


@router.get("/api/tags")
def tags(server: TheServer) -> Json:
    name, changed = server.name, _now(server.created)
    digest = hashlib.sha256(name.encode()).hexdigest()  # Ollama's program shows its first 12
    model = {"name": name, "model": name, "modified_at": changed, "size": 0, "digest": digest}
    return {"models": [{**model, "details": _details(server)}]}


@router.post("/api/show")
def show(server: TheServer) -> Json:
    base = server.pair.base
    family = base.metadata("general.architecture") or ""
    able = ["completion", "tools"]
    if THINK_END in (base.chat_template or ""):
        able.append("thinking")
    return {
        "template": base.chat_template or "",
        "modified_at": _now(server.created),
        "details": _details(server),
        "model_info": {
            "general.architecture": family,
            "general.basename": server.name,
            "general.parameter_count": base.n_params,
            f"{family}.context_length": server.pair.n_ctx,
            f"{family}.embedding_length": base.n_embd,
        },
        "capabilities": able,
    }


def _details(server: Server) -> Json:
    return {"format": "gguf", "family": server.pair.base.metadata("general.architecture")}


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version")
def version_of() -> dict[str, str]:
    return {"version": version("colm-edge")}


Written = Callable[[Reply], Json]  # what a reply, or a piece of it, adds to a line


def _loaded(server: Server, written: Written) -> Response:
    """Answer a request for nothing, which Ollama's clients send to have a model loaded."""
    head = {"model": server.name, "created_at": _now()}
    return JSONResponse({**head, **written(Reply()), "done": True, "done_reason": "load"})


async def _respond(
    body: ChatRequest | GenerateRequest, written: Written, server: Server, request: Request
) -> Response:
    dialogue, job = await one_job(server, body.sampling, body.conversation, request)
    if body.stream:
        stream = server.stream([job], request.client)
        lines = _lines(stream, server.name, dialogue, written)
        return EventStream(lines, "application/x-ndjson", failed=_failed)
    ended = await while_connected(request, server.generate([job], request.client))
    if ended is None:
        return Response(status_code=499)
    reply = dialogue.reply(ended[0].answer)
    return JSONResponse({"model": server.name, **written(reply), **_end_of(ended[0])})


async def _lines(
    stream: Events, name: str, dialogue: Dialogue, written: Written
) -> AsyncGenerator[str, None]:
    """Yield the lines of a stream: what each token adds, calls when they are whole, the counts."""
    splitter, whole = dialogue.splitter(), Reply()
    async with aclosing(stream) as events:
        async for _, event in events:
            piece = Reply()
            for part in splitter.read(event):
                whole.add(part)
                if isinstance(part, Text | Thought):
                    piece.add(part)
            if isinstance(event, Ended):
                piece.calls = whole.calls
            if piece != Reply():
                begun = {"model": name, "created_at": _now(), "done": False}
                yield _line({**begun, **written(piece)})
            if isinstance(event, Ended):
                yield _line({"model": name, **written(Reply()), **_end_of(event)})


def _line(data: Json) -> str:
    return one_line(data) + "\n"


def _end_of(ended: Ended) -> Json:
    """Return the counts that end an answer; durations are in nanoseconds."""
    stats = ended.answer.stats
    total = time.monotonic() - ended.began.at
    writing = stats.total_seconds - stats.expert_load_seconds
    reading = max(0.0, min(stats.first_token_seconds, writing))
    return {
        "created_at": _now(),
        "done": True,
        "done_reason": ended.answer.finish_reason,
        "total_duration": int(total * 1e9),
        "load_duration": int(stats.expert_load_seconds * 1e9),
        "prompt_eval_count": len(ended.began.prompt_tokens),
        "prompt_eval_duration": int(reading * 1e9),
        "eval_count": stats.n_generated,
        "eval_duration": int((writing - reading) * 1e9),
        "colm": colm_of([ended]),
    }


def _failed(e: RefusalError) -> str:
    return _line({"error": str(e)})


def _now(at: float | None = None) -> str:
    moment = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
    return moment.isoformat().replace("+00:00", "Z")
