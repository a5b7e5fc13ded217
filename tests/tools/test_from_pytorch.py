"""From a PyTorch checkpoint to llama.cpp: p_defer stays σ(last logit), to the last position."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import convert, need_torch, write_tokenizer
from click.testing import CliRunner
from gguf import GGUFWriter
from lib import checkpoint_files
from lib.llama_gguf import describe_llama
from lib.random_model import SHAPES, vocabulary

from colm_edge.cli import main as colm_edge
from colm_edge.switch.rules import DEFER_TOKEN

N_HEAD, N_KV = 4, 2  # grouped-query attention, which the tiny shape does not have
SHAPE = replace(SHAPES["tiny"], n_head=N_HEAD, n_head_kv=N_KV)
ROPE_BASE, EPSILON = 10_000.0, 1e-5


def llama_state(torch, n_vocab: int, std: float | None) -> dict:
    """Return a random llama's state dict, with norms that differ from 1.

    std: of all matrices; None chooses one for each, so that every layer and the switch matter.
    """
    torch.manual_seed(11)
    n, ff, kv = SHAPE.n_embd, SHAPE.n_ff, SHAPE.n_embd // N_HEAD * N_KV

    def norm():
        return 1 + 0.2 * torch.randn(n)

    def matrix(rows: int, columns: int):
        return torch.randn(rows, columns) * (std or columns**-0.5)

    state = {
        "model.embed_tokens.weight": torch.randn(n_vocab, n) * (std or 1),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(n_vocab, n) * (1 if std else 3),
    }
    for i in range(SHAPE.n_layer):
        layer = f"model.layers.{i}."
        state |= {
            f"{layer}input_layernorm.weight": norm(),
            f"{layer}post_attention_layernorm.weight": norm(),
            f"{layer}self_attn.q_proj.weight": matrix(n, n),
            f"{layer}self_attn.k_proj.weight": matrix(kv, n),
            f"{layer}self_attn.v_proj.weight": matrix(kv, n),
            f"{layer}self_attn.o_proj.weight": matrix(n, n),
            f"{layer}mlp.gate_proj.weight": matrix(ff, n),
            f"{layer}mlp.up_proj.weight": matrix(ff, n),
            f"{layer}mlp.down_proj.weight": matrix(n, ff),
        }
    return state


def llama_logits(torch, state: dict, tokens: list[int]):
    """Return the logits at every position, (n_tokens, n_vocab), of a llama as in transformers."""
    n, d = len(tokens), SHAPE.n_embd // N_HEAD
    rate = ROPE_BASE ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(torch.arange(n, dtype=torch.float64), rate).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * state[name]

    def heads(x, count):
        return x.view(n, count, d).transpose(0, 1)

    def rotate(x):
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    x = state["model.embed_tokens.weight"][torch.tensor(tokens)]
    for i in range(SHAPE.n_layer):
        layer = f"model.layers.{i}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        h = norm(x, f"{layer}input_layernorm.weight")
        q = rotate(heads(h @ state[f"{attention}q_proj.weight"].T, N_HEAD))
        k = rotate(heads(h @ state[f"{attention}k_proj.weight"].T, N_KV))
        v = heads(h @ state[f"{attention}v_proj.weight"].T, N_KV)
        k, v = (t.repeat_interleave(N_HEAD // N_KV, 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / d**0.5
        hidden_from = torch.ones(n, n, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(hidden_from, -torch.inf).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).reshape(n, -1) @ state[f"{attention}o_proj.weight"].T
        h = norm(x, f"{layer}post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(h @ state[f"{mlp}gate_proj.weight"].T)
        x = x + (gate * (h @ state[f"{mlp}up_proj.weight"].T)) @ state[f"{mlp}down_proj.weight"].T
    return norm(x, "model.norm.weight") @ state["lm_head.weight"].T


def write_gguf(folder: Path, path: Path) -> None:
    """Write a Hugging Face llama as F32 GGUF, as llama.cpp's converter does."""
    weights = checkpoint_files.Weights(folder)
    tensors = {t.name: t.floats() for _, shard in weights.shards() for t in shard}
    writer = GGUFWriter(str(path), "llama")
    describe_llama(writer, SHAPE, *vocabulary(len(tensors["lm_head.weight"])))
    writer.add_rope_freq_base(ROPE_BASE)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for full_name, stored in tensors.items():
        name, data = full_name, stored
        count = {"q": N_HEAD, "k": N_KV}.get(name.split(".")[-2].removesuffix("_proj"))
        if count:  # rotary halves become pairs
            halves = data.reshape(count, 2, -1, data.shape[1])
            data = halves.swapaxes(1, 2).reshape(data.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
@pytest.mark.parametrize(
    ("std", "attention", "tolerance", "low", "high"),
    [
        (0.02, (), 1e-4, 0.45, 0.55),  # transformers' own random llama
        (None, ("-fa", "off", "-ctk", "f32", "-ctv", "f32"), 1e-4, 0.1, 0.9),
        # Keys and values in float16, llama.cpp's default: the largest difference seen is 1.3e-3.
        (None, (), 5e-3, 0.1, 0.9),
    ],
)
def test_p_defer_is_pytorchs_sigmoid_of_the_last_logit(
    tiny, tmp_path, kind, std, attention, tolerance, low, high
):
    """A llama in the authors' layout; its base and switch are converted apart and run together."""
    torch = need_torch()
    folder, base = tmp_path / "c", tmp_path / "base"
    folder.mkdir()
    n_base = SHAPE.n_vocab
    state = llama_state(torch, n_base + 2, std)
    torch.save(state, folder / "pytorch_model.bin")
    write_tokenizer(folder, {"<pad>": n_base, DEFER_TOKEN: n_base + 1}, ["added_tokens.json"])
    (folder / "config.json").write_text(json.dumps({"vocab_size": n_base + 2}))
    args = [folder, "--outfile", tmp_path / "s.gguf", "--strip-to", base]
    if kind == "onnx":
        pytest.importorskip("onnx", reason="--onnx writes with the onnx package: pip install onnx")
        args += ["--onnx", tmp_path / "s.onnx"]
    assert convert(*args).exit_code == 0
    write_gguf(base, tmp_path / "base.gguf")

    models = ["-m", str(tmp_path / "base.gguf"), "-me", tiny["expert"]]
    options = ["-sw", str(tmp_path / f"s.{kind}"), "-t", "1", "--temp", "0", "-n", "40", "--json"]
    options += attention
    seen: list[float] = []
    worst = 0.0
    for prompt in ("a", "once upon a time", "the quick brown fox jumps over the lazy dog. " * 4):
        result = CliRunner().invoke(colm_edge, ["run", prompt, *models, *options])
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        prompt_tokens = answer["prompt_tokens"]
        tokens = prompt_tokens + [t["id"] for t in answer["tokens"]]
        logits = llama_logits(torch, state, tokens)[len(prompt_tokens) - 1 : -1]
        expected = logits[:, -1].sigmoid().tolist()
        for step, p, row in zip(answer["tokens"], expected, logits, strict=True):
            worst = max(worst, abs(step["p_defer"] - p))
            if step["source"] == "base":  # the base is PyTorch's too, without the added rows
                assert row[:n_base].max() - row[step["id"]] < 1e-2
            seen.append(p)
    print(f"{len(seen)} positions, |Δp| at most {worst:.2g}, p {min(seen):.3f} to {max(seen):.3f}")
    assert worst < tolerance
    assert len(seen) >= 60
    assert min(seen) < low  # the comparison is about something
    assert max(seen) > high
