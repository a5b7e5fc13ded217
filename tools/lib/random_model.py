"""Llama-shaped GGUF files with random weights, for measuring speed and for tests.

Their text is noise, but a decode costs what it costs in a trained model of that shape. All share
one byte-level vocabulary, so any two make a pair.
"""

from __future__ import annotations

import itertools
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES

END = "<|end|>"
STD = 0.02
MAX_BLOCKS = 1 << 16  # of random numbers in one matrix


@dataclass(frozen=True)
class Shape:
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int = 32000
    n_ctx: int = 8192

    @property
    def n_params(self) -> int:
        """Weights in the matrices: embeddings, output rows, attention and feed-forward."""
        n_kv = self.n_embd // self.n_head * self.n_head_kv
        layer = 2 * self.n_embd * (self.n_embd + n_kv) + 3 * self.n_embd * self.n_ff
        return 2 * self.n_vocab * self.n_embd + self.n_layer * layer


SHAPES = {
    "tiny": Shape(64, 2, 2, 2, 128, n_vocab=400, n_ctx=512),
    "135M": Shape(576, 30, 9, 3, 1536),  # SmolLM2's
    "1.1B": Shape(2048, 22, 32, 4, 5632),  # TinyLlama's
    "7B": Shape(4096, 32, 32, 32, 11008),  # Llama 2's
}


def shape_of(name: str) -> Shape:
    """Return a known shape, or the llama shape that comes nearest to a count such as 360M or 30B.

    Raises ValueError for anything else.
    """
    if name in SHAPES:
        return SHAPES[name]
    count = float(name[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[name[-1:].upper()]
    if not 1e6 <= count <= 1e12:
        raise ValueError(name)

    def of_width(n_embd: int) -> Shape:
        head = 128 if n_embd >= 4096 else 64
        n_head = n_embd // head
        shape = Shape(n_embd, 1, n_head, max(1, n_head // 4), -(-8 * n_embd // 3 // 256) * 256)
        layer = shape.n_params - replace(shape, n_layer=0).n_params
        rest = count - replace(shape, n_layer=0).n_params
        return replace(shape, n_layer=max(1, round(rest / layer)))

    # Of those, the one about as deep as llamas of its width are.
    shapes = [of_width(n) for n in range(256, 16385, 256)]
    shapes = [s for s in shapes if s.n_head % s.n_head_kv == 0]
    near = [s for s in shapes if abs(s.n_params / count - 1) < 0.05]
    return min(near or shapes, key=lambda s: abs(s.n_layer - s.n_embd / 128))


# Which tensors a quantisation mix gives a finer type.
MIXES = {
    "F32": (Type.F32, Type.F32),
    "Q8_0": (Type.Q8_0, Type.Q8_0),
    "Q4_0": (Type.Q4_0, Type.Q6_K),
    "Q4_K_M": (Type.Q4_K, Type.Q6_K),
}


def vocabulary(n_vocab: int) -> tuple[list[str], list[str]]:
    """Return (tokens, merges) of a byte-level BPE: the end token, 256 bytes, letters merged."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {b: chr(b) for b in printable}
    others = (b for b in range(256) if b not in spelled)
    spelled |= {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [END, *(spelled[b] for b in range(256))]
    letters = string.ascii_lowercase
    pairs = list(itertools.product(letters, repeat=2))
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, letters))
    fours = ((a + b, c + d) for (a, b), (c, d) in itertools.product(pairs, repeat=2))
    need = n_vocab - len(tokens)
    merges = list(itertools.islice(itertools.chain(pairs, triples, fours), max(0, need)))
    tokens += [left + right for left, right in merges]
    return tokens[:n_vocab], [" ".join(merge) for merge in merges]


def random_tensor(shape: tuple[int, int], kind: Type, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Return a (rows, columns) matrix of mean 0 and deviation about STD, as `kind` stores it."""
    rows, columns = shape
    if kind == Type.F32:
        return rng.normal(0, STD, shape).astype(np.float32)
    per_block, n_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = rows * columns // per_block
    # Large matrices repeat themselves: no decode is faster for it, and writing them is.
    blocks = rng.integers(0, 256, (min(n_blocks, MAX_BLOCKS), n_bytes), np.uint8)

    def put(at: int, value: float) -> None:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    if kind == Type.Q8_0:
        put(0, STD / 74)
    elif kind == Type.Q4_0:
        put(0, STD / 4.6)
    elif kind == Type.Q4_K:  # value = d·scale·q − dmin·m, six-bit scale and m
        put(0, STD / 200)
        put(2, 7.5 * STD / 200)
    elif kind == Type.Q6_K:  # value = d·scale·(q − 32), eight-bit scale
        put(208, STD / 1370)
    return np.resize(blocks, (rows, n_blocks // rows * n_bytes))


def write_model(
    path: Path,
    shape: Shape,
    mix: str = "F32",
    seed: int = 0,
    *,
    chat_template: str | None = None,
    extra_tokens: Sequence[str] = (),
    architecture: str = "llama",
    gain: float = 1.0,
    endless: bool = False,
) -> None:
    """Write one model.

    extra_tokens follow the vocabulary; gain scales the output rows; an endless model gives its end
    token the logit 0, which others always surpass (in float32 only).
    """
    rng = np.random.default_rng(seed)
    tokens, merges = vocabulary(shape.n_vocab)
    kinds = [TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 1)
    tokens, kinds = [*tokens, *extra_tokens], kinds + [TokenType.CONTROL] * len(extra_tokens)
    temporary = path.with_name(path.name + ".tmp")
    writer = GGUFWriter(str(temporary), architecture, use_temp_file=True)
    writer.add_name(f"random {path.stem}")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    coarse, fine = MIXES[mix]

    def matrix(name: str, rows: int, columns: int, kind: Type, scale: float = 1.0) -> None:
        data = random_tensor((rows, columns), kind, rng)
        if kind == Type.F32:
            data *= np.float32(scale)
            if endless and name == "output.weight":
                data[0] = 0
        writer.add_tensor(name, data, raw_dtype=kind)

    n, kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
    # K-quants come in blocks of 256 columns; narrower matrices take Q8_0.
    narrow = {Type.Q4_K: Type.Q8_0, Type.Q6_K: Type.Q8_0} if n % 256 else {}
    coarse_n, fine_n = narrow.get(coarse, coarse), narrow.get(fine, fine)
    matrix("token_embd.weight", len(tokens), n, coarse_n)
    matrix("output.weight", len(tokens), n, fine_n, gain)
    writer.add_tensor("output_norm.weight", np.ones(n, np.float32))
    for i in range(shape.n_layer):
        better = fine if i % 2 else coarse
        better_n = fine_n if i % 2 else coarse_n
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(n, np.float32))
        matrix(f"blk.{i}.attn_q.weight", n, n, coarse_n)
        matrix(f"blk.{i}.attn_k.weight", kv, n, coarse_n)
        matrix(f"blk.{i}.attn_v.weight", kv, n, better_n)
        matrix(f"blk.{i}.attn_output.weight", n, n, coarse_n)
        matrix(f"blk.{i}.ffn_gate.weight", shape.n_ff, n, coarse_n)
        matrix(f"blk.{i}.ffn_up.weight", shape.n_ff, n, coarse_n)
        down = coarse_n if shape.n_ff % 256 else better
        matrix(f"blk.{i}.ffn_down.weight", n, shape.n_ff, down)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)
