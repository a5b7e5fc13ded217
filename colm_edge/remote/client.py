"""An expert behind HTTP: a llama.cpp server, a vLLM server or another colm-edge.

It is asked with the token ids of the whole prefix for the last token's most likely successors, one
request for each deferral; the server's own prefix cache makes that cheap. A scoring pass asks how
likely each token of a document was. docs/remote.md has what is sent and read.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from colm_edge.cancel import Cancel
from colm_edge.errors import (
    AbsentExpertError,
    ColmError,
    MismatchError,
    ModelError,
    PromptError,
)  # fmt: skip
from colm_edge.llama.model import MAX_VOCAB_DIFFERENCE, Model
from colm_edge.llama.session import common_prefix
from colm_edge.remote.dialects import DIALECTS, N_PROBS, Dialect, Reply, Scored, _read_scores

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
log = logging.getLogger("colm_edge")
TIMEOUT = 60.0  # seconds that an answer may take
CONNECT_TIMEOUT = 5.0
TRIES = 3
BACK_OFF = 0.2  # seconds before the second try, twice as many before the third
PAUSE = 30.0  # seconds that an expert which failed is left alone
SCORE_TOGETHER = 8  # documents in one request of a scoring pass
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


class RemoteExpert:
    """A model behind HTTP: `session` asks it token by token, `score` about documents. Any thread
    may use it.

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
        if not parsed.host or not 0 < (parsed.port or 80) < 1 << 16:
            raise ModelError(f"{url}: no address; expected http://host:port")
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/").removesuffix("/v1")
        self.base, self.required, self.end_tokens = base, required, base.end_tokens
        self.n_ctx, self.n_shared = 2**31 - 1, base.n_vocab  # until the server tells
        self._note, self._pause = note or log.warning, pause
        self._dialect: Dialect | None = None
        self._model = ""
        self._lock = threading.RLock()  # around what follows
        self._absent_until, self._warned = -math.inf, False
        key = os.environ.get(KEY_VARIABLE, "")
        if not (key.isascii() and key.isprintable()):
            raise ModelError(f"the variable {KEY_VARIABLE} holds what no key has: {key!r}")
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            auth=(parsed.username, parsed.password) if parsed.userinfo else None,
        )
        try:
            self._with_patience(self._dialect_of)
        except AbsentExpertError:
            pass  # it was said; perhaps it comes up later
        except BaseException:
            self.close()
            raise

    def session(self) -> RemoteSession:
        """Return a new timeline of the model."""
        return RemoteSession(self)

    @property
    def fingerprint(self) -> str:
        """What tells this model from others: its server's address and its name there."""
        self._with_patience(self._dialect_of, required=True)
        return hashlib.sha256(f"{self.url} {self._model}".encode()).hexdigest()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, tokens: list[int]) -> tuple[Floats, int | None]:
        """Return what follows `tokens` as log-probabilities (n_vocab,), and how many of them were
        evaluated, if told.

        Raises AbsentExpertError when the server fails, or ModelError where it is required.
        """

        def work() -> tuple[Floats, int | None]:
            top, n_evaluated = self._ask(tokens, N_PROBS)
            try:
                return logits_of(top, self.base.n_vocab), n_evaluated
            except ValueError as e:
                raise _TryError(str(e)) from e

        return self._with_patience(work)

    def _ask(self, tokens: list[int], n_probs: int) -> Reply:
        dialect = self._dialect_of()
        self._check_length(tokens)
        answer = self._request(dialect.path, dialect.ask(self._model, tokens, n_probs))
        try:
            return dialect.read(answer)
        except _GARBAGE as e:
            raise _TryError(f"its answer is not {dialect.name}'s ({e!r})") from e

    def score(
        self, documents: Sequence[npt.NDArray[np.int32]], starts: Sequence[int]
    ) -> Iterator[Scored]:
        """Yield for each document what the model says of its tokens from `start`, at least 1, on.

        Raises ModelError when the server fails.
        """
        dialect = self._with_patience(self._dialect_of, required=True)
        spans = [document.tolist() for document in documents]
        if dialect.ask_scores is None:
            for span, start in zip(spans, starts, strict=True):
                yield self._score_by_token(span, start)
            return
        for i in range(0, len(spans), SCORE_TOGETHER):
            some = slice(i, i + SCORE_TOGETHER)
            yield from self._with_patience(
                partial(self._score, spans[some], starts[some]), required=True
            )

    def _score(self, documents: list[list[int]], starts: Sequence[int]) -> list[Scored]:
        dialect = self._dialect_of()
        assert dialect.ask_scores is not None
        for document in documents:
            self._check_length(document)
        answer = self._request(dialect.path, dialect.ask_scores(self._model, documents))
        try:
            told = {int(choice["index"]): choice["prompt_logprobs"] for choice in answer["choices"]}
            return [
                _read_scores(told[i], document, start)
                for i, (document, start) in enumerate(zip(documents, starts, strict=True))
            ]
        except _GARBAGE as e:
            raise _TryError(f"its answer is not {dialect.name}'s ({e!r})") from e

    def _score_by_token(self, document: list[int], start: int) -> Scored:
        """Ask for the successors of every prefix: one evaluated token each, with a prefix cache."""
        logprobs, right = list[float](), list[bool]()
        for at in range(start, len(document)):
            token, prefix = document[at], document[:at]
            for n_probs in (N_PROBS, self.n_shared):  # if not among the likeliest, among all
                ask = partial(self._ask, prefix, n_probs)
                top, _ = self._with_patience(ask, required=True)
                if token in top:
                    break
            logprobs.append(top.get(token, -math.inf))
            right.append(token == max(top, key=top.__getitem__))
        return logprobs, right

    def _check_length(self, tokens: list[int]) -> None:
        if len(tokens) > self.n_ctx:
            raise _TryError(f"{len(tokens)} tokens do not fit its {self.n_ctx}", final=True)

    def _dialect_of(self) -> Dialect:
        with self._lock:
            return self._dialect or self._connect()

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

    def _with_patience(self, work: Callable[[], T], *, required: bool = False) -> T:
        """Try up to three times, waiting longer each time; then leave the server alone a while,
        or, where it is required, raise ModelError."""
        required = required or self.required
        if not required and time.monotonic() < self._absent_until:
            raise AbsentExpertError(f"{self.url}: the expert was absent a moment ago")
        for n in range(TRIES):
            try:
                done = work()
                break
            except _TryError as e:
                if not e.final and n + 1 < TRIES:
                    time.sleep(BACK_OFF * 2**n)
                    continue
                if e.final:
                    what, cure = f"{self.url}: the expert refuses: {e}", ""
                else:
                    what = f"{self.url}: the expert does not answer: {e}"
                    cure = "; start it, or check the address"
                if required:
                    raise ModelError(what + cure) from e
                with self._lock:
                    if not e.final:  # what it refuses one request says nothing of the next
                        self._absent_until = time.monotonic() + self._pause
                    warned, self._warned = self._warned, True
                if not warned:
                    self._note(f"{what}; the base goes on alone")
                raise AbsentExpertError(what) from e
        self._warned = False
        return done

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON that a GET, or a POST of a body, is answered with."""
        method = "GET" if body is None else "POST"
        try:
            response = self._client.request(method, self.url + path, json=body)
        except (self._httpx.HTTPError, UnicodeError) as e:
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


class RemoteSession:
    """One timeline of a remote expert, with a session's `sync` and `state`."""

    def __init__(self, expert: RemoteExpert) -> None:
        self.expert = expert
        self.name = expert.url
        self.n_evaluated = self.n_calls = 0
        self.seconds = self.load_seconds = 0.0
        self._held, self._logits = array("i"), np.empty(0, np.float32)

    @property
    def n_ctx(self) -> int:
        return self.expert.n_ctx

    @property
    def fingerprint(self) -> str:
        return self.expert.fingerprint

    @property
    def end_tokens(self) -> frozenset[int]:
        return self.expert.end_tokens

    def open(self, cancel: Cancel | None = None) -> None:
        pass

    def follow(self, tokens: array[int]) -> None:
        pass

    def close(self) -> None:
        self.expert.close()

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        """Ask for the successors of `tokens`; return how many of them the server evaluated.

        outputs: the last token alone can be one. Raises what `RemoteExpert.ask` does.
        """
        if not tokens:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if list(outputs) not in ([], [len(tokens) - 1]):
            raise ColmError(
                "an expert on a server tells what follows the last token, and not what it says of "
                "earlier ones; give a GGUF file (-me)"
            )
        wanted = array("i", tokens)
        if wanted == self._held:
            return 0
        begun = time.perf_counter()
        try:
            self._logits, n_evaluated = self.expert.ask(wanted.tolist())
        finally:
            self.seconds += time.perf_counter() - begun
        if n_evaluated is None:  # it has the last prefix cached
            n_evaluated = len(wanted) - common_prefix(self._held, wanted)
        self._held = wanted
        self.n_calls += 1
        self.n_evaluated += n_evaluated
        return n_evaluated

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return (logits, nothing) after token i of the last `sync`, its last one."""
        assert i == len(self._held) - 1
        return self._logits, np.empty(0, np.float32)


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
