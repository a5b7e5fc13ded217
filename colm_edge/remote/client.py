"""An expert behind HTTP: a llama.cpp server, a vLLM server or another colm-edge.

At each deferral it is sent the token ids of the whole prefix and tells the likeliest next tokens;
the server's own prefix cache makes that cheap. A scoring pass asks how likely each token of a
document is. docs/remote.md lists what is sent and read.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from colm_edge.arrays import Floats, Tokens
from colm_edge.cancel import Cancel
from colm_edge.errors import AbsentExpertError, ColmError, MismatchError, ModelError, PromptError
from colm_edge.llama.account import Account
from colm_edge.llama.model import Model
from colm_edge.llama.vocabulary import Vocabulary
from colm_edge.options import EXPERT_TIMEOUT
from colm_edge.remote.dialect import Body, Dialect, Scored, Successors
from colm_edge.remote.greeting import MALFORMED, MOST_TOKENS, greet, shown
from colm_edge.remote.http import RequestError, Server
from colm_edge.remote.logprobs import check_logprobs, likely, logits_of
from colm_edge.remote.speller import Speller
from colm_edge.remote.vocabulary import RemoteVocabulary

T = TypeVar("T")
log = logging.getLogger("colm_edge")
TRIES = 3
BACK_OFF = 0.2  # seconds before the second try, twice as many before the third
PAUSE = 30.0  # seconds that an expert which failed is left alone
LONG = 3.0  # seconds after which the user is told what the first answer waits for
SCORE_TOGETHER = 8  # documents in one request of a scoring pass


class RemoteExpert:
    """A model behind HTTP. Any thread may use it.

    url: http://host:port, or http://host:port#MODEL if the server has several models.
    is_local: whether the server runs on this machine.
    required: raise ModelError when the server fails. Otherwise AbsentExpertError is raised, and
        the base goes on alone, after a warning to `note` (the log, if None) for each cause.
    timeout: seconds that an answer may take. pause: seconds without requests after a failure.
    bridge: let its vocabulary be another than the base's; `words` is what is known of it then.

    Raises ModelError for a server of an unknown kind or without the model, and MismatchError for
    another vocabulary, with a bridge for another one than before: when it is created, and at the
    first request that is answered after the server was away.
    """

    def __init__(
        self,
        url: str,
        base: Model,
        *,
        required: bool = False,
        note: Callable[[str], None] | None = None,
        timeout: float = EXPERT_TIMEOUT,
        pause: float = PAUSE,
        bridge: bool = False,
    ) -> None:
        self._server = Server(url, timeout)
        self.url, self.is_local = self._server.name, self._server.is_local
        self.base, self.required, self.end_tokens = base, required, base.end_tokens
        self.n_ctx, self.n_shared = 2**31 - 1, base.n_vocab  # until the server tells its own
        self._note, self._pause = note or log.warning, pause
        self._dialect: Dialect | None = None
        self.model = ""
        self.words = RemoteVocabulary(Speller(self), Vocabulary(base)) if bridge else None
        self._n_ids = base.n_vocab  # ids of tokens are below this
        self.is_same: bool | None = None  # whether it has the base's vocabulary; not known yet
        self._probed: tuple[tuple[int, ...], ...] = ()  # which vocabulary it was
        self._n_vocab: int | None = None  # what it told last
        self._lock = threading.RLock()  # held where the dialect or the next four are set
        self._absent_until, self._warned = -math.inf, set[str]()
        self._n_greeted = 0
        self._not_greeted: RequestError | None = None  # how the last greeting failed, if it did
        self._is_told = False  # whether the first answer is there, or said to be waited for
        try:
            self.with_retries(self.connected)
        except AbsentExpertError:
            pass  # the user was warned; it may come up later
        except BaseException:
            self.close()
            raise

    def session(self) -> RemoteSession:
        """Return a new timeline of the model."""
        return RemoteSession(self)

    @property
    def fingerprint(self) -> str:
        """A hash that identifies the model: of its server's address and its name there."""
        self.with_retries(self.connected, required=True)
        return hashlib.sha256(f"{self._server.address} {self.model}".encode()).hexdigest()

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def ask(self, tokens: list[int]) -> tuple[Floats, int | None]:
        """Return the log-probabilities (n_vocab,) of the token after `tokens`, and how many tokens
        the server evaluated, if it tells.

        Raises AbsentExpertError when the server fails, or ModelError if it is required.
        """

        def work() -> tuple[Floats, int | None]:
            reply = self._ask(tokens, self.connected().n_probs)
            return logits_of(reply.top, self.base.n_vocab), reply.n_evaluated

        return self.with_retries(work)

    def ask_rows(self, tokens: list[int], places: Sequence[int]) -> list[Successors]:
        """Return what follows several of a text's tokens, at rising places, the last of which is
        the last token. Raises what `ask` raises."""

        def work() -> list[Successors]:
            dialect = self.connected()
            if dialect.rows is None:
                return [self._ask(tokens[: at + 1], dialect.n_probs) for at in places]
            self._check_length(tokens)
            read, n = dialect.rows.read, dialect.n_probs
            body = dialect.rows.ask(self.model, tokens, places, n)
            return self.read(
                dialect,
                body,
                lambda answer: [self._checked(one, n) for one in read(answer, places)],
            )

        return self.with_retries(work)

    def _ask(self, tokens: list[int], n_probs: int) -> Successors:
        dialect = self.connected()
        self._check_length(tokens)
        body = dialect.ask(self.model, tokens, n_probs)
        return self.read(dialect, body, lambda answer: self._checked(dialect.read(answer), n_probs))

    def _checked(self, reply: Successors, n_probs: int) -> Successors:
        """Return a server's reply without ids that no token has, and learn what it spells.
        Raises ValueError for what cannot be."""
        n = reply.n_evaluated
        if n is not None and not 0 <= n < 2**31:
            raise ValueError(f"{n} tokens evaluated")
        if len(reply.top) > n_probs + 1:  # with the token that is there, or was picked
            raise ValueError(f"{len(reply.top)} likely tokens, and {n_probs} were asked for")
        if self.words is not None and not self.is_same:
            self.words.learn(reply.pieces.items())
        return reply._replace(top=likely(reply.top, self._n_ids))

    def read(
        self, dialect: Dialect, body: Body | None, read: Callable[[Any], T], path: str = ""
    ) -> T:
        """Return what `read` makes of the answer to a request, a GET if there is no body. path: if
        not the dialect's. Raises RequestError."""
        answer = self._server.request(path or dialect.path, body)
        try:
            done = read(answer)
        except MALFORMED as e:
            message = f"its answer is not {dialect.name}'s ({shown(e)})"
            raise RequestError(message, "malformed") from e
        self._is_told = True
        return done

    def score(self, documents: Sequence[Tokens], starts: Sequence[int]) -> Iterator[Scored]:
        """Yield how likely the tokens of each document are to the model, from token `start` on.

        starts: at least 1 each. Raises ModelError when the server fails.
        """
        dialect = self.with_retries(self.connected, required=True)
        spans = [document.tolist() for document in documents]
        if dialect.scoring is None:
            for span, start in zip(spans, starts, strict=True):
                yield self._score_by_token(span, start, dialect.n_probs)
            return
        for i in range(0, len(spans), SCORE_TOGETHER):
            some = slice(i, i + SCORE_TOGETHER)
            yield from self.with_retries(
                partial(self._score, spans[some], starts[some]), required=True
            )

    def _score(self, documents: list[list[int]], starts: Sequence[int]) -> list[Scored]:
        dialect = self.connected()
        assert dialect.scoring is not None
        for document in documents:
            self._check_length(document)
        body, read = dialect.scoring.ask(self.model, documents), dialect.scoring.read

        def read_checked(answer: Any) -> list[Scored]:
            scored = read(answer, documents, starts)
            for logprobs, _ in scored:
                check_logprobs(logprobs)
            return scored

        return self.read(dialect, body, read_checked)

    def _score_by_token(self, document: list[int], start: int, few: int) -> Scored:
        """Ask what follows every prefix; the server's cache makes that one token each."""
        logprobs, right = list[float](), list[bool]()
        for at in range(start, len(document)):
            token, prefix = document[at], document[:at]
            for n_probs in (few, self.n_shared):  # all, if the few likeliest lack the token
                ask = partial(self._ask, prefix, n_probs)
                top = self.with_retries(ask, required=True).top
                if token in top:
                    break
            logprobs.append(top.get(token, -math.inf))
            right.append(token == max(top, key=top.__getitem__))
        return logprobs, right

    def _check_length(self, tokens: list[int]) -> None:
        if len(tokens) > self.n_ctx:
            message = f"{len(tokens)} tokens do not fit its {self.n_ctx}"
            raise RequestError(message, "length", final=True)

    def connected(self) -> Dialect:
        """Return the server's dialect, learnt at the first request that it answers, and again
        after it was away: it may have come back with another model."""
        n = self._n_greeted
        with self._lock:
            if self._dialect is None and self._n_greeted != n and self._not_greeted is not None:
                raise self._not_greeted.again()  # to whoever asked while this one waited
            return self._dialect or self._connect()

    def _connect(self) -> Dialect:
        """Find out the server's dialect, and whether it has the base's vocabulary."""
        self._not_greeted = None
        try:
            greeting = greet(self._server, self.base)
        except RequestError as e:
            self._not_greeted = e
            raise
        finally:
            self._n_greeted += 1
        what = f"the vocabularies of {self.base.path.name} and {self.url} differ: "
        if greeting.difference and self.words is None:
            raise MismatchError(f"{what}{greeting.difference}; use two of one family, or --bridge")
        told = {greeting.n_vocab, self._n_vocab} - {None}  # a server that loads tells none yet
        if (self._probed and greeting.probed != self._probed) or len(told) > 1:
            raise MismatchError(f"{self.url} came back with another vocabulary; start again")
        self.is_same, self._probed = not greeting.difference, greeting.probed
        self._n_vocab = greeting.n_vocab or self._n_vocab
        n_vocab = self.base.n_vocab
        self.n_shared = min(greeting.n_vocab or n_vocab, n_vocab) if self.is_same else n_vocab
        self._n_ids = n_vocab if self.is_same else greeting.n_vocab or MOST_TOKENS
        self.n_ctx = (greeting.n_ctx or 2**31 - 1) - greeting.dialect.n_answer
        self.model, self._dialect = greeting.model, greeting.dialect
        return greeting.dialect

    def with_retries(
        self, work: Callable[[], T], *, required: bool = False, settles: bool = True
    ) -> T:
        """Return the result of `work`, tried again after a pause where that may help.

        settles: whether success ends an outage, after which warnings are given anew.

        Raises what `ask` raises; after AbsentExpertError the server is left alone for a while.
        """
        required = required or self.required
        with self._announced():
            for n in range(1, TRIES + 1):
                if not required and time.monotonic() < self._absent_until:
                    raise AbsentExpertError(f"{self.url}: the expert did not answer a moment ago")
                try:
                    done = work()
                except RequestError as e:
                    if e.final or n == TRIES:
                        raise self._failed(e, required) from e
                    time.sleep(BACK_OFF * 2 ** (n - 1))
                else:
                    if settles:
                        self._warned = set()
                    return done
        raise AssertionError

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Say what is waited for, if the server's first answer takes long: some compile then."""

        def tell() -> None:
            if not self._is_told:
                self._is_told = True
                self._note(f"waiting for the expert's server, {self.url} …")

        timer = None if self._is_told else threading.Timer(LONG, tell)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _failed(self, e: RequestError, required: bool) -> ColmError:
        """Return what to raise for the last try; if it is not required, warn once of each cause in
        an outage."""
        if e.final:
            what, cure = f"{self.url}: the expert refuses: {e}", ""
        else:
            what = f"{self.url}: the expert does not answer: {e}"
            cure = "; start it, or check the address"
        is_away = not e.final
        with self._lock:
            if is_away or e.cause == "HTTP 404":  # what comes back may be another model
                self._dialect = None
            if required:
                return ModelError(what + cure)
            if is_away:  # a refusal says nothing about the next request
                self._absent_until = time.monotonic() + self._pause
            is_new = e.cause not in self._warned
            self._warned.add(e.cause)
        if is_new:
            # As errors are told: in one line, and nothing that a terminal would obey.
            self._note(str(AbsentExpertError(f"{what}; the base goes on alone")))
        return AbsentExpertError(what)


