"""Two runs do not share a work folder, and a broken cache of costs is measured again."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from colm_edge.cli import main
from colm_edge.errors import WriteError
from colm_edge.files import locked
from colm_edge.llama import measure
from colm_edge.llama.costs import CostTable
from colm_edge.pair import load


def test_a_folder_has_one_user_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with locked(folder), pytest.raises(WriteError, match="used by another run"), locked(folder):
        pass
    with locked(folder):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"), locked(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--outfile", "s.gguf"],
        ["eval"],
        ["score", "--outfile", "s.npz"],
    ],
)
def test_a_second_run_on_a_work_folder_is_refused(tiny, data, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["-m", tiny["base"], "-me", tiny["expert"], "--data", data]
    with locked(tmp_path / "w"):
        done = CliRunner().invoke(main, [*command, *models, "--work-dir", "w"])
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: w is used by another run; wait for its end, or name another folder\n"
    )


def test_train_on_prompts_claims_its_own_work_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    command = ["train", "--outfile", "s.gguf", "--prompts", "p.jsonl"]
    with locked(tmp_path / "s.gguf.work"):
        done = CliRunner().invoke(main, [*command, "-m", tiny["base"], "-me", tiny["expert"]])
    assert done.exit_code == 1
    assert "s.gguf.work is used by another run" in done.stderr


BROKEN = [
    "",
    "[]",
    "[" * 100_000,
    '{"sizes": [], "seconds": [], "several": 0, "hasty": false}',
    '{"sizes": [1], "seconds": [NaN], "several": 0, "hasty": false}',
    '{"sizes": [1], "seconds": [1e9], "several": 0, "hasty": false}',
    '{"sizes": [1, 2], "seconds": [0.1], "several": 0, "hasty": false}',
    '{"sizes": [1, 1], "seconds": [0.1, 0.1], "several": 0, "hasty": false}',
    '{"sizes": [1, 1000000000], "seconds": [0.1, 0.2], "several": 0, "hasty": false}',
    '{"sizes": [1], "seconds": [0.1], "several": Infinity, "hasty": false}',
    '{"sizes": [1], "seconds": [0.1], "several": 1' + "0" * 400 + ', "hasty": false}',
    '{"sizes": {"1": 1}, "seconds": [0.1], "several": 0, "hasty": false}',
    "\ufeff{}",
]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_cost_table_counts_as_none(tiny, tmp_path, monkeypatch, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=64) as pair:
        path = measure._cache_file(pair.base_session)
        path.parent.mkdir(parents=True)
        path.write_text(text)
        assert measure.kept_table(pair.base_session) is None
        whole = {"sizes": [1, 4], "seconds": [0.1, 0.2], "several": 0.0, "hasty": False}
        path.write_text(json.dumps(whole))
        assert measure.kept_table(pair.base_session)(4) == 0.2


def test_a_cache_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(measure, "measure", lambda *_: (CostTable((1,), (0.1,)), False))
    told: list[str] = []
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=64) as pair:
        measure.cost_table(pair.base_session, hasty=True, note=told.append)
    assert "cannot be kept" in told[-1]
