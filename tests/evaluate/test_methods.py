"""The evaluation's metrics and rows, on tiny models."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from lib.rows import write_rows
from progress import KilledError, killing, no_bar

from colm_edge import tables
from colm_edge.cli import main
from colm_edge.cli.evaluate import shares
from colm_edge.errors import ColmError, DataError, MismatchError
from colm_edge.evaluate import generate as answers
from colm_edge.evaluate import methods as ev
from colm_edge.evaluate import metrics, plot
from colm_edge.evaluate.methods import Comparison
from colm_edge.evaluate.proxy_tuning import Proxy
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.switch.file import Switch
from colm_edge.train.documents import read_rows, tokenized
from colm_edge.train.scoring import score

METHODS = ["base", "expert", "colm", "compose", "random", "entropy", "margin"]
GREEDY = Options(temperature=0.0, max_tokens=8, schedule="sequential")
WHOLE = GREEDY.with_changes(max_tokens=32)  # room for the answers of the demo pair
HELD_OUT = Path(__file__).parent.parent / "data" / "demo_heldout.jsonl"


def timeless(table):
    """Return a table without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in table]


def test_rows_are_the_documented_likelihoods(tiny, data):
    with load(tiny["base"], tiny["expert"], "entropy", n_threads=1, n_ctx=256) as pair:
        half = GREEDY.with_changes(threshold=0.5)
        table = {r["method"]: r for r in ev.evaluate(pair, data, half, progress=no_bar)}
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
        assert table[name]["defer_rate"] == rate
    for row in table.values():
        assert row["nll_low"] <= row["nll"] <= row["nll_high"]


def test_generated_answers_are_those_of_the_pair(tiny, data):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        own = pair.switch
        asked = Comparison(metric="contains", limit=4)
        rows = ev.evaluate(pair, data, GREEDY, asked, progress=no_bar)
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


@example(p=[1 - 1e-16, 1.0], share=0.5)  # no number lies between
@given(
    p=st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1 - 1e-16, 1.0]), min_size=1, max_size=12),
    share=st.floats(0, 1),
)
def test_a_threshold_defers_as_many_as_asked_but_for_ties(p, share):
    values, k = np.array(p), round(share * len(p))
    at = ev.threshold_at(values, k)
    deferred = len(p) if at <= 0 else int((values > at).sum())
    assert 0 <= at <= 1
    # Where the k-th and the next are one value, none of that value are deferred.
    falling = sorted(p, reverse=True)
    tied = 0 < k < len(p) and falling[k - 1] == falling[k]
    assert deferred == (sum(x > falling[k] for x in p) if tied else k)


def test_a_sweep_meets_its_rates_and_runs_from_base_to_expert(tiny, data):
    rates = (0.0, 0.25, 0.5, 1.0)
    with load(tiny["base"], tiny["expert"], "entropy", n_threads=1, n_ctx=256) as pair:
        rows = ev.evaluate(pair, data, GREEDY, Comparison(defer_rates=rates), progress=no_bar)
        n = len(score(pair, tokenized(read_rows(data), pair), no_bar).base)
    names = [row["method"] for row in rows]
    assert names == ["base", "expert", *METHODS[2:] * len(rates)]
    base, expert = rows[:2]
    for name in METHODS[2:]:
        curve = [row for row in rows if row["method"] == name]
        assert [row["defer_rate"] for row in curve] == [round(rate * n) / n for rate in rates]
        assert curve[0]["nll_hard"] == base["nll_hard"]
        assert curve[-1]["nll_hard"] == expert["nll_hard"]
        assert len({row["threshold"] for row in curve}) == len(rates)


def test_at_thresholds_the_others_defer_as_often(tiny, data):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        both = Comparison(thresholds=(0.2, 0.9))
        sweep = ev.evaluate(pair, data, GREEDY, both, progress=no_bar)
        for threshold in (0.2, 0.9):
            options = GREEDY.with_changes(threshold=threshold)
            single = ev.evaluate(pair, data, options, progress=no_bar)
            (colm,) = (row for row in single if row["method"] == "colm")
            assert colm["threshold"] == threshold
            assert {row["defer_rate"] for row in single[2:]} == {colm["defer_rate"]}
            assert all(row in sweep for row in single)


