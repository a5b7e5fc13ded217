"""Compare joint training with a switch on a frozen base and with supervised fine-tuning.

This uses the pair that ships. The switch's training data is split by fact: bases are fine-tuned on
one half, switches are fitted on the other, and all are judged on questions about entities that are
in neither half.

    python tools/studies/train_demo_pair.py --work build/demo --stage data
    python tools/studies/compare_joint.py --data build/demo/switch.jsonl --work build/joint
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where imports begin
from finetune_base import finetune

from colm_edge import Pair, load
from colm_edge.cli.common import progress
from colm_edge.evaluate.metrics import contains
from colm_edge.switch.file import Switch
from colm_edge.train.documents import Row, read_rows, tokenized
from colm_edge.train.fit import FitOptions, fit_switch
from colm_edge.train.objectives import DEFER_RATES
from colm_edge.train.scoring import score, score_expert

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "colm_edge" / "data"
LORA_RANK = 16
COMMON: dict[str, Any] = {
    "epochs": 2,
    "batch": 32,
    "micro_batch": 32,
    "start_steps": 50,
    "dtype": "float32",
    "checkpointing": False,
}
# The best of the learning rates tried (docs/joint-training.md) on the half for switches: by the
# loss that each training lowers, and for the gentle one by hard decisions at 20 % deferred.
TRAININGS: dict[str, dict[str, Any]] = {
    "supervised": {"objective": "sft", "lora": 0, "lr": 3e-4},
    "joint": {"objective": "joint", "lora": 0, "lr": 1e-3},
    "gentle joint": {"objective": "joint", "lora": 0, "lr": 1e-4},
    "LoRA joint": {"objective": "joint", "lora": LORA_RANK, "lr": 3e-3},
}
# What a switch reads and is fitted to: as in the paper, and as `colm-edge train` does by default.
FITS = {"paper": ("hidden", "marginal"), "default": ("both", "best")}
WHAT = {"own": "its own switch", "paper": "the paper's switch", "default": "the default switch"}


@dataclass(frozen=True)
class Entry:
    """A row of the table: a base, perhaps adapted, and its switch: a file or what to fit."""

    trained: str  # how the base was: "frozen", or one of TRAININGS
    base: Path
    switch: str
    lora: Path | None = None


def halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split the data by fact: all questions about one have the same answer."""

    def is_first(row: Row) -> bool:
        return hashlib.sha256(row[1]["completion"].encode()).digest()[0] % 2 == 0

    return [row for row in rows if is_first(row)], [row for row in rows if not is_first(row)]


def open_pair(entry: Entry, switch: str | Path = "margin", threads: int = 1) -> Pair:
    expert = SHIPPED / "expert.gguf"
    return load(entry.base, expert, switch, lora=entry.lora, n_threads=threads)


def judge(
    entry: Entry, fitting: list[Row], held_out: list[Row], work: Path, threads: int
) -> dict[str, Any]:
    """Fit the entry's switch if it is to be fitted; return its row of the table."""
    from lib import tuning  # PyTorch is needed only here

    path = Path(entry.switch)
    kept = work / "scores" / entry.trained  # a base is scored once for all its switches
    if entry.switch in FITS:
        features, objective = FITS[entry.switch]
        path = work / f"{entry.trained} {entry.switch}.gguf"
        with open_pair(entry, threads=threads) as pair:
            documents = tokenized(fitting, pair)
            options = FitOptions(features, objective)
            fit = fit_switch(pair, documents, options, work=kept / "fit", progress=progress)
            fit.switch.save(path)
    with open_pair(entry, path, threads) as pair:
        scores = score(pair, tokenized(held_out, pair), progress, work=kept / "exam")
        d = Switch.load(path).d(scores.logit_features, scores.hidden)[:, 0]
        row = tuning.figures(scores.base, d, scores.expert)
        right, deferred, n = [], 0, 0
        for _, line in held_out:
            answer = pair.generate(line["prompt"], temperature=0)
            right.append(contains(answer.text, line))
            deferred += answer.stats.n_deferred
            n += answer.stats.n_generated
    return {**row, "accuracy": np.mean(right), "deferred": deferred / n}


def render(table: list[dict[str, Any]]) -> str:
    lines = [
        "| base and switch | base alone | joint | hard, 10 % deferred | 20 % | 30 % | exact fact | "
        "deferred there |",
        "| --- |" + " ---: |" * 7,
    ]
    for row in table:
        losses = [
            row[k] for k in ("nll_base", "nll_joint", *(f"nll_hard_{r}" for r in DEFER_RATES))
        ]
        shares = [row["accuracy"], row["deferred"]]
        cells = [f"{x:.4f}" for x in losses] + [f"{100 * x:.1f} %" for x in shares]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="The training data of the switch that ships.",
)
@click.option(
    "--exam",
    type=click.Path(path_type=Path, exists=True),
    show_default=True,
    default=ROOT / "tests" / "data" / "demo_heldout.jsonl",
    help="The questions to judge by.",
)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("build/joint"), help="For models."
)
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
                shipped,
                work / "tune.npz",
                work / "fit.npz",
                work / name,
                device="cpu",
                save_every=100,
                seed=seed,
                **COMMON,
                **settings,
            )
            click.echo(f"{name}: {report}", err=True)
    table = []
    for trained in ("frozen", *TRAININGS):
        folder = work / trained
        adapter = folder / "adapter.gguf"
        lora = adapter if adapter.exists() else None
        base = folder / "base.gguf" if trained in TRAININGS and lora is None else shipped
        for switch, what in WHAT.items():
            entry = Entry(trained, base, switch, lora)
            if switch == "own":
                own = (folder if trained in TRAININGS else SHIPPED) / "switch.gguf"
                entry = replace(entry, switch=str(own))
                if not own.exists():
                    continue
            result = judge(entry, fitting, held_out, work, threads)
            table.append({"method": f"{trained}, {what}", **result})
            click.echo(render(table[-1:]), err=True)
    click.echo(render(table))


if __name__ == "__main__":
    main()
