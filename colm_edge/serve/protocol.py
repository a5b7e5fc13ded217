"""OpenAI's requests and responses as this server reads and writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from colm_edge.options import OPTIONS, Options

if TYPE_CHECKING:
    from colm_edge.decode.step import Step
    from colm_edge.stream import Stream


MAX_CHOICES = 16
MAX_LOGPROBS = 20
# Of every answer's stats, in the side object.
SUMMED = ("expert_calls", "expert_tokens", "expert_failures")


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


def options_in(place: Literal["body", "colm"]) -> dict[str, Any]:
    """Return the fields of `Options` that requests set there, all optional, for create_model."""
    return {
        name: (option.type | None, Field(default=None, **option.request_limits))
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
        given |= self.colm.model_dump(exclude={"trace"}, exclude_none=True)
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


class CompletionRequest(Sampling):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)  # vLLM's
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    return_tokens_as_token_ids: bool = False  # vLLM's: token_id:7 instead of a text

    def n_probs(self) -> int:
        return max(self.logprobs or 0, self.prompt_logprobs or 0)

    @property
    def tells_prompt(self) -> bool:
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts; a list of numbers is one, a list of texts or lists several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if all(isinstance(item, int) for item in prompt):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]


class TokenizeRequest(Body):
    """vLLM's: a text as token ids, for a client to compare vocabularies."""

    prompt: str
    add_special_tokens: bool = True


class RefusalError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error",
        code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


@dataclass
class Written:
    """One choice as it is written; `text` and `steps` grow, `finish` comes last."""

    stream: Stream
    begun: float  # when its slot was its own, by time.monotonic()
    prompt: list[Step] = field(default_factory=list)  # its tokens but the first, if wanted
    steps: list[Step] = field(default_factory=list)

    @property
    def finish(self) -> str:
        return self.stream.finish_reason

    def stats(self) -> dict[str, Any]:
        return asdict(self.stream.answer().stats)


def usage_of(n_prompt: int, choices: list[Written]) -> dict[str, int]:
    n = sum(choice.stats()["n_generated"] for choice in choices)
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}


UNSUPPORTED = ("tools", "tool_choice", "response_format", "logit_bias", "best_of", "suffix")


def explained(error: Mapping[str, Any], content_type: str) -> tuple[str, str | None]:
    """Return what pydantic found wrong with a body in one sentence, and which field it is."""
    where = ".".join(str(part) for part in error["loc"][1:])
    field = str(error["loc"][1]) if len(error["loc"]) > 1 else ""
    if error["type"] == "json_invalid":
        return f"the body is no JSON: {error['ctx']['error']}", None
    if not where and "json" not in content_type:
        return "the body was not taken for JSON; send Content-Type: application/json", None
    if field in UNSUPPORTED:
        return f"{field}: this server has none of it; leave it out", field
    if field == "messages" and "content" in error["loc"]:
        where = where[: where.index("content") + len("content")]  # without pydantic's own names
        return f"{where}: expected a text, or parts of type text", where
    if "tool_calls" in error["loc"]:
        return f"{where}: this server has no tools; leave it out", where
    return f"{where or 'the body'}: {error['msg'].removeprefix('Value error, ')}", where or None


def colm_of(choices: list[Written], trace: bool) -> dict[str, Any]:
    """Return the side object: counts over all choices and, where asked for, every token."""
    seconds = time.monotonic() - min(choice.begun for choice in choices)
    stats = [choice.stats() for choice in choices]
    n = sum(s["n_generated"] for s in stats)
    deferred = sum(s["n_deferred"] for s in stats)
    colm: dict[str, Any] = {
        "defer_rate": deferred / n if n else 0.0,
        "n_deferred": deferred,
        "threshold": choices[0].stream.threshold,
        **{key: sum(s[key] for s in stats) for key in SUMMED},
        "tokens_per_second": n / seconds if seconds > 0 else 0.0,
    }
    if trace:
        colm["trace"] = [
            {"choice": i, **record_of(step)}
            for i, choice in enumerate(choices)
            for step in choice.steps
        ]
    return colm


