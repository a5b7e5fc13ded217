"""The benchmark's counts and traces; its times are printed, not tested."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from colm_edge import costs
from colm_edge.bench import bench, drawn_trace, recorded_trace
from colm_edge.cli import main
from colm_edge.costs import CostTable, cost_table
from colm_edge.errors import ColmError, DataError
from colm_edge.pair import load

METHODS = ["base", "expert", "expert-llama-cpp-python", "both", "colm"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("rate", "run"), [(0.2, 0), (0.2, 3), (0.05, 2), (0, 0), (1, 0)])
def test_drawn_deferrals_have_their_rate_and_run(rate, run):
    trace = drawn_trace(4_000, 300, rate, run)
    n = len(trace.deferred)
    assert len(trace.tokens) == n
    assert sum(trace.deferred) / n == pytest.approx(rate, abs=0.003)
    runs = sum(b and not a for a, b in zip([False, *trace.deferred], trace.deferred, strict=False))
    if run:
        assert sum(trace.deferred) / runs == pytest.approx(run, rel=0.2)
    short = drawn_trace(50, 300, rate, run)
    assert short == drawn_trace(50, 300, rate, run)
    assert sum(short.deferred) == pytest.approx(50 * rate, abs=0.5)
    assert max(trace.tokens) < 300


@pytest.mark.parametrize("text", ["f=2", "f=0.1,run=0.5", "run=2", "f=x", "f=0.1,g=1", "f=0.1=2"])
def test_a_bad_replay_is_wrong_usage(text):
    result = CliRunner().invoke(main, ["bench", "--replay", text])
    assert result.exit_code == 2
    assert "expected f=RATE" in result.output


def test_every_method_evaluates_what_it_must(tiny_pair):
    trace = drawn_trace(40, tiny_pair.n_shared, 0.25, seed=3)
    said: list[str] = []
    rows = {row["method"]: row for row in bench(tiny_pair, trace, 2, said.append)}
    assert list(rows) == METHODS
    n_prompt, n = len(trace.prompt), len(trace.tokens)
    assert (rows["base"]["expert_calls"], rows["base"]["expert_tokens"]) == (0, 0)
    for name in ("expert", "expert-llama-cpp-python", "both"):
        assert rows[name]["expert_calls"] == n
        assert rows[name]["expert_tokens"] == n_prompt + n - 1
    last = max(i for i, deferred in enumerate(trace.deferred) if deferred)
    assert rows["colm"]["expert_calls"] == sum(trace.deferred)
    assert rows["colm"]["expert_tokens"] == n_prompt + last
    assert rows["colm"]["defer_rate"] == sum(trace.deferred) / n
    assert rows["expert"]["ratio_expert"] == 1
    assert sum("round 2 of 2" in text for text in said) == len(METHODS)
    for row in rows.values():
        low, high = row["tokens_per_second_low"], row["tokens_per_second_high"]
        assert 0 < low <= row["tokens_per_second"] <= high


def test_a_recorded_answer_is_replayed(tiny, tmp_path):
    models = ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-c", "128"]
    args = ["run", "--json", *models, "--temp", "0", "-n", "12", "--threshold", "0.3", "hello"]
    answer = CliRunner().invoke(main, args).stdout
    path = tmp_path / "answer.json"
    path.write_text(answer)
    recorded = json.loads(answer)
    assert 0 < recorded["stats"]["n_deferred"] < recorded["stats"]["n_generated"]
    args = ["bench", *models, "--replay", str(path), "--rounds", "1", "-o", "json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)[-1]
    assert row["method"] == "colm"
    assert row["expert_calls"] == recorded["stats"]["expert_calls"]
    assert row["expert_tokens"] == recorded["stats"]["expert_tokens"]
    assert row["defer_rate"] == recorded["stats"]["defer_rate"]


def test_what_cannot_be_replayed_is_said(tiny_pair, tmp_path):
    with pytest.raises(DataError, match="No such file"):
        recorded_trace(tmp_path / "absent")
    (tmp_path / "x.json").write_text('{"tokens": []}')
    with pytest.raises(DataError, match="not what `run --json` printed"):
        recorded_trace(tmp_path / "x.json")
    with pytest.raises(ColmError, match="do not fit the context of 256"):
        bench(tiny_pair, drawn_trace(300, 200, 0.2), 1, print)
    with pytest.raises(ColmError, match="does not share"):
        bench(tiny_pair, drawn_trace(20, 10**6, 0.2), 1, print)


def test_costs_are_measured_once_for_a_model(tiny_pair, monkeypatch):
    table = cost_table(tiny_pair.base_session)
    evaluated = tiny_pair.base_session.n_evaluated
    assert evaluated > sum(table.sizes)
    assert cost_table(tiny_pair.base_session) == table
    assert tiny_pair.base_session.n_evaluated == evaluated
    assert cost_table(tiny_pair.expert_session) != table
    broken = costs._cache_file(tiny_pair.base_session)
    broken.write_text("{")
    cost_table(tiny_pair.base_session)
    assert tiny_pair.base_session.n_evaluated > evaluated
    assert json.loads(broken.read_text())["sizes"] == list(table.sizes)


def test_costs_between_and_beyond_the_measured_sizes():
    table = CostTable((1, 2, 4), (1.0, 3.0, 2.0))
    assert [table(n) for n in (1, 2, 3, 4, 8)] == [1.0, 3.0, 2.5, 2.0, 4.0]


def test_no_table_where_the_base_alone_is_replayed(tiny):
    """A trace without a deferral never calls the expert."""
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        rows = bench(pair, drawn_trace(10, pair.n_shared, 0.0), 1, lambda text: None)
    colm = rows[-1]
    assert (colm["expert_calls"], colm["expert_tokens"], colm["defer_rate"]) == (0, 0, 0.0)
