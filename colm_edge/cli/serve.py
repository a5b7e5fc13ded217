"""`colm-edge serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colm_edge.cli.options import (
    decoding_options,
    model_options,
)
from colm_edge.errors import ColmError
from colm_edge.options import ServerOptions

if TYPE_CHECKING:
    pass
from colm_edge.cli.common import open_pair

SERVER = ServerOptions()


@click.command("serve")
@click.option("--host", default=SERVER.host, show_default=True, help="0.0.0.0: every network.")
@click.option("--port", type=click.IntRange(0, 65535), default=SERVER.port, show_default=True)
@click.option(
    "-np", "--parallel", "n_slots", type=click.IntRange(1, 64), default=SERVER.n_slots,
    show_default=True, help="Answers written at once; each has a context of -c tokens.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(0), default=SERVER.queue, show_default=True,
    help="Requests that may wait for a slot; more are told to come again (503).",
)  # fmt: skip
@click.option(
    "--api-key", envvar="COLM_EDGE_API_KEY", metavar="KEY",
    help="Answer only requests that carry it; better in the variable COLM_EDGE_API_KEY.",
)  # fmt: skip
@click.option(
    "--cors-origin", "cors", multiple=True, metavar="ORIGIN",
    help="A site whose pages may ask, such as http://localhost:3000; repeatable.  [none]",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(1), default=SERVER.max_tokens, show_default=True,
    help="Of one answer, whatever a request asks for.",
)  # fmt: skip
@click.option(
    "--expert-idle-unload", type=click.FloatRange(0), default=SERVER.expert_idle_unload,
    metavar="SECONDS",
    help="Free the expert's memory when nothing was asked for so long; 0: never.",
)  # fmt: skip
@model_options
@decoding_options()
def serve_command(models: dict[str, Any], decoding: dict[str, Any], **settings: Any) -> None:
    """Serve the pair: OpenAI's API at /v1, and a page to chat on at /.

    The decoding options are what requests that leave them out get.
    """
    from colm_edge.options import Options

    try:
        from colm_edge.serve.app import serve
    except ModuleNotFoundError as e:
        raise ColmError(
            f"{e.name} is missing; install the extra: pip install 'colm-edge[server]'"
        ) from e
    with open_pair(models, defaults=Options(**decoding)) as loaded:
        expert = Path(loaded.expert.name).stem if loaded.expert_is_here else "remote"
        name = models.get("pair") or f"{loaded.base.path.stem}+{expert}"
        serve(loaded, ServerOptions(**settings), name, lambda text: click.echo(text, err=True))
