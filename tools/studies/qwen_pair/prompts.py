"""Write the prompts that the switch of the pair qwen2.5-coder was fitted on.

    python tools/studies/qwen_pair/prompts.py --gsm8k train.jsonl --mbpp mbpp.jsonl \\
        --outfile prompts.jsonl

The inputs are the authors' own files, as for problems.py. Two of GSM8K's training questions to one
of MBPP's tasks outside its test part, drawn with seed 0, and then the general prompts beside this
file, which were written for this. Lines are {"prompt": …}.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[2]))  # tools/, where imports begin
from lib.rows import write_rows

from colm_edge.train.documents import read_rows
from studies.qwen_pair.problems import mbpp_prompt

N_MBPP = 100  # and twice as many of GSM8K's
MBPP_TEST = range(11, 511)
GENERAL = Path(__file__).with_name("general_prompts.jsonl")


def mixed(gsm8k: list[str], mbpp: list[str]) -> list[str]:
    """Return the prompts in the order in which they are answered."""
    draw = random.Random(0)
    draw.shuffle(gsm8k)
    draw.shuffle(mbpp)
    chosen = []
    for i in range(N_MBPP):
        chosen += [gsm8k[2 * i], gsm8k[2 * i + 1], mbpp[i]]
    return chosen + [row["prompt"] for _, row in read_rows(GENERAL)]


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, help=(__doc__ or "").split("\n\n")[0]
)
@click.option("--gsm8k", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--mbpp", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--outfile", type=click.Path(path_type=Path), required=True)
def main(gsm8k: Path, mbpp: Path, outfile: Path) -> None:
    """Write the prompts that the switch of the pair qwen2.5-coder was fitted on."""
    questions = [row["question"] for _, row in read_rows(gsm8k)]
    tasks = [row for _, row in read_rows(mbpp) if row["task_id"] not in MBPP_TEST]
    rows = mixed(questions, [mbpp_prompt(task) for task in tasks])
    write_rows(outfile, ({"prompt": text} for text in rows))


if __name__ == "__main__":
    main()
