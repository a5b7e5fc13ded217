"""`colm-edge eval`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.options import (
    decoding_options,
    finite,
    model_options,
    shares,
)
from colm_edge.evaluate.metrics import METRICS

if TYPE_CHECKING:
    pass
from colm_edge.cli.common import open_pair, progress


@click.command("eval")
@click.option("--data", required=True, metavar="FILE.jsonl", help="Prompts with completions.")
@click.option(
    "--metric", type=click.Choice(["nll", *METRICS]), default="nll",
    show_default=True, help="nll scores the data alone; the others judge generated answers too.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Use the first lines only.")
@click.option(
    "--methods", metavar="NAME,…", default="",
    help="Rows of the table: base, expert, colm, compose, random, entropy, margin, weak, proxy "
    "[all there are].",
)  # fmt: skip
@click.option(
    "--defer-rates", metavar="LIST", callback=shares,
    help="Sweep: 0.1,0.2 or 0:1:0.1. Every switch at each rate, by its own p_defer on this data.",
)  # fmt: skip
@click.option(
    "--thresholds", metavar="LIST", callback=shares,
    help="Sweep over the switch's thresholds; simpler switches defer as often.",
)  # fmt: skip
@click.option(
    "--weak", metavar="SWITCH.gguf", help="A switch to compare with (`train --objective weak`)."
)
@click.option(
    "--anti-expert", metavar="GGUF",
    help="A third model, for Proxy Tuning: base + alpha · (expert − anti-expert).",
)  # fmt: skip
@click.option(
    "--alpha", type=click.FloatRange(0, 100), callback=finite, default=1.0, show_default=True,
    help="The weight of Proxy Tuning.",
)  # fmt: skip
@click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Keep scores and answers here as they come; a killed run goes on from them.",
)
@click.option("--plot", metavar="FILE.png", help="Draw the table.")
@click.option(
    "-o", "--output", type=click.Choice(["md", "csv", "json"]), default="md", show_default=True
)
@model_options
# Which batches the fast schedule makes depends on what came before; a table is to be reproducible.
@decoding_options(temperature=0.0, schedule="sequential")
def eval_command(
    data: str,
    metric: str,
    limit: int | None,
    methods: str,
    defer_rates: tuple[float, ...],
    thresholds: tuple[float, ...],
    weak: str | None,
    anti_expert: str | None,
    alpha: float,
    work_dir: str | None,
    plot: str | None,
    output: str,
    models: dict[str, Any],
    decoding: dict[str, Any],
) -> None:
    """Score base, expert and their collaboration on a JSONL file, beside simpler switches.

    With a metric other than nll every method answers every prompt, greedily unless --temp is given.
    """
    from colm_edge.evaluate.methods import METHODS, Comparison, evaluate
    from colm_edge.evaluate.plot import check_plot, write_plot
    from colm_edge.evaluate.proxy_tuning import Proxy
    from colm_edge.options import Options
    from colm_edge.switch.file import Switch
    from colm_edge.tables import render

    points = [defer_rates, thresholds, decoding.get("threshold"), decoding.get("defer_rate")]
    if sum(point not in (None, ()) for point in points) > 1:
        raise click.UsageError(
            "give one of --defer-rates, --thresholds, --defer-rate and --threshold"
        )
    names = [name.strip() for name in methods.split(",")] if methods else []
    needs = {"weak": ("--weak", weak), "proxy": ("--anti-expert", anti_expert)}
    for name in names:
        if name not in METHODS:
            raise click.UsageError(f"no method {name!r}; known: {', '.join(METHODS)}")
        if name in needs and needs[name][1] is None:
            raise click.UsageError(f"the method {name} needs {needs[name][0]}")
    if plot is not None:
        check_plot(plot)
    options = Options(**decoding)
    with ExitStack() as stack:
        # A table in which the base had to stand in for an absent expert would mislead.
        models["expert_required"] = True
        loaded = stack.enter_context(open_pair(models, defaults=options))
        proxy = None
        if anti_expert is not None:
            third = Proxy(
                loaded, Path(anti_expert).expanduser(), alpha=alpha,
                n_threads=models.get("n_threads", 0), n_gpu_layers=models.get("n_gpu_layers", 0),
            )  # fmt: skip
            proxy = stack.enter_context(third)
        comparison = Comparison(
            metric=None if metric == "nll" else metric, limit=limit, methods=names,
            thresholds=thresholds, defer_rates=defer_rates,
            weak=Switch.load(weak) if weak else None, proxy=proxy,
        )  # fmt: skip
        table = evaluate(
            loaded, data, options, comparison, work=Path(work_dir) if work_dir else None,
            note=lambda text: click.echo(text, err=True), progress=progress,
        )  # fmt: skip
    click.echo(render(table, output))
    if plot is not None:
        write_plot(table, plot)
        click.echo(f"{plot}: written", err=True)
