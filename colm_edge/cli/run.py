"""`colm-edge run`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.options import (
    decoding_options,
    model_options,
)
from colm_edge.cli.terminal import Chat, drain, summary, write

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.stream import Stream
from colm_edge.cli.common import open_pair


@click.command()
@click.argument("words", metavar="[PROMPT]", nargs=-1)
@click.option("-p", "--prompt", help="The prompt; without one, standard input or a chat.")
@click.option("-sys", "--system-prompt", "system", help="A system prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every token.")
@click.option(
    "--prompt-cache", metavar="FILE", type=click.Path(dir_okay=False),
    help="Keep what both models evaluated here, and begin with it the next time.",
)  # fmt: skip
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
    # A process may be started without a standard input.
    chatting = prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if chatting and as_json:
        raise click.UsageError("--json needs a prompt")
    if prompt is None and not chatting:
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace") if sys.stdin else ""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console may lack a character of the answer
    with ExitStack() as stack:
        loaded = stack.enter_context(open_pair(models, defaults=Options(**decoding)))
        if prompt_cache is not None:
            stack.enter_context(kept_prompts(loaded, prompt_cache))
        if prompt is None:
            Chat(loaded, system).loop()
            return
        stream = loaded.stream(prompt, system=system)
        if as_json:
            interrupted = drain(stream)
            click.echo(json.dumps(describe(loaded, stream), ensure_ascii=False))
        else:
            interrupted = write(stream)
            click.echo()
            click.echo(summary(stream.answer().stats), err=True)
        if interrupted:
            raise SystemExit(130)


@contextmanager
def kept_prompts(pair: Pair, path: str) -> Iterator[None]:
    """Begin with a prompt cache, if the file is there, and write it at the end."""
    _ = pair.expert_session  # an expert on a server has nothing to keep: said before the answer
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
        "tokens": [
            {"id": s.token, "text": s.text, "source": s.source, "p_defer": s.p_defer}
            for s in answer.steps
        ],
        "stats": asdict(answer.stats),
    }
