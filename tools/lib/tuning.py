"""Joint training of a base and its switch: data, model, steps and results.

The loss is Co-LLM's marginal likelihood (arXiv 2403.03870, section 2.2), averaged over scored
tokens: −logsumexp(log σ(−d) + log P_base, log σ(d) + log P_expert). d is the product of the switch
row with the state that the output matrix reads. The row is a parameter of its own while training
lasts, so P_base is normalised without it and tied embeddings are not affected by it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from colm_edge.arrays import Doubles
from colm_edge.errors import ColmError, DataError, ModelError
from colm_edge.files import fingerprint, replacing
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import HIDDEN, sigmoids
from colm_edge.switch.rules import DEFER_TOKEN
from colm_edge.train.fit import calibrate, choose_threshold
from colm_edge.train.objectives import (
    WEAK_POSITIVE_WEIGHT,
    hard_figures,
    marginal_loss,
)
from colm_edge.train.score_files import read_file
from lib.co_llm import TOKENIZER_FILES, logit_scale
from lib.gguf_base import GgufBase

CLIP = 1.0  # of the gradient's norm
WARM_UP = 0.03  # of all steps
START_TOKENS = 50_000  # about as many are used to fit the row at the start
LORA_ALPHA = 2.0  # times the rank


@dataclass(frozen=True)
class Settings:
    """What determines a run's result, beside base and data."""

    objective: str  # joint or sft
    lora: int  # rank; 0: all weights
    epochs: int
    lr: float
    batch: int  # documents a step
    micro_batch: int  # documents evaluated at once
    start_steps: int
    dtype: str
    seed: int
    checkpointing: bool


class ScoredData:
    """A file of `colm-edge score`: documents as token ids, and the expert's scores of them.

    Document i is tokens[at[i] : at[i + 1]]; its tokens from starts[i] on are scored, and their
    scores are logprob and right [rows[i] : rows[i + 1]].
    """

    def __init__(self, path: Path, n_vocab: int) -> None:
        """Raise DataError if this is not such a file, or is of another vocabulary."""
        file = read_file(path, "tokens", "lengths", "starts", "logprob", "right", "part")
        self.tokens = file["tokens"].astype(np.int64)
        lengths, self.starts = file["lengths"], file["starts"]
        self.logprob, self.right = file["logprob"], file["right"]
        self.at = np.concatenate(([0], np.cumsum(lengths)))
        self.rows = np.concatenate(([0], np.cumsum(lengths - self.starts)))
        fits = len(lengths) > 0 and len(self.starts) == len(lengths)
        fits = fits and bool(((self.starts >= 1) & (self.starts < lengths)).all())
        part = file.get("part", np.array([0, len(lengths), len(lengths)]))
        fits = fits and self.at[-1] == len(self.tokens) and len(part) == 3
        if not fits or not self.rows[-1] == len(self.logprob) == len(self.right):
            raise DataError(
                f"{path}: its arrays do not fit each other; score the data again (colm-edge score)"
            )
        first, last, n = part.tolist()
        if (first, last) != (0, n):
            raise DataError(
                f"{path}: has documents {first + 1} to {last} of {n}; score the data again without "
                "--shard"
            )
        if not 0 <= self.tokens.min() <= self.tokens.max() < n_vocab:
            raise DataError(
                f"{path}: has token {self.tokens.max()}, but the base knows {n_vocab}; score the "
                "data with this base (colm-edge score -m)"
            )
        digest = hashlib.sha256()
        for array in (self.tokens, lengths, self.starts, self.logprob):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.starts)

    def n_scored(self, documents: np.ndarray) -> int:
        return int((self.rows[documents + 1] - self.rows[documents]).sum())

    def batches(self, documents: np.ndarray, size: int) -> Iterator[Batch]:
        """Yield documents of similar length together, padded at the end."""
        lengths = np.diff(self.at)
        documents = documents[np.argsort(lengths[documents], kind="stable")]
        for i in range(0, len(documents), size):
            yield Batch(self, documents[i : i + size])


