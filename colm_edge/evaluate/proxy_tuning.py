"""Proxy Tuning (Liu et al. 2024, arXiv 2401.08565), for comparison.

Three models of one vocabulary run at every token, and their logits are combined:
base + alpha · (expert − anti-expert). With alpha 1, the paper's choice, base and expert are
symmetric, so the anti-expert may be the untuned version of either.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from colm_edge.arrays import Doubles, Floats
from colm_edge.cancel import Cancel
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.decode.timeline import Timeline
from colm_edge.errors import MismatchError, ModelError
from colm_edge.evaluate.generate import Facts, Generated, facts_of, judged
from colm_edge.evaluate.metrics import Metric
from colm_edge.journal import Journal, is_number, key_of
from colm_edge.llama.account import Account
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.sampling import ChainSampler
from colm_edge.llama.scorer import Scorer
from colm_edge.llama.session import Session
from colm_edge.llama.vocabulary import shared_vocab
from colm_edge.options import OPTIONS
from colm_edge.pair import Pair
from colm_edge.stream import Stream
from colm_edge.switch.rules import Untrained
from colm_edge.together import Done, Task
from colm_edge.train.columns import LEAST_NATS, ROUNDING
from colm_edge.train.documents import Document, Row, prompt_of
from colm_edge.train.prompts import asked, pace_of

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.train.scoring import MakeProgress


NAME = "proxy"
# Options of who writes, which the method does not have.
NO_EFFECT = (
    "threshold", "defer_rate", "strategy", "schedule", "review", "review_window", "review_floor",
    "doubt",
)  # fmt: skip


class Contrast:
    """Expert and anti-expert as one timeline, whose logits combine all three models.

    The base must be synced to the same tokens first; the decoding loop does that.
    """

    def __init__(
        self, base: Timeline, expert: Timeline, anti: Timeline, alpha: float, n_shared: int
    ) -> None:
        self._base, self._pair, self._alpha, self._n_shared = base, (expert, anti), alpha, n_shared
        self.n_ctx = min(expert.n_ctx, anti.n_ctx)

    def turn_to(self, prompt: array[int]) -> None:
        for timeline in self._pair:
            timeline.turn_to(prompt)

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        return sum(timeline.sync(tokens, outputs, cancel) for timeline in self._pair)

    def state(self, i: int) -> tuple[Floats, Floats]:
        base, expert, anti = (model.state(i)[0] for model in (self._base, *self._pair))
        combined = contrast(base, expert, anti, self._alpha, self._n_shared)
        return combined, np.empty(0, np.float32)

    @property
    def account(self) -> Account:
        return self._pair[0].account + self._pair[1].account


def contrast(base: Floats, expert: Floats, anti: Floats, alpha: float, n_shared: int) -> Floats:
    """Return base + alpha · (expert − anti) over the shared ids, shape (…, n_shared)."""
    difference = expert[..., :n_shared] - anti[..., :n_shared]
    combined: Floats = base[..., :n_shared] + np.float32(alpha) * difference
    return combined


class Proxy:
    """A pair and an anti-expert.

    n_threads, n_gpu_layers: of the anti-expert, as in `load`.
    Raises ModelError when its file cannot be read, MismatchError when its vocabulary differs, or
    the expert's.
    """

    def __init__(
        self,
        pair: Pair,
        path: Path,
        *,
        alpha: float = 1.0,
        n_threads: int = 0,
        n_gpu_layers: int = 0,
    ) -> None:
        self.pair, self.alpha = pair, alpha
        if pair.members[0].crossing is not None:
            raise MismatchError("Proxy Tuning needs models of one vocabulary; leave --bridge out")
        self.model = Model(path, n_gpu_layers)
        try:
            self.n_shared = min(pair.n_shared, shared_vocab(pair.base, self.model))
        except MismatchError as e:
            self.model.close()
            raise MismatchError(f"{path} cannot be the anti-expert of this pair: {e}") from e
        n_batch = min(ContextOptions().n_batch, pair.n_ctx)
        self.session = Session(self.model, ContextOptions(pair.n_ctx, n_threads, n_batch))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        self.model.close()

    def score(
        self, documents: Sequence[Document], progress: MakeProgress, journal: Journal
    ) -> Doubles:
        """Return the log-probability of every scored token, (n,), normalised over the shared ids.

        journal: where each document's results are kept.
        """
        what = self._key()
        sessions = (self.pair.base_session, self.pair.expert_session, self.session)
        # No smaller than in use: some models scale their positions by the context's size.
        n_cells = self.pair.n_ctx
        scorers: list[Scorer] = []
        logprobs: list[float] = []
        with ExitStack() as stack:
            bar = stack.enter_context(progress(NAME, sum(len(d.tokens) for d in documents)))
            for document in documents:
                tokens = document.tokens
                self._check(tokens, document.line)
                key = key_of(what, tokens, document.start)
                is_kept = partial(_is_kept, n=len(tokens) - document.start)
                entry = journal.get(key, is_kept)
                if entry is None:
                    if not scorers:
                        scorers = [
                            stack.enter_context(Scorer(session, n_cells, hidden=False))
                            for session in sessions
                        ]
                    entry = {"logprob": self._score(scorers, tokens, document.start)}
                    journal.add(key, entry)
                logprobs += entry["logprob"]
                bar.update(len(tokens))
        return np.array(logprobs, np.float64)

    def _check(self, tokens: Sequence[int], line: int) -> None:
        if max(tokens) >= self.n_shared:
            raise MismatchError(
                f"line {line}: token {max(tokens)} is not in the vocabulary of {self.model.path} "
                f"({self.n_shared} shared tokens)"
            )

    def _score(self, scorers: Sequence[Scorer], tokens: list[int], start: int) -> list[float]:
        logprobs: list[float] = []
        for at, (base, expert, anti) in _side_by_side(scorers, tokens, start):
            logits = contrast(base, expert, anti, self.alpha, self.n_shared).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            gold = tokens[at : at + len(logits)]
            logprob = logits[np.arange(len(gold)), gold] - np.log(np.exp(logits).sum(axis=1))
            if not np.isfinite(logprob).all():
                raise ModelError(
                    f"{self.model.path}: combined with the pair, it gives a token of the data NaN "
                    "or probability zero; one of the files is broken"
                )
            logprobs += logprob.tolist()
        return logprobs

    def answers(
        self,
        options: Options,
        rows: list[Row],
        metric: Metric,
        progress: MakeProgress,
        *,
        journal: Journal,
    ) -> Generated:
        """Answer every row's prompt and judge the answers, as `generate.answers` does with a
        switch."""

        def write(todo: list[int]) -> Iterator[tuple[int, Facts]]:
            for i in todo:
                number, row = rows[i]
                tokens = prompt_of(self.pair, asked(row), raw=options.raw)
                self._check(tokens, number)
                stream = self.stream_tokens(tokens, options)
                for _ in stream:
                    pass
                yield i, facts_of(Done(Task(i, tokens, options), stream.answer(), stream.end))

        # Options that have no effect here must not change the keys in the journal.
        without = {name: OPTIONS[name].default for name in NO_EFFECT}
        options = replace(options, **without)
        what = [*self._key(), pace_of(self.pair, 1), options.changed]
        return judged(write, rows, metric, progress, label=NAME, journal=journal, what=what)

    def stream_tokens(self, tokens: Sequence[int], options: Options) -> Stream:
        """Continue a prompt that is given as token ids. The pair's own loop defers every token to
        `Contrast`: a step's source is "expert", and `expert_tokens` counts the anti-expert's tokens
        too."""
        pair = self.pair
        base, expert = pair.base_session, pair.expert_session
        sampler = None
        if not options.is_greedy or options.penalises:
            sampler = ChainSampler(options, self.n_shared, tokens)
        ends = pair.base.end_tokens | pair.expert.end_tokens | self.model.end_tokens
        cancel = Cancel()
        decoder = Decoder(
            base,
            [Contrast(base, expert, self.session, self.alpha, self.n_shared)],
            Policy(Untrained("margin").reader(pair.base, self.n_shared), 0.0),
            Picker(self.n_shared, sampler),
            tokens,
            end_tokens=ends,
            max_tokens=options.max_tokens,
            cancel=cancel,
        )
        return Stream(decoder, pair.base, options.stop, cancel)

    def _key(self) -> list[Any]:
        pair = self.pair
        models = [pair.base.fingerprint, pair.expert.fingerprint, self.model.fingerprint]
        return [NAME, *models, self.alpha, self.pair.n_ctx]


def _is_kept(entry: dict[str, Any], n: int) -> bool:
    """Return whether an entry of a journal holds n log-probabilities."""
    logprobs = entry["logprob"]
    return (
        isinstance(logprobs, list)
        and len(logprobs) == n
        and all(is_number(x, LEAST_NATS, ROUNDING) for x in logprobs)
    )


def _side_by_side(
    scorers: Sequence[Scorer], tokens: list[int], start: int
) -> Iterator[tuple[int, list[Floats]]]:
    """Yield (position, every model's logits (n, n_vocab) for the tokens from there on). The blocks
    of the scorers may differ in length."""
    ids, length, first = np.array(tokens, np.int32), np.array([len(tokens)]), np.array([start])
    streams = [scorer.score(ids, length, first) for scorer in scorers]
    blocks = [next(stream)[0] for stream in streams]
    at = start
    while True:
        n = min(len(logits) for logits in blocks)
        yield at, [logits[:n] for logits in blocks]
        at += n
        if at == len(tokens):
            return
        blocks = [
            logits[n:] if len(logits) > n else next(stream)[0]
            for logits, stream in zip(blocks, streams, strict=True)
        ]
