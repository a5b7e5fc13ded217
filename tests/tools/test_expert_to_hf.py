"""The demo pair's expert as a Hugging Face folder: the same function of the same tokens."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import expert_to_hf
import pytest
from click.testing import CliRunner

import colm_edge
from colm_edge.llama.model import Model

pytest.importorskip("torch", reason="needs the extra finetune")
transformers = pytest.importorskip("transformers", reason="needs the extra finetune")
gguf_base = import_module("lib.gguf_base")
EXPERT = Path(colm_edge.__file__).parent / "data" / "expert.gguf"
TEXTS = ("When did the last Caspian tiger die?\n", "Größe 1969 …\n\n  x", "a<|end|>b", "It's 10%.")


def write(out, *options):
    return CliRunner().invoke(expert_to_hf.main, [str(out), *map(str, options)])


def test_the_folder_is_the_shipped_expert(tmp_path):
    out = tmp_path / "expert"
    done = write(out)
    assert done.exit_code == 0, done.output
    network = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert gguf_base.GgufBase(EXPERT).check(network) < 0.05
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = Model(EXPERT)
    try:
        for text in TEXTS:
            tokens = model.tokenize(text, special=True, bos=False)
            assert tokenizer.encode(text, add_special_tokens=False) == tokens
            assert tokenizer.decode(tokens) == text
        assert {tokenizer.eos_token_id, network.config.eos_token_id} == {model.end_token}
        assert len(tokenizer) == network.config.vocab_size == model.n_vocab
    finally:
        model.close()
    again = write(out)
    assert again.exit_code == 1
    assert "is not empty; give a new folder" in again.stderr


def test_another_tokenizer_is_refused(tmp_path, tiny):
    other = tmp_path / "other.gguf"
    other.write_bytes(Path(tiny["expert"]).read_bytes().replace(b"qwen2", b"gpt-2"))
    failed = write(tmp_path / "out", "-m", other)
    assert failed.exit_code == 1
    assert "tokenizer.ggml.pre is gpt-2, expected qwen2" in failed.stderr
    assert not (tmp_path / "out").exists()
