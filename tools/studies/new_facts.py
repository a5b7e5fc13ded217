"""Knowledge that changes: teach the demo pair's expert new facts, and bring the switch up to date.

    pip install '.[train,train-demo]'
    python tools/studies/new_facts.py --work build/new-facts

The expert reads statements about three dozen things that neither model has met, among statements
about the old ones; it never reads a question. The base stays as it is. Then `colm-edge train
--update` fits the switch again, on questions about the things that the switch was fitted on before.
Printed at the end: the share of exact facts in the answers about the old test part and about the
new things, with the old and the new expert, the old and the new switch.

Names and facts of the new things are made up, by the generator of the base's training text with a
seed of its own, and names that exist are left out.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where imports begin
from lib.command_line import BASE, colm_edge, exact
from lib.rows import write_rows
from lib.small_llama import Training, cut_windows, export, import_gguf, load_vocab, train_model

from studies.demo_pair import text
from studies.demo_pair.wordings import ATTRIBUTES
from studies.train_demo_pair import N_CTX, ROOT, TRAININGS, parted

SEED = 20261127
PER_KIND = 12  # new entities
DATA = ROOT / "colm_edge" / "data"
STEPS = 500
SHARE_NEW = 0.3  # of the statements that the expert reads


def new_facts() -> list[text.Fact]:
    """Return the facts of invented entities, every attribute of each."""
    old = text.read_facts()
    draw = random.Random(SEED)
    known = frozenset(fact.entity for fact in old)
    inventor = text.Inventor(old, ["an", "er", "ol", "ka", "is", "or", "ti"], draw, known)
    facts = []
    for kind in sorted({kind for kind, _ in ATTRIBUTES}):
        attributes = [attribute for k, attribute in ATTRIBUTES if k == kind]
        for name in {inventor.name(kind): None for _ in range(PER_KIND)}:
            facts += [
                text.Fact("new", kind, name, attribute, inventor.value(kind, attribute))
                for attribute in attributes
            ]
    return facts


def reading(seed: int) -> Iterator[str]:
    """Yield the expert's documents without end: old statements, and new ones among them."""
    draw = random.Random(seed)
    old, new = text.statements(text.read_facts(), seed), text.statements(new_facts(), seed + 1)
    while True:
        yield next(new if draw.random() < SHARE_NEW else old)


def teach(work: Path, threads: int) -> None:
    """Train the demo pair's expert further, and write it as GGUF."""
    if not (work / "expert.ckpt").exists():
        import_gguf("expert", DATA / "expert.gguf", work)
    shape = TRAININGS["expert"].shape
    tokenizer = load_vocab(work)

    def windows(chunk: int, count: int, step: int) -> Any:
        documents = reading(SEED + 1_000_003 * (chunk + 1))
        return cut_windows(map(parted, documents), tokenizer, N_CTX, count)

    training = Training(shape, steps=STEPS, batch=12, lr=5e-4)
    train_model("expert", training, windows, work, seed=SEED, threads=threads)
    export(
        "expert", shape, work, work / "expert.gguf",
        title="colm-edge demonstration expert, with new facts", chat_template=text.CHAT_TEMPLATE,
    )  # fmt: skip


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, help=(__doc__ or "").split("\n\n")[0]
)
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "build" / "new-facts")
@click.option("--threads", default=0, help="PyTorch threads; 0: all.")
def main(work: Path, threads: int) -> None:
    """Teach the demo pair's expert new facts, and bring the switch up to date."""
    work.mkdir(parents=True, exist_ok=True)
    old = text.read_facts()
    of = {part: [fact for fact in old if fact.part == part] for part in ("switch", "test")}
    write_rows(work / "old.jsonl", text.exam(of["test"], unseen=False, seed=SEED))
    write_rows(work / "new.jsonl", text.exam(new_facts(), unseen=False, seed=SEED))
    lines = itertools.chain(
        text.exam(of["switch"], unseen=False, seed=SEED, per_fact=6), text.small_talk(SEED)
    )
    write_rows(work / "switch.jsonl", lines)
    begun = time.perf_counter()
    if not (work / "expert.gguf").exists():
        teach(work, threads)
    print(f"taught in {time.perf_counter() - begun:.0f} s")
    pair = ("-m", BASE, "--data", work / "switch.jsonl", "--work-dir", work / "scores")
    how = ("--objective", "marginal", "-t", "1")
    old_switch, new_switch = DATA / "switch.gguf", work / "switch.gguf"
    colm_edge("train", *pair, *how, "-me", DATA / "expert.gguf", "--outfile", work / "again.gguf")
    begun = time.perf_counter()
    report = colm_edge(
        "train", *pair, *how, "-me", work / "expert.gguf", "--update", old_switch,
        "--outfile", new_switch,
    )  # fmt: skip
    before, after = report["before"]["nll_joint"], report["nll_joint"]
    took = time.perf_counter() - begun
    print(f"updated in {took:.0f} s: joint {before:.4f} before, {after:.4f} after")
    for label, expert, switch, method in (
        ("base alone", DATA / "expert.gguf", old_switch, "base"),
        ("old expert, old switch", DATA / "expert.gguf", old_switch, "colm"),
        ("new expert alone", work / "expert.gguf", old_switch, "expert"),
        ("new expert, old switch", work / "expert.gguf", old_switch, "colm"),
        ("new expert, new switch", work / "expert.gguf", new_switch, "colm"),
    ):
        on_old, on_new = (
            exact(work / exam, switch, [expert], method) for exam in ("old.jsonl", "new.jsonl")
        )
        print(f"{label:24} old facts {on_old:.1%}, new facts {on_new:.1%}", flush=True)


if __name__ == "__main__":
    main()
