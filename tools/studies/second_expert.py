"""A second expert beside the demo pair's: countries that do not exist, and a switch for both.

    pip install '.[train,train-demo]'
    python tools/studies/second_expert.py --work build/second

A model smaller than that one, of the same vocabulary, reads statements about a made-up
encyclopaedia's countries, and never a question; the base stays as it is. Then `colm-edge train`
fits one switch for both experts, to questions about animals and elements, which are the first
expert's, and about countries. Printed at the end: the likelihood of held-back answers with each
expert alone behind a switch of its own, and with both; and the share of exact facts of both kinds.

Real countries are left out: nothing in the base's state tells which world a country belongs to.
Names and facts are made up by the generator of the base's training text, with a seed of its own.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where imports begin
from lib.command_line import BASE, colm_edge, exact
from lib.llama_gguf import Shape
from lib.rows import write_rows
from lib.small_llama import Training, cut_windows, export, import_gguf, load_vocab, train_model

from studies.demo_pair import text
from studies.demo_pair.wordings import ATTRIBUTES
from studies.train_demo_pair import N_CTX, N_VOCAB, ROOT, parted

SEED = 20261128
N_COUNTRIES, N_FOR_SWITCH = 60, 40  # the others are for the exam
DATA = ROOT / "colm_edge" / "data"
TRAINING = Training(
    Shape(n_embd=128, n_layer=4, n_head=4, n_head_kv=4, n_ff=352, n_vocab=N_VOCAB, n_ctx=N_CTX),
    steps=3000,
    batch=12,
    lr=3e-3,
)
NAMES = ("nature", "countries")  # of the experts: the shipped one, and this one


def encyclopaedia() -> list[text.Fact]:
    """Return every attribute of the made-up countries; the first of them are the switch's part."""
    old, draw = text.read_facts(), random.Random(SEED)
    known = frozenset(fact.entity for fact in old)
    inventor = text.Inventor(old, ["an", "er", "ol", "ka", "is", "or", "ti"], draw, known)
    names = dict[str, None]()
    while len(names) < N_COUNTRIES:
        names[inventor.name("country")] = None
    return [
        text.Fact(
            "switch" if i < N_FOR_SWITCH else "test", "country", name, attribute,
            inventor.value("country", attribute),
        )
        for i, name in enumerate(names)
        for kind, attribute in ATTRIBUTES
        if kind == "country"
    ]  # fmt: skip


def questions(part: str) -> dict[str, list[dict[str, str]]]:
    """Return the questions of one part, by the expert that knows their answers."""
    facts = {
        "nature": [f for f in text.read_facts() if f.part == part and f.kind != "country"],
        "countries": [f for f in encyclopaedia() if f.part == part],
    }
    n = 6 if part == "switch" else 3
    return {
        name: list(text.exam(known, unseen=False, seed=SEED, per_fact=n))
        for name, known in facts.items()
    }


def train_expert(work: Path, out: Path, threads: int) -> None:
    """Train the expert from nothing, and write it as GGUF."""
    import_gguf("shipped", DATA / "expert.gguf", work)  # for its vocabulary
    tokenizer, facts = load_vocab(work), encyclopaedia()

    def windows(chunk: int, count: int, step: int) -> Any:
        documents = text.statements(facts, SEED + 1_000_003 * (chunk + 1))
        return cut_windows(map(parted, documents), tokenizer, N_CTX, count)

    train_model("countries", TRAINING, windows, work, seed=SEED, threads=threads)
    export(
        "countries", TRAINING.shape, work, out,
        title="colm-edge demonstration expert on made-up countries",
        chat_template=text.CHAT_TEMPLATE,
    )  # fmt: skip


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, help=(__doc__ or "").split("\n\n")[0]
)
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "build" / "second")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the results.  [default: --work]"
)
@click.option("--threads", default=0, help="PyTorch threads; 0: all.")
def main(work: Path, out: Path | None, threads: int) -> None:
    """Train a second expert and a switch for both, and say what they do."""
    work.mkdir(parents=True, exist_ok=True)
    out = out or work
    files = {"nature": DATA / "expert.gguf", "countries": out / "countries.gguf"}
    if not files["countries"].exists():
        train_expert(work, files["countries"], threads)
    talk = list(text.small_talk(SEED))
    train, exams = questions("switch"), {}
    for name, rows in questions("test").items():
        exams[name] = write_rows(work / f"exam-{name}.jsonl", rows)
    mixed = [row for rows in train.values() for row in rows] + talk
    random.Random(SEED).shuffle(mixed)
    data = write_rows(work / "mixed.jsonl", mixed)
    base, how = ("-m", BASE), ("--objective", "marginal", "-t", "1")
    named = [f"{name}={file}" for name, file in files.items()]
    both = out / "team.gguf"
    report = colm_edge(
        "train", *base, *how, "-me", named[0], "-me", named[1], "--data", data, "--work-dir",
        work / "scores", "--outfile", both,
    )  # fmt: skip
    print(f"both: joint {report['nll_joint']:.4f}, sent {json.dumps(report['sent'])}")
    for name, file in files.items():
        one = colm_edge(
            "train", *base, *how, "-me", file, "--data", data, "--outfile",
            work / f"{name}-mixed.gguf",
        )  # fmt: skip
        print(f"{name} alone: joint {one['nll_joint']:.4f}")
        own = write_rows(work / f"{name}.jsonl", [*train[name], *talk])
        switch = work / f"{name}.gguf"
        colm_edge("train", *base, *how, "-me", file, "--data", own, "--outfile", switch)
        alone, team = exact(exams[name], switch, [file]), exact(exams[name], both, named)
        print(f"{name}: exact facts {alone:.1%} by its own pair, {team:.1%} by the team")


if __name__ == "__main__":
    main()
