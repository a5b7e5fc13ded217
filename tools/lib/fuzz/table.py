"""Every kind of file that the fuzz tool mutates: a new module of kinds is a line here."""

from __future__ import annotations

from lib.fuzz import foreign, models, plain, scored, sessions
from lib.fuzz.kind import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for module in (plain, scored, sessions, foreign, models)
    for kind in module.KINDS
}
