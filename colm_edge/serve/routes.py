"""The paths of the server, one function each. To add an endpoint, add a function here, or a module
with a router of its own to ROUTERS in `app`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import generate_latest

from colm_edge.serve.chat import ChatRequest, TemplateRequest
from colm_edge.serve.completions import respond
from colm_edge.serve.dialogue import Dialogue, check_length, dialogue_of
from colm_edge.serve.errors import REFUSALS, RefusalError
from colm_edge.serve.formats import ChatFormat, CompletionFormat, json_piece
from colm_edge.serve.guard import JSONRoute, TheServer
from colm_edge.serve.requests import CompletionRequest, DetokenizeRequest, TokenizeRequest
from colm_edge.serve.streaming import BODY_OR_STREAM

router = APIRouter(route_class=JSONRoute, responses=REFUSALS)


@router.head("/health", include_in_schema=False)
@router.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/metrics", include_in_schema=False)
def metrics(server: TheServer) -> Response:
    text = generate_latest(server.metrics.registry)
    return Response(text, media_type="text/plain; version=0.0.4")


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
def models(server: TheServer) -> dict[str, Any]:
    pair = server.pair
    names: dict[str, Any] = {
        "base": pair.base.path.stem,
        "expert": pair.members[0].stem,
        "switch": Path(pair.switch.name).stem,
    }
    if pair.room is not None:
        names |= {"expert": "", "experts": {member.name: member.stem for member in pair.members}}
    model = {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "colm-edge",
        "max_model_len": pair.n_ctx,
        "meta": {"n_vocab": pair.n_shared, **names},
    }
    return {"object": "list", "data": [model]}


@router.get("/v1/models/{model}")
def one_model(model: str, server: TheServer) -> dict[str, Any]:
    if model != server.name:
        message = f"no model {model!r}; this server has {server.name!r}"
        raise RefusalError(404, message, code="model_not_found", param="model")
    return dict(models(server)["data"][0])


@router.post("/v1/chat/completions", responses=BODY_OR_STREAM)
async def chat(body: ChatRequest, server: TheServer, request: Request) -> Response:
    server.check_queue(request.client)
    dialogue = await dialogue_of(server.pair, body.conversation)
    form = ChatFormat(body, dialogue, server.pair.base.piece)
    return await respond(server, form, body, [dialogue.prompt], request)


@router.post("/v1/completions", responses=BODY_OR_STREAM)
async def completions(body: CompletionRequest, server: TheServer, request: Request) -> Response:
    server.check_queue(request.client)
    if body.stream and body.prompt_logprobs is not None:
        raise RefusalError(
            400,
            "prompt_logprobs cannot be streamed; leave out stream or prompt_logprobs, or use echo "
            "with logprobs",
            param="prompt_logprobs",
        )
    if body.stream and body.with_pieces:
        raise RefusalError(
            400, "with_pieces cannot be streamed; leave one out", param="with_pieces"
        )
    form = CompletionFormat(body, server.pair.base.piece)
    prompts = await asyncio.to_thread(body.prompts, server.pair)
    return await respond(server, form, body, prompts, request)


@router.post("/tokenize")
def tokenize(body: TokenizeRequest, server: TheServer) -> dict[str, Any]:
    base = server.pair.base
    if body.parse_special:
        check_length(server.pair, body.prompt)
    tokens = base.tokenize(body.prompt, special=body.parse_special, bos=body.add_special_tokens)
    entries: list[Any] = tokens
    if body.with_pieces:
        # A control token has no bytes; as llama.cpp's server does, its name stands for it.
        pieces = [base.piece(token) or base.token_text(token).encode() for token in tokens]
        entries = [
            {"id": t, "piece": json_piece(raw)} for t, raw in zip(tokens, pieces, strict=True)
        ]
    return {"tokens": entries, "count": len(tokens), "max_model_len": server.pair.n_ctx}


@router.post("/detokenize")
def detokenize(body: DetokenizeRequest, server: TheServer) -> dict[str, str]:
    base = server.pair.base
    if any(token >= base.n_vocab for token in body.tokens):
        raise RefusalError(400, f"a token is not below {base.n_vocab}", param="tokens")
    return {"prompt": base.text(body.tokens)}


@router.get("/tokenizer_info")
def tokenizer_info(server: TheServer) -> dict[str, Any]:
    """Tell what evaluation harnesses ask of vLLM."""
    base = server.pair.base
    return {
        "bos_token": base.bos_text or None,
        "eos_token": base.eos_text or None,
        "pad_token": base.eos_text or None,
        "chat_template": base.chat_template,
        "model_max_length": server.pair.n_ctx,
    }


@router.post("/apply-template")
def apply_template(body: TemplateRequest, server: TheServer) -> dict[str, str]:
    if not server.pair.base.chat_template:
        raise RefusalError(400, "the base has no chat template", param="messages")
    return {"prompt": Dialogue(server.pair, body.conversation()).text}
