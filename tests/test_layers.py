"""The layout: what each floor of the package may import, and how large its parts may grow."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
ROOT = HOME / "colm_edge"
# From the ground up: a module imports what stands before its own floor, and its own package.
FLOORS = (
    "errors", "cancel", "files", "arrays", "npy_files", "gguf_header", "journal", "tables",
    "options", "readout", "hub", "llama", "references", "switch", "remote", "decode", "team",
    "stream", "pair", "info", "slots", "together", "train", "evaluate", "bench", "serve", "cli",
)  # fmt: skip
# The public names, which stand for modules of every floor.
FACES = ("__init__", "__main__", "_pyinstaller")
MODULES = [
    path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "_pyinstaller"
]
SCRIPTS = sorted((HOME / "tools").rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 500, 60
FLAT_TABLES = ("load",)  # of options, each with its line in the docstring


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a module imports anywhere, for its types too."""
    known, found = {name_of(p) for p in MODULES}, set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "colm_edge":
            module = (node.module or "").removeprefix("colm_edge").lstrip(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}".lstrip(".")
                found.add(whole if whole in known else module)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("colm_edge.") for alias in node.names
                if alias.name.startswith("colm_edge.")
            }  # fmt: skip
    return found - {""}


def test_every_module_has_a_floor():
    floors = {name_of(path).split(".")[0].removesuffix(".py") for path in MODULES}
    assert floors - set(FACES) == set(FLOORS)


def test_no_module_imports_from_a_higher_floor():
    upward = [
        f"{name_of(path)} -> {other}"
        for path in MODULES
        for other in imports_of(path)
        if (mine := name_of(path).split(".")[0]) not in FACES
        and FLOORS.index(other.split(".")[0]) > FLOORS.index(mine)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): imports_of(path) for path in MODULES if name_of(path) not in FACES}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


SOURCES = [
    *MODULES, *SCRIPTS, *(HOME / "tests").rglob("*.py"), HOME / "native" / "switch.c",
]  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(HOME)))
def test_files_stay_small_or_say_why(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    first_comment = "\n".join(lines[:10])
    assert len(lines) <= MOST_LINES or re.search(r"\b\d+ lines\b", first_comment)


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(HOME)))
def test_functions_stay_small(path):
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES
        and node.name not in FLAT_TABLES
    ]
    assert long == []
