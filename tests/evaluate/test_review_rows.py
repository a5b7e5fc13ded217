"""The rows of `eval` for answers under review."""

from __future__ import annotations

import math

import numpy as np
import pytest
from click.testing import CliRunner
from progress import no_bar

from colm_edge import tables
from colm_edge.cli import main
from colm_edge.errors import ColmError
from colm_edge.evaluate import methods as ev
from colm_edge.evaluate import plot
from colm_edge.evaluate.generate import answers
from colm_edge.evaluate.methods import Comparison
from colm_edge.evaluate.metrics import contains
from colm_edge.journal import Journal
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.readout import FEATURES
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.train.documents import read_rows

GREEDY = Options(temperature=0.0, max_tokens=8, schedule="sequential")


def test_each_tolerance_of_review_is_a_row(tiny, data, tmp_path):
    """Without tolerance the answers are the expert's own; what is undone before it is written is
    not known, so nothing stands in the teacher-forced columns."""
    asked = Comparison(
        metric="contains", limit=4, defer_rates=(0.1, 0.2), reviews=(0.0, 2.0), n_slots=2,
        methods=("expert", "colm", "review"),
    )  # fmt: skip
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        rows = ev.evaluate(pair, data, GREEDY, asked, progress=no_bar, work=tmp_path)
        again = ev.evaluate(pair, data, GREEDY, asked, progress=no_bar, work=tmp_path)
        doubting = GREEDY.with_changes(doubt=1.0)
        with pytest.raises(ColmError, match="cannot go together"):
            ev.evaluate(pair, data, doubting, asked, progress=no_bar)
    assert rows == again
    reviewed = [row for row in rows if row["method"] == "review"]
    assert [row["review"] for row in reviewed] == [0.0, 2.0] * 2
    expert = next(row for row in rows if row["method"] == "expert")
    for row in reviewed:
        assert row["nll"] is row["nll_low"] is row["defer_rate"] is None
        if row["review"] == 0:
            assert row["tokens_per_answer"] == expert["tokens_per_answer"]
            assert row["accuracy"] == expert["accuracy"]
    plot.draw(rows)
    assert "| review |" in tables.render(rows, "md")


def test_answers_that_were_reviewed_from_another_floor_are_written_anew(tiny_pair, data, tmp_path):
    rows = list(read_rows(data))[:2]
    n_embd = tiny_pair.base.n_embd
    weight = np.zeros((1, n_embd + len(FEATURES)), np.float32)
    asked = GREEDY.with_changes(threshold=0.9, review=1.0)

    def n_kept(rates, options=asked):
        """Return how many answers are kept when the switch, calibrated so, has answered too."""
        switch = Switch(
            FEATURE_SETS["both"], weight, np.zeros(1, np.float32), n_embd, 0.9,
            defer_rates=rates, thresholds=(1.0, 0.5, 0.0),
        )  # fmt: skip
        journal = Journal(tmp_path / "answers.jsonl")
        answers(tiny_pair, switch, options, rows, contains, no_bar, journal=journal)
        return len((tmp_path / "answers.jsonl").read_text().splitlines())

    assert n_kept((0.0, 0.3, 1.0)) == n_kept((0.0, 0.3, 1.0)) == 2
    assert n_kept((0.0, 0.7, 1.0)) == 4
    off = asked.with_changes(review=math.inf)
    assert n_kept((0.0, 0.3, 1.0), off) == n_kept((0.0, 0.7, 1.0), off) == 6


def test_reviews_without_answers_are_refused(tiny, data):
    with pytest.raises(ColmError, match="review needs --reviews, and a --metric"):
        Comparison(reviews=(1.0,), methods=("review",))
    args = [
        "eval",
        "-m",
        tiny["base"],
        "-me",
        tiny["expert"],
        "--data",
        str(data),
        "--reviews",
        "1",
    ]
    assert "--reviews needs a --metric" in CliRunner().invoke(main, args).output


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--reviews", "1"), "--reviews goes with the method review"),
        (("--weak", "margin"), "--weak goes with the method weak"),
        (("--anti-expert", "x.gguf"), "--anti-expert goes with the method proxy"),
        (("--defer-rates", "0:1:1e-9"), "at most 1,001"),
    ],
)
def test_an_option_that_no_row_would_show_is_refused(tiny, data, option, words):
    args = ["eval", "-m", tiny["base"], "-me", tiny["expert"], "--data", data]
    refused = CliRunner().invoke(
        main, [*args, "--metric", "contains", "--methods", "colm", *option]
    )
    assert refused.exit_code == 2
    assert words in refused.stderr


def test_what_compose_cannot_do_is_told_before_the_work(tiny_pair, data):
    wanted = Comparison(metric="contains", methods=["base", "compose"])
    with pytest.raises(ColmError, match="compose"):
        ev.evaluate(tiny_pair, data, GREEDY.with_changes(review=0.0), wanted, progress=no_bar)
    assert not tiny_pair.expert_session.created
