"""`colm-edge train`: fit a switch for two models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.common import file_of, keeping_models, progress
from colm_edge.cli.options import (
    ALLOW_EXEC,
    BRIDGE,
    LORA,
    PARALLEL,
    RAW,
    RPC,
    TIMEOUT,
    WORK_DIR,
    Number,
    Whole,
    check_exec,
    check_goes_with,
    claim,
    gathered,
    jsonl_option,
    model_options,
)
from colm_edge.cli.terminal import say
from colm_edge.errors import ColmError, ModelError
from colm_edge.evaluate.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from colm_edge.pair import Pair
    from colm_edge.switch.file import Switch
    from colm_edge.train.documents import Documents, Row
    from colm_edge.train.fit import ChooseThreshold, Fit
    from colm_edge.train.scoring import Recorded


MOST_DEFERRED = 0.5  # of the expert's own text, by a switch whose threshold should defer a fifth
# Options that do not go with several experts.
UNFIT = ("--threshold-by", "--review", "--update", "--report-dir", "--expert-scores")


class ToleranceType(Number):
    """A number of nats, "off" (infinity), or "best", as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "best" else super().convert(value, param, ctx)


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
        type=click.Choice(["best", "marginal", "budget", "regret", "weak"]),
        default="best",
        show_default=True,
        help="marginal: the likelihood of the mixture, as in the paper. budget: the likelihood of "
        "hard decisions at defer rates of 0.1 to 0.3. regret: whether the expert would reject the "
        "base's choice. best: regret with --prompts; else the better of marginal and budget at "
        "those rates, on held-back lines. weak: the paper's weak supervision, as a baseline.",
    ),
    click.option(
        "-s",
        "--seed",
        type=Whole(0),
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
        "defer rates of 0, 0.1 … 1.  [default: by the likelihood of hard decisions; a rate of 0.2 "
        "for the objective regret and with --prompts]",
    ),
    click.option(
        "--threshold-lines",
        "n_lines",
        type=Whole(1),
        default=100,
        show_default=True,
        help="Number of prompts that --threshold-by answers at each rate.",
    ),
    ALLOW_EXEC,
)

text_options = gathered(
    "text",
    jsonl_option("--data", "Prompts with completions."),
    jsonl_option(
        "--prompts",
        "Prompts alone, which the expert answers, greedily: a prompt or messages a line.",
    ),
    click.option(
        "-n",
        "--n-predict",
        "max_tokens",
        type=Whole(1),
        default=512,
        show_default=True,
        help="The most tokens of an answer to --prompts, or for --threshold-by.",
    ),
    PARALLEL,
)

score_files = gathered(
    "scored",
    click.option(
        "--expert-scores",
        metavar="FILE.npz…",
        multiple=True,
        help="File that `colm-edge score` wrote on the expert's machine, or those of all its "
        "shards; then -m is enough.",
    ),
    click.argument("more_scores", nargs=-1, metavar=""),
)


