"""Errors as OpenAI's API reports them: status, and an object that says what to change."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from colm_edge.errors import ColmError, ContextError, ModelError


class RefusalError(Exception):
    """A request is not answered. Holds what the client receives instead."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """param: the field of the request that is wrong."""
        super().__init__(message)
        self.status, self.headers = status, headers
        self.kind, self.code, self.param = kind, code, param

    @property
    def body(self) -> dict[str, Any]:
        """What OpenAI's API answers."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, path: str) -> JSONResponse:
        """Return it in the words of the API that a path belongs to."""
        body = self.body
        if path.startswith("/v1/messages"):
            body = anthropic(self)
        elif path.startswith("/api/"):
            body = {"error": str(self)}
        return JSONResponse(body, self.status, self.headers)


INTERNAL = RefusalError(500, "the server failed; its log says why", "server_error")


# The types of errors in Anthropic's API, where they are not those of OpenAI's.
ANTHROPIC = {
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip


def anthropic(e: RefusalError) -> dict[str, Any]:
    """Return a refusal as Anthropic's API words it."""
    kind = ANTHROPIC.get(e.status, "api_error" if e.status >= 500 else e.kind)
    return {"type": "error", "error": {"type": kind, "message": str(e)}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class AnthropicDetail(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"]
    error: AnthropicDetail


class OllamaError(BaseModel):
    error: str


def _refusals(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return what the API's document says of refusals."""
    texts = {
        400: "The request is wrong",
        401: "The key is missing or wrong",
        404: "The model does not exist",
        413: "The body is too large",
        503: "Too many requests are waiting, or the server is being stopped",
    }
    return {status: {"description": text, "model": model} for status, text in texts.items()}


REFUSALS = _refusals(ErrorBody)
ANTHROPIC_REFUSALS, OLLAMA_REFUSALS = _refusals(AnthropicError), _refusals(OllamaError)


async def _refused(request: Request, e: RefusalError) -> JSONResponse:
    return e.response(request.url.path)


def refusal_of(e: ColmError) -> RefusalError:
    """Return what a client is told of an error: whether the request is wrong, or the server."""
    if isinstance(e, ModelError):
        return RefusalError(500, str(e), "server_error")
    code = "context_length_exceeded" if isinstance(e, ContextError) else None
    return RefusalError(400, str(e), code=code)


async def _failed(request: Request, e: ColmError) -> JSONResponse:
    return refusal_of(e).response(request.url.path)


async def _half_a_character(request: Request, _: UnicodeEncodeError) -> JSONResponse:
    message = "a text holds half a character (a lone surrogate, such as \\ud83d); send whole ones"
    return RefusalError(400, message).response(request.url.path)


async def _invalid(request: Request, e: RequestValidationError) -> JSONResponse:
    # Of a value that may be of several types there is an error for each: the one that lies deepest
    # in the body is of the type that was meant; of these, one about a name, and then a value.
    def rank(error: Mapping[str, Any]) -> tuple[Any, ...]:
        kind = error["type"]
        return len(_place(error, e.body)), kind == "literal_error", not kind.endswith("_type")

    error = max(e.errors(), key=rank)
    message, param = explain(error, _place(error, e.body))
    return RefusalError(400, message, param=param).response(request.url.path)


async def _other(request: Request, e: HTTPException) -> JSONResponse:
    message = str(e.detail)
    if e.status_code == 404:
        document = await asyncio.to_thread(request.app.openapi)  # the first takes half a second
        paths = ", ".join(sorted(document["paths"]))
        message = f"no endpoint {request.url.path[:100]!r}; there are {paths}"
    return RefusalError(e.status_code, message, headers=e.headers).response(request.url.path)


# By class of exception: what turns it into a response.
HANDLERS: dict[int | type[Exception], Any] = {
    RefusalError: _refused,
    ColmError: _failed,
    RequestValidationError: _invalid,
    HTTPException: _other,
    UnicodeEncodeError: _half_a_character,
}


def _place(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Return where in the body an error is, without pydantic's own names of types."""
    found: list[str | int] = []
    at, parts = body, error["loc"][1:]
    for i, part in enumerate(parts):
        if isinstance(at, list):
            inside = isinstance(part, int) and part < len(at)
        else:
            inside = isinstance(at, dict) and part in at
        if inside:
            at = at[part]
            found.append(part)
        elif i == len(parts) - 1 and error["type"] in ("missing", "extra_forbidden"):
            found.append(part)
    return tuple(found)


def explain(error: Mapping[str, Any], place: tuple[str | int, ...]) -> tuple[str, str | None]:
    """Say in one sentence what pydantic found wrong with a body; return also the field's name.
    place: of the error, as `_place` returns it."""
    where = ".".join(map(str, place))
    field = str(error["loc"][1]) if len(error["loc"]) > 1 else ""
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']}", None
    if field == "messages" and "content" in place:
        where = where[: where.index("content") + len("content")]
        return f"{where}: expected a text, or parts of type text", where
    if field == "colm" and len(error["loc"]) > 3:  # one of two types
        return f"{where}: expected a number in its range, or one of its words", where
    return f"{where or 'the body'}: {error['msg'].removeprefix('Value error, ')}", where or None
