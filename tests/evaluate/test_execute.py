"""The metric `python`: an answer's code passes its tests, or not, and can do little else."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from colm_edge.cli import main
from colm_edge.evaluate import execute
from colm_edge.evaluate.execute import passes
from colm_edge.evaluate.metrics import METRICS, code_of

PYTHON = METRICS["python"]
ROW = {"prompt": "p", "tests": ["assert double(2) == 4", "assert double('a') == 'aa'"]}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Here:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.", 1.0),
        ("```python\ndef double(x):\n    return x * x\n```", 0.0),
        ("def double(x):\n    return x + x", 1.0),
        ("```\ndef double(x):\n    return x + x\n", 1.0),  # cut inside its block
        ("```python\ndef double(x): return x + x\n```\n```\nOutput: 4\n```", 1.0),
        ("1. So:\n\n   ```python\n   def double(x):\n       return 2 * x\n   ```", 1.0),
        ("I cannot.", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_right_if_its_code_passes(text, right):
    assert PYTHON(text, ROW) == right


def test_the_set_up_runs_before_the_tests():
    row = {"prompt": "p", "test_setup": "n = 3", "tests": ["assert f() == n"]}
    assert PYTHON("def f(): return 3", row) == 1.0


def test_python_blocks_go_before_others():
    assert code_of("```python\na\n```\n```\nb\n```\n```py\nc\n```") == "a\n\nc\n"
    for opened in "```python3.11", "```python title=a.py", "~\n- ```py\r", "```Python ":
        assert code_of(f"{opened}\na\n```\nDone.") == "a\n", opened
    assert code_of("```c++\na\n```\nThen\n```\nb\n```\nend") == "a\n\nb\n"


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "open('written', 'w')",
        "import os; os.open('written', os.O_CREAT | os.O_WRONLY)",
        "open('/etc/passwd').read()",
        "import os; os.mkdir('made')",
        "import os; os.mkfifo('made')",
        "import posix; posix.mknod('made')",
        "import os, sys; os.open(sys.executable, os.O_RDONLY | os.O_CREAT)",
        "import os, sys; os.open(os.__file__, os.O_RDONLY | os.O_APPEND)",
        "from multiprocessing import util; util.spawnv_passfds(b'/bin/true', [b'true'], [])",
        "x = bytearray(4 << 30)",
        "import sys; sys.exit(0)",  # before its tests
        "import os; os._exit(0)",
        "raise SystemExit",
        "not python",
        "a\0b",
    ],
)
def test_what_code_may_not_do_fails_it(code):
    assert not passes(code)


def test_code_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(execute, "SECONDS", 0.5)
    assert not passes("while True: pass")
    assert not passes("input()")


@pytest.mark.parametrize(
    "code",
    [
        "x = '" + "y" * 300_000 + "'",  # longer than an argument may be
        "for i in range(100_000): print('z' * 1000)",  # nobody keeps it
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "assert 'é' == '\\u00e9'",
        "import os; os.environ['A'] = 'b'; assert os.environ['A'] == 'b'",
        "import asyncio, subprocess\nfrom multiprocessing.pool import ThreadPool\n"
        "from unittest.mock import patch",
        "if __name__ == '__main__':\n    raise ValueError",
    ],
)
def test_what_answers_may_do(code):
    assert passes(code)


def test_nothing_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert passes("import os; assert 'SECRET' not in os.environ")


def test_the_command_asks_before_it_runs_code(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    result = CliRunner().invoke(main, ["eval", "--data", str(data), "--metric", "python"])
    assert result.exit_code == 2
    assert "--allow-exec" in result.stderr
