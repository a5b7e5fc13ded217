"""A Co-LLM checkpoint: where its switch is, and its base without what the training added.

Co-LLM's training adds the tokens <pad> and <|defer|> to the base. The output row of <|defer|>, the
last one, is the switch.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from colm_edge.arrays import Floats
from colm_edge.errors import ModelError, printable
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import HIDDEN
from colm_edge.switch.rules import DEFER_TOKEN
from lib.checkpoint_files import Tensor, Weights, copy_weights, read_file
from lib.json_files import as_written, read_json

PAD_TOKEN = "<pad>"
HEADS = ("lm_head.weight", "embed_out.weight", "language_model.lm_head.weight")
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "gpt_neox.embed_in.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
)
# Keys of config.json that change the logits, and so the switch's.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier_scale")
DIVISORS = ("logits_scaling",)
TOKENIZER_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
# What belongs to a base beside its weights; the other files of a training are not copied.
KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")
LEFT_BEHIND = ("trainer_state.json", "all_results.json", "train_results.json")


@dataclass(frozen=True)
class FoundRow:
    """The switch as it was found: its row, and facts about it for the reader."""

    weight: Floats  # (n_embd,), any scale folded in
    bias: float
    facts: list[tuple[str, str]]

    def switch(self, name: str) -> Switch:
        """Return it as a switch of the hidden state, with no calibration."""
        info = {key: text for key, text in self.facts if key in ("checkpoint", "row")}
        bias = np.array([self.bias], np.float32)
        return Switch((HIDDEN,), self.weight[None], bias, len(self.weight), name=name, info=info)


@dataclass(frozen=True)
class Checkpoint:
    """A Co-LLM folder whose weights, config and tokenizer fit each other."""

    folder: Path
    weights: Weights
    config: dict[str, Any]
    defer_id: int
    pad_id: int | None  # of <pad>, if the training added it
    head: Tensor  # the output rows; the embeddings where the two are tied
    embeddings: Tensor | None
    bias: Tensor | None

    @property
    def n_kept(self) -> int:
        """Rows of the base without those that the training added."""
        return self.defer_id if self.pad_id is None else self.pad_id


def read_bare(path: Path) -> FoundRow:
    """Return the switch of a file that holds one row. Raises ModelError when it holds more."""
    tensors = read_file(path)
    whole = [name for name in (*HEADS, *EMBEDDINGS) if name in tensors]
    if whole:
        raise ModelError(
            f"{path}: holds {whole[0]}, so it is part of a checkpoint; give the checkpoint's "
            f"folder, because its tokenizer says which row is {DEFER_TOKEN}"
        )
    if len(tensors) != 1:
        raise ModelError(
            f"{path}: holds {len(tensors)} tensors, expected one row; save the {DEFER_TOKEN} row "
            "alone, or give the checkpoint's folder"
        )
    (tensor,) = tensors.values()
    if not (len(tensor.shape) == 1 or (len(tensor.shape) == 2 and tensor.shape[0] == 1)):
        raise ModelError(
            f"{path}: holds a tensor of the shape {tensor.shape}, expected (1, n_embd) or "
            f"(n_embd,); save the {DEFER_TOKEN} row alone"
        )
    weight = tensor.floats().reshape(-1)
    facts = [
        ("checkpoint", printable(path.name)),
        *_describe_row(tensor.name or "the bare row", tensor, weight),
    ]
    return FoundRow(weight, 0.0, facts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find the <|defer|> row of a Co-LLM folder.

    Raises ModelError when there is none, or when it is not the last row, where the authors'
    training puts it by resizing the model to len(tokenizer).
    """
    weights = Weights(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    ids = added_tokens(folder)
    if DEFER_TOKEN not in ids:
        read = [name for name in TOKENIZER_FILES if (folder / name).exists()]
        if not read:
            raise ModelError(
                f"{folder}: has no tokenizer, expected {', '.join(TOKENIZER_FILES)} beside the "
                "weights; copy the tokenizer's files from the training folder"
            )
        raise ModelError(
            f"{folder}: no token {DEFER_TOKEN} in {', '.join(read)}; give the base of a Co-LLM "
            "pair (its expert has no switch)"
        )
    defer_id, pad_id = ids[DEFER_TOKEN], ids.get(PAD_TOKEN)
    if defer_id < 0:
        raise ModelError(f"{folder}: {DEFER_TOKEN} is token {defer_id}; save the tokenizer again")
    head, embeddings = _output_rows(weights, config, defer_id)
    bias = weights.find(*(name.removesuffix("weight") + "bias" for name in HEADS))
    if bias is not None and bias.shape != (head.shape[0],):
        raise ModelError(
            f"{folder}: {bias.name} has the shape {bias.shape}, expected ({head.shape[0]},) as "
            f"{head.name} has {head.shape[0]} rows; take all weights from one training run"
        )
    if pad_id != defer_id - 1:
        pad_id = None
    return Checkpoint(folder, weights, config, defer_id, pad_id, head, embeddings, bias)


def _output_rows(
    weights: Weights, config: dict[str, Any], defer_id: int
) -> tuple[Tensor, Tensor | None]:
    """Return output rows and embeddings, whose last row is <|defer|>; they may be tied."""
    folder = weights.folder
    head, embeddings = weights.find(*HEADS), weights.find(*EMBEDDINGS)
    tied = _text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if head is None and tied is False:
        raise ModelError(
            f"{folder}: has none of {', '.join(HEADS)}, and config.json says that the embeddings "
            "are not tied to them; a shard is missing (download it), or the architecture is not "
            "supported"
        )
    head = head or embeddings
    if head is None:
        raise ModelError(
            f"{folder}: has no output rows, expected one of {', '.join((*HEADS, *EMBEDDINGS))}; "
            "a shard is missing (download it), or the architecture is not supported"
        )
    for tensor in (t for t in (head, embeddings) if t is not None):
        _check_rows(tensor, defer_id, folder)
    if tied and embeddings is not None and head.name != embeddings.name:
        rows = [t.rows(defer_id, defer_id + 1).floats() for t in (head, embeddings)]
        if not np.array_equal(rows[0], rows[1], equal_nan=True):
            raise ModelError(
                f"{folder}: config.json ties {head.name} to {embeddings.name}, but their "
                f"{DEFER_TOKEN} rows differ; set tie_word_embeddings to what the training used"
            )
    return head, embeddings


def added_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens that were added to a tokenizer.

    Raises ModelError when its files disagree on <|defer|>.
    """
    ids: dict[str, int] = {}
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        with as_written(folder / name, "transformers"):
            if name == "added_tokens.json":
                found = [(str(text), int(i)) for text, i in content.items()]
            elif name == "tokenizer_config.json":
                decoder = content.get("added_tokens_decoder", {})
                found = [(str(entry["content"]), int(i)) for i, entry in decoder.items()]
            else:
                entries = content.get("added_tokens", [])
                found = [(str(entry["content"]), int(entry["id"])) for entry in entries]
        for text, i in found:
            if text == DEFER_TOKEN and ids.get(text, i) != i:
                raise ModelError(
                    f"{folder}: its tokenizer files disagree on {DEFER_TOKEN}: {ids[text]}, but "
                    f"{i} in {name}; take the files from one training run"
                )
            ids.setdefault(text, i)
    return ids


def _check_rows(tensor: Tensor, defer_id: int, folder: Path) -> None:
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 0
    if rows == defer_id + 1:
        return
    where = (
        f"{folder}: {DEFER_TOKEN} is token {defer_id}, but {tensor.name} has the shape "
        f"{tensor.shape}, expected {defer_id + 1} rows"
    )
    if rows > defer_id + 1:
        raise ModelError(
            f"{where}: it is not the last row, so the rows were padded or tokens were added after "
            "the training; resize the model to the tokenizer's length (resize_token_embeddings) "
            "and save it again"
        )
    raise ModelError(
        f"{where}: weights and tokenizer come from different trainings; take both from the same one"
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that is about the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def logit_scale(config: dict[str, Any], folder: Path) -> tuple[float, str]:
    """Return what a model multiplies its logits by, and the keys that say so.

    Raises ModelError for a function of the logits that is not linear: a switch file cannot hold it.
    """
    text = _text_config(config)

    def value(key: str) -> Any:
        return text.get(key, config.get(key))

    for key in SOFT_CAPS:
        if value(key) is not None:
            raise ModelError(
                f"{folder}: config.json has {key} = {value(key)}, a cap that acts on the switch's "
                f"logit too and that a switch file cannot hold; keep the {DEFER_TOKEN} row in the "
                "base (do not strip it) and run it with -sw defer-row"
            )
    scale, named = 1.0, []
    for key in (*MULTIPLIERS, *DIVISORS):
        factor = value(key)
        if factor is None:
            continue
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not number or not 0 < abs(factor) < math.inf:
            raise ModelError(
                f"{folder}: config.json has {key} = {factor!r}, which scales the switch's logit; "
                "expected a number other than 0; set it to what the training used"
            )
        scale = scale / factor if key in DIVISORS else scale * factor
        named.append(f"{key} {factor:g}")
    if value("dim_model_base") is not None and value("hidden_size"):  # MiniCPM
        scale *= value("dim_model_base") / value("hidden_size")
        named.append(f"dim_model_base {value('dim_model_base')}")
    return scale, ", ".join(named)


def read_row(checkpoint: Checkpoint) -> FoundRow:
    """Return the switch of a folder. A logit scale is folded into weight and bias."""
    row = checkpoint.head.rows(checkpoint.defer_id, checkpoint.defer_id + 1)
    weight, bias = row.floats().reshape(-1), 0.0
    with as_written(checkpoint.folder / "config.json", "transformers"):
        scale, scaled_by = logit_scale(checkpoint.config, checkpoint.folder)
    if checkpoint.bias is not None:
        entry = checkpoint.bias.rows(checkpoint.defer_id, checkpoint.defer_id + 1)
        bias = float(entry.floats()[0])
    name = f"{checkpoint.head.name}[{checkpoint.defer_id}]"
    pad = f", after {PAD_TOKEN} {checkpoint.pad_id}" if checkpoint.pad_id is not None else ""
    facts = [
        ("checkpoint", printable(checkpoint.folder.resolve().name)),
        ("layout", checkpoint.weights.layout),
        ("token", f"{DEFER_TOKEN} {checkpoint.defer_id}{pad}"),
        *_describe_row(name, row, weight),
        ("bias", f"{bias:g} ({checkpoint.bias.name})" if checkpoint.bias is not None else "none"),
    ]
    if scaled_by:
        facts.append(("scale", f"{scale:g} ({scaled_by}), folded into the row and the bias"))
    scaled = (weight.astype(np.float64) * scale).astype(np.float32)
    return FoundRow(scaled, bias * scale, facts)


def _describe_row(name: str, tensor: Tensor, weight: Floats) -> list[tuple[str, str]]:
    if not np.isfinite(weight).all():
        raise ModelError(
            f"{tensor.path}: {name} holds NaN or infinite numbers, so the training failed; take an "
            "earlier checkpoint"
        )
    if not len(weight):
        raise ModelError(f"{tensor.path}: {name} is empty, expected n_embd numbers; save it again")
    norm = float(np.linalg.norm(weight.astype(np.float64)))
    return [("row", name), ("numbers", f"{len(weight)} {tensor.dtype}, norm {norm:g}")]


def write_base(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the base without the rows that the training added, into an empty folder."""
    head, embeddings = checkpoint.head, checkpoint.embeddings
    # Tied weights may be stored under both names, at one place.
    stored_twice = embeddings is not None and head == replace(embeddings, name=head.name)

    def cut(tensor: Tensor) -> Tensor | None:
        if stored_twice and embeddings != head and tensor == head:
            return None
        if tensor in (head, embeddings, checkpoint.bias):
            return tensor.rows(0, checkpoint.n_kept)
        return tensor

    copy_weights(checkpoint.weights, folder, cut)
    for path in sorted(checkpoint.folder.iterdir()):
        is_index = path.name.endswith(".index.json") or path.name in LEFT_BEHIND
        keep = path.suffix in KEPT_SUFFIXES or path.name.startswith("LICENSE")
        if path.is_file() and keep and not is_index:
            _copy_without(path, folder / path.name, checkpoint)


def _copy_without(path: Path, to: Path, checkpoint: Checkpoint) -> None:
    """Copy a file of the checkpoint; leave the removed tokens out of configs and tokenizers."""
    cut = CUTS.get(path.name)
    if cut is None:
        shutil.copyfile(path, to)
        return
    gone = {DEFER_TOKEN} | ({PAD_TOKEN} if checkpoint.pad_id is not None else set())
    content = read_json(path)
    with as_written(path, "transformers"):
        content = cut(content, gone, checkpoint.n_kept)
        to.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cut_config(content: dict[str, Any], gone: set[str], kept: int) -> dict[str, Any]:
    for part in (content, _text_config(content)):
        if "vocab_size" in part:
            part["vocab_size"] = kept
        if isinstance(part.get("pad_token_id"), int) and part["pad_token_id"] >= kept:
            del part["pad_token_id"]
    return content


def _cut_added(content: dict[str, Any], gone: set[str], kept: int) -> dict[str, Any]:
    return {text: i for text, i in content.items() if text not in gone}


def _cut_tokenizer(content: dict[str, Any], gone: set[str], kept: int) -> dict[str, Any]:
    content["added_tokens"] = [t for t in content["added_tokens"] if _text_of(t) not in gone]
    if _text_of((content.get("padding") or {}).get("pad_token")) in gone:
        content["padding"] = None
    return content


def _cut_tokens(content: dict[str, Any], gone: set[str], kept: int) -> dict[str, Any]:
    content = {key: value for key, value in content.items() if _text_of(value) not in gone}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(content.get(key), list):
            content[key] = [t for t in content[key] if _text_of(t) not in gone]
    if "added_tokens_decoder" in content:
        decoder = content["added_tokens_decoder"]
        content["added_tokens_decoder"] = {
            i: entry for i, entry in decoder.items() if _text_of(entry) not in gone
        }
    return content


# What is left of a JSON file (its content, the tokens that are gone, how many are kept).
CUTS = {
    "config.json": _cut_config,
    "generation_config.json": _cut_config,
    "added_tokens.json": _cut_added,
    "tokenizer.json": _cut_tokenizer,
    "tokenizer_config.json": _cut_tokens,
    "special_tokens_map.json": _cut_tokens,
}


def _text_of(token: Any) -> str | None:
    """Return the text of a token, which tokenizer files hold as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
