"""Scores in several files: what was scored in parts is what is scored at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from progress import no_bar

from colm_edge.errors import DataError
from colm_edge.pair import load
from colm_edge.train import scoring
from colm_edge.train.documents import tokenized
from colm_edge.train.fit import FitOptions, fit_switch
from colm_edge.train.score_files import EXPERT_COLUMNS, read_scores, scored_by
from colm_edge.train.scoring import bounds_of, score_expert

N_SHARDS = 3
# A line may have several documents, and two lines the same one.
ROWS = [
    {"messages": [{"role": role, "content": f"{i % 11}{text}"} for role, text in turns]}
    for i in range(24)
    for turns in [[("user", "p"), ("assistant", "some words")] * (1 + i % 2)]
]


@pytest.fixture
def pair(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        yield pair


@pytest.fixture
def documents(pair, monkeypatch):
    monkeypatch.setattr(scoring, "PACK_TOKENS", 100)
    return tokenized(enumerate(ROWS, 1), pair)


def write(pair, documents, path, *shard: int) -> Path:
    score_expert(pair, documents, path, no_bar, shard=shard or (1, 1))
    return path


@pytest.fixture
def shards(pair, documents, tmp_path) -> list[Path]:
    numbers = range(1, N_SHARDS + 1)
    return [write(pair, documents, tmp_path / f"{k}.npz", k, N_SHARDS) for k in numbers]


def test_shards_give_the_same_switch_as_one_file(pair, documents, shards, tmp_path):
    whole = write(pair, documents, tmp_path / "whole.npz")
    one, other = (
        read_scores(files, documents, pair.base.fingerprint) for files in ([whole], shards[::-1])
    )
    for name in EXPERT_COLUMNS:
        assert np.array_equal(one[name], other[name], equal_nan=name != "right"), name
    fits = [
        fit_switch(pair, documents, FitOptions("both"), progress=no_bar, expert_scores=files)
        for files in ([whole], shards[::-1])
    ]
    assert fits[0].report == fits[1].report
    assert np.array_equal(fits[0].switch.weight, fits[1].switch.weight)
    assert scored_by(shards) == scored_by([whole]) == pair.expert.name


def test_a_shard_goes_on_in_its_own_work_folder(pair, documents, shards, tmp_path):
    work = tmp_path / "work"
    for _ in range(2):
        before = pair.expert_session.account.n_evaluated
        again = tmp_path / "again.npz"
        score_expert(pair, documents, again, no_bar, shard=(2, N_SHARDS), work=work)
    assert pair.expert_session.account.n_evaluated == before  # the second time, all was there
    with np.load(again) as one, np.load(shards[1]) as other:
        assert all(np.array_equal(one[name], other[name]) for name in one.files)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shards_are_all_documents_once(documents, n):
    bounds = [bounds_of(documents, (k, n)) for k in range(1, n + 1)]
    assert [i for first, last in bounds for i in range(first, last)] == [*range(len(documents))]


def test_more_shards_than_batches_are_refused(documents):
    with pytest.raises(DataError, match=r"shard 1 of 1000 has no documents: the data makes \d+ "):
        bounds_of(documents, (1, 1000))


def test_lines_that_are_missing_or_there_twice_are_named(pair, documents, shards, tmp_path):
    def lines(k: int) -> str:
        first, last = bounds_of(documents, (k, N_SHARDS))
        return f"lines {documents.lines[first]} to {documents.lines[last - 1]}"

    cases = [
        (shards[:2], f"lack {lines(3)}; give those of all shards"),
        (shards[1:2], f"lack {lines(1)}, {lines(3)}; give"),
        ([*shards, shards[1]], f"both have {lines(2)}; give one of them"),
        ([*shards, write(pair, documents, tmp_path / "all.npz")], f"both have {lines(1)}; give"),
    ]
    for files, words in cases:
        with pytest.raises(DataError) as told:
            read_scores(files, documents, pair.base.fingerprint)
        assert words in str(told.value)
        assert "\n" not in str(told.value)


def test_shards_of_other_data_or_of_several_experts_are_refused(pair, documents, shards):
    others = tokenized(enumerate([*ROWS[1:], ROWS[0]], 1), pair)
    for data in (others, documents[:-1]):
        with pytest.raises(DataError, match="holds scores of other data"):
            read_scores(shards, data, pair.base.fingerprint)
    with pytest.raises(DataError, match="choices of another base; score this data with this base"):
        read_scores(shards, documents, "another")
    with np.load(shards[0]) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(shards[0], **arrays | {"model": np.array("/elsewhere/other.gguf")})
    with pytest.raises(DataError, match=r"several experts: .*1.npz by /elsewhere/other.gguf, "):
        read_scores(shards, documents, pair.base.fingerprint)
    np.savez(shards[0], **arrays | {"part": np.array([5, 3, len(documents)])})
    with pytest.raises(DataError, match="holds scores of other data"):
        read_scores(shards, documents, pair.base.fingerprint)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.5])
@pytest.mark.parametrize("name", ["logprob", "best", "choice"])
def test_scores_that_no_model_gives_are_refused_before_the_base_runs(
    pair, documents, shards, monkeypatch, name, value
):
    with np.load(shards[1]) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[name][3] = value
    np.savez(shards[1], **arrays)
    monkeypatch.setattr(scoring, "score_model", lambda *_, **__: pytest.fail("the base runs"))
    with pytest.raises(DataError, match=rf"2\.npz: {name} holds .*; score the data again"):
        scoring.score(pair, documents, no_bar, expert_scores=shards)
