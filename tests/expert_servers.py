"""Stand-ins for the servers that an expert may run on, each kind with a real model behind it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from reference import log_softmax

from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session

N_CTX = 256


class Fake:
    """A server of one dialect and a real model; it answers with `failures` first, one each."""

    def __init__(self, owner: str, model: str) -> None:
        self.owner, self.model = owner, Model(model)
        self.session = Session(self.model, ContextOptions(n_ctx=N_CTX, n_threads=1))
        self.n_vocab, self.shift = self.model.n_vocab, 0
        self.names = ["the model"]
        self.listed: dict | None = None  # instead of these
        self.max_logprobs, self.tells_cached = 20, True  # as vLLM's options
        self.n_connections = self.n_absent = 0
        self.cuts_characters = False
        self.requests: list[tuple[str, dict]] = []
        self.keys: list[str | None] = []
        self.failures: list[str] = []
        self.always = ""
        self.twist: Callable[[dict], Any] = lambda answer: answer  # of answers about tokens
        self.twist_spelling: Callable[[dict], Any] = lambda answer: answer
        self.about: Any = {"eos_token": self.model.eos_text}  # at /props or /tokenizer_info
        self.released = threading.Event()

    @property
    def asked(self) -> list[dict]:
        return [body for path, body in self.requests if "completion" in path]

    def models(self) -> dict:
        entry: dict = {"owned_by": self.owner}
        if self.owner == "llamacpp":
            entry["meta"] = {"n_vocab": self.n_vocab, "n_ctx": N_CTX}
        else:
            entry["max_model_len"] = N_CTX
        return {"object": "list", "data": [{"id": name, **entry} for name in self.names]}

    def refusal(self, body: dict) -> dict | None:
        """Return the error with which vLLM 0.32 refuses a body."""
        if self.owner != "vllm":
            return None

        def error(code: int, kind: str, param: str, message: str) -> dict:
            return {"message": message, "type": kind, "param": param, "code": code}

        if body["model"] not in self.names:
            told = f"The model `{body['model']}` does not exist. Valid aliases: {self.names[0]}."
            return error(404, "NotFoundError", "model", told)
        if (n := body.get("logprobs", 0)) > self.max_logprobs:
            told = f"Requested sample logprobs of {n}, which is greater than max allowed: "
            told += f"{self.max_logprobs} (parameter=logprobs, value={n})"
            return error(400, "BadRequestError", "logprobs", told)
        prompts = body.get("prompt", "")
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        longest = 0 if isinstance(prompts, str) else max(map(len, prompts))
        if longest > N_CTX:
            told = f"This model's maximum context length is {N_CTX} tokens. However, your prompt "
            told += f"contains {longest} input tokens"
            return error(400, "BadRequestError", "input_tokens", told)
        return None

    def answer(self, path: str, body: dict) -> dict:
        if path == "/tokenize":
            return self.tokenized(body)
        if path == "/detokenize":
            return {"prompt": self.model.text(body["tokens"])}
        if "prompt_logprobs" in body and "logprobs" not in body:
            told = [self.prompt_logprobs(prompt) for prompt in body["prompt"]]
            choices = [{"index": i, "prompt_logprobs": x} for i, x in enumerate(told)]
            return {"choices": choices[::-1]}  # in any order
        if body["prompt"] and isinstance(body["prompt"][0], list):  # as vLLM takes several
            assert self.owner == "vllm"
            answers = [self.answer(path, body | {"prompt": prompt}) for prompt in body["prompt"]]
            choices = [a["choices"][0] | {"index": i} for i, a in enumerate(answers)]
            return answers[-1] | {"choices": choices[::-1]}
        inside = self.inside(body) if "prompt_logprobs" in body else {}
        n = self.session.sync(body["prompt"])
        x = log_softmax(self.session.logits)
        best = np.argsort(-x)
        if self.owner == "llamacpp":
            assert path == "/completion"
            top = [
                {"id": int(i), "logprob": float(x[i]), "bytes": list(self.model.piece(int(i)))}
                for i in best[: body["n_probs"]]
            ]
            told = {"tokens": [top[0]["id"]], "timings": {"prompt_n": n}}
            if self.cuts_characters and "logit_bias" not in body:
                return told  # as llama.cpp's server, of a token that ends inside a character
            return told | {"completion_probabilities": [{**top[0], "top_logprobs": top}]}
        assert path == "/v1/completions"
        told = {f"token_id:{i}": float(x[i]) for i in best[: body["logprobs"]]}
        answer: dict = {"choices": [{"index": 0, "logprobs": {"top_logprobs": [told]}, **inside}]}
        if self.owner == "vllm":
            n_prompt = len(body["prompt"])
            cached = {"cached_tokens": n_prompt - n} if self.tells_cached else None
            answer["usage"] = {"prompt_tokens": n_prompt, "prompt_tokens_details": cached}
        if body.get("with_pieces"):
            ids = map(int, best[: body["logprobs"]])
            inner = {int(i) for entry in inside.get("prompt_logprobs", []) for i in entry or {}}
            pieces = {str(i): told_piece(self.model.piece(i)) for i in (*ids, *inner)}
            answer["choices"][0]["pieces"] = pieces
        if self.owner == "colm-edge":
            answer["colm"] = {"expert_tokens": n, "expert_failures": self.n_absent}
        return answer

    def tokenized(self, body: dict) -> dict:
        """Answer /tokenize in the shapes of llama.cpp's tools/server (post_tokenize), of vLLM's
        entrypoints/serve/tokenize, whose tokenizer always reads names, and of our own."""
        ours = self.owner == "llamacpp"
        special = self.owner == "vllm" or body.get("parse_special", True)
        begin = body.get("add_special" if ours else "add_special_tokens", False)
        text = body["content" if ours else "prompt"]
        ids = self.model.tokenize(text, special=special, bos=begin)
        pieces = [self.model.piece(i) or self.model.token_text(i).encode() for i in ids]
        shifted = [i + self.shift for i in ids]
        if body.get("return_token_strs"):
            return {"tokens": shifted, "token_strs": list(map(self.model.token_text, ids))}
        if body.get("with_pieces"):
            zipped = zip(shifted, pieces, strict=True)
            return {"tokens": [{"id": i, "piece": told_piece(raw)} for i, raw in zipped]}
        return {"tokens": shifted}

    def inside(self, body: dict) -> dict:
        told = self.prompt_logprobs(body["prompt"], body["prompt_logprobs"])
        first = body.get("prompt_logprobs_from", 1)
        return {"prompt_logprobs": [None] * first + told[first:]}

    def prompt_logprobs(self, tokens: list[int], n: int = 1) -> list:
        self.session.sync(tokens[:-1], range(len(tokens) - 1))
        told: list = [None]
        for i, token in enumerate(tokens[1:]):
            x = log_softmax(self.session.state(i)[0])
            entry = {}
            for j in (token, *map(int, np.argsort(-x)[:n])):
                rank = 1 + int((x > x[j]).sum())
                entry[str(j)] = {"logprob": float(x[j]), "rank": rank, "decoded_token": "?"}
            told.append(entry)
        return told


def told_piece(raw: bytes) -> str | list[int]:
    """Return a piece as llama.cpp's server tells it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits for its acknowledgement

        def setup(self) -> None:
            super().setup()
            fake.n_connections += 1

        def log_message(self, *_: object) -> None:
            pass

        def send(self, content: bytes, status: int = 200, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            fake.keys.append(self.headers.get("Authorization"))
            if self.path in ("/props", "/tokenizer_info"):
                self.send(json.dumps(fake.about).encode())
                return
            assert self.path == "/v1/models"
            self.send(json.dumps(fake.listed or fake.models()).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append((self.path, body))
            failure, refusal = "", fake.refusal(body)
            if "completion" in self.path:
                failure = fake.failures.pop(0) if fake.failures else fake.always
            if refusal is not None:
                self.send(json.dumps({"error": refusal}).encode(), refusal["code"])
            elif failure.isdigit():
                self.send(b'{"error": "as told"}', int(failure))
            elif failure == "garbage":
                self.send(b"<html>")
            elif failure == "other JSON":
                self.send(b'{"choices": [], "completion_probabilities": null}')
            elif failure == "dies":
                self.send(b'{"choi', length=1000)
                self.close_connection = True
            elif failure == "slow":
                fake.released.wait(20)
                self.close_connection = True
            else:
                with lock:
                    answer: Any = fake.answer(self.path, body)
                if "completion" in self.path:
                    answer = fake.twist(answer)
                elif "tokenize" in self.path:
                    answer = fake.twist_spelling(answer)
                self.send(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    return Handler


@contextmanager
def faking(owner: str, model: str, port: int = 0) -> Iterator[tuple[str, Fake]]:
    fake = Fake(owner, model)
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(fake))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fake
    finally:
        fake.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
        fake.session.close()
        fake.model.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
