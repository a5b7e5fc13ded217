"""Two runs do not share a work folder, and a broken cache of costs is measured again."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def test_an_error_of_the_work_is_not_the_folders(tmp_path):
    with pytest.raises(BrokenPipeError), locked(tmp_path / "w"):
        raise BrokenPipeError
    with locked(tmp_path / "w"):
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_has_no_work_folder_beside_it(tiny, data, tmp_path):
    pipe, read = tmp_path / "pipe.gguf", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    command = ["train", "--outfile", str(pipe), "--prompts", data, "-n", "4", "-t", "1"]
    done = CliRunner().invoke(main, [*command, "-m", tiny["base"], "-me", tiny["expert"]])
    assert done.exit_code == 0, done.output
    reader.join()
    assert read[0].startswith(b"GGUF")
    assert list(tmp_path.iterdir()) == [pipe]


BROKEN = [
    "",
    "[]",
    "[" * 100_000,
    '{"sizes": [], "seconds": [], "more": [], "hasty": false}',
    '{"sizes": [1], "seconds": [NaN], "more": [], "hasty": false}',
    '{"sizes": [1], "seconds": [1e9], "more": [], "hasty": false}',
    '{"sizes": [1, 2], "seconds": [0.1], "more": [], "hasty": false}',
    '{"sizes": [1, 1], "seconds": [0.1, 0.1], "more": [], "hasty": false}',
    '{"sizes": [1, 1000000000], "seconds": [0.1, 0.2], "more": [], "hasty": false}',
    '{"sizes": [1], "seconds": [0.1], "more": [Infinity], "hasty": false}',
    '{"sizes": [1], "seconds": [0.1], "more": [1' + "0" * 400 + '], "hasty": false}',
    '{"sizes": {"1": 1}, "seconds": [0.1], "more": [], "hasty": false}',
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
        whole = {"sizes": [1, 4], "seconds": [0.1, 0.2], "more": [0.1], "hasty": False}
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


def test_a_model_replaced_under_its_name_is_measured_anew(tiny, tmp_path, monkeypatch):
    """Size and time are those of the file before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, seen = tmp_path / "m.gguf", list[CostTable | None]()
    content = Path(tiny["base"]).read_bytes()
    for weights in (content, content, content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(weights)
        os.utime(path, (1, 1))
        with load(path, tiny["expert"], "margin", n_threads=1, n_ctx=64) as pair:
            seen.append(measure.kept_table(pair.base_session))
            measure.cost_table(pair.base_session)
    assert [table is not None for table in seen] == [False, True, False]


def test_llama_cpp_built_anew_is_measured_anew(tiny, tmp_path, monkeypatch):
    library, files = tmp_path / "libggml-cpu.so", set[Path]()
    monkeypatch.setattr("colm_edge.llama.ggml.cpu_libraries", lambda: iter([library]))
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=64) as pair:
        for content in (b"one", b"one", b"two"):
            measure._build.cache_clear()
            library.write_bytes(content)
            files.add(measure._cache_file(pair.base_session))
    measure._build.cache_clear()
    assert len(files) == 2


TABLE = CostTable((1, 4), (0.1, 0.2))


def test_two_that_measure_at_once_leave_one_whole_table(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    both = threading.Barrier(2)
    monkeypatch.setattr(measure, "measure", lambda *_: (both.wait(60), (TABLE, False))[1])
    with (
        load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=64) as one,
        load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=64) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        sessions = [one.base_session, other.base_session]
        assert [table.sizes for table in threads.map(measure.cost_table, sessions)] == [(1, 4)] * 2
        assert measure.kept_table(one.base_session).seconds == TABLE.seconds
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files == [measure._cache_file(one.base_session)]


def test_two_that_save_prompts_at_once_leave_one_whole_cache(tiny, tmp_path):
    path, files = tmp_path / "prompts", (tiny["base"], tiny["expert"], "margin")
    with (
        load(*files, n_threads=1, n_ctx=64) as one,
        load(*files, n_threads=1, n_ctx=64) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        for pair in (one, other):
            pair.generate("hello", temperature=0.0, max_tokens=2)
        for _ in range(10):
            for saved in [threads.submit(pair.save_prompts, path) for pair in (one, other)]:
                saved.result()
            one.load_prompts(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompts"]
