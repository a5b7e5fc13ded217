"""The pair here that one with its expert elsewhere is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from remote_pairs import GREEDY

from colm_edge.pair import Pair, load
from colm_edge.remote import client as remote
from colm_edge.remote.http import KEY_VARIABLE


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch):
    monkeypatch.setattr(remote, "BACK_OFF", 0.0)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def local(tiny) -> Iterator[Pair]:
    with load(
        tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256, defaults=GREEDY
    ) as pair:
        yield pair
