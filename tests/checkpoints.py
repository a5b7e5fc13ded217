"""Small files that the tools read: Co-LLM checkpoints in every layout, and scores."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import convert_switch
import numpy as np
import pytest
from click.testing import CliRunner
from lib.co_llm import TOKENIZER_FILES

from colm_edge.switch.rules import DEFER_TOKEN

N_EMBD, N_BASE = 6, 9  # a base of 9 tokens; <pad> is 9 and <|defer|> is 10
N_SCORED_VOCAB = 400  # of the documents that are scored
NAMES = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "tied": ("model.embed_tokens.weight", None),
}


def need_torch():
    return pytest.importorskip(
        "torch", reason="PyTorch writes the checkpoints of this test: pip install torch"
    )


def convert(*args):
    result = CliRunner().invoke(convert_switch.main, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers as the file stores them; bfloat16 by cutting a float32."""
    if dtype == "BF16":
        return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype({"F32": np.float32, "F16": np.float16}[dtype])


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    stored = bits(array, dtype)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        raw = bits(array, dtype).tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_bin(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    torch = need_torch()
    kinds = {"F32": torch.float32, "F16": torch.float16}
    made = {}
    for name, array in tensors.items():
        stored = torch.from_numpy(bits(array, dtype).copy())
        made[name] = stored.view(torch.bfloat16) if dtype == "BF16" else stored.to(kinds[dtype])
    torch.save(made, path)


def write_weights(folder: Path, tensors, layout: str, dtype: str = "F32") -> None:
    """layout: safetensors or bin, for one file, or with "-sharded" for one tensor a file."""
    kind, _, sharded = layout.partition("-")
    write, stem = {
        "safetensors": (write_safetensors, "model"),
        "bin": (write_bin, "pytorch_model"),
    }[kind]
    if not sharded:
        write(folder / f"{stem}.{kind}", tensors, dtype)
        return
    weight_map = {}
    for i, (name, array) in enumerate(tensors.items(), 1):
        weight_map[name] = f"{stem}-{i:05}-of-{len(tensors):05}.{kind}"
        write(folder / weight_map[name], {name: array}, dtype)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_tokenizer(folder: Path, ids: dict[str, int], files=TOKENIZER_FILES):
    """Write the added tokens as transformers does: slow tokenizers have the first two files."""
    entries = {str(i): {"content": text, "special": True} for text, i in ids.items()}
    contents = {
        "added_tokens.json": ids,
        "tokenizer_config.json": {
            "added_tokens_decoder": {"0": {"content": "<unk>"}, **entries},
            "additional_special_tokens": [DEFER_TOKEN],
            "pad_token": "<pad>",
            "eos_token": "</s>",
        },
        "tokenizer.json": {
            "added_tokens": [{"id": int(i), **entry} for i, entry in entries.items()],
            "model": {"vocab": {f"t{i}": i for i in range(N_BASE)}},
            "padding": {"pad_token": "<pad>"},
        },
        "special_tokens_map.json": {
            "additional_special_tokens": [{"content": DEFER_TOKEN}],
            "pad_token": {"content": "<pad>"},
            "eos_token": {"content": "</s>"},
        },
    }
    for name in (*files, "special_tokens_map.json"):
        (folder / name).write_text(json.dumps(contents[name]))


def make_checkpoint(folder: Path, layout="safetensors", dtype="F32", names="llama", **changes):
    """Write a small Co-LLM folder and return its tensors.

    changes: `config` keys, `ids` of the added tokens, `rows`, `tensors` to add, tokenizer `files`.
    """
    folder.mkdir(exist_ok=True)
    ids = changes.get("ids", {"<pad>": N_BASE, DEFER_TOKEN: N_BASE + 1})
    rows = changes.get("rows", N_BASE + 2)
    rng = np.random.default_rng(7)
    embeddings, head = NAMES[names]
    tensors = {embeddings: rng.normal(size=(rows, N_EMBD)).astype(np.float32)}
    tensors["model.norm.weight"] = rng.normal(size=N_EMBD).astype(np.float32)
    if head:
        tensors[head] = rng.normal(size=(rows, N_EMBD)).astype(np.float32)
    tensors |= changes.get("tensors", {})
    write_weights(folder, tensors, layout, dtype)
    write_tokenizer(folder, ids, changes.get("files", TOKENIZER_FILES))
    config = {"vocab_size": rows, "pad_token_id": N_BASE, "hidden_size": N_EMBD}
    (folder / "config.json").write_text(json.dumps(config | changes.get("config", {})))
    return tensors


def write_scores(path: Path, n: int = 11, **changes) -> Path:
    """Write a file like those of `colm-edge score`: random documents and a random expert."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 24, n)
    starts = np.array([rng.integers(1, length) for length in lengths])
    n_scored = int((lengths - starts).sum())
    arrays = {
        "tokens": rng.integers(0, N_SCORED_VOCAB, lengths.sum()).astype(np.int32),
        "lengths": lengths,
        "starts": starts,
        "lines": np.arange(1, n + 1),
        "logprob": -rng.exponential(3, n_scored),
        "right": rng.random(n_scored) < 0.5,
        "model": np.array("expert.gguf"),
    }
    np.savez(path, **(arrays | changes))
    return path
