"""What matters in a text: programs between two fences, however these are cut into tokens, and where
it begins and ends."""

from __future__ import annotations

from array import array
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colm_edge.train import objectives
from colm_edge.train.documents import Documents
from colm_edge.train.heads import Standardised
from colm_edge.train.importance import CODE, EDGE, PROSE, importance, in_code

PIECES = [b"", b"`", b"``", b"```", b"````", b"```py\n", b"x``", b"`y", b"word", b"\n", b"\xc3"]


def documents_of(texts: list[tuple[list[int], int]]) -> Documents:
    tokens = array("i", [token for text, _ in texts for token in text])
    lengths, starts = (
        np.array(column, np.int64) for column in zip(*((len(t), s) for t, s in texts), strict=True)
    )
    return Documents(np.frombuffer(tokens, np.int32), lengths, starts, np.arange(len(texts)))


def plainly(tokens: list[int]) -> list[bool]:
    """Read byte by byte; a run of three backticks or more is a fence, once it has ended."""
    text, fences = b"".join(PIECES[token] for token in tokens), 0
    at_byte, run = list[int](), 0  # fences that end before or at each byte
    for i, byte in enumerate(text):
        at_byte.append(fences)
        run = run + 1 if byte == ord("`") else 0
        if run >= 3 and text[i + 1 : i + 2] != b"`":
            fences += 1
    at_byte.append(fences)
    begins = np.cumsum([0] + [len(PIECES[token]) for token in tokens])[:-1]
    return [at_byte[begin] % 2 == 1 for begin in begins]


TEXTS = st.lists(
    st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=30).flatmap(
        lambda tokens: st.tuples(st.just(tokens), st.integers(0, len(tokens) - 1))
    ),
    min_size=1,
    max_size=4,
)


@given(texts=TEXTS, cut=st.integers(0, 4))
@example(texts=[([8, 5, 8, 3, 8], 0)], cut=0)  # prose, a program, prose
@example(texts=[([8, 2, 1, 9, 8, 1, 2, 8], 0)], cut=0)  # its fences in two tokens each
def test_a_token_is_in_code_where_a_fence_before_it_is_open(texts, cut):
    documents, cut = documents_of(texts), min(cut, len(texts))
    wanted = [inside for tokens, start in texts for inside in plainly(tokens[start:])]
    parts = [
        in_code(documents, PIECES.__getitem__, first, last)
        for first, last in ((0, cut), (cut, len(texts)))
    ]
    assert np.concatenate(parts).tolist() == wanted


@given(texts=TEXTS, ends=st.sets(st.integers(0, 10), max_size=2), seed=st.integers(0, 99))
def test_edges_matter_more_than_programs_and_these_more_than_prose(texts, ends, seed):
    documents = documents_of(texts)
    chosen = np.random.default_rng(seed).integers(0, len(PIECES), documents.n_scored, np.int32)
    found = importance(documents, chosen, PIECES.__getitem__, ends, 0, len(texts))
    scored = [token for tokens, start in texts for token in tokens[start:]]
    code = [inside for tokens, start in texts for inside in plainly(tokens[start:])]
    begins = np.cumsum([0] + [len(tokens) - start for tokens, start in texts])
    for i, weight in enumerate(found):
        at_edge = i in begins or scored[i] in ends or int(chosen[i]) in ends
        assert weight == (EDGE if at_edge else CODE if code[i] else PROSE)
    last = importance(documents, chosen, PIECES.__getitem__, ends, len(texts) - 1, len(texts))
    assert found[len(found) - len(last) :].tolist() == last.tolist()


def test_what_matters_more_is_deferred_first():
    """Of two kinds of tokens, equally often regretted, and of which one matters more."""
    rng = np.random.default_rng(0)
    code = np.arange(4000) % 2 == 0
    regret = np.where(rng.random(4000) < 0.1, 3.0, 0.0)
    columns = np.stack([code, rng.normal(0, 1, 4000)], axis=1).astype(np.float32)

    def advantage(importance):
        block = Standardised(columns.copy())
        head = block.fit(partial(objectives.regret_loss, regret * importance), 0.0)
        d = head(columns)
        return d[code].mean() - d[~code].mean()

    assert advantage(np.where(code, 10.0, 1.0)) == pytest.approx(np.log(10), abs=0.3)
    assert advantage(np.ones(4000)) == pytest.approx(0, abs=0.3)
