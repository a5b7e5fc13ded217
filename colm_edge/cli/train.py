"""`colm-edge train` and `score`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.options import (
    WORK_DIR,
    pair_options,
)

if TYPE_CHECKING:
    from colm_edge.train.documents import Documents
from colm_edge.cli.common import progress


@click.command()
@click.option("--data", required=True, metavar="FILE.jsonl", help="Prompts with completions.")
@click.option("--outfile", required=True, metavar="SWITCH.gguf", help="Where the switch goes.")
@click.option(
    "--features", type=click.Choice(["hidden", "logits", "both"]),
    help="What the switch reads: hidden state, logit features, or both.  [default: both, or as "
    "the switch of --update]",
)  # fmt: skip
@click.option(
    "--objective", type=click.Choice(["best", "marginal", "budget", "weak"]), default="best",
    show_default=True, help="marginal: the mixture's likelihood (the paper's). budget: that of "
    "hard decisions at defer rates of 0.1 to 0.3. best: the better of the two at those rates, on "
    "held-back lines. weak: the paper's weak supervision, to compare with.",
)  # fmt: skip
@click.option(
    "--threshold-by", "metric", type=click.Choice(["exact", "contains", "gsm8k", "steps"]),
    help="Choose the default threshold by answers to held-back prompts, generated at defer rates "
    "of 0, 0.1 … 1.  [default: by the likelihood of hard decisions]",
)  # fmt: skip
@click.option(
    "--threshold-lines", type=click.IntRange(1), default=100, show_default=True,
    help="Prompts to answer for --threshold-by, at each rate.",
)  # fmt: skip
@click.option(
    "--update",
    metavar="SWITCH.gguf",
    help="The switch that this one replaces, after the expert or the data changed: the fit begins "
    "with it, the report compares both, and --work-dir evaluates only what is new.",
)
@click.option(
    "--report-dir",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Write figures, pictures and coloured texts here.",
)
@WORK_DIR
@click.option(
    "--expert-scores",
    metavar="FILE.npz",
    help="What `colm-edge score` wrote where the expert is; -m alone is then enough.",
)
@click.option(
    "-s", "--seed", type=click.IntRange(0), default=0, show_default=True,
    help="Of the data's split; keep it for --update.",
)  # fmt: skip
@click.option("--raw", is_flag=True, help="No chat template.")
@pair_options
def train(
    data: str,
    outfile: str,
    features: str | None,
    objective: str,
    metric: str | None,
    threshold_lines: int,
    update: str | None,
    report_dir: str | None,
    work_dir: str | None,
    expert_scores: str | None,
    seed: int,
    raw: bool,
    models: dict[str, Any],
) -> None:
    """Fit a switch for a base and an expert.

    FILE.jsonl has one document a line: {"prompt", "completion"}, {"messages"} or {"text"}. Base
    and expert stay as they are; the switch is written as GGUF, the last line printed is JSON.
    """
    from colm_edge.evaluate.metrics import METRICS, check_rows
    from colm_edge.evaluate.threshold import choose_by_answers
    from colm_edge.files import check_writable
    from colm_edge.options import Options
    from colm_edge.pair import load
    from colm_edge.switch.file import Switch
    from colm_edge.train.documents import read_rows, tokenized
    from colm_edge.train.fit import FitOptions, fit_switch

    check_writable(outfile, data, *_read_files(models), expert_scores)
    old = Switch.load(update) if update is not None else None
    work = Path(work_dir) if work_dir else None
    if report_dir is not None:
        from colm_edge.train.report import check_report, write_report

        check_report(report_dir)
    if metric is not None and expert_scores is not None and "expert" not in models:
        raise click.UsageError("--threshold-by needs the expert itself (-me) to answer prompts")
    if expert_scores is not None and "model" in models:
        models.setdefault("expert", models["model"])  # it is never evaluated
    with load(**models | {"expert_required": True}, switch=update or "margin") as loaded:
        documents = tokenized(read_rows(data), loaded, raw=raw, work=work)
        say_cut(documents)
        choose = None
        if metric is not None:
            check_rows(read_rows(data), METRICS[metric])
            choose = partial(
                choose_by_answers, loaded, read_rows(data), metric, threshold_lines,
                Options(temperature=0.0, raw=raw, schedule="sequential"), progress,
            )  # fmt: skip
        fit = fit_switch(
            loaded,
            documents,
            FitOptions(features, objective, seed, old, report_dir is not None, choose),
            progress=progress,
            work=work,
            expert_scores=Path(expert_scores) if expert_scores else None,
        )
        fit.switch.save(outfile)
        click.echo(f"{outfile}: written", err=True)
        if report_dir is not None:
            write_report(fit, loaded.base, report_dir)
            click.echo(f"{report_dir}: report written", err=True)
    report = fit.report
    click.echo(
        f"nats a token on held-back lines: base {report['nll_base']:.3f}, expert "
        f"{report['nll_expert']:.3f}, together {report['nll_hard']:.3f} at a threshold of "
        f"{report['threshold']:.3f}, {report['defer_rate']:.0%} deferred",
        err=True,
    )
    click.echo(json.dumps(report))


def _read_files(models: dict[str, Any]) -> list[str | None]:
    return [models.get(name) for name in ("model", "expert", "lora")]


def say_cut(documents: Documents) -> None:
    """Tell on stderr of documents that did not fit the context."""
    if documents.cut_note:
        click.echo(documents.cut_note, err=True)


@click.command("score")
@click.option("--data", required=True, metavar="FILE.jsonl", help="Prompts with completions.")
@click.option("--outfile", required=True, metavar="FILE.npz", help="Where the scores go.")
@WORK_DIR
@click.option(
    "--update", is_flag=True,
    help="The work folder may hold other documents or another expert; what it knows is not "
    "scored again.",
)  # fmt: skip
@click.option("--raw", is_flag=True, help="No chat template.")
@pair_options
def score_command(
    data: str, outfile: str, work_dir: str | None, update: bool, raw: bool, models: dict[str, Any]
) -> None:
    """Write the expert's log-probabilities of a JSONL file, for `train --expert-scores` elsewhere.

    The base is needed as well, for the prompts are written by its chat template; it is not
    evaluated. The last line printed is JSON.
    """
    from colm_edge.files import check_writable
    from colm_edge.pair import load
    from colm_edge.train.documents import read_rows, tokenized
    from colm_edge.train.scoring import score_expert

    if update and work_dir is None:
        raise click.UsageError("--update needs --work-dir")
    check_writable(outfile, data, *_read_files(models))
    work = Path(work_dir) if work_dir else None
    with load(**models | {"expert_required": True}, switch="margin") as loaded:
        documents = tokenized(read_rows(data), loaded, raw=raw, work=work)
        say_cut(documents)
        result = score_expert(loaded, documents, Path(outfile), progress, work=work, update=update)
    click.echo(json.dumps(result))
