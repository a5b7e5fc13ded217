"""Judge an answer: the metrics that `eval --metric` knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from colm_edge.errors import DataError
from colm_edge.train.documents import Row

if TYPE_CHECKING:
    pass


# How right is an answer? (generated text, the data's line) -> 0 to 1. Raises DataError where the
# line has no right answer; every line is tried with an empty text before the first generation.
Metric = Callable[[str, dict[str, Any]], float]


def exact(text: str, row: dict[str, Any]) -> float:
    """The text is the completion, but for white space at the ends."""
    return float(text.strip() == row["completion"].strip())


def contains(text: str, row: dict[str, Any]) -> float:
    """The line's `answer` (or its completion) stands in the text as a whole: no letter or digit
    touches it, no sign or decimal changes it."""
    wanted = re.escape(row.get("answer", row["completion"]).strip())
    return float(re.search(rf"(?<![\w.+-]){wanted}(?!\w|[.,]\d)", text) is not None)


def gsm8k(text: str, row: dict[str, Any]) -> float:
    """The final number is the completion's: the first one after the last ####, or the last one.

    Commas, a dollar sign and a full stop are no part of a number, as in lm-evaluation-harness; its
    `strict-match` wants the ####, its `flexible-extract` always takes the last number.
    """
    wanted = _final_number(row["completion"])
    if wanted is None:
        raise DataError("the metric gsm8k needs completions with a number")
    return float(_final_number(text) == wanted)


def steps(text: str, row: dict[str, Any]) -> float:
    """The share of the completion's annotated results, <<…=result>>, that the text states."""
    wanted = re.findall(r"<<[^<>]*=([^<>]*)>>", row["completion"])
    if not wanted:
        raise DataError("the metric steps needs completions with annotations such as <<2+3=5>>")
    stated = re.findall(r"<<[^<>]*=([^<>]*)>>", text)
    return sum(result in stated for result in wanted) / len(wanted)


def _final_number(text: str) -> Decimal | None:
    _, mark, tail = text.rpartition("####")
    numbers = re.findall(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", tail)
    if not numbers:
        return None
    return Decimal(re.sub("[$,]", "", numbers[0 if mark else -1]))


METRICS: dict[str, Metric] = {f.__name__: f for f in (exact, contains, gsm8k, steps)}


def check_rows(rows: Iterable[Row], metric: Metric) -> None:
    """Raise DataError, with its number, for the first line that the metric cannot judge."""
    for number, row in rows:
        texts = [row.get("prompt"), row.get("completion"), row.get("answer", "-")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                f"line {number}: a generation metric needs prompt and completion (and, if there "
                "is one, answer) as texts that are not empty"
            )
        try:
            metric("", row)
        except DataError as e:
            raise DataError(f"line {number}: {e}") from e
