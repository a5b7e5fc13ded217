"""Answers in the words of OpenAI's API: bodies, chunks of a stream, log-probabilities.

A format turns what an answer reports into JSON; one format exists for each endpoint that writes.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Protocol

from colm_edge.decode.step import Step
from colm_edge.serve.answers import Began, Ended, Event
from colm_edge.serve.chat import ChatRequest
from colm_edge.serve.dialogue import Dialogue, finish_of
from colm_edge.serve.parts import CallArguments, CallBegan, Part, Splitter, Text, Thought
from colm_edge.serve.requests import CompletionRequest

Json = dict[str, Any]
Piece = Callable[[int], bytes]  # the bytes of a token
first = itemgetter(0)
OF_EXPERTS = ("n_deferred", "calls", "tokens")
SUMMED = ("expert_calls", "expert_tokens", "expert_failures")  # stats in the side object


class Format(Protocol):
    """How the choices of one response are written as JSON."""

    prefix: str  # of the response's id
    kind: str  # "object" of a whole body
    chunk_kind: str  # "object" of a chunk

    def choice(self, i: int, ended: Ended) -> Json:
        """Return choice i of a whole body."""

    def delta(self, i: int, event: Event) -> Json | None:
        """Return what an event adds to choice i in a stream, or None for no chunk at all."""


class ChatFormat:
    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, dialogue: Dialogue, piece: Piece) -> None:
        self._body, self._dialogue, self._piece = body, dialogue, piece
        self._splitters: dict[int, Splitter] = {}  # of what is streamed, by choice

    def choice(self, i: int, ended: Ended) -> Json:
        answer = ended.answer
        reply = self._dialogue.reply(answer)
        message: Json = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.thought:
            message["reasoning_content"] = reply.thought
        if reply.calls:
            message["content"] = reply.text or None
            message["tool_calls"] = [_call(c.id, c.name, c.arguments) for c in reply.calls]
        return {
            "index": i,
            "finish_reason": finish_of(answer, is_call=reply.is_call),
            "logprobs": self._logprobs(answer.steps),
            "message": message,
        }

    def delta(self, i: int, event: Event) -> Json | None:
        finish, delta, logprobs = None, Json(), None
        match event:
            case Began():
                self._splitters[i] = self._dialogue.splitter()
                delta = {"role": "assistant", "content": ""}
            case Step():
                delta, logprobs = _delta(self._splitters[i].read(event)), self._logprobs([event])
            case Ended():
                splitter = self._splitters.pop(i)
                delta = _delta(splitter.read(event))
                finish = finish_of(event.answer, is_call=splitter.is_call)
        return {"index": i, "finish_reason": finish, "logprobs": logprobs, "delta": delta}

    def _logprobs(self, steps: Sequence[Step]) -> Json | None:
        if not self._body.logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(step.token, step.logprob),
                    "top_logprobs": [self._token(token, x) for token, x in step.top],
                }
                for step in steps
            ]
        }

    def _token(self, token: int, logprob: float) -> Json:
        piece = self._piece(token)
        text = piece.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(piece)}


def _delta(parts: Sequence[Part]) -> Json:
    """Return what parts add to a message."""
    delta, calls = Json(), dict[int, Json]()
    for part in parts:
        match part:
            case Text():
                delta["content"] = delta.get("content", "") + part.text
            case Thought():
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
            case CallBegan():
                calls[part.index] = _call(part.id, part.name, "")
            case CallArguments():
                call = calls.setdefault(part.index, {"function": {"arguments": ""}})
                call["function"]["arguments"] += part.text
    if calls:
        delta["tool_calls"] = [{"index": index, **call} for index, call in calls.items()]
    return delta


def _call(id: str, name: str, arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


class CompletionFormat:
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, piece: Piece) -> None:
        self._body, self._piece = body, piece
        self._lengths: dict[int, int] = {}  # characters streamed so far, by choice

    def choice(self, i: int, ended: Ended) -> Json:
        answer, echo = ended.answer, self._echo(ended.began)
        # Evaluation harnesses expect the end token among the log-probabilities.
        steps = answer.steps if ended.end is None else [*answer.steps, ended.end]
        logprobs = self._logprobs(steps, len(echo))
        prompt = self._echo_logprobs(ended.began)
        if logprobs is not None and prompt is not None:
            logprobs = {name: prompt[name] + column for name, column in logprobs.items()}
        choice: Json = {
            "index": i,
            "finish_reason": answer.finish_reason,
            "logprobs": logprobs,
            "text": echo + answer.text,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(
                ended.began, self._body.prompt_logprobs
            )
        if self._body.with_pieces:
            reported = [*ended.began.prompt_steps, *steps]
            tokens = {token for step in reported for token in (step.token, *map(first, step.top))}
            choice["pieces"] = {str(t): json_piece(self._piece(t)) for t in sorted(tokens)}
        return choice

    def delta(self, i: int, event: Event) -> Json | None:
        finish, text, logprobs = None, "", None
        match event:
            case Began():
                text, logprobs = self._echo(event), self._echo_logprobs(event)
                self._lengths[i] = 0
                if not text:
                    return None
            case Step():
                text, logprobs = event.text, self._logprobs([event], self._lengths[i])
            case Ended():
                finish = event.answer.finish_reason
                if event.end is not None:
                    logprobs = self._logprobs([event.end], self._lengths[i])
        self._lengths[i] += len(text)
        return {"index": i, "finish_reason": finish, "logprobs": logprobs, "text": text}

    def _logprobs(self, steps: Sequence[Step], offset: int) -> Json | None:
        """Return the columns of a plain completion's log-probabilities, if they are asked for.

        offset: of the first step, in characters of the whole text.
        """
        if self._body.logprobs is None:
            return None
        columns = Json(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for step in steps:
            name = self._name(step.token, step.text)
            top = {name: step.logprob}  # the token itself is always among them
            for token, logprob in step.top[: self._body.logprobs]:
                if token != step.token:
                    # Parts of characters may have the same text: the likeliest one stays.
                    top.setdefault(self._name(token), logprob)
            row = (name, step.logprob, top, offset)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            offset += len(step.text)
        return columns

    def _echo(self, began: Began) -> str:
        if not self._body.echo:
            return ""
        return b"".join(map(self._piece, began.prompt_tokens)).decode("utf-8", "replace")

    def _echo_logprobs(self, began: Began) -> Json | None:
        """Return the log-probabilities of an echoed prompt; its first token has none."""
        if not self._body.echo:
            return None
        first = began.prompt_tokens[0]
        # Without what is only the beginning of a character, which the next tokens complete.
        whole = codecs.getincrementaldecoder("utf-8")("replace").decode(self._piece(first))
        columns = self._logprobs(began.prompt_steps, len(whole))
        if columns is None:
            return None
        row = (self._name(first), None, None, 0)
        return {name: [x, *columns[name]] for name, x in zip(columns, row, strict=True)}

    def _prompt_logprobs(self, began: Began, n: int) -> list[Json | None]:
        """Return a prompt's log-probabilities in vLLM's form: by token id, the n likeliest and the
        prompt's own token, which has no rank unless it is one of them."""
        steps = began.prompt_steps

        def entry(token: int, logprob: float, rank: int | None) -> Json:
            return {"logprob": logprob, "rank": rank, "decoded_token": self._text(token)}

        # The first has no probability.
        tokens: list[Json | None] = [None] * (len(began.prompt_tokens) - len(steps))
        for step in steps:
            own = {str(step.token): entry(step.token, step.logprob, None)}
            top = {str(t): entry(t, x, rank) for rank, (t, x) in enumerate(step.top[:n], 1)}
            tokens.append(own | top)
        first = self._body.prompt_logprobs_from
        return [None] * min(first, len(tokens)) + tokens[first:]

    def _name(self, token: int, text: str | None = None) -> str:
        """Return what stands for a token: its text, or its id where the request asks for ids."""
        if self._body.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return self._text(token) if text is None else text

    def _text(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "replace")


