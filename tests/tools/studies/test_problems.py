"""The lines of HumanEval, MBPP and GSM8K are judged as their own answers, and others, deserve."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from lib.rows import write_rows
from studies.qwen_pair import problems, prompts
from studies.qwen_pair.problems import hash_of, main

from colm_edge.evaluate.metrics import gsm8k, python

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": "\n\ndef twice(text: str):\n    return text + text\n\n\ndef four_times(text: str):\n"
    '    """\n    Repeat the text four times.\n    """\n',
    "entry_point": "four_times",
    "canonical_solution": "    return twice(twice(text))\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate('a') == 'aaaa'\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add\u2028two numbers.",  # a line break to Python, not to JSONL
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3"],
    "test_setup_code": "zero = 0",
    "challenge_test_list": ["assert add(zero, 5) == 5"],
}
GSM8K = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(3)]


def run(tmp_path: Path, kind: str, rows: list[dict]) -> tuple[Result, list[dict]]:
    given, lines = tmp_path / "given.jsonl", tmp_path / "lines.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "humaneval":
        given = given.with_suffix(".jsonl.gz")
        text = gzip.compress(text)
    given.write_bytes(text)
    result = CliRunner().invoke(main, [kind, str(given), "--outfile", str(lines)])
    found = lines.read_text().splitlines() if lines.exists() else []
    return result, [json.loads(line) for line in found]


@pytest.mark.parametrize(
    ("body", "right"),
    [(HUMANEVAL["canonical_solution"], 1), ("    return twice(text)\n", 0), ("    pass\n", 0)],
)
def test_an_answer_to_humaneval_is_run_against_its_check(tmp_path, body, right):
    result, (row,) = run(tmp_path, "humaneval", [HUMANEVAL])
    assert result.exit_code == 0, result.output
    assert "def four_times(text: str):" in row["prompt"]
    assert body not in row["prompt"]
    assert python(f"```python\n{HUMANEVAL['prompt']}{body}```", row) == right


@pytest.mark.parametrize(("code", "right"), [(MBPP["code"], 1), ("def add(a, b): return 3", 0)])
def test_an_answer_to_mbpp_is_run_against_all_tests_and_told_some(tmp_path, code, right):
    result, (row,) = run(tmp_path, "mbpp", [MBPP | {"task_id": 12}, MBPP])
    assert result.exit_code == 0, result.output
    assert row["prompt"].endswith(f"these tests:\n\n{MBPP['test_list'][0]}")
    assert python(f"```python\n{code}\n```", row) == right


def test_the_questions_of_gsm8k_are_those_that_were_asked(tmp_path, monkeypatch):
    chosen = tmp_path / "chosen.txt"
    chosen.write_text("\n".join(hash_of(GSM8K[i]["question"]) for i in (2, 0)) + "\n")
    monkeypatch.setattr(problems, "GSM8K_TEST", chosen)
    result, rows = run(tmp_path, "gsm8k", GSM8K)
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in rows] == ["2 + 1?", "0 + 1?"]
    assert [gsm8k("So it is 3.", row) for row in rows] == [1, 0]
    result, _ = run(tmp_path, "gsm8k", GSM8K[:2])
    assert result.exit_code == 1
    assert "give GSM8K's test.jsonl" in result.output


def test_three_hundred_questions_are_listed_once_each():
    listed = problems.GSM8K_TEST.read_text().split()
    assert len(listed) == len(set(listed)) == 300


def test_a_switch_is_fitted_to_no_task_of_mbpps_test_part(tmp_path):
    questions, tasks, out = (tmp_path / name for name in ("g.jsonl", "m.jsonl", "p.jsonl"))
    asked = [{"question": f"{i} + 1?", "answer": "#### 2"} for i in range(300)]
    write_rows(questions, asked)
    rows = [MBPP | {"task_id": i, "text": f"task {i}"} for i in range(1, 975)]
    write_rows(tasks, rows)
    given = ["--gsm8k", str(questions), "--mbpp", str(tasks), "--outfile", str(out)]
    result = CliRunner().invoke(prompts.main, given)
    assert result.exit_code == 0, result.output
    written = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    of_mbpp = [int(text.split()[1]) for text in written if text.startswith("task ")]
    assert len(of_mbpp) == 100
    assert not set(of_mbpp) & set(range(11, 511))
    assert len({text for text in written if text.endswith("+ 1?")}) == 200
