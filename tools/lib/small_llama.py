"""A llama of a few million parameters: made, trained and written as GGUF.

What train_demo_pair.py and train_gsm8k_pair.py have in common. PyTorch is imported where used.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

PRETOKEN = (  # the pre-tokenizer llama.cpp calls "qwen2": every digit stands alone
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHUNK_STEPS = 50  # between two calls for windows, each with a seed of its own
SAVE_STEPS = 250

# (chunk, how many, the step it begins at) -> windows of n_ctx + 1 ids, and their loss masks
Windows = Callable[[int, int, int], tuple[list[list[int]], list[list[int]]]]


@dataclass(frozen=True)
class Shape:
    """A llama architecture and how long it is trained."""

    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    steps: int
    batch: int  # windows
    lr: float
    last_steps: int = 0  # more of them, at a tenth of the rate
    n_vocab: int = 2048
    n_ctx: int = 192  # tokens a training window, and the context that the GGUF file states


def train_vocab(corpus, end: str, n_vocab: int, path: Path) -> None:
    """Train a byte-level BPE whose token 0 ends a document."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.replace(end, "") for document in corpus), trainer)
    tokenizer.save(str(path))


def load_vocab(work: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(work / "tokenizer.json"))


def build_model(shape: Shape):
    """Return a llama with tied embeddings; rotary pairs interleave, as in GGUF's llama."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape.n_embd))

        def forward(self, x):
            return F.rms_norm(x, (shape.n_embd,), self.weight, 1e-5)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            n, f = shape.n_embd, shape.n_ff
            self.attn_norm, self.ffn_norm = Norm(), Norm()
            self.attn_qkv = nn.Linear(n, 3 * n, bias=False)
            self.attn_output = nn.Linear(n, n, bias=False)
            self.ffn_gate_up = nn.Linear(n, 2 * f, bias=False)
            self.ffn_down = nn.Linear(f, n, bias=False)

        def forward(self, x, cos, sin):
            b, t, n = x.shape
            qkv = self.attn_qkv(self.attn_norm(x)).view(b, t, 3, shape.n_head, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)

            def rope(z):
                even, odd = z[..., ::2], z[..., 1::2]
                return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

            q, k = rope(q).to(v.dtype), rope(k).to(v.dtype)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn_output(y.transpose(1, 2).reshape(b, t, n))
            gate, up = self.ffn_gate_up(self.ffn_norm(x)).chunk(2, -1)
            return x + self.ffn_down(F.silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
            self.blk = nn.ModuleList(Layer() for _ in range(shape.n_layer))
            self.output_norm = Norm()
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)
            for layer in self.blk:
                for p in (layer.attn_output.weight, layer.ffn_down.weight):
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.n_layer))
            d = shape.n_embd // shape.n_head
            angle = torch.outer(torch.arange(shape.n_ctx), 10000.0 ** (-torch.arange(0, d, 2) / d))
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)

        def forward(self, ids):
            x = self.token_embd(ids)
            t = ids.shape[1]
            for layer in self.blk:
                x = layer(x, self.cos[:t], self.sin[:t])
            return F.linear(self.output_norm(x), self.token_embd.weight)

    return Llama()


def train_model(
    name: str, shape: Shape, windows: Windows, work: Path, *, seed: int, threads: int = 0,
) -> None:  # fmt: skip
    """Train one model; a checkpoint every 250 steps, taken up again when found."""
    import torch
    from torch.nn import functional as F

    main_steps = shape.steps
    steps = main_steps + shape.last_steps
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(shape).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=shape.lr,
        betas=(0.9, 0.97),
    )
    checkpoint = work / f"{name}.ckpt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    print(
        f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, step {start}/{steps}"
    )
    began, average = time.time(), 0.0
    ids: torch.Tensor
    mask: torch.Tensor
    for step in range(start, steps):
        if step == start or step % CHUNK_STEPS == 0:
            rows, masks = windows(step // CHUNK_STEPS, CHUNK_STEPS * shape.batch, step)
            ids, mask = torch.tensor(rows, device=device), torch.tensor(masks, device=device)
        at = (step % CHUNK_STEPS) * shape.batch
        batch, loss_mask = ids[at : at + shape.batch], mask[at : at + shape.batch, 1:]
        warm = min(1.0, (step + 1) / 200)
        # Warm-up, flat, then linear to zero over the last 40 %.
        lr = shape.lr * warm * min(1.0, (main_steps - step) / (0.4 * main_steps))
        if step >= main_steps:
            lr = 0.1 * shape.lr * (steps - step) / shape.last_steps
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch[:, :-1])
        picked = loss_mask.reshape(-1).bool()
        loss = F.cross_entropy(
            logits.flatten(0, 1)[picked].float(), batch[:, 1:].reshape(-1)[picked]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == start else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) / (time.time() - began)
            left = (steps - step - 1) / rate / 60
            print(f"{name} {step + 1}/{steps} loss {average:.4f} {left:.0f} min left", flush=True)
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    torch.save({"model": model.state_dict(), "shape": asdict(shape)}, work / f"{name}.pt")


def export(
    name: str, shape: Shape, work: Path, path: Path, *, title: str, chat_template: str | None
) -> None:
    """Write a trained model as a GGUF file, its matrices in Q8_0."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFWriter, TokenType
    from gguf.quants import quantize

    weights = torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")["model"]
    vocab = json.loads((work / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].__getitem__)
    merges = [" ".join(m) if isinstance(m, list) else m for m in vocab["merges"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    writer = GGUFWriter(str(temporary), "llama")
    writer.add_name(title)
    writer.add_license("MIT")
    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_file_type(7)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (shape.n_vocab - 1))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)

    def matrix(key: str, value: torch.Tensor) -> None:
        raw = quantize(value.float().numpy(), Type.Q8_0)
        writer.add_tensor(key, raw, raw_dtype=Type.Q8_0)

    matrix("token_embd.weight", weights["token_embd.weight"])
    writer.add_tensor("output_norm.weight", weights["output_norm.weight"].float().numpy())
    for i in range(shape.n_layer):
        layer = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"blk.{i}.")}
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{part}.weight", layer[f"{part}.weight"].float().numpy())
        for part, value in zip("qkv", layer["attn_qkv.weight"].chunk(3), strict=True):
            matrix(f"blk.{i}.attn_{part}.weight", value)
        gate, up = layer["ffn_gate_up.weight"].chunk(2)
        matrix(f"blk.{i}.ffn_gate.weight", gate)
        matrix(f"blk.{i}.ffn_up.weight", up)
        matrix(f"blk.{i}.attn_output.weight", layer["attn_output.weight"])
        matrix(f"blk.{i}.ffn_down.weight", layer["ffn_down.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    assert np.isfinite(weights["output_norm.weight"].float().numpy()).all()
