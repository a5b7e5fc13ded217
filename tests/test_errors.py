"""Messages are one line that can be printed, and not long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from colm_edge.errors import LONGEST, ColmError


@given(text=st.text())
def test_any_text_becomes_one_line(text):
    told = str(ColmError(text))
    assert told.isprintable()
    assert len(told) <= LONGEST


def test_what_can_be_printed_stays():
    assert str(ColmError("é: 3 … 漢字\n  and more")) == "é: 3 … 漢字 and more"
    assert str(ColmError("a\x1b[31mred\x07")) == r"a\x1b[31mred\x07"


def test_a_long_one_keeps_its_ends():
    told = str(ColmError("what was wrong" + "x" * 5000 + "what to do"))
    assert told.startswith("what was wrong")
    assert told.endswith("what to do")
