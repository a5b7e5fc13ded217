"""Kinds that are read without a model: switches, models.txt, answers, and the Hub's cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from colm_edge import hub, info, references
from colm_edge.bench.replay import recorded
from colm_edge.switch.file import FEATURE_SETS, Switch
from lib.fuzz.kind import Files, Kind, Read

N_EMBD = 8


def _switches(needs: Path) -> Sequence[Files]:
    found = []
    for features in FEATURE_SETS.values():
        width = sum(N_EMBD if name == "hidden" else 1 for name in features)
        Switch(
            features,
            np.linspace(-1, 1, width, dtype=np.float32)[None],
            np.zeros(1, np.float32),
            N_EMBD,
            defer_rates=(0.0, 0.5, 1.0),
            thresholds=(1.0, 0.5, 0.0),
            review=2.0,
            info={"base": "b.gguf", "base_fingerprint": "0" * 64, "objective": "budget"},
        ).save(needs / "s.gguf")
        found.append({"s.gguf": (needs / "s.gguf").read_bytes()})
    return found


def _read_switch(_: Path) -> Read:
    base: Any = SimpleNamespace(n_embd=N_EMBD, token_id=lambda _: None)

    def read(folder: Path) -> object:
        switch = Switch.load(folder / "s.gguf")
        info.as_text(info.describe_files([str(folder / "s.gguf")])[0])
        switch.threshold_for(0.1)
        switch.reader(base, 4)(np.zeros(4, np.float32), np.zeros(N_EMBD, np.float32))
        return switch.p_defer(np.zeros((1, 8), np.float32), np.zeros((1, N_EMBD), np.float32))

    return read


def _lists(_: Path) -> Sequence[Files]:
    path = references._models_txt()
    lines = path.read_bytes().splitlines(keepends=True)
    return [{"models.txt": b"".join(line for line in lines if line.startswith((b"#", b"demo")))}]


def _read_list(_: Path) -> Read:
    def read(folder: Path) -> None:
        references._models_txt = lambda: folder / "models.txt"
        for alias, roles in references.known_pairs().items():
            for role in roles:
                references.is_here(roles[role].reference)
            references.find_pair(alias, offline=True)

    return read


COMMIT = "0" * 40


def _cached(_: Path) -> Sequence[Files]:
    folder = "hub/models--user--repo"
    return [
        {
            f"{folder}/refs/main": COMMIT.encode(),
            f"{folder}/snapshots/{COMMIT}/model-Q4_0.gguf": b"GGUF",
        }
    ]


def _read_cache(_: Path) -> Read:
    from huggingface_hub import constants

    def read(folder: Path) -> None:
        constants.HF_HUB_CACHE = str(folder / "hub")
        for reference in ("user/repo:Q4_0", "user/repo:model-Q4_0.gguf"):
            hub.find_cached(reference)
            hub.fetch(reference, offline=True)

    return read


def _answers(_: Path) -> Sequence[Files]:
    tokens = [{"id": i, "source": ("base", "expert")[i % 2]} for i in range(6)]
    answer = {"prompt_tokens": [3, 1, 2], "tokens": tokens, "withdrawn": [{"at": 1}]}
    return [{"answer.json": json.dumps(answer).encode()}]


def _read_answer(_: Path) -> Read:
    return lambda folder: recorded(folder / "answer.json").defer_rate


KINDS = (
    Kind("switch", _switches, _read_switch, n_tests=400),
    Kind("models.txt", _lists, _read_list),
    Kind("answer", _answers, _read_answer),
    Kind("hub", _cached, _read_cache, n_tests=150),
)
