"""Training from prompts alone: the expert's greedy text, kept and resumed, and what it thought."""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime

import numpy as np
import pytest
from click.testing import CliRunner
from lib.rows import write_rows
from progress import KilledError, killing, no_bar

from colm_edge.cli import main
from colm_edge.errors import DataError, ModelError
from colm_edge.llama import chat_template
from colm_edge.llama.chat_template import ChatTemplate
from colm_edge.pair import Pair
from colm_edge.switch.file import Switch
from colm_edge.train.prompts import EXPERT_ANSWERS_FILE, N_KEPT, answer_prompts
from colm_edge.train.scoring import score

ROWS = list(enumerate(({"prompt": f"prompt number {i}"} for i in range(6)), 1))
HOW = {"max_tokens": 8, "n_slots": 3}


def test_the_answers_are_the_experts_own_greedy_text(tiny_pair):
    answered = answer_prompts(tiny_pair, ROWS, no_bar, **HOW)
    for document, (number, row) in zip(answered.documents, ROWS, strict=True):
        alone = tiny_pair.generate(row["prompt"], threshold=0.0, temperature=0.0, max_tokens=8)
        n = document.start
        assert document.tokens[:n] == alone.prompt_tokens
        assert document.tokens[n:][: len(alone.steps)] == [step.token for step in alone.steps]
        assert document.line == number


def test_an_answer_ends_with_its_end_token(tiny_pair, monkeypatch):
    """The end of the turn is learnt too, where the expert wrote it."""
    free = answer_prompts(tiny_pair, ROWS[:1], no_bar, **HOW).documents[0]
    stop = free.tokens[free.start + 3]
    monkeypatch.setattr(type(tiny_pair.expert), "end_tokens", frozenset([stop]))
    ended = answer_prompts(tiny_pair, ROWS[:1], no_bar, **HOW)
    at = free.tokens.index(stop, free.start)
    assert ended.documents[0].tokens == free.tokens[: at + 1]
    assert ended.n_cut == 0


def test_what_the_expert_told_is_what_a_second_pass_would_score(tiny_pair):
    answered = answer_prompts(tiny_pair, ROWS, no_bar, **HOW)
    told = score(tiny_pair, answered.documents, no_bar, recorded=answered.recorded)
    passed = score(tiny_pair, answered.documents, no_bar)
    assert np.allclose(told.expert, passed.expert, atol=2e-2)
    assert told.expert_right.all()
    assert passed.expert_right.mean() > 0.9  # except at near-ties
    rows = np.arange(len(told.base))
    ours, theirs = told.regret(rows), passed.regret(rows)
    # A choice beyond the tokens that were kept counts as the last of them.
    assert (ours <= theirs + 2e-2).all()
    near = theirs < 0.5
    assert np.allclose(ours[near], theirs[near], atol=2e-2)
    assert told.tells_regret


def test_regret_is_the_experts_best_less_its_view_of_the_bases_choice(tiny, tiny_pair):
    from reference import PlainModel

    answered = answer_prompts(tiny_pair, ROWS[:2], no_bar, **HOW)
    scores = score(tiny_pair, answered.documents, no_bar)
    base, expert = PlainModel(tiny["base"]), PlainModel(tiny["expert"])
    row = 0
    for document in answered.documents:
        for at in range(document.start, len(document.tokens)):
            ours, _ = base.state(document.tokens[:at])
            theirs, _ = expert.state(document.tokens[:at])
            expected = theirs.max() - theirs[ours.argmax()]
            assert scores.regret(np.array([row]))[0] == pytest.approx(expected, abs=5e-2)
            row += 1
    base.close()
    expert.close()