@click.command()
@text_options
@click.option("--outfile", required=True, metavar="SWITCH.gguf", help="Switch file to write.")
@fit_options
@threshold_options
@click.option(
    "--review",
    "carried",
    type=ToleranceType(0, math.inf, {"off": math.inf}),
    metavar="NUMBER|off|best",
    help="Tolerance of review, in nats, that the switch file carries, for answers that ask for "
    "none; best: the one that the report recommends.  [default: none]",
)
@click.option(
    "--update",
    metavar="SWITCH.gguf",
    help="Switch to replace after the expert or the data changed: the report compares both, and "
    "the fit of marginal and budget starts from it. With --work-dir only what is new is evaluated.",
)
@click.option(
    "--report-dir",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Write a report with figures, plots and coloured texts to this folder.",
)
@WORK_DIR
@score_files
@RAW
@model_options(LORA, BRIDGE, RPC, TIMEOUT)
def train(
    text: dict[str, Any],
    outfile: str,
    fitting: dict[str, Any],
    threshold_by: dict[str, Any],
    carried: float | str | None,
    update: str | None,
    report_dir: str | None,
    work_dir: str | None,
    scored: dict[str, Any],
    raw: bool,
    models: dict[str, Any],
) -> None:
    """Fit a switch for a base and an expert.

    --data has one document per line: {"prompt", "completion"}, {"messages"} or {"text"}; --prompts
    has {"prompt"} or {"messages"}, and needs no answers. The models do not change; the switch is
    written as GGUF. The last line printed is JSON.
    """
    from colm_edge.files import check_writable, is_stream
    from colm_edge.pair import load
    from colm_edge.switch.file import Switch
    from colm_edge.train.fit import FitOptions, fit_switch

    data, scores = text.get("data"), _files_of(**scored)
    models = spelt_out(_check_choice(text, threshold_by, bool(scores), models))
    if has_several(models):
        unfit = threshold_by.get("metric"), carried, update, report_dir, scores
        return _train_team(text, outfile, fitting, work_dir, raw, models, unfit)
    check_writable(outfile, data, text.get("prompts"), *scores)
    folder = work_dir if data or work_dir or is_stream(outfile) else kept_beside(outfile)
    old = Switch.load(file_of(update, "switch", models)) if update else None
    work = Path(folder) if folder else None
    _check_libraries(report_dir)
    with keeping_models(load(**models, switch="margin"), outfile) as pair:
        _check_update(old, pair)
        here = pair.expert_is_here and not scores
        if carried == "best" and not here:
            raise ColmError("--review best needs both models here; give a number of nats, or off")
        rows = _rows(text, twice="metric" in threshold_by)
        documents, recorded, counts = _text(text, rows, pair, raw, work)
        fit = fit_switch(
            pair,
            documents,
            FitOptions(
                **fitting,
                update=old,
                compare=report_dir is not None,
                choose=_chooser(pair, rows, text, raw, work, **threshold_by),
            ),
            progress=progress,
            work=work,
            expert_scores=scores,
            recorded=recorded,
        )
        fit = _with_review(fit, pair if here else None, carried)
        fit = replace(fit, report={**fit.report, **counts})
        _save(fit, pair, outfile, report_dir)
    say(_in_words(fit.report))
    click.echo(json.dumps(fit.report))


def spelt_out(models: dict[str, Any]) -> dict[str, Any]:
    """Return the models with those that a pair of several experts stands for, by their names."""
    from colm_edge.references import listed_pair

    if "pair" not in models or models.keys() & {"model", "expert"}:
        return models
    base, experts = listed_pair(models["pair"])
    if len(experts) == 1:
        return models
    others = {key: value for key, value in models.items() if key != "pair"}
    return others | {"model": base, "expert": experts}


def has_several(models: dict[str, Any]) -> bool:
    """Return whether these models, spelt out, have several experts."""
    return isinstance(models.get("expert"), Mapping | tuple)


def kept_beside(outfile: str) -> str:
    """Return a work folder beside the file that is to be written, and say so."""
    folder = f"{outfile}.work"
    claim(click.get_current_context(), None, folder)
    say(f"{folder}: keeps the work; the same command again goes on from there")
    return folder


def _train_team(
    text: dict[str, Any],
    outfile: str,
    fitting: dict[str, Any],
    work_dir: str | None,
    raw: bool,
    models: dict[str, Any],
    unfit: tuple[Any, ...],
) -> None:
    """Fit a switch for several experts, each of which is loaded by itself. unfit: the values of
    options that do not go with that, in the order of UNFIT."""
    from colm_edge.files import check_writable, is_stream
    from colm_edge.pair import load
    from colm_edge.references import is_url, named
    from colm_edge.train.fit import NO_REGRET
    from colm_edge.train.heads import check_fit
    from colm_edge.train.team import checked_objective, fit_team
    from colm_edge.train.team_scores import score_answers, score_texts

    for flag, value in zip(UNFIT, unfit, strict=True):
        if value is not None and value != []:
            raise click.UsageError(f"{flag} does not work with several experts; leave it out")
    experts = named(models["expert"]) or {}
    file = text.get("data") or text["prompts"]
    check_writable(outfile, file)
    check_fit()
    objective = checked_objective(fitting["objective"], by_all="data" in text)
    if objective == "regret" and "data" in text and any(map(is_url, experts.values())):
        raise ColmError(NO_REGRET)
    if work_dir is None and is_stream(outfile):
        raise click.UsageError(f"{outfile} is not a regular file; give --work-dir for the scores")
    work = Path(work_dir or kept_beside(outfile))
    how: dict[str, Any] = {"raw": raw, "work": work, "seed": fitting.pop("seed")}
    rows = list(_rows(text))

    def open_pair(name: str) -> Pair:
        alone = models | {"expert": experts[name]}
        return keeping_models(load(**alone, switch="margin"), outfile)

    if "data" in text:
        found = score_texts(open_pair, [*experts], rows, progress, **how)
    else:
        how |= {name: text[name] for name in ("max_tokens", "n_slots")}
        found = score_answers(open_pair, [*experts], rows, progress, **how)
    switch, report = fit_team(found.team, found.held_back, [*experts], info=found.info, **fitting)
    switch.save(outfile)
    say(f"{outfile}: written")
    counts = {"n_cut": found.n_cut, "n_dropped": found.n_dropped}
    if found.n_answers is not None:
        counts["n_answers"] = found.n_answers
    click.echo(json.dumps({**report, **counts}))


