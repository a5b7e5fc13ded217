"""Scores on disk: resumed after a kill, added to, refused where they are of another base."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from lib.random_model import SHAPES, write_model
from progress import KilledError, killing, no_bar

from colm_edge.errors import ColmError, DataError
from colm_edge.llama.model import Model
from colm_edge.pair import load
from colm_edge.train import scoring, store
from colm_edge.train.documents import tokenized
from colm_edge.train.fit import FitOptions, fit_switch
from colm_edge.train.scoring import score, score_expert

ROWS = [{"prompt": f"p{i}", "completion": f"c{i} and some more"} for i in range(20)]


@pytest.fixture
def pair(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        yield pair


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(scoring, "PACK_TOKENS", 60)


class Evaluated:
    """How many tokens each model has evaluated since the last time it was asked."""

    def __init__(self, pair):
        self.sessions = (pair.base_session, pair.expert_session)
        self()

    def __call__(self) -> tuple[int, int]:
        now = [session.account.n_evaluated for session in self.sessions]
        before, self.before = getattr(self, "before", now), now
        return now[0] - before[0], now[1] - before[1]


def cost(documents) -> int:
    """Every token but the last of each document is evaluated."""
    return documents.n_tokens - len(documents)


def assert_same(one, other, tolerance=0.0):
    for name, values in vars(one).items():
        close = np.isclose(values, getattr(other, name), rtol=0, atol=tolerance)
        # Where two tokens of the base are almost as likely, the last bits say which is its choice.
        may_flip = tolerance and name in ("likeliest", "choice")
        assert close.mean() > 0.99 if may_flip else close.all(), name


def test_packed_together_or_each_alone_the_scores_are_the_same(pair, monkeypatch):
    rows = [{"prompt": f"p{i}", "completion": "ab " * (1 + 7 * i % 40)} for i in range(30)]
    documents = tokenized(enumerate(rows), pair)
    evaluated = Evaluated(pair)
    together = score(pair, documents, no_bar)
    assert evaluated() == (cost(documents), cost(documents))
    assert pair.expert_session.account.n_calls < len(documents)
    monkeypatch.setattr(scoring, "PACK_TOKENS", 1)
    alone = score(pair, documents, no_bar)
    assert evaluated() == (cost(documents), cost(documents))
    assert_same(together, alone, 2e-2)
    assert together.token.tolist() == [t for d in documents for t in d.tokens[d.start :]]
    assert together.line.tolist() == [d.line for d in documents for _ in d.tokens[d.start :]]


@pytest.mark.parametrize("killed_in", ["base", "expert"])
@pytest.mark.usefixtures("small_groups")
def test_a_killed_run_goes_on_and_gives_the_same_switch(pair, tmp_path, killed_in):
    documents = tokenized(enumerate(ROWS), pair)
    whole = fit_switch(pair, documents, FitOptions("both"), progress=no_bar)
    with pytest.raises(KilledError):
        score(pair, documents, killing(killed_in, 5), work=tmp_path)
    evaluated = Evaluated(pair)
    again = fit_switch(pair, documents, FitOptions("both"), work=tmp_path, progress=no_bar)
    base, expert = evaluated()
    assert np.array_equal(again.switch.weight, whole.switch.weight)
    assert base < cost(documents) / 2
    assert (0 < expert < cost(documents) / 2) == (killed_in == "expert")
    # A third run evaluates nothing.
    score(pair, documents, no_bar, work=tmp_path)
    assert evaluated() == (0, 0)


@pytest.mark.usefixtures("small_groups")
def test_a_run_killed_by_sigkill_loses_what_was_not_noted(tiny, pair, tmp_path):
    """SIGKILL in the middle of the base's pass, each group noted as it is done."""
    code = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
