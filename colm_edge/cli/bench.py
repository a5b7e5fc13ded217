"""`colm-edge bench`: measure the speed of each way to answer, or tune the settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.common import open_pair
from colm_edge.cli.options import listed, model_options, output_option
from colm_edge.cli.terminal import say
from colm_edge.errors import ColmError

if TYPE_CHECKING:
    from colm_edge.bench.replay import Process

# What --replay gave, and the process that it describes; None: it is a file.
Replay = tuple[str, "Process | None"]


def replays_of(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> list[Replay]:
    """Parse the values of --replay."""
    from colm_edge.bench.replay import Process

    replays: list[Replay] = []
    for text in texts:
        try:
            replays.append((text, Process.parse(text) if "=" in text else None))
        except ValueError as e:
            raise click.BadParameter(
                f"{text!r}: expected f=RATE and, after commas, agree=P, both from 0 to 1, and "
                "run=MEAN, at least 1"
            ) from e
    return replays


@click.command("bench")
@click.option(
    "--replay",
    "replays",
    multiple=True,
    default=["f=0.2"],
    show_default=True,
    callback=replays_of,
    metavar="f=RATE[,agree=P][,run=MEAN]|FILE.json",
    help="Which tokens are deferred: drawn at a rate, in runs of a mean length, where the expert "
    "repeats the base's choice with probability P [0.6]; or as in a file written by `run --json`. "
    "Repeatable.",
)
@click.option(
    "--methods",
    metavar="NAME,…",
    default="",
    callback=listed,
    help="Rows of the table: base, expert, expert-llama-cpp-python, both, colm, colm-fast, "
    "speculative, lossless (--review 0).  [default: all]",
)
@click.option(
    "-n",
    "--n-predict",
    "n",
    type=click.IntRange(2),
    default=128,
    show_default=True,
    help="Number of tokens to generate, if the replay is drawn.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="How often to measure; the table shows medians.",
)
@click.option(
    "--llama-cpp",
    "tools",
    metavar="DIR",
    type=click.Path(file_okay=False, exists=True),
    help="Folder of llama-bench and llama-speculative-simple; adds a row for each.",
)
@click.option(
    "--memory/--no-memory",
    default=True,
    show_default=True,
    help="Measure memory too, in a process for each method.",
)
@click.option(
    "--tune",
    "tuning",
    is_flag=True,
    help="Try settings of both models instead, and print the best.",
)
@output_option("md", "csv", "json")
@model_options
def bench_command(
    replays: list[Replay],
    methods: tuple[str, ...],
    n: int,
    rounds: int,
    tools: str | None,
    memory: bool,
    tuning: bool,
    output: str,
    models: dict[str, Any],
) -> None:
    """Measure the speed of each way to answer, side by side.

    Every method generates the same tokens in every round: the models really evaluate them, but
    the replay decides which token is written and which are deferred. The cost of the models'
    decodes is measured once and kept in ~/.cache/colm-edge.
    """
    from colm_edge.bench.methods import bench, measured_on
    from colm_edge.bench.replay import recorded
    from colm_edge.bench.tune import tune
    from colm_edge.tables import render

    if "rpc" in models:
        raise ColmError("bench measures this machine alone; leave --rpc out")
    with open_pair(models) as loaded:
        if tuning:
            rows, advice = tune(loaded, say)
            click.echo(render(rows, output))
            click.echo("\n" + "\n".join([*advice, measured_on(loaded)]), err=output != "md")
            return
        table = []
        for text, process in replays:
            trace = recorded(text) if process is None else process.draw(n, loaded.n_shared)
            folder = Path(tools) if tools else None
            rows = bench(loaded, trace, rounds, say, only=methods, tools=folder, memory=memory)
            table += [{"replay": text} | row if len(replays) > 1 else row for row in rows]
        click.echo(render(table, output))
        if output == "md":
            click.echo("\n" + measured_on(loaded))
