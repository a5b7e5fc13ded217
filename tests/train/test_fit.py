"""The fit: its gradient, a planted switch, an independent optimiser; the data's errors."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from lib.rows import write_rows
from progress import no_bar
from reference import PlainModel
from scipy import optimize

from colm_edge.cli import main
from colm_edge.errors import DataError, WriteError
from colm_edge.files import check_writable
from colm_edge.pair import load
from colm_edge.switch.file import Switch
from colm_edge.train import fit as train
from colm_edge.train.documents import tokenized
from colm_edge.train.fit import FitOptions, calibrate, choose_threshold
from colm_edge.train.heads import Head, Standardised, minimize
from colm_edge.train.objectives import budget_loss, hard_curve, marginal_loss, weak_loss
from colm_edge.train.scoring import score


def planted(n=20_000, k=12, seed=0):
    """Gold tokens drawn from the mixture that a known head defines: (columns, base, expert, head).

    Each token is written by the expert with probability σ(d); the writer gives it the larger
    probability, as two models that know different things would.
    """
    rng = np.random.default_rng(seed)
    columns = rng.normal(0, rng.uniform(0.5, 4, k), (n, k)).astype(np.float32) + 1
    head = Head(rng.normal(0, 0.5, k), 0.4)
    by_expert = rng.random(n) < 1 / (1 + np.exp(-head(columns)))
    likely, unlikely = np.log(rng.uniform(0.6, 0.99, n)), np.log(rng.uniform(1e-4, 0.02, n))
    base, expert = np.where(by_expert, (unlikely, likely), (likely, unlikely))
    return columns, base, expert, head


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 50.0]))
def test_gradients_agree_with_finite_differences(seed, scale):
    rng = np.random.default_rng(seed)
    d = rng.normal(0, scale, 7)
    base, expert = -rng.exponential(2, 7), -rng.exponential(2, 7)
    label = (rng.random(7) < 0.5).astype(float)
    losses = (
        partial(marginal_loss, base, expert),
        partial(weak_loss, label),
        partial(budget_loss, expert - base),
    )
    for loss in losses:
        _, gradient = loss(d)
        for i in range(7):
            step = np.zeros(7)
            step[i] = 1e-5
            numeric = (loss(d + step)[0] - loss(d - step)[0]) / 2e-5
            assert gradient[i] == pytest.approx(numeric, abs=1e-6)


def test_the_marginal_loss_is_the_papers():
    base, expert, d = np.log([0.5, 0.1]), np.log([0.2, 0.8]), np.array([0.0, 2.0])
    p = 1 / (1 + np.exp(-d))
    expected = -np.log((1 - p) * [0.5, 0.1] + p * [0.2, 0.8]).mean()
    assert marginal_loss(base, expert, d)[0] == pytest.approx(expected)


def test_extreme_states_stay_finite():
    base, expert = np.array([-700.0, -1e-9]), np.array([-1e-9, -700.0])
    value, gradient = marginal_loss(base, expert, np.array([-1e4, 1e4]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_planted_switch_is_recovered():
    columns, base, expert, head = planted(60_000)
    found = Standardised(columns.copy()).fit(lambda d: marginal_loss(base, expert, d), 1e-6)
    cosine = head.weight @ found.weight / np.linalg.norm(head.weight) / np.linalg.norm(found.weight)
    assert cosine > 0.99
    assert found.bias == pytest.approx(head.bias, abs=0.15)


def test_a_head_that_is_rescaled_keeps_its_order():
    """Where the likeliest mixture falls with what decides well: often right by much, or always by
    little."""
    rng = np.random.default_rng(0)
    n, often = 20_000, rng.random(20_000) < 0.2
    gain = np.where(often, np.where(rng.random(n) < 0.6, 3.4, -2.0), 0.2)
    block = Standardised(often.astype(np.float32)[:, None])
    head = Head(np.array([10.0]), 5.0)
    found = block.rescaled(head, lambda d: marginal_loss(np.full(n, -4.0), gain - 4.0, d), 1e-6)
    assert found.weight[0] > 0


def test_the_fit_matches_an_independent_optimiser():
    columns, base, expert, _ = planted(5_000, seed=3)
    scale = columns.std(axis=0)

    def loss(x):
        d = columns.astype(np.float64) @ x[:-1] + x[-1]
        value, by_d = marginal_loss(base, expert, d)
        penalty = 1e-4 * float(((x[:-1] * scale) ** 2).sum())
        gradient = np.append(columns.T.astype(np.float64) @ by_d, by_d.sum())
        gradient[:-1] += 2e-4 * x[:-1] * scale**2
        return value + penalty, gradient

    found = Standardised(columns.copy()).fit(lambda d: marginal_loss(base, expert, d), 1e-4)
    ours, _ = loss(np.append(found.weight, found.bias))
    theirs = optimize.minimize(
        loss, np.zeros(13), jac=True, method="BFGS", options={"maxiter": 5000}
    ).fun
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_minimize_solves_a_hard_valley():
    """Rosenbrock's function in ten dimensions."""
    found = minimize(lambda x: (optimize.rosen(x), optimize.rosen_der(x)), np.zeros(10), steps=1000)
    assert np.allclose(found, 1, atol=1e-2)


