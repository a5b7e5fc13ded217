"""Write the prompts that the switch of the pair qwen2.5-coder was fitted on.

    python tools/studies/qwen_pair/prompts.py --gsm8k gsm8k/train.jsonl --mbpp mbpp/train.jsonl \\
        --outfile prompts.jsonl

Lines are {"prompt": …}, in those files too. Two of GSM8K's training questions to one of MBPP's
training problems, drawn with seed 0, and then the general prompts beside this file, which were
written for this.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import click

from colm_edge.train.documents import read_rows

N_MBPP = 100  # and twice as many of GSM8K's
GENERAL = Path(__file__).with_name("general_prompts.jsonl")


def prompts_of(path: Path) -> list[str]:
    """Return the prompts of a JSONL file, in its order."""
    return [row["prompt"] for _, row in read_rows(path)]


def mixed(gsm8k: list[str], mbpp: list[str]) -> list[str]:
    """Return the prompts in the order in which they are answered."""
    draw = random.Random(0)
    draw.shuffle(gsm8k)
    draw.shuffle(mbpp)
    chosen = []
    for i in range(N_MBPP):
        chosen += [gsm8k[2 * i], gsm8k[2 * i + 1], mbpp[i]]
    return chosen + prompts_of(GENERAL)


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, help=(__doc__ or "").split("\n\n")[0]
)
@click.option("--gsm8k", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--mbpp", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--outfile", type=click.Path(path_type=Path), required=True)
def main(gsm8k: Path, mbpp: Path, outfile: Path) -> None:
    """Write the prompts that the switch of the pair qwen2.5-coder was fitted on."""
    rows = mixed(prompts_of(gsm8k), prompts_of(mbpp))
    outfile.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))


if __name__ == "__main__":
    main()
