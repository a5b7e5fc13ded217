"""Conversations in the words of OpenAI's chats."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from colm_edge.errors import ColmError
from colm_edge.serve.dialogue import Conversation, arguments_of, thinking_of
from colm_edge.serve.errors import RefusalError
from colm_edge.serve.requests import MAX_LOGPROBS, Body, Objects, Sampling, TextPart, joined
from colm_edge.serve.tools import Tool, use_of


class Part(TextPart):
    type: Literal["text"]


class CalledFunction(Body):
    name: str
    arguments: str = ""


class ToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_dict(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": arguments_of(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Objects[Part] | None = None
    tool_calls: Objects[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing; expected a text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only messages of the assistant have tool_calls")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return it as chat templates read it."""
        text = joined(self.content or "")
        role = "system" if self.role == "developer" else self.role
        more = self.model_dump(
            include={"tool_call_id", "name", "reasoning_content"}, exclude_none=True
        )
        if self.tool_calls:
            more["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return {"role": role, "content": text, **more}


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_tool(self) -> Tool:
        strict = bool(self.strict)
        return Tool(self.name, self.description or "", self.parameters or {}, strict)


class FunctionTool(Body):
    type: Literal["function"] = "function"
    function: Function


class Named(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: Named


class NamedSchema(Body):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # llama.cpp's place

    @model_validator(mode="after")
    def has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("json_schema is missing; expected an object with a schema")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for a text."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {} if self.schema_ is None else self.schema_


class Messages(Body):
    """A conversation, and what its template reads besides."""

    messages: Objects[Message] = Field(min_length=1)
    tools: Objects[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # llama.cpp's, vLLM's
    reasoning_effort: str | None = None

    def schema_wanted(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer, if it has one."""
        return None

    def conversation(self) -> Conversation:
        """Return the conversation. Raises ColmError for tools that cannot be."""
        choice = self.tool_choice
        return Conversation(
            [message.as_dict() for message in self.messages],
            use_of(
                [tool.function.as_tool() for tool in self.tools or ()],
                choice if isinstance(choice, str) else "required",
                only=None if isinstance(choice, str) else choice.function.name,
                parallel=self.parallel_tool_calls,
            ),
            self.schema_wanted(),
            {**thinking_of(self.reasoning_effort), **self.chat_template_kwargs},
        )


class TemplateRequest(Messages):
    """llama.cpp's: a conversation that a client wants as the chat template writes it."""


class ChatRequest(Messages, Sampling):
    elsewhere: ClassVar = {"echo": (False,), "prompt_logprobs": ()}

    max_completion_tokens: int | None = Field(default=None, ge=0)
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def asks_for_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs needs logprobs: true; add it, or leave both out"
            raise RefusalError(400, message, param="top_logprobs")
        return self

    def schema_wanted(self) -> dict[str, Any] | None:
        wanted = self.response_format.wanted if self.response_format is not None else None
        if wanted is not None and self.json_schema is not None:
            raise ColmError("response_format and json_schema both give a schema; give one")
        return self.json_schema if wanted is None else wanted

    def limit(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def n_probs(self) -> int:
        return self.top_logprobs or 0 if self.logprobs else 0
