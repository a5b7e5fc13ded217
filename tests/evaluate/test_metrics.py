"""What metrics make of a text, and what they ask of a line. `steps` finds what a plain pattern
finds, in time that grows with the text alone."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colm_edge.errors import DataError
from colm_edge.evaluate.metrics import METRICS, check_rows, steps

PLAIN = re.compile(r"<<[^<>]*=([^<>]*)>>")
ROW = {"completion": "<<1+1=2>> <<2=>> <<=a=b>>"}


def test_these_metrics_are_there():
    assert list(METRICS) == ["exact", "contains", "gsm8k", "python", "steps"]


@pytest.mark.parametrize(
    ("metric", "text", "row", "value"),
    [
        ("exact", " the end\n", {"completion": "the end"}, 1),
        ("exact", "the end.", {"completion": "the end"}, 0),
        ("contains", "It was in 1970.", {"completion": "x", "answer": "1970"}, 1),
        ("contains", "It was in 19701.", {"completion": "x", "answer": "1970"}, 0),
        ("contains", "weighs 183.84.", {"completion": "x", "answer": "183"}, 0),
        ("contains", "weighs 183.84.", {"completion": "x", "answer": "183.84"}, 1),
        ("contains", "dial +254", {"completion": "x", "answer": "254"}, 0),
        ("contains", "1,500 metres", {"completion": "x", "answer": "500"}, 0),
        ("contains", "1,500 metres", {"completion": "x", "answer": "1,500"}, 1),
        ("contains", "\N{MINUS SIGN}5 degrees", {"completion": "x", "answer": "5"}, 0),
        ("contains", "the domain is .ke.", {"completion": ".ke"}, 1),
        ("contains", "It is...__Paris__", {"completion": "Paris"}, 1),
        ("contains", "Parisian", {"completion": "Paris"}, 0),
        ("gsm8k", "so 5 and 7\n#### 1,234", {"completion": "#### 1234"}, 1),
        ("gsm8k", "so it is 12.", {"completion": "#### 12"}, 1),
        ("gsm8k", "no idea", {"completion": "#### 12"}, 0),
        ("gsm8k", "it costs $1,234.", {"completion": "so #### 1234"}, 1),
        ("gsm8k", "#### -$3.50.", {"completion": "#### -3.5"}, 1),
        ("gsm8k", "#### 5 of 7 apples", {"completion": "#### 5"}, 1),
        ("gsm8k", "#### 5\nor #### 7", {"completion": "#### 7"}, 1),
        ("gsm8k", "first 7, then nothing ####", {"completion": "#### 7"}, 0),
        ("gsm8k", "#### Step 2: twice\n5*2=10\nThe answer is 10.", {"completion": "#### 10"}, 1),
        ("gsm8k", "#### 1. Cost\n9*2=18\n#### 2. So it is 18.", {"completion": "#### 18"}, 1),
        ("gsm8k", "#### 18. ", {"completion": "#### 18"}, 1),
        ("gsm8k", "9*2=18\n#### 18. That is it.", {"completion": "#### 18"}, 1),
        ("gsm8k", "#### 10. Sum\nThe answer is 7.", {"completion": "#### 1"}, 0),
        ("gsm8k", "####\n2+3=5\nThe answer is 10.", {"completion": "#### 10"}, 1),
        ("gsm8k", "a half is .5", {"completion": "#### 0.5"}, 1),
        ("gsm8k", "1" + 400 * "0", {"completion": "#### 2" + 400 * "0"}, 0),
        ("steps", "<<2+3=5>> <<1+1=3>>", {"completion": "<<2+3=5>> and <<5*2=10>>"}, 0.5),
    ],
)
def test_metrics(metric, text, row, value):
    assert METRICS[metric](text, row) == value


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("steps", {"prompt": "p", "completion": "no step"}, "line 7: .* annotations"),
        ("gsm8k", {"prompt": "p", "completion": "no number"}, "line 7: .* with a number"),
        ("exact", {"text": "t"}, "line 7: .* prompt, or messages, and completion"),
        ("contains", {"prompt": "p", "completion": "c", "answer": 5}, "line 7: .* answer"),
    ],
)
def test_lines_without_a_right_answer_are_refused(metric, row, message):
    with pytest.raises(DataError, match=message):
        check_rows([(7, row)], METRICS[metric])


@given(text=st.text(alphabet="<>=ab2\n", max_size=60))
@example(text="<<1+1=2>>>")
@example(text="<<<1=2>>")
@example(text="<<a>>=b>> <<c=2>>")
def test_it_finds_what_the_pattern_finds(text):
    stated = PLAIN.findall(text)
    assert steps(text, ROW) == sum(x in stated for x in ("2", "", "b")) / 3
    if PLAIN.search(text):
        assert steps(text, {"completion": text}) == 1


# Half a million of these would take a quarter of an hour if each were looked at from each other.
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process need a POSIX system")
@pytest.mark.parametrize("piece", ["=", "<<", "<<=", "<<1", ">>"])
def test_a_long_text_takes_little_processor_time(piece):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "from colm_edge.evaluate.metrics import steps\n"
        f"assert steps('<<' + {piece!r} * 500_000, {{'completion': '<<1=1>>'}}) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_setup_that_is_no_text_is_refused_before_the_work():
    row = {"prompt": "p", "tests": ["assert True"], "test_setup": ["import math"]}
    with pytest.raises(DataError, match="line 1: the metric python needs test_setup, "):
        check_rows([(1, row)], METRICS["python"])