def record_of(step: Step) -> dict[str, Any]:
    return {"id": step.token, "text": step.text, "source": step.source, "p_defer": step.p_defer}


class Endpoint:
    """What differs between chat and plain completions: names, and how text is wrapped.

    piece: the bytes of a token.
    """

    def __init__(self, chat: bool, piece: Callable[[int], bytes]) -> None:
        self.chat, self._piece = chat, piece
        self.kind = "chat.completion" if chat else "text_completion"
        self.prefix = "chatcmpl-" if chat else "cmpl-"

    def choice(self, i: int, written: Written, body: Sampling, echo: str) -> dict[str, Any]:
        text = echo + "".join(step.text for step in written.steps)
        told: dict[str, Any] = {"index": i, "finish_reason": written.finish}
        told["logprobs"] = self.logprobs(written.steps, body, len(echo), written.stream.end)
        if self.chat:
            return told | {"message": {"role": "assistant", "content": text, "refusal": None}}
        assert isinstance(body, CompletionRequest)
        of_prompt = self.echo_logprobs(written, body)
        if of_prompt is not None:
            told["logprobs"] = {name: of_prompt[name] + x for name, x in told["logprobs"].items()}
        if body.prompt_logprobs is not None:
            told["prompt_logprobs"] = self.prompt_logprobs(written, body.prompt_logprobs)
        return told | {"text": text}

    def delta(
        self, i: int, text: str | None, finish: str | None, first: bool, logprobs: Any
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"index": i, "finish_reason": finish, "logprobs": logprobs}
        if not self.chat:
            return body | {"text": text or ""}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        return body | {"delta": delta}

    def logprobs(
        self, steps: list[Step], body: Sampling, offset: int, end: Step | None = None
    ) -> dict[str, Any] | None:
        """Return the steps' log-probabilities, if the request asks for them.

        offset: of the first step, in characters of the whole text. end: the end token after them,
        which plain completions tell too: evaluation harnesses count on a token being written.
        """
        if isinstance(body, ChatRequest):
            if not body.logprobs:
                return None
            return {
                "content": [
                    {
                        **self._chat_token(step.token, step.logprob),
                        "top_logprobs": [self._chat_token(i, x) for i, x in step.top],
                    }
                    for step in steps
                ]
            }
        assert isinstance(body, CompletionRequest)
        if body.logprobs is None:
            return None
        told: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        as_id = body.return_tokens_as_token_ids
        for step in [*steps, *([end] if end is not None else [])]:
            name = f"token_id:{step.token}" if as_id else step.text
            top = {name: step.logprob}  # the token itself is one of them
            for i, x in step.top[: body.logprobs]:
                if i != step.token:
                    # Some are spelled alike, such as parts of characters: the likeliest stays.
                    top.setdefault(f"token_id:{i}" if as_id else self._spell(i), x)
            for key, value in zip(told, (name, step.logprob, top, offset), strict=True):
                told[key].append(value)
            offset += len(step.text)
        return told

    def echo_logprobs(self, written: Written, body: Sampling) -> dict[str, Any] | None:
        """Return the prompt's, whose first token has none, where the prompt is echoed."""
        if not isinstance(body, CompletionRequest) or not body.echo:
            return None
        token = written.stream.prompt_tokens[0]
        first = self._spell(token)
        told = self.logprobs(written.prompt, body, len(first))
        if told is None:
            return None
        if body.return_tokens_as_token_ids:
            first = f"token_id:{token}"
        begin = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        return {name: [x, *told[name]] for name, x in begin.items()}

    def prompt_logprobs(self, written: Written, n: int) -> list[Any]:
        """Return them in vLLM's form: by token id, the prompt's own token among the likeliest n."""

        def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
            return {"logprob": logprob, "rank": rank, "decoded_token": self._spell(token)}

        told: list[Any] = [None]
        for step in written.prompt:
            top = {str(i): entry(i, x, k + 1) for k, (i, x) in enumerate(step.top[:n])}
            own = {str(step.token): entry(step.token, step.logprob, None)}
            told.append(own | top)
        return told

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._spell(token), "logprob": logprob, "bytes": list(self._piece(token))
        }  # fmt: skip

    def _spell(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "replace")
