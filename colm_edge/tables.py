"""Tables of results as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


Table = list[dict[str, Any]]
SHARES = ("defer_rate", "accuracy", "generated_defer_rate", "cut")


def render(table: Table, form: str) -> str:
    """Return a table as json or csv, with every field, or as md, with the intervals beside what
    they belong to and shares in percent."""
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
    if name in SHARES:
        text, bounds = f"{100 * value:.1f} %", "{:.1%}–{:.1%}"
    elif name == "threshold":
        text, bounds = f"{value:.3g}", ""
        if float(text) in (0, 1) and value not in (0, 1):
            text = repr(value)  # 0 and 1 mean a model alone
    elif name.startswith(("tokens", "calls", "peak", "ms", "outside")):
        text, bounds = f"{value:,.1f}", "{:,.0f}–{:,.0f}"
    else:
        text, bounds = f"{value:.3f}", "{:.3f}–{:.3f}"
    if f"{name}_low" not in row:
        return text
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{text} ({bounds.format(low, high).replace('%', '')})"