def json_piece(raw: bytes) -> str | list[int]:
    """Return what a token spells as llama.cpp's server does: a text, or bytes that are not one."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def usage_of(n_prompt: int, ended: Sequence[Ended]) -> dict[str, int]:
    n = sum(e.answer.stats.n_generated for e in ended)
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}


def colm_of(ended: Sequence[Ended]) -> Json:
    """Return the side object of a response: counts over all its choices."""
    seconds = time.monotonic() - min(e.began.at for e in ended)
    stats = [e.answer.stats.record() for e in ended]
    n, n_deferred = (sum(s[name] for s in stats) for name in ("n_generated", "n_deferred"))
    return {
        "defer_rate": n_deferred / n if n else 0.0,
        "n_deferred": n_deferred,
        "threshold": ended[0].answer.threshold,
        **{name: _sum([s[name] for s in stats]) for name in SUMMED},
        "tokens_per_second": n / seconds if seconds > 0 else 0.0,
        **_by_expert(stats),
    }


def _by_expert(stats: Sequence[Json]) -> Json:
    """Return the counts of each of several experts; nothing where there is one."""
    if "experts" not in stats[0]:
        return {}
    found = {
        source: {name: _sum([s["experts"][source][name] for s in stats]) for name in OF_EXPERTS}
        for source in stats[0]["experts"]
    }
    return {"experts": found}


def _sum(counts: Sequence[int | None]) -> int | None:
    """Return the total, or None where one is not known."""
    known = [n for n in counts if n is not None]
    return sum(known) if len(known) == len(counts) else None
