"""From a name or a file to a switch."""

from __future__ import annotations

import os

from colm_edge.switch.file import Switch
from colm_edge.switch.onnx import OnnxSwitch
from colm_edge.switch.rules import DeferRow, Untrained

AnySwitch = Switch | Untrained | DeferRow | OnnxSwitch


def load_switch(ref: str | os.PathLike[str]) -> AnySwitch:
    """Return the switch that a name (margin, entropy, defer-row) or a file stands for."""
    if ref in ("margin", "entropy"):
        return Untrained(str(ref))
    if ref == "defer-row":
        return DeferRow()
    if os.fspath(ref).lower().endswith(".onnx"):
        return OnnxSwitch.load(ref)
    return Switch.load(ref)