class Batch:
    """Documents side by side, padded at the end, where causal attention does not look."""

    def __init__(self, data: ScoredData, documents: np.ndarray) -> None:
        lengths = np.diff(data.at)[documents]
        starts = data.starts[documents]
        self.first = int(starts.min()) - 1  # of the positions that predict a scored token
        width = int(lengths.max())
        ids = np.zeros((len(documents), width), np.int64)
        scored = np.zeros((len(documents), width), bool)
        for row, (i, n, start) in enumerate(zip(documents, lengths, starts, strict=True)):
            ids[row, :n] = data.tokens[data.at[i] : data.at[i + 1]]
            scored[row, start:n] = True
        places = [slice(data.rows[i], data.rows[i + 1]) for i in documents]
        self.ids = torch.from_numpy(ids[:, :-1])
        self.scored = torch.from_numpy(scored[:, self.first + 1 :])
        self.gold = torch.from_numpy(ids[scored])
        self.expert = torch.from_numpy(np.concatenate([data.logprob[p] for p in places])).float()
        self.rows = np.concatenate([np.arange(p.start, p.stop) for p in places])


class Tuned(torch.nn.Module):
    """A base and the row of its switch. A call returns its predictions of scored tokens."""

    def __init__(self, base: Any, settings: Settings, device: str) -> None:
        super().__init__()
        self.settings, self.device = settings, device
        self.base = base
        head = base.get_output_embeddings()
        head.register_forward_pre_hook(self._keep_state)
        row = head.weight.detach().float().mean(dim=0)
        self.row = torch.nn.Parameter(row, requires_grad=settings.objective == "joint")
        self._state: Any = None
        torch.manual_seed(settings.seed)  # an adapter's first weights are random
        if settings.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.lora:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=settings.lora,
                lora_alpha=LORA_ALPHA * settings.lora,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            self.base = get_peft_model(base, config)
        self.to(device)

    def _keep_state(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self._state = arguments[0]

    def forward(self, batch: Batch) -> tuple[Any, Any, Any]:
        """Return logits (n, n_vocab), d (n,) and the state (n, n_embd) at n scored tokens."""
        kind = self.device.split(":")[0]
        with torch.autocast(kind, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            ids = batch.ids.to(self.device)
            keep = ids.shape[1] - batch.first
            logits = self.base(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        scored = batch.scored.to(self.device)
        state, self._state = self._state[:, -keep:][scored].float(), None
        return logits[:, -keep:][scored].float(), state @ self.row, state

    def losses(self, batch: Batch) -> Any:
        """Return the loss of every scored token, (n,), nats."""
        logits, d, _ = self(batch)
        base = -F.cross_entropy(logits, batch.gold.to(self.device), reduction="none")
        if self.settings.objective == "sft":
            return -base
        expert = batch.expert.to(self.device)
        return -torch.logaddexp(F.logsigmoid(-d) + base, F.logsigmoid(d) + expert)

    def trained(self) -> dict[str, Any]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def judge(self, data: ScoredData) -> tuple[np.ndarray, np.ndarray]:
        """Return the base's log-probability and d of every scored token."""
        base, d = np.zeros(len(data.logprob)), np.zeros(len(data.logprob))
        self.eval()
        with torch.no_grad():
            for batch in data.batches(np.arange(len(data)), self.settings.micro_batch):
                logits, switch, _ = self(batch)
                gold = batch.gold.to(self.device)
                base[batch.rows] = -F.cross_entropy(logits, gold, reduction="none").cpu().numpy()
                d[batch.rows] = switch.cpu().numpy()
        return base, d

    def start(self, data: ScoredData) -> None:
        """Fit the row alone under weak supervision: 1 where only the expert's argmax is right.

        The row begins as the mean of the output rows, and positives are weighted, as the authors
        do.
        """
        order = np.random.default_rng(self.settings.seed).permutation(len(data))
        scored = np.cumsum(np.diff(data.rows)[order])
        documents = order[: 1 + int(np.searchsorted(scored, START_TOKENS))]
        states, labels = [], []
        self.eval()
        with torch.no_grad():
            for batch in data.batches(documents, self.settings.micro_batch):
                logits, _, state = self(batch)
                wrong = (logits.argmax(dim=1).cpu() != batch.gold).numpy()
                states.append(state.cpu().numpy())
                labels.append(wrong & data.right[batch.rows])
        x, label = (torch.from_numpy(np.concatenate(parts)) for parts in (states, labels))
        row = self.row.detach().cpu().clone().requires_grad_()
        weight = torch.tensor(WEAK_POSITIVE_WEIGHT)
        optimizer = torch.optim.LBFGS(
            [row], max_iter=self.settings.start_steps, line_search_fn="strong_wolfe"
        )

        def loss() -> Any:
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(x @ row, label.float(), pos_weight=weight)
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            self.row.copy_(row)


def figures(base: Doubles, d: Doubles, expert: Doubles) -> dict[str, float]:
    """Return the losses of base, expert and collaboration, nats per scored token.

    nll_hard_R is the loss of hard decisions that defer the share R of highest d.
    """
    return {
        "nll_base": float(-base.mean()),
        "nll_expert": float(-expert.mean()),
        "nll_joint": marginal_loss(base, expert, d)[0],
        **hard_figures(d, base, expert),
    }


class Run:
    """A training run in a folder: its steps, and a state file from which a killed run resumes."""

    def __init__(self, model: Tuned, data: ScoredData, base: Path, folder: Path) -> None:
        self.model, self.data, self.state = model, data, folder / "state.pt"
        settings = model.settings
        self._per_epoch = math.ceil(len(data) / settings.batch)
        self.n_steps = settings.epochs * self._per_epoch
        self.done, self.loss = 0, math.nan  # steps taken, and the last one's loss
        self._optimizer = torch.optim.AdamW(
            model.trained().values(), lr=settings.lr, weight_decay=0.0
        )
        how = asdict(settings)
        for name in ("micro_batch", "checkpointing"):  # change what a step takes, not what it does
            del how[name]
        files = [base] if base.is_file() else sorted(filter(Path.is_file, base.iterdir()))
        facts = {**how, "data": data.key, "base": fingerprint(*files)}
        self._key = json.dumps(facts, sort_keys=True)
        if self.state.exists():
            self._resume()
        elif settings.objective == "joint" and settings.start_steps:
            model.start(data)

    def _resume(self) -> None:
        try:
            state = torch.load(self.state, weights_only=True, map_location="cpu")
            key = state["key"]
        except (KeyError, TypeError, RuntimeError, pickle.UnpicklingError, EOFError) as e:
            raise ColmError(f"{self.state}: is not the state of a run ({e}); remove it") from e
        if key != self._key:
            ours, theirs = json.loads(self._key), json.loads(key)
            other = ", ".join(sorted(k for k in ours if ours[k] != theirs.get(k)))
            raise ColmError(
                f"{self.state}: belongs to a run with another {other}; give the same as then, "
                "or another --out"
            )
        with torch.no_grad():
            for name, parameter in self.model.trained().items():
                parameter.copy_(state["trained"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.model.device.startswith("cuda"):
            torch.cuda.set_rng_state(state["rng_cuda"], self.model.device)
        self.done, self.loss = state["done"], state["loss"]

    def save(self) -> None:
        """Write the state to a temporary file, then put it in place."""
        state = {
            "key": self._key,
            "done": self.done,
            "loss": self.loss,
            "trained": self.model.trained(),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.model.device.startswith("cuda"):
            state["rng_cuda"] = torch.cuda.get_rng_state(self.model.device)
        with replacing(self.state) as temporary:
            torch.save(state, temporary)

    def steps(self) -> Iterator[int]:
        """Take the remaining steps; yield the number of steps taken after each."""
        self.model.train()
        while self.done < self.n_steps:
            self.loss = self._step(self._documents(self.done))
            yield self.done

    def _documents(self, step: int) -> np.ndarray:
        """Return the documents of a step, which depend on seed and step alone."""
        epoch, i = divmod(step, self._per_epoch)
        settings = self.model.settings
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self.data))
        return order[i * settings.batch : (i + 1) * settings.batch]

    def _step(self, documents: np.ndarray) -> float:
        settings = self.model.settings
        warm = max(1, round(WARM_UP * self.n_steps))
        share = min((self.done + 1) / warm, (self.n_steps - self.done) / self.n_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr * share
        # The mean over the whole step's tokens, however it is cut into micro-batches.
        n, total = self.data.n_scored(documents), 0.0
        for batch in self.data.batches(documents, settings.micro_batch):
            loss = self.model.losses(batch).sum() / n
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise ColmError(f"step {self.done + 1}: the loss is {total}; try a lower --lr")
        torch.nn.utils.clip_grad_norm_(self.model.trained().values(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return total


def check_device(device: str) -> None:
    """Raise ColmError for a device that PyTorch does not have here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ColmError(
            f"--device {device}: {str(e).splitlines()[0]}; give one that PyTorch has here, such as "
            "cpu"
        ) from e


def open_base(path: Path, settings: Settings) -> tuple[Any, GgufBase | None]:
    """Return the base as a transformers model, and its GGUF file if it comes from one.

    Raises ModelError if it is neither, or if its logits are not linear in the state.
    """
    # With LoRA the base's weights are not trained; trained weights stay in float32.
    light = settings.lora and settings.dtype == "bfloat16"
    dtype = torch.bfloat16 if light else torch.float32
    if path.is_dir():
        if DEFER_TOKEN in _added(path):
            raise ModelError(
                f"{path}: has {DEFER_TOKEN} already, expected a base without it; remove it with "
                "tools/convert_switch.py --strip-to"
            )
        try:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as e:
            raise ModelError(
                f"{path}: transformers cannot read it ({e}); give a Hugging Face folder or a "
                "GGUF file"
            ) from e
        source = None
    else:
        source = GgufBase(path)
        base = source.load().to(dtype)
    scale, scaled_by = logit_scale(base.config.to_dict(), path)
    if scale != 1:
        raise ModelError(
            f"{path}: its logits are scaled ({scaled_by}), expected none of these keys, as the "
            "switch's logit would be scaled too; fine-tune another base"
        )
    return base, source


def _added(folder: Path) -> str:
    return " ".join((folder / f).read_text() for f in TOKENIZER_FILES if (folder / f).exists())


def write_results(
    model: Tuned, source: GgufBase | None, base: Path, folder: Path, valid: ScoredData | None
) -> dict[str, Any]:
    """Write the run's results into its folder, `checkpoint` last; return figures on `valid`.

    checkpoint/ is a Hugging Face folder. Joint training also writes switch.gguf, and <|defer|> is
    the last row of its checkpoint. A GGUF base gives base.gguf too, and LoRA adapter.gguf and
    PEFT's folder adapter/.
    """
    settings = model.settings
    joint = settings.objective == "joint"
    report: dict[str, Any] = {}
    row = model.row.detach().cpu().float()
    bias = np.zeros(1, np.float32)
    info = {"base": base.name}
    switch = Switch((HIDDEN,), row.numpy()[None], bias, len(row), info=info)
    if valid is not None:
        log_base, d = model.judge(valid)
        report = {"nll_base": float(-log_base.mean())}
        if joint:
            report = figures(log_base, d, valid.logprob)
            p = sigmoids(d)
            rates, thresholds = calibrate(p)
            threshold = choose_threshold(p, log_base, valid.logprob)
            switch = replace(switch, threshold=threshold, defer_rates=rates, thresholds=thresholds)
    tuned = model.base
    if settings.lora:
        tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
        if source is not None:
            pairs = {
                name.removeprefix("base_model.model.") + ".weight": (
                    module.lora_A["default"].weight,
                    module.lora_B["default"].weight,
                )
                for name, module in tuned.named_modules()
                if hasattr(module, "lora_A")
            }
            source.write_adapter(folder / "adapter.gguf", pairs, LORA_ALPHA * settings.lora)
        tuned = tuned.float().merge_and_unload()
    tuned = tuned.cpu()
    if source is not None:
        coarser = source.write(folder / "base.gguf", dict(tuned.named_parameters()))
        if coarser:
            print(
                f"base.gguf: {len(coarser)} tensors are in Q8_0, as gguf cannot write their type",
                file=sys.stderr,
            )
        info["base_fingerprint"] = fingerprint(folder / "base.gguf")
    if joint:
        replace(switch, info=info).save(folder / "switch.gguf")
    _write_checkpoint(tuned, row if joint else None, base, folder, settings.dtype)
    return report


def _write_checkpoint(tuned: Any, row: Any, base: Path, folder: Path, dtype: str) -> None:
    made = folder / ".checkpoint.tmp"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    tokenizer = None
    if any((base / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if row is not None:
        # As the authors do: add one token to the tokenizer, whose row is the last.
        n = tuned.get_input_embeddings().weight.shape[0]
        if tokenizer is not None:
            tokenizer.add_tokens([DEFER_TOKEN], special_tokens=True)
            n = tokenizer.convert_tokens_to_ids(DEFER_TOKEN)
        else:
            (made / "added_tokens.json").write_text(json.dumps({DEFER_TOKEN: n}) + "\n")
        tuned.resize_token_embeddings(n + 1, mean_resizing=False)
        with torch.no_grad():
            embeddings = tuned.get_input_embeddings().weight
            embeddings[n] = embeddings[:n].mean(dim=0)
            tuned.get_output_embeddings().weight[n] = row  # the same row, where they are tied
    if dtype == "bfloat16":
        tuned = tuned.to(torch.bfloat16)
    tuned.save_pretrained(made)
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
    os.replace(made, folder / "checkpoint")
