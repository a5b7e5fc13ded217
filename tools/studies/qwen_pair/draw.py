"""Draw accuracy against speed for a real pair, from the figures of docs/pairs.md.

    python tools/studies/qwen_pair/draw.py docs/real-pair.csv docs/real-pair.png

Columns: method, label, tokens_per_second, accuracy, low, high (per cent). Lines that follow each
other and name one method are joined.
"""

from __future__ import annotations

import csv
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from colm_edge.files import check_writable, replacing

STYLES = {
    "base": ("k", "<"),
    "expert": ("k", ">"),
    "speculative": ("C3", "s"),
    "the pair": ("C0", "o"),
    "the pair, with review": ("C2", "P"),
}


def place_of(row: dict[str, str]) -> tuple[float, float, float, float, str]:
    """Return a point: speed, accuracy, the interval below and above it, and its label."""
    names = ("tokens_per_second", "accuracy", "low", "high")
    x, y, low, high = (float(row[name]) for name in names)
    return x, y, y - low, high - y, row["label"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("figures", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
def main(figures: Path, picture: Path) -> None:
    """Draw accuracy against speed for a real pair."""
    check_writable(picture, figures)
    with figures.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for method, points in groupby(rows, lambda row: row["method"]):
        x, y, below, above, labels = zip(*map(place_of, points), strict=True)
        color, marker = STYLES[method]
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 7}
        if method == "speculative":  # which is where the expert is: around it
            style |= {"markersize": 13, "markerfacecolor": "none"}
        axes.errorbar(x, y, [below, above], label=method, elinewidth=0.6, **style)
        for i, text in enumerate(labels):
            axes.annotate(text, (x[i], y[i]), (9, 3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="tokens per second, two CPU cores", ylabel="GSM8K, right of 300 (%)")
    axes.set_xlim(left=15)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right")
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=130)


if __name__ == "__main__":
    main()