class _Outcome(NamedTuple):
    """What a server told, and the seconds that it took; or what went wrong."""

    logits: Floats
    n_evaluated: int | None
    seconds: float
    error: Exception | None = None


class RemoteSession:
    """One timeline of a remote expert, with the methods of a local one.

    The server keeps what it has evaluated in its own cache; nothing is held here but the last
    answer, and the one that is under way.
    """

    def __init__(self, expert: RemoteExpert) -> None:
        self.expert = expert
        self.account = Account()
        self._held, self._logits = array("i"), np.empty(0, np.float32)
        self._begun: tuple[array[int], Future[_Outcome]] | None = None

    @property
    def name(self) -> str:
        """The server's address."""
        return self.expert.url

    @property
    def fingerprint(self) -> str:
        return self.expert.fingerprint

    @property
    def end_tokens(self) -> frozenset[int]:
        return self.expert.end_tokens

    @property
    def n_ctx(self) -> int:
        return self.expert.n_ctx

    @property
    def n_shared(self) -> int:
        """Tokens that both vocabularies have."""
        return self.expert.n_shared

    def open(self, cancel: Cancel | None = None) -> None:
        """Do nothing: the client connects when it is created, or at the first request."""

    def forget(self) -> None:
        """Forget the last answer, so that the next `sync` asks in any case."""
        self._held = array("i")

    def follow(self, tokens: Sequence[int]) -> None:
        """Do nothing: a server is asked only for what is needed."""

    def close(self) -> None:
        """Close the client, and with it the other timelines of the expert."""
        self.expert.close()

    def begin(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> Future[_Outcome]:
        """Begin to ask, and return at once; `sync` of the same tokens waits for the answer. An
        answer that nobody waits for is dropped."""
        wanted, reply = array("i", tokens), Future[_Outcome]()
        self._check(wanted, outputs)
        self._begun = wanted, reply
        if wanted == self._held:  # `sync` has nothing to ask
            reply.set_result(_Outcome(self._logits, 0, 0.0))
            return reply
        # Not a pool's thread: the process may end while a server does not answer.
        threading.Thread(
            target=lambda: reply.set_result(self._ask(wanted)), name="colm-edge-ask", daemon=True
        ).start()
        return reply

    def turn_to(self, prompt: array[int]) -> None:
        """Do nothing: what a server keeps of earlier prompts is its own affair."""

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        """Ask what follows `tokens`; return how many of them the server evaluated, 0 if it does
        not tell.

        outputs: nothing, or the last token's position. cancel: ends the wait, not the request.
        Raises what `RemoteExpert.ask` raises.
        """
        wanted = array("i", tokens)
        self._check(wanted, outputs)
        begun, self._begun = self._begun, None
        if wanted == self._held:
            return 0
        if begun is None or begun[0] != wanted:
            begun, self._begun = (wanted, self.begin(tokens)), None
        reply = (cancel or Cancel()).wait_for(begun[1])
        self.account += Account(0, 0, reply.seconds)
        if reply.error is not None:
            raise reply.error
        self._held, self._logits = wanted, reply.logits
        self.account += Account(reply.n_evaluated, 1)
        return reply.n_evaluated or 0

    def _check(self, tokens: array[int], outputs: Sequence[int]) -> None:
        if not tokens:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if list(outputs) not in ([], [len(tokens) - 1]):
            raise ColmError(
                "an expert on a server tells only what follows the last token, and outputs of "
                "earlier ones are wanted; give a GGUF file (-me)"
            )

    def _ask(self, wanted: array[int]) -> _Outcome:
        begun = time.perf_counter()
        try:
            logits, n_evaluated = self.expert.ask(wanted.tolist())
        except Exception as e:  # a server may fail, which takes time as well
            return _Outcome(np.empty(0, np.float32), None, time.perf_counter() - begun, e)
        return _Outcome(logits, n_evaluated, time.perf_counter() - begun)

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return (logits, nothing) after token i of the last `sync`, its last one."""
        assert i == len(self._held) - 1
        return self._logits, np.empty(0, np.float32)