def test_scales_are_folded_into_the_weights():
    """Columns in other units give other weights and the same d."""
    columns, base, expert, _ = planted(4_000, seed=5)
    loss = lambda d: marginal_loss(base, expert, d)  # noqa: E731
    units = np.array([1e-3, 1e3] * 6, np.float32)
    one, other = (
        Standardised(columns.copy()).fit(loss, 1e-3),
        Standardised(columns * units).fit(loss, 1e-3),
    )
    assert np.allclose(one(columns), other(columns * units), atol=0.05)


def test_thresholds_defer_as_calibrated():
    rng = np.random.default_rng(0)
    p = rng.random(5000) ** 2
    rates, thresholds = calibrate(p)
    assert rates[0] == 0
    assert thresholds[0] == 1
    assert rates[-1] == 1
    assert thresholds[-1] == 0
    for rate, threshold in zip(rates, thresholds, strict=True):
        assert (p > threshold).mean() == pytest.approx(rate, abs=0.01)


def test_the_default_threshold_defers_what_pays():
    p = np.linspace(0.99, 0.01, 99)
    expert_wins = p > 0.405
    base = np.where(expert_wins, -3.0, -0.1)
    expert = np.where(expert_wins, -0.1, -3.0)
    assert choose_threshold(p, base, expert) == pytest.approx(0.405, abs=0.011)
    assert choose_threshold(p, expert * 0, expert) == 1.0  # an expert that never helps
    assert choose_threshold(p, p * 0 - 2.0, p * 0 - 1.0) < 0.02  # one that always does


@pytest.mark.parametrize("n", [500, 2_000, 20_000])
def test_the_default_threshold_defers_what_pays_a_little(n):
    """A tenth of the tokens, each by a quarter of a nat: far less than the losses differ."""
    draw = np.random.default_rng(0)
    base, hard = -draw.gamma(0.25, 4, n), draw.random(n) < 0.1
    expert = base + np.where(hard, 0.25, 0.0) + draw.normal(0, 0.02, n)
    p = np.clip(np.where(hard, 0.9, 0.1) + draw.normal(0, 0.02, n), 0.001, 0.999)
    deferred = p > choose_threshold(p, base, expert)
    assert deferred[hard].mean() > 0.9
    assert deferred[~hard].mean() < 0.2


@given(rate=st.floats(0.003, 0.05), seed=st.integers(0, 99))
def test_low_rates_are_met_too(rate, seed):
    """Where p_defer falls off quickly, between two calibrated rates too."""
    p = 1 / (1 + np.exp(4 - 1.5 * np.random.default_rng(seed).normal(size=20_000)))
    rates, thresholds = calibrate(p)
    assert (p > np.interp(rate, rates, thresholds)).mean() == pytest.approx(rate, rel=0.25)


def test_thresholds_survive_float32_and_ties():
    """p so near to 1 that they round to it, and many alike: the threshold still tells them apart
    from the rest, in the precision of the file."""
    p = np.array([1 - 1e-9] * 30 + [1 - 3e-8] * 20 + [0.2] * 50)
    base, expert = np.full(100, -1.0), np.where(p > 0.5, -0.1, -3.0)
    threshold = choose_threshold(p, base, expert)
    assert threshold == np.float32(threshold) < 1
    assert (p > np.float32(threshold)).sum() == 50
    _, thresholds = calibrate(p)
    assert all((p > np.float32(t)).any() for t in thresholds[1:])