def test_only_the_methods_asked_for(tiny_pair, data):
    two = Comparison(methods=["margin", "base"])
    some = ev.evaluate(tiny_pair, data, GREEDY, two, progress=no_bar)
    every = ev.evaluate(tiny_pair, data, GREEDY, progress=no_bar)
    assert some == [row for row in every if row["method"] in ("base", "margin")]
    for methods, message in (["magic"], "known: base"), (["weak"], "--weak"):
        with pytest.raises(ColmError, match=message):
            ev.evaluate(tiny_pair, data, GREEDY, Comparison(methods=methods), progress=no_bar)


def test_weak_is_colm_when_it_is_the_same_switch(demo):
    both = Comparison(metric="contains", limit=8, methods=["colm", "weak"], weak=demo.switch)
    colm, weak = ev.evaluate(demo, HELD_OUT, WHOLE, both, progress=no_bar)
    assert colm["accuracy"] > 0
    assert timeless([weak]) == timeless([colm | {"method": "weak", "threshold": weak["threshold"]}])
    # The hidden state that it reads is there beside a switch that reads none, too.
    with load(demo.base.path, demo.expert_session.model.path, "margin", n_threads=1) as pair:
        at_its_rate = replace(both, defer_rates=[colm["defer_rate"]])
        _, beside = ev.evaluate(pair, HELD_OUT, WHOLE, at_its_rate, progress=no_bar)
    assert timeless([beside]) == timeless([weak])


def test_a_switch_that_reads_the_hidden_state_gets_that_of_the_prompt_at_once(tiny, tiny_pair):
    head = np.random.default_rng(0).normal(0, 1, (1, 64)).astype(np.float32)
    switch = Switch(("hidden",), head, np.zeros(1, np.float32), tiny_pair.base.n_embd)
    tokens = tiny_pair.base.tokenize("hello you")
    session = tiny_pair.base_session
    session.sync(tokens)
    with tiny_pair.switched(switch):
        session.sync(tokens)  # evaluated already, except for its hidden state
        hidden = session.hidden.copy()
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as other:
        other.base_session.want_hidden(True)
        other.base_session.sync(tokens)
        assert hidden == pytest.approx(other.base_session.hidden, abs=1e-4)


def test_a_weak_switch_of_another_width_is_refused_before_the_work(tiny_pair, data):
    wide = Switch(("hidden",), np.zeros((1, 5), np.float32), np.zeros(1, np.float32), 5)
    with pytest.raises(MismatchError, match="5 numbers"):
        ev.evaluate(tiny_pair, data, GREEDY, Comparison(weak=wide), progress=no_bar)
    assert not tiny_pair.expert_session.created


def test_random_deferral_is_drawn_for_every_line(tiny_pair, data):
    rows = list(read_rows(data))

    def deferred(rows):
        switch = answers.RandomSwitch()
        given = answers.answers(tiny_pair, switch, GREEDY, rows, metrics.exact, no_bar)
        return given.deferred.tolist()

    counts = deferred(rows)
    assert len(set(counts)) > 1
    assert deferred(rows[::-1]) == counts[::-1]  # whatever came before


def test_answers_that_were_cut_are_counted(tiny_pair, data):
    rows = list(read_rows(data))
    given = answers.answers(tiny_pair, tiny_pair.switch, GREEDY, rows, metrics.exact, no_bar)
    lengths = [tiny_pair.generate(row["prompt"], **vars(GREEDY)) for _, row in rows]
    assert given.cut.tolist() == [a.finish_reason == "length" for a in lengths]
    assert given.tokens.tolist() == [len(a.steps) for a in lengths]
    assert given.cut.any()


def test_answers_at_once_are_those_of_one_at_a_time(demo):
    """But for near-ties, which the last bits decide."""
    rows = list(read_rows(HELD_OUT))[:20]
    options, judge = WHOLE.with_changes(threshold=0.9), metrics.contains
    alone, together = (
        answers.answers(demo, demo.switch, options, rows, judge, no_bar, n_slots=n) for n in (1, 4)
    )
    assert np.mean(together.tokens == alone.tokens) >= 0.8
    assert np.mean(together.deferred == alone.deferred) >= 0.8
    assert np.mean(together.right == alone.right) >= 0.9
    assert (together.seconds > 0).all()


