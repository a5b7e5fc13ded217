"""Turn the switch of a Co-LLM checkpoint into a switch file that colm-edge runs.

Co-LLM's training adds a token, <|defer|>, and its output row is the switch. CHECKPOINT is a
Hugging Face folder as the authors' training writes it, a gperp_init.bin, or a file that holds a
bare row, of shape (1, n_embd) or (n_embd,), as .bin, .pt, .npy or .safetensors.

    python tools/convert_switch.py CHECKPOINT --outfile switch.gguf --strip-to base/

Only the row is read, so a checkpoint of any size converts in little memory. The base of such a
checkpoint is fine-tuned: --strip-to writes it as a Hugging Face folder without the <pad> and
<|defer|> rows that the training added, for llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from checkpoint_files import Tensor, Weights, copy_weights, read_file, read_json

from colm_edge import readout
from colm_edge.cli import OneLineErrors
from colm_edge.errors import ColmError, ModelError, SwitchError
from colm_edge.files import replacing
from colm_edge.switch.file import Switch
from colm_edge.switch.onnx import OnnxSwitch
from colm_edge.switch.reading import HIDDEN
from colm_edge.switch.rules import DEFER_TOKEN

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
# What config.json may do to the logits, and so to the switch's.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier_scale")
DIVISORS = ("logits_scaling",)
TOKENIZER_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
# Beside the weights, what belongs to a base; the rest of a training folder stays behind.
KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")
LEFT_BEHIND = ("trainer_state.json", "all_results.json", "train_results.json")
ONNX_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Source:
    """The switch as it was found: its row, and what a reader should know of it."""

    weight: np.ndarray  # (n_embd,), float32, any scale folded in
    bias: float
    facts: list[tuple[str, str]]

    def switch(self, name: str) -> Switch:
        """Return it as a switch of the hidden state, with no calibration."""
        info = {key: text for key, text in self.facts if key in ("checkpoint", "row")}
        bias = np.array([self.bias], np.float32)
        return Switch((HIDDEN,), self.weight[None], bias, len(self.weight), name=name, info=info)


@dataclass(frozen=True)
class Checkpoint:
    """A Co-LLM folder whose parts were found to fit each other."""

    folder: Path
    weights: Weights
    config: dict[str, Any]
    defer_id: int
    pad_id: int | None  # of the <pad> that the training added, if it did
    head: Tensor  # the output rows; the embeddings where they stand in for them
    embeddings: Tensor | None
    bias: Tensor | None

    @property
    def n_kept(self) -> int:
        """Rows of the base without those that the training added."""
        return self.defer_id if self.pad_id is None else self.pad_id


def read_bare(path: Path) -> Source:
    """Return the switch of a file that holds one row. Raises ModelError when it holds more."""
    tensors = read_file(path)
    whole = [name for name in (*HEADS, *EMBEDDINGS) if name in tensors]
    if whole:
        raise ModelError(
            f"{path}: holds {whole[0]}, so it is part of a checkpoint; name its folder, whose "
            f"tokenizer says which row is {DEFER_TOKEN}"
        )
    if len(tensors) != 1:
        raise ModelError(f"{path}: holds {len(tensors)} tensors, expected one row")
    (tensor,) = tensors.values()
    if not (len(tensor.shape) == 1 or (len(tensor.shape) == 2 and tensor.shape[0] == 1)):
        raise ModelError(
            f"{path}: holds a tensor of the shape {tensor.shape}, expected (1, n_embd) or (n_embd,)"
        )
    weight = tensor.floats().reshape(-1)
    facts = [
        ("checkpoint", path.name),
        *_describe_row(tensor.name or "the bare row", tensor, weight),
    ]
    return Source(weight, 0.0, facts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find the defer row of a Co-LLM folder.

    Raises ModelError where there is none, or where it is not the last row, as the authors' resizing
    to len(tokenizer) makes it.
    """
    weights = Weights(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    ids = added_tokens(folder)
    if DEFER_TOKEN not in ids:
        read = [name for name in TOKENIZER_FILES if (folder / name).exists()]
        raise ModelError(
            f"{folder}: no token {DEFER_TOKEN} in "
            + (", ".join(read) or f"it: expected {', '.join(TOKENIZER_FILES)} beside the weights")
            + "; is it a Co-LLM base? (The expert of a Co-LLM pair has no switch.)"
        )
    head, embeddings = weights.find(*HEADS), weights.find(*EMBEDDINGS)
    tied = _text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if head is None and tied is False:
        raise ModelError(
            f"{folder}: none of {', '.join(HEADS)} there, and config.json says that the embeddings "
            "do not stand in for it; a shard is missing, or the architecture is not supported"
        )
    head = head or embeddings
    if head is None:
        raise ModelError(
            f"{folder}: no output rows; expected one of {', '.join((*HEADS, *EMBEDDINGS))}"
        )
    for tensor in (t for t in (head, embeddings) if t is not None):
        _check_rows(tensor, ids[DEFER_TOKEN], folder)
    if tied and embeddings is not None and head.name != embeddings.name:
        rows = [t.rows(ids[DEFER_TOKEN], ids[DEFER_TOKEN] + 1).floats() for t in (head, embeddings)]
        if not np.array_equal(rows[0], rows[1], equal_nan=True):
            raise ModelError(
                f"{folder}: config.json ties {head.name} to {embeddings.name}, but their "
                f"{DEFER_TOKEN} rows differ; set tie_word_embeddings to what the training used"
            )
    bias = weights.find(*(name.removesuffix("weight") + "bias" for name in HEADS))
    if bias is not None and bias.shape != (head.shape[0],):
        raise ModelError(
            f"{folder}: {bias.name} has the shape {bias.shape}, expected ({head.shape[0]},)"
        )
    pad = ids.get(PAD_TOKEN)
    pad_id = pad if pad is not None and pad == ids[DEFER_TOKEN] - 1 else None
    return Checkpoint(folder, weights, config, ids[DEFER_TOKEN], pad_id, head, embeddings, bias)


def added_tokens(folder: Path) -> dict[str, int]:
    """Return the tokens added to a tokenizer, as its files agree on them."""
    ids: dict[str, int] = {}
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        try:
            if name == "added_tokens.json":
                found = [(str(text), int(i)) for text, i in content.items()]
            elif name == "tokenizer_config.json":
                decoder = content.get("added_tokens_decoder", {})
                found = [(entry["content"], int(i)) for i, entry in decoder.items()]
            else:
                entries = content.get("added_tokens", [])
                found = [(entry["content"], int(entry["id"])) for entry in entries]
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ModelError(f"{folder / name}: its added tokens are not as expected ({e})") from e
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
    where = f"{folder}: {DEFER_TOKEN} is token {defer_id}, but {tensor.name} has the shape"
    if rows > defer_id + 1:
        raise ModelError(
            f"{where} {tensor.shape}: it is not the last row, as Co-LLM's resizing to the "
            "tokenizer's length makes it; the rows were padded afterwards, or tokens added. Resize "
            "the model to the tokenizer's length (resize_token_embeddings) and save it again"
        )
    raise ModelError(
        f"{where} {tensor.shape}: weights and tokenizer are not of one training; take both from it"
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that is about the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def logit_scale(config: dict[str, Any], folder: Path) -> tuple[float, str]:
    """Return what a model multiplies its logits by, and the keys that say so.

    Raises ModelError for what acts on logits and is not linear, since a switch file cannot say it.
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
                "expected a number"
            )
        scale = scale / factor if key in DIVISORS else scale * factor
        named.append(f"{key} {factor:g}")
    if value("dim_model_base") is not None and value("hidden_size"):  # MiniCPM
        scale *= value("dim_model_base") / value("hidden_size")
        named.append(f"dim_model_base {value('dim_model_base')}")
    return scale, ", ".join(named)


def read_row(checkpoint: Checkpoint) -> Source:
    """Return the switch of a folder. A logit scale is folded into weight and bias."""
    row = checkpoint.head.rows(checkpoint.defer_id, checkpoint.defer_id + 1)
    weight, bias = row.floats().reshape(-1), 0.0
    scale, scaled_by = logit_scale(checkpoint.config, checkpoint.folder)
    if checkpoint.bias is not None:
        entry = checkpoint.bias.rows(checkpoint.defer_id, checkpoint.defer_id + 1)
        bias = float(entry.floats()[0])
    name = f"{checkpoint.head.name}[{checkpoint.defer_id}]"
    pad = f", after {PAD_TOKEN} {checkpoint.pad_id}" if checkpoint.pad_id is not None else ""
    facts = [
        ("checkpoint", checkpoint.folder.resolve().name),
        ("layout", checkpoint.weights.layout),
        ("token", f"{DEFER_TOKEN} {checkpoint.defer_id}{pad}"),
        *_describe_row(name, row, weight),
        ("bias", f"{bias:g} ({checkpoint.bias.name})" if checkpoint.bias is not None else "none"),
    ]
    if scaled_by:
        facts.append(("scale", f"{scale:g} ({scaled_by}), folded into the row and the bias"))
    scaled = (weight.astype(np.float64) * scale).astype(np.float32)
    return Source(scaled, bias * scale, facts)


def _describe_row(name: str, tensor: Tensor, weight: np.ndarray) -> list[tuple[str, str]]:
    if not np.isfinite(weight).all():
        raise ModelError(
            f"{tensor.path}: {name} holds NaN or infinite numbers; the training failed"
        )
    if not len(weight):
        raise ModelError(f"{tensor.path}: {name} is empty")
    norm = float(np.linalg.norm(weight.astype(np.float64)))
    return [("row", name), ("numbers", f"{len(weight)} {tensor.dtype}, norm {norm:g}")]


def write_onnx(switch: Switch, path: Path) -> None:
    """Write a switch of the hidden state as ONNX: hidden (1, n_embd) -> p_defer (1, 1)."""
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError as e:
        raise ColmError("--onnx needs the onnx package: pip install 'colm-edge[onnx]'") from e

    def info(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["hidden", "weight", "bias"], ["d"], transB=1),
            helper.make_node("Sigmoid", ["d"], ["p_defer"]),
        ],
        "switch",
        [info("hidden", switch.n_embd)],
        [info("p_defer", 1)],
        [
            numpy_helper.from_array(np.ascontiguousarray(switch.weight), "weight"),
            numpy_helper.from_array(switch.bias, "bias"),
        ],
    )
    # Old enough for every onnxruntime that colm-edge runs with.
    model = helper.make_model(
        graph, producer_name="colm-edge", ir_version=8, opset_imports=[helper.make_opsetid("", 13)]
    )
    checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def compare_onnx(path: Path, switch: Switch, n_states: int = 256, seed: int = 0) -> float:
    """Return the largest |Δp| between an ONNX head in onnxruntime and the switch in the runtime.

    Half of the random states have the spread of a normalised state, half are scaled so that p is
    spread over all of 0 to 1. Raises SwitchError above ONNX_TOLERANCE.
    """
    base = SimpleNamespace(n_embd=switch.n_embd, token_id=lambda _: None)
    ours, theirs = switch.reader(base, 1), OnnxSwitch.load(path).reader(base, 1)
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n_states, switch.n_embd)).astype(np.float32)
    spread = 3 / max(float(np.linalg.norm(switch.weight)), 1e-6)
    hidden[n_states // 2 :] *= np.float32(spread)
    logits = np.zeros(8, np.float32)
    worst = max(abs(ours(logits, h)[0] - theirs(logits, h)[0]) for h in hidden)
    if not worst <= ONNX_TOLERANCE:
        raise SwitchError(
            f"the ONNX head differs from the switch by {worst:.2g} in p_defer on random states, "
            f"expected at most {ONNX_TOLERANCE:g} ({readout.implementation}); nothing was written"
        )
    return worst


def strip(checkpoint: Checkpoint, folder: Path) -> None:
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
    """Copy a file of the checkpoint; of configs and tokenizers, without the removed tokens."""
    kept = checkpoint.n_kept
    gone = {DEFER_TOKEN} | ({PAD_TOKEN} if checkpoint.pad_id is not None else set())
    if path.name in ("config.json", "generation_config.json"):
        content = read_json(path)
        for part in (content, _text_config(content)):
            if "vocab_size" in part:
                part["vocab_size"] = kept
            if isinstance(part.get("pad_token_id"), int) and part["pad_token_id"] >= kept:
                del part["pad_token_id"]
    elif path.name == "added_tokens.json":
        content = {text: i for text, i in read_json(path).items() if text not in gone}
    elif path.name == "tokenizer.json":
        content = read_json(path)
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in gone]
        if _spelling((content.get("padding") or {}).get("pad_token")) in gone:
            content["padding"] = None
    elif path.name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = {
            key: value for key, value in read_json(path).items() if _spelling(value) not in gone
        }
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(content.get(key), list):
                content[key] = [t for t in content[key] if _spelling(t) not in gone]
        if "added_tokens_decoder" in content:
            decoder = content["added_tokens_decoder"]
            content["added_tokens_decoder"] = {
                i: entry for i, entry in decoder.items() if entry["content"] not in gone
            }
    else:
        shutil.copyfile(path, to)
        return
    to.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _spelling(token: Any) -> str | None:
    """Return the text of a token, which tokenizer files hold as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside the target; put it in the target's place if all goes well."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target}: is there already; name a new folder")
    work = None
    try:
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        made = work / target.name
        made.mkdir()
        yield made
        if target.exists():
            target.rmdir()
        os.replace(made, target)
    except OSError as e:
        raise ModelError(f"{target}: cannot write: {e.strerror or e}") from e
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


@click.command(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--outfile",
    metavar="SWITCH.gguf",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the switch goes.",
)
@click.option(
    "--onnx",
    metavar="SWITCH.onnx",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the head as ONNX too, compared with the runtime in onnxruntime.",
)
@click.option(
    "--strip-to",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the base without the rows that the training added, for llama.cpp's converter.",
)
@click.option("--dry-run", is_flag=True, help="Print what was found and write nothing.")
def main(
    checkpoint: Path, outfile: Path | None, onnx: Path | None, strip_to: Path | None, dry_run: bool
) -> None:  # fmt: skip
    """Turn the switch of a Co-LLM checkpoint into a switch file.

    CHECKPOINT is a Hugging Face folder, a gperp_init.bin, or a file holding a bare row.
    """
    if outfile is None and not dry_run:
        raise click.UsageError("give --outfile, or --dry-run to write nothing")
    found = None
    if checkpoint.is_dir():
        found = open_checkpoint(checkpoint)
        source = read_row(found)
    else:
        source = read_bare(checkpoint)
    if strip_to is not None and found is None:
        raise click.UsageError("--strip-to needs a checkpoint folder; a bare row has no base")
    switch = source.switch(str(outfile or checkpoint))
    found_lines = [f"{key:<10}  {text}" for key, text in source.facts]
    if dry_run or outfile is None:
        click.echo("\n".join(found_lines))
        return
    # Nothing takes its place before all of it is there.
    written = [f"{outfile}: written"]
    with ExitStack() as stack:
        switch.save(stack.enter_context(replacing(outfile)))
        if onnx is not None:
            temporary = stack.enter_context(replacing(onnx))
            write_onnx(switch, temporary)
            worst = compare_onnx(temporary, switch)
            written.append(f"{onnx}: written, p_defer within {worst:.1g} of the runtime's")
        if strip_to is not None and found is not None:
            strip(found, stack.enter_context(_new_folder(strip_to)))
            written.append(f"{strip_to}: written, {found.n_kept} tokens")
    click.echo("\n".join([*found_lines, *written]), err=True)


if __name__ == "__main__":
    main(prog_name=Path(sys.argv[0]).name)
