"""Mutate every kind of file that colm-edge reads, and count what becomes of them.

    python tools/fuzz.py [KIND …] -n 10000

Each file is read, or refused by one line of a ColmError; anything else is a fault: another
exception, more than 10 seconds of CPU time, more than 2 GB, the end of the process, a line that
cannot be printed. The smallest input of each fault is kept. The same seed makes the same files.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import click
from lib.fuzz.pool import Tally, try_kind, write_files
from lib.fuzz.table import KINDS

from colm_edge.tables import render


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("kinds", nargs=-1, type=click.Choice([*KINDS]), metavar="[KIND …]")
@click.option("-n", "n", type=click.IntRange(1), default=1000, show_default=True, help="Tries.")
@click.option("-s", "--seed", default=0, show_default=True, help="Of the mutations.")
@click.option(
    "-j", "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Child processes."
)
@click.option(
    "--keep",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/fuzz"),
    show_default=True,
    help="Folder for the smallest input of each fault.",
)
@click.option(
    "-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True,
    help="Form of the table.",
)  # fmt: skip
def main(kinds: tuple[str, ...], n: int, seed: int, jobs: int, keep: Path, output: str) -> None:
    """Mutate files of every KIND, or of those that are named. The exit code is 1 for faults."""
    table, n_faults = [], 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        for name in kinds or KINDS:
            tally = try_kind(KINDS[name], Path(home), n, seed, jobs)
            table.append(_row(tally, n))
            n_faults += tally.n_faults.total()
            _keep(tally, keep)
    click.echo(render(table, output))
    sys.exit(n_faults > 0)


def _row(tally: Tally, n: int) -> dict[str, str | int]:
    return {
        "kind": tally.kind,
        "tries": n,
        "read": tally.n_read,
        "refused": tally.n_refused,
        "faults": tally.n_faults.total(),
        "seconds": round(tally.seconds),
    }


def _keep(tally: Tally, keep: Path) -> None:
    for told, count in tally.n_faults.most_common():
        folder = keep / tally.kind / re.sub(r"\W+", "-", told)
        write_files(folder, tally.faults[told])
        click.echo(f"{tally.kind}: {count} × {told}: {folder}", err=True)


if __name__ == "__main__":
    main(prog_name=Path(sys.argv[0]).name)
