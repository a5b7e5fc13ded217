"""An expert behind HTTP: a llama.cpp server, a vLLM server or another colm-edge.

It is asked with the token ids of the whole prefix for the last token's most likely successors, one
request for each deferral; the server's own prefix cache makes that cheap. docs/remote.md has what
is sent and read.
"""

from __future__ import annotations

import logging
import math
import os
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from colm_edge.errors import AbsentExpertError, MismatchError, ModelError, PromptError
from colm_edge.session import common_prefix
from colm_edge.weights import MAX_VOCAB_DIFFERENCE, Model

Floats = npt.NDArray[np.float32]

log = logging.getLogger("colm_edge")

TIMEOUT = 60.0  # seconds that an answer may take
CONNECT_TIMEOUT = 5.0
TRIES = 3
BACK_OFF = 0.2  # seconds before the second try, twice as many before the third
PAUSE = 30.0  # seconds that an expert which failed is left alone
N_PROBS = 64  # of llama.cpp: more than the usual top_k of 40 reads
N_PROBS_VLLM = 20  # what it allows unless told otherwise (--max-logprobs)
KEY_VARIABLE = "COLM_EDGE_EXPERT_KEY"

# Tokenised on both sides, besides words of the base's vocabulary.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, 3.14159 and 1,000,000; (a+b)^2 = a^2 + 2ab + b^2!",
    "def f(x):\n    return [i ** 2 for i in range(x)]\n\n\tprint(f(10))",
    "Größe, señor, déjà vu — naïve “quotes” … 中文 русский العربية 😀",
)

# What reading an answer of another shape raises.
_GARBAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError)


class _TryError(Exception):
    """A request came to nothing; `final` where another try would as well."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


# The likeliest next tokens, id -> log-probability, and the tokens evaluated, if told.
Reply = tuple[dict[int, float], int | None]


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked.

    ask: (model, token ids) -> body of a request to `path`; read: (its answer, the id that ends a
        text) -> Reply.
    tokenize: (model, text) -> body of a request to /tokenize, whose answer holds `tokens`.
    """

    name: str
    path: str
    ask: Callable[[str, list[int]], dict[str, Any]]
    read: Callable[[Any, int], Reply]
    tokenize: Callable[[str, str], dict[str, Any]]


def _ask_llama_cpp(model: str, tokens: list[int]) -> dict[str, Any]:
    return {
        "prompt": tokens, "n_predict": 1, "n_probs": N_PROBS, "temperature": 0,
        "cache_prompt": True, "return_tokens": True, "stream": False,
    }  # fmt: skip


def _read_llama_cpp(answer: Any, end_token: int) -> Reply:
    items = answer["completion_probabilities"][0]["top_logprobs"]
    top = {int(item["id"]): float(item["logprob"]) for item in items}
    return top, int(answer["timings"]["prompt_n"])


def _ask_vllm(model: str, tokens: list[int]) -> dict[str, Any]:
    return {
        "model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0,
        "logprobs": N_PROBS_VLLM, "return_tokens_as_token_ids": True, "stream": False,
    }  # fmt: skip


def _read_vllm(answer: Any, end_token: int) -> Reply:
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): float(x) for name, x in top.items()}, None


def _ask_colm_edge(model: str, tokens: list[int]) -> dict[str, Any]:
    # Its expert alone, whatever the server's own defaults are.
    return {
        "model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "repeat_penalty": 1,
        "logprobs": 1, "colm": {"threshold": 0, "strategy": "defer", "trace": True},
        "stream": False,
    }  # fmt: skip


def _read_colm_edge(answer: Any, end_token: int) -> Reply:
    choice, colm = answer["choices"][0], answer["colm"]
    top = {end_token: 0.0}  # which is no part of an answer, so that nothing tells its probability
    if colm["trace"] or choice["finish_reason"] != "stop":
        top = {int(colm["trace"][0]["id"]): float(choice["logprobs"]["token_logprobs"][0])}
    return top, int(colm["expert_tokens"])


def _tokenize_openai(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "prompt": text, "add_special_tokens": False}


# By what a server's list of models says of their owner.
DIALECTS = {
    "llamacpp": Dialect(
        "llama.cpp", "/completion", _ask_llama_cpp, _read_llama_cpp,
        lambda _, text: {"content": text, "add_special": False, "parse_special": False},
    ),
    "vllm": Dialect("vLLM", "/v1/completions", _ask_vllm, _read_vllm, _tokenize_openai),
    "colm-edge": Dialect(
        "colm-edge", "/v1/completions", _ask_colm_edge, _read_colm_edge, _tokenize_openai
    ),
}  # fmt: skip


