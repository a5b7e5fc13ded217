"""`colm-edge score`: score data with the expert on another machine than the one that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from colm_edge.cli.common import keeping_models, progress
from colm_edge.cli.options import BRIDGE, DATA, LORA, RAW, RPC, TIMEOUT, WORK_DIR, model_options
from colm_edge.cli.train import documents_of, has_several, spelt_out


def part_of(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """Return K and N of K/N: the K-th of N parts."""
    k, _slash, n = value.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise click.BadParameter(f"{value!r} is not a part; expected K/N, with K from 1 to N")
    return int(k), int(n)


@click.command("score")
@DATA
@click.option("--outfile", required=True, metavar="FILE.npz", help="File to write the scores to.")
@click.option(
    "--shard",
    metavar="K/N",
    default="1/1",
    callback=part_of,
    help="Score only the K-th of N parts of the data, for `train` with the files of all parts.",
)
@WORK_DIR
@RAW
@model_options(LORA, BRIDGE, RPC, TIMEOUT)
def score_command(
    data: str,
    outfile: str,
    shard: tuple[int, int],
    work_dir: str | None,
    raw: bool,
    models: dict[str, Any],
) -> None:
    """Score a JSONL file with the expert, for `train` elsewhere.

    The output holds the expert's log-probabilities, for `train --expert-scores`. The base is
    needed too: its chat template formats the prompts, and the expert is asked what it thinks of
    the base's choices. The last line printed is JSON.
    """
    from colm_edge.files import check_writable
    from colm_edge.pair import load
    from colm_edge.train.documents import read_rows
    from colm_edge.train.scoring import score_expert

    if has_several(spelt_out(models)):
        raise click.UsageError("score works with one expert; give -me once")
    check_writable(outfile, data)
    work = Path(work_dir) if work_dir else None
    models |= {"expert_required": True}
    with keeping_models(load(**models, switch="margin"), outfile) as pair:
        documents = documents_of(read_rows(data), pair, raw, work)
        result = score_expert(pair, documents, Path(outfile), progress, shard=shard, work=work)
    click.echo(json.dumps(result))
