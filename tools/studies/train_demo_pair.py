"""Train the pair that ships with colm-edge, from its facts to its GGUF files.

The base reads dialogue about the training entities and about invented ones; the
expert reads statements about every entity and never a question (texts:
demo_pair/text.py). Everything is seeded; each stage writes to the work folder
and is skipped when its result is there; training resumes from its checkpoint.

    pip install -e '.[train-demo]'
    python tools/studies/train_demo_pair.py --work build/demo            # all stages
    python tools/studies/train_demo_pair.py --work build/demo --stage base

Stages: vocab, base, expert, export (GGUF, Q8_0), data (JSONL for `colm-edge
train` and the exams in tests/), switch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where imports begin
from lib.small_llama import Shape, export, load_vocab, train_model, train_vocab

from studies.demo_pair import text

ROOT = Path(__file__).parents[2]
SEED = 20261123

SHAPES = {
    "base": Shape(
        n_embd=160, n_layer=5, n_head=5, n_ff=448, steps=4500, batch=24, lr=3e-3, last_steps=400
    ),
    "expert": Shape(n_embd=256, n_layer=6, n_head=8, n_ff=704, steps=4500, batch=12, lr=2e-3),
}


def vocabulary(work: Path) -> None:
    """Train the byte-level BPE both models share, on the base's text and the statements' words.

    Held-out names are not in the base's text, so they break into pieces that the
    base has met and can copy.
    """
    facts = text.read_facts()
    known = [f for f in facts if f.part == "train"]
    words = ["an", "er", "ol", "ka", "is", "or", "ti", "us", "en", "ra"]
    corpus = itertools.chain(
        itertools.islice(text.dialogues(known, words, SEED, plain=True), 12_000),
        itertools.islice(text.statements(known, SEED), 12_000),
    )
    train_vocab(corpus, text.END, SHAPES["base"].n_vocab, work / "tokenizer.json")


def windows(
    name: str, work: Path, chunk: int, count: int, step: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return `count` training windows and their loss masks, seeded by the chunk's number.

    A window starts with a document, as every prompt does; the base learns the
    answers, not the questions.
    """
    tokenizer = load_vocab(work)
    facts = text.read_facts()
    seed = SEED + 1_000_003 * (chunk + 1)
    documents: Iterator[str]
    if name == "base":
        pieces = [
            tokenizer.id_to_token(i).replace("Ġ", "") for i in range(tokenizer.get_vocab_size())
        ]
        pieces = [p for p in pieces if p.isascii() and p.isalpha()]
        known = [f for f in facts if f.part == "train"]
        documents = text.dialogues(known, pieces, seed, casual=step >= SHAPES[name].steps)
    else:
        documents = text.statements(facts, seed)
    n_ctx = SHAPES[name].n_ctx
    ids, masks = [], []
    for _ in range(count):
        row: list[int] = []
        mask: list[int] = []
        while len(row) <= n_ctx:
            for line in next(documents).splitlines(keepends=True):
                encoded = tokenizer.encode(line).ids
                row += encoded
                mask += [0 if line.startswith("> ") else 1] * len(encoded)
        ids.append(row[: n_ctx + 1])
        masks.append(mask[: n_ctx + 1])
    return ids, masks


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
        if part is switch:  # it must learn as well when the base can do alone
            rows += text.small_talk(SEED)
        random.Random(SEED).shuffle(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    for name, shape in SHAPES.items():
        if due(name, work / f"{name}.pt"):
            train_model(name, shape, partial(windows, name, work), work, seed=SEED,
                        threads=args.threads)  # fmt: skip
    if args.stage in (None, "export"):
        for name, shape in SHAPES.items():
            export(name, shape, work, args.out / f"{name}.gguf",
                   title=f"colm-edge demonstration {name}",
                   chat_template=text.CHAT_TEMPLATE)  # fmt: skip
    if args.stage in (None, "data"):
        write_data(work, args.exams)
    if args.stage in (None, "switch"):
        command = [sys.executable, "-m", "colm_edge", "train", "--data", str(work / "switch.jsonl")]
        command += ["-m", str(args.out / "base.gguf"), "-me", str(args.out / "expert.gguf")]
        # The paper's own objective: its p_defer is the surer one where a name is copied.
        command += ["--objective", "marginal"]
        subprocess.run([*command, "--outfile", str(args.out / "switch.gguf")], check=True)


if __name__ == "__main__":
    main()
