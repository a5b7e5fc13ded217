"""What `eval` finds in its work folder, and what it does not take from there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lib.rows import write_rows
from progress import no_bar

from colm_edge.errors import DataError
from colm_edge.evaluate import methods as ev
from colm_edge.evaluate.methods import Comparison
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.switch.load import load_switch

GREEDY = Options(temperature=0.0, max_tokens=8, schedule="sequential")


def test_answers_are_kept_by_how_many_are_written_at_once(tiny_pair, data, tmp_path):
    """What is kept says how long it took."""
    wanted = Comparison(metric="contains", limit=2, methods=["base"])
    for n_slots, n_kept in (1, 2), (2, 4), (1, 4):
        at_once = replace(wanted, n_slots=n_slots)
        ev.evaluate(tiny_pair, data, GREEDY, at_once, progress=no_bar, work=tmp_path)
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == n_kept


def test_a_speed_is_told_only_where_it_was_measured(tiny, data, tmp_path):
    """Answers of another number at once, or of other threads, have times of their own; the expert's
    own text, which is scored, is not written again for that."""
    wanted = Comparison(metric="contains", limit=2, methods=["base", "expert"], on_expert=True)

    def speeds(n_slots, n_threads, **more):
        files = tiny["base"], tiny["expert"], "margin"
        with load(*files, n_threads=n_threads, n_ctx=256, **more) as pair:
            at_once = replace(wanted, n_slots=n_slots)
            table = ev.evaluate(pair, data, GREEDY, at_once, progress=no_bar, work=tmp_path)
        return [row["tokens_per_second"] for row in table]

    first = speeds(1, 1)
    assert None not in first
    assert speeds(1, 1) == first
    for others, more in ((2, 1), {}), ((1, 2), {}), ((1, 1), {"overlap": True}):
        base, expert = speeds(*others, **more)
        assert base not in (None, first[0])
        assert expert is None


def test_scores_by_another_cache_type_are_refused(tiny, tiny_pair, data, tmp_path):
    wanted = Comparison(limit=2, methods=["base"])
    ev.evaluate(tiny_pair, data, GREEDY, wanted, progress=no_bar, work=tmp_path)
    with (
        load(tiny["base"], tiny["expert"], "margin", n_ctx=256, cache_type_k="q8_0") as pair,
        pytest.raises(DataError, match="by another cache type; name another work folder"),
    ):
        ev.evaluate(pair, data, GREEDY, wanted, progress=no_bar, work=tmp_path)


def test_an_answer_is_found_wherever_what_it_depends_on_is_the_same(tiny_pair, data, tmp_path):
    """The base alone and the expert alone read no switch, deferral no option of review, and a line
    may move."""
    wanted = Comparison(metric="contains", limit=3, methods=["base", "expert", "entropy"])
    lines = Path(data).read_text().splitlines()

    def n_kept(data, options, switch="margin"):
        with tiny_pair.switched(load_switch(switch)):
            ev.evaluate(tiny_pair, data, options, wanted, progress=no_bar, work=tmp_path)
        return len((tmp_path / "answers.jsonl").read_text().splitlines())

    at = GREEDY.with_changes(threshold=0.4)
    assert n_kept(data, at) == 9
    assert n_kept(data, at.with_changes(review_floor=0.3)) == 9
    moved = tmp_path / "moved.jsonl"
    moved.write_text("\n".join(["", *lines]) + "\n")
    assert n_kept(moved, at) == 9
    n_kept(data, at, "entropy")  # the row of that name may have another threshold now
    entries = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert sum(entry["method"] in ("base", "expert") for entry in entries) == 6


def test_a_random_switch_draws_by_the_line(tiny_pair, data, tmp_path):
    wanted = Comparison(metric="contains", limit=3, methods=["random"])
    moved = tmp_path / "moved.jsonl"
    moved.write_text("\n" + Path(data).read_text())
    at = GREEDY.with_changes(threshold=0.5)
    for file, n_kept in (data, 3), (moved, 6):
        ev.evaluate(tiny_pair, file, at, wanted, progress=no_bar, work=tmp_path)
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == n_kept


def test_a_conversation_is_answered_as_its_last_question(tiny_pair, tmp_path):
    """A line of messages is what a prompt is; an answer at its end is not told to the models."""
    turns = [{"role": "user", "content": "p"}]
    known = [*turns, {"role": "assistant", "content": "c and more"}]
    rows = [{"prompt": "p"}, {"messages": turns}, {"messages": known}]
    file = tmp_path / "d.jsonl"
    told = [{"completion": "c and more", "answer": "more", **row} for row in rows]
    write_rows(file, told)
    wanted = Comparison(metric="contains", methods=["expert"], on_expert=True)
    ev.evaluate(tiny_pair, file, GREEDY, wanted, progress=no_bar, work=tmp_path / "w")
    wanted = replace(wanted, methods=["base"])
    ev.evaluate(tiny_pair, file, GREEDY, wanted, progress=no_bar, work=tmp_path / "w")
    entries = map(json.loads, (tmp_path / "w" / "answers.jsonl").read_text().splitlines())
    found = {(entry["key"], entry["text"]) for entry in entries if entry["method"] == "base"}
    assert len(found) == 1
