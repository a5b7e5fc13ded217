"""Real prompts: what every method writes and evaluates; times are not tested."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import pytest
from click.testing import CliRunner
from lib.rows import write_rows

from colm_edge.bench import prompts as bench_module
from colm_edge.bench.prompts import Prompt, Writers, bench_prompts, read_judged_prompts
from colm_edge.cli import main
from colm_edge.errors import ColmError, DataError
from colm_edge.options import Options
from colm_edge.pair import load

EXPERTS = ["expert", "expert-llama-cpp-python", "both", "speculative", "lossless"]
METHODS = [*EXPERTS[:3], "colm", "colm-fast", *EXPERTS[3:]]
GREEDY = Options(temperature=0.0, max_tokens=30, threshold=0.5)
FIELDS = [
    "method", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high",
    "first_token_seconds", "tokens_per_answer", "ratio_expert", "defer_rate", "expert_calls",
    "expert_tokens",
]  # fmt: skip


def quiet(text: str) -> None:
    pass


def file_of(folder, *rows):
    return str(write_rows(folder / "prompts.jsonl", rows))


@pytest.fixture
def models(tiny):
    return ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-c", "256"]


def told(*args: str) -> str:
    """Return the last line of the error that a command ends with."""
    result = CliRunner().invoke(main, ["bench", *args])
    assert result.exit_code != 0
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [1, 30])
def test_methods_write_their_own_text_and_the_experts_all_the_same(tiny, n, overlap):
    options = GREEDY.with_changes(max_tokens=n)
    with load(
        tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256, overlap=overlap
    ) as pair, Writers(pair, options) as writers:  # fmt: skip
        for text in ("hello", "What is this?", "a b c d"):
            prompt = pair.prompt_tokens([{"role": "user", "content": text}])
            by = {name: write(prompt) for name, write in writers.names.items()}
            alone = pair.generate(text, **(options.changed | {"threshold": 0.0}))
            assert {by[name].text for name in EXPERTS} == {alone.text}
            assert {by[name].tokens for name in EXPERTS} == {len(alone.steps)}
            base = pair.generate(text, **(options.changed | {"threshold": 1.0}))
            assert by["base"].text == base.text
            ours = pair.generate(text, **options.changed)
            for name in ("colm", "colm-fast"):
                assert by[name].text == ours.text
                assert by[name].deferred == ours.stats.n_deferred


def test_each_method_evaluates_all_that_it_needs_in_every_answer(tiny_pair):
    with Writers(tiny_pair, GREEDY) as writers:
        prompt = tiny_pair.prompt_tokens([{"role": "user", "content": "hello"}])
        for _ in range(2):  # nothing is left over from an answer
            by = {name: write(prompt) for name, write in writers.names.items()}
            assert (by["base"].expert_calls, by["base"].expert_tokens) == (0, 0)
            for name in ("expert-llama-cpp-python", "both"):
                for count in ("expert_calls", "expert_tokens", "deferred"):
                    assert getattr(by[name], count) == getattr(by["expert"], count)
            assert by["colm"].expert_calls < by["expert"].expert_calls
            assert by["lossless"].expert_tokens >= by["expert"].expert_tokens


def test_llama_cpp_python_stops_where_an_answer_ends(tiny):
    """The base as its own expert, and any of its tokens as the end."""
    with load(tiny["base"], tiny["base"], "margin", n_threads=1, n_ctx=256) as pair:
        answer = pair.generate("hello", **GREEDY.changed)
        end = answer.steps[8].token
        first = next(i for i, step in enumerate(answer.steps) if step.token == end)
        with Writers(pair, GREEDY) as writers:
            writers._ends = frozenset({end})
            for name in ("expert-llama-cpp-python", "both"):
                sample = writers.names[name](answer.prompt_tokens)
                assert sample.tokens == sample.deferred == first
                assert sample.text == "".join(step.text for step in answer.steps[:first])
                assert sample.expert_calls == first + 1
                assert sample.expert_tokens == len(answer.prompt_tokens) + first


def test_a_row_sums_all_prompts(tiny_pair):
    prompts = [Prompt(tiny_pair.base.tokenize(text)) for text in ("hello", "What is this?")]
    said: list[str] = []
    rows = bench_prompts(tiny_pair, prompts, GREEDY, 3, said.append)
    assert [row["method"] for row in rows] == ["base", *METHODS]
    assert sum(text.startswith("round 3 of 3: prompt 2 of 2") for text in said) == 1
    by = {row["method"]: row for row in rows}
    with Writers(tiny_pair, GREEDY) as writers:
        for name in ("base", "expert", "colm", "lossless"):
            samples = [writers.names[name](prompt.tokens) for prompt in prompts]
            tokens = sum(sample.tokens for sample in samples)
            assert by[name]["tokens_per_answer"] == tokens / 2
            assert by[name]["expert_calls"] == sum(sample.expert_calls for sample in samples)
            assert by[name]["expert_tokens"] == sum(sample.expert_tokens for sample in samples)
            assert by[name]["defer_rate"] == sum(s.deferred for s in samples) / tokens
    for row in rows:
        assert list(row) == FIELDS
        low, high = row["tokens_per_second_low"], row["tokens_per_second_high"]
        assert 0 < low <= row["tokens_per_second"] <= high
    assert by["expert"]["ratio_expert"] == 1


def test_a_share_of_the_answers_is_right(tiny_pair, tmp_path):
    answer = tiny_pair.generate("hello", **GREEDY.changed).text
    by_expert = tiny_pair.generate("hello", **(GREEDY.changed | {"threshold": 0.0})).text
    assert answer != by_expert
    path = file_of(
        tmp_path,
        {"prompt": "hello", "completion": answer},
        {"messages": [{"role": "user", "content": "hello"}], "completion": by_expert},
        {"prompt": "hello", "completion": "something else"},
        {"prompt": "hello", "completion": answer},
        {"prompt": "nobody knows"},
    )
    prompts = read_judged_prompts(tiny_pair, path, GREEDY, metric="exact")
    assert prompts[0].tokens == prompts[1].tokens
    rows = bench_prompts(tiny_pair, prompts, GREEDY, 1, quiet, only=["expert", "colm"])
    assert [(row["method"], row["accuracy"]) for row in rows] == [("expert", 0.25), ("colm", 0.5)]
    assert len(read_judged_prompts(tiny_pair, path, GREEDY, limit=2)) == 2
    with pytest.raises(DataError, match="no line has an answer for exact"):
        read_judged_prompts(tiny_pair, file_of(tmp_path, {"prompt": "p"}), GREEDY, metric="exact")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"question": "p"}, "expected prompt, a text, or messages"),
        ({"prompt": 3}, "expected role and content, as texts"),
        ({"messages": []}, "the conversation is empty"),
        ({"prompt": "p " * 100}, "do not fit the context of 256; give a smaller -n or a larger -c"),
        ({"prompt": "p", "completion": "no number"}, "gsm8k needs completions with a number"),
        ({"prompt": "p", "tests": ["assert 1"]}, "a generation metric needs"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_a_bad_line_is_named(models, tmp_path, row, error):
    path = file_of(tmp_path, {"prompt": "p", "completion": "3"}, row)
    line = told(*models, "--prompts", path, "--metric", "gsm8k")
    assert line.startswith("Error: ")
    assert "line 2: " in line
    assert error in line


def test_what_does_not_go_together_is_said(models, tmp_path):
    path = file_of(tmp_path, {"prompt": "p", "tests": ["assert 1"]})
    asked = [*models, "--prompts", path]
    one = "--replay, --prompts and --tune measure different things; give one of them"
    assert one in told(*asked, "--replay", "f=0.2")
    assert one in told(*asked, "--tune")
    for given in (["--limit", "2"], ["--metric", "exact"], ["--threshold", "0"], ["--raw"]):
        assert f"{given[0]} goes with --prompts; give both" in told(*models, *given)
    assert "--allow-exec" in told(*asked, "--metric", "python")
    assert "no method 'x'; expected some of base" in told(*asked, "--methods", "x")
    assert "absent: No such file" in told(*models, "--prompts", str(tmp_path / "absent"))
    (tmp_path / "prompts.jsonl").write_text("\n")
    assert "no prompt; expected one JSON object a line" in told(*asked)


def test_the_table_tells_how_it_was_made(models, tmp_path):
    path = file_of(tmp_path, {"prompt": "p", "answer": "q"}, {"prompt": "p"}, {"prompt": "r"})
    args = ["bench", *models, "--prompts", path, "--limit", "2", "-n", "8", "--rounds", "1"]
    args += ["--methods", "base,colm-fast", "--metric", "contains", "--load", "1"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    *table, blank, told, machine = result.stdout.splitlines()
    assert table[0].endswith("| expert_tokens | accuracy | load |")
    assert [line.split(" | ")[0] for line in table[2:]] == ["| base", "| colm-fast"]
    assert blank == ""
    assert told == (
        "Answers to 2 prompts of prompts.jsonl, at most 8 tokens each; 1 judged by contains."
    )
    assert machine.endswith(", beside busy processes: 1.")
    rows = json.loads(CliRunner().invoke(main, [*args, "-o", "json"]).stdout)
    assert list(rows[0]) == [*FIELDS, "accuracy", "load"]
    assert {row["load"] for row in rows} == {1}


@pytest.mark.parametrize(("rate", "deferred"), [("0", 0.0), ("1", 1.0)])
def test_the_pair_defers_as_often_as_asked(models, tmp_path, rate, deferred):
    path = file_of(tmp_path, {"prompt": "p"})
    args = ["bench", *models, "--prompts", path, "-n", "8", "--rounds", "1", "-o", "json"]
    args += ["--methods", "colm", "--defer-rate", rate, "--raw"]
    (row,) = json.loads(CliRunner().invoke(main, args).stdout)
    assert row["defer_rate"] == deferred


PROGRAM = """#!/bin/sh
for prompt; do :; done
printf '\\n\\n%s 4 and 5.{end}\\n\\n\\n' "$prompt"
echo '0.0 I encoded    8 tokens in 0.2 seconds, speed:  50.0 t/s'
echo '0.0 I decoded    6 tokens in 0.1 seconds, speed:  75.0 t/s' >&2
"""


def test_llama_cpps_own_programs_answer_the_prompts(tiny_pair, tmp_path):
    """Stand-ins that print what the real ones do; those are run where they are built."""
    end = tiny_pair.base.text([min(tiny_pair.base.end_tokens)])
    rows = [{"prompt": "hello", "completion": f"#### {n}"} for n in (4, 5, 5)]
    prompts = read_judged_prompts(tiny_pair, file_of(tmp_path, *rows), GREEDY, metric="gsm8k")
    names = ["llama-speculative-simple", "llama-lookup"]
    with pytest.raises(ColmError, match="llama-speculative-simple: No such file"):
        bench_prompts(tiny_pair, prompts, GREEDY, 1, quiet, tools=tmp_path)
    for i, name in enumerate(names):
        path = tmp_path / name
        path.write_text(PROGRAM.replace("{end}", end))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        found = bench_prompts(tiny_pair, prompts, GREEDY, 1, quiet, tools=tmp_path, only=["base"])
        assert [row["method"] for row in found] == ["base", *names[: i + 1]]
        row = found[-1]
        assert row["tokens_per_second"] == pytest.approx(6 / (8 / 50 + 6 / 75))
        assert row["tokens_per_answer"] == 6
        assert (row["defer_rate"], row["expert_calls"], row["expert_tokens"]) == (None,) * 3
        assert row["accuracy"] == pytest.approx(2 / 3)
    tools = bench_module.Tools(tmp_path, tiny_pair)
    assert tools.lookup("hello", 30).text == " 4 and 5."


def test_deferral_is_alone_whatever_tolerance_a_switch_carries(demo):
    """As in `eval`; `lossless` reviews."""
    prompt = demo.prompt_tokens([{"role": "user", "content": "When did the last tiger die?"}])
    texts = []
    for review in (None, 0.5):
        with (
            demo.switched(replace(demo.switch, review=review)),
            Writers(demo, GREEDY) as writers,
        ):
            names = ("base", "expert", "colm", "colm-fast", "lossless")
            texts.append([writers.names[name](prompt).text for name in names])
    assert texts[0] == texts[1]