def test_the_joint_model_is_no_worse_than_either_alone():
    """An expert better on every token and never right where the base is wrong: no weak label."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(400, 3)).astype(np.float32)
    base, expert = np.full(400, -5.3), np.full(400, -3.0)
    found = Standardised(columns.copy()).fit(lambda d: marginal_loss(base, expert, d), 1e-3)
    assert marginal_loss(base, expert, found(columns))[0] == pytest.approx(3.0, abs=0.01)


def test_scores_are_those_of_a_plain_evaluation(tiny):
    """Gold log-probabilities, features and right-or-wrong flags, position by position."""
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        rows = [("hello there", "general reply"), ("hello", "another one"), ("x", "é")]
        documents = tokenized(
            [(i, {"prompt": p, "completion": c}) for i, (p, c) in enumerate(rows)], pair
        )
        scores = score(pair, documents, no_bar)
    at = 0
    models = {name: PlainModel(tiny[name]) for name in ("base", "expert")}
    for document in documents:
        assert document.tokens[-1] == 0  # the end of the turn is learnt too
        for position in range(document.start, len(document.tokens)):
            gold = document.tokens[position]
            for name, model in models.items():
                logits, hidden = model.state(document.tokens[:position])
                logprob = logits[gold] - np.logaddexp.reduce(logits)
                assert getattr(scores, name)[at] == pytest.approx(logprob, abs=2e-2)
                assert getattr(scores, f"{name}_right")[at] == (logits.argmax() == gold)
                if name == "base":
                    assert np.allclose(scores.hidden[at], hidden, atol=2e-2)
                    assert scores.logit_features[at, 1] == pytest.approx(
                        logits.max() - np.logaddexp.reduce(logits), abs=2e-2
                    )
            assert scores.line[at] == document.line
            at += 1
    assert at == len(scores.base)
    for model in models.values():
        model.close()


def test_training_learns_to_call_the_model_that_writes_the_text(tiny):
    """The expert's own greedy text: deferring must pay, and the joint model beat the base."""
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        rows = []
        for i in range(30):
            text = pair.generate(f"prompt {i}", threshold=0.0, temperature=0.0, max_tokens=12).text
            rows.append({"prompt": f"prompt {i}", "completion": text.strip() or "x"})
        documents = tokenized(enumerate(rows), pair)
        for features in ("hidden", "logits", "both"):
            fit = train.fit_switch(
                pair,
                documents,
                FitOptions(features, "marginal", compare=True),
                progress=no_bar,
            )
            switch, report = fit.switch, fit.report
            assert set(report["feature_sets"]) == {"hidden", "logits", "both"}
            assert report["feature_sets"][features]["nll_joint"] == report["nll_joint"]
            assert report["nll_joint"] < report["nll_base"]
            assert report["nll_joint"] <= report["nll_expert"] + 0.05
            assert report["defer_rate"] > 0.5
            assert report["nll_oracle"] <= report["nll_hard"] <= report["nll_base"]
            assert (report["n_train"], report["n_valid"]) == (24, 6)
            assert switch.needs_hidden == (features != "logits")
        again = train.fit_switch(pair, documents, FitOptions("both", "marginal"), progress=no_bar)
        assert np.array_equal(again.switch.weight, switch.weight)
        best = train.fit_switch(pair, documents, FitOptions("both"), progress=no_bar).report
        figures = best["objectives"]
        means = {
            name: np.mean([figures[name][f"nll_hard_{rate}"] for rate in (0.1, 0.2, 0.3)])
            for name in train.BEST_OF
        }
        assert best["objective"] == min(means, key=means.__getitem__)
        assert best["nll_joint"] == figures[best["objective"]]["nll_joint"]


