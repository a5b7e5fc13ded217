"""Llama-shaped GGUF files with random weights, for measuring speed and for tests.

Their text is noise, but a decode costs about as much as in a trained model of that shape. They
share one byte-level vocabulary, so any two make a pair.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from colm_edge.files import replacing
from colm_edge.remote.byte_names import BYTES
from lib.llama_gguf import Shape, describe_llama

END = "<|end|>"
STD = 0.02
MAX_BLOCKS = 1 << 16  # of random numbers in one matrix

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

    # Of the shapes of about that size, take the one as deep as llamas of its width usually are.
    shapes = [of_width(n) for n in range(256, 16385, 256)]
    shapes = [s for s in shapes if s.n_head % s.n_head_kv == 0]
    near = [s for s in shapes if abs(s.n_params / count - 1) < 0.05]
    if not near:  # fewer than the vocabulary alone takes
        raise ValueError(name)
    return min(near, key=lambda s: abs(s.n_layer - s.n_embd / 128))


# Which tensors a quantisation mix gives a finer type.
MIXES = {
    "F32": (Type.F32, Type.F32),
    "Q8_0": (Type.Q8_0, Type.Q8_0),
    "Q4_0": (Type.Q4_0, Type.Q6_K),
    "Q4_K_M": (Type.Q4_K, Type.Q6_K),
}


def vocabulary(n_vocab: int) -> tuple[list[str], list[str]]:
    """Return (tokens, merges) of a byte-level BPE: the end token, 256 bytes, letters merged."""
    spelled = {byte: character for character, byte in BYTES.items()}
    tokens = [END, *(spelled[b] for b in range(256))]
    letters = string.ascii_lowercase
    pairs = list(itertools.product(letters, repeat=2))
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, letters))
    fours = ((a + b, c + d) for (a, b), (c, d) in itertools.product(pairs, repeat=2))
    need = n_vocab - len(tokens)
    merges = list(itertools.islice(itertools.chain(pairs, triples, fours), max(0, need)))
    tokens += [left + right for left, right in merges]
    return tokens[:n_vocab], [" ".join(merge) for merge in merges]


def random_matrix(shape: tuple[int, ...], kind: Type, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Return a (rows, columns) matrix of mean 0 and deviation about STD, as `kind` stores it."""
    rows, columns = shape
    if kind == Type.F32:
        return rng.normal(0, STD, shape).astype(np.float32)
    per_block, n_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = rows * columns // per_block
    # Large matrices repeat the same blocks: they are quicker to write and as slow to decode.
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
    of_text: bool = False,
) -> None:
    """Write one model.

    extra_tokens follow the vocabulary; gain scales the output rows; an endless model gives its end
    token the logit 0, which others always exceed (in float32 only). So does one of text with bytes
    that no text has.
    """
    rng = np.random.default_rng(seed)
    tokens, merges = vocabulary(shape.n_vocab)
    with replacing(path) as temporary:
        writer = GGUFWriter(str(temporary), architecture, use_temp_file=True)
        writer.add_name(f"random {path.stem}")
        describe_llama(
            writer, shape, tokens, merges, extra_tokens=extra_tokens, chat_template=chat_template
        )
        for name, size, kind in tensors(shape, len(tokens) + len(extra_tokens), mix):
            data = np.ones(size, np.float32) if len(size) == 1 else random_matrix(size, kind, rng)
            if name == "output" and kind == Type.F32:
                data *= np.float32(gain)
                if endless:
                    data[0] = 0
                if of_text:
                    data[[1 + byte for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]] = 0
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def tensors(shape: Shape, n_tokens: int, mix: str) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Yield name, size and type of every tensor; a norm has one dimension, a matrix two."""
    n, kv, ff = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv, shape.n_ff
    coarse, fine = MIXES[mix]

    def stored(kind: Type, columns: int) -> Type:
        # K-quants come in blocks of 256 columns; narrower matrices take Q8_0, for which
        # llama-quantize has Q5_0.
        return Type.Q8_0 if columns % 256 and kind in (Type.Q4_K, Type.Q6_K) else kind

    yield "token_embd", (n_tokens, n), stored(coarse, n)
    yield "output", (n_tokens, n), stored(fine, n)
    yield "output_norm", (n,), Type.F32
    for i in range(shape.n_layer):
        layer, better = f"blk.{i}.", fine if i % 2 else coarse
        yield f"{layer}attn_norm", (n,), Type.F32
        yield f"{layer}ffn_norm", (n,), Type.F32
        yield f"{layer}attn_q", (n, n), stored(coarse, n)
        yield f"{layer}attn_k", (kv, n), stored(coarse, n)
        yield f"{layer}attn_v", (kv, n), stored(better, n)
        yield f"{layer}attn_output", (n, n), stored(coarse, n)
        yield f"{layer}ffn_gate", (ff, n), stored(coarse, n)
        yield f"{layer}ffn_up", (ff, n), stored(coarse, n)
        yield f"{layer}ffn_down", (n, ff), stored(coarse if ff % 256 else better, ff)