def test_a_killed_run_goes_on_with_what_it_has(tiny_pair, tmp_path):
    with pytest.raises(KilledError):
        answer_prompts(tiny_pair, ROWS, killing("answers", 3), work=tmp_path, **HOW)
    kept = (tmp_path / EXPERT_ANSWERS_FILE).read_text().splitlines()
    assert 0 < len(kept) < len(ROWS)
    answered = answer_prompts(tiny_pair, ROWS, no_bar, work=tmp_path, **HOW)
    after = (tmp_path / EXPERT_ANSWERS_FILE).read_text().splitlines()
    assert after[: len(kept)] == kept
    assert len(after) == len(ROWS)
    fresh = answer_prompts(tiny_pair, ROWS, no_bar, **HOW)
    assert np.array_equal(answered.documents.tokens, fresh.documents.tokens)
    tiny_pair.base_session.close()  # nothing is left to write: no model is needed
    again = answer_prompts(tiny_pair, ROWS, no_bar, work=tmp_path, **HOW)
    assert not tiny_pair.base_session.created
    assert np.array_equal(again.documents.tokens, fresh.documents.tokens)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"completion": "x"}, "line 1: .*expected prompt, a text, or messages"),
        ({"prompt": 3}, "line 1: a message is .*; expected role and content"),
        ({"messages": "x"}, "line 1: .*expected a list"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "line 1: the conversation is empty",
        ),
        ({"prompt": "x " * 400}, "line 1: the prompt has .* tokens"),
        ({"prompt": ""}, "line 1: the prompt is empty"),
    ],
)
def test_a_line_without_a_prompt_is_named(tiny_pair, row, words):
    with pytest.raises(DataError, match=words):
        answer_prompts(tiny_pair, [(1, row)], no_bar, **HOW)


def test_a_conversation_is_answered_anew_and_earlier_turns_stay(tiny_pair):
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    ended = [*turns, {"role": "assistant", "content": "known already"}]
    rows = [(1, {"messages": turns}), (2, {"messages": ended})]
    first, second = answer_prompts(tiny_pair, rows, no_bar, **HOW).documents
    assert first.tokens == second.tokens
    assert first.start == len(tiny_pair.prompt_tokens(turns))


def test_prompts_may_be_added_to_a_work_folder(tiny, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "s.gguf"
    args = ["train", "--prompts", str(prompts), "--outfile", str(out), "-n", "6", "-c", "256"]
    args += ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-np", "2"]
    for n in (5, 6):
        write_rows(prompts, (row for _, row in ROWS[:n]))
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1])["n_answers"] == n


def test_another_limit_answers_anew_only_what_it_changes(tiny_pair, tmp_path):
    """A larger one what was cut, a smaller one what is longer; the same of the context."""
    entries = {}
    for n in (6, 12, 5, 12):
        written = (tmp_path / EXPERT_ANSWERS_FILE).read_text().count("\n") if entries else 0
        answered = answer_prompts(tiny_pair, ROWS, no_bar, work=tmp_path, max_tokens=n, n_slots=3)
        fresh = answer_prompts(tiny_pair, ROWS, no_bar, max_tokens=n, n_slots=3)
        assert [e["tokens"] for e in answered.entries] == [e["tokens"] for e in fresh.entries]
        changed = sum(e["cut"] or len(e["tokens"]) > n for e in entries.values())
        after = (tmp_path / EXPERT_ANSWERS_FILE).read_text().count("\n")
        assert after - written == (changed if entries else len(ROWS))
        entries = dict(enumerate(answered.entries))


def train_on(rows, tiny, tmp_path, *more: str):
    prompts = tmp_path / "p.jsonl"
    write_rows(prompts, rows)
    args = ["train", "--prompts", str(prompts), "--outfile", str(tmp_path / "s.gguf"), *more]
    args += ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-np", "2", "-c", "256"]
    return CliRunner().invoke(main, args)


def test_a_prompt_that_repeats_is_answered_once_and_on_one_side(tiny, tmp_path):
    rows = [row for _, row in ROWS]
    result = train_on([*rows, *rows[:2]], tiny, tmp_path, "-n", "2")
    assert result.exit_code == 0, result.output
    assert "2 prompts repeat earlier ones and are left out\n" in result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["n_train"] + report["n_valid"] == report["n_answers"] == len(rows)
    entries = map(
        json.loads, (tmp_path / "s.gguf.work" / EXPERT_ANSWERS_FILE).read_text().splitlines()
    )
    assert report["n_cut"] == sum(entry["cut"] for entry in entries) > 0


