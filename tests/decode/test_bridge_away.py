"""An expert on a server that has another vocabulary writes what the same expert here writes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from reference import log_softmax
from scripted import reader
from spellings import MARK, Speaker, Spellings
from test_bridge import END

from colm_edge.decode.bridge import Bridge
from colm_edge.decode.bridge_away import BridgeAway
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.decode.spelling import Crossing
from colm_edge.errors import AbsentExpertError
from colm_edge.llama.vocabulary import runs_of
from colm_edge.remote.dialect import Dialect, Successors
from colm_edge.remote.greeting import DIALECTS
from colm_edge.remote.http import RequestError
from colm_edge.remote.rows import RowsSession
from colm_edge.remote.speller import Speller
from colm_edge.remote.vocabulary import RemoteVocabulary

# All bytes but those that no text has: a server cannot be asked for their tokens.
BYTES = [bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # a minute of it saves none
LETTERS = sorted({bytes([byte]) for byte in "ab é€😀".encode()} | {b"\x80"})


class Words(Spellings):
    """A vocabulary that spells what is no text in single bytes, as a server is asked to."""

    def first(self, raw: bytes) -> int | None:
        return super().first(raw[:5])  # none is longer

    def encode(self, raw: bytes) -> list[int]:
        tokens: list[int] = []
        for run, text in runs_of(raw):
            if text is None:
                tokens += [self._ids[run[i : i + 1]] for i in range(len(run))]
            else:
                at = 0
                while at < len(run):
                    tokens.append(self.first(run[at : at + 5]))
                    at += len(self.piece(tokens[-1]))
        return tokens


def all_bytes(draw: random.Random, n: int, *, texts: bool = False, **more: Any) -> Words:
    """texts: whether the longer pieces are whole characters."""
    longer = sorted({b"".join(draw.choices(LETTERS, k=draw.randint(2, 5))) for _ in range(n)})
    pieces = [*BYTES, *(piece for piece in longer if not texts or is_text(piece))]
    draw.shuffle(pieces)
    return Words(pieces, **more)


class Served:
    """An expert behind a dialect: what is asked is answered in the shapes of its server, as JSON.

    It tells all log-probabilities, or the n likeliest. requests: paths and bodies.
    """

    def __init__(self, speaker: Speaker, ours: Spellings, owner: str, n: int | None = None) -> None:
        self.speaker, self.n = speaker, n
        self.dialect: Dialect = DIALECTS[owner]
        self.model, self.is_same = "m", False
        self.base = None
        self.n_ctx = speaker.n_ctx
        self.words = RemoteVocabulary(Speller(self), ours)  # type: ignore[arg-type]
        self.requests: list[tuple[str, dict]] = []
        self.prefixes: list[tuple[int, ...]] = []  # that were evaluated
        self.n_failures = 0

    def connected(self) -> Dialect:
        return self.dialect

    def with_retries(self, work: Callable[[], Any], *, settles: bool = True) -> Any:
        try:
            if self.n_failures:
                self.n_failures -= 1
                raise RequestError("as told", "500")
            return work()
        except RequestError as e:
            raise AbsentExpertError(str(e)) from e

    def read(self, dialect: Any, body: Any, read: Callable[[Any], Any], path: str = "") -> Any:
        self.requests.append((path or dialect.path, body))
        return read(json.loads(json.dumps(self.answer(path, body))))

    def answer(self, path: str, body: Any) -> Any:
        words = self.speaker.words
        if body is None:
            return {"eos_token": END}
        if path == "/detokenize":
            named = [words.piece(t) or words.name(t).encode() for t in body["tokens"]]
            return {"prompt": b"".join(named).decode("utf-8", "replace")}
        text = body.get("content", body.get("prompt"))
        special = body.get("parse_special", self.dialect.owner == "vllm")
        tokens = []
        names = [words.name(t) for t in range(words.n_vocab) if not words.piece(t)]
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if special else [text]
        for part in parts:
            token = words.control(part) if special else None
            tokens += words.encode(part.encode()) if token is None else [token]
        if body.get("add_special", body.get("add_special_tokens")) and words.begin is not None:
            tokens.insert(0, words.begin)
        if "return_token_strs" in body:
            return {"tokens": tokens, "token_strs": list(map(self.byte_name, tokens))}
        raws = [words.piece(t) or words.name(t).encode() for t in tokens]
        pairs = zip(tokens, map(told, raws), strict=True)
        return {"tokens": [{"id": token, "piece": piece} for token, piece in pairs]}

    def byte_name(self, token: int) -> str:
        from colm_edge.remote.byte_names import BYTES as NAMES

        characters = {byte: c for c, byte in NAMES.items()}
        raw = self.speaker.words.piece(token)
        return "".join(characters[b] for b in raw) or self.speaker.words.name(token)

    def ask_rows(self, tokens: list[int], places: Sequence[int]) -> list[Successors]:
        def work() -> list[Successors]:
            self.requests.append((self.dialect.path, {}))
            return [self.reply(tuple(tokens[: at + 1])) for at in places]

        replies = self.with_retries(work)
        for reply in replies:
            self.words.learn(reply.pieces.items())
        return replies

    def reply(self, prefix: tuple[int, ...]) -> Successors:
        self.prefixes.append(prefix)
        x = log_softmax(self.speaker.logits(prefix))
        top = {int(t): float(x[t]) for t in np.argsort(-x)[: self.n]}
        tells = self.dialect.spelling.pieces is None
        return Successors(top, 1, {t: self.speaker.words.piece(t) for t in top} if tells else {})


def is_text(raw: bytes) -> bool:
    return isinstance(told(raw), str)


def told(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def written(base, timeline, ours, prompt, seed, rate, most=25):
    loop = Decoder(
        base, [timeline], Policy(reader(seed, rate)[0], 0.5), Picker(ours.n_vocab), prompt,
        end_tokens=ours.ends, max_tokens=most,
    )  # fmt: skip
    return [(step.token, step.source) for step in loop], loop


@settings(max_examples=100, deadline=None, phases=NO_SHRINKING)
@given(
    owner=st.sampled_from(sorted(DIALECTS)),
    seed=st.integers(0, 10_000),
    n_ours=st.integers(0, 30),
    n_theirs=st.integers(0, 30),
    begin=st.booleans(),
    rate=st.sampled_from([0.2, 0.5, 1.0]),
)
# The text ends inside a character that is a token of the expert's.
@example(owner="llamacpp", seed=92, n_ours=9, n_theirs=9, begin=False, rate=1.0)
def test_it_writes_what_the_same_expert_here_writes(owner, seed, n_ours, n_theirs, begin, rate):
    draw = random.Random(seed)
    ours = all_bytes(draw, n_ours)
    # vLLM cannot tell what parts of characters stand for, except for single bytes.
    theirs = all_bytes(draw, n_theirs, texts=owner == "vllm", begin=begin)
    prompt = [ours.control(MARK), *ours.encode("ab a€".encode()), ours.control(MARK)]
    expert = Speaker(theirs, seed + 1)
    here, _ = written(
        Speaker(ours, seed), Bridge(expert, Crossing(ours, theirs)), ours, prompt, seed, rate
    )
    served = Served(Speaker(theirs, seed + 1), ours, owner)
    crossing = Crossing(ours, served.words)
    bridge = BridgeAway(RowsSession(served), crossing)  # type: ignore[arg-type]
    away, loop = written(Speaker(ours, seed), bridge, ours, prompt, seed, rate)
    assert away == here
    assert loop.stats.expert_failures == 0
