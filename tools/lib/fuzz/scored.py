"""Kinds that `train` and `eval` read: data, scores, work folders, and journals of answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from colm_edge.errors import ColmError
from colm_edge.evaluate import methods
from colm_edge.evaluate.methods import Comparison, evaluate
from colm_edge.evaluate.metrics import METRICS, check_rows
from colm_edge.evaluate.proxy_tuning import Proxy
from colm_edge.options import Options
from colm_edge.pair import Pair
from colm_edge.switch.file import Switch
from colm_edge.train.documents import Documents, Row, read_rows, tokenized
from colm_edge.train.fit import FitOptions, fit_switch
from colm_edge.train.prompts import read_prompts
from colm_edge.train.score_files import read_scores
from colm_edge.train.scoring import score_expert
from lib.fuzz.kind import Files, Kind, Read
from lib.fuzz.pairs import DATA, open_pair

MAX_TOKENS = 4
PLAIN = Options(temperature=0.0, max_tokens=MAX_TOKENS, threshold=0.5)


@contextmanager
def _no_bar(name: str, total: int) -> Iterator[Any]:
    yield SimpleNamespace(update=lambda n: None)


def _files_in(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _documents(needs: Path, pair: Pair) -> Documents:
    path = needs / "data.jsonl"
    path.write_bytes(DATA)
    return tokenized(read_rows(path), pair)


def _data(_: Path) -> Sequence[Files]:
    talk = (
        b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "o"}], '
    )
    talk += b'"prompt": "p", "completion": "<<1=1>> 1"}\n'
    code = b'{"prompt": "p", "completion": "<<1=1>> 1", "tests": ["assert 1"], "test_setup": ""}\n'
    return [{"d.jsonl": DATA}, {"d.jsonl": talk + code + talk}]


def _read_data(needs: Path) -> Read:
    pair = open_pair(needs)
    uses: tuple[Callable[[Iterable[Row]], object], ...] = (
        lambda rows: tokenized(rows, pair),
        lambda rows: list(read_prompts(rows, pair, False)),
        lambda rows: list(read_prompts(rows, pair, True)),
        *(_judged(name) for name in METRICS if name != "python"),
    )

    def read(folder: Path) -> None:
        refused: ColmError | None = None
        for use in uses:
            try:
                use(read_rows(folder / "d.jsonl"))
            except ColmError as e:
                refused = refused or e
        if refused is not None:
            raise refused

    return read


def _judged(name: str) -> Callable[[Iterable[Row]], object]:
    def judge(rows: Iterable[Row]) -> None:
        kept = list(rows)
        check_rows(kept, METRICS[name])
        for _, row in kept:
            METRICS[name](str(row.get("prompt")), row)

    return judge


def _scores(needs: Path) -> Sequence[Files]:
    with open_pair(needs) as pair:
        path = needs / "s.npz"
        score_expert(pair, _documents(needs, pair), path, _no_bar)
    return [{"s.npz": path.read_bytes()}]


def _read_scores(needs: Path) -> Read:
    with open_pair(needs) as pair:
        documents, base = _documents(needs, pair), pair.base.fingerprint
    return lambda folder: read_scores([folder / "s.npz"], documents, base)


def _work(needs: Path) -> Sequence[Files]:
    with open_pair(needs) as pair:
        for folder in ("train", "more"):
            shutil.rmtree(needs / folder, ignore_errors=True)
        documents = _documents(needs, pair)
        fit = fit_switch(pair, documents, FitOptions(), progress=_no_bar, work=needs / "train")
        fit.switch.save(needs / "s.gguf")
        # A part of it, to which an update adds the rest.
        some = documents[: len(documents) - 2]
        fit_switch(pair, some, FitOptions(), progress=_no_bar, work=needs / "more")
    return [_files_in(needs / folder) for folder in ("train", "more")]


def _read_work(needs: Path) -> Read:
    pair = open_pair(needs)
    documents, update = _documents(needs, pair), Switch.load(needs / "s.gguf")
    options = FitOptions(update=update)
    return lambda folder: fit_switch(pair, documents, options, progress=_no_bar, work=folder)


def _journals(needs: Path) -> Sequence[Files]:
    work = needs / "work"
    shutil.rmtree(work, ignore_errors=True)
    with open_pair(needs) as pair:
        _documents(needs, pair)
        _evaluated(pair, needs, work)
    return [{name: data for name, data in _files_in(work).items() if name.endswith(".jsonl")}]


def _evaluated(pair: Pair, needs: Path, work: Path) -> None:
    with Proxy(pair, needs / "base.gguf") as proxy:
        comparison = Comparison(
            metric="exact",
            methods=("base", "expert", "proxy"),
            proxy=proxy,
            on_expert=True,
            limit=3,
        )
        evaluate(pair, needs / "data.jsonl", PLAIN, comparison, work=work, progress=_no_bar)


def _read_journals(needs: Path) -> Read:
    pair = open_pair(needs)
    methods.BOOTSTRAPS = 10  # most of the time would go into these
    return lambda folder: _evaluated(pair, needs, folder)


KINDS = (
    Kind("data", _data, _read_data, n_tests=150),
    Kind("scores", _scores, _read_scores),
    Kind("work", _work, _read_work, n_tests=20),
    Kind("journal", _journals, _read_journals, n_tests=40),
)
