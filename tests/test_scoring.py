"""Scores on disk: killed and taken up again, refused where they belong to something else."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import no_bar

from colm_edge import scoring
from colm_edge.documents import tokenized
from colm_edge.errors import DataError
from colm_edge.pair import load
from colm_edge.scoring import score
from colm_edge.train import fit_switch

ROWS = [{"prompt": f"p{i}", "completion": f"c{i} and some more"} for i in range(20)]


class KilledError(Exception):
    pass


def killing(name: str, after: int):
    """A progress bar that ends the run at the n-th document of one model's pass."""

    @contextmanager
    def bar(this: str, total: int):
        done = iter(range(-1, 1000))  # the first update says what an earlier run had done

        def update(n: int) -> None:
            if next(done) >= after and this == name:
                raise KilledError

        yield SimpleNamespace(update=update)

    return bar


@pytest.fixture
def pair(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        yield pair


@pytest.mark.parametrize("killed_in", ["base", "expert"])
def test_a_killed_run_goes_on_and_gives_the_same_switch(pair, tmp_path, monkeypatch, killed_in):
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)
    documents = tokenized(enumerate(ROWS), pair)
    whole = fit_switch(pair, documents, "both", progress=no_bar)
    with pytest.raises(KilledError):
        score(pair, documents, killing(killed_in, 12), work=tmp_path)
    before = pair.base_session.n_evaluated, pair.expert_session.n_evaluated
    again = fit_switch(pair, documents, "both", work=tmp_path, progress=no_bar)
    base = pair.base_session.n_evaluated - before[0]
    expert = pair.expert_session.n_evaluated - before[1]
    tokens = sum(len(d.tokens) for d in documents)
    assert np.array_equal(again.switch.weight, whole.switch.weight)
    assert base < tokens / 2
    assert (expert < tokens / 2) == (killed_in == "expert")
    # A third run evaluates nothing.
    before = pair.base_session.n_evaluated, pair.expert_session.n_evaluated
    score(pair, documents, no_bar, work=tmp_path)
    assert (pair.base_session.n_evaluated, pair.expert_session.n_evaluated) == before


def test_on_disk_and_in_memory_are_the_same(pair, tmp_path):
    documents = tokenized(enumerate(ROWS), pair)
    memory, disk = score(pair, documents, no_bar), score(pair, documents, no_bar, work=tmp_path)
    for name, values in vars(memory).items():
        assert np.array_equal(values, getattr(disk, name)), name
    assert isinstance(disk.hidden, np.memmap)


def test_scores_of_something_else_are_refused(pair, tiny, tmp_path):
    documents = tokenized(enumerate(ROWS), pair)
    score(pair, documents, no_bar, work=tmp_path)
    with pytest.raises(DataError, match="holds scores of other data"):
        score(pair, documents[1:], no_bar, work=tmp_path)
    with (
        load(tiny["endless"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as other,
        pytest.raises(DataError, match=r"another model than .*endless"),
    ):
        score(other, documents, no_bar, work=tmp_path)
    (tmp_path / "base" / "progress.json").write_text("{")
    with pytest.raises(DataError, match="is broken"):
        score(pair, documents, no_bar, work=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot keep the scores there"):
        score(pair, documents, no_bar, work=tmp_path / "file")


def test_broken_score_files_are_refused(pair, tmp_path):
    documents = tokenized(enumerate(ROWS), pair)
    with pytest.raises(DataError, match="No such file"):
        score(pair, documents, no_bar, expert_scores=tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no scores")
    with pytest.raises(DataError, match="not a file of `colm-edge score`"):
        score(pair, documents, no_bar, expert_scores=tmp_path / "text.npz")
