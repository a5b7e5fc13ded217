"""The benchmark's counts and traces; its times are printed, not tested."""

from __future__ import annotations

import json
import stat
import subprocess

import pytest
from click.testing import CliRunner

from colm_edge.bench import memory
from colm_edge.bench.memory import peak_memory
from colm_edge.bench.methods import Methods, bench
from colm_edge.bench.replay import Process, recorded, replay
from colm_edge.bench.speculative import Speculative
from colm_edge.cli import main
from colm_edge.decode.fast import Fast
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.planner import Planner
from colm_edge.decode.policy import Policy
from colm_edge.errors import ColmError, DataError
from colm_edge.llama import costs
from colm_edge.llama.costs import CostTable
from colm_edge.pair import load

METHODS = [
    "base", "expert", "expert-llama-cpp-python", "both", "colm", "colm-fast", "speculative",
    "lossless",
]  # fmt: skip
FIELDS = [
    "method", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high",
    "first_token_seconds", "ratio_expert", "ratio_sequential", "ratio_limit", "outside_us",
    "defer_rate", "expert_calls",
    "calls_per_100", "expert_tokens", "peak_memory_mb",
]  # fmt: skip


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize(("rate", "run"), [(0.2, 0), (0.2, 3), (0.05, 2), (0, 0), (1, 0)])
def test_drawn_deferrals_have_their_rate_and_run(rate, run):
    trace = Process(rate, run=run).draw(4_000, 300)
    n = len(trace.deferred)
    assert len(trace.tokens) == len(trace.agrees) == n
    assert sum(trace.deferred) / n == pytest.approx(rate, abs=0.003)
    runs = sum(b and not a for a, b in zip([False, *trace.deferred], trace.deferred, strict=False))
    if run:
        assert sum(trace.deferred) / runs == pytest.approx(run, rel=0.2)
    short = Process(rate, run=run).draw(50, 300)
    assert short == Process(rate, run=run).draw(50, 300)
    assert sum(short.deferred) == pytest.approx(50 * rate, abs=0.5)
    assert max(trace.tokens) < 300


@pytest.mark.parametrize("agree", [0.0, 0.3, 1.0])
def test_drawn_agreements_have_their_share_at_deferrals_and_elsewhere(agree):
    trace = Process(0.25, agree).draw(400, 300)
    for kind in (True, False):
        chosen = [a for a, d in zip(trace.agrees, trace.deferred, strict=True) if d is kind]
        assert sum(chosen) == pytest.approx(agree * len(chosen), abs=0.5)


def test_a_replay_is_read():
    assert Process.parse("f=0.2") == Process(0.2, 0.6, 0.0)
    assert Process.parse("f=0.1,run=2,agree=0.9") == Process(0.1, 0.9, 2.0)


@pytest.mark.parametrize(
    "text",
    [
        "f=2",
        "f=0.1,run=0.5",
        "run=2",
        "f=x",
        "f=0.1,g=1",
        "f=0.1=2",
        "f=0.1,agree=2",
        "f=0,f=1",
        "f=0.9,run=2",
    ],
)
def test_a_bad_replay_is_wrong_usage(text):
    result = CliRunner().invoke(main, ["bench", "--replay", text])
    assert result.exit_code == 2
    assert "expected f=RATE" in result.output


def test_every_method_evaluates_what_it_must(tiny_pair):
    trace = Process(0.25).draw(40, tiny_pair.n_shared, seed=3)
    said: list[str] = []
    rows = {row["method"]: row for row in bench(tiny_pair, trace, 2, said.append, memory=False)}
    assert list(rows) == METHODS
    n_prompt, n = len(trace.prompt), len(trace.tokens)
    assert (rows["base"]["expert_calls"], rows["base"]["expert_tokens"]) == (0, 0)
    for name in ("expert", "expert-llama-cpp-python", "both"):
        assert rows[name]["expert_calls"] == n
        assert rows[name]["expert_tokens"] == n_prompt + n - 1
    last = max(i for i, deferred in enumerate(trace.deferred) if deferred)
    assert rows["colm"]["expert_calls"] == sum(trace.deferred)
    assert rows["colm"]["calls_per_100"] == 100 * sum(trace.deferred) / n
    assert rows["colm"]["expert_tokens"] == n_prompt + last
    assert rows["colm-fast"]["expert_tokens"] >= n_prompt + last
    for name in ("colm", "colm-fast"):
        assert rows[name]["defer_rate"] == sum(trace.deferred) / n
    assert rows["expert"]["ratio_expert"] == 1
    assert sum("round 2 of 2" in text for text in said) == 1 + len(METHODS)  # and decodes alone
    for row in rows.values():
        assert list(row) == FIELDS
        low, high = row["tokens_per_second_low"], row["tokens_per_second_high"]
        assert 0 < low <= row["tokens_per_second"] <= high