class RemoteExpert:
    """A model and its timeline behind HTTP, with a session's `sync` and `state`.

    required: raise ModelError when the server fails; otherwise AbsentExpertError, which a decoder
        answers by letting the base go on alone, after one warning to `note` (the log, if None).

    Raises ModelError for a server of an unknown kind and MismatchError for another vocabulary,
    when it is made, or at the first request where nobody answers until then.
    """

    def __init__(
        self,
        url: str,
        base: Model,
        *,
        required: bool = False,
        note: Callable[[str], None] | None = None,
        timeout: float = TIMEOUT,
        pause: float = PAUSE,
    ) -> None:
        self._httpx = httpx = import_httpx()
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as e:
            raise ModelError(f"{url}: {e}; expected http://host:port") from e
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/").removesuffix("/v1")
        self.base, self.required, self.end_tokens = base, required, base.end_tokens
        self.n_ctx, self.n_shared = 2**31 - 1, base.n_vocab  # until the server tells
        self.n_evaluated = self.n_calls = 0
        self.seconds = self.load_seconds = 0.0
        self._note, self._pause = note or log.warning, pause
        self._dialect: Dialect | None = None
        self._model = ""
        self._held, self._logits = array("i"), np.empty(0, np.float32)
        self._absent_until, self._warned = -math.inf, False
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            auth=(parsed.username, parsed.password) if parsed.userinfo else None,
        )
        try:
            self._with_patience(self._connect)
        except AbsentExpertError:
            pass  # it was said; perhaps it comes up later
        except BaseException:
            self.close()
            raise

    def sync(self, tokens: Sequence[int], outputs: Sequence[int] = ()) -> int:
        """Ask for the successors of `tokens`; return how many of them the server evaluated.

        outputs: the last token alone can be one.
        """
        if not tokens:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if list(outputs) not in ([], [len(tokens) - 1]):
            raise ValueError(f"a remote expert tells of the last token, not of {list(outputs)}")
        wanted = array("i", tokens)
        if wanted == self._held:
            return 0
        before, begun = self.n_evaluated, time.perf_counter()
        try:
            self._with_patience(lambda: self._evaluate(wanted))
        finally:
            self.seconds += time.perf_counter() - begun
        return self.n_evaluated - before

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return (logits, nothing) after token i of the last `sync`, its last one."""
        assert i == len(self._held) - 1
        return self._logits, np.empty(0, np.float32)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _evaluate(self, tokens: array[int]) -> None:
        dialect = self._dialect or self._connect()
        if len(tokens) > self.n_ctx:
            raise _TryError(f"{len(tokens)} tokens do not fit its {self.n_ctx}", final=True)
        answer = self._request(dialect.path, dialect.ask(self._model, tokens.tolist()))
        try:
            top, n_evaluated = dialect.read(answer, self.base.end_token)
            self._logits = logits_of(top, self.base.n_vocab)
        except _GARBAGE as e:
            raise _TryError(f"its answer is not {dialect.name}'s ({e!r})") from e
        if n_evaluated is None:  # it has the last prefix cached
            n_evaluated = len(tokens) - common_prefix(self._held, tokens)
        self._held = tokens
        self.n_calls += 1
        self.n_evaluated += n_evaluated

    def _connect(self) -> Dialect:
        """Learn what kind of server it is and whether it has the base's vocabulary."""
        listed = self._request("/v1/models")
        try:
            entry = listed["data"][0]
            owner, model, meta = entry.get("owned_by"), str(entry["id"]), entry.get("meta") or {}
            n_vocab = int(meta.get("n_vocab") or self.base.n_vocab)
            n_ctx = int(entry.get("max_model_len") or meta.get("n_ctx") or self.n_ctx)
        except _GARBAGE as e:
            raise _TryError(f"its list of models is garbage ({e!r})") from e
        dialect = DIALECTS.get(owner)
        if dialect is None:
            raise ModelError(
                f"{self.url}: a server of {owner!r}; expected one of {', '.join(DIALECTS)}"
            )
        self._model = model
        difference = self._difference(dialect, n_vocab)
        if difference:
            raise MismatchError(
                f"the vocabularies of {self.base.path.name} and {self.url} differ: {difference}; "
                "the two must come from one model family"
            )
        self.n_shared = min(n_vocab, self.base.n_vocab)
        # The token that is asked for needs room too.
        self.n_ctx = n_ctx if dialect.name == "colm-edge" else n_ctx - 1
        self._dialect = dialect
        return dialect

    def _difference(self, dialect: Dialect, n_vocab: int) -> str:
        """Say where the two vocabularies differ; "" where they do not."""
        base = self.base
        if abs(base.n_vocab - n_vocab) > MAX_VOCAB_DIFFERENCE:
            most = f"at most {MAX_VOCAB_DIFFERENCE} more or fewer"
            return f"{base.n_vocab} tokens in the base, {n_vocab} in the expert ({most})"
        for text in (*PROBES, probe_words(base)):
            ours = base.tokenize(text, special=False, bos=False)
            answer = self._request("/tokenize", dialect.tokenize(self._model, text))
            try:
                theirs = [int(token) for token in answer["tokens"]]
            except _GARBAGE as e:
                raise _TryError(f"its /tokenize answers garbage ({e!r})") from e
            if ours != theirs:
                at = common_prefix(array("i", ours), array("i", theirs))
                cut = text if len(text) < 60 else text[:57] + "…"
                one, other = (str(*ids[at : at + 1]) or "missing" for ids in (ours, theirs))
                return f"token {at} of {cut!r} is {one} in the base, {other} in the expert"
        return ""

    def _with_patience(self, work: Callable[[], object]) -> None:
        """Try up to three times, waiting longer each time; then leave the server alone a while."""
        if time.monotonic() < self._absent_until:
            raise AbsentExpertError(f"{self.url}: the expert was absent a moment ago")
        for n in range(TRIES):
            try:
                work()
                break
            except _TryError as e:
                if not e.final and n + 1 < TRIES:
                    time.sleep(BACK_OFF * 2**n)
                    continue
                what = f"{self.url}: the expert does not answer: {e}"
                if self.required:
                    raise ModelError(f"{what}; start it, or check the address") from e
                self._absent_until = time.monotonic() + self._pause
                if not self._warned:
                    self._warned = True
                    self._note(f"{what}; the base goes on alone")
                raise AbsentExpertError(what) from e
        self._warned = False

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON that a GET, or a POST of a body, is answered with."""
        method = "GET" if body is None else "POST"
        try:
            response = self._client.request(method, self.url + path, json=body)
        except self._httpx.HTTPError as e:
            raise _TryError(f"{path}: {str(e) or type(e).__name__}") from e
        if response.status_code != 200:
            busy = response.status_code >= 500 or response.status_code in (408, 429)
            told = " ".join(response.text[:200].split())
            if response.status_code in (401, 403):
                told += f" (the variable {KEY_VARIABLE} is to hold its key)"
            raise _TryError(f"{path}: HTTP {response.status_code}: {told}", final=not busy)
        try:
            return response.json()
        except ValueError as e:
            raise _TryError(f"{path}: its answer is no JSON") from e


def logits_of(top: Mapping[int, float], n_vocab: int) -> Floats:
    """Return log-probabilities (n_vocab,): those given, and what is left shared evenly."""
    known = {token: x for token, x in top.items() if 0 <= token < n_vocab}
    if not known or any(math.isnan(x) or x > 1e-3 for x in known.values()):
        raise ValueError(f"no log-probabilities of tokens below {n_vocab}: {top}")
    left = 1 - math.fsum(math.exp(x) for x in known.values())
    n_others = n_vocab - len(known)
    # Rounded sums are off by about 1e-6: less than that is nothing left.
    rest = math.log(left / n_others) if left > 1e-6 and n_others else -math.inf
    logits = np.full(n_vocab, rest, np.float32)
    logits[list(known)] = list(known.values())
    return logits


def probe_words(base: Model) -> str:
    """Return plain words from all over the base's vocabulary, which no two vocabularies share."""
    tokens = range(0, base.n_vocab, max(1, base.n_vocab // 1000))
    pieces = [base.piece(token).decode("utf-8", "replace").strip() for token in tokens]
    return " ".join(piece for piece in pieces if piece.isascii() and piece.isalpha())


def import_httpx() -> Any:
    """Return httpx. Raises ModelError with the cure where it is missing."""
    try:
        import httpx
    except ModuleNotFoundError as e:
        raise ModelError(
            "a remote expert needs httpx; install the extra: pip install 'colm-edge[remote]'"
        ) from e
    return httpx
