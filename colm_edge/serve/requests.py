"""Requests of OpenAI's API, and what this server adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from colm_edge.errors import ColmError
from colm_edge.llama.grammar import grammar_of
from colm_edge.options import OPTIONS, Option, Options

if TYPE_CHECKING:
    from colm_edge.pair import Pair

MAX_CHOICES = 16  # answers to one request
MAX_LOGPROBS = 20
DEFAULT_COMPLETION = 16  # tokens of a plain completion that sets no limit, as in OpenAI's API
# Fields of other servers and of old clients that would change the answer: refused, never ignored.
REFUSED = (
    "function_call", "functions", "guided_choice", "guided_grammar", "guided_json", "guided_regex",
    "ignore_eos", "min_tokens", "mirostat", "structured_outputs",
)  # fmt: skip


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


def options_in(place: Literal["body", "colm"]) -> dict[str, Any]:
    """Return the fields of `Options` that requests set there, all optional, for create_model."""

    def type_of(option: Option) -> Any:
        limited: Any = Annotated[option.type, Field(**option.request_limits)]
        return limited | Literal[tuple(option.words)] if option.words else limited

    return {
        name: (type_of(option) | None, None)
        for name, option in OPTIONS.items()
        if option.request == place
    }


if TYPE_CHECKING:  # mypy does not follow create_model

    class BodyOptions(Body): ...

    class ColmOptions(Body): ...

else:
    BodyOptions = create_model("BodyOptions", __base__=Body, **options_in("body"))
    ColmOptions = create_model("ColmOptions", __base__=Body, **options_in("colm"))


class ColmFields(ColmOptions):
    """What this server adds to a request."""

    model_config = ConfigDict(extra="forbid")

    trace: bool = False
    provisional: bool = False  # of a stream: report drafts, and what is undone


class StreamOptions(Body):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Sampling(BodyOptions):
    """What both kinds of completion accept, besides the options that are copied as they are."""

    model: str | None = None
    # -1 is llama.cpp's: no limit but the server's.
    max_tokens: int | None = Field(default=None, ge=-1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | list[Stop] | None = Field(default=None)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    colm: ColmFields = ColmFields()
    json_schema: dict[str, Any] | None = None  # llama.cpp's: what the answer has to be
    # Not supported, and ignoring it would change the answer: a request that sets it is refused.
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def is_known(cls, given: Any) -> Any:
        """Take null as not given, as OpenAI does, and refuse what is not supported."""
        if not isinstance(given, dict):
            return given
        named = {name: value for name, value in given.items() if value is not None}
        for name in REFUSED:
            if name in named:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return named

    def options(self, defaults: Options, choice: int, limit: int) -> Options:
        """Return the decoding options of one choice; each has a seed of its own."""
        given = self.model_dump(include=set(BodyOptions.model_fields), exclude_none=True)
        given |= self.colm.model_dump(exclude={"trace", "provisional"}, exclude_none=True)
        seed = defaults.seed if self.seed is None else self.seed
        given["seed"] = -1 if seed == -1 else (seed + choice) % (2**32 - 1)
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        wanted = self.limit()
        wanted = defaults.max_tokens if wanted is None else wanted
        given["max_tokens"] = limit if wanted == -1 else min(limit, wanted)
        given["n_probs"] = self.n_probs()
        if (schema := self.schema_wanted()) is not None:
            if given.get("grammar") is not None:
                raise ColmError("grammar and a JSON schema both say what is allowed; give one")
            given["grammar"] = grammar_of(schema)
        return defaults.with_changes(**given)

    def limit(self) -> int | None:
        """Return the most tokens that the request asks for, None where it does not say."""
        return self.max_tokens

    def prompt_tokens(self, pair: Pair) -> list[list[int]]:
        """Return each prompt's token ids. Raises PromptError."""
        raise NotImplementedError

    def schema_wanted(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer, if the request has one."""
        return self.json_schema

    def n_probs(self) -> int:
        """Return how many of the most likely tokens to report for each token."""
        return 0

    @property
    def tells_prompt(self) -> bool:
        """Whether to report the prompt's tokens too."""
        return False


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)

    @model_validator(mode="after")
    def has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing; expected a text")
        return self

    def as_dict(self) -> dict[str, str]:
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


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


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    tool_choice: Literal["none", "auto"] | None = None
    tools: list[Any] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @field_validator("tools")
    @classmethod
    def are_not_called(cls, tools: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        if tools and info.data.get("tool_choice") != "none":
            raise ValueError("not supported")
        return tools

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

    def prompt_tokens(self, pair: Pair) -> list[list[int]]:
        """Return the token ids of the one prompt, the conversation."""
        messages = [message.as_dict() for message in self.messages]
        return [pair.prompt_tokens(messages, raw=pair.defaults.raw)]


class CompletionRequest(Sampling):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)  # vLLM's
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    return_tokens_as_token_ids: bool = False  # vLLM's: token_id:7 instead of a text

    def options(self, defaults: Options, choice: int, limit: int) -> Options:
        if self.max_tokens is None:
            limit = min(limit, DEFAULT_COMPLETION)
        return super().options(defaults, choice, limit)

    def n_probs(self) -> int:
        return max(self.logprobs or 0, self.prompt_logprobs or 0)

    @property
    def tells_prompt(self) -> bool:
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    def prompt_tokens(self, pair: Pair) -> list[list[int]]:
        """Return each prompt's token ids; a list of numbers is one prompt."""
        prompts: Sequence[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not all(isinstance(i, int) for i in self.prompt):
            prompts = self.prompt
        return [pair.base.tokenize(p) if isinstance(p, str) else p for p in prompts]


class TokenizeRequest(Body):
    """vLLM's: a text whose token ids a client wants, for example to compare vocabularies."""

    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """vLLM's: token ids whose text a client wants."""

    tokens: list[Annotated[int, Field(ge=0)]]


class TemplateRequest(Body):
    """llama.cpp's: a conversation that a client wants as the chat template writes it."""

    messages: list[Message] = Field(min_length=1)
