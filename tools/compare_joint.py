"""Compare joint training with a switch on a frozen base and with supervised fine-tuning.

On the shipped pair, at its own scale. The switch's training data is parted by fact: the bases are
fine-tuned on one half, switches are fitted on the other, and everything is judged on questions
about entities of neither half.

    python tools/train_demo_pair.py --work build/demo --stage data
    python tools/compare_joint.py --data build/demo/switch.jsonl --work build/joint
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from finetune_base import finetune

from colm_edge import Pair, load
from colm_edge.evaluate.metrics import contains
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import HIDDEN
from colm_edge.train.documents import Row, read_rows, tokenized
from colm_edge.train.fit import FitOptions, fit_switch
from colm_edge.train.scoring import Scores, score, score_expert

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "colm_edge" / "data"
LORA_RANK = 16
COMMON = {
    "epochs": 2, "batch": 32, "micro_batch": 32, "start_steps": 50, "dtype": "float32",
    "checkpointing": False,
}  # fmt: skip
# Of the rates tried (docs/joint-training.md) those that did best on the half for switches: in what
# each training lowers, and for the gentle one in hard decisions at 20 % deferred.
TRAININGS: dict[str, dict[str, Any]] = {
    "supervised": {"objective": "sft", "lora": 0, "lr": 3e-4},
    "joint": {"objective": "joint", "lora": 0, "lr": 1e-3},
    "gentle joint": {"objective": "joint", "lora": 0, "lr": 1e-4},
    "LoRA joint": {"objective": "joint", "lora": LORA_RANK, "lr": 3e-3},
}
# What a switch reads and is fitted to: the paper's, and what `colm-edge train` does unless told.
FITS = {"paper": ("hidden", "marginal"), "default": ("both", "best")}
WHAT = {"own": "its own switch", "paper": "the paper's switch", "default": "the default switch"}


@dataclass(frozen=True)
class Entry:
    """A row of the table: a base, perhaps adapted, and its switch: a file or what to fit."""

    of: str  # the base's name
    base: Path
    switch: str
    lora: Path | None = None


@contextmanager
def progress(name: str, total: int) -> Iterator[Any]:
    with click.progressbar(length=total, label=f"{name:>7}", file=sys.stderr) as bar:
        yield bar


def halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Part the data by fact: all questions about one are answered alike."""

    def first(row: Row) -> bool:
        return hashlib.sha256(row[1]["completion"].encode()).digest()[0] % 2 == 0

    return [row for row in rows if first(row)], [row for row in rows if not first(row)]


def open_pair(entry: Entry, switch: str | Path = "margin", threads: int = 1) -> Pair:
    expert = SHIPPED / "expert.gguf"
    return load(entry.base, expert, switch, lora=entry.lora, n_threads=threads)


def deferral(switch: Switch, scores: Scores) -> np.ndarray:
    """Return d of every scored token under a switch of the hidden state or of both sets."""
    columns = scores.hidden
    if switch.features != (HIDDEN,):
        columns = np.concatenate([scores.hidden, scores.logit_features], axis=1)
    return (columns @ switch.weight[0]).astype(np.float64) + float(switch.bias[0])


def judge(
    entry: Entry, fitting: list[Row], held_out: list[Row], work: Path, threads: int
) -> dict[str, Any]:
    """Fit the entry's switch if it is to be fitted; return its row of the table."""
    import tuning

    path = Path(entry.switch)
    kept = work / "scores" / entry.of  # of one base: what it says is scored once
    if entry.switch in FITS:
        features, objective = FITS[entry.switch]
        path = work / f"{entry.of} {entry.switch}.gguf"
        with open_pair(entry, threads=threads) as pair:
            documents = tokenized(fitting, pair)
            options = FitOptions(features, objective)
            fit = fit_switch(pair, documents, options, work=kept / "fit", progress=progress)
            fit.switch.save(path)
    with open_pair(entry, path, threads) as pair:
        scores = score(pair, tokenized(held_out, pair), progress, work=kept / "exam")
        row = tuning.figures(scores.base, deferral(Switch.load(path), scores), scores.expert)
        right, deferred, n = [], 0, 0
        for _, line in held_out:
            answer = pair.generate(line["prompt"], temperature=0)
            right.append(contains(answer.text, line))
            deferred += answer.stats.n_deferred
            n += answer.stats.n_generated
    return {**row, "accuracy": np.mean(right), "deferred": deferred / n}


def render(table: list[dict[str, Any]]) -> str:
    rates = (0.1, 0.2, 0.3)
    lines = [
        "| base and switch | base alone | joint | hard, 10 % deferred | 20 % | 30 % | exact fact | "
        "deferred there |",
        "| --- |" + " ---: |" * 7,
    ]
    for row in table:
        losses = [row[k] for k in ("nll_base", "nll_joint", *(f"nll_hard_{r}" for r in rates))]
        shares = [row["accuracy"], row["deferred"]]
        cells = [f"{x:.4f}" for x in losses] + [f"{100 * x:.1f} %" for x in shares]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--exam",
    type=click.Path(path_type=Path, exists=True),
    show_default=True,
    default=ROOT / "tests" / "data" / "demo_heldout.jsonl",
    help="What all are judged on.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/joint"))
@click.option("-t", "--threads", type=int, default=1, show_default=True, help="Of llama.cpp.")
@click.option("-s", "--seed", type=int, default=0, show_default=True)
def main(data: Path, exam: Path, work: Path, threads: int, seed: int) -> None:
    """Print a table of frozen, supervised, joint and LoRA bases; models go to --work."""
    work.mkdir(parents=True, exist_ok=True)
    tuning_rows, fitting = halves(list(read_rows(data)))
    held_out = list(read_rows(exam))
    shipped = SHIPPED / "base.gguf"
    frozen = Entry("frozen", shipped, "both")
    for name, rows in (("tune", tuning_rows), ("fit", fitting)):
        if not (work / f"{name}.npz").exists():
            with open_pair(frozen, threads=threads) as pair:
                score_expert(pair, tokenized(rows, pair), work / f"{name}.npz", progress)
    for name, settings in TRAININGS.items():
        if not (work / name / "checkpoint").exists():
            report = finetune(
                shipped, work / "tune.npz", work / "fit.npz", work / name, "cpu", 100,
                seed=seed, **COMMON, **settings,
            )  # fmt: skip
            click.echo(f"{name}: {report}", err=True)
    table = []
    for of in ("frozen", *TRAININGS):
        adapter = work / of / "adapter.gguf"
        lora = adapter if adapter.exists() else None
        base = work / of / "base.gguf" if of in TRAININGS and lora is None else shipped
        for switch, what in WHAT.items():
            entry = Entry(of, base, switch, lora)
            if switch == "own":
                row = (work / of if of in TRAININGS else SHIPPED) / "switch.gguf"
                entry = replace(entry, switch=str(row))
                if not row.exists():
                    continue
            result = judge(entry, fitting, held_out, work, threads)
            table.append({"method": f"{of}, {what}", **result})
            click.echo(render(table[-1:]), err=True)
    click.echo(render(table))


if __name__ == "__main__":
    main()
