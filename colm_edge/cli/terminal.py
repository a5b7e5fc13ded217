"""What `colm-edge run` shows: marked tokens, the summary, and a chat with /commands."""

from __future__ import annotations

import math
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, cycle
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cancel import Cancel, CancelledError
from colm_edge.cli.drafts import Drafts
from colm_edge.cli.keyboard import is_terminal, read_lines, unechoed
from colm_edge.decode.step import Drafted, Step
from colm_edge.errors import ColmError
from colm_edge.options import OPTIONS

if TYPE_CHECKING:
    from colm_edge.decode.step import Event, Stats
    from colm_edge.pair import Pair
    from colm_edge.stream import Answer, Stream


# What /set changes: the options of the command line that are a number or a word.
SETTINGS = {
    name: option
    for name, option in OPTIONS.items()
    if option.flags and option.kind in (int, float, str)
}
HELP = f"""\
/help, /?            show this list
/set                 show the settings and their values
/set NAME VALUE      change a setting; without VALUE: back to its value at the start
{fill(", ".join(SETTINGS), 76, initial_indent=" " * 21, subsequent_indent=" " * 21)}
/set system TEXT     change the system prompt
/show                show the models and the switch
/read FILE           ask with the text of a file
/regen               generate the last answer again
/clear               clear the conversation
/bye, /exit, /quit   leave (or Ctrl-D)
\"\"\"                  begin and end a message of several lines
Tab                  complete a command, a setting, or the file of /read
Up, Down, Ctrl-R     go back to earlier messages, search them
Ctrl-C               clear the line; in an answer: stop it, and keep what was generated"""
COMMANDS = sorted(set(re.findall(r"/[a-z]+", HELP)))
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
# /etc/hosts is none, and neither is a message of several lines.
COMMAND = re.compile(r"\s*/[a-zA-Z?]+([^\S\n].*)?\s*")
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")  # of experts
# When a conversation grows, 1 / ANSWER_SHARE of the context is kept free for the answer.
ANSWER_SHARE = 4
# Whether the terminal's cursor is inside an answer, and the drafts behind it.
_cursor = SimpleNamespace(inside=False, drafts=Drafts(0))


def say(text: str) -> None:
    """Print a line on stderr; stdout is for results."""
    click.echo(text, err=True)


def note(text: str) -> None:
    """Say that something takes a while, or warn, on a line of its own even inside an answer."""
    if _cursor.inside:
        click.echo(_cursor.drafts.interrupted())
    say(text)
    _cursor.inside = False