def test_a_grid_of_replays_and_a_choice_of_methods(tiny):
    args = ["bench", "-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-c", "128"]
    args += ["-n", "20", "--rounds", "1", "--no-memory", "--methods", "colm,colm-fast"]
    args += ["-o", "json"]
    replays = ["--replay", "f=0.1", "--replay", "f=0.4,agree=0.9"]
    result = CliRunner().invoke(main, [*args, *replays])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["replay"], row["method"]) for row in rows] == [
        ("f=0.1", "colm"), ("f=0.1", "colm-fast"),
        ("f=0.4,agree=0.9", "colm"), ("f=0.4,agree=0.9", "colm-fast"),
    ]  # fmt: skip
    for row in rows:
        assert row["ratio_expert"] is None
        assert row["ratio_sequential"] > 0
        assert row["peak_memory_mb"] is None
    result = CliRunner().invoke(main, [*args, "-o", "md"])
    assert result.stdout.splitlines()[-1].startswith("Measured on ")
    assert "base.gguf and expert.gguf, 1 and 1 threads" in result.stdout
    result = CliRunner().invoke(main, [*args, "--methods", "fast"])
    assert result.exit_code == 1
    assert "no method 'fast'; expected some of base, expert" in result.stderr


def written(pair, trace, threshold, schedule=None, **options):
    read = pair.switch.reader(pair.base, pair.n_shared)
    sessions = pair.base_session, pair.expert_session
    for session in sessions:
        session.forget()
    decoder = replay(*sessions, read, trace, threshold, pair.n_shared, schedule, **options)
    return [(step.token, step.source) for step in decoder], decoder.stats


