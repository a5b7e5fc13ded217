"""Kill commands at random moments, run them again, and compare with a run that was left alone.

    python tools/kills.py                    # 20 kills of each command with the demo pair
    python tools/kills.py score pull -k 5    # of these alone

Each kill is a SIGKILL at a moment drawn evenly from the time that the command takes, in a folder of
its own. Then the same command runs to its end. Equal must be: the files of `train`, `score` and
`quantize` to the byte, the Hub's cache of `pull`, and all that commands print except for what was
measured in seconds. Beside the result nothing may be left but the work folder, with answers and
scores. A line for each command says how many kills had something in the folder by then, and what
differed in the end.

Answers are written one at a time (-np 1): of several at once, two runs left alone differ too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from lib.local_hub import local_hub
from lib.random_model import shape_of, write_model
from lib.rows import write_rows

HOME = Path(__file__).parents[1]
MODELS = HOME / "colm_edge" / "data"
DATA = HOME / "tests" / "data" / "demo_heldout.jsonl"
# What differs from run to run, because it is measured.
MEASURED = {"review", "tokens_per_second"}
# Runs the command, and counts what it does to files below its folder; killed at that one.
LAUNCH = """
import os, signal, sys
at, n, here = int(sys.argv.pop(1)), 0, os.getcwd()
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir")

def changes(event, args):
    if event != "open" and event not in EVENTS or isinstance(args[0], int):
        return False
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return False
    return os.path.abspath(os.fsdecode(args[0])).startswith(here)

def hook(event, args):
    global n
    if changes(event, args):
        n += 1
        if n == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
from colm_edge.cli import main
try:
    main()
finally:
    if not at:
        print(n, file=sys.stderr)
"""


@dataclass(frozen=True)
class Case:
    """A command, and the files that it must leave equal. kept: what else it may leave."""

    name: str
    args: list[str]
    files: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a command has left: the bytes of its files and folders, what it printed, and what is
    there.

    n_events: how many things it did to files below its folder.
    """

    files: tuple[Any, ...]
    printed: Any
    left: tuple[str, ...]
    n_events: int