def _files_of(expert_scores: Sequence[str] = (), more_scores: Sequence[str] = ()) -> list[Path]:
    """Return the files of --expert-scores, which takes as many as a shell's * names."""
    if expert_scores:
        return [Path(file) for file in (*expert_scores, *more_scores)]
    if more_scores:
        raise click.UsageError(f"unexpected argument {more_scores[0]!r}")
    return []


def _check_choice(
    text: dict[str, Any],
    threshold_by: dict[str, Any],
    is_scored: bool,
    models: dict[str, Any],
) -> dict[str, Any]:
    """Refuse options that contradict each other; return the models. With scores from elsewhere -m
    is enough."""
    if ("data" in text) is ("prompts" in text):
        raise click.UsageError("give --data, texts to fit to, or --prompts, questions to answer")
    if "prompts" in text and ("metric" in threshold_by or is_scored):
        raise click.UsageError("--threshold-by and --expert-scores go with --data")
    if "prompts" not in text and "metric" not in threshold_by:
        check_goes_with("--prompts", "max_tokens", "n_slots")
    if "metric" not in threshold_by:
        check_goes_with("--threshold-by", "n_lines")
    check_exec(threshold_by.get("metric"), threshold_by.pop("allow_exec"), "--threshold-by")
    if "metric" in threshold_by and is_scored and "expert" not in models:
        raise click.UsageError("--threshold-by needs the expert itself (-me) to answer prompts")
    if is_scored and "model" in models:
        models.setdefault("expert", models["model"])  # it is never evaluated
    return models | {"expert_required": True}


def _check_libraries(report_dir: str | None) -> None:
    """Raise ColmError now, rather than after the work, where a library is missing."""
    from colm_edge.train.heads import check_fit
    from colm_edge.train.report import check_report

    check_fit()
    if report_dir is not None:
        check_report(report_dir)


def _check_update(old: Switch | None, pair: Pair) -> None:
    """Raise ColmError for a switch that cannot be where a fit for this pair starts."""
    if old is None:
        return
    old.reader(pair.base, pair.n_shared)  # checks its width
    if old.n_experts > 1:
        raise ColmError(f"{old.name}: a switch for several experts; --update takes one of one")


def _rows(text: dict[str, Any], *, twice: bool = False) -> Iterable[Row]:
    """Return the lines of the data, or of the prompts, each prompt once.

    twice: as a list; a pipe gives them once.
    """
    from colm_edge.train.documents import read_rows
    from colm_edge.train.prompts import distinct

    if "data" in text:
        rows = read_rows(text["data"])
        return list(rows) if twice else rows
    prompts, n_repeats = distinct(read_rows(text["prompts"]))
    if n_repeats:
        say(f"{n_repeats} prompts repeat earlier ones and are left out")
    return prompts


def _text(
    text: dict[str, Any], rows: Iterable[Row], pair: Pair, raw: bool, work: Path | None
) -> tuple[Documents, Recorded | None, dict[str, int]]:
    """Return what the switch is fitted to, the data's documents or the expert's own answers, and
    what the report says of them."""
    from colm_edge.train.documents import check_lines
    from colm_edge.train.prompts import answer_prompts

    if "data" in text:
        return documents_of(rows, pair, raw, work), None, {}
    rows = list(rows)
    check_lines(len(rows))
    how = {name: text[name] for name in ("max_tokens", "n_slots")}
    answered = answer_prompts(pair, rows, progress, raw=raw, work=work, **how)
    if answered.n_cut:
        say(f"{answered.n_cut} answers were cut at {text['max_tokens']} tokens (-n), or by -c")
    counts = {"n_answers": len(answered.entries), "n_cut": answered.n_cut}
    return answered.documents, answered.recorded, counts


