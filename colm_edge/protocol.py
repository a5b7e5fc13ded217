"""OpenAI's requests and responses as this server reads and writes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from colm_edge.options import Options

if TYPE_CHECKING:
    from colm_edge.decode import Step
    from colm_edge.pair import Stream

MAX_CHOICES = 16


class Strict(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ColmFields(Strict):
    """What this server adds to a request."""

    threshold: float | None = Field(default=None, ge=0, le=1)
    defer_rate: float | None = Field(default=None, ge=0, le=1)
    strategy: Literal["defer", "compose"] | None = None
    trace: bool = False


class StreamOptions(Strict):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Sampling(Strict):
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=1e-6, le=1e6)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | list[Stop] | None = Field(default=None)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    colm: ColmFields = ColmFields()

    def options(self, defaults: Options, choice: int, limit: int) -> Options:
        """Return the decoding options of one choice; each has a seed of its own."""
        given = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
        }
        given |= self.colm.model_dump(exclude={"trace"})
        given = {name: value for name, value in given.items() if value is not None}
        if self.seed is not None:
            given["seed"] = (self.seed + choice) % (2**32 - 1)
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        wanted = self.limit()
        given["max_tokens"] = limit if wanted is None else min(limit, wanted)
        return defaults.with_changes(**given)

    def limit(self) -> int | None:
        return self.max_tokens


class Part(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]

    def as_dict(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class CompletionRequest(Sampling):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts; a list of numbers is one, a list of texts or lists several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if all(isinstance(item, int) for item in prompt):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]


class TokenizeRequest(Strict):
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
    steps: list[Step] = field(default_factory=list)

    @property
    def finish(self) -> str:
        return self.stream.finish_reason

    def stats(self) -> dict[str, Any]:
        return asdict(self.stream.answer().stats)


def usage_of(n_prompt: int, choices: list[Written]) -> dict[str, int]:
    n = sum(choice.stats()["n_generated"] for choice in choices)
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}


def colm_of(choices: list[Written], trace: bool) -> dict[str, Any]:
    """Return the side object: counts over all choices and, where asked for, every token."""
    stats = [choice.stats() for choice in choices]
    n = sum(s["n_generated"] for s in stats)
    deferred = sum(s["n_deferred"] for s in stats)
    colm: dict[str, Any] = {
        "defer_rate": deferred / n if n else 0.0,
        "n_deferred": deferred,
        "threshold": choices[0].stream.threshold if choices else None,
        **{key: sum(s[key] for s in stats) for key in ("expert_calls", "expert_tokens")},
        "tokens_per_second": sum(s["tokens_per_second"] for s in stats),
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
    """What differs between chat and plain completions: names, and how text is wrapped."""

    def __init__(self, chat: bool) -> None:
        self.chat = chat
        self.kind = "chat.completion" if chat else "text_completion"
        self.prefix = "chatcmpl-" if chat else "cmpl-"

    def choice(self, i: int, written: Written, logprobs: bool, prefix: str) -> dict[str, Any]:
        text = prefix + "".join(step.text for step in written.steps)
        body: dict[str, Any] = {"index": i, "finish_reason": written.finish}
        body["logprobs"] = self.logprobs(written.steps, len(prefix)) if logprobs else None
        if self.chat:
            return body | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return body | {"text": text}

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

    def logprobs(self, steps: list[Step], offset: int) -> dict[str, Any]:
        if self.chat:
            return {
                "content": [
                    {
                        "token": s.text, "logprob": s.logprob, "bytes": list(s.text.encode()),
                        "top_logprobs": [],
                    }
                    for s in steps
                ]
            }  # fmt: skip
        offsets = []
        for step in steps:
            offsets.append(offset)
            offset += len(step.text)
        return {
            "tokens": [s.text for s in steps],
            "token_logprobs": [s.logprob for s in steps],
            "top_logprobs": None,
            "text_offset": offsets,
        }
