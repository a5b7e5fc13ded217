"""The report of a fit: its figures, two pictures, and a page of texts coloured by writer."""

from __future__ import annotations

import json
import os
from codecs import IncrementalDecoder, getincrementaldecoder
from collections import Counter, defaultdict
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colm_edge.errors import ColmError, DataError
from colm_edge.files import check_writable, replacing
from colm_edge.switch.rules import Untrained
from colm_edge.train.fit import Fit
from colm_edge.train.objectives import hard_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from colm_edge.llama.model import Model


EXAMPLES = 12  # texts on the page
MOST_DEFERRED = 30
BINS = 10
STYLE = """
:root { color-scheme: light dark; --expert: #0b7285; --soft: #868e96; --line: #dee2e6 }
@media (prefers-color-scheme: dark) { :root { --expert: #66d9e8; --line: #495057 } }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
.expert { color: var(--expert); text-decoration: underline }
p.text { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: .8rem }
td, th { padding: .15rem .9rem .15rem 0; text-align: left }
code { white-space: pre } small { color: var(--soft) }
"""


def check_report(folder: str | os.PathLike[str]) -> None:
    """Raise before the work, not after it, when a report cannot be drawn or written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ColmError("--report-dir draws with matplotlib: pip install 'colm-edge[plots]'") from e
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{folder}: cannot make the folder: {e.strerror or e}") from e
    check_writable(Path(folder, "report.json"))


def write_report(fit: Fit, model: Model, folder: str | os.PathLike[str]) -> None:
    """Write report.json, curve.png, reliability.png and texts.html into a folder.

    Raises WriteError when one of them cannot be written.
    """
    check_report(folder)
    target = Path(folder)
    with replacing(target / "report.json") as file:
        file.write_text(json.dumps(fit.report, indent=2) + "\n")
    with replacing(target / "curve.png") as file:
        draw_curve(fit).savefig(file, dpi=150)
    with replacing(target / "reliability.png") as file:
        draw_reliability(fit).savefig(file, dpi=150)
    with replacing(target / "texts.html") as file:
        file.write_text(page(fit, model), encoding="utf-8")


def draw_curve(fit: Fit) -> Figure:
    """Draw the loss of hard decisions against the defer rate, for the switch and simpler ones."""
    from matplotlib.figure import Figure

    report, rows = fit.report, fit.valid
    base, expert = fit.scores.base[rows], fit.scores.expert[rows]
    n = len(fit.p)
    rate = np.arange(n + 1) / n
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    features = fit.scores.logit_features[rows]
    curves = [
        ("this switch", fit.p, "C0-"),
        ("entropy", Untrained("entropy").p_defer(features, None), "C1--"),
        ("margin", Untrained("margin").p_defer(features, None), "C2-."),
    ]
    if fit.p_before is not None:
        curves.insert(1, ("the switch before", fit.p_before, "C4-"))
    for name, rank, style in curves:
        axes.plot(rate, hard_curve(rank, base, expert), style, label=name)
    axes.plot([0, 1], [report["nll_base"], report["nll_expert"]], "C7:", label="at random")
    axes.axhline(report["nll_joint"], color="C0", lw=0.8, alpha=0.6)
    axes.axhline(report["nll_oracle"], color="C3", lw=0.8, alpha=0.6)
    axes.annotate("joint", (1, report["nll_joint"]), color="C0", ha="right", va="bottom")
    axes.annotate("oracle", (1, report["nll_oracle"]), color="C3", ha="right", va="top")
    axes.plot(report["defer_rate"], report["nll_hard"], "C0o", label="its default threshold")
    axes.annotate("base", (0, report["nll_base"]), (6, 0), textcoords="offset points")
    axes.annotate(
        "expert", (1, report["nll_expert"]), (-6, 4), textcoords="offset points", ha="right"
    )
    axes.set(
        xlabel="defer rate",
        ylabel="nats per token, hard decisions",
        title=f"{report['n_valid']} held-back lines, {n:,} tokens",
    )
    axes.legend(frameon=False)
    return figure


def draw_reliability(fit: Fit) -> Figure:
    """Draw how often the expert is the better model, by p_defer; the dots' size is their count."""
    from matplotlib.figure import Figure

    better = fit.scores.expert[fit.valid] > fit.scores.base[fit.valid]
    bins = np.minimum((fit.p * BINS).astype(int), BINS - 1)
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "C7:", lw=1)
    for i in np.unique(bins):
        rows = bins == i
        axes.scatter(
            fit.p[rows].mean(), better[rows].mean(), s=12 + 300 * rows.mean(), color="C0", alpha=0.8
        )
    axes.set(
        xlabel="p_defer",
        ylabel="share of tokens that the expert predicts better",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    return figure


def page(fit: Fit, model: Model) -> str:
    """Return an HTML page that needs no network: the most deferred tokens, and example texts."""
    deferred = fit.p > fit.switch.threshold
    tokens = fit.scores.token[fit.valid]
    seen, counts = Counter(tokens.tolist()), Counter(tokens[deferred].tolist())
    rows = "".join(
        f"<tr><td><code>{escape(_show(model, token))}</code><td>{count}"
        f"<td>{count / seen[token]:.0%}"
        for token, count in counts.most_common(MOST_DEFERRED)
    )
    texts: dict[int, list[str]] = defaultdict(list)
    decoder = partial(getincrementaldecoder("utf-8"), "replace")
    whole: dict[int, IncrementalDecoder] = defaultdict(decoder)  # a split character comes whole
    for token, line, p, expert in zip(
        tokens.tolist(), fit.scores.line[fit.valid].tolist(), fit.p, deferred, strict=True
    ):
        if line in texts or len(texts) < EXAMPLES:
            kind = ' class="expert"' if expert else ""
            text = escape(whole[line].decode(model.piece(token)))
            texts[line].append(f'<span{kind} title="p_defer {p:.3f}">{text}</span>')
    examples = "".join(
        f"<small>line {line}</small><p class=text>{''.join(spans)}</p>"
        for line, spans in texts.items()
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Who writes what</title>"
        f"<style>{STYLE}</style><h1>Who writes what</h1><p>The data's own texts, from the "
        "held-back lines. <span class=expert>Underlined</span>: p_defer is above the threshold of "
        f"{fit.switch.threshold:.3f}, so the expert would write the token. Hover over a token for "
        f"its p_defer.</p>{examples}<h2>The most deferred tokens</h2>"
        f"<table><tr><th>token<th>deferred<th>of all it occurs{rows}</table></html>\n"
    )


def _show(model: Model, token: int) -> str:
    """Return a token's text with visible spaces and line breaks; special tokens by name."""
    raw = model.piece(token)
    if not raw:
        return model.token_text(token)
    try:
        return repr(raw.decode())[1:-1]
    except UnicodeDecodeError:  # part of a character
        return repr(raw)[2:-1]
