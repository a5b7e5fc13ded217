"""`colm-edge train` and `score`: fit a switch; score data with the expert on another machine."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.common import progress
from colm_edge.cli.options import DATA, RAW, WORK_DIR, gathered, pair_options
from colm_edge.cli.terminal import say
from colm_edge.evaluate.metrics import METRICS

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.train.documents import Documents
    from colm_edge.train.fit import ChooseThreshold

fit_options = gathered(
    "fitting",
    click.option(
        "--features",
        type=click.Choice(["hidden", "logits", "both"]),
        help="What the switch reads: the hidden state, logit features, or both.  [default: both, "
        "or as the switch of --update]",
    ),
    click.option(
        "--objective",
        type=click.Choice(["best", "marginal", "budget", "weak"]),
        default="best",
        show_default=True,
        help="marginal: the likelihood of the mixture, as in the paper. budget: the likelihood of "
        "hard decisions at defer rates of 0.1 to 0.3. best: the better of these two at those "
        "rates, on held-back lines. weak: the paper's weak supervision, as a baseline.",
    ),
    click.option(
        "-s",
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Random seed that chooses the held-back lines; keep it for --update.",
    ),
)
threshold_options = gathered(
    "threshold_by",
    click.option(
        "--threshold-by",
        "metric",
        type=click.Choice([*METRICS]),
        help="Choose the default threshold by the answers to held-back prompts, generated at "
        "defer rates of 0, 0.1 … 1.  [default: by the likelihood of hard decisions]",
    ),
    click.option(
        "--threshold-lines",
        "n_lines",
        type=click.IntRange(1),
        default=100,
        show_default=True,
        help="Number of prompts that --threshold-by answers at each rate.",
    ),
)


@click.command()
@DATA
@click.option("--outfile", required=True, metavar="SWITCH.gguf", help="Switch file to write.")
@fit_options
@threshold_options
@click.option(
    "--update",
    metavar="SWITCH.gguf",
    help="Switch to replace after the expert or the data changed: the fit starts from it, the "
    "report compares both, and --work-dir evaluates only what is new.",
)
@click.option(
    "--report-dir",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Write a report with figures, plots and coloured texts to this folder.",
)
@WORK_DIR
@click.option(
    "--expert-scores",
    metavar="FILE.npz",
    help="File that `colm-edge score` wrote on the expert's machine; then -m is enough.",
)
@RAW
@pair_options
def train(
    data: str,
    outfile: str,
    fitting: dict[str, Any],
    threshold_by: dict[str, Any],
    update: str | None,
    report_dir: str | None,
    work_dir: str | None,
    expert_scores: str | None,
    raw: bool,
    models: dict[str, Any],
) -> None:
    """Fit a switch for a base and an expert.

    FILE.jsonl has one document per line: {"prompt", "completion"}, {"messages"} or {"text"}. The
    models do not change; the switch is written as GGUF. The last line printed is JSON.
    """
    from colm_edge.files import check_writable
    from colm_edge.pair import load
    from colm_edge.switch.file import Switch
    from colm_edge.train.fit import FitOptions, fit_switch
    from colm_edge.train.report import check_report, write_report

    check_writable(outfile, data, *_read_files(models), expert_scores)
    old = Switch.load(update) if update is not None else None
    work = Path(work_dir) if work_dir else None
    if report_dir is not None:
        check_report(report_dir)
    if "metric" in threshold_by and expert_scores is not None and "expert" not in models:
        raise click.UsageError("--threshold-by needs the expert itself (-me) to answer prompts")
    if expert_scores is not None and "model" in models:
        models.setdefault("expert", models["model"])  # it is never evaluated
    with load(**models | {"expert_required": True}, switch=update or "margin") as pair:
        fit = fit_switch(
            pair,
            _documents(data, pair, raw, work),
            FitOptions(
                **fitting,
                update=old,
                compare=report_dir is not None,
                choose=_chooser(pair, data, raw, **threshold_by),
            ),
            progress=progress,
            work=work,
            expert_scores=Path(expert_scores) if expert_scores else None,
        )
        fit.switch.save(outfile)
        say(f"{outfile}: written")
        if report_dir is not None:
            write_report(fit, pair.base, report_dir)
            say(f"{report_dir}: report written")
    say(_in_words(fit.report))
    click.echo(json.dumps(fit.report))


def _read_files(models: dict[str, Any]) -> list[str | None]:
    return [models.get(name) for name in ("model", "expert", "lora")]


def _documents(data: str, pair: Pair, raw: bool, work: Path | None) -> Documents:
    """Tokenize the data, and say on stderr which documents did not fit the context."""
    from colm_edge.train.documents import read_rows, tokenized

    documents = tokenized(read_rows(data), pair, raw=raw, work=work)
    if documents.cut_note:
        say(documents.cut_note)
    return documents


def _chooser(
    pair: Pair, data: str, raw: bool, *, n_lines: int, metric: str | None = None
) -> ChooseThreshold | None:
    """Return what chooses a threshold by generated answers, if a metric is given."""
    from colm_edge.evaluate import metrics
    from colm_edge.evaluate.threshold import choose_by_answers
    from colm_edge.options import Options
    from colm_edge.train.documents import read_rows

    if metric is None:
        return None
    metrics.check_rows(read_rows(data), metrics.METRICS[metric])
    options = Options(temperature=0.0, raw=raw, schedule="sequential")
    return partial(choose_by_answers, pair, read_rows(data), metric, n_lines, options, progress)


def _in_words(report: dict[str, Any]) -> str:
    return (
        f"nats a token on held-back lines: base {report['nll_base']:.3f}, expert "
        f"{report['nll_expert']:.3f}, together {report['nll_hard']:.3f} at a threshold of "
        f"{report['threshold']:.3f}, {report['defer_rate']:.0%} deferred"
    )


@click.command("score")
@DATA
@click.option("--outfile", required=True, metavar="FILE.npz", help="File to write the scores to.")
@WORK_DIR
@click.option(
    "--update",
    is_flag=True,
    help="Accept a --work-dir of other documents or another expert, and score only what is new.",
)
@RAW
@pair_options
def score_command(
    data: str, outfile: str, work_dir: str | None, update: bool, raw: bool, models: dict[str, Any]
) -> None:
    """Score a JSONL file with the expert, for `train` elsewhere.

    The output holds the expert's log-probabilities, for `train --expert-scores`. The base is
    needed too, because its chat template formats the prompts; it is not evaluated. The last line
    printed is JSON.
    """
    from colm_edge.files import check_writable
    from colm_edge.pair import load
    from colm_edge.train.scoring import score_expert

    if update and work_dir is None:
        raise click.UsageError("--update needs --work-dir")
    check_writable(outfile, data, *_read_files(models))
    work = Path(work_dir) if work_dir else None
    with load(**models | {"expert_required": True}, switch="margin") as pair:
        documents = _documents(data, pair, raw, work)
        result = score_expert(pair, documents, Path(outfile), progress, work=work, update=update)
    click.echo(json.dumps(result))
