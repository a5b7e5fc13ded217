"""The lines of HumanEval are judged as its own solutions, and others, deserve."""

from __future__ import annotations

import gzip
import json

import pytest
from click.testing import CliRunner
from studies.qwen_pair.humaneval import main

from colm_edge.evaluate.metrics import python

PROBLEM = {
    "task_id": "HumanEval/x",
    "prompt": "\n\ndef twice(text: str):\n    return text + text\n\n\ndef four_times(text: str):\n"
    '    """\n    Repeat the text four times.\n    """\n',
    "entry_point": "four_times",
    "canonical_solution": "    return twice(twice(text))\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate('a') == 'aaaa'\n",
}


@pytest.mark.parametrize(
    ("body", "right"),
    [(PROBLEM["canonical_solution"], 1), ("    return twice(text)\n", 0), ("    pass\n", 0)],
)
def test_an_answer_is_run_against_the_check(tmp_path, body, right):
    problems, lines = tmp_path / "HumanEval.jsonl.gz", tmp_path / "humaneval.jsonl"
    problems.write_bytes(gzip.compress(json.dumps(PROBLEM).encode()))
    run = CliRunner().invoke(main, [str(problems), "--outfile", str(lines)])
    assert run.exit_code == 0, run.output
    (row,) = map(json.loads, lines.read_text().splitlines())
    assert "def four_times(text: str):" in row["prompt"]
    assert body not in row["prompt"]
    assert python(f"```python\n{PROBLEM['prompt']}{body}```", row) == right
