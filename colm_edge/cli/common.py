"""What commands share: loading a pair and a progress bar."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.terminal import columns_of, note, say
from colm_edge.errors import WriteError

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


def file_of(reference: str, role: str, models: dict[str, Any]) -> str:
    """Return the file that an option names, in any of the ways in which -m and -sw name theirs."""
    from colm_edge.references import resolve

    return resolve(reference, role, offline=models.get("offline", False), note=note)


def keeping_models(pair: Pair, outfile: str) -> Pair:
    """Return a pair; where a result would replace one of its models, close it and raise
    WriteError."""
    from colm_edge.files import check_writable
    from colm_edge.llama.model import Model

    models = [pair.base, *(member.model for member in pair.members)]
    read = [file for model in models if isinstance(model, Model) for file in model.files]
    try:
        check_writable(outfile, *read)
    except WriteError:
        pair.close()
        raise
    return pair


def progress(name: str, total: int) -> Any:
    """Return a progress bar on stderr, as wide as the terminal leaves room for; one that is wrapped
    would be repeated at each step."""
    beside = len(f"{name:>7}  [] {total}/{total} 100% 00:00:00")
    width = max(5, min(36, columns_of(sys.stderr) - beside - 1))
    return click.progressbar(
        length=total, label=f"{name:>7}", file=sys.stderr, show_pos=True, width=width
    )
