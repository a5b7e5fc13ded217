"""Scores of an expert behind HTTP: those of one here, and what becomes of failures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from expert_servers import faking
from remote_pairs import DIALECTS, NEUTRAL, remote_pair

from colm_edge.cli import main
from colm_edge.remote import client as remote
from colm_edge.remote.greeting import DIALECTS as KNOWN

pytestmark = pytest.mark.usefixtures("no_back_off")

TEXTS = ["one two three", "what is this about", "hello world " * 20, "a", "and so it goes on"] * 3


@pytest.fixture
def data(tmp_path, local) -> str:
    """Documents that the expert finds unlikely, and one of its own."""
    path = tmp_path / "data.jsonl"
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS[1:])]
    texts.append(local.generate("say it", threshold=0.0, max_tokens=12).text)
    lines = [{"prompt": "say it", "completion": text} for text in texts]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def run(*args: str):
    return CliRunner().invoke(main, [*args, "-t", "1", "-c", "256"])


def npz(path) -> dict:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("owner", DIALECTS)
def test_a_remote_expert_is_scored_as_a_local_one(tiny, tmp_path, data, owner, monkeypatch):
    few = replace(KNOWN[owner], n_probs=2)  # most tokens are not among them
    monkeypatch.setitem(KNOWN, owner, few)
    score = ["score", "--data", data, "-m", tiny["base"], "--outfile"]
    assert run(*score, str(tmp_path / "here.npz"), "-me", tiny["expert"]).exit_code == 0
    with faking(owner, tiny["expert"]) as (url, fake):
        done = run(*score, str(tmp_path / "there.npz"), "-me", url)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["model"] == url
        requests = fake.asked
    here, there = npz(tmp_path / "here.npz"), npz(tmp_path / "there.npz")
    assert there["logprob"] == pytest.approx(here["logprob"], abs=5e-2)
    assert (there["right"] == here["right"]).mean() > 0.95  # some are near ties
    assert there["right"].any()
    for name in ("tokens", "lengths", "starts", "lines"):
        assert (there[name] == here[name]).all()
    n_scored = len(there["logprob"])
    if owner == "llamacpp":  # one token each, and a second time where it was none of the likeliest
        assert n_scored < len(requests) < 2 * n_scored
        assert {body["n_probs"] for body in requests} == {2, fake.n_vocab}
    else:
        assert len(requests) == -(-len(TEXTS) // remote.SCORE_TOGETHER)
        assert {body["prompt_logprobs"] for body in requests} == {1}


@pytest.mark.parametrize("owner", ["vllm", "colm-edge"])
def test_what_a_scoring_pass_asks(tiny, owner):
    expert_alone = {"colm": {"threshold": 0, "strategy": "defer"}, "repeat_penalty": 1}
    expert_alone |= {"presence_penalty": 0, "frequency_penalty": 0, "stop": []}
    common = {"model": "the model", "temperature": 0, "prompt_logprobs": 1, "stream": False}
    bodies = {"vllm": {"max_tokens": 1} | NEUTRAL, "colm-edge": {"max_tokens": 0} | expert_alone}
    with faking(owner, tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        documents = [np.array([5, 6, 7, 8], np.int32), np.array([9, 10], np.int32)]
        scored = list(pair.expert.expert.score(documents, [2, 1]))
        assert [len(logprobs) for logprobs, _ in scored] == [2, 1]
        assert fake.asked == [bodies[owner] | common | {"prompt": [[5, 6, 7, 8], [9, 10]]}]


def test_a_scoring_pass_that_fails_goes_on_later(tiny, tmp_path, data, monkeypatch):
    monkeypatch.setattr("colm_edge.train.scoring.PACK_TOKENS", 40)
    score = ["score", "--data", data, "-m", tiny["base"], "--outfile", str(tmp_path / "scores.npz")]
    score += ["--work-dir", str(tmp_path / "work")]
    with faking("vllm", tiny["expert"]) as (url, fake):
        fake.failures = [""] * 4 + ["500"] * remote.TRIES
        failed = run(*score, "-me", url)
        assert failed.exit_code == 1
        assert "HTTP 500" in failed.stderr
        first = sum(len(body["prompt"]) for body in fake.asked[:4])
        n_asked = len(fake.asked)
        assert run(*score, "-me", url).exit_code == 0
        second = sum(len(body["prompt"]) for body in fake.asked[n_asked:])
        assert first + second == len(TEXTS)
    assert len(npz(tmp_path / "scores.npz")["lengths"]) == len(TEXTS)
    assert "does not answer" in run(*score[:-2], "-me", url).stderr


def test_a_switch_is_trained_and_evaluated_with_a_remote_expert(tiny, tmp_path, data):
    with faking("vllm", tiny["expert"]) as (url, fake):
        models, switch = ["-m", tiny["base"], "-me", url], str(tmp_path / "switch.gguf")
        trained = run("train", "--data", data, "--outfile", switch, *models)
        assert trained.exit_code == 0, trained.output
        report = json.loads(trained.stdout.splitlines()[-1])
        n_documents = sum(len(body["prompt"]) for body in fake.asked)
        assert n_documents == len(TEXTS)
        args = ["--data", data, *models, "-sw", switch, "-o", "json"]
        table = run("eval", *args)
        assert table.exit_code == 0, table.output
        rows = {row["method"]: row for row in json.loads(table.stdout)}
        assert rows["expert"]["nll"] > 0
        generated = run("eval", *args, "--metric", "contains", "--limit", "2", "-n", "4")
        assert generated.exit_code == 0, generated.output
        # A table must not show the base's answers as the expert's.
        fake.always = "500"
        failed = run("eval", *args, "--metric", "contains", "--limit", "2", "-n", "4")
        assert failed.exit_code == 1
    local = run("train", "--data", data, "--outfile", switch, *models[:3], tiny["expert"])
    expected = json.loads(local.stdout.splitlines()[-1])
    assert report["nll_expert"] == pytest.approx(expected["nll_expert"], abs=1e-2)