@pytest.mark.parametrize("agree", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_every_schedule_writes_the_trace(tiny_pair, rate, agree):
    class Bold(Planner):
        def saves(self, agrees, n_pending):
            return float(n_pending % 2)

    flat = CostTable((1, 64), (1.0, 1.0))
    trace = Process(rate, agree).draw(60, tiny_pair.n_shared)
    sources = ["expert" if deferred else "base" for deferred in trace.deferred]
    expected = list(zip(trace.tokens, sources, strict=True))
    assert written(tiny_pair, trace, 0.5)[0] == expected
    planner = Bold(lambda cancel: (flat, flat))
    assert written(tiny_pair, trace, 0.5, Fast([planner]))[0] == expected
    deferrals = sum(trace.deferred)
    if deferrals:
        assert planner.agreement.n > 4
    cheap = CostTable((1, 64), (0.01, 0.64))
    draft, stats = written(tiny_pair, trace, 0.0, Speculative((cheap, flat)), everywhere=True)
    assert [token for token, _ in draft] == trace.tokens
    # Batches cost nothing more here, so drafts are as long as agreements promise.
    assert (stats.expert_calls < 20) is (agree == 1.0)


def test_speculative_decoding_writes_the_experts_own_text(tiny):
    cheap, flat = CostTable((1, 64), (0.01, 0.64)), CostTable((1, 64), (1.0, 1.0))
    for expert in ("base", "expert"):
        with load(tiny["base"], tiny[expert], "margin", n_threads=1, n_ctx=256) as pair:
            alone = pair.generate("hello", temperature=0, threshold=0, max_tokens=50)
            decoder = Decoder(
                pair.base_session, [pair.expert_session],
                Policy(pair.switch.reader(pair.base, 400), 0.0), Picker(400),
                pair.base.tokenize("hello"), end_tokens=pair.base.end_tokens, max_tokens=50,
                schedule=Speculative((cheap, flat)),
            )  # fmt: skip
            assert [s.token for s in decoder] == [s.token for s in alone.steps]
            assert (decoder.stats.expert_calls < 20) is (expert == "base")


def test_a_recorded_answer_is_replayed(tiny, tmp_path):
    models = ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-c", "128"]
    args = ["run", "--json", *models, "--temp", "0", "-n", "12", "--threshold", "0.3", "hello"]
    answer = CliRunner().invoke(main, [*args, "--schedule", "sequential"]).stdout
    path = tmp_path / "answer.json"
    path.write_text(answer)
    recorded = json.loads(answer)
    assert 0 < recorded["stats"]["n_deferred"] < recorded["stats"]["n_generated"]
    args = ["bench", *models, "--replay", str(path), "--rounds", "1", "-o", "json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads(result.stdout)}
    assert rows["colm"]["expert_calls"] == recorded["stats"]["expert_calls"]
    assert rows["colm"]["expert_tokens"] == recorded["stats"]["expert_tokens"]
    assert rows["colm"]["defer_rate"] == recorded["stats"]["defer_rate"]
    if peak_memory() is not None:
        assert all(row["peak_memory_mb"] > 10 for row in rows.values())


def test_a_recorded_lossless_answer_is_replayed_with_the_calls_that_it_took(tiny, tmp_path):
    path, models = tmp_path / "answer.json", ["-m", tiny["base"], "-me", tiny["expert"]]
    models += ["-t", "1", "-c", "128"]
    options = ["--temp", "0", "-n", "30", "--review", "0", "--defer-rate", "0.2", "--json"]
    told = (
        CliRunner()
        .invoke(main, ["run", "hello", *models, *options, "--schedule", "sequential"])
        .stdout
    )
    path.write_text(told)
    answer = json.loads(told)
    assert answer["withdrawn"]
    trace = recorded(path)
    assert trace.is_text
    assert sum(trace.deferred) == answer["stats"]["n_deferred"] - len(answer["withdrawn"])
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        (row,) = bench(pair, trace, 1, quiet, only=["lossless"], memory=False)
    assert row["expert_calls"] == answer["stats"]["expert_calls"]
    assert row["defer_rate"] == answer["stats"]["n_deferred"] / len(trace.tokens)


def test_what_cannot_be_replayed_is_said(tiny_pair, tmp_path):
    with pytest.raises(DataError, match="No such file"):
        recorded(tmp_path / "absent")
    (tmp_path / "x.json").write_text('{"tokens": []}')
    with pytest.raises(DataError, match="not what `run --json` printed"):
        recorded(tmp_path / "x.json")
    with pytest.raises(ColmError, match="do not fit the context of 256"):
        bench(tiny_pair, Process(0.2).draw(300, 200), 1, quiet)
    with pytest.raises(ColmError, match="do not share"):
        bench(tiny_pair, Process(0.2).draw(20, 10**6), 1, quiet)


def test_nothing_is_asked_of_the_expert_where_nothing_is_deferred(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        rows = bench(pair, Process(0.0).draw(10, pair.n_shared), 1, quiet, memory=False)
    for row in rows:
        if row["method"].startswith("colm"):
            assert (row["expert_calls"], row["expert_tokens"], row["defer_rate"]) == (0, 0, 0.0)


PROGRAM = """#!/bin/sh
case "$0" in
*bench) echo '[{"avg_ts": 50.0}]';;
*) echo "0.00 I encoded    8 tokens in    0.160 seconds, speed:  50.000 t/s" >&2
   echo "0.00 I decoded   16 tokens in    0.480 seconds, speed:  33.333 t/s" >&2;;
esac
"""


def test_llama_cpps_own_programs_are_rows(tiny_pair, tmp_path):
    """Stand-ins that print what the real ones do; those are run where they are built."""
    trace = Process(0.2).draw(20, tiny_pair.n_shared)
    with pytest.raises(ColmError, match="llama-bench: No such file"):
        bench(tiny_pair, trace, 1, quiet, tools=tmp_path, memory=False)
    for name in ("llama-bench", "llama-speculative-simple"):
        path = tmp_path / name
        path.write_text(PROGRAM)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    rows = bench(tiny_pair, trace, 2, quiet, tools=tmp_path, only=["base"], memory=False)
    assert [row["method"] for row in rows] == ["base", "llama-bench", "llama-speculative-simple"]
    # 16 tokens in 0.64 seconds, with the prompt's
    speeds = [row["tokens_per_second"] for row in rows[-2:]]
    assert speeds == pytest.approx([50.0, 25.0], rel=1e-4)
    assert [row["expert_calls"] for row in rows[-2:]] == [None, None]
    (tmp_path / "llama-bench").write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    with pytest.raises(ColmError, match="failed: out of memory"):
        bench(tiny_pair, trace, 1, quiet, tools=tmp_path, memory=False)
    (tmp_path / "llama-bench").write_text(PROGRAM)
    (tmp_path / "llama-speculative-simple").write_text("#!/bin/sh\n")
    with pytest.raises(ColmError, match="llama-speculative-simple printed no speed"):
        bench(tiny_pair, trace, 1, quiet, tools=tmp_path, memory=False)


def test_a_child_that_fails_is_named_and_loses_no_row(tiny_pair, monkeypatch):
    trace = Process(0.2).draw(20, tiny_pair.n_shared)
    failed = subprocess.CompletedProcess([], 1, "", "a long\nstory")
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **more: failed)
    said: list[str] = []
    rows = bench(tiny_pair, trace, 1, said.append)
    assert "the memory of base could not be measured: story" in said
    assert {row["peak_memory_mb"] for row in rows} == {None}


@pytest.mark.parametrize("quick", [0.0, 10.0])
def test_the_fast_schedule_alone_cuts_batches_and_not_of_tiny_models(tiny_pair, quick, monkeypatch):
    monkeypatch.setattr(costs, "QUICK", quick)
    trace = Process(0.3).draw(30, tiny_pair.n_shared)
    with Methods(tiny_pair, trace) as methods:
        seen = {}
        for name in ("colm", "colm-fast", "both"):
            original = tiny_pair.expert_session.sync

            def sync(*args, name=name, original=original):
                seen[name] = tiny_pair.expert_session.costs is not None
                return original(*args)

            tiny_pair.expert_session.sync = sync
            methods.names[name]()
            del tiny_pair.expert_session.sync
    assert seen == {"colm": False, "colm-fast": not quick, "both": False}
