"""From a name or a file to a switch: a new kind of switch is a line here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from colm_edge.llama.model import Model
from colm_edge.switch.file import Switch
from colm_edge.switch.onnx import load_onnx
from colm_edge.switch.reading import AnySwitch
from colm_edge.switch.rules import DeferRow, Untrained

SWITCHES: tuple[AnySwitch, ...] = (Untrained("margin"), Untrained("entropy"), DeferRow())
NAMED = {switch.name: switch for switch in SWITCHES}
# A file's suffix -> what opens it; any other is a GGUF file.
OPENERS: dict[str, Callable[[str | os.PathLike[str]], AnySwitch]] = {".onnx": load_onnx}


def load_switch(ref: str | os.PathLike[str]) -> AnySwitch:
    """Return the switch that a name (margin, entropy, defer-row) or a file stands for.

    Raises SwitchError when the file is missing or is not a switch.
    """
    if isinstance(ref, str) and ref in NAMED:
        return NAMED[ref]
    return OPENERS.get(Path(ref).suffix.lower(), Switch.load)(ref)


def warnings_of(switch: AnySwitch, models: Mapping[str, object]) -> Iterator[str]:
    """Yield a line for each model, by its role, that a trained switch was not fitted for. Servers
    do not tell their files."""
    for role, model in models.items():
        if not isinstance(switch, Switch) or not isinstance(model, Model):
            continue
        if not switch.is_for(role, model.fingerprint):
            yield (
                f"{switch.name} was fitted for another {role} than {model.path.name}: it may defer "
                "too much, too little or in the wrong places; `colm-edge train` fits one"
            )
