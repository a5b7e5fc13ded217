"""`colm-edge models`, `pull`, `info` and `quantize`: list, download, describe and make models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from colm_edge.cli.options import THREADS, output_option
from colm_edge.cli.terminal import note, say
from colm_edge.errors import ColmError, MismatchError


@click.command("models")
@output_option("md", "json")
def models_command(output: str) -> None:
    """List the models named in models.txt; * marks those already here."""
    from colm_edge.references import is_here, known_pairs

    rows: list[dict[str, Any]] = [
        {
            "alias": alias,
            "role": role,
            "reference": model.reference,
            "licence": model.licence,
            "note": model.note,
            "here": is_here(model.reference),
        }
        for alias, roles in known_pairs().items()
        for role, model in roles.items()
    ]
    if output == "json":
        click.echo(json.dumps(rows))
        return
    width = max(len(row["alias"]) for row in rows)
    for row in rows:
        mark = "*" if row["here"] else " "
        click.echo(f"{mark} {row['alias']:{width}} {row['role']:7} {row['reference']}")
        click.echo(f"  {'':{width}} {'':7} {row['licence']}; {row['note']}")
    say("* is already here. To download others: colm-edge pull ALIAS, or run --pair ALIAS.")


@click.command("pull")
@click.argument("refs", nargs=-1, required=True, metavar="ALIAS|USER/REPO:FILE …")
@click.option("--offline", is_flag=True, help="Look only in the cache.")
def pull_command(refs: tuple[str, ...], offline: bool) -> None:
    """Download models, verify them, and print their paths.

    They are kept in the Hugging Face cache; HF_HOME, HF_TOKEN and HF_ENDPOINT are respected. An
    alias in models.txt stands for all files of a pair. A download goes on where a connection
    broke, or an earlier one was stopped.
    """
    from colm_edge.references import references_of, resolve

    for ref in refs:
        for reference in references_of(ref):
            path = resolve(reference, offline=offline, note=say)
            if not Path(path).is_file():
                raise ColmError(
                    f"{reference}: neither a name in models.txt nor a reference; expected a "
                    "name that `colm-edge models` lists, user/repo:file.gguf or "
                    "user/repo:QUANTISATION"
                )
            click.echo(path)


@click.command("quantize")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(dir_okay=False))
@click.argument("type_name", metavar="TYPE")
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Also quantise a file that is quantised already, at a loss of quality.",
)
@click.option(
    "--output-type",
    metavar="TYPE",
    help="Type of the output matrix; llama.cpp would keep it in a larger one than the rest.",
)
@THREADS
def quantize_command(
    source: str,
    target: str,
    type_name: str,
    allow_requantize: bool,
    output_type: str | None,
    n_threads: int,
) -> None:
    """Write the model IN as OUT in another quantisation, such as Q4_0 or Q8_0.

    Q4_0 is the fastest on most CPUs. IN is best the original in F16 or BF16.
    """
    from colm_edge.files import parts_of
    from colm_edge.llama.quantize import quantize
    from colm_edge.references import resolve

    path = resolve(source, note=say)
    quantize(
        path, target, type_name,
        output_type=output_type, allow_requantize=allow_requantize, n_threads=n_threads,
        note=say,
    )  # fmt: skip
    sizes = ""
    if Path(target).is_file():  # a pipe does not tell what went through
        before, after = (
            sum(Path(part).stat().st_size for part in parts_of(file)) / 1e6
            for file in (path, target)
        )
        sizes = f", {after:,.0f} MB; {path} has {before:,.0f} MB"
    say(f"{target}: written{sizes}")


@click.command("info")
@click.argument("refs", nargs=-1, required=True, metavar="REF [REF]…")
@click.option(
    "--costs",
    is_flag=True,
    help="Measure how long decodes of 1, 2, 3 … tokens take on this machine, unless known.",
)
@THREADS
@output_option("md", "json")
def info_command(refs: tuple[str, ...], costs: bool, n_threads: int, output: str) -> None:
    """Describe a model or a switch; of a base and its experts, or a name in models.txt, say if
    they fit together.

    The exit code is 1 if they do not.
    """
    from colm_edge.info import as_text, describe_files

    facts, obstacle = describe_files(refs, costs=costs, n_threads=n_threads, note=note)
    click.echo(json.dumps(facts) if output == "json" else as_text(facts))
    if obstacle:
        raise MismatchError(obstacle)
