"""From a name or a file to a switch: a new kind of switch is a line here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from colm_edge.errors import MismatchError
from colm_edge.llama.model import Model
from colm_edge.switch.file import Switch, role_of
from colm_edge.switch.onnx import load_onnx
from colm_edge.switch.reading import AnySwitch
from colm_edge.switch.rules import RULES, DeferRow, Untrained

E = TypeVar("E")
SWITCHES: tuple[AnySwitch, ...] = (*map(Untrained, RULES), DeferRow())
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


def in_order(switch: AnySwitch, experts: Mapping[str, E]) -> dict[str, E]:
    """Return the experts by their names in the order of the switch's rows.

    Raises MismatchError for another number of experts than the switch chooses among, or others by
    name.
    """
    if not isinstance(switch, Switch):
        if len(experts) > 1:
            raise MismatchError(
                f"{switch.name} says when to defer, and not to which of {len(experts)} experts; "
                "train a switch for them (`colm-edge train`), or give one expert"
            )
        return dict(experts)
    known = switch.expert_names
    if len(experts) != switch.n_experts or (known and sorted(known) != sorted(experts)):
        wanted = f"experts named {', '.join(known)}" if known else f"{switch.n_experts} experts"
        wanted = "one expert" if switch.n_experts == 1 else wanted
        given = ", ".join(filter(None, experts)) or "one"
        raise MismatchError(
            f"{switch.name} chooses among {wanted}, and {given} is given; give -me NAME=FILE for "
            "each, or another switch"
        )
    return {name: experts[name] for name in known} if known else dict(experts)


def check_rule(ref: str | None, experts: Mapping[str, object] | None) -> None:
    """Raise MismatchError, before any model is read, where a rule is to choose among several
    experts. ref: of a switch; None stands for margin."""
    if ref is None or ref in NAMED:
        in_order(NAMED[ref or "margin"], experts or {})


def warnings_of(switch: AnySwitch, base: object, experts: Mapping[str, object]) -> Iterator[str]:
    """Yield a line for each model that a trained switch was not fitted for. Servers do not tell
    their files."""
    roles = {"base": base} | {role_of(name): model for name, model in experts.items()}
    for role, model in roles.items():
        if not isinstance(switch, Switch) or not isinstance(model, Model):
            continue
        if not switch.is_for(role, model.fingerprint):
            yield (
                f"{switch.name} was fitted for another {role} than {model.path.name}: it may defer "
                "too much, too little or in the wrong places; `colm-edge train` fits one"
            )
