"""`colm-edge eval`: score base, expert, their collaboration and simpler switches on data."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.common import file_of, open_pair, progress
from colm_edge.cli.options import (
    ALLOW_EXEC,
    BRIDGE,
    DATA,
    LIMIT,
    LORA,
    MAX_MEMORY,
    OVERLAP,
    PARALLEL,
    RPC,
    SWITCH,
    TIMEOUT,
    WORK_DIR,
    Number,
    check_exec,
    check_goes_with,
    decoding_options,
    gathered,
    listed,
    model_options,
    output_option,
)
from colm_edge.cli.terminal import say
from colm_edge.evaluate.metrics import METRICS
from colm_edge.options import OPTIONS

if TYPE_CHECKING:
    from colm_edge.evaluate.proxy_tuning import Proxy
    from colm_edge.pair import Pair


MOST_POINTS = 1001  # of a range: 0:1:0.001


def shares(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Return numbers from 0 to 1: a list, 0.1,0.2, or a range, 0:1:0.1, both ends included."""
    numbers: list[float] = []
    try:
        for part in value.split(",") if value is not None else []:
            first, *rest = (float(x) for x in part.split(":"))
            last, step = rest or (first, 1.0)
            if not (0 <= first <= last <= 1 and step > 0):
                raise ValueError
            count = int((last - first) / step + 1e-9) + 1
            if count > MOST_POINTS:
                raise click.BadParameter(f"{value!r}: {count:,} points; at most {MOST_POINTS:,}")
            # 3 · 0.1 is not 0.3.
            numbers += [first, *(round(first + i * step, 9) for i in range(1, count))]
    except (ValueError, OverflowError) as e:
        message = f"{value!r}: expected numbers from 0 to 1, as 0.1,0.2 or 0:1:0.1"
        raise click.BadParameter(message) from e
    return tuple(numbers)


