"""What `colm-edge run` shows: marked tokens, the summary, and a chat with /commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from colm_edge.errors import ColmError
from colm_edge.options import OPTIONS

if TYPE_CHECKING:
    from colm_edge.decode.loop import Stats, Step
    from colm_edge.pair import Pair
    from colm_edge.stream import Stream


# What /set changes: the options of the command line that are a number or a word.
SETTINGS = {
    name: option.kind
    for name, option in OPTIONS.items()
    if option.flags and option.kind in (int, float, str)
}
HELP = f"""\
/help, /?            this list
/set                 the settings and their values
/set NAME VALUE      change one; without VALUE: as at the start
{fill(", ".join(SETTINGS), 76, initial_indent=" " * 21, subsequent_indent=" " * 21)}
/set system TEXT     the system prompt
/show                the models and the switch
/read FILE           ask with a file's text
/regen               write the last answer again
/clear               forget the conversation
/bye, /exit, /quit   leave (or Ctrl-D)
\"\"\"                  begins and ends a prompt of several lines
Ctrl-C stops an answer and keeps what was written."""
_cursor = SimpleNamespace(inside=False)  # whether the terminal's stands inside an answer


def write(stream: Stream) -> bool:
    """Print steps as they come, the expert's marked on a terminal; say whether Ctrl-C ended it."""
    marked = sys.stdout.isatty()

    def show(step: Step) -> None:
        click.echo(mark(step) if marked else step.text, nl=False)
        _cursor.inside = marked

    try:
        return drain(stream, show)
    finally:
        _cursor.inside = False


def note(text: str) -> None:
    """Print what takes a while on stderr, on a line of its own."""
    click.echo(("\n" if _cursor.inside else "") + f"{text} …", err=True)
    _cursor.inside = False


def drain(stream: Stream, show: Callable[[Step], object] = lambda step: None) -> bool:
    """Take a stream's steps to its end; say whether Ctrl-C ended it, which keeps what there is."""
    try:
        for step in stream:
            show(step)
    except KeyboardInterrupt:
        stream.close()
        return True
    return False


def mark(step: Step) -> str:
    """Return a step's text; the expert's in colour and underlined, to read without colour too."""
    if step.source == "base" or not step.text:
        return step.text
    return click.style(step.text, fg="cyan", underline=True)


def summary(stats: Stats) -> str:
    """Return the line that stands under an answer."""

    def rate(n: int, seconds: float) -> str:
        return f"{n / seconds:,.0f}" if n and seconds > 0 else "-"

    expert_seconds = stats.expert_seconds - stats.expert_load_seconds
    return (
        f"{stats.n_generated} tokens, {stats.defer_rate:.0%} deferred, "
        f"{stats.expert_calls} expert call{'s' * (stats.expert_calls != 1)} "
        f"({stats.expert_tokens} tokens); "
        f"tok/s: base {rate(stats.base_tokens, stats.base_seconds)}, "
        f"expert {rate(stats.expert_tokens, expert_seconds)}, "
        f"overall {rate(stats.n_generated, stats.total_seconds)}"
    )


# This part of the context is kept for the answer when a conversation grows.
ANSWER_SHARE = 4


