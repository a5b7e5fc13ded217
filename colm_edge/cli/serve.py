"""`colm-edge serve`: the OpenAI-compatible server and its web page."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

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
    Number,
    Whole,
    decoding_options,
    model_options,
)
from colm_edge.cli.terminal import say
from colm_edge.errors import ColmError
from colm_edge.options import ServerOptions

SERVER = ServerOptions()
API_KEY_VARIABLE = "COLM_EDGE_API_KEY"
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+")
HOST = re.compile(r"[^:/?#@\s]+|[0-9a-f.]*(:[0-9a-f.]*){2,}")  # a name, or an address in IPv6


def matching(form: re.Pattern[str], expected: str) -> Callable[..., tuple[str, ...]]:
    """Return a callback that refuses values which no request could ever have."""

    def check(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not form.fullmatch(value.lower()):
                raise click.BadParameter(f"{value!r}: expected {expected}")
        return values

    return check


@click.command("serve")
@click.option(
    "--host",
    default=SERVER.host,
    show_default=True,
    help="Address to listen on; 0.0.0.0: all networks.",
)
@click.option(
    "--port",
    type=Whole(0, 65535),
    default=SERVER.port,
    show_default=True,
    help="Port to listen on; 0: any free one.",
)
@click.option(
    "-np",
    "--parallel",
    "n_slots",
    type=Whole(1, 64),
    default=SERVER.n_slots,
    show_default=True,
    help="Answers generated at once; each has a context of -c tokens.",
)
@click.option(
    "--queue",
    type=Whole(0),
    default=SERVER.queue,
    show_default=True,
    help="Requests that may wait for a slot; any more get status 503.",
)
@click.option(
    "--api-key",
    envvar=API_KEY_VARIABLE,
    metavar="KEY",
    help=f"Require this key with every request; in the environment variable {API_KEY_VARIABLE} it "
    "stays out of the process list.",
)
@click.option(
    "--cors-origin",
    "cors",
    multiple=True,
    callback=matching(ORIGIN, "http://host or http://host:port"),
    metavar="ORIGIN",
    help="Site whose pages may send requests, such as http://localhost:3000; repeatable.  "
    "[default: none]",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    callback=matching(HOST, "a name alone, without http:// and a port"),
    metavar="NAME",
    help="Name besides the local ones that requests may give as their host, such as a container's "
    "or a proxy's; repeatable.",
)
@click.option(
    "--max-tokens",
    "most_tokens",  # the decoding option -n has the other name
    type=Whole(1),
    default=SERVER.max_tokens,
    show_default=True,
    help="Maximum number of tokens of an answer, whatever the request asks for.",
)
@click.option(
    "--expert-idle-unload",
    type=Number(0),
    default=SERVER.expert_idle_unload,
    metavar="SECONDS",
    help="Free the expert's memory after this long without an answer; 0: never.",
)
@model_options(SWITCH, LORA, BRIDGE, RPC, OVERLAP, MAX_MEMORY, REQUIRED, TIMEOUT)
@decoding_options()
def serve_command(
    models: dict[str, Any], decoding: dict[str, Any], most_tokens: int, **settings: Any
) -> None:
    """Serve the pair: OpenAI's and Anthropic's API at /v1, Ollama's at /api, a chat page at /.

    The decoding options are the defaults for requests that do not set them.
    """
    from colm_edge.options import Options

    key = settings["api_key"]
    if key is None:  # Click takes an empty variable for none, and the server would be open
        key = os.environ.get(API_KEY_VARIABLE)
    if key is not None:
        key = settings["api_key"] = key.strip()
        if not key:
            raise click.UsageError("the API key is empty; give one, or leave it out")
        if not (key.isascii() and key.isprintable()):
            raise click.UsageError(
                "the API key has characters that a request's header cannot carry; expected "
                "printable ASCII"
            )
    try:
        from colm_edge.serve.app import serve
    except ModuleNotFoundError as e:
        raise ColmError(
            f"{e.name} is missing; install the extra: pip install 'colm-edge[server]'"
        ) from e
    with open_pair(models, defaults=Options(**decoding)) as loaded:
        experts = "+".join(member.stem for member in loaded.members)
        if loaded.expert_is_here:
            loaded.note_speed()
        name = models.get("pair") or f"{loaded.base.path.stem}+{experts}"
        serve(loaded, ServerOptions(max_tokens=most_tokens, **settings), name, say)
