"""`colm-edge run`: answer one prompt, or chat."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.common import open_pair
from colm_edge.cli.options import decoding_options, model_options
from colm_edge.cli.terminal import Chat, drain, say, summary, write

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.stream import Stream


@click.command()
@click.argument("words", metavar="[PROMPT]", nargs=-1)
@click.option(
    "-p",
    "--prompt",
    help="Prompt to answer; without it or PROMPT, standard input or a chat.",
)
@click.option("-sys", "--system-prompt", "system", help="System prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every token.")
@click.option(
    "--prompt-cache",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Save what both models have evaluated to this file, and start from it next time.",
)
@model_options
@decoding_options()
def run(
    words: tuple[str, ...],
    prompt: str | None,
    system: str | None,
    as_json: bool,
    prompt_cache: str | None,
    models: dict[str, Any],
    decoding: dict[str, Any],
) -> None:
    """Answer PROMPT, or chat when there is none."""
    from colm_edge.options import Options

    if words and prompt is not None:
        raise click.UsageError("give the prompt once: as PROMPT or with -p")
    prompt = " ".join(words) if words else prompt
    if prompt is None:
        prompt = read_stdin()
    if prompt is None and as_json:
        raise click.UsageError("--json needs a prompt")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console may lack a character of the answer
    with open_pair(models, defaults=Options(**decoding)) as pair, kept_prompts(pair, prompt_cache):
        if prompt is None:
            Chat(pair, system).loop()
            return
        stream = pair.stream(prompt, system=system)
        if as_json:
            interrupted = drain(stream)
            click.echo(json.dumps(describe(pair, stream), ensure_ascii=False))
        else:
            interrupted = write(stream)
            click.echo()
            say(summary(stream.answer().stats))
        if interrupted:
            raise SystemExit(130)


def read_stdin() -> str | None:
    """Return standard input, None if it is a terminal."""
    if sys.stdin is None:  # a process can be started without one
        return ""
    return None if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")


@contextmanager
def kept_prompts(pair: Pair, path: str | None) -> Iterator[None]:
    """Start from a prompt cache, if the file exists, and write it at the end."""
    if path is None:
        yield
        return
    _ = pair.expert_session  # raises now, not after the answer, if the expert is on a server
    if Path(path).exists():
        pair.load_prompts(path)
    yield
    pair.save_prompts(path)


def describe(pair: Pair, stream: Stream) -> dict[str, Any]:
    """Return an answer as the object that --json prints."""
    answer = stream.answer()
    return {
        "model": str(pair.base.path),
        "expert": pair.expert.name,
        "switch": pair.switch.name,
        "threshold": answer.threshold,
        "prompt_tokens": answer.prompt_tokens,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": [step.record() for step in answer.steps],
        "withdrawn": [one.record() for one in answer.undone],
        "stats": asdict(answer.stats),
    }
