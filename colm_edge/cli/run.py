"""`colm-edge run` and `chat`: answer one prompt, or chat."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.common import open_pair
from colm_edge.cli.options import (
    BRIDGE,
    LORA,
    MAX_MEMORY,
    OVERLAP,
    REQUIRED,
    RPC,
    SWITCH,
    TIMEOUT,
    decoding_options,
    model_options,
)
from colm_edge.cli.terminal import Chat, drain, reader, say_end, write

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.stream import Stream


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """Add PROMPT, passed as `prompt`, and every option that `run` and `chat` share."""

    @wraps(command)
    def with_prompt(*, words: tuple[str, ...], prompt: str | None, **given: Any) -> None:
        if words and prompt is not None:
            raise click.UsageError("give the prompt once: as PROMPT or with -p")
        prompt = " ".join(words) if words else prompt
        command(prompt=read_stdin() if prompt == "-" else prompt, **given)

    options = (
        click.argument("words", metavar="[PROMPT]", nargs=-1),
        click.option(
            "-p", "--prompt", help="The prompt, instead of PROMPT; either can be -: standard input."
        ),
        click.option("-sys", "--system-prompt", "system", help="System prompt."),
        click.option(
            "--no-history",
            is_flag=True,
            help="Do not keep what is typed in a chat for later chats, nor show earlier ones.",
        ),
        click.option(
            "--prompt-cache",
            metavar="FILE",
            type=click.Path(dir_okay=False),
            help="Save what both models have evaluated to this file, and start from it next time.",
        ),
        model_options(SWITCH, LORA, BRIDGE, RPC, OVERLAP, MAX_MEMORY, REQUIRED, TIMEOUT),
        decoding_options(),
    )
    for option in reversed(options):
        with_prompt = option(with_prompt)
    return with_prompt


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every token.")
@asking
def run(as_json: bool, prompt: str | None, no_history: bool, **given: Any) -> None:
    """Answer PROMPT, or chat when there is none."""
    if prompt is None and (sys.stdin is None or not sys.stdin.isatty()):
        prompt = read_stdin()
    if prompt is not None:
        answer(prompt, as_json, **given)
    elif as_json:
        raise click.UsageError("--json needs a prompt")
    else:
        converse(keep=not no_history, **given)


@click.command()
@asking
def chat(prompt: str | None, no_history: bool, **given: Any) -> None:
    """Chat in the terminal, after an answer to PROMPT if there is one."""
    first = () if prompt is None else (prompt,)
    converse(*first, keep=not no_history, **given)


def answer(prompt: str, as_json: bool, system: str | None, **given: Any) -> None:
    """Print one answer."""
    with opened(**given) as pair:
        stream = pair.stream(prompt, system=system)
        if as_json:
            interrupted = drain(stream)
            _end_line(interrupted)
            click.echo(json.dumps(describe(pair, stream), ensure_ascii=False))
        else:
            interrupted = write(stream)
            click.echo()
            _end_line(interrupted)
            say_end(stream.answer(), pair.defaults.max_tokens)
    if interrupted:
        raise SystemExit(130)


def _end_line(interrupted: bool) -> None:
    """End the line in which a terminal shows ^C, if the answer goes elsewhere."""
    if interrupted and sys.stderr.isatty() and not sys.stdout.isatty():
        click.echo(err=True)


def converse(*first: str, keep: bool, system: str | None, **given: Any) -> None:
    """Chat until the user leaves.

    first: what is asked before anything is typed.
    keep: whether what is typed is kept for later chats.
    """
    with opened(**given) as pair:
        Chat(pair, system, reader(keep=keep)).loop(*first)


def read_stdin() -> str:
    """Return all of standard input, without the newline that ends its last line."""
    if sys.stdin is None:  # a process can be started without one
        return ""
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    return text.removesuffix("\n").removesuffix("\r")


@contextmanager
def opened(
    models: dict[str, Any], decoding: dict[str, Any], prompt_cache: str | None
) -> Iterator[Pair]:
    """Load the pair that the options name, for texts from and to this terminal."""
    from colm_edge.options import Options

    for file in (sys.stdin, sys.stdout):  # a console may lack a character of the answer
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")
    with open_pair(models, defaults=Options(**decoding)) as pair, kept_prompts(pair, prompt_cache):
        yield pair


@contextmanager
def kept_prompts(pair: Pair, path: str | None) -> Iterator[None]:
    """Start from a prompt cache, if the file exists, and write it at the end."""
    from colm_edge.files import check_writable

    if path is None:
        yield
        return
    check_writable(path)
    pair.check_one_expert("a prompt cache")  # now, not after the answer
    _ = pair.expert_session  # raises now, too, if the expert is on a server
    if Path(path).is_file():
        pair.load_prompts(path)
    yield
    pair.save_prompts(path)


def describe(pair: Pair, stream: Stream) -> dict[str, Any]:
    """Return an answer as the object that --json prints."""
    answer = stream.answer()
    return {
        "model": str(pair.base.path),
        "expert": pair.expert.name if pair.room is None else names_of(pair),
        "switch": pair.switch.name,
        "threshold": answer.threshold,
        "prompt_tokens": answer.prompt_tokens,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": [step.record() for step in answer.steps],
        "withdrawn": [one.record() for one in answer.undone],
        "stats": answer.stats.record(),
    }


def names_of(pair: Pair) -> dict[str, str]:
    """Return the file, or the server's address, of each of several experts, by their names."""
    return {member.name: member.timeline.name for member in pair.members}
