"""Co-LLM checkpoints as the authors' training leaves them, and the switches they turn into."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import convert_switch
import numpy as np
import pytest
from checkpoints import (
    N_BASE,
    N_EMBD,
    NAMES,
    convert,
    make_checkpoint,
    need_torch,
    rounded,
    write_safetensors,
    write_tokenizer,
)
from lib import checkpoint_files, co_llm

from colm_edge.errors import ModelError
from colm_edge.switch.file import Switch
from colm_edge.switch.rules import DEFER_TOKEN

TOOL = Path(convert_switch.__file__)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("layout", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
def test_every_layout_gives_its_last_row(tmp_path, layout, names, dtype):
    tensors = make_checkpoint(tmp_path / "c", layout, dtype, names)
    result = convert(tmp_path / "c", "--outfile", tmp_path / "s.gguf")
    assert result.exit_code == 0, result.stderr
    switch = Switch.load(tmp_path / "s.gguf")
    head = tensors[NAMES[names][1] or NAMES[names][0]]
    assert np.array_equal(switch.weight, rounded(head[-1:], dtype))
    assert switch.features == ("hidden",)
    assert (switch.bias.tolist(), switch.threshold, switch.defer_rates) == ([0.0], 0.5, ())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "s.gguf"]


def test_no_file_of_the_checkpoint_is_written_over(tmp_path):
    make_checkpoint(tmp_path / "c")
    (weights,) = (tmp_path / "c").glob("*.safetensors")
    before = weights.read_bytes()
    for options in ((), ("--onnx", weights)):
        outfile = tmp_path / "s.gguf" if options else weights
        result = convert(tmp_path / "c", "--outfile", outfile, *options)
        assert "is used by this command already" in result.stderr
        assert weights.read_bytes() == before


@pytest.mark.parametrize("file", co_llm.TOKENIZER_FILES)
def test_any_tokenizer_file_names_the_row(tmp_path, file):
    tensors = make_checkpoint(tmp_path / "c", files=[file])
    assert convert(tmp_path / "c", "--outfile", tmp_path / "s.gguf").exit_code == 0
    weight = Switch.load(tmp_path / "s.gguf").weight
    assert np.array_equal(weight, tensors["lm_head.weight"][-1:])


def test_fast_tokenizers_add_one_row_only(tmp_path):
    make_checkpoint(tmp_path / "c", ids={DEFER_TOKEN: N_BASE}, rows=N_BASE + 1)
    result = convert(tmp_path / "c", "--dry-run")
    assert f"token       {DEFER_TOKEN} {N_BASE}\n" in result.stdout
    result = convert(tmp_path / "c", "--outfile", tmp_path / "s.gguf", "--strip-to", tmp_path / "b")
    assert f"{N_BASE} tokens" in result.stderr


@pytest.mark.parametrize("shape", [(1, N_EMBD), (N_EMBD,)])
def test_a_bare_row_in_any_file(tmp_path, shape):
    row = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "row.npy", row)
    np.save(tmp_path / "half.npy", row.astype(np.float16))
    write_safetensors(tmp_path / "row.safetensors", {"w": row})
    for name in ("row.npy", "half.npy", "row.safetensors"):
        assert convert(tmp_path / name, "--outfile", tmp_path / "s.gguf").exit_code == 0
        expected = row.astype(np.float16) if name == "half.npy" else row
        assert np.array_equal(Switch.load(tmp_path / "s.gguf").weight.ravel(), expected.ravel())


def test_a_bare_row_as_torch_saves_it(tmp_path):
    """gperp_init.bin is a leaf that requires grad; a view and a parameter lie in larger storage."""
    torch = need_torch()
    matrix = torch.randn(5, N_EMBD)
    rows = {
        "gperp_init.bin": matrix.mean(dim=0, keepdim=True).detach().requires_grad_(),
        "view.pt": matrix[3:4],
        "column.pt": matrix.T.contiguous()[:, 2],
        "parameter.pt": torch.nn.Parameter(matrix[1]),
        "dict.pt": {"w": matrix[2].to(torch.bfloat16), "step": 7},
        "double.pt": matrix[2].double(),
    }
    for name, row in rows.items():
        torch.save(row, tmp_path / name)
        result = convert(tmp_path / name, "--outfile", tmp_path / "s.gguf")
        assert result.exit_code == 0, result.stderr
        expected = (row["w"] if name == "dict.pt" else row).detach().float().numpy().ravel()
        assert np.array_equal(Switch.load(tmp_path / "s.gguf").weight.ravel(), expected), name


# Traps


def test_a_head_bias_becomes_the_switchs(tmp_path):
    bias = np.arange(N_BASE + 2, dtype=np.float32) / 8
    for names, name in (("llama", "lm_head.bias"), ("neox", "embed_out.bias")):
        make_checkpoint(tmp_path / names, names=names, tensors={name: bias})
        convert(tmp_path / names, "--outfile", tmp_path / "s.gguf")
        assert Switch.load(tmp_path / "s.gguf").bias.tolist() == [float(bias[-1])]
    make_checkpoint(tmp_path / "short", tensors={"lm_head.bias": bias[:-1]})
    assert "lm_head.bias has the shape" in convert(tmp_path / "short", "--dry-run").stderr


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"logit_scale": 0.0625}, 0.0625),
        ({"logits_scaling": 8.0}, 1 / 8),
        ({"text_config": {"lm_head_multiplier": 3.0}}, 3.0),
        ({"dim_model_base": 3}, 3 / N_EMBD),
        ({"logit_scale": None, "final_logit_softcapping": None}, 1.0),
    ],
)
def test_a_logit_scale_is_folded_in(tmp_path, config, scale):
    bias = np.full(N_BASE + 2, 0.75, np.float32)
    tensors = make_checkpoint(tmp_path / "c", config=config, tensors={"lm_head.bias": bias})
    convert(tmp_path / "c", "--outfile", tmp_path / "s.gguf")
    switch = Switch.load(tmp_path / "s.gguf")
    expected = tensors["lm_head.weight"][-1:].astype(np.float64) * scale
    assert np.array_equal(switch.weight, expected.astype(np.float32))
    assert switch.bias == pytest.approx(0.75 * scale)


def _no_defer(folder):
    make_checkpoint(folder, ids={"<pad>": N_BASE})


def _disagreeing(folder):
    make_checkpoint(folder)
    (folder / "added_tokens.json").write_text(json.dumps({DEFER_TOKEN: 4}))


def _tied_but_different(folder):
    make_checkpoint(folder, config={"tie_word_embeddings": True})


def _nan(folder):
    head = np.full((N_BASE + 2, N_EMBD), np.nan, np.float32)
    make_checkpoint(folder, tensors={"lm_head.weight": head})


def _quantised(folder):
    make_checkpoint(folder)
    path = folder / "model.safetensors"
    shape = (N_BASE + 2, N_EMBD)
    header = {"lm_head.weight": {"dtype": "U8", "shape": shape, "data_offsets": [0, 66]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(66))


def _missing_tensor(folder):
    make_checkpoint(folder, "safetensors-sharded")
    write_safetensors(folder / "model-00003-of-00003.safetensors", {"w": np.zeros((2, 2))})


def _outside(folder):
    make_checkpoint(folder, "safetensors-sharded")
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _only(name):
    def make(folder):
        folder.mkdir()
        (folder / name).write_text("{}")

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: make_checkpoint(f, rows=16), "not the last row, .* rows were padded"),
        (lambda f: make_checkpoint(f, rows=N_BASE), "come from different trainings"),
        (_no_defer, r"no token <\|defer\|> in added_tokens.json"),
        (lambda f: make_checkpoint(f, files=[]), "expected added_tokens.json, .* beside the w"),
        (_disagreeing, "disagree on"),
        (_tied_but_different, "rows differ"),
        (lambda f: make_checkpoint(f, names="tied", config={"tie_word_embeddings": False}),
         "a shard is missing"),
        (lambda f: make_checkpoint(f, config={"final_logit_softcapping": 30.0}),
         "final_logit_softcapping = 30.0, a cap .* -sw defer-row"),
        (lambda f: make_checkpoint(f, config={"text_config": {"final_logit_softcapping": 30.0}}),
         "a cap that acts"),
        (lambda f: make_checkpoint(f, config={"logit_scale": "inv_sqrt_d_model"}),
         "expected a number other than 0"),
        (_nan, "NaN or infinite"),
        (_quantised, "is U8; expected one of F32, F16"),
        (_missing_tensor, "the index says it holds lm_head.weight"),
        (_outside, "expected a plain file name"),
        (_only("adapter_config.json"), "LoRA adapter; merge it"),
        (_only("gperp_init.bin"), "only gperp_init.bin"),
        (_only("config.json"), "expected model.safetensors or pytorch_model.bin"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path, make, words):
    make(tmp_path / "c")
    result = convert(tmp_path / "c", "--outfile", tmp_path / "s.gguf")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(words, result.stderr), result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_file_that_is_not_one_row_is_refused(tmp_path):
    row = np.zeros((1, N_EMBD), np.float32)
    write_safetensors(tmp_path / "two.safetensors", {"a": row, "b": row})
    write_safetensors(tmp_path / "wide.safetensors", {"a": np.zeros((2, 3))})
    write_safetensors(tmp_path / "part.safetensors", {"lm_head.weight": row})
    np.save(tmp_path / "whole.npy", np.arange(4))
    for name, words in (
        ("two.safetensors", "holds 2 tensors, expected one row"),
        ("wide.safetensors", r"the shape \(2, 3\)"),
        ("part.safetensors", "part of a checkpoint; give the checkpoint's folder"),
        ("whole.npy", "holds int64"),
        ("absent", "No such file"),
    ):
        with pytest.raises(ModelError, match=words):
            co_llm.read_bare(tmp_path / name)


# Memory

PEAK = """
import resource, sys
sys.path.insert(0, {tools!r})
import convert_switch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    convert_switch.main(sys.argv[1:])
except SystemExit as e:
    assert not e.code, e.code
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux only")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_of_gigabytes_takes_little_memory(tmp_path, kind):
    """A sparse file of 8 GB, of which the row alone is read; a smaller one, stripped as well."""
    folder = tmp_path / "c"
    folder.mkdir()
    rows, width = 128_258, 16_384
    size = rows * width * 2
    row = np.random.default_rng(0).normal(size=width).astype(np.float16)
    path = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    if kind == "safetensors":
        header = {
            name: {"dtype": "F16", "shape": [rows, width], "data_offsets": [at, at + size]}
            for name, at in (("model.embed_tokens.weight", 0), ("lm_head.weight", size))
        }
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + 2 * size)
        with path.open("r+b") as file:
            file.seek(-row.nbytes, os.SEEK_END)
            file.write(row.tobytes())
    else:
        torch = need_torch()
        rows = 4_096  # 134 MB, in full
        head = torch.zeros(rows, width, dtype=torch.float16)
        head[-1] = torch.from_numpy(row)
        torch.save({"lm_head.weight": head}, path)
        del head
    write_tokenizer(folder, {DEFER_TOKEN: rows - 1})
    args = [str(folder), "--outfile", str(tmp_path / "s.gguf")]
    if kind == "bin":
        args += ["--strip-to", str(tmp_path / "base")]
    out = subprocess.run(
        [sys.executable, "-P", "-c", PEAK.format(tools=str(TOOL.parent)), *args],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(out.stdout) < 60_000  # kB
    assert np.array_equal(Switch.load(tmp_path / "s.gguf").weight[0], row.astype(np.float32))


# The base without the added rows


@pytest.mark.parametrize("layout", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("names", NAMES)
def test_strip_writes_the_base_without_the_added_rows(tmp_path, layout, names):
    folder, base = tmp_path / "c", tmp_path / "base"
    bias = np.arange(N_BASE + 2, dtype=np.float32)
    more = {} if names == "tied" else {NAMES[names][1].replace("weight", "bias"): bias}
    tensors = make_checkpoint(folder, layout, "BF16", names, tensors=more)
    for name in ("training_args.bin", "trainer_state.json", "tokenizer.model", "README.md"):
        (folder / name).write_text("{}")
    (folder / "generation_config.json").write_text('{"pad_token_id": 9, "eos_token_id": 2}')
    result = convert(folder, "--outfile", tmp_path / "s.gguf", "--strip-to", base)
    assert result.exit_code == 0, result.stderr

    weights = checkpoint_files.Weights(base)
    assert weights.layout.startswith("model.safetensors")
    assert ("shards" in weights.layout) == ("sharded" in layout)
    found = {t.name: t for _, shard in weights.shards() for t in shard}
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        kept = array if name == "model.norm.weight" else array[:N_BASE]
        assert found[name].dtype == "BF16"
        assert np.array_equal(found[name].floats(), rounded(kept, "BF16")), name

    def content(name):
        return json.loads((base / name).read_text())

    assert content("config.json") == {"vocab_size": N_BASE, "hidden_size": N_EMBD}
    assert content("generation_config.json") == {"eos_token_id": 2}
    assert co_llm.added_tokens(base) == {"<unk>": 0}
    assert content("tokenizer_config.json") == {
        "added_tokens_decoder": {"0": {"content": "<unk>"}},
        "additional_special_tokens": [],
        "eos_token": "</s>",
    }
    assert content("special_tokens_map.json") == {
        "additional_special_tokens": [],
        "eos_token": {"content": "</s>"},
    }
    tokenizer = content("tokenizer.json")
    assert (tokenizer["added_tokens"], tokenizer["padding"]) == ([], None)
    assert len(tokenizer["model"]["vocab"]) == N_BASE
    there = {p.name for p in base.iterdir()}
    assert {"tokenizer.model", "README.md"} <= there
    assert not there & {"training_args.bin", "trainer_state.json"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "c", "s.gguf"]

    again = convert(folder, "--outfile", tmp_path / "s2.gguf", "--strip-to", base)
    assert "is there already" in again.stderr
    assert not (tmp_path / "s2.gguf").exists()


def test_strip_of_one_part_with_an_index_can_be_read(tmp_path):
    folder, part = tmp_path / "c", "model-00001-of-00001.safetensors"
    tensors = make_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / part)
    index = {"weight_map": dict.fromkeys(tensors, part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(folder, "--outfile", tmp_path / "s.gguf", "--strip-to", tmp_path / "base")
    weights = checkpoint_files.Weights(tmp_path / "base")
    assert {t.name for _, shard in weights.shards() for t in shard} == set(tensors)


def test_strip_handles_tensors_of_every_stride(tmp_path):
    """.bin files hold views, and tied weights under both names at one place."""
    torch = need_torch()
    make_checkpoint(tmp_path / "c", "bin", names="tied")
    matrix = torch.randn(N_BASE + 2, N_EMBD)
    turned = torch.randn(4, 3)
    state = {
        "model.embed_tokens.weight": matrix,
        "lm_head.weight": matrix,
        "a.weight": turned.T,
        "b.weight": torch.arange(5),
        "c.weight": torch.tensor(2.5),
    }
    torch.save(state, tmp_path / "c" / "pytorch_model.bin")
    convert(tmp_path / "c", "--outfile", tmp_path / "s.gguf", "--strip-to", tmp_path / "base")
    found = checkpoint_files.read_file(tmp_path / "base" / "model.safetensors")
    assert set(found) == set(state) - {"lm_head.weight"}
    assert np.array_equal(found["a.weight"].floats(), turned.T.numpy())
    assert np.array_equal(found["b.weight"].stored(), np.arange(5))
    assert found["c.weight"].floats() == 2.5
    assert found["model.embed_tokens.weight"].shape == (N_BASE, N_EMBD)
    assert np.array_equal(Switch.load(tmp_path / "s.gguf").weight[0], matrix[-1].numpy())


def test_a_failed_strip_leaves_nothing(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "c")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_safetensors", full)
    result = convert(
        tmp_path / "c", "--outfile", tmp_path / "s.gguf", "--strip-to", tmp_path / "base"
    )
    assert "No space left on device" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# The command


def test_dry_run_prints_what_was_found_and_writes_nothing(tmp_path):
    tensors = make_checkpoint(tmp_path / "checkpoint", "safetensors-sharded", "BF16")
    norm = np.linalg.norm(rounded(tensors["lm_head.weight"][-1], "BF16").astype(float))
    result = convert(
        tmp_path / "checkpoint",
        "--outfile",
        tmp_path / "s.gguf",
        "--onnx",
        tmp_path / "s.onnx",
        "--strip-to",
        tmp_path / "base",
        "--dry-run",
    )
    assert result.stdout == (
        "checkpoint  checkpoint\n"
        "layout      model.safetensors.index.json, 3 shards\n"
        "token       <|defer|> 10, after <pad> 9\n"
        "row         lm_head.weight[10]\n"
        f"numbers     6 BF16, norm {norm:g}\n"
        "bias        none\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_wrong_usage_is_told(tmp_path):
    np.save(tmp_path / "row.npy", np.ones(4, np.float32))
    for args, words in (
        ([tmp_path / "row.npy"], "give --outfile"),
        (
            [tmp_path / "row.npy", "--outfile", tmp_path / "s", "--strip-to", tmp_path / "b"],
            "a bare row has no base",
        ),
    ):
        result = convert(*args)
        assert result.exit_code == 2
        assert words in result.stderr
    result = convert(tmp_path / "none", "--dry-run")
    assert result.exit_code == 1
    assert "no such file or folder; expected a Co-LLM folder" in result.stderr
    result = convert(tmp_path / "row.npy", "--outfile", tmp_path / "absent" / "s.gguf")
    assert result.exit_code == 1
    assert "no such folder; make it first" in result.stderr
    assert "--strip-to DIR" in convert("-h").stdout


def test_it_does_not_replace_what_it_reads(tmp_path):
    row = tmp_path / "row.npy"
    np.save(row, np.zeros(8, np.float32))
    before = row.read_bytes()
    for flags in (["--outfile", row], ["--outfile", tmp_path / "s.gguf", "--onnx", row]):
        result = convert(row, *flags)
        assert result.exit_code == 1
        assert "is used by this command already" in result.stderr
    assert row.read_bytes() == before


def test_two_results_have_two_names(tmp_path):
    row, out = tmp_path / "row.npy", tmp_path / "new.gguf"
    np.save(row, np.zeros(8, np.float32))
    result = convert(row, "--outfile", out, "--onnx", out)
    assert result.exit_code == 1
    assert "is used by this command already" in result.stderr
    assert not out.exists()
