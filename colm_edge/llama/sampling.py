"""Sample tokens with llama.cpp's own samplers, in llama.cpp's order."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import llama_cpp as llama
import numpy as np

from colm_edge.arrays import Doubles, Floats, Tokens
from colm_edge.llama.grammar import CANDIDATE, Grammar, array_of

if TYPE_CHECKING:
    from colm_edge.options import Options
MOST_NAMED = 256  # tokens, by a server; a model in this process tells of all
TRIED = 256  # of the likeliest tokens, before a grammar judges the whole vocabulary


class ChainSampler:
    """Pick a token from logits. The same seed and the same logits give the same tokens.

    history: tokens already written, for the penalties.
    never: ids that are never picked. grammar: allows what may be picked, after what was.
    """

    def __init__(
        self,
        options: Options,
        n_vocab: int,
        history: Sequence[int] = (),
        never: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self._grammar = grammar
        self._never, self._greedy = list(never), options.is_greedy
        self._is_plain = self._greedy and not options.penalises  # the likeliest token is picked
        # Samplers sort and cut the candidates in place, so they are written again for each token.
        self._candidates = np.zeros(n_vocab, CANDIDATE)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._chain = chain

        def add(sampler: object) -> None:
            llama.llama_sampler_chain_add(chain, sampler)

        if options.penalises:
            penalties = options.repeat_penalty, options.frequency_penalty, options.presence_penalty
            add(llama.llama_sampler_init_penalties(n_vocab, options.repeat_last_n, *penalties))
        if not options.is_greedy:
            add(llama.llama_sampler_init_top_k(options.top_k))
            add(llama.llama_sampler_init_top_p(options.top_p, 1))
            add(llama.llama_sampler_init_min_p(options.min_p, 1))
            add(llama.llama_sampler_init_temp(options.temperature))
            seed = secrets.randbits(32) if options.seed < 0 else options.seed
            add(llama.llama_sampler_init_dist(seed))
        else:
            add(llama.llama_sampler_init_greedy())
        for token in history[-options.repeat_last_n :]:
            llama.llama_sampler_accept(chain, token)

    def __call__(self, logits: Floats) -> int:
        token = self._pick(logits)
        # As llama.cpp does it: a grammar takes long to judge the whole vocabulary, and mostly the
        # first pick is allowed. The distribution is that of the allowed tokens either way.
        if self._grammar is not None and not self._grammar.allows(token):
            token = self.likeliest(logits, token) if self._is_plain else self._pick(logits, True)
        self.accept(token)
        return token

    def _pick(self, logits: Floats, masked: bool = False) -> int:
        array = self._apply(logits, masked=masked)
        return int(array.data[array.selected].id)

    def accept(self, token: int) -> None:
        """Count a token as written, for the penalties and the grammar."""
        if self._grammar is not None:
            self._grammar.accept(token)
        llama.llama_sampler_accept(self._chain, token)

    def knows(self, logits: Floats) -> bool:
        """Return whether logits tell of a token that the grammar allows. A server names only its
        likeliest tokens; all others are alike, and say nothing of which of them to write."""
        if self._grammar is None:
            return True
        least = logits.min()
        named = np.flatnonzero(logits > least)
        if least > -np.inf and len(named) > MOST_NAMED:
            return True
        return any(map(self._grammar.allows, named.tolist()))

    def likeliest(self, logits: Floats, choice: int) -> int:
        """Return the likeliest token that the grammar allows. choice: the likeliest of all."""
        if self._grammar is None or self._grammar.allows(choice):
            return choice
        candidates = self._fill(logits)
        known = candidates["logit"]
        first = np.argpartition(-known, min(TRIED, len(known) - 1))[:TRIED]
        for token in first[np.lexsort((first, -known[first]))]:
            if self._grammar.allows(int(token)) and known[token] > -np.inf:
                return int(token)
        self._grammar.mask(array_of(candidates))
        return int(candidates["logit"].argmax())

    def probabilities(self, logits: Floats) -> tuple[Tokens, Doubles]:
        """Return the ids that may be drawn, and the probability of each; they sum to 1."""
        if self._is_plain:
            token = self.likeliest(logits, self._pick(logits))
            return np.array([token], np.int32), np.ones(1)
        array = self._apply(logits, masked=True)
        if self._greedy:
            token = array.data[array.selected].id
            return np.array([token], np.int32), np.ones(1)
        address = ctypes.cast(array.data, ctypes.c_void_p).value
        assert address is not None
        size = array.size * CANDIDATE.itemsize
        left = np.frombuffer((ctypes.c_char * size).from_address(address), CANDIDATE)
        best, p = left["logit"].max(), np.ones(len(left))
        if best == np.inf:  # huge logits, divided by a tiny temperature
            p = (left["logit"] == np.inf).astype(np.float64)
        elif best > -np.inf:
            p = np.exp(left["logit"].astype(np.float64) - best)
        return left["id"].copy(), p / p.sum()

    def _fill(self, logits: Floats) -> Any:
        """Return the candidates, written again."""
        n = min(len(logits), len(self._candidates))
        candidates = self._candidates[:n]
        candidates["id"] = self._ids[:n]
        candidates["logit"] = logits[:n]
        for token in self._never:
            if token < n:
                candidates["logit"][token] = -np.inf
        return candidates

    def _apply(self, logits: Floats, *, masked: bool = False) -> Any:
        """Return llama.cpp's array of the candidates that are left, one of them selected. Samplers
        may drop candidates from the front by moving its pointer.

        masked: whether the grammar is asked first.
        """
        array = array_of(self._fill(logits))
        if masked and self._grammar is not None:
            self._grammar.mask(array)
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        return array

    def copy(self) -> Self:
        """Return a sampler that makes the same picks from now on; it shares the scratch memory."""
        grammar = self._grammar.copy() if self._grammar is not None else None
        chain = llama.llama_sampler_clone(self._chain)
        # At no time do two hold one chain: Ctrl-C may come anywhere, and each frees its own.
        twin = object.__new__(type(self))
        twin.__dict__.update({**self.__dict__, "_chain": chain, "_grammar": grammar})
        return twin

    def __del__(self) -> None:
        chain, self._chain = getattr(self, "_chain", None), None
        if chain is not None:
            llama.llama_sampler_free(chain)
