"""A text without a space, however long, does not end the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from gguf import GGUFWriter
from lib.random_model import SHAPES, write_model

from colm_edge.llama.model import Model
from colm_edge.llama.tokenizer import OWN_SPLITS

RUNS = "A" * 30_000 + " " * 30_000 + "!" * 30_000 + "1" * 30_000
# Characters that Python takes for spaces, and C++ does not, or the other way round.
MIXED = "".join(f"{a}{b}" * 20_000 + "x " for a in "\x01! " for b in "\x1c\x1f\x85\xa0\u2003\u200b")
TOKENIZE = (
    "import sys; from colm_edge.llama.model import Model\n"
    "print(len(Model(sys.argv[1]).tokenize(sys.stdin.read())))"
)


@pytest.mark.parametrize("pre", [*OWN_SPLITS, "gpt-4o", "tekken", "deepseek-v3", "deepseek-llm"])
def test_long_runs_are_tokenized(tmp_path, monkeypatch, pre):
    """In a process of its own, which nothing but an exit code would tell of."""
    add = GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", lambda writer, _: add(writer, pre))
    path = tmp_path / "m.gguf"
    write_model(path, SHAPES["tiny"], seed=0)
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZE, path], input=RUNS + MIXED, encoding="utf-8",
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    model = Model(path)
    tokens = model.tokenize(RUNS[:5000], bos=False)
    assert b"".join(map(model.piece, tokens)).decode() == RUNS[:5000]
    model.close()
