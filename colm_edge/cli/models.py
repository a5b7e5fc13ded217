"""`colm-edge models`, `pull` and `info`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from colm_edge.errors import ColmError, MismatchError


@click.command("models")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True)
def models_command(output: str) -> None:
    """List the models that models.txt knows, and which of them are here."""
    from colm_edge.references import is_here, known_pairs

    rows = [
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
    for row in rows:
        mark = "*" if row["here"] else " "
        click.echo(f"{mark} {row['alias']:13}{row['role']:7} {row['reference']}")
        click.echo(f"  {'':20} {row['licence']}; {row['note']}")
    click.echo("* is here. The others: colm-edge pull ALIAS, or run --pair ALIAS.", err=True)


@click.command("pull")
@click.argument("refs", nargs=-1, required=True, metavar="ALIAS|USER/REPO:FILE …")
@click.option("--offline", is_flag=True, help="Look in the cache alone.")
def pull_command(refs: tuple[str, ...], offline: bool) -> None:
    """Download models into the Hugging Face cache, checked; print where they are.

    An alias of models.txt is a pair, both of its models. HF_HOME, HF_TOKEN and HF_ENDPOINT are
    heeded; where a connection breaks, the download goes on.
    """
    from colm_edge.references import known_pairs, resolve

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


@click.command("info")
@click.argument("refs", nargs=-1, required=True, metavar="REF [REF]")
@click.option(
    "--costs", is_flag=True,
    help="Measure what decodes of 1, 2, 3 … tokens cost on this machine, unless it is known.",
)  # fmt: skip
@click.option("-t", "--threads", "n_threads", type=click.IntRange(0), default=0)
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True)
def info_command(refs: tuple[str, ...], costs: bool, n_threads: int, output: str) -> None:
    """Describe a model or a switch, or two models and whether they can collaborate.

    The exit code is 1 if they cannot.
    """
    from colm_edge.info import as_text, describe_files

    if len(refs) > 2:
        raise click.UsageError("give one REF or two")
    facts, obstacle = describe_files(refs, costs=costs, n_threads=n_threads)
    click.echo(json.dumps(facts) if output == "json" else as_text(facts))
    if obstacle:
        raise MismatchError(obstacle)
