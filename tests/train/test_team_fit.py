"""A switch for several experts: its losses, and what a fit finds."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lib.rows import write_rows
from progress import no_bar

from colm_edge.cli import main
from colm_edge.errors import DataError
from colm_edge.pair import Pair, load
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.switch.rules import Only
from colm_edge.train import objectives, team
from colm_edge.train.documents import tokenized
from colm_edge.train.fit import feature_columns
from colm_edge.train.scores import Scores
from colm_edge.train.scoring import score
from colm_edge.train.team_scores import score_answers, score_texts


def drawn(seed: int, n: int = 40, n_experts: int = 3):
    rng = np.random.default_rng(seed)
    return rng, -rng.exponential(2, (n, 1 + n_experts)), rng.normal(0, 2, (n, n_experts))


def slope(loss, d, i, k):
    step = np.zeros_like(d)
    step[i, k] = 1e-6
    return (loss(d + step)[0] - loss(d - step)[0]) / 2e-6


@given(seed=st.integers(0, 10_000))
def test_gradients_are_those_of_the_losses(seed):
    rng, gold, d = drawn(seed)
    regret, writer = rng.exponential(3, 40), rng.integers(0, 3, 40)
    for loss in (
        lambda d: team.team_marginal_loss(gold, d),
        lambda d: team.team_regret_loss(regret, writer, d),
    ):
        gradient = loss(d)[1]
        for i, k in ((0, 0), (7, 1), (39, 2)):
            assert gradient[i, k] == pytest.approx(slope(loss, d, i, k), abs=1e-6)


@given(seed=st.integers(0, 10_000))
def test_with_one_expert_they_are_todays(seed):
    rng, gold, d = drawn(seed, n_experts=1)
    regret = rng.exponential(3, 40)
    pairs = [
        (
            team.team_marginal_loss(gold, d),
            objectives.marginal_loss(gold[:, 0], gold[:, 1], d[:, 0]),
        ),
        (
            team.team_regret_loss(regret, np.zeros(40, np.int64), d),
            objectives.regret_loss(regret, d[:, 0]),
        ),
    ]
    for ours, theirs in pairs:
        assert ours[0] == pytest.approx(theirs[0])
        assert ours[1][:, 0] == pytest.approx(theirs[1])
    left = team.team_regret_left(regret, np.zeros(40, np.int64), d)
    removed = objectives.regret_removed(d[:, 0], regret)
    assert left == pytest.approx(1 - removed.mean())


def made(n_lines: int = 200, per_line: int = 20, seed: int = 0) -> team.TeamScores:
    """Lines of two kinds, each known to one of two experts, where a column of the state tells the
    kind and another whether the base knows the token."""
    rng = np.random.default_rng(seed)
    n = n_lines * per_line
    line = np.repeat(np.arange(n_lines), per_line)
    kind, hard = line % 2, rng.random(n) < 0.3
    hidden = rng.normal(0, 1, (n, 4)).astype(np.float32)
    hidden[:, 0] += 3 * (2 * kind - 1)
    hidden[:, 1] += 3 * (2 * hard - 1)
    base = np.where(hard, -5.0, -0.2)
    scores = []
    for k in (0, 1):
        knows = kind == k
        expert = np.where(hard, np.where(knows, -0.3, -4.0), -0.5)
        scores.append(
            Scores(
                hidden=hidden,
                logit_features=np.zeros((n, 8), np.float32),
                base=base,
                expert=expert,
                best=np.where(knows & hard, -0.3, -0.2),
                choice=np.where(hard, -5.0, -0.2),
                likeliest=np.where(hard, 2, 1).astype(np.int32),
                expert_right=knows,
                token=np.ones(n, np.int32),
                line=line,
                importance=np.where(np.arange(n) % 3, 1.0, 10.0),
            )
        )
    return team.TeamScores(scores, team.likeliest_writers(scores), by_all=True)


@pytest.mark.parametrize("objective", ["best", "regret"])
def test_each_expert_is_called_for_what_it_knows(objective):
    scores = made()
    assert np.array_equal(scores.writer, scores.line % 2)
    switch, report = team.fit_team(
        scores, set(range(0, 200, 5)), ["a", "b"], objective=objective, info={}
    )
    assert switch.n_experts == 2
    assert report["objective"] == {"best": "marginal", "regret": "regret"}[objective]
    assert report["sent"]["a"]["a"] > 0.95
    assert report["sent"]["b"]["b"] > 0.95
    assert report["nll_oracle"] < report["nll_joint"] < report["nll_expert"]
    assert report["regret_removed"] > 0.37  # of 0.39, at these rates
    assert report["nll_experts"].keys() == {"a", "b"}
    if objective == "best":
        alone = [  # the mixture with one of them, as well as it can be fitted
            team.fit_team(
                team.TeamScores([one], np.zeros(len(one.base), np.int64), by_all=True),
                set(range(0, 200, 5)), ["x"], objective="marginal", info={},
            )[1]["nll_joint"]
            for one in scores.scores
        ]  # fmt: skip
        assert report["nll_joint"] < min(alone)


@given(seed=st.integers(0, 10_000), n=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_documents_of_each_expert_are_read_as_if_they_were_joined(seed, n):
    rng = np.random.default_rng(seed)
    parts = [made(1, rows, seed + rows).scores[0] for rows in n]
    for k, part in enumerate(parts):
        part.line[:] = 100 * k + rng.integers(0, 3, len(part.line))
        part.best[:] = -rng.exponential(1, len(part.best))
        part.logit_features[:] = rng.normal(0, 1, part.logit_features.shape)
    names = [field.name for field in fields(Scores)]
    joined = Scores(**{f: np.concatenate([getattr(p, f) for p in parts]) for f in names})
    writer = np.repeat(np.arange(len(n)), n)
    apart = team.TeamScores(parts, writer, by_all=False)
    rows = rng.permutation(len(writer))[: rng.integers(1, len(writer) + 1)]
    assert np.array_equal(apart.line, joined.line)
    assert np.array_equal(apart.regret(rows), joined.regret(rows))
    assert np.array_equal(apart.regret(rows, weighed=True), joined.weighed_regret(rows))
    for names in FEATURE_SETS.values():
        assert np.array_equal(apart.features(rows, names), feature_columns(joined, rows, names))


def test_mapped_scores_of_a_team_stay_mapped(tiny, tmp_path):
    """A work folder may be larger than memory."""
    rows = [(i, {"prompt": f"say {i}", "expert": "ab"[i % 2]}) for i in range(12)]
    how = {"raw": False, "seed": 0}
    found = score_answers(
        opener(tiny["base"], {"a": tiny["expert"], "b": tiny["base"]}), ["a", "b"], rows, no_bar,
        work=tmp_path / "answers", max_tokens=8, n_slots=2, **how,
    )  # fmt: skip
    texts = score_texts(
        opener(tiny["base"], {"a": tiny["expert"], "b": tiny["base"]}), ["a", "b"],
        [(i, {"text": f"it is {i}"}) for i in range(8)], no_bar, work=tmp_path / "texts", **how,
    )  # fmt: skip
    for scores in (*found.team.scores, *texts.team.scores):
        for name in ("hidden", "logit_features", "base", "likeliest", "token", "line"):
            assert isinstance(getattr(scores, name), np.memmap), name


def test_a_team_shares_the_ids_that_all_of_them_have(tiny, tmp_path, monkeypatch):
    """The base never chooses an id that one of the experts lacks, whichever of them is open."""
    files = {"a": tiny["expert"], "b": tiny["base"]}
    rows = [(i, {"text": f"it is {i * 7} or so"}) for i in range(8)]
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        documents = tokenized(rows, pair)
        free = score(pair, documents, no_bar)
        n = int(documents.tokens.max()) + 1
        pair.most_shared = n
        expected = score(pair, documents, no_bar)
    assert (free.likeliest >= n).any()
    monkeypatch.setattr(
        "colm_edge.team.shared_vocab",
        lambda base, expert: n if str(expert.path) == files["b"] else base.n_vocab,
    )
    for names in ("ab", "ba"):
        found = score_texts(
            opener(tiny["base"], files), [*names], rows, no_bar, raw=False, work=tmp_path, seed=0
        )
        scores = found.team.scores[names.index("a")]
        assert np.array_equal(scores.likeliest, expected.likeliest)
        assert np.array_equal(scores.choice, expected.choice)


def opener(base: str, files: dict[str, str]):
    return lambda name: load(base, files[name], "margin", n_threads=1, n_ctx=128)


def test_objectives_that_the_scores_do_not_tell_are_refused():
    scores = made(20)
    for objective in ("budget", "weak"):
        with pytest.raises(DataError, match="is for one expert"):
            team.fit_team(scores, {1}, ["a", "b"], objective=objective, info={})
    written = team.TeamScores(scores.scores[:1], scores.writer, by_all=False)
    with pytest.raises(DataError, match="needs what every expert thinks"):
        team.fit_team(written, {1}, ["a", "b"], objective="marginal", info={})


def trained(tiny, tmp_path, *text, experts=("a", "b")):
    files = dict(zip(experts, (tiny["expert"], tiny["base"]), strict=True))
    given = [part for name, file in files.items() for part in ("-me", f"{name}={file}")]
    out = tmp_path / "router.gguf"
    return out, CliRunner().invoke(
        main,
        ["train", "-m", tiny["base"], *given, "--outfile", str(out), "-t", "1", "-c", "128", *text],
    )


def test_train_makes_a_switch_that_both_experts_answer_with(tiny, tmp_path):
    data = write_rows(
        tmp_path / "data.jsonl",
        [
            {"prompt": f"say {i}", "completion": f"it is {i * 7}", "answer": str(i * 7)}
            for i in range(12)
        ],
    )
    out, ran = trained(tiny, tmp_path, "--data", data)
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout.splitlines()[-1])
    assert {"nll_base", "nll_expert", "nll_joint", "n_train", "n_valid", "threshold"} <= set(report)
    switch = Switch.load(out)
    assert switch.expert_names == ("a", "b")
    assert switch.info["expert.a_fingerprint"] != switch.info["expert.b_fingerprint"]
    # The work folder keeps the scores: the same command gives the same bytes.
    before = out.read_bytes()
    assert trained(tiny, tmp_path, "--data", data)[1].exit_code == 0
    assert out.read_bytes() == before
    models = ["-m", tiny["base"], "-me", f"b={tiny['base']}", "-me", f"a={tiny['expert']}"]
    how = ["-sw", str(out), "-t", "1", "-c", "128", "-n", "12"]
    ran = CliRunner().invoke(main, ["run", "say 3", *models, *how, "--json"])
    assert ran.exit_code == 0, ran.output
    assert "was fitted for another" not in ran.stderr
    assert list(json.loads(ran.stdout)["stats"]["experts"]) == ["expert:a", "expert:b"]
    table = CliRunner().invoke(
        main, ["eval", "--data", data, "--metric", "contains", *models, *how, "-o", "json"]
    )
    assert table.exit_code == 0, table.output
    rows = {row["method"]: row for row in json.loads(table.stdout)}
    assert list(rows) == ["base", "expert:a", "expert:b", "colm", "compose"]
    assert rows["colm"]["nll"] < min(rows[name]["nll"] for name in ("expert:a", "expert:b"))
    alone = load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128)
    with alone as pair:
        text = pair.generate("say 3", threshold=0.0, temperature=0.0, max_tokens=12).text
    with (
        load(
            tiny["base"], {"a": tiny["expert"], "b": tiny["base"]}, out, n_threads=1, n_ctx=128
        ) as pair,
        pair.switched(Only(0)),
    ):
        answer = pair.generate("say 3", threshold=0.0, temperature=0.0, max_tokens=12)
        assert (answer.text, answer.stats.base_tokens) == (text, 0)
    refused = CliRunner().invoke(
        main, ["eval", "--data", data, *models, "-sw", str(out), "--methods", "margin"]
    )
    assert "the method margin names no expert" in refused.stderr


def test_a_listed_pair_of_several_experts_is_trained_as_one_team(tiny, tmp_path, monkeypatch):
    listing = tmp_path / "models.txt"
    listing.write_text(
        f"team base {tiny['base']} MIT\nteam expert:a {tiny['expert']} MIT\n"
        f"team expert:b {tiny['base']} MIT\n"
    )
    monkeypatch.setattr("colm_edge.references._models_txt", lambda: listing)
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * 7}"} for i in range(8)]
    data, out = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "team.gguf"
    how = ["--pair", "team", "--data", data, "-t", "1", "-c", "128"]
    ran = CliRunner().invoke(main, ["train", *how, "--outfile", str(out)])
    assert ran.exit_code == 0, ran.output
    assert Switch.load(out).expert_names == ("a", "b")
    ran = CliRunner().invoke(main, ["score", *how, "--outfile", str(tmp_path / "s.npz")])
    assert "score works with one expert" in ran.stderr
    ran = CliRunner().invoke(main, ["run", "hi", "--pair", "team"])
    assert "margin says when to defer, and not to which of 2 experts" in ran.stderr


def test_train_from_prompts_each_with_its_expert(tiny, tmp_path):
    rows = [{"prompt": f"say {i}", "expert": "ab"[i % 2]} for i in range(12)]
    out, ran = trained(
        tiny, tmp_path, "--prompts", write_rows(tmp_path / "p.jsonl", rows), "-n", "8", "-np", "2"
    )
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout.splitlines()[-1])
    assert (report["n_answers"], report["objective"]) == (12, "regret")
    assert Switch.load(out).n_experts == 2


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        ([{"prompt": "x"}], (), "line 1: expert is None; with several experts every prompt names"),
        ([{"prompt": f"{i}", "expert": "a"} for i in range(5)], (), "0 prompts name the expert b"),
        ([{"prompt": "x", "expert": ["a"]}], (), "expert is ['a']; with several experts"),
        ([{"prompt": "x", "expert": "a"}], ("--review", "2"), "--review does not work with sev"),
        ([{"prompt": "x", "expert": "a"}], ("--review", "0"), "--review does not work with sev"),
        ([{"prompt": "x", "expert": "a"}], ("--objective", "weak"), "weak is for one expert"),
        ([{"prompt": "x", "expert": "a"}], ("--objective", "marginal"), "give --data, or"),
    ],
)
def test_what_does_not_go_with_several_experts_is_said(tiny, tmp_path, rows, more, words):
    _, ran = trained(tiny, tmp_path, "--prompts", write_rows(tmp_path / "p.jsonl", rows), *more)
    assert ran.exit_code in (1, 2)
    assert words in ran.stderr
    assert "base" not in ran.stderr.partition("Error")[0]  # nothing was evaluated for that


def test_a_bad_prompt_of_the_last_expert_is_told_before_any_answer(tiny, tmp_path):
    rows = [(i, {"prompt": f"say {i}", "expert": "ab"[i % 2]}) for i in range(12)]
    rows[-1] = 11, {"prompt": "", "expert": "b"}
    files = {"a": tiny["expert"], "b": tiny["base"]}
    with pytest.raises(DataError, match="line 11: the prompt is empty"):
        score_answers(
            opener(tiny["base"], files), ["a", "b"], rows, no_bar,
            raw=False, seed=0, work=tmp_path / "w", max_tokens=8, n_slots=2,
        )  # fmt: skip
    assert not (tmp_path / "w").exists()


def test_an_objective_that_a_server_cannot_serve_is_told_before_the_scoring(tiny, tmp_path):
    rows = write_rows(tmp_path / "d.jsonl", [{"text": f"it is {i}"} for i in range(8)])
    ran = CliRunner().invoke(
        main,
        ["train", "-m", tiny["base"], "-me", f"a={tiny['expert']}", "-me", "b=http://127.0.0.1:9",
         "--data", rows, "--objective", "regret", "--outfile", str(tmp_path / "s.gguf")],
    )  # fmt: skip
    assert ran.exit_code == 1
    assert "which a server does not tell" in ran.stderr
    assert not (tmp_path / "s.gguf.work").exists()


def test_a_team_is_scored_in_the_context_that_fits_all(tiny, tmp_path):
    rows = [(i, {"text": f"it is {i} " + "or so " * (40 if i == 3 else 1)}) for i in range(8)]
    contexts = {"a": 128, "b": 32}

    def opened(name: str) -> Pair:
        return load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=contexts[name])

    for names in ("ab", "ba"):
        found = score_texts(
            opened, [*names], rows, no_bar, raw=False, work=tmp_path / names, seed=0
        )
        first, second = found.team.scores
        assert np.array_equal(first.token, second.token)
        assert found.n_cut == 1
