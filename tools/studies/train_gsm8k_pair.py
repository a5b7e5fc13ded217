"""Train a base and an expert on real text, grade-school word problems, to measure switches on.

    pip install -e '.[train-demo]'
    python tools/studies/train_gsm8k_pair.py --data DIR --work build/gsm8k  # DIR/train.jsonl of GSM8K

The data is GSM8K's training part (Cobbe et al. 2021, MIT licence), one {"prompt", "completion"} a
line. By a hash of each line it is cut into three parts:

- base, 20 %: the base reads these problems with their worked solutions, as question and answer;
- switch, 12 %: neither model reads them; `colm-edge train` fits the switch on them (switch.jsonl);
- more, 68 %: only the expert reads them.

The expert reads the problems and solutions of `base` and `more` as running text, without the
format of an answer (no turns, no lines, no #### at the end), and sums by the thousand. So the base
knows how an answer is written, and the expert knows more words and how sums come out.
Everything is seeded; training goes on from its checkpoint. The weights stay in the work folder.
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
from lib.small_llama import Shape, export, load_vocab, train_model, train_vocab

SEED = 20261124
END = "<|end|>"
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}{{ m['content'] + '<|end|>' }}"
    "{%- else -%}{{ 'Question: ' + m['content'] + '\\nAnswer: ' }}{%- endif -%}"
    "{%- endfor -%}"
)
SUMS_SHARE = 0.2  # of the expert's documents
SHAPES = {
    "base": Shape(n_embd=160, n_layer=5, n_head=5, n_ff=448, steps=900, batch=8, lr=3e-3,
                  n_ctx=384),
    "expert": Shape(n_embd=256, n_layer=6, n_head=8, n_ff=704, steps=1400, batch=8, lr=2e-3,
                    n_ctx=384),
}  # fmt: skip

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
    """Return a paragraph of sums such as the solutions hold, right ones."""
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
        lines.append(f"{a}{sign}{b}={result}" if rng.random() < 0.7
                     else f"{a} {sign} {b} = {result}")  # fmt: skip
    return rng.choice((" ", ", ", "\n")).join(lines) + END


def windows(
    name: str, data: Path, work: Path, chunk: int, count: int, step: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return `count` windows, documents whole and in a seeded order, begun anew in each window."""
    tokenizer, cut = load_vocab(work), parts(data)
    rng = random.Random(SEED + 1_000_003 * (chunk + 1))
    n_ctx = SHAPES[name].n_ctx

    def documents() -> Iterator[list[tuple[str, int]]]:
        rows = cut["base"] + (cut["more"] if name == "expert" else [])
        while True:
            for row in rng.sample(rows, len(rows)):
                if name == "base":
                    prompt, answer = dialogue(row)
                    yield [(prompt, 0), (answer, 1)]
                elif rng.random() < SUMS_SHARE:
                    yield [(sums(rng), 1)]
                else:
                    yield [(prose(row), 1)]

    source = documents()
    ids, masks = [], []
    for _ in range(count):
        row: list[int] = []
        mask: list[int] = []
        while len(row) <= n_ctx:
            for words, counts in next(source):
                encoded = tokenizer.encode(words).ids
                row += encoded
                mask += [counts] * len(encoded)
        ids.append(row[: n_ctx + 1])
        masks.append(mask[: n_ctx + 1])
    return ids, masks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--work", type=Path, default=Path("build/gsm8k"))
    parser.add_argument("--only", choices=tuple(SHAPES), help="train this model alone")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads (default: all)")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    cut = parts(args.data)
    print({name: len(rows) for name, rows in cut.items()}, "lines")
    switch = "".join(json.dumps(row) + "\n" for row in cut["switch"])
    (work / "switch.jsonl").write_text(switch)
    if not (work / "tokenizer.json").exists():
        corpus = ["".join(dialogue(row)) for row in cut["base"]]
        train_vocab(corpus, END, SHAPES["base"].n_vocab, work / "tokenizer.json")
    for name in (args.only,) if args.only else SHAPES:
        shape = SHAPES[name]
        train_model(name, shape, partial(windows, name, args.data, work), work, seed=SEED,
                    threads=args.threads)  # fmt: skip
        export(name, shape, work, work / f"{name}.gguf", title=f"GSM8K trial {name}",
               chat_template=CHAT_TEMPLATE)  # fmt: skip


if __name__ == "__main__":
    main()