def columns_of(stream: Any) -> int:
    """Return the width of the terminal that a stream writes to; 80 where it is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def write(stream: Stream) -> bool:
    """Print steps as they come, marking the expert's on a terminal.

    Return whether Ctrl-C ended the stream.
    """
    live = is_terminal(sys.stdout)
    marked = live or bool(os.environ.get("FORCE_COLOR") and not os.environ.get("NO_COLOR"))
    drafts = _cursor.drafts = Drafts(0)
    colours = dict(zip(stream.experts, cycle(COLOURS), strict=False))

    def show(event: Event) -> None:
        if not live:
            if isinstance(event, Step):
                text = harmless(event.text) if sys.stdout.isatty() else event.text
                shown = mark(event, colours) if marked else text
                click.echo(shown, nl=False, color=marked)
            return
        drafts.width = columns_of(sys.stdout)
        if isinstance(event, Step):
            shown = drafts.step(harmless(event.text), mark(event, colours))
        elif isinstance(event, Drafted):
            shown = drafts.add(harmless(event.step.text))
        else:
            shown = drafts.undo(len(event.steps))
        click.echo(shown, nl=False)
        _cursor.inside = True

    try:
        with unechoed():
            return drain(stream, show)
    finally:
        click.echo(drafts.end(), nl=False)
        _cursor.inside = False


def drain(stream: Stream, show: Callable[[Event], object] = lambda event: None) -> bool:
    """Run a stream to its end; return whether Ctrl-C ended it. The steps so far are kept."""
    try:
        for event in stream.events():
            show(event)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):  # a second one while this closes it
            stream.close()
        return True
    return False


def mark(step: Step, colours: Mapping[str, str]) -> str:
    """Return a step's text; an expert's is coloured, and underlined to show without colour too."""
    text = harmless(step.text)
    if not step.by_expert or not text:
        return text
    colour = None if os.environ.get("NO_COLOR") else colours[step.source]
    return click.style(text, fg=colour, underline=True)


def legend(stats: Stats) -> str:
    """Return the names of several experts, as their tokens are marked, with what each wrote."""
    parts, plain = [], bool(os.environ.get("NO_COLOR"))
    for (source, expert), colour in zip(stats.experts.items(), cycle(COLOURS), strict=False):
        name = harmless(source.partition(":")[2])
        shown = click.style(name, fg=None if plain else colour, underline=True)
        parts.append(f"{shown} {expert.n_deferred} tokens, {expert.calls} calls")
    return "; ".join(parts)


def harmless(text: str) -> str:
    """Return a text without the control characters by which it could drive a terminal."""
    return CONTROLS.sub("", text)


def summary(stats: Stats) -> str:
    """Return the line printed below an answer."""

    def rate(n: int | None, seconds: float) -> str:
        return f"{n / seconds:,.0f}" if n and seconds > 0 else "-"

    expert_seconds = stats.expert_seconds - stats.expert_load_seconds
    evaluated = "?" if stats.expert_tokens is None else stats.expert_tokens
    undone = f"{stats.n_undone} undone, " if stats.n_undone else ""
    return (
        f"{stats.n_generated} tokens, {stats.defer_rate:.0%} deferred, {undone}"
        f"{stats.expert_calls} expert call{'s' * (stats.expert_calls != 1)} "
        f"({evaluated} tokens); "
        f"tok/s: base {rate(stats.base_tokens, stats.base_seconds)}, "
        f"expert {rate(stats.expert_tokens, expert_seconds)}, "
        f"overall {rate(stats.n_generated, stats.total_seconds)}"
    )


def say_end(answer: Answer, max_tokens: int) -> None:
    """Print what is below an answer: its statistics, and what cut it, if something did."""
    if _is_read_beside():
        say("")
    if answer.stats.experts:
        say(legend(answer.stats))
    line = summary(answer.stats)
    if answer.finish_reason == "length":
        by_limit = answer.stats.n_generated == max_tokens
        line += "; cut: " + ("the limit of tokens (-n)" if by_limit else "the context is full (-c)")
    say(line)


def _is_read_beside() -> bool:
    """Return whether another program reads the answer while stderr is a terminal: it may show the
    end of the answer there late, and what is said meanwhile would stand in the same line."""
    with suppress(OSError, ValueError):
        return sys.stderr.isatty() and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    return False


def shown_threshold(pair: Pair) -> str:
    """Return the threshold in words: a number, or the rate that it follows."""
    from colm_edge.decode.policy import running_rate

    rate = running_rate(pair.switch, pair.defaults)
    if rate is not None:
        return f"follows a defer rate of {rate:g}"
    return str(round(pair.threshold(pair.defaults), 3))


def reader(*, keep: bool) -> Callable[[], str | None]:
    """Return what reads a chat's messages: an editor at a terminal, plain lines elsewhere.

    keep: whether an editor keeps them for later chats.
    """
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        return read_lines
    from platformdirs import user_data_path

    from colm_edge.cli.editor import Editor

    history = None
    if keep:
        try:
            history = user_data_path("colm-edge", appauthor=False) / "history"
        except RuntimeError as e:  # nobody has a home here
            say(f"Messages are not kept for later chats: {e}")
    return Editor(following, history).read


def following(words: Sequence[str]) -> Iterable[str]:
    """Return the words that can follow those of a command."""
    match words:
        case []:
            return COMMANDS
        case ["/set"]:
            return (*SETTINGS, "system")
        case ["/set", name] if name in SETTINGS:
            return (*SETTINGS[name].choices, *SETTINGS[name].words)
    return ()


class Chat:
    """One conversation with a pair, typed at a terminal."""

    def __init__(
        self,
        pair: Pair,
        system: str | None = None,
        read: Callable[[], str | None] = read_lines,
    ) -> None:
        """read: returns the next message or command, None at the end."""
        self.pair = pair
        self.system = system
        self.turns: list[dict[str, str]] = []
        self._read = read
        self._at_start = pair.defaults

    def loop(self, *first: str) -> None:
        """Take first what is given, then what is typed, until /bye or the end of input."""
        say("Type a message, or /help for the commands.")
        for line in chain(first, iter(self._typed, None)):
            try:
                if not line.strip():
                    continue
                if not COMMAND.fullmatch(line):
                    self.ask(line)
                elif not self.command(line):
                    return
            except ColmError as e:
                say(f"Error: {e}")
            except KeyboardInterrupt:  # before an answer, or a second one at its end
                say("")

    def _typed(self) -> str | None:
        """Return what is typed next, None at the end of input; meanwhile, measure at length what
        was measured in a hurry."""
        cancel = Cancel()

        def work() -> None:
            with suppress(ColmError, CancelledError):
                self.pair.measure_at_length(cancel)

        threading.Thread(target=work, name="colm-edge-measure", daemon=True).start()
        try:
            return self._read()
        finally:
            cancel.request()

    def ask(self, text: str) -> None:
        """Answer a message and keep both as a turn; a message that fails is not kept."""
        user = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        kept = self._kept(system, user)
        stream = self.pair.stream_chat([*system, *kept, user])  # raises if it does not fit alone
        if forgotten := (len(self.turns) - len(kept)) // 2:
            say(f"(three quarters of the context are full: {forgotten} old turn(s) forgotten)")
        stopped = write(stream)
        answer = stream.answer()
        self.turns = [*kept, user, {"role": "assistant", "content": answer.text}]
        click.echo(" (stopped)" if stopped else "")
        say_end(answer, self.pair.defaults.max_tokens)

    def _kept(self, system: list[dict[str, str]], user: dict[str, str]) -> list[dict[str, str]]:
        """Return the turns that fit in front of a message; the oldest go first."""
        room, turns = self.pair.n_ctx - self.pair.n_ctx // ANSWER_SHARE, self.turns[:]
        while turns:
            messages = [*system, *turns, user]
            if len(self.pair.prompt_tokens(messages, raw=self.pair.defaults.raw)) <= room:
                break
            del turns[:2]
        return turns

    def command(self, line: str) -> bool:
        """Run a /command; return False to leave."""
        name, rest = (*line.split(None, 1), "")[:2]
        rest = rest.strip()
        match name.lower():
            case "/bye" | "/exit" | "/quit":
                return False
            case "/help" | "/?":
                say(HELP)
            case "/clear":
                self.turns.clear()
                say("The conversation is cleared.")
            case "/show":
                self._show()
            case "/set":
                self._set(rest.removeprefix("parameter "))
            case "/regen":
                self._regenerate()
            case "/read":
                self.ask(self._text_of(rest))
            case _:
                raise ColmError(f"no command {name}; /help lists them")
        return True

    def _show(self) -> None:
        pair = self.pair
        say(f"base    {pair.base.path}")
        for member in pair.members:
            say(f"{member.source:7} {member.timeline.name}")
        say(f"switch  {pair.switch.name}, threshold {shown_threshold(pair)}")
        if (nats := pair.review(pair.defaults)) < math.inf:
            say(f"review  {nats:g} nats")
        say(f"context {pair.n_ctx} tokens")

    def _regenerate(self) -> None:
        if not self.turns:
            raise ColmError("there is no answer yet; ask something first")
        before = self.turns
        shorter = self.turns = before[:-2]
        try:
            self.ask(before[-2]["content"])
        finally:
            if self.turns is shorter:  # nothing took the place of the last answer
                self.turns = before

    @staticmethod
    def _text_of(file: str) -> str:
        if not file:
            raise ColmError("/read needs the name of a file")
        try:
            return Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, RuntimeError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or e
            raise ColmError(f"cannot read {file!r} ({why}); give a text file") from e

    def _set(self, change: str) -> None:
        """Show the settings, or change one: NAME VALUE; NAME alone resets it."""
        name, value = (*change.strip().split(None, 1), "", "")[:2]
        if not name:
            self._show_settings()
        elif name == "system":
            self.system = value.strip('"') if value else None
            say("system prompt removed" if self.system is None else f"system {self.system}")
        elif name not in SETTINGS:
            raise ColmError(f"no setting {name}; known: {', '.join(SETTINGS)}, system")
        else:
            self._change(name, value)

    def _show_settings(self) -> None:
        values = {name: self._shown(name) for name in SETTINGS} | {"system": self.system}
        for name, value in values.items():
            say(f"{name:17} {'' if value is None else value}".rstrip())

    def _change(self, name: str, text: str) -> None:
        option = SETTINGS[name]
        try:
            value = option.parse(text) if text else getattr(self._at_start, name)
        except ValueError as e:
            kind = "whole number" if option.kind is int else "number"
            kind += "".join(f", or {word}" for word in option.words)
            raise ColmError(f"{name} is {text!r}; expected a {kind}") from e
        changed = {name: value}
        if not text and name in ("threshold", "defer_rate"):  # one of them took the other's place
            changed = {both: getattr(self._at_start, both) for both in ("threshold", "defer_rate")}
        settings = self.pair.defaults.with_changes(**changed)
        self.pair.check_options(settings)  # now, not at the next message
        self.pair.defaults = settings
        shown = self._shown(name)
        say(f"{name} {'is not set' if shown is None else shown}")

    def _shown(self, name: str) -> Any:
        """Return the value of a setting; if it isn't set, what the switch says, if it does."""
        pair = self.pair
        if name == "threshold":
            return shown_threshold(pair)
        value = pair.review(pair.defaults) if name == "review" else getattr(pair.defaults, name)
        return SETTINGS[name].shown(value)
