"""Tables of results as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

Table = list[dict[str, Any]]


class Style(NamedTuple):
    """How Markdown shows a number, and the two ends of its interval."""

    number: Callable[[float], str]
    end: Callable[[float], str]


def threshold_text(value: float) -> str:
    """Return a threshold in three digits, or in as many as tell it from 0 and 1."""
    text = f"{value:.3g}"
    # 0 and 1 mean one model alone.
    return repr(value) if float(text) in (0, 1) and value not in (0, 1) else text


DECIMALS = Style("{:.3f}".format, "{:.3f}".format)
AMOUNT = Style("{:,.1f}".format, lambda value: f"{value:,.{int(value < 10)}f}")
SHARE = Style(lambda value: f"{100 * value:.1f} %", lambda value: f"{100 * value:.1f}")
THRESHOLD = Style(threshold_text, threshold_text)
# By command. Any other column has three decimals; texts and whole numbers are shown as they are.
STYLES = {
    # eval
    "threshold": THRESHOLD,
    "defer_rate": SHARE,
    "accuracy": SHARE,
    "generated_defer_rate": SHARE,
    "regret_removed": SHARE,
    "tokens_per_answer": AMOUNT,
    "tokens_per_second": AMOUNT,
    "cut": SHARE,
    "review": Style("{:g}".format, "{:g}".format),
    # bench
    "outside_us": AMOUNT,
    "calls_per_100": AMOUNT,
    "peak_memory_mb": AMOUNT,
    # bench --tune
    "ms_1_token": AMOUNT,
    "ms_5_tokens": AMOUNT,
    "ms_prompt": AMOUNT,
}


def render(table: Table, form: str) -> str:
    """Return a table as json or csv, with every field, or as md, as STYLES says, with the interval
    of a column (…_low, …_high) in its cell."""
    if form == "json":
        return json.dumps(table)
    names = list(table[0])
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        return text.getvalue().rstrip()
    names = [name for name in names if not name.endswith(("_low", "_high"))]
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    for row in table:
        lines.append("| " + " | ".join(_cell(row, name) for name in names) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    style = STYLES.get(name, DECIMALS)
    if f"{name}_low" not in row:
        return style.number(value)
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{style.number(value)} ({style.end(low)}–{style.end(high)})"