def test_the_budget_loss_ranks_by_what_deferring_gains():
    """Where the base is often and mildly worse on some tokens, and seldom and badly on others, a
    budget of 0.2 goes to the latter; the mixture's likelihood wants both."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 8_000)  # 0, 1: the base knows; 2: mildly worse; 3: badly worse
    gain = np.select([kind == 2, kind == 3], [0.3, 4.0], -2.0)
    columns = np.eye(4, dtype=np.float32)[kind]
    budget = Standardised(columns.copy()).fit(partial(budget_loss, gain), 1e-4)
    d = budget(columns)
    assert d[kind == 3].min() > d[kind == 2].max() > d[kind < 2].max()
    curve = hard_curve(d, np.zeros(len(gain)), gain)
    assert curve[1600] == pytest.approx(-np.sort(gain)[-1600:].sum() / len(gain))


def test_the_budget_loss_is_about_the_ranking_alone():
    rng = np.random.default_rng(1)
    d, gain = rng.normal(0, 3, 500), rng.normal(0, 2, 500)
    value, gradient = budget_loss(gain, d)
    assert budget_loss(gain, d + 7)[0] == pytest.approx(value, abs=1e-8)
    assert abs(gradient.sum()) < 1e-9
    # A very steep d decides hard: the loss is what deferring the share of highest d gains.
    steep, rate = budget_loss(gain, d * 1e4, (0.2,))[0], 100
    assert steep == pytest.approx(-gain[np.argsort(-d)[:rate]].sum() / 500, abs=1e-3)


def test_rescaling_keeps_the_ranking_and_betters_the_mixture():
    columns, base, expert, head = planted(5_000, seed=2)
    block = Standardised(columns.copy())
    wrong = Head(head.weight * 5, head.bias + 4)
    right = block.rescaled(wrong, partial(marginal_loss, base, expert), 1e-6)
    cosine = wrong.weight @ right.weight
    assert cosine == pytest.approx(np.linalg.norm(wrong.weight) * np.linalg.norm(right.weight))
    planted_loss, _ = marginal_loss(base, expert, head(columns))
    assert marginal_loss(base, expert, right(columns))[0] == pytest.approx(planted_loss, rel=0.01)
    assert marginal_loss(base, expert, wrong(columns))[0] > planted_loss * 1.2


def test_an_update_begins_with_the_old_switch_and_is_compared_with_it(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        rows = [{"prompt": f"p{i}", "completion": f"c{i} and some more"} for i in range(40)]
        old = train.fit_switch(
            pair, tokenized(enumerate(rows[:20]), pair), FitOptions("both"), progress=no_bar
        )
        documents = tokenized(enumerate(rows), pair)
        new = train.fit_switch(
            pair, documents, FitOptions("both", update=old.switch), progress=no_bar
        )
        scores = score(pair, documents, no_bar)
    before = new.report["before"]
    d = scores.hidden @ old.switch.weight[0, :-8] + old.switch.bias[0]
    d = (d + scores.logit_features @ old.switch.weight[0, -8:])[new.valid].astype(np.float64)
    base, expert = scores.base[new.valid], scores.expert[new.valid]
    assert before["nll_joint"] == pytest.approx(marginal_loss(base, expert, d)[0], abs=1e-4)
    assert before["threshold"] == old.switch.threshold
    assert new.p_before == pytest.approx(1 / (1 + np.exp(-d)), abs=1e-4)


def piped_again(args: list[str], path: str) -> dict:
    """Return the report of the same command, its data from a pipe."""
    command = " ".join(f"<(cat {path})" if arg == path else arg for arg in args)
    shell = ["bash", "-c", f"{sys.executable} -m colm_edge {command}"]
    run = subprocess.run(shell, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_a_threshold_chosen_by_answers_is_the_best_of_those_tried(tiny, tmp_path):
    """On the expert's own texts: a trial at every rate, the best one's threshold in the switch."""
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        lines = []
        for i in range(20):
            text = pair.generate(f"p {i}", threshold=0.0, temperature=0.0, max_tokens=6).text
            lines.append(json.dumps({"prompt": f"p {i}", "completion": text.strip() or "x"}))
    path, out = tmp_path / "d.jsonl", tmp_path / "s.gguf"
    path.write_text("\n".join(lines))
    args = [
        "train",
        "--data",
        str(path),
        "--outfile",
        str(out),
        "-m",
        tiny["base"],
        "-me",
        tiny["expert"],
        "-t",
        "1",
        "-c",
        "64",
    ]
    by = ["--threshold-by", "exact", "--threshold-lines", "3"]
    result = CliRunner().invoke(main, [*args, *by])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    trials = report["threshold_by"]["trials"]
    assert len(trials) == 11
    assert (trials[0]["threshold"], trials[-1]["threshold"]) == (1, 0)
    best = max(trial["exact"] for trial in trials)
    highest = max(trial["threshold"] for trial in trials if trial["exact"] == best)
    assert Switch.load(out).threshold == np.float32(highest)
    assert report["threshold"] == highest
    work = ["--work-dir", str(tmp_path / "work")]
    for _ in range(2):  # the second time from what is kept
        result = CliRunner().invoke(main, [*args, *by, *work])
        assert json.loads(result.stdout.splitlines()[-1])["threshold_by"] == report["threshold_by"]
        assert len((tmp_path / "work" / "answers.jsonl").read_text().splitlines()) == 33
    if sys.platform != "win32":  # a pipe gives its lines once, and the answers need them too
        again = piped_again([*args, *by], str(path))
        assert again["threshold_by"] == report["threshold_by"]
    result = CliRunner().invoke(main, [*args[:7], *by, "--expert-scores", "x.npz"])
    assert result.exit_code == 2
    assert "needs the expert itself" in result.output


def test_much_data_is_searched_in_part_and_fitted_whole(tiny, monkeypatch):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        rows = [{"prompt": f"p{i}", "completion": f"c{i} and some more"} for i in range(40)]
        documents = tokenized(enumerate(rows), pair)
        whole = train.fit_switch(pair, documents, FitOptions("logits"), progress=no_bar)
        monkeypatch.setattr(train, "SEARCH_TOKENS", 200)
        part = train.fit_switch(pair, documents, FitOptions("logits"), progress=no_bar)
    assert part.report["n_train_tokens"] > 200
    # The last fit is on all of the data, so only the choice of l2 may differ.
    assert part.report["nll_joint"] == pytest.approx(whole.report["nll_joint"], rel=0.02)


def test_too_few_documents_are_an_error(tiny_pair):
    few = tokenized([(1, {"text": "ab cd"})], tiny_pair)
    with pytest.raises(DataError, match="expected at least 5"):
        train.fit_switch(tiny_pair, few, FitOptions("both"), progress=no_bar)


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    with pytest.raises(WriteError, match="no such folder"):
        check_writable(tmp_path / "absent" / "s.gguf")
    with pytest.raises(WriteError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "s.gguf.tmp").write_text("somebody's")
    check_writable(tmp_path / "s.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["s.gguf.tmp"]


def test_a_result_never_replaces_what_it_was_made_from(tiny, tmp_path, monkeypatch):
    data, listed, listing = (tmp_path / name for name in ("d.jsonl", "base.gguf", "models.txt"))
    listed.write_bytes(Path(tiny["base"]).read_bytes())
    listing.write_text(f"mine base {listed} MIT\nmine expert {tiny['expert']} MIT\n")
    monkeypatch.setattr("colm_edge.references._models_txt", lambda: listing)
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 6)
    before = data.read_bytes()
    models = ["-m", tiny["base"], "-me", tiny["expert"]]
    for command, target in (
        (["train"], data),
        (["score"], data),
        (["train"], tiny["base"]),
        (["score"], tiny["expert"]),
        (["train", "-me", f"named={tiny['expert']}"], tiny["expert"]),
        (["train", "--pair", "mine"], listed),
    ):
        chosen = [] if "--pair" in command else models
        args = [command[0], *chosen, *command[1:], "--data", str(data), "--outfile", str(target)]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 1
        assert "is used by this command already; give the result another name" in result.output
    assert data.read_bytes() == before


def test_a_switch_names_the_expert_that_was_scored(tiny, tmp_path):
    data, out = tmp_path / "d.jsonl", tmp_path / "s.gguf"
    write_rows(data, ({"prompt": f"p{i}", "completion": "c"} for i in range(8)))
    scores = str(tmp_path / "e.npz")
    common = ["--data", str(data), "-m", tiny["base"], "-t", "1"]
    score_args = ["score", *common, "-me", tiny["expert"], "--outfile", scores]
    assert CliRunner().invoke(main, score_args).exit_code == 0
    train_args = ["train", *common, "--expert-scores", scores, "--outfile", str(out)]
    assert CliRunner().invoke(main, train_args).exit_code == 0
    fields = GGUFReader(out).fields
    assert fields["colm.switch.expert"].contents() == "expert.gguf"


def test_without_scipy_nothing_is_scored_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a text of some tokens"}\n' * 6)
    args = ["train", "-m", tiny["base"], "-me", tiny["expert"], "--data", str(data)]
    result = CliRunner().invoke(main, [*args, "--outfile", str(tmp_path / "switch.gguf")])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("pip install 'colm-edge[train]'")
    assert "base  [" not in result.stderr
