"""The command line: parse, call, print."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli_options import (
    WORK_DIR,
    decoding_options,
    finite,
    model_options,
    pair_options,
    shares,
)  # fmt: skip
from colm_edge.errors import ColmError
from colm_edge.options import ServerOptions
from colm_edge.terminal import Chat, drain, note, summary, write

if TYPE_CHECKING:
    from colm_edge.documents import Documents
    from colm_edge.pair import Pair, Stream


class OneLineErrors(click.Command):
    """Turn what a user can mend into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ColmError as e:
            raise click.ClickException(" ".join(str(e).split())) from e


class Group(OneLineErrors, click.Group):
    """The commands, all with the same errors."""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, help="Say what is installed.",
    callback=lambda ctx, _, given: say_version(ctx) if given else None,
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def main(verbose: bool) -> None:
    """A small language model that calls an expert only for the tokens it needs."""
    if verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    else:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        # Its warnings of every try would come before the one line that says what is wrong.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def say_version(ctx: click.Context) -> None:
    """Print the versions of colm-edge and llama.cpp, how the latter was built, and the devices."""
    from importlib.metadata import version

    from colm_edge.readout import implementation
    from colm_edge.weights import build_info, devices

    click.echo(f"colm-edge {version('colm-edge')}, the switch read by {implementation}")
    click.echo(f"llama-cpp-python {version('llama-cpp-python')}; {build_info()}")
    for device in devices():
        click.echo(f"device {device}")
    ctx.exit()


def open_pair(models: dict[str, Any], **more: Any) -> Pair:
    """Load what the model options name and say on stderr what a user should know of it."""
    from colm_edge.pair import load

    loaded = load(**models, **more, note=note)
    if loaded.is_demo:
        click.echo(
            "A demonstration pair (animals, elements, countries). "
            "Real models: -m BASE.gguf -me EXPERT.gguf",
            err=True,
        )
    if "switch" not in models and loaded.switch.name == "margin":
        click.echo(
            "No switch given (-sw): using margin, an untrained rule; `colm-edge train` fits one.",
            err=True,
        )
    return loaded


@main.command()
@click.argument("words", metavar="[PROMPT]", nargs=-1)
@click.option("-p", "--prompt", help="The prompt; without one, standard input or a chat.")
@click.option("-sys", "--system-prompt", "system", help="A system prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every token.")
@click.option(
    "--prompt-cache", metavar="FILE", type=click.Path(dir_okay=False),
    help="Keep what both models evaluated here, and begin with it the next time.",
)  # fmt: skip
@model_options
@decoding_options()
def run(
    words: tuple[str, ...],
    prompt: str | None,
    system: str | None,
    as_json: bool,
    prompt_cache: str | None,
    models: dict[str, Any],
    decoding: dict[str, Any],
) -> None:
    """Answer PROMPT, or chat when there is none."""
    from colm_edge.options import Options

    if words and prompt is not None:
        raise click.UsageError("give the prompt once: as PROMPT or with -p")
    prompt = " ".join(words) if words else prompt
    # A process may be started without a standard input.
    chatting = prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if chatting and as_json:
        raise click.UsageError("--json needs a prompt")
    if prompt is None and not chatting:
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace") if sys.stdin else ""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console may lack a character of the answer
    with ExitStack() as stack:
        loaded = stack.enter_context(open_pair(models, defaults=Options(**decoding)))
        if prompt_cache is not None:
            stack.enter_context(kept_prompts(loaded, prompt_cache))
        if prompt is None:
            Chat(loaded, system).loop()
            return
        stream = loaded.stream(prompt, system=system)
        if as_json:
            interrupted = drain(stream)
            click.echo(json.dumps(describe(loaded, stream), ensure_ascii=False))
        else:
            interrupted = write(stream)
            click.echo()
            click.echo(summary(stream.answer().stats), err=True)
        if interrupted:
            raise SystemExit(130)


@contextmanager
def kept_prompts(pair: Pair, path: str) -> Iterator[None]:
    """Begin with a prompt cache, if the file is there, and write it at the end."""
    _ = pair.expert_session  # an expert on a server has nothing to keep: said before the answer
    if Path(path).exists():
        pair.load_prompts(path)
    yield
    pair.save_prompts(path)


