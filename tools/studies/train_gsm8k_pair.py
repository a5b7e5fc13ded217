"""Train a base and an expert on grade-school word problems, to measure switches on real text.

    pip install -e '.[train,train-demo]'
    python tools/studies/train_gsm8k_pair.py --data DIR --work build/gsm8k

DIR/train.jsonl is GSM8K's training part (Cobbe et al. 2021, MIT licence), one {"prompt",
"completion"} a line. A hash of each prompt assigns the line to one of three parts:

- base, 20 %: the base reads these problems with their worked solutions, as question and answer;
- switch, 12 %: neither model reads them; `colm-edge train` fits the switch on them (switch.jsonl);
- more, 68 %: only the expert reads them.

The expert reads the problems and solutions of `base` and `more` as running text, without the
format of an answer (no turns, no lines, no #### at the end), and thousands of sums. So the base
knows how an answer is written, and the expert knows more words and how to calculate.
Everything is seeded; training resumes from its checkpoint. The weights stay in the work folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
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

SEED = 20261124
END = "<|end|>"
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}{{ m['content'] + '<|end|>' }}"
    "{%- else -%}{{ 'Question: ' + m['content'] + '\\nAnswer: ' }}{%- endif -%}"
    "{%- endfor -%}"
)
SUMS_SHARE = 0.2  # of the expert's documents
N_VOCAB, N_CTX = 2048, 384
TRAININGS = {
    "base": Training(
        Shape(n_embd=160, n_layer=5, n_head=5, n_head_kv=5, n_ff=448, n_vocab=N_VOCAB, n_ctx=N_CTX),
        steps=900,
        batch=8,
        lr=3e-3,
    ),
    "expert": Training(
        Shape(n_embd=256, n_layer=6, n_head=8, n_head_kv=8, n_ff=704, n_vocab=N_VOCAB, n_ctx=N_CTX),
        steps=1400,
        batch=8,
        lr=2e-3,
    ),
}

Row = dict[str, str]


def parts(data: Path) -> dict[str, list[Row]]:
    """Return the training lines by part, in the file's order."""
    cut: dict[str, list[Row]] = {"base": [], "switch": [], "more": []}
    for line in (data / "train.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        share = int(hashlib.sha256(row["prompt"].encode()).hexdigest()[:8], 16) / 2**32
        cut["base" if share < 0.20 else "switch" if share < 0.32 else "more"].append(row)
    return cut


def dialogue(row: Row) -> tuple[str, str]:
    """Return a problem and its solution as the chat template writes them."""
    return f"Question: {row['prompt']}\nAnswer: ", row["completion"] + END


def prose(row: Row) -> str:
    """Return a problem and its solution as running text."""
    solution = row["completion"].split("\n####")[0]
    return row["prompt"] + " " + " ".join(solution.split()) + END


def sums(rng: random.Random) -> str:
    """Return a paragraph of correct sums like those in the solutions."""
    lines = []
    for _ in range(rng.randint(4, 12)):
        sign = rng.choice("+-**/")
        top = rng.choice((12, 30, 100, 100, 1000))
        a, b = rng.randint(1, top), rng.randint(1, top)
        if sign == "*":
            a, b = rng.randint(2, 60), rng.randint(2, 12)
            if rng.random() < 0.3:
                a *= 10
        elif sign == "/":
            b = rng.randint(2, 12)
            a *= b
        elif sign == "-":
            a, b = max(a, b), min(a, b)
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        close = rng.random() < 0.7
        lines.append(f"{a}{sign}{b}={result}" if close else f"{a} {sign} {b} = {result}")
    return rng.choice((" ", ", ", "\n")).join(lines) + END


def windows(name: str, data: Path, work: Path, chunk: int, count: int, step: int) -> Windows:
    """Return `count` windows of whole documents in a seeded order, and their loss masks."""
    cut = parts(data)
    rng = random.Random(SEED + 1_000_003 * (chunk + 1))

    def documents() -> Iterator[list[Piece]]:
        rows = cut["base"] + (cut["more"] if name == "expert" else [])
        while True:
            for row in rng.sample(rows, len(rows)):
                if name == "base":
                    prompt, answer = dialogue(row)
                    yield [(prompt, False), (answer, True)]
                elif rng.random() < SUMS_SHARE:
                    yield [(sums(rng), True)]
                else:
                    yield [(prose(row), True)]

    return cut_windows(documents(), load_vocab(work), N_CTX, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--work", type=Path, default=Path("build/gsm8k"))
    parser.add_argument("--only", choices=tuple(TRAININGS), help="train this model alone")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads (default: all)")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    cut = parts(args.data)
    print({name: len(rows) for name, rows in cut.items()}, "lines")
    write_rows(work / "switch.jsonl", cut["switch"])
    if not (work / "tokenizer.json").exists():
        corpus = ["".join(dialogue(row)) for row in cut["base"]]
        train_vocab(corpus, END, N_VOCAB, work / "tokenizer.json")
    for name in (args.only,) if args.only else TRAININGS:
        training, make = TRAININGS[name], partial(windows, name, args.data, work)
        train_model(name, training, make, work, seed=SEED, threads=args.threads)
        export(
            name,
            training.shape,
            work,
            work / f"{name}.gguf",
            title=f"GSM8K trial {name}",
            chat_template=CHAT_TEMPLATE,
        )


if __name__ == "__main__":
    main()
