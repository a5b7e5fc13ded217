"""Requests of OpenAI's API, and what this server adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from colm_edge.options import OPTIONS, Option, Options

if TYPE_CHECKING:
    from colm_edge.pair import Pair

MAX_CHOICES = 16  # answers to one request
MAX_LOGPROBS = 20
DEFAULT_COMPLETION = 16  # tokens of a plain completion that sets no limit, as in OpenAI's API


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
    max_tokens: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | list[Stop] | None = Field(default=None)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    colm: ColmFields = ColmFields()
    # Not supported, and ignoring it would change the answer: a request that sets it is refused.
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)

    def options(self, defaults: Options, choice: int, limit: int) -> Options:
        """Return the decoding options of one choice; each has a seed of its own."""
        given = self.model_dump(include=set(BodyOptions.model_fields), exclude_none=True)
        given |= self.colm.model_dump(exclude={"trace", "provisional"}, exclude_none=True)
        if self.seed is not None:
            given["seed"] = (self.seed + choice) % (2**32 - 1)
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        wanted = self.limit()
        given["max_tokens"] = limit if wanted is None else min(limit, wanted)
        given["n_probs"] = self.n_probs()
        return defaults.with_changes(**given)

    def limit(self) -> int | None:
        return self.max_tokens

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


class ResponseFormat(Body):
    type: Literal["text"]


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def limit(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def n_probs(self) -> int:
        return self.top_logprobs or 0 if self.logprobs else 0

    def prompt_tokens(self, pair: Pair) -> list[list[int]]:
        """Return the token ids of the one prompt, the conversation."""
        return [pair.prompt_tokens([message.as_dict() for message in self.messages])]


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
