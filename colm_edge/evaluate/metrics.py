"""Judge an answer: the metrics that `eval --metric` knows."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from colm_edge.errors import DataError

if TYPE_CHECKING:  # numpy is not needed here: the command line imports this module for METRICS
    from colm_edge.train.documents import Row

# How right is an answer? (generated text, the data's line) -> 0 to 1. Raises DataError where the
# line has no right answer; every line is tried with an empty text before the first generation.
Metric = Callable[[str, dict[str, Any]], float]
METRICS: dict[str, Metric] = {}  # by name, in the order of the help
# A fenced block, also of a list, with what stands after its ```; the last one may have no end.
BLOCK = re.compile(
    r"^[ \t]*(?:[-*]|\d+\.)?[ \t]*```+[ \t]*([^\s`]*)[^`\n]*\n(.*?)(?:```|\Z)",
    re.DOTALL | re.MULTILINE,
)
PYTHON = re.compile(r"py(?:thon)?[\d.]*", re.IGNORECASE)


def metric(judge: Metric) -> Metric:
    """Add a metric to METRICS under its own name."""
    METRICS[judge.__name__] = judge
    return judge


@metric
def exact(text: str, row: dict[str, Any]) -> float:
    """The text is the completion, except for white space at the ends."""
    return float(text.strip() == row["completion"].strip())


@metric
def contains(text: str, row: dict[str, Any]) -> float:
    """The text contains the line's `answer` (or its completion) as a whole: no letter or digit
    touches it, and no sign, comma or decimal makes it another number. What stands in a fraction, a
    time or a range counts."""
    wanted = (row.get("answer") or row["completion"]).strip()
    before = r"(?<![^\W_])"
    if wanted[:1].isdigit() or wanted[:1] == ".":
        before += r"(?<![.+\N{MINUS SIGN}-])(?<!\d,)"
    found = re.search(rf"{before}{re.escape(wanted)}(?![^\W_]|[.,]\d)", text)
    return float(found is not None)


@metric
def gsm8k(text: str, row: dict[str, Any]) -> float:
    """The final number is the completion's: the one that stands right after the last ####, or the
    last of the text, since #### may also begin a heading, with its number or without. A text that
    ends with #### has none.

    Commas, a dollar sign and a full stop are not part of a number, as in lm-evaluation-harness,
    whose `strict-match` needs the ####; its `flexible-extract` always takes the last number.
    """
    wanted = _final_number(row["completion"])
    if wanted is None:
        raise DataError("the metric gsm8k needs completions with a number")
    return float(_final_number(text) == wanted)


@metric
def python(text: str, row: dict[str, Any]) -> float:
    """The code in the text passes the line's `tests`, a list of statements, after `test_setup`.

    It runs in a child process; see `execute`.
    """
    tests = row.get("tests")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests) or not tests:
        raise DataError("the metric python needs tests, a list of statements")
    setup = row.get("test_setup") or ""
    if not isinstance(setup, str):
        raise DataError("the metric python needs test_setup, if there is one, as a text")
    if not text:  # asked only whether the line can be judged
        return 0.0
    from colm_edge.evaluate.execute import passes

    return float(passes("\n".join([code_of(text), setup, *tests])))


def code_of(text: str) -> str:
    """Return the Python code of an answer: the blocks that say they are Python, else all blocks,
    else the whole text."""
    blocks = BLOCK.findall(text.replace("\r\n", "\n"))
    ours = [code for language, code in blocks if PYTHON.fullmatch(language)]
    chosen = ours or [code for _, code in blocks]
    return "\n".join(map(textwrap.dedent, chosen)) or text  # a block may stand in a list


@metric
def steps(text: str, row: dict[str, Any]) -> float:
    """The share of the completion's annotated results, <<…=result>>, that the text states."""
    wanted = _results(row["completion"])
    if not wanted:
        raise DataError("the metric steps needs completions with annotations such as <<2+3=5>>")
    stated = set(_results(text))
    return sum(result in stated for result in wanted) / len(wanted)


def _results(text: str) -> list[str]:
    """Return what follows the last = of every annotation that has one."""
    found = re.findall(r"<<([^<>]*)>>", text)
    return [step.rpartition("=")[2] for step in found if "=" in step]


def _final_number(text: str) -> Decimal | None:
    number = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    marked = re.findall(rf"####(?:[ \t]*((?>{number}))(?![.):][ \t]+\S)|\s*\Z)", text)
    found = marked or re.findall(number, text)
    return Decimal(re.sub("[$,]", "", found[-1])) if found and found[-1] else None


def check_rows(rows: Iterable[Row], metric: Metric) -> None:
    """Raise DataError for the first line that the metric cannot judge, with the line's number."""
    for number, row in rows:
        needless = metric is METRICS["python"] or (
            metric is METRICS["contains"] and "answer" in row
        )
        completion = "-" if needless else row.get("completion")
        prompt = "-" if "messages" in row else row.get("prompt")
        texts = [prompt, completion, row.get("answer", "-")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                f"line {number}: a generation metric needs prompt, or messages, and completion "
                "(and, if there is one, answer) as texts that are not empty"
            )
        try:
            metric("", row)
        except DataError as e:
            raise DataError(f"line {number}: {e}") from e
