"""Pairs whose expert is behind HTTP, for tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.options import Options
from colm_edge.pair import Pair
from colm_edge.remote.client import RemoteExpert
from colm_edge.switch.load import load_switch

GREEDY = Options(temperature=0.0, threshold=0.4, max_tokens=24)
PROMPT = "hello world"
DIALECTS = ("llamacpp", "vllm", "colm-edge")
# Whatever the server's generation_config.json says.
NEUTRAL = {
    "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "top_p": 1,
    "top_k": -1, "min_p": 0,
}  # fmt: skip


@contextmanager
def remote_pair(tiny, url: str, **settings) -> Iterator[Pair]:
    base = Model(tiny["base"])
    try:
        expert = RemoteExpert(url, base, **settings)
    except BaseException:
        base.close()
        raise
    context = ContextOptions(n_ctx=256, n_threads=1)
    with Pair(base, expert, load_switch("margin"), context, GREEDY) as pair:
        yield pair


def warnings_in(caplog) -> list[str]:
    """Return what was logged about servers."""
    found = [r for r in caplog.records if r.name == "colm_edge" and r.levelno >= logging.WARNING]
    return [text for r in found if "http://" in (text := r.getMessage())]
