"""Fakes and tiny models that tests share; nothing here needs the network."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lib.rows import write_rows

# A model that was loaded before PyTorch uses AMX, and crashes once PyTorch releases the tiles
# (docs/speed.md).
with suppress(ImportError):
    import torch  # noqa: F401

from lib.random_model import SHAPES, write_model
from remote_pairs import GREEDY

from colm_edge.llama.model import Model
from colm_edge.pair import Pair, load
from colm_edge.remote import client as remote
from colm_edge.remote.http import EXPERT_KEY_VARIABLE
from colm_edge.switch.file import Switch

pytest_plugins = ["pages"]

TEMPLATE = (
    "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model(tiny) -> Iterator[Model]:
    found = Model(tiny["base"])
    yield found
    found.close()


@pytest.fixture(scope="session", autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the user's cached cost tables, history and wishes for colour."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        for name in ("FORCE_COLOR", "NO_COLOR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Seeded random float32 models: base and expert of one vocabulary, and special cases."""
    folder = tmp_path_factory.mktemp("tiny")
    shape = SHAPES["tiny"]
    paths = {}
    for seed, name in enumerate(("base", "expert")):
        # A large gain gives random models clear choices, so that near-ties are rare.
        write_model(folder / f"{name}.gguf", shape, seed=seed, gain=20.0)
    write_model(folder / "template.gguf", shape, seed=0, gain=20.0, chat_template=TEMPLATE)
    write_model(
        folder / "defer.gguf", shape, seed=2, gain=20.0, extra_tokens=("<|pad|>", "<|defer|>")
    )
    write_model(folder / "foreign.gguf", shape, seed=3, extra_tokens=[f"<{i}>" for i in range(200)])
    write_model(folder / "endless.gguf", shape, seed=5, gain=20.0, endless=True)
    write_model(folder / "recurrent.gguf", shape, seed=4, architecture="mamba")
    for path in folder.iterdir():
        paths[path.stem] = str(path)
    return paths


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A seeded random model of a smaller vocabulary than `tiny`'s."""
    path = tmp_path_factory.mktemp("other") / "other.gguf"
    write_model(path, replace(SHAPES["tiny"], n_vocab=268), seed=7, gain=20.0)
    return str(path)


@pytest.fixture
def tiny_pair(tiny: dict[str, str]) -> Iterator[Pair]:
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        yield pair


@pytest.fixture(scope="module")
def pair(tiny: dict[str, str]) -> Iterator[Pair]:
    """A pair whose base has a chat template, and what it has unless a request says otherwise."""
    from serving import GREEDY

    with load(
        tiny["template"], tiny["expert"], "margin", n_threads=1, n_ctx=256, defaults=GREEDY
    ) as pair:
        yield pair


@pytest.fixture(scope="module")
def url(pair: Pair) -> Iterator[str]:
    """Where that pair is served."""
    from serving import serving

    with serving(pair, n_slots=2) as (url, _):
        yield url


@pytest.fixture(scope="module")
def roomy(tiny: dict[str, str]) -> Iterator[str]:
    """Where such a pair is served with a context that holds tools, a token for each letter."""
    from serving import GREEDY, serving

    files = tiny["template"], tiny["expert"]
    with (
        load(*files, "margin", n_threads=1, n_ctx=1536, defaults=GREEDY) as pair,
        serving(pair, n_slots=2) as (url, _),
    ):
        yield url


@pytest.fixture(scope="session")
def demo() -> Iterator[Pair]:
    with load(n_threads=1) as pair:
        yield pair


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data file of twelve lines, as `eval` reads it."""
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [
        {"prompt": f"p{i}", "completion": f"c{i} and more", "answer": "more"} for i in range(12)
    ]
    write_rows(path, rows)
    return str(path)


Team = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def models(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Team:
    """A base, two experts by name, and a switch for them, in a file."""
    path = tmp_path_factory.mktemp("team") / "router.gguf"
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        answer = pair.generate("hello", threshold=1.0, temperature=0.0, max_tokens=40)
        tokens = answer.prompt_tokens + [step.token for step in answer.steps]
        session = pair.base_session
        session.want_hidden(True)
        session.sync(tokens, range(len(tokens)))
        hidden = np.array([session.state(i)[1].copy() for i in range(len(tokens))])
    # The experts stand at both ends of the direction in which the states differ most.
    mean = hidden.mean(axis=0)
    spread, along = np.linalg.svd(hidden - mean)[1:]
    weight = along[:1] * np.array([[4.0], [-4.0]]) * np.sqrt(len(tokens)) / spread[0]
    Switch(
        ("hidden",), weight.astype(np.float32), (-weight @ mean - 2.0).astype(np.float32),
        len(mean), info={"expert_names": "a b"},
    ).save(path)  # fmt: skip
    return {"model": tiny["base"], "expert": {"a": tiny["expert"], "b": tiny["base"]}}, path


@pytest.fixture
def no_back_off(monkeypatch):
    """Ask an expert's server again at once, and send it no key."""
    monkeypatch.setattr(remote, "BACK_OFF", 0.0)
    monkeypatch.delenv(EXPERT_KEY_VARIABLE, raising=False)


@pytest.fixture
def local(tiny) -> Iterator[Pair]:
    """The pair that one with its expert on a server is compared with."""
    options = {"n_threads": 1, "n_ctx": 256, "defaults": GREEDY}
    with load(tiny["base"], tiny["expert"], "margin", **options) as pair:
        yield pair
