"""A llama of a few million parameters: its vocabulary, its training and its GGUF file.

The studies share it. PyTorch and tokenizers are imported where they are used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType
from gguf.quants import quantize

from colm_edge.files import replacing
from lib.llama_gguf import Shape, describe_llama

PRETOKEN = (  # the pre-tokenizer llama.cpp calls "qwen2": every digit stands alone
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHUNK_STEPS = 50  # between two calls for windows, each with a seed of its own
SAVE_STEPS = 250
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

Piece = tuple[str, bool]  # a text, and whether its tokens count in the loss
# Windows of n_ctx + 1 ids, and their loss masks.
Windows = tuple[list[list[int]], list[list[int]]]
# (chunk, how many, the step it begins at) -> windows
MakeWindows = Callable[[int, int, int], Windows]


@dataclass(frozen=True)
class Training:
    """A model's shape and how long it is trained; a window is as long as its context."""

    shape: Shape
    steps: int
    batch: int  # windows
    lr: float
    last_steps: int = 0  # more of them, at a tenth of the rate

    def rate(self, step: int) -> float:
        """Return the learning rate: warm-up, flat, then linear to zero over the last 40 %."""
        if step >= self.steps:
            return 0.1 * self.lr * (self.steps + self.last_steps - step) / self.last_steps
        warm = min(1.0, (step + 1) / 200)
        return self.lr * warm * min(1.0, (self.steps - step) / (0.4 * self.steps))


def train_vocab(corpus: Iterable[str], end: str, n_vocab: int, path: Path) -> None:
    """Train a byte-level BPE whose token 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pretokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.replace(end, "") for document in corpus), trainer)
    with replacing(path) as temporary:
        tokenizer.save(str(temporary))


def pretokenizer() -> Any:
    """Return what cuts a text into the parts within which a BPE merges."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def load_vocab(work: Path) -> Any:
    """Return the tokenizer of a work folder."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(work / "tokenizer.json"))


def cut_windows(
    documents: Iterator[Iterable[Piece]], tokenizer: Any, n_ctx: int, count: int
) -> Windows:
    """Fill `count` windows with documents; each window begins with a document, as prompts do."""
    windows, masks = [], []
    for _ in range(count):
        ids: list[int] = []
        mask: list[int] = []
        while len(ids) <= n_ctx:
            for text, counts in next(documents):
                encoded = tokenizer.encode(text).ids
                ids += encoded
                mask += [int(counts)] * len(encoded)
        windows.append(ids[: n_ctx + 1])
        masks.append(mask[: n_ctx + 1])
    return windows, masks


def train_model(
    name: str, training: Training, windows: MakeWindows, work: Path, *, seed: int, threads: int = 0
) -> None:
    """Train one model; write a checkpoint every 250 steps and resume from it when there is one."""
    import torch

    from lib.llama_torch import Llama

    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama(training.shape).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=training.lr,
        betas=(0.9, 0.97),
    )
    checkpoint = work / f"{name}.ckpt"
    start, steps = 0, training.steps + training.last_steps
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {n_parameters:,} parameters, step {start}/{steps}")
    began, average = time.time(), 0.0
    for step in range(start, steps):
        if step == start or step % CHUNK_STEPS == 0:
            chunk = windows(step // CHUNK_STEPS, CHUNK_STEPS * training.batch, step)
            ids, masks = (torch.tensor(rows, device=device) for rows in chunk)
        at = (step % CHUNK_STEPS) * training.batch
        some = slice(at, at + training.batch)
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        loss = _step(model, optimizer, ids[some], masks[some])
        average = loss if step == start else 0.98 * average + 0.02 * loss
        done = step + 1
        if done % 50 == 0:
            left = (steps - done) * (time.time() - began) / (done - start) / 60
            print(f"{name} {done}/{steps} loss {average:.4f} {left:.0f} min left", flush=True)
        if done % SAVE_STEPS == 0 or done == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            with replacing(checkpoint) as temporary:
                torch.save(state, temporary)
    with replacing(work / f"{name}.pt") as temporary:
        torch.save({"model": model.state_dict()}, temporary)


def _step(model: Any, optimizer: Any, ids: Any, mask: Any) -> float:
    """Take one step on windows and their masks, (batch, n_ctx + 1); return its loss."""
    import torch
    from torch.nn import functional as F

    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1])
    picked = mask[:, 1:].reshape(-1).bool()
    loss = F.cross_entropy(logits.flatten(0, 1)[picked].float(), ids[:, 1:].reshape(-1)[picked])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.item())


def import_gguf(name: str, path: Path, work: Path) -> None:
    """Read a model that `export` wrote back into a work folder: its vocabulary, and a checkpoint at
    step 0 from which `train_model` goes on. The weights are those of the file, in Q8_0."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from tokenizers import Tokenizer, decoders, models

    reader = GGUFReader(path)
    found = {t.name: dequantize(t.data, t.tensor_type).copy() for t in reader.tensors}
    weights = {k: v for k, v in found.items() if not k.startswith("blk.") or "norm" in k}
    for layer in {key.rsplit(".", 2)[0] for key in found if key.startswith("blk.")}:
        parts = {key: found[f"{layer}.{key}.weight"] for key in PARTS}
        weights[f"{layer}.attn_qkv.weight"] = np.concatenate(
            [parts["attn_q"], parts["attn_k"], parts["attn_v"]]
        )
        gates = [parts["ffn_gate"], parts["ffn_up"]]
        weights[f"{layer}.ffn_gate_up.weight"] = np.concatenate(gates)
        for key in ("attn_output", "ffn_down"):
            weights[f"{layer}.{key}.weight"] = parts[key]
    state = {key: torch.from_numpy(np.asarray(value, np.float32)) for key, value in weights.items()}
    torch.save({"model": state, "optimizer": None, "step": 0}, work / f"{name}.ckpt")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pretokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokens[0]])
    tokenizer.save(str(work / "tokenizer.json"))


def export(
    name: str, shape: Shape, work: Path, path: Path, *, title: str, chat_template: str
) -> None:
    """Write a trained model as a GGUF file, its matrices in Q8_0."""
    import torch

    saved = torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")["model"]
    weights = {key: value.float().numpy() for key, value in saved.items()}
    assert np.isfinite(weights["output_norm.weight"]).all()
    vocab = json.loads((work / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].__getitem__)
    merges = [" ".join(m) if isinstance(m, list) else m for m in vocab["merges"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        writer = GGUFWriter(str(temporary), "llama")
        writer.add_name(title)
        writer.add_license("MIT")
        writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
        describe_llama(writer, shape, tokens, merges, chat_template=chat_template)

        def matrix(key: str, value: np.ndarray) -> None:
            raw = quantize(np.ascontiguousarray(value), Type.Q8_0)
            writer.add_tensor(f"{key}.weight", raw, raw_dtype=Type.Q8_0)

        matrix("token_embd", weights["token_embd.weight"])
        writer.add_tensor("output_norm.weight", weights["output_norm.weight"])
        for i in range(shape.n_layer):
            layer = f"blk.{i}."
            for norm in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"{layer}{norm}.weight", weights[f"{layer}{norm}.weight"])
            for part, value in zip(
                "qkv", np.split(weights[f"{layer}attn_qkv.weight"], 3), strict=True
            ):
                matrix(f"{layer}attn_{part}", value)
            gate, up = np.split(weights[f"{layer}ffn_gate_up.weight"], 2)
            matrix(f"{layer}ffn_gate", gate)
            matrix(f"{layer}ffn_up", up)
            for part in ("attn_output", "ffn_down"):
                matrix(f"{layer}{part}", weights[f"{layer}{part}.weight"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
