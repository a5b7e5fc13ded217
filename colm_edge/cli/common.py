"""What commands share: their errors, opening a pair, a progress bar."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.terminal import note

if TYPE_CHECKING:
    from colm_edge.pair import Pair


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


def progress(name: str, total: int) -> Any:
    """Return a progress bar on stderr."""
    return click.progressbar(length=total, label=f"{name:>7}", file=sys.stderr, show_pos=True)