def test_nothing_is_answered_for_a_fit_that_cannot_be(tiny, tmp_path, monkeypatch):
    result = train_on([row for _, row in ROWS[:4]], tiny, tmp_path)
    assert "4 lines; expected at least 5" in result.stderr
    monkeypatch.setitem(sys.modules, "scipy", None)
    missing = train_on([row for _, row in ROWS], tiny, tmp_path)
    assert "fitting a switch needs scipy" in missing.stderr
    assert (result.exit_code, missing.exit_code) == (1, 1)
    assert not (tmp_path / "s.gguf.work" / EXPERT_ANSWERS_FILE).exists()


@pytest.mark.parametrize("objective", ["best", "budget", "marginal", "weak"])
def test_of_the_experts_own_text_a_fifth_is_deferred_by_default(tiny, tmp_path, objective):
    """Each objective but regret would defer nearly all of it: an expert likes what it wrote."""
    rows = [row for _, row in ROWS]
    result = train_on(rows, tiny, tmp_path, "-n", "12", "--objective", objective)
    assert result.exit_code == 0, result.output
    switch = Switch.load(tmp_path / "s.gguf")
    assert switch.threshold == pytest.approx(switch.threshold_for(0.2))


def test_the_command_trains_from_prompts_and_resumes(tiny, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "s.gguf"
    write_rows(prompts, (row for _, row in ROWS))
    args = ["train", "--prompts", str(prompts), "--outfile", str(out), "-n", "8", "-c", "256"]
    args += ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-np", "2", "--review", "best"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["n_answers"] == len(ROWS)
    best = report["review"]["recommended"]
    assert Switch.load(out).review == (math.inf if best is None else best)
    assert "\nreview: " in result.stderr
    assert f"{out}.work: keeps the work" in result.stderr
    assert len((tmp_path / "s.gguf.work" / EXPERT_ANSWERS_FILE).read_text().splitlines()) == len(
        ROWS
    )
    first = out.read_bytes()
    assert CliRunner().invoke(main, args).exit_code == 0
    assert out.read_bytes() == first


def test_a_fit_is_not_lost_where_decodes_cannot_be_measured(tiny, tmp_path, monkeypatch):
    def fails(self):
        raise ModelError("no memory")

    monkeypatch.setattr(Pair, "cost_tables", fails)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "s.gguf"
    write_rows(prompts, (row for _, row in ROWS))
    args = ["train", "--prompts", str(prompts), "--outfile", str(out), "-n", "8", "-c", "256"]
    args += ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "--review", "best"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "of review, and the switch carries no tolerance: no memory" in result.stderr
    assert Switch.load(out).review is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give --data, texts to fit to, or --prompts"),
        (["--data", "a", "--prompts", "b"], "give --data, texts to fit to, or --prompts"),
        (["--prompts", "b", "--threshold-by", "exact"], "go with --data"),
        (["--data", "a", "--threshold-by", "python"], "--threshold-by python runs code that the"),
    ],
)
def test_the_command_says_what_goes_together(args, words):
    result = CliRunner().invoke(main, ["train", "--outfile", "x.gguf", *args])
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_template_that_writes_the_date_loses_nothing_overnight(tiny_pair, tmp_path, monkeypatch):
    dated = ChatTemplate("{{ strftime_now('%d %b') }} {{ messages[0]['content'] }}", "", "")
    monkeypatch.setattr(tiny_pair, "template", dated)
    texts = set()
    for day in 1, 2:
        now = datetime(2026, 1, day)
        monkeypatch.setattr(chat_template, "_now", now.strftime)
        texts.add(tiny_pair.prompt_text([{"role": "user", "content": "a"}]))
        answer_prompts(tiny_pair, ROWS, no_bar, work=tmp_path, **HOW)
        assert len((tmp_path / EXPERT_ANSWERS_FILE).read_text().splitlines()) == len(ROWS)
    assert texts == {"01 Jan a", "02 Jan a"}


def test_the_kept_tokens_are_best_first(tiny_pair, tmp_path):
    answer_prompts(tiny_pair, ROWS, no_bar, work=tmp_path, **HOW)
    for line in (tmp_path / EXPERT_ANSWERS_FILE).read_text().splitlines():
        entry = json.loads(line)
        for token, ids, logprobs in zip(
            entry["tokens"], entry["ids"], entry["logprobs"], strict=True
        ):
            assert ids[0] == token
            assert len(ids) == N_KEPT
            assert logprobs == sorted(logprobs, reverse=True)