class Chat:
    """One conversation with a pair, typed at a terminal."""

    def __init__(self, pair: Pair, system: str | None = None) -> None:
        self.pair = pair
        self.system = system
        self.turns: list[dict[str, str]] = []
        self._at_start = pair.defaults

    def loop(self) -> None:
        """Read lines until /bye or the end of input."""
        self._edit_lines()
        click.echo("Ask something, or /help for the commands.", err=True)
        while (line := self._read()) is not None:
            try:
                if not line.strip():
                    continue
                if not line.startswith("/"):
                    self.ask(line)
                elif not self.command(line):
                    return
            except ColmError as e:
                click.echo(f"Error: {e}", err=True)

    @staticmethod
    def _edit_lines() -> None:
        with suppress(ImportError):  # on Windows the console edits lines itself
            import readline  # noqa: F401  (input() then edits lines and keeps a history)

    @staticmethod
    def _read() -> str | None:
        """Return one prompt, None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                line = input("... " if lines else ">>> ")
            except EOFError:
                click.echo()
                return None
            except KeyboardInterrupt:
                lines = []
                click.echo("\nUse Ctrl-D or /bye to leave.", err=True)
                continue
            if not lines and not line.startswith('"""'):
                return line
            lines.append(line)
            text = "\n".join(lines)
            if len(text) >= 6 and text.endswith('"""'):
                return text[3:-3].strip("\n")

    def ask(self, text: str) -> None:
        """Add a turn, write the answer, keep both; a prompt that fails leaves no trace."""
        user = {"role": "user", "content": text}
        stream = self.pair.stream_chat(self._messages(user))
        stopped = write(stream)
        answer = stream.answer()
        click.echo(" (stopped)" if stopped else "")
        click.echo(summary(answer.stats), err=True)
        self.turns += [user, {"role": "assistant", "content": answer.text}]

    def _messages(self, user: dict[str, str]) -> list[dict[str, str]]:
        """Return the conversation with a new turn, the oldest turns forgotten if it must fit."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        room = self.pair.n_ctx - self.pair.n_ctx // ANSWER_SHARE
        forgotten = 0
        while self.turns:
            messages = [*system, *self.turns, user]
            if len(self.pair.prompt_tokens(messages, raw=self.pair.defaults.raw)) <= room:
                break
            del self.turns[:2]
            forgotten += 1
        if forgotten:
            click.echo(f"(the context is full: {forgotten} old turn(s) forgotten)", err=True)
        return [*system, *self.turns, user]

    def command(self, line: str) -> bool:
        """Carry out a /command; False means leave."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/bye" | "/exit" | "/quit":
                return False
            case "/help" | "/?":
                click.echo(HELP, err=True)
            case "/clear":
                self.turns.clear()
                click.echo("The conversation is forgotten.", err=True)
            case "/show":
                click.echo(
                    f"base    {self.pair.base.path}\nexpert  {self.pair.expert_name}\n"
                    f"switch  {self.pair.switch.name}, threshold "
                    f"{self.pair.threshold(self.pair.defaults):.3f}\n"
                    f"context {self.pair.n_ctx} tokens",
                    err=True,
                )
            case "/set":
                self._set(rest)
            case "/regen":
                if not self.turns:
                    raise ColmError("there is no answer yet; ask something first")
                last = self.turns[-2:]
                del self.turns[-2:]
                try:
                    self.ask(last[0]["content"])
                except ColmError:
                    self.turns += last
                    raise
            case "/read":
                if not rest:
                    raise ColmError("/read needs a file's name")
                try:
                    text = Path(rest).expanduser().read_text(encoding="utf-8")
                except (OSError, RuntimeError, UnicodeDecodeError) as e:
                    raise ColmError(f"cannot read {rest!r} ({e}); give a text file") from e
                self.ask(text)
            case _:
                raise ColmError(f"no command {name}; /help lists them")
        return True

    def _set(self, rest: str) -> None:
        name, _, value = rest.removeprefix("parameter ").partition(" ")
        if not name:
            defaults = self.pair.defaults
            values = {key: getattr(defaults, key) for key in SETTINGS}
            # The one in force, wherever it comes from.
            values["threshold"] = f"{self.pair.threshold(defaults):.3f}"
            values["system"] = self.system
            lines = [f"{key:15} {'' if v is None else v}" for key, v in values.items()]
            click.echo("\n".join(lines), err=True)
            return
        if name == "system":
            self.system = value.strip().strip('"') or None
            click.echo(f"system {self.system or 'prompt removed'}", err=True)
            return
        if name not in SETTINGS:
            raise ColmError(f"no setting {name}; known: {', '.join(SETTINGS)}, system")
        try:
            converted: Any = SETTINGS[name](value) if value else getattr(self._at_start, name)
        except ValueError as e:
            kind = "whole number" if SETTINGS[name] is int else "number"
            raise ColmError(f"{name} is {value!r}; expected a {kind}") from e
        self.pair.defaults = self.pair.defaults.with_changes(**{name: converted})
        shown = self.pair.threshold(self.pair.defaults) if name == "threshold" else converted
        click.echo(f"{name} {shown}", err=True)
