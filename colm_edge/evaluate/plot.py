"""Draw a table of methods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colm_edge.errors import ColmError
from colm_edge.files import check_writable, replacing
from colm_edge.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Markers and lines tell the methods apart where there is no colour.
STYLES: dict[str, dict[str, Any]] = {
    "colm": {"color": "C0", "marker": "o", "linestyle": "-", "lw": 2.0},
    "compose": {"color": "C4", "marker": "s", "linestyle": (0, (6, 2))},
    "random": {"color": "C7", "marker": "x", "linestyle": ":"},
    "entropy": {"color": "C1", "marker": "^", "linestyle": "--"},
    "margin": {"color": "C2", "marker": "v", "linestyle": "-."},
    "weak": {"color": "C5", "marker": "D", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
}
REVIEW: dict[str, Any] = {"marker": "P", "linestyle": (0, (1, 1))}
ALONE = {"base": ("k", "<"), "expert": ("k", ">"), "proxy": ("C3", "*")}
PICTURES = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise now, rather than after the work, when a picture cannot be drawn or written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ColmError("--plot draws with matplotlib: pip install 'colm-edge[plots]'") from e
    if Path(path).suffix.lower() not in PICTURES:
        raise ColmError(f"{path}: expected the name of a picture, ending in {', '.join(PICTURES)}")
    check_writable(path)


def write_plot(table: Table, path: str | os.PathLike[str]) -> None:
    """Write the picture of a table. Raises WriteError when the file cannot be written."""
    with replacing(path) as temporary:
        draw(table).savefig(temporary, dpi=150)


def draw(table: Table) -> Figure:
    """Draw the loss of hard decisions against the defer rate and, where answers were generated,
    the accuracy against theirs and against tokens per second; bars are 95 % intervals."""
    from matplotlib.figure import Figure

    generated = "accuracy" in table[0]
    figure = Figure(figsize=(17 if generated else 7.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 3 if generated else 1, squeeze=False)[0]
    _panel(panels[0], table, "defer_rate", "nll_hard")
    joint = [row["nll"] for row in table if row["method"] == "colm"]
    if joint:  # the loss of the mixture does not depend on the threshold
        panels[0].axhline(joint[0], color="C0", lw=0.8, label="joint")
    panels[0].set(xlabel="defer rate, teacher-forced", ylabel="nats per token, hard decisions")
    if generated:
        _panel(panels[1], table, "generated_defer_rate", "accuracy")
        panels[1].set(xlabel="defer rate, generated", ylabel="accuracy")
        _panel(panels[2], table, "tokens_per_second", "accuracy")
        panels[2].set(xlabel="tokens per second, all answers at once", ylabel="accuracy")
        panels[2].set_xlim(left=0)
    for panel in panels[:2]:
        panel.set_xlim(-0.03, 1.03)
    shown: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(list(shown.values()), list(shown), loc="outside right center", frameon=False)
    return figure


def _panel(axes: Axes, table: Table, x: str, y: str) -> None:
    def points(name: str, of_table: Table = table) -> tuple[Any, Any, Any]:
        # At a deferral compose writes from the mixture, not from one model.
        of = "nll" if (name, y) == ("compose", "nll_hard") else y
        rows = [row for row in of_table if row["method"] == name and row[of] is not None]
        rows.sort(key=lambda row: row[x])
        # With few lines a percentile interval may lie beside the mean.
        below = [max(0.0, row[of] - row[f"{of}_low"]) for row in rows]
        above = [max(0.0, row[f"{of}_high"] - row[of]) for row in rows]
        return [row[x] for row in rows], [row[of] for row in rows], [below, above]

    for name, style in STYLES.items():
        rates, values, errors = points(name)
        if rates:
            axes.errorbar(rates, values, errors, elinewidth=0.6, mfc="none", label=name, **style)
    for nats in sorted({row["review"] for row in table if row.get("review") is not None}):
        rates, values, errors = points("review", [row for row in table if row["review"] == nats])
        if rates:
            axes.errorbar(rates, values, errors, elinewidth=0.6, label=f"review {nats:g}", **REVIEW)
    experts = {m: ALONE["expert"] for row in table if (m := row["method"]).startswith("expert:")}
    for name, (color, marker) in (ALONE | experts).items():
        rates, values, errors = points(name)
        if rates:
            axes.axhline(values[0], color=color, lw=0.6, linestyle=(0, (1, 3)))
            style = {"color": color, "marker": marker, "markersize": 8, "linestyle": "none"}
            axes.errorbar(rates, values, errors, elinewidth=0.6, label=name, **style)
