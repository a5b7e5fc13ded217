"""`colm-edge bench`: measure the speed of each way to answer, or tune the settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.common import open_pair
from colm_edge.cli.options import (
    ALLOW_EXEC,
    LIMIT,
    LORA,
    OVERLAP,
    SWITCH,
    Whole,
    check_exec,
    check_goes_with,
    check_goes_without,
    decoding_options,
    gathered,
    jsonl_option,
    listed,
    model_options,
    output_option,
)
from colm_edge.cli.terminal import say
from colm_edge.evaluate.metrics import METRICS

if TYPE_CHECKING:
    from colm_edge.bench.replay import Process
    from colm_edge.pair import Pair

REPLAY = "f=0.2"
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


prompt_options = gathered(
    "asked",
    jsonl_option(
        "--prompts",
        "Instead of a replay: every method answers the prompts of this file by itself, greedily. "
        "A line has prompt, or messages.",
    ),
    LIMIT,
    click.option(
        "--metric",
        type=click.Choice(list(METRICS)),
        help="Judge the answers to --prompts, where a line says what is right, as eval does.",
    ),
    ALLOW_EXEC,
)


@click.command("bench")
@click.option(
    "--replay",
    "replays",
    multiple=True,
    callback=replays_of,
    metavar="f=RATE[,agree=P][,run=MEAN]|FILE.json",
    help="Which tokens are deferred: drawn at a rate, in runs of a mean length, where the expert "
    "repeats the base's choice with probability P [0.6]; or as in a file written by `run --json`. "
    f"Repeatable.  [default: {REPLAY}]",
)
@prompt_options
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
    type=Whole(2),
    default=128,
    show_default=True,
    help="Number of tokens to generate, if the replay is drawn; at most so many an answer to "
    "--prompts.",
)
@click.option(
    "--rounds",
    type=Whole(1),
    default=5,
    show_default=True,
    help="How often to measure; the table shows medians.",
)
@click.option(
    "--llama-cpp",
    "tools",
    metavar="DIR",
    type=click.Path(file_okay=False, exists=True),
    help="Folder of llama-bench and llama-speculative-simple; adds a row for each. With --prompts "
    "also for llama-lookup, if it is there, but not for llama-bench, which answers nothing. They "
    "use their own defaults of flash attention, cache types and batches.",
)
@click.option(
    "--load",
    "n_busy",
    type=Whole(0, 1024),
    default=0,
    metavar="N",
    help="Keep N other processes busy meanwhile, as on a machine with other work to do.",
)
@click.option(
    "--memory/--no-memory",
    default=True,
    show_default=True,
    help="Measure a replay's memory too, in a process for each method.",
)
@click.option(
    "--tune",
    "tuning",
    is_flag=True,
    help="Try settings of both models instead, and print the best.",
)
@output_option("md", "csv", "json")
@model_options(SWITCH, LORA, OVERLAP)
@decoding_options("threshold", "defer_rate", "raw")
def bench_command(
    replays: list[Replay],
    asked: dict[str, Any],
    tuning: bool,
    n_busy: int,
    memory: bool,
    output: str,
    models: dict[str, Any],
    decoding: dict[str, Any],
    **measuring: Any,
) -> None:
    """Measure the speed of each way to answer, side by side.

    Every method generates the same tokens in every round: the models really evaluate them, but
    the replay decides which token is written and which are deferred. With --prompts the models
    decide, and each method writes a text of its own. The cost of the models' decodes is measured
    once and kept in ~/.cache/colm-edge.
    """
    from colm_edge.bench.load import busy
    from colm_edge.bench.methods import measured_on
    from colm_edge.tables import render

    check_bench(replays, asked, decoding, tuning=tuning)
    with open_pair(models) as loaded:
        loaded.check_one_expert("bench")
        if n_busy:
            loaded.cost_tables()  # they are kept, so they must not be those of a busy machine
        with busy(n_busy):
            if tuning:
                table, notes = tuned(loaded)
            elif "prompts" in asked:
                table, notes = answered(loaded, asked, decoding, **measuring)
            else:
                table, notes = replayed(loaded, replays, memory=memory, **measuring)
        if n_busy:
            table = [row | {"load": n_busy} for row in table]
        click.echo(render(table, output))
        # Standard output is a table and nothing else where a program reads it.
        if output == "md" or tuning:
            lines = [*notes, measured_on(loaded, n_busy)]
            click.echo("\n" + "\n".join(lines), err=output != "md")


def check_bench(
    replays: list[Replay], asked: dict[str, Any], decoding: dict[str, Any], *, tuning: bool
) -> None:
    """Refuse options that do not go together."""
    if bool(replays) + ("prompts" in asked) + tuning > 1:
        raise click.UsageError(
            "--replay, --prompts and --tune measure different things; give one of them"
        )
    if "prompts" not in asked:
        check_goes_with("--prompts", *asked, *decoding)
    if "prompts" in asked:
        check_goes_without("--prompts", "memory")
    if tuning:
        check_goes_without("--tune", "methods", "n", "rounds", "tools", "memory")
    check_exec(asked.get("metric"), asked["allow_exec"])


Report = tuple[list[dict[str, Any]], list[str]]  # a table, and lines about it


def tuned(pair: Pair) -> Report:
    """Try settings of both models."""
    from colm_edge.bench.tune import tune

    return tune(pair, say)


def answered(
    pair: Pair,
    asked: dict[str, Any],
    decoding: dict[str, Any],
    *,
    methods: tuple[str, ...],
    n: int,
    rounds: int,
    tools: str | None,
) -> Report:
    """Let every method answer the prompts of a file."""
    from colm_edge.bench.prompts import bench_prompts, read_judged_prompts
    from colm_edge.options import Options

    path: str = asked["prompts"]
    limit, metric = asked.get("limit"), asked.get("metric")
    options = Options(temperature=0.0, max_tokens=n, **decoding)
    prompts = read_judged_prompts(pair, path, options, limit=limit, metric=metric)
    folder = Path(tools) if tools else None
    table = bench_prompts(pair, prompts, options, rounds, say, only=methods, tools=folder)
    judged = sum(prompt.judge is not None for prompt in prompts)
    title = f"Answers to {len(prompts)} prompts of {Path(path).name}, at most {n} tokens each"
    return table, [title + (f"; {judged} judged by {metric}." if metric else ".")]


def replayed(
    pair: Pair,
    replays: list[Replay],
    *,
    methods: tuple[str, ...],
    n: int,
    rounds: int,
    tools: str | None,
    memory: bool,
) -> Report:
    """Let every method write the tokens of each replay."""
    from colm_edge.bench.methods import bench
    from colm_edge.bench.replay import Process, recorded

    table = []
    replays = replays or [(REPLAY, Process.parse(REPLAY))]
    for text, process in replays:
        trace = recorded(text) if process is None else process.draw(n, pair.n_shared)
        folder = Path(tools) if tools else None
        rows = bench(pair, trace, rounds, say, only=methods, tools=folder, memory=memory)
        table += [{"replay": text} | row if len(replays) > 1 else row for row in rows]
    return table, []