def test_on_the_experts_own_text_rates_and_rows_need_no_completion(tiny_pair, data, tmp_path):
    """Its own answers are scored: the expert has nothing to regret there, and its row is them."""
    rows = [{"prompt": row["prompt"], "tests": ["pass"]} for _, row in read_rows(data)]
    path = tmp_path / "prompts.jsonl"
    write_rows(path, rows)
    comparison = Comparison(
        metric="python", defer_rates=(0.25, 0.5), on_expert=True, n_slots=3, methods=METHODS
    )

    def table():
        return ev.evaluate(
            tiny_pair, path, GREEDY, comparison, work=tmp_path / "work", progress=no_bar
        )

    first = table()
    by_name = {row["method"]: row for row in first[:2]}
    assert by_name["base"]["regret_removed"] == 0
    assert by_name["expert"]["regret_removed"] == pytest.approx(1)
    assert by_name["expert"]["generated_defer_rate"] == 1
    for row in first[2:]:
        assert min(abs(row["defer_rate"] - rate) for rate in (0.25, 0.5)) < 0.02
    alone = [
        len(tiny_pair.generate(row["prompt"], **vars(GREEDY.with_changes(threshold=0.0))).steps)
        for row in rows
    ]
    assert by_name["expert"]["tokens_per_answer"] == pytest.approx(np.mean(alone))
    assert table() == first  # all from the work folder


def test_a_killed_evaluation_goes_on(tiny, data, tmp_path):
    def run(progress, work):
        with (
            load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair,
            Proxy(pair, Path(tiny["defer"]), n_threads=1) as proxy,
        ):
            sessions = (pair.base_session, pair.expert_session, proxy.session)
            try:
                asked = Comparison(metric="exact", limit=6, proxy=proxy)
                table = ev.evaluate(pair, data, GREEDY, asked, work=work, progress=progress)
            except KilledError:
                table = None
            return table, [session.account.n_evaluated for session in sessions]

    whole, n_whole = run(no_bar, tmp_path / "whole")
    again, n_again = run(no_bar, tmp_path / "whole")
    assert again == whole  # times too
    assert n_again == [0, 0, 0]
    work = tmp_path / "killed"
    nothing, n_first = run(killing("entropy", 3), work)
    assert nothing is None
    with (work / "answers.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    after, n_second = run(no_bar, work)
    assert timeless(after) == timeless(whole)
    lines = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    # Nothing is evaluated twice, except for prefixes that the killed process had in its cache.
    for first, second, total in zip(n_first, n_second, n_whole, strict=True):
        assert 0 < second < total
        assert total <= first + second < 1.1 * total


def test_a_journal_that_is_none_is_refused(tmp_path):
    (tmp_path / "answers.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="remove it"):
        answers.Journal(tmp_path / "answers.jsonl")
    with pytest.raises(DataError, match="cannot keep"):
        answers.Journal(tmp_path / "answers.jsonl" / "below")


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
    for row in table("md").splitlines()[2:]:
        assert len(row.split("|")) == 2 + 11


def test_the_command_takes_a_third_model_a_weak_switch_and_a_sweep(tiny, data, tmp_path):
    switch = tmp_path / "weak.gguf"
    head = np.array([[-1.0]], np.float32)
    Switch(("margin",), head, np.zeros(1, np.float32), 64).save(switch)
    picture = tmp_path / "t.png"
    args = ["eval", "--data", data, "-m", tiny["base"], "-me", tiny["expert"], "-t", "1",
            "--limit", "4", "--weak", switch, "--anti-expert", tiny["defer"], "--plot", picture,
            "--defer-rates", "0:0.4:0.2,1", "--methods", "proxy,weak",
            "--work-dir", tmp_path]  # fmt: skip
    for form in "md", "json":
        result = CliRunner().invoke(main, [str(a) for a in [*args, "-o", form]])
        assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["method"] for row in rows] == ["weak"] * 4 + ["proxy"]
    assert [row["defer_rate"] for row in rows] == pytest.approx([0, 0.2, 0.4, 1, 1], abs=0.02)
    assert rows[-1]["threshold"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "proxy.jsonl").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--defer-rates", "0.1", "--thresholds", "0.1"],
        ["--defer-rates", "0.1", "--threshold", "0.1"],
        ["--thresholds", "0.1", "--defer-rate", "0"],
        ["--defer-rates", "0.1,2"],
        ["--thresholds", "0:1:0"],
        ["--thresholds", "0:1"],
        ["--thresholds", "0:1:1e-320"],
        ["--methods", "colm,magic"],
        ["--methods", "weak"],
        ["--methods", "proxy"],
    ],
)
def test_wrong_usage(data, wrong):
    assert CliRunner().invoke(main, ["eval", "--data", data, *wrong]).exit_code == 2