def describe(pair: Pair, stream: Stream) -> dict[str, Any]:
    """Return an answer as the object that --json prints."""
    answer = stream.answer()
    return {
        "model": str(pair.base.path),
        "expert": pair.expert_name,
        "switch": pair.switch.name,
        "threshold": answer.threshold,
        "prompt_tokens": answer.prompt_tokens,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": [
            {"id": s.token, "text": s.text, "source": s.source, "p_defer": s.p_defer}
            for s in answer.steps
        ],
        "stats": asdict(answer.stats),
    }


def progress(name: str, total: int) -> Any:
    """Return a progress bar on stderr."""
    return click.progressbar(length=total, label=f"{name:>7}", file=sys.stderr, show_pos=True)


@main.command()
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
    from colm_edge.answers import METRICS, check_rows
    from colm_edge.documents import read_rows, tokenized
    from colm_edge.options import Options
    from colm_edge.pair import load
    from colm_edge.switch import Switch
    from colm_edge.train import check_writable, choose_by_answers, fit_switch

    check_writable(outfile, data, *_read_files(models), expert_scores)
    old = Switch.load(update) if update is not None else None
    work = Path(work_dir) if work_dir else None
    if report_dir is not None:
        from colm_edge.report import check_report, write_report

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
            loaded, documents, features, objective=objective, seed=seed, update=old,
            compare=report_dir is not None, work=work, choose=choose,
            expert_scores=Path(expert_scores) if expert_scores else None, progress=progress,
        )  # fmt: skip
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


@main.command("score")
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
    from colm_edge.documents import read_rows, tokenized
    from colm_edge.pair import load
    from colm_edge.scoring import score_expert
    from colm_edge.train import check_writable

    if update and work_dir is None:
        raise click.UsageError("--update needs --work-dir")
    check_writable(outfile, data, *_read_files(models))
    work = Path(work_dir) if work_dir else None
    with load(**models | {"expert_required": True}, switch="margin") as loaded:
        documents = tokenized(read_rows(data), loaded, raw=raw, work=work)
        say_cut(documents)
        result = score_expert(loaded, documents, Path(outfile), progress, work=work, update=update)
    click.echo(json.dumps(result))


@main.command("eval")
@click.option("--data", required=True, metavar="FILE.jsonl", help="Prompts with completions.")
@click.option(
    "--metric", type=click.Choice(["nll", "exact", "contains", "gsm8k", "steps"]), default="nll",
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
    from colm_edge.evaluate import METHODS, check_plot, evaluate, render, write_plot
    from colm_edge.options import Options
    from colm_edge.proxy import Proxy
    from colm_edge.switch import Switch

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
        table = evaluate(
            loaded, data, options, metric=None if metric == "nll" else metric, limit=limit,
            methods=names, thresholds=thresholds, defer_rates=defer_rates,
            weak=Switch.load(weak) if weak else None, proxy=proxy,
            work=Path(work_dir) if work_dir else None, note=lambda text: click.echo(text, err=True),
            progress=progress,
        )  # fmt: skip
    click.echo(render(table, output))
    if plot is not None:
        write_plot(table, plot)
        click.echo(f"{plot}: written", err=True)


@main.command("bench")
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
    help="Instead, try settings of both models and print the best, and which quantisation of the "
    "expert is the fastest here.",
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
    from colm_edge.bench import bench, measured_on
    from colm_edge.evaluate import render
    from colm_edge.replay import Process, recorded
    from colm_edge.tune import tune

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


@main.command("models")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True)
def models_command(output: str) -> None:
    """List the models that models.txt knows, and which of them are here."""
    from colm_edge.hub import pulled
    from colm_edge.models import known_pairs

    here = pulled()
    rows = [
        {
            "alias": alias, "role": role, "reference": known.reference, "licence": known.licence,
            "note": known.note,
            "here": known.reference.startswith("package:")
            or Path(here.get(known.reference, {}).get("path", "\0")).exists(),
        }
        for alias, roles in known_pairs().items() for role, known in roles.items()
    ]  # fmt: skip
    if output == "json":
        click.echo(json.dumps(rows))
        return
    for row in rows:
        mark = "*" if row["here"] else " "
        click.echo(f"{mark} {row['alias']:13}{row['role']:7} {row['reference']}")
        click.echo(f"  {'':20} {row['licence']}; {row['note']}")
    click.echo("* is here. The others: colm-edge pull ALIAS, or run --pair ALIAS.", err=True)