def documents_of(rows: Iterable[Row], pair: Pair, raw: bool, work: Path | None) -> Documents:
    """Tokenize the data, and say on stderr which documents did not fit the context."""
    from colm_edge.train.documents import tokenized

    documents = tokenized(rows, pair, raw=raw, work=work)
    if documents.cut_note:
        say(documents.cut_note)
    return documents


def _chooser(
    pair: Pair,
    rows: Iterable[Row],
    text: dict[str, Any],
    raw: bool,
    work: Path | None,
    *,
    n_lines: int,
    metric: str | None = None,
) -> ChooseThreshold | None:
    """Return what chooses a threshold by generated answers, if a metric is given."""
    from colm_edge.evaluate import metrics
    from colm_edge.evaluate.generate import ANSWERS_FILE
    from colm_edge.evaluate.threshold import choose_by_answers
    from colm_edge.journal import Journal
    from colm_edge.options import Options
    from colm_edge.train.prompts import read_prompts

    if metric is None:
        return None
    metrics.check_rows(rows, metrics.METRICS[metric])
    for _ in read_prompts(rows, pair, raw):
        pass  # each fits the context
    most = text["max_tokens"]
    options = Options(temperature=0.0, max_tokens=most, raw=raw, schedule="sequential")
    more = {"journal": Journal(work and work / ANSWERS_FILE), "n_slots": text["n_slots"]}
    return partial(choose_by_answers, pair, rows, metric, n_lines, options, progress, **more)


def _with_review(fit: Fit, pair: Pair | None, carried: Any) -> Fit:
    """Report what review would do on this machine, if the pair is here to be measured, and let the
    switch carry a tolerance: a number, "best", or None."""
    from colm_edge.train.tolerance import review_figures

    report, best = fit.report, None
    if pair is not None:
        try:
            figures = review_figures(fit, pair.cost_tables(), pair.defaults.review_window)
        except ModelError as e:  # for example, no memory for another context
            carries = ", and the switch carries no tolerance" if carried == "best" else ""
            say(f"the report says nothing of review{carries}: {e}")
        else:
            report, best = {**report, "review": figures}, figures["recommended"]
            best = math.inf if best is None else best
    if carried == "best":
        carried = best
    return replace(fit, switch=replace(fit.switch, review=carried), report=report)


def _review_in_words(review: dict[str, Any]) -> str:
    best = review["recommended"]
    row = next((row for row in review["tolerances"] if row["review"] == best), None)
    if row is None:
        alone = review["expert_tokens_per_second"]
        if all(row["tokens_per_second"] <= alone for row in review["tolerances"]):
            return "review: off is best here; with any tolerance the expert alone is as fast"
        return "review: off is best here; no tolerance makes the text likelier at equal speed"
    return (
        f"review: a tolerance of {best:g} nats is best here: {row['nll_hard']:.3f} nats per token "
        f"at {row['tokens_per_second']:.3g} tokens per second, without "
        f"{review['off']['nll_hard']:.3f} at {review['off']['tokens_per_second']:.3g}"
    )


def _save(fit: Fit, pair: Pair, outfile: str, report_dir: str | None) -> None:
    from colm_edge.train.report import write_report

    fit.switch.save(outfile)
    say(f"{outfile}: written")
    if report_dir is not None:
        write_report(fit, pair.base, report_dir)
        say(f"{report_dir}: report written")


def _in_words(report: dict[str, Any]) -> str:
    saturated = ""
    if "n_answers" in report and report["defer_rate"] > MOST_DEFERRED:
        saturated = (
            f"\nthe objective {report['objective']} finds nearly every token better with the "
            "expert, which wrote this text; leave --objective out"
        )
    return (
        (
            f"nats per token on held-back lines: base {report['nll_base']:.3f}, expert "
            f"{report['nll_expert']:.3f}, together {report['nll_hard']:.3f} at a threshold of "
            f"{report['threshold']:.3f}, {report['defer_rate']:.0%} deferred"
        )
        + saturated
        + (f"\n{_review_in_words(report['review'])}" if "review" in report else "")
    )
