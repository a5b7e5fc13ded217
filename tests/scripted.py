"""Models, switches and planners without weights: each says what a function of the prefix says."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from colm_edge.cancel import Cancel
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.planner import Planner
from colm_edge.decode.policy import Policy
from colm_edge.llama.account import Account
from colm_edge.llama.costs import CostTable
from colm_edge.stream import Stream

N_VOCAB = 32
END = 0
# The cost of a decode is constant (a GPU), or proportional to its size (a small model).
FLAT = CostTable((1, 64), (1.0, 1.0))


class Scripted:
    """A fake session whose next token is a function of the prefix.

    It counts like a real session: sync evaluates only what differs from the last prefix.
    """

    def __init__(
        self, choose: Callable[[tuple[int, ...]], int], n_ctx: int = 64, n_vocab: int = N_VOCAB
    ) -> None:
        self.choose, self.n_ctx, self.n_vocab = choose, n_ctx, n_vocab
        self.account = Account()
        self.held: list[int] = []
        self.batches: list[list[int]] = []
        self.n_outputs: list[int] = []  # of each batch
        self.outputs: set[int] = set()

    def turn_to(self, prompt: Sequence[int]) -> None:
        self.prompt = list(prompt)

    def sync(self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel=None) -> int:
        assert 0 < len(tokens) <= self.n_ctx
        outputs = list(outputs) or [len(tokens) - 1]
        assert outputs == sorted(outputs)
        assert outputs[-1] == len(tokens) - 1
        keep = 0
        while keep < min(len(self.held), len(tokens)) and self.held[keep] == tokens[keep]:
            keep += 1
        if keep == len(tokens) == len(self.held) and outputs == [keep - 1]:
            return 0  # its state is already known
        keep = min(keep, outputs[0])
        batch = list(tokens[keep:])
        self.held, self.outputs = list(tokens), set(outputs)
        self.batches.append(batch)
        self.n_outputs.append(len(outputs))
        self.account += Account(len(batch), 1, 1e-3 * len(batch))
        return len(batch)

    def state(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        assert i in self.outputs
        logits = np.full(self.n_vocab, -4.0, np.float32)
        logits[self.choose(tuple(self.held[: i + 1]))] = 4.0
        return logits, np.array([i + 1], np.float32)


class Drawn(Scripted):
    """A scripted session whose logits are drawn by the prefix: most of them alike for base and
    expert, so that they often agree. `likes_end` raises the end token."""

    def __init__(self, seed, n_ctx=64, n_vocab=N_VOCAB, likes_end=-2.0, own=1.0):
        super().__init__(lambda prefix: 0, n_ctx, n_vocab)
        self.seed, self.likes_end, self.own = seed, likes_end, own

    def logits(self, prefix) -> np.ndarray:
        shared = np.random.default_rng(abs(hash((7, prefix))))
        own = np.random.default_rng(abs(hash((self.seed, prefix))))
        logits = 3 * shared.normal(size=self.n_vocab) + self.own * own.normal(size=self.n_vocab)
        logits[END] = logits.mean() + self.likes_end * abs(own.normal())
        return logits.astype(np.float32)

    def state(self, i):
        assert i in self.outputs
        return self.logits(tuple(self.held[: i + 1])), np.array([i + 1], np.float32)


def writer(seed: int, end_every: int = 0):
    """Return a next-token function: pseudo-random by prefix, sometimes the end token."""

    def choose(prefix: tuple[int, ...]) -> int:
        draw = random.Random(hash((seed, prefix)))
        if end_every and draw.random() < 1 / end_every:
            return END
        return draw.randrange(1, N_VOCAB)

    return choose


def reader(seed: int, rate: float):
    """Return a switch that draws p_defer in (0, 1) by the length of the base's prefix."""

    def p_of(n: int) -> float:
        draw = random.Random(hash((seed, n)))
        above = draw.random() < rate
        return 0.5 + 0.5 * draw.random() if above else 0.5 * draw.random()

    def read(logits, hidden):
        peak = logits.max()
        lse = float(peak + np.log(np.exp(logits - peak).sum()))
        return p_of(int(hidden[0])), int(logits.argmax()), lse, 0

    return read, p_of


def decoder(
    base, expert, read, prompt, threshold=0.5, n_choose=N_VOCAB, sampler=None, compose=False, **more
):
    """Return a Decoder of the parts that most tests need."""
    policy, picker = Policy(read, threshold), Picker(n_choose, sampler, composes=compose)
    return Decoder(base, [expert], policy, picker, prompt, end_tokens=frozenset({END}), **more)


def agreeing(seed: int, other, agree: float):
    """Return a writer that repeats another one at a given rate."""
    own = writer(seed)

    def choose(prefix):
        same = random.Random(hash((seed, 99, prefix))).random() < agree
        return other(prefix) if same else own(prefix)

    return choose


class Bold(Planner):
    """Bets at random, far more often than a sensible planner, and reviews at random times."""

    def __init__(self, seed: int, share: float, *, steady: bool = False) -> None:
        super().__init__(lambda cancel: (FLAT, FLAT), steady=steady)
        self._draw, self._share = random.Random(seed), share

    def saves(self, agrees: float, n_pending: int) -> float:
        assert 0 <= agrees <= 1
        assert n_pending >= 0
        return float(self._draw.random() < self._share)

    def window(self, most: int) -> int:
        return most if self.steady else self._draw.randint(1, most)


class Eager(Bold):
    """Bets wherever the expert has something to evaluate."""

    def __init__(self) -> None:
        super().__init__(0, 1.0)

    def saves(self, agrees: float, n_pending: int) -> float:
        return float(n_pending > 0)


class Sometimes:
    """A sampler whose picks depend on all its earlier picks, like those of a seeded one."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def __call__(self, logits) -> int:
        self.state = hash((self.state, 17)) % 2**32
        best = int(logits.argmax())
        return best if self.state % 3 else (best + self.state) % (len(logits) - 1) + 1

    def knows(self, logits) -> bool:
        return True

    def copy(self) -> Sometimes:
        return Sometimes(self.state)


class Later(Future):
    """A reply that is there once it was asked for a number of times."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self.polls = polls

    def done(self) -> bool:
        self.polls -= 1
        return self.polls < 0


class Letters:
    """A vocabulary of single bytes: every character outside ASCII spans several tokens."""

    def piece(self, token: int) -> bytes:
        return bytes([token])


def stream_of(data: bytes, stop: tuple[str, ...] = ()):
    choose = lambda prefix: data[len(prefix) - 1] if len(prefix) <= len(data) else 256  # noqa: E731
    base = Scripted(choose, n_vocab=257)
    policy, cancel = Policy(lambda x, h: (0.0, int(x.argmax()), 0.0, 0), 0.5), Cancel()
    ends = frozenset({256})
    decoder = Decoder(base, [base], policy, Picker(257), [1], end_tokens=ends, cancel=cancel)
    return Stream(decoder, Letters(), stop, cancel)
