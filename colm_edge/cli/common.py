"""What commands share: loading a pair and a progress bar."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.terminal import note, say

if TYPE_CHECKING:
    from colm_edge.pair import Pair


def open_pair(models: dict[str, Any], **more: Any) -> Pair:
    """Load the models that the options name, and say on stderr if a default was used."""
    from colm_edge.pair import load

    loaded = load(**models, **more, note=note)
    if loaded.is_demo:
        say(
            "A demonstration pair (animals, elements, countries). "
            "Real models: -m BASE.gguf -me EXPERT.gguf"
        )
    if "switch" not in models and loaded.switch.name == "margin":
        say("No switch given (-sw): using margin, an untrained rule; `colm-edge train` fits one.")
    return loaded


def progress(name: str, total: int) -> Any:
    """Return a progress bar on stderr."""
    return click.progressbar(length=total, label=f"{name:>7}", file=sys.stderr, show_pos=True)