from contextlib import contextmanager
from types import SimpleNamespace
from colm_edge.train import scoring, store
from colm_edge.train.documents import tokenized
from colm_edge.pair import load
store.SAVE_SECONDS, scoring.PACK_TOKENS = 0.0, 60
@contextmanager
def bar(name, total):
    count = iter(range(1000))
    def update(n):
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    yield SimpleNamespace(update=update)
pair = load({tiny["base"]!r}, {tiny["expert"]!r}, "margin", n_threads=1, n_ctx=256)
scoring.score(pair, tokenized(enumerate({ROWS!r}), pair), bar, work=scoring.Path({str(tmp_path)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    documents = tokenized(enumerate(ROWS), pair)
    evaluated = Evaluated(pair)
    again = score(pair, documents, no_bar, work=tmp_path)
    base, expert = evaluated()
    assert base < cost(documents)
    assert expert == cost(documents)
    assert_same(again, score(pair, documents, no_bar))


def test_on_disk_and_in_memory_are_the_same(pair, tmp_path):
    documents = tokenized(enumerate(ROWS), pair)
    memory, disk = score(pair, documents, no_bar), score(pair, documents, no_bar, work=tmp_path)
    assert_same(memory, disk)
    for name, values in vars(disk).items():
        assert isinstance(values, np.memmap), name
        assert values.dtype == getattr(memory, name).dtype


def test_an_expert_is_asked_again_about_another_base(pair, tmp_path, monkeypatch):
    documents = tokenized(enumerate(ROWS), pair)
    score(pair, documents, no_bar, work=tmp_path)
    monkeypatch.setitem(vars(pair.base), "fingerprint", "f" * 64)
    (folder,) = tmp_path.glob("base-*")
    shutil.rmtree(folder)
    evaluated = Evaluated(pair)
    score(pair, documents, no_bar, work=tmp_path)
    assert all(evaluated())


@pytest.mark.usefixtures("small_groups")
def test_only_what_is_new_is_scored(pair, tmp_path):
    """Documents dropped, moved, repeated and added, after a run that was killed."""
    old = tokenized(enumerate(ROWS), pair)
    with pytest.raises(KilledError):
        score(pair, old, killing("expert", 4), work=tmp_path)
    rows = [{"prompt": "new", "completion": f"n{i}"} for i in range(9)]
    new = tokenized(
        enumerate([*rows[:5], *ROWS[10:], rows[5], *ROWS[:8], ROWS[0], *rows[6:]]), pair
    )
    evaluated = Evaluated(pair)
    with pytest.raises(KilledError):  # this one too
        score(pair, new, killing("base", 1), work=tmp_path)
    updated = score(pair, new, no_bar, work=tmp_path)
    base, expert = evaluated()
    assert base == sum(len(d.tokens) - 1 for d in tokenized(enumerate(rows), pair))
    assert base < expert < cost(new)
    assert_same(updated, score(pair, new, no_bar), 2e-2)
    evaluated()
    assert_same(updated, score(pair, new, no_bar, work=tmp_path))
    assert evaluated() == (0, 0)
    names = {p.name.split("-")[0] for p in tmp_path.iterdir()}
    assert names == {"base", "expert", "token.int32", "line.int64", "importance.float64"}


def test_a_pass_with_more_documents_appends_to_the_files(pair, tmp_path):
    old, new = (tokenized(enumerate(ROWS[:n]), pair) for n in (12, 20))
    score(pair, old, no_bar, work=tmp_path)
    (column,) = tmp_path.glob("base-*/hidden.float32")
    inode, before = column.stat().st_ino, column.read_bytes()
    updated = score(pair, new, no_bar, work=tmp_path)
    assert column.stat().st_ino == inode
    assert column.read_bytes().startswith(before)
    assert_same(updated, score(pair, new, no_bar), 2e-2)


def test_scores_belong_to_the_ids_that_were_chosen_from(pair, tmp_path):
    """An expert that shares fewer of them has other choices of the base to judge."""
    documents = tokenized(enumerate(ROWS), pair)
    before = score(pair, documents, no_bar, work=tmp_path)
    n = int(np.median(before.likeliest))
    evaluated = Evaluated(pair)
    pair.most_shared = n
    fewer = score(pair, documents, no_bar, work=tmp_path)
    assert evaluated() == (cost(documents), cost(documents))
    assert (before.likeliest >= n).any()
    assert (fewer.likeliest < n).all()
    assert_same(fewer, score(pair, documents, no_bar))
    evaluated()
    assert_same(fewer, score(pair, documents, no_bar, work=tmp_path))
    pair.most_shared = pair.base.n_vocab
    assert_same(before, score(pair, documents, no_bar, work=tmp_path))
    assert evaluated() == (0, 0)


def test_some_of_the_documents_leave_the_scores_of_all(pair, tmp_path):
    """As `eval --limit` does, or another data file, in the folder of a longer pass."""
    every, some, other = (
        tokenized(enumerate(rows), pair)
        for rows in (ROWS, ROWS[4:7], [*ROWS[2:5], {"prompt": "new", "completion": "n"}])
    )
    first = score(pair, every, no_bar, work=tmp_path)
    score(pair, other, no_bar, work=tmp_path)
    evaluated = Evaluated(pair)
    assert_same(score(pair, some, no_bar, work=tmp_path), score(pair, some, no_bar), 2e-2)
    assert evaluated() == (cost(some), cost(some))  # by the pass without a folder
    assert_same(first, score(pair, every, no_bar, work=tmp_path))
    assert evaluated() == (0, 0)


def test_a_copy_that_was_stopped_loses_nothing(pair, tmp_path, monkeypatch):
    old, new = (tokenized(enumerate(ROWS[i:]), pair) for i in (0, 3))
    score(pair, old, no_bar, work=tmp_path)
    replace = store.os.replace
    evaluated = Evaluated(pair)
    for stop_at in (1, 2):
        calls = iter(range(10))

        def stopping(source, target, calls=calls, stop_at=stop_at):
            if next(calls) == stop_at - 1:
                raise KilledError
            replace(source, target)

        monkeypatch.setattr(store.os, "replace", stopping)
        with pytest.raises(KilledError):
            score(pair, new, no_bar, work=tmp_path)
    monkeypatch.undo()
    assert_same(score(pair, new, no_bar, work=tmp_path), score(pair, new, no_bar), 2e-2)
    assert evaluated() == (cost(new), cost(new))  # by the pass without a folder


def test_another_expert_beside_the_same_base(pair, tiny, tmp_path):
    documents = tokenized(enumerate(ROWS), pair)
    first = score(pair, documents, no_bar, work=tmp_path)
    with load(tiny["base"], tiny["endless"], "margin", n_threads=1, n_ctx=256) as other:
        evaluated = Evaluated(other)
        second = score(other, documents, no_bar, work=tmp_path)
        assert evaluated() == (0, cost(documents))
    assert np.array_equal(first.base, second.base)
    assert not np.allclose(first.expert, second.expert)
    evaluated = Evaluated(pair)
    assert_same(first, score(pair, documents, no_bar, work=tmp_path))  # the first one's are kept
    assert evaluated() == (0, 0)


def test_scores_of_another_base_and_what_is_no_folder_of_scores_are_refused(pair, tiny, tmp_path):
    documents = tokenized(enumerate(ROWS), pair)
    score(pair, documents, no_bar, work=tmp_path)
    with (
        load(tiny["endless"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as other,
        pytest.raises(DataError, match=r"another model than .*endless"),
    ):
        score(other, documents, no_bar, work=tmp_path)
    (folder,) = tmp_path.glob("base-*")
    (folder / "documents.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="is missing or broken"):
        score(pair, documents, no_bar, work=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot keep the scores there"):
        score(pair, documents, no_bar, work=tmp_path / "file")


def test_a_full_disk_is_an_error_that_keeps_what_was_scored(pair, tmp_path):
    """A real file system of one megabyte; the base's scores take four."""
    documents = tokenized(enumerate(ROWS * 40), pair)
    work = tmp_path / "small"
    work.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(work)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here; run the tests as root")
    try:
        with pytest.raises(DataError, match="no space left on device; the scores so far are kept"):
            score(pair, documents, no_bar, work=work)
        remount = ["mount", "-o", "remount,size=20M", str(work)]
        subprocess.run(remount, check=True)
        evaluated = Evaluated(pair)
        again = score(pair, documents, no_bar, work=work)
        base, expert = evaluated()
        assert 0 < base < cost(documents)
        assert expert == cost(documents)
        again = type(again)(**{name: np.array(v) for name, v in vars(again).items()})
    finally:
        subprocess.run(["umount", "-l", str(work)], check=True)
    assert_same(again, score(pair, documents, no_bar))


@pytest.mark.usefixtures("small_groups")
def test_an_error_of_the_disk_is_one_line_and_the_next_run_goes_on(pair, tmp_path, monkeypatch):
    documents = tokenized(enumerate(ROWS), pair)

    class Full(store.FileIO):
        n_bytes = 0

        def write(self, data):
            Full.n_bytes += len(data)
            # What is overwritten in place, the number of documents done, needs no space.
            if Full.n_bytes > 50_000 and "done" not in str(self.name):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[: len(data) // 2 + 1])  # a part at a time

    with monkeypatch.context() as patch:
        patch.setattr(store, "FileIO", Full)
        with pytest.raises(DataError, match="the scores so far are kept"):
            score(pair, documents, no_bar, work=tmp_path)
    evaluated = Evaluated(pair)
    again = score(pair, documents, no_bar, work=tmp_path)
    assert 0 < evaluated()[0] < cost(documents)
    assert_same(again, score(pair, documents, no_bar))


@pytest.mark.parametrize("broken", ["base", "expert"])
def test_a_model_that_gives_nan_is_named(tiny, tmp_path, broken):
    """Its weights hold NaN, as those of a damaged download may."""
    path = tmp_path / "nan.gguf"
    write_model(path, SHAPES["tiny"], seed=0, gain=float("nan"))
    paths = {"base": tiny["base"], "expert": tiny["expert"], broken: str(path)}
    work = tmp_path / "work"
    with load(paths["base"], paths["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        documents = tokenized(enumerate(ROWS), pair)
        with pytest.raises(ColmError, match=r"nan\.gguf: gives NaN .* the file is broken"):
            score(pair, documents, no_bar, work=work)
    # The other model's scores are as good as ever.
    if broken == "expert":
        with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
            evaluated = Evaluated(pair)
            score(pair, documents, no_bar, work=work)
            assert evaluated() == (0, cost(documents))


def test_a_score_file_replaces_the_expert(pair, tiny, tmp_path):
    path = tmp_path / "expert.npz"
    documents = tokenized(enumerate(ROWS), pair)
    said = score_expert(pair, documents, path, no_bar)
    scores = score(pair, documents, no_bar)
    assert said["n_documents"] == 20
    assert (said["n_cut"], said["n_dropped"]) == (0, 0)
    with np.load(path) as file:
        kinds = {name: str(file[name].dtype) for name in file.files}
        assert str(file["model"]) == tiny["expert"]
        assert np.array_equal(file["tokens"], documents.tokens)
        assert np.array_equal(file["logprob"], scores.expert)
        assert np.array_equal(file["right"], scores.expert_right)
        counts = file["lengths"] - file["starts"]
        assert np.array_equal(np.repeat(file["lines"], counts), scores.line)
    assert {k: v for k, v in kinds.items() if k not in ("model", "base")} == {
        "tokens": "int32",
        "lengths": "int64",
        "starts": "int64",
        "lines": "int64",
        "logprob": "float64",
        "right": "bool",
        "best": "float64",
        "choice": "float64",
        "part": "int64",
    }
    evaluated = Evaluated(pair)
    assert_same(score(pair, documents, no_bar, expert_scores=[path]), scores)
    assert evaluated() == (cost(documents), 0)
    with pytest.raises(DataError, match="holds scores of other data, or of prompts"):
        score(pair, documents[1:], no_bar, expert_scores=[path])
    assert [p.name for p in tmp_path.iterdir()] == ["expert.npz"]


def test_broken_score_files_are_refused(pair, tmp_path):
    documents = tokenized(enumerate(ROWS), pair)
    with pytest.raises(DataError, match="No such file"):
        score(pair, documents, no_bar, expert_scores=[tmp_path / "absent.npz"])
    (tmp_path / "text.npz").write_text("no scores")
    with pytest.raises(DataError, match="not a file of `colm-edge score`"):
        score(pair, documents, no_bar, expert_scores=[tmp_path / "text.npz"])
    path = tmp_path / "short.npz"
    arrays = {"tokens": documents.tokens, "lengths": documents.lengths, "starts": documents.starts}
    arrays["base"] = np.array(pair.base.fingerprint)
    columns = {name: np.zeros(3) for name in ("logprob", "best", "choice")}
    columns["right"] = np.zeros(3, np.bool_)
    np.savez(path, **arrays, **columns)
    with pytest.raises(DataError, match=rf"expected {documents.n_scored} scores"):
        score(pair, documents, no_bar, expert_scores=[path])


def test_a_pass_with_a_work_folder_keeps_a_few_numbers_a_document(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "COPY_ROWS", 500)

    def measure(n):
        documents = tokenized(
            ((i, {"prompt": "p", "completion": f"{i:0100}"}) for i in range(n)),
            pair,
            work=tmp_path / str(n),
        )
        tracemalloc.start()
        scores = score(pair, documents, no_bar, work=tmp_path / str(n))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(scores.base) > 100 * n
        return peak

    measure(10)
    # Of hidden states, features and scores a document has 30 kB here.
    assert (measure(250) - measure(50)) / 200 < 300


def test_a_work_folder_of_an_earlier_version_is_refused(pair, tmp_path):
    """It kept a state of each document, in columns that had room for all of them."""
    documents = tokenized(enumerate(ROWS), pair)
    score(pair, documents, no_bar, work=tmp_path)
    (folder,) = tmp_path.glob("base-*")
    np.save(folder / "state.npy", np.ones(len(documents), np.uint8))
    with pytest.raises(DataError, match=r"base-\w+: was written by an earlier .*remove"):
        score(pair, documents, no_bar, work=tmp_path)


@pytest.mark.parametrize("name", ["done.int64", "hidden.float32", "logprob.float64"])
def test_a_damaged_work_folder_is_an_error(pair, tmp_path, name):
    documents = tokenized(enumerate(ROWS), pair)
    score(pair, documents, no_bar, work=tmp_path)
    (damaged,) = tmp_path.glob(f"base-*/{name}")
    whole = damaged.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        damaged.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: is missing or broken .*remove the work"):
            score(pair, documents, no_bar, work=tmp_path)
    damaged.unlink()
    with pytest.raises(DataError, match=rf"{name}: is missing or broken"):
        score(pair, documents, no_bar, work=tmp_path)


def test_a_model_that_gives_infinities_is_named_at_its_first_batch(pair, tiny, monkeypatch):
    n_batches, honest = 0, scoring._score_locally

    def broken(*args):
        nonlocal n_batches
        n_batches += 1
        columns = honest(*args)
        columns["hidden"][0, 0] = np.inf
        return columns

    monkeypatch.setattr(scoring, "PACK_TOKENS", 100)
    monkeypatch.setattr(scoring, "_score_locally", broken)
    with pytest.raises(ColmError, match=r"base\.gguf: hidden holds inf.* is broken"):
        score(pair, tokenized(enumerate(ROWS), pair), no_bar)
    assert n_batches == 1


def test_where_a_context_scales_positions_its_size_tells_scores_apart(tiny, monkeypatch):
    def identity_at(n_ctx):
        with load(tiny["base"], tiny["expert"], "margin", n_ctx=n_ctx) as pair:
            return scoring.identity(pair, pair.members)

    assert identity_at(128) == identity_at(256)
    metadata = Model.metadata

    def scaled(model, key):
        return "128" if key.endswith("original_context_length") else metadata(model, key)

    monkeypatch.setattr(Model, "metadata", scaled)
    assert identity_at(128) != identity_at(256)