def cases(n_lines: int, source: Path, base: Path, expert: Path) -> list[Case]:
    """Return the commands. They read d.jsonl in the folder above theirs."""
    pair = ["-m", str(base), "-me", str(expert), "-t", "1"]
    data, short = ["--data", "../d.jsonl"], ["-n", "24", "-np", "1"]
    return [
        Case(
            "train",
            ["train", *data, *pair, "--work-dir", "work", "--outfile", "s.gguf"],
            ("s.gguf",),
            ("work",),
        ),
        Case(
            "train --prompts",
            ["train", "--prompts", "../p.jsonl", *short, *pair, "--outfile", "s.gguf"],
            ("s.gguf",),
            ("s.gguf.work",),
        ),
        Case(
            "score",
            ["score", *data, *pair, "--work-dir", "work", "--outfile", "e.npz"],
            ("e.npz",),
            ("work",),
        ),
        Case(
            "eval",
            ["eval", *data, *pair, "--limit", str(max(2, n_lines // 8)), "--metric", "contains",
             "--methods", "base,expert,colm", *short, "--work-dir", "work", "-o", "json"],
            (),
            ("work",),
        ),
        Case("quantize", ["quantize", str(source), "q.gguf", "Q4_0", "-t", "1"], ("q.gguf",)),
        Case("pull", ["pull", "them/model:m.gguf"], ("hub",), ("hub",)),
    ]  # fmt: skip


class Trials:
    """Runs commands in folders of their own."""

    def __init__(self, folder: Path, hub_url: str) -> None:
        self._folder, self._n = folder, 0
        self._env = os.environ | {
            "HF_ENDPOINT": hub_url,
            "HF_HUB_CACHE": "hub",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    @contextmanager
    def new(self) -> Iterator[Path]:
        """Give a new folder, and remove it at the end."""
        self._n += 1
        made = self._folder / str(self._n)
        made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made)

    def run(self, case: Case, folder: Path) -> Outcome:
        """Run a command to its end, and return what it left. Raises RuntimeError if it fails."""
        done = self._start(case, folder, 0)
        printed, told = done.communicate()
        if done.returncode:
            raise RuntimeError(f"{case.name}: {told.decode('utf-8', 'replace')}")
        return Outcome(
            tuple(_content(folder / name) for name in case.files),
            _comparable(printed.decode(), folder),
            tuple(sorted({str(p.relative_to(folder)) for p in _files(folder)})),
            int(told.split()[-1]),
        )

    def kill(self, case: Case, folder: Path, *, seconds: float = 0.0, event: int = 0) -> bool:
        """Start a command and kill it, after some seconds or before the n-th thing that it does to
        a file; return whether it ran still."""
        begun = self._start(case, folder, event)
        try:
            begun.communicate(timeout=seconds or None)
        except subprocess.TimeoutExpired:
            begun.kill()
            begun.communicate()
        return begun.returncode < 0

    def _start(self, case: Case, folder: Path, event: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(event), *case.args],
            cwd=folder, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def _content(path: Path) -> Any:
    """Return a file's bytes, those of all files in a folder by their names, or None."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in _files(path)}
    return path.read_bytes() if path.exists() else None


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but locks, which stay."""
    for path in folder.rglob("*"):
        if (path.is_symlink() or path.is_file()) and not path.name.endswith(".lock"):
            yield path


def _comparable(printed: str, folder: Path) -> Any:
    """Return what was printed without what was measured, and without the folder's name."""
    printed = printed.replace(str(folder), "")
    try:
        return _without(json.loads(printed.splitlines()[-1] if printed else "null"))
    except ValueError:
        return printed


def _without(told: Any) -> Any:
    if isinstance(told, list):
        return [_without(one) for one in told]
    if isinstance(told, dict):
        return {name: _without(value) for name, value in told.items() if name not in MEASURED}
    return told


def difference(case: Case, alone: Outcome, again: Outcome) -> str:
    """Return what differs, "" if nothing does."""
    if again.files != alone.files:
        return "another file"
    if again.printed != alone.printed:
        return f"printed {again.printed}, alone {alone.printed}"
    more = [name for name in again.left if name not in alone.left]
    # A work folder's answers may be in another order, and its names are the run's own.
    more = [name for name in more if case.name == "pull" or name.split("/")[0] not in case.kept]
    return f"left {', '.join(more)}" if more else ""


def trial(
    trials: Trials, case: Case, alone: Outcome, kill: Callable[[Path], bool]
) -> tuple[bool, bool, str]:
    """Kill a command and run it again; return whether it was killed, whether it had left something
    by then, and what differs."""
    with trials.new() as folder:
        killed = kill(folder)
        begun = any(_files(folder))
        return killed, begun, difference(case, alone, trials.run(case, folder))


@contextmanager
def prepared(n_lines: int, base: Path, expert: Path, size: int) -> Iterator[tuple[Trials, Any]]:
    """Give trials in a temporary folder, the commands by name, with a model of about `size`
    parameters to quantise, which is also what the Hub has."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = DATA.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines[: max(8, n_lines // 4)]]
        (folder / "d.jsonl").write_text("".join(lines[i % len(lines)] for i in range(n_lines)))
        write_rows(folder / "p.jsonl", ({"prompt": row["prompt"]} for row in rows))
        write_model(folder / "f32.gguf", shape_of(f"{size}M") if size else shape_of("tiny"))
        content = (folder / "f32.gguf").read_bytes()
        with local_hub(content, wait=0.005 if size else 0.0) as hub:
            found = cases(n_lines, folder / "f32.gguf", base, expert)
            yield Trials(folder, hub.url), {case.name: case for case in found}


NAMES = [case.name for case in cases(0, Path(), Path(), Path())]


@click.command(
    help=(__doc__ or "").split("\n", maxsplit=1)[0],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("-k", "--kills", default=20, show_default=True, help="Kills of each command.")
@click.option("-s", "--seed", default=0, show_default=True)
@click.option("--lines", "n_lines", default=768, show_default=True, help="Lines of data.")
@click.option("--size", default=30, show_default=True, help="Million parameters to quantise.")
@click.option("-m", "--model", "base", type=Path, default=MODELS / "base.gguf")
@click.option("-me", "--model-expert", "expert", type=Path, default=MODELS / "expert.gguf")
def main(
    names: tuple[str, ...],
    kills: int,
    seed: int,
    n_lines: int,
    size: int,
    base: Path,
    expert: Path,
) -> None:
    draw, wrong = random.Random(seed), 0
    with prepared(n_lines, base.resolve(), expert.resolve(), size) as (trials, known):
        for name in names or NAMES:
            case = known[name]
            with trials.new() as folder:
                trials.run(case, folder)  # measures what decodes cost, which is kept
            with trials.new() as folder:
                begun = perf_counter()
                alone = trials.run(case, folder)
                took = perf_counter() - begun
            found: list[tuple[bool, str]] = []
            while len(found) < kills:
                killed, begun_files, text = trial(
                    trials, case, alone, partial(trials.kill, case, seconds=draw.uniform(0, took))
                )
                if killed:  # and not ended before
                    found.append((begun_files, text))
            differ = [text for _, text in found if text]
            wrong += len(differ)
            click.echo(
                f"{name}: {took:.1f} s alone; {kills} kills, {sum(there for there, _ in found)} "
                f"with files there; {len(differ)} differ"
                f"{': ' + '; '.join(sorted(set(differ))) if differ else ''}"
            )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