def test_the_picture_shows_every_row(tiny, data):
    with (
        load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair,
        Proxy(pair, Path(tiny["defer"]), n_threads=1) as proxy,
    ):
        asked = Comparison(metric="exact", limit=4, defer_rates=(0.0, 0.5, 1.0), proxy=proxy)
        table = ev.evaluate(pair, data, GREEDY, asked, progress=no_bar)
    losses, right, speed = plot.draw(table).axes
    labels = [c.get_label() for c in losses.containers]
    assert labels == ["colm", "compose", "random", "entropy", "margin", "base", "expert", "proxy"]
    for axes, x, y in (
        (losses, "defer_rate", "nll_hard"),
        (right, "generated_defer_rate", "accuracy"),
        (speed, "tokens_per_second", "accuracy"),
    ):
        for bars in axes.containers:
            column = "nll" if (bars.get_label(), y) == ("compose", "nll_hard") else y
            points = [(r[x], r[column]) for r in table if r["method"] == bars.get_label()]
            assert sorted(map(tuple, bars[0].get_xydata().tolist())) == sorted(points)


def test_a_picture_that_cannot_be_is_said_before_the_work(tmp_path, monkeypatch):
    for name, message in ("none/t.png", "no such folder"), ("t.txt", "ending in"):
        with pytest.raises(ColmError, match=message):
            plot.check_plot(tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ColmError, match=r"pip install 'colm-edge\[plots\]'"):
        plot.check_plot(tmp_path / "t.png")


def test_what_does_not_fit_the_context_is_said(tiny, tmp_path):
    """A long completion is cut with a note; a long prompt cannot be answered: its line is named."""
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "p", "completion": "c " * 90}, {"prompt": "q" * 300, "completion": "c"}]
    write_rows(path, rows)
    args = ["eval", "--data", str(path), "-m", tiny["base"], "-me", tiny["expert"], "-t", "1",
            "-c", "64", "--methods", "base"]  # fmt: skip
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0
    assert "longer than the context of 64 tokens" in result.stderr
    result = CliRunner().invoke(main, [*args, "--metric", "exact"])
    assert result.exit_code == 1
    assert "line 2: the prompt has" in result.output


def test_a_threshold_next_to_one_is_not_read_as_one():
    """As `eval` prints it, so it takes it."""
    assert shares(None, None, "0.9999999998,1e-10,0:0.3:0.1") == (
        0.9999999998, 1e-10, 0, 0.1, 0.2, 0.3,
    )  # fmt: skip


def test_a_threshold_next_to_one_is_not_printed_as_one():
    row = {"method": "colm", "threshold": 0.9999996, "nll": 1.0}
    assert "0.9999996" in tables.render([row], "md")
    assert "| 1 |" in tables.render([{**row, "threshold": 1.0}], "md")


def test_every_expert_of_a_team_writes_its_own_answers(demo):
    """The base stands in for the second one, so that it writes what the base writes."""
    base, expert = demo.base.path, demo.expert_session.model.path
    wanted = Comparison(metric="contains", limit=8, methods=["base", "expert", "colm"])
    team = HELD_OUT.parent / "team.gguf"
    with load(base, {"nature": expert, "countries": base}, team, n_threads=1) as pair:
        rows = ev.evaluate(
            pair, HELD_OUT, WHOLE, replace(wanted, thresholds=(0.0,)), progress=no_bar
        )
    alone, first, second, together = [row["tokens_per_answer"] for row in rows]
    assert second == alone != first
    assert first < together


def test_a_weak_switch_for_several_experts_is_refused(demo):
    team = Comparison(weak=Switch.load(HELD_OUT.parent / "team.gguf"))
    with pytest.raises(MismatchError, match="for several experts; --weak takes one of one"):
        ev.evaluate(demo, HELD_OUT, WHOLE, team, progress=no_bar)


def test_a_weak_switch_defers_alone_whatever_tolerance_it_carries(demo):
    plain = Comparison(metric="contains", limit=4, methods=["weak"], weak=demo.switch)
    reviewing = replace(plain, weak=replace(demo.switch, review=0.0))
    rows = [ev.evaluate(demo, HELD_OUT, WHOLE, c, progress=no_bar) for c in (plain, reviewing)]
    assert timeless(rows[0]) == timeless(rows[1])


@pytest.mark.parametrize(("right", "low", "high"), [(1.0, 0.94, 1.0), (0.0, 0.0, 0.06)])
def test_of_answers_that_are_all_right_or_all_wrong_the_interval_is_not_empty(right, low, high):
    """Wilson's for 60 of 60, and for none."""
    values = np.full(60, right)
    row = ev._with_interval("accuracy", values, np.arange(60))
    assert row["accuracy"] == right
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((low, high), abs=3e-4)