@main.command("pull")
@click.argument("refs", nargs=-1, required=True, metavar="ALIAS|USER/REPO:FILE …")
@click.option("--offline", is_flag=True, help="Look in the cache alone.")
def pull_command(refs: tuple[str, ...], offline: bool) -> None:
    """Download models into the Hugging Face cache, checked; print where they are.

    An alias of models.txt is a pair, both of its models. HF_HOME, HF_TOKEN and HF_ENDPOINT are
    heeded; a download that breaks goes on where it was.
    """
    from colm_edge.models import known_pairs, resolve

    known = known_pairs()
    for ref in refs:
        wanted = [line.reference for line in known[ref].values()] if ref in known else [ref]
        for reference in wanted:
            path = resolve(reference, offline=offline, note=lambda text: click.echo(text, err=True))
            if not Path(path).exists():
                raise ColmError(
                    f"{reference}: no name in models.txt and no reference; expected a name that "
                    "`colm-edge models` lists, user/repo:file.gguf or user/repo:QUANTISATION"
                )
            click.echo(path)


@main.command("info")
@click.argument("refs", nargs=-1, required=True, metavar="REF [REF]")
@click.option(
    "--costs", is_flag=True,
    help="Measure what decodes of 1, 2, 3 … tokens cost on this machine, unless it is known.",
)  # fmt: skip
@click.option("-t", "--threads", "n_threads", type=click.IntRange(0), default=0)
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True)
def info_command(refs: tuple[str, ...], costs: bool, n_threads: int, output: str) -> None:
    """Describe a model or a switch; of two models say whether they can collaborate."""
    from colm_edge.info import as_text, describe_files

    if len(refs) > 2:
        raise click.UsageError("give one REF or two")
    facts = describe_files(refs, costs=costs, n_threads=n_threads)
    click.echo(json.dumps(facts) if output == "json" else as_text(facts))


SERVER = ServerOptions()


@main.command("serve")
@click.option("--host", default=SERVER.host, show_default=True, help="0.0.0.0: every network.")
@click.option("--port", type=click.IntRange(0, 65535), default=SERVER.port, show_default=True)
@click.option(
    "-np", "--parallel", "n_slots", type=click.IntRange(1, 64), default=SERVER.n_slots,
    show_default=True, help="Answers written at once; each has a context of -c tokens.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(0), default=SERVER.queue, show_default=True,
    help="Requests that may wait for a slot; more are told to come again (503).",
)  # fmt: skip
@click.option(
    "--api-key", envvar="COLM_EDGE_API_KEY", metavar="KEY",
    help="Answer only requests that carry it; better in the variable COLM_EDGE_API_KEY.",
)  # fmt: skip
@click.option(
    "--cors-origin", "cors", multiple=True, metavar="ORIGIN",
    help="A site whose pages may ask, such as http://localhost:3000; repeatable.  [none]",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(1), default=SERVER.max_tokens, show_default=True,
    help="Of one answer, whatever a request asks for.",
)  # fmt: skip
@click.option(
    "--expert-idle-unload", type=click.FloatRange(0), default=SERVER.expert_idle_unload,
    metavar="SECONDS",
    help="Free the expert's memory when nothing was asked for so long; 0: never.",
)  # fmt: skip
@model_options
@decoding_options()
def serve_command(models: dict[str, Any], decoding: dict[str, Any], **settings: Any) -> None:
    """Serve the pair: OpenAI's API at /v1, and a page to chat on at /.

    The decoding options are what requests that leave them out get.
    """
    from colm_edge.options import Options

    try:
        from colm_edge.server import serve
    except ModuleNotFoundError as e:
        raise ColmError(
            f"{e.name} is missing; install the extra: pip install 'colm-edge[server]'"
        ) from e
    with open_pair(models, defaults=Options(**decoding)) as loaded:
        expert = "remote" if loaded.remote else loaded.expert.path.stem
        name = models.get("pair") or f"{loaded.base.path.stem}+{expert}"
        serve(loaded, ServerOptions(**settings), name, lambda text: click.echo(text, err=True))
