"""Train the pair that ships with colm-edge, from its facts to its GGUF files.

The base reads dialogue about the training entities and about invented ones; the
expert reads statements about every entity and never a question (texts:
demo_pair/text.py). Everything is seeded; each stage writes to the work folder
and is skipped when its result is there; training resumes from its checkpoint.

    pip install -e '.[train-demo]'
    python tools/train_demo_pair.py --work build/demo            # all stages
    python tools/train_demo_pair.py --work build/demo --stage base

Stages: vocab, base, expert, export (GGUF, Q8_0), data (JSONL for `colm-edge
train` and the exams in tests/), switch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from demo_pair import text

ROOT = Path(__file__).parent.parent
SEED = 20261123
N_VOCAB = 2048
WINDOW = 192  # tokens a training example, and the context that the GGUF files state
PRETOKEN = (  # the pre-tokenizer llama.cpp calls "qwen2": every digit stands alone
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    last_steps: int = 0  # more of them, at a tenth of the rate, on casual text


SHAPES = {
    "base": Shape(
        n_embd=160, n_layer=5, n_head=5, n_ff=448, steps=4500, batch=24, lr=3e-3, last_steps=400
    ),
    "expert": Shape(n_embd=256, n_layer=6, n_head=8, n_ff=704, steps=4500, batch=12, lr=2e-3),
}


def train_vocab(work: Path) -> None:
    """Train the byte-level BPE both models share, on the base's text and the statements' words.

    Held-out names are not in the base's text, so they break into pieces that the
    base has met and can copy.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    facts = text.read_facts()
    known = [f for f in facts if f.part == "train"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[text.END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["an", "er", "ol", "ka", "is", "or", "ti", "us", "en", "ra"]
    corpus = itertools.chain(
        itertools.islice(text.dialogues(known, words, SEED, plain=True), 12_000),
        itertools.islice(text.statements(known, SEED), 12_000),
    )
    tokenizer.train_from_iterator((doc.replace(text.END, "") for doc in corpus), trainer)
    tokenizer.save(str(work / "tokenizer.json"))


def load_vocab(work: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(work / "tokenizer.json"))


def windows(
    name: str, work: Path, chunk: int, count: int, casual: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return `count` training windows and their loss masks, seeded by the chunk's number.

    A window starts with a document, as every prompt does; the base learns the
    answers, not the questions.
    """
    tokenizer = load_vocab(work)
    facts = text.read_facts()
    seed = SEED + 1_000_003 * (chunk + 1)
    documents: Iterator[str]
    if name == "base":
        pieces = [
            tokenizer.id_to_token(i).replace("Ġ", "") for i in range(tokenizer.get_vocab_size())
        ]
        pieces = [p for p in pieces if p.isascii() and p.isalpha()]
        known = [f for f in facts if f.part == "train"]
        documents = text.dialogues(known, pieces, seed, casual=casual)
    else:
        documents = text.statements(facts, seed)
    ids, masks = [], []
    for _ in range(count):
        row: list[int] = []
        mask: list[int] = []
        while len(row) <= WINDOW:
            for line in next(documents).splitlines(keepends=True):
                encoded = tokenizer.encode(line).ids
                row += encoded
                mask += [0 if line.startswith("> ") else 1] * len(encoded)
        ids.append(row[: WINDOW + 1])
        masks.append(mask[: WINDOW + 1])
    return ids, masks


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
            self.token_embd = nn.Embedding(N_VOCAB, shape.n_embd)
            self.blk = nn.ModuleList(Layer() for _ in range(shape.n_layer))
            self.output_norm = Norm()
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)
            for layer in self.blk:
                for p in (layer.attn_output.weight, layer.ffn_down.weight):
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.n_layer))
            d = shape.n_embd // shape.n_head
            angle = torch.outer(torch.arange(WINDOW), 10000.0 ** (-torch.arange(0, d, 2) / d))
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)

        def forward(self, ids):
            x = self.token_embd(ids)
            t = ids.shape[1]
            for layer in self.blk:
                x = layer(x, self.cos[:t], self.sin[:t])
            return F.linear(self.output_norm(x), self.token_embd.weight)

    return Llama()


def train_model(name: str, work: Path, threads: int, steps: int | None) -> None:
    """Train one model; a checkpoint every 250 steps, taken up again when found."""
    import torch
    from torch.nn import functional as F

    shape = SHAPES[name]
    main_steps = steps or shape.steps
    steps = main_steps + shape.last_steps
    torch.manual_seed(SEED)
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
    chunk_steps, began, average = 50, time.time(), 0.0
    ids: torch.Tensor
    mask: torch.Tensor
    for step in range(start, steps):
        if step == start or step % chunk_steps == 0:
            rows, masks = windows(
                name, work, step // chunk_steps, chunk_steps * shape.batch, step >= main_steps
            )
            ids, mask = torch.tensor(rows, device=device), torch.tensor(masks, device=device)
        at = (step % chunk_steps) * shape.batch
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
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    torch.save({"model": model.state_dict(), "shape": asdict(shape)}, work / f"{name}.pt")


def export(name: str, work: Path, path: Path) -> None:
    """Write a trained model as a GGUF file, its matrices in Q8_0."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFWriter, TokenType
    from gguf.quants import quantize

    shape = SHAPES[name]
    weights = torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")["model"]
    vocab = json.loads((work / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].__getitem__)
    merges = [" ".join(m) if isinstance(m, list) else m for m in vocab["merges"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    writer = GGUFWriter(str(temporary), "llama")
    writer.add_name(f"colm-edge demonstration {name}")
    writer.add_license("MIT")
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(WINDOW)
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
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (N_VOCAB - 1))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(text.CHAT_TEMPLATE)

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


def write_data(work: Path, exams: Path) -> None:
    """Write the switch's training data and the exams on held-out entities."""
    facts = text.read_facts()
    switch = [f for f in facts if f.part == "switch"]
    test = [f for f in facts if f.part == "test"]
    exams.mkdir(parents=True, exist_ok=True)
    for path, part, unseen, per_fact in (
        (work / "switch.jsonl", switch, False, 6),
        (exams / "demo_heldout.jsonl", test, False, 1),
        (exams / "demo_unseen_wordings.jsonl", test, True, 1),
    ):
        rows = list(text.exam(part, unseen=unseen, seed=SEED, per_fact=per_fact))
        if part is switch:  # it must learn as well when the base can do alone
            rows += text.small_talk(SEED)
        random.Random(SEED).shuffle(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--out", type=Path, default=ROOT / "colm_edge" / "data")
    parser.add_argument("--exams", type=Path, default=ROOT / "tests" / "data")
    parser.add_argument("--stage", choices=("vocab", "base", "expert", "export", "data", "switch"))
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads (default: all)")
    parser.add_argument("--steps", type=int, help="another number of training steps")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)

    def due(stage: str, result: Path) -> bool:
        return args.stage == stage or (args.stage is None and not result.exists())

    if due("vocab", work / "tokenizer.json"):
        train_vocab(work)
    for name in SHAPES:
        if due(name, work / f"{name}.pt"):
            train_model(name, work, args.threads, args.steps)
    if args.stage in (None, "export"):
        for name in SHAPES:
            export(name, work, args.out / f"{name}.gguf")
    if args.stage in (None, "data"):
        write_data(work, args.exams)
    if args.stage in (None, "switch"):
        command = [sys.executable, "-m", "colm_edge", "train", "--data", str(work / "switch.jsonl")]
        command += ["-m", str(args.out / "base.gguf"), "-me", str(args.out / "expert.gguf")]
        subprocess.run([*command, "--outfile", str(args.out / "switch.gguf")], check=True)


if __name__ == "__main__":
    main()
