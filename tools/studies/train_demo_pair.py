"""Train the pair that ships with colm-edge, from its facts to its GGUF files.

The base reads dialogue about the training entities and about invented ones; the expert reads
statements about every entity and never a question (texts: demo_pair/text.py). Everything is seeded;
each stage writes to the work folder and is skipped when its result exists; training resumes from
its checkpoint.

    pip install -e '.[train,train-demo]'
    python tools/studies/train_demo_pair.py --work build/demo            # all stages
    python tools/studies/train_demo_pair.py --work build/demo --stage base

Stages: vocab, base, expert, export (GGUF, Q8_0), data (JSONL for `colm-edge train` and the exams in
tests/), switch.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where imports begin
from lib.llama_gguf import Shape
from lib.rows import write_rows
from lib.small_llama import (
    Piece,
    Training,
    Windows,
    cut_windows,
    export,
    load_vocab,
    train_model,
    train_vocab,
)

from studies.demo_pair import text

ROOT = Path(__file__).parents[2]
SEED = 20261123

N_VOCAB, N_CTX = 2048, 192
TRAININGS = {
    "base": Training(
        Shape(n_embd=160, n_layer=5, n_head=5, n_head_kv=5, n_ff=448, n_vocab=N_VOCAB, n_ctx=N_CTX),
        steps=4500,
        batch=24,
        lr=3e-3,
        last_steps=400,
    ),
    "expert": Training(
        Shape(n_embd=256, n_layer=6, n_head=8, n_head_kv=8, n_ff=704, n_vocab=N_VOCAB, n_ctx=N_CTX),
        steps=4500,
        batch=12,
        lr=2e-3,
    ),
}


def vocabulary(work: Path) -> None:
    """Train the byte-level BPE that both models share, on the base's text and on statements.

    Held-out names are not in the base's text, so they are split into pieces that the base knows and
    can copy.
    """
    facts = text.read_facts()
    known = [f for f in facts if f.part == "train"]
    words = ["an", "er", "ol", "ka", "is", "or", "ti", "us", "en", "ra"]
    corpus = itertools.chain(
        itertools.islice(text.dialogues(known, words, SEED, plain=True), 12_000),
        itertools.islice(text.statements(known, SEED), 12_000),
    )
    train_vocab(corpus, text.END, N_VOCAB, work / "tokenizer.json")


def windows(name: str, work: Path, chunk: int, count: int, step: int) -> Windows:
    """Return `count` training windows and their loss masks, seeded by the chunk's number.

    The base learns the answers, not the questions.
    """
    tokenizer = load_vocab(work)
    facts = text.read_facts()
    seed = SEED + 1_000_003 * (chunk + 1)
    if name == "base":
        pieces = [
            tokenizer.id_to_token(i).replace("Ġ", "") for i in range(tokenizer.get_vocab_size())
        ]
        pieces = [p for p in pieces if p.isascii() and p.isalpha()]
        known = [f for f in facts if f.part == "train"]
        documents = text.dialogues(known, pieces, seed, casual=step >= TRAININGS[name].steps)
    else:
        documents = text.statements(facts, seed)
    return cut_windows(map(parted, documents), tokenizer, N_CTX, count)


def parted(document: str) -> list[Piece]:
    """Part a document into its lines; what a user says does not count in the loss."""
    lines = document.splitlines(keepends=True)
    return [(line, not line.startswith("> ")) for line in lines]


def write_data(work: Path, exams: Path) -> None:
    """Write the switch's training data and the exams on held-out entities."""
    facts = text.read_facts()
    switch = [f for f in facts if f.part == "switch"]
    test = [f for f in facts if f.part == "test"]
    exams.mkdir(parents=True, exist_ok=True)
    for path, part, unseen, per_fact in (
        (work / "switch.jsonl", switch, False, 6),
        (exams / "demo_heldout.jsonl", test, False, 1),
        (exams / "demo_unseen_wordings.jsonl", test, True, 1),
    ):
        rows = list(text.exam(part, unseen=unseen, seed=SEED, per_fact=per_fact))
        if part is switch:  # it must also learn when the base can answer alone
            rows += text.small_talk(SEED)
        random.Random(SEED).shuffle(rows)
        write_rows(path, rows)
        print(f"{path}: {len(rows)} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--out", type=Path, default=ROOT / "colm_edge" / "data")
    parser.add_argument("--exams", type=Path, default=ROOT / "tests" / "data")
    parser.add_argument("--stage", choices=("vocab", "base", "expert", "export", "data", "switch"))
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads (default: all)")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)

    def due(stage: str, result: Path) -> bool:
        return args.stage == stage or (args.stage is None and not result.exists())

    if due("vocab", work / "tokenizer.json"):
        vocabulary(work)
    for name, training in TRAININGS.items():
        if due(name, work / f"{name}.pt"):
            make = partial(windows, name, work)
            train_model(name, training, make, work, seed=SEED, threads=args.threads)
    if args.stage in (None, "export"):
        for name, training in TRAININGS.items():
            title = f"colm-edge demonstration {name}"
            export(
                name,
                training.shape,
                work,
                args.out / f"{name}.gguf",
                title=title,
                chat_template=text.CHAT_TEMPLATE,
            )
    if args.stage in (None, "data"):
        write_data(work, args.exams)
    if args.stage in (None, "switch"):
        command = [sys.executable, "-m", "colm_edge", "train", "--data", str(work / "switch.jsonl")]
        command += ["-m", str(args.out / "base.gguf"), "-me", str(args.out / "expert.gguf")]
        # The paper's objective: where a name is copied, its p_defer is the more certain one.
        command += ["--objective", "marginal"]
        # Its expert never saw a question, so it would take the base's words away (docs/review.md).
        command += ["--review", "off"]
        subprocess.run([*command, "--outfile", str(args.out / "switch.gguf")], check=True)


if __name__ == "__main__":
    main()
