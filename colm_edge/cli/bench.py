"""`colm-edge bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.options import (
    model_options,
)
from colm_edge.errors import ColmError

if TYPE_CHECKING:
    pass
from colm_edge.cli.common import open_pair


@click.command("bench")
@click.option(
    "--replay", "replays", multiple=True, default=["f=0.2"], show_default=True,
    metavar="f=RATE[,agree=P][,run=MEAN]|FILE.json",
    help="Which tokens are deferred: drawn at a rate, in runs of a mean length, the expert "
    "repeating the base's choice with probability P [0.6]; or as in what `run --json` printed. "
    "Repeatable.",
)  # fmt: skip
@click.option(
    "--methods", metavar="NAME,…", default="",
    help="Rows of the table: base, expert, expert-llama-cpp-python, both, colm, colm-fast, "
    "speculative  [all].",
)  # fmt: skip
@click.option(
    "-n", "--n-predict", "n", type=click.IntRange(2), default=128, show_default=True,
    help="Tokens to write, of a drawn replay.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--llama-cpp", "tools", metavar="DIR", type=click.Path(file_okay=False, exists=True),
    help="Where llama-bench and llama-speculative-simple are, for a row each.",
)  # fmt: skip
@click.option(
    "--memory/--no-memory", default=True, show_default=True,
    help="Measure memory too, in a process for each method.",
)  # fmt: skip
@click.option(
    "--tune", "tuning", is_flag=True,
    help="Instead, try settings of both models and print the best.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Choice(["md", "csv", "json"]), default="md", show_default=True
)
@model_options
def bench_command(
    replays: tuple[str, ...], methods: str, n: int, rounds: int, tools: str | None, memory: bool,
    tuning: bool, output: str, models: dict[str, Any],
) -> None:  # fmt: skip
    """Measure the speed of every way to answer, side by side.

    Each method writes the same tokens in each round: what is evaluated is real, what is written and
    deferred is the replay's. The models' decodes are timed once and kept under ~/.cache/colm-edge.
    """
    from colm_edge.bench.methods import bench, measured_on
    from colm_edge.bench.replay import Process, recorded
    from colm_edge.bench.tune import tune
    from colm_edge.tables import render

    def note(text: str) -> None:
        click.echo(text, err=True)

    processes: dict[str, Process] = {}
    for replay in replays:
        try:
            if "=" in replay:
                processes[replay] = Process.parse(replay)
        except ValueError as e:
            raise click.BadParameter(
                f"{replay!r}: expected f=RATE and, after commas, agree=P, both from 0 to 1, and "
                "run=MEAN from 1 on"
            ) from e
    if "rpc" in models:
        raise ColmError("bench measures this machine alone; leave --rpc out")
    with open_pair(models) as loaded:
        if tuning:
            rows, advice = tune(loaded, note)
            click.echo(render(rows, output))
            click.echo("\n" + "\n".join([*advice, measured_on(loaded)]), err=output != "md")
            return
        table = []
        for replay in replays:
            process = processes.get(replay)
            trace = recorded(replay) if process is None else process.draw(n, loaded.n_shared)
            rows = bench(
                loaded, trace, rounds, note, only=[m for m in methods.split(",") if m],
                tools=Path(tools) if tools else None, memory=memory,
            )  # fmt: skip
            table += [{"replay": replay} | row if len(replays) > 1 else row for row in rows]
        click.echo(render(table, output))
        if output == "md":
            click.echo("\n" + measured_on(loaded))