def tolerances(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Return numbers from 0 on, of a list."""
    try:
        numbers = tuple(float(part) for part in value.split(",")) if value is not None else ()
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError
    except ValueError as e:
        raise click.BadParameter(f"{value!r}: expected numbers from 0 on, as 0,1,2.5") from e
    return numbers


sweep_options = gathered(
    "sweep",
    click.option(
        "--defer-rates",
        metavar="LIST",
        callback=shares,
        help="Sweep over defer rates, as 0.1,0.2 or 0:1:0.1; every switch gets the threshold at "
        "which it defers this share of this data.",
    ),
    click.option(
        "--thresholds",
        metavar="LIST",
        callback=shares,
        help="Sweep over thresholds of the switch; simpler switches defer as often as it does.",
    ),
)
proxy_options = gathered(
    "proxy",
    click.option(
        "--anti-expert",
        metavar="GGUF",
        help="Third model, for Proxy Tuning: base + alpha · (expert − anti-expert).",
    ),
    click.option(
        "--alpha",
        type=Number(0, 100),
        default=1.0,
        show_default=True,
        help="Weight of Proxy Tuning.",
    ),
)


@click.command("eval")
@DATA
@click.option(
    "--metric",
    type=click.Choice(["nll", *METRICS]),
    default="nll",
    show_default=True,
    help="nll scores the data only; the others also generate answers and judge them.",
)
@LIMIT
@click.option(
    "--methods",
    metavar="NAME,…",
    default="",
    callback=listed,
    help="Rows of the table: base, expert, colm, review, compose, random, entropy, margin, weak, "
    "proxy.  [default: all that are possible]",
)
@sweep_options
@click.option(
    "--reviews",
    metavar="NATS,…",
    callback=tolerances,
    help="Tolerances of the method review: as colm, but the expert undoes what it regrets more.",
)
@click.option(
    "--score-on",
    type=click.Choice(["data", "expert"]),
    default="data",
    show_default=True,
    help="What is scored, and gives --defer-rates its thresholds: the data's completions, or the "
    "expert's own greedy answers to its prompts.",
)
@PARALLEL
@ALLOW_EXEC
@click.option(
    "--weak",
    metavar="SWITCH.gguf",
    help="Switch to compare with, from `train --objective weak`.",
)
@proxy_options
@WORK_DIR
@click.option("--plot", metavar="FILE.png", help="Plot the table to this file.")
@output_option("md", "csv", "json")
@model_options(SWITCH, LORA, BRIDGE, RPC, OVERLAP, MAX_MEMORY, TIMEOUT)
# The batches of the fast schedule depend on earlier answers; a table should be reproducible.
# Each method has its own strategy.
@decoding_options(temperature=0.0, schedule="sequential", without=("strategy",))
def eval_command(
    data: str,
    metric: str,
    limit: int | None,
    methods: tuple[str, ...],
    sweep: dict[str, tuple[float, ...]],
    reviews: tuple[float, ...],
    score_on: str,
    n_slots: int,
    allow_exec: bool,
    weak: str | None,
    proxy: dict[str, Any],
    work_dir: str | None,
    plot: str | None,
    output: str,
    models: dict[str, Any],
    decoding: dict[str, Any],
) -> None:
    """Score base, expert and their collaboration on a JSONL file.

    Simpler switches are scored too, for comparison. With a metric other than nll every method also
    answers every prompt, greedily unless --temp is given.
    """
    from colm_edge.evaluate.methods import Comparison, evaluate
    from colm_edge.evaluate.plot import check_plot, write_plot
    from colm_edge.options import Options
    from colm_edge.switch.file import Switch
    from colm_edge.tables import render

    check_sweep(sweep, decoding)
    check_answers(metric, score_on)
    if "anti_expert" not in proxy:
        check_goes_with("--anti-expert", "alpha")
    check_exec(metric, allow_exec)
    check_methods(methods, weak, proxy.get("anti_expert"), reviews)
    if reviews and metric == "nll":
        raise click.UsageError("--reviews needs a --metric that judges answers")
    if plot is not None:
        check_plot(plot)
    options = Options(**decoding)
    # A table in which the base silently replaces a missing expert would mislead.
    models["expert_required"] = True
    with open_pair(models, defaults=options) as loaded, proxy_of(loaded, models, **proxy) as third:
        comparison = Comparison(
            metric=None if metric == "nll" else metric,
            limit=limit,
            methods=methods,
            reviews=reviews,
            weak=Switch.load(file_of(weak, "switch", models)) if weak else None,
            proxy=third,
            on_expert=score_on == "expert",
            n_slots=n_slots,
            **sweep,
        )
        work = Path(work_dir) if work_dir else None
        table = evaluate(loaded, data, options, comparison, work=work, note=say, progress=progress)
    click.echo(render(table, output))
    if plot is not None:
        write_plot(table, plot)
        say(f"{plot}: written")


def check_sweep(sweep: dict[str, tuple[float, ...]], decoding: dict[str, Any]) -> None:
    """Refuse more than one way to say how much is deferred."""
    points = [*sweep.values(), decoding.get("threshold"), decoding.get("defer_rate")]
    if sum(point is not None for point in points) > 1:
        raise click.UsageError(
            "give one of --defer-rates, --thresholds, --defer-rate and --threshold"
        )


def check_answers(metric: str, score_on: str) -> None:
    """Refuse options of answers where none are written."""
    if metric != "nll":
        return
    of_answers = {*OPTIONS, "grammar_file", "json_schema", "n_slots"}
    read = {"threshold", "defer_rate", "raw"}
    if score_on == "expert":  # which writes them
        read |= {"max_tokens", "n_slots"}
    check_goes_with("a --metric that judges answers", *of_answers - read)


def check_methods(
    methods: tuple[str, ...],
    weak: str | None,
    anti_expert: str | None,
    reviews: tuple[float, ...],
) -> None:
    """Refuse methods that do not exist or lack what they need."""
    from colm_edge.evaluate.methods import METHODS

    needs = {
        "weak": ("--weak", weak),
        "proxy": ("--anti-expert", anti_expert),
        "review": ("--reviews", reviews or None),
    }
    for name in methods:
        if name not in METHODS:
            raise click.UsageError(f"no method {name!r}; known: {', '.join(METHODS)}")
        if name in needs and needs[name][1] is None:
            raise click.UsageError(f"the method {name} needs {needs[name][0]}")
    for name, (flag, value) in needs.items():
        if methods and value is not None and name not in methods:
            raise click.UsageError(f"{flag} goes with the method {name}; add it to --methods")


def proxy_of(
    pair: Pair, models: dict[str, Any], *, anti_expert: str | None = None, alpha: float
) -> AbstractContextManager[Proxy | None]:
    """Load the third model of Proxy Tuning, if one is named."""
    from colm_edge.evaluate.proxy_tuning import Proxy

    if anti_expert is None:
        return nullcontext()
    return Proxy(
        pair,
        Path(file_of(anti_expert, "base", models)),
        alpha=alpha,
        n_threads=models.get("n_threads", 0),
        n_gpu_layers=models.get("n_gpu_layers", 0),
    )
