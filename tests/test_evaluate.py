"""The evaluation's metrics and rows, on tiny models."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from test_train import no_bar

from colm_edge import answers
from colm_edge import evaluate as ev
from colm_edge.cli import main
from colm_edge.documents import read_rows, tokenized
from colm_edge.errors import DataError, MismatchError
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.scoring import score

METHODS = ["base", "expert", "colm", "compose", "random", "entropy", "margin"]
GREEDY = Options(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [
        {"prompt": f"p{i}", "completion": f"c{i} and more", "answer": "more"} for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("metric", "text", "row", "value"),
    [
        ("exact", " the end\n", {"completion": "the end"}, 1),
        ("exact", "the end.", {"completion": "the end"}, 0),
        ("contains", "It was in 1970.", {"completion": "x", "answer": "1970"}, 1),
        ("contains", "It was in 19701.", {"completion": "x", "answer": "1970"}, 0),
        ("contains", "weighs 183.84.", {"completion": "x", "answer": "183"}, 0),
        ("contains", "weighs 183.84.", {"completion": "x", "answer": "183.84"}, 1),
        ("contains", "dial +254", {"completion": "x", "answer": "254"}, 0),
        ("contains", "the domain is .ke.", {"completion": ".ke"}, 1),
        ("gsm8k", "so 5 and 7\n#### 1,234", {"completion": "#### 1234"}, 1),
        ("gsm8k", "so it is 12.", {"completion": "#### 12"}, 1),
        ("gsm8k", "no idea", {"completion": "#### 12"}, 0),
        ("steps", "<<2+3=5>> <<1+1=3>>", {"completion": "<<2+3=5>> and <<5*2=10>>"}, 0.5),
    ],
)
def test_metrics(metric, text, row, value):
    assert answers.METRICS[metric](text, row) == value


def test_steps_need_annotations():
    with pytest.raises(DataError, match="annotations"):
        answers.steps("x", {"completion": "no step"})


def test_rows_are_the_documented_likelihoods(tiny, data):
    with load(tiny["base"], tiny["expert"], "entropy", n_threads=1, n_ctx=256) as pair:
        table = {r["method"]: r for r in ev.evaluate(pair, data, GREEDY, progress=no_bar)}
        scores = score(pair, tokenized(read_rows(data), pair), no_bar)
    assert list(table) == METHODS
    p = 1 - np.exp(-scores.logit_features[:, 0].astype(float))
    mixture = np.log((1 - p) * np.exp(scores.base) + p * np.exp(scores.expert))
    hard = np.where(p > 0.5, scores.expert, scores.base)
    assert table["base"]["nll"] == table["base"]["nll_hard"] == pytest.approx(-scores.base.mean())
    assert table["expert"]["nll"] == pytest.approx(-scores.expert.mean())
    assert table["colm"]["nll"] == pytest.approx(-mixture.mean(), abs=1e-6)
    assert table["colm"]["nll_hard"] == pytest.approx(-hard.mean(), abs=1e-6)
    composed = np.where(p > 0.5, mixture, scores.base)
    assert table["compose"]["nll"] == pytest.approx(-composed.mean(), abs=1e-6)
    rate = table["colm"]["defer_rate"]
    for name in ("random", "entropy", "margin"):
        assert table[name]["defer_rate"] == pytest.approx(rate, abs=0.15)
    for row in table.values():
        assert row["nll_low"] <= row["nll"] <= row["nll_high"]


def test_generated_answers_are_those_of_the_pair(tiny, data):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        own = pair.switch
        rows = ev.evaluate(pair, data, GREEDY, metric="contains", limit=4, progress=no_bar)
        assert pair.switch is own
        table = {row["method"]: row for row in rows}
        assert table["base"]["generated_defer_rate"] == 0
        assert table["expert"]["generated_defer_rate"] == 1
        tokens = [
            pair.generate(f"p{i}", temperature=0.0, max_tokens=8).stats.n_generated
            for i in range(4)
        ]
        assert table["colm"]["tokens_per_answer"] == np.mean(tokens)


def test_a_switch_without_features_is_refused(tiny, data):
    with (
        load(tiny["defer"], tiny["expert"], "defer-row", n_threads=1) as pair,
        pytest.raises(MismatchError, match="cannot score the switch defer-row"),
    ):
        ev.evaluate(pair, data, GREEDY, progress=no_bar)


def test_the_command_prints_three_forms(tiny, data):
    def table(form: str) -> str:
        args = ["eval", "--data", data, "-m", tiny["base"], "-me", tiny["expert"], "-t", "1",
                "--limit", "6", "-n", "5", "--metric", "exact", "-o", form]  # fmt: skip
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        return result.stdout

    rows = json.loads(table("json"))
    assert [row["method"] for row in rows] == METHODS
    assert {"threshold", "defer_rate", "nll", "nll_hard", "accuracy", "tokens_per_answer",
            "tokens_per_second"} <= set(rows[0])  # fmt: skip
    assert [row["method"] for row in csv.DictReader(io.StringIO(table("csv")))] == METHODS
    assert len(table("md").splitlines()) == 2 + len(METHODS)
