"""The metric `steps` finds what a plain pattern finds, in time that grows with the text alone; and
what the metric `python` asks of a line."""

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
