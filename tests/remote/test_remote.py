"""Experts behind HTTP: what is asked of each kind of server, and what becomes of failures.

Over 600 lines: every test wants the same three fake servers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from expert_servers import faking, free_port, log_softmax

import colm_edge
from colm_edge.cli import main
from colm_edge.cli.terminal import summary
from colm_edge.errors import AbsentExpertError, ColmError, MismatchError, ModelError
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.options import Options
from colm_edge.pair import Pair, load
from colm_edge.remote import client as remote
from colm_edge.remote.client import RemoteExpert
from colm_edge.remote.greeting import DIALECTS as KNOWN
from colm_edge.remote.http import KEY_VARIABLE
from colm_edge.remote.logprobs import logits_of
from colm_edge.slots import Slots
from colm_edge.switch.load import load_switch

GREEDY = Options(temperature=0.0, threshold=0.4, max_tokens=24)
PROMPT = "hello world"
DIALECTS = ("llamacpp", "vllm", "colm-edge")


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch):
    monkeypatch.setattr(remote, "BACK_OFF", 0.0)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def local(tiny) -> Iterator[Pair]:
    with load(
        tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256, defaults=GREEDY
    ) as pair:
        yield pair


@contextmanager
def remote_pair(tiny, url: str, **settings) -> Iterator[Pair]:
    base = Model(tiny["base"])
    try:
        expert = RemoteExpert(url, base, **settings)
    except BaseException:
        base.close()
        raise
    context = ContextOptions(n_ctx=256, n_threads=1)
    with Pair(base, expert, load_switch("margin"), context, GREEDY) as pair:
        yield pair


def warnings_in(caplog) -> list[str]:
    found = [r for r in caplog.records if r.name == "colm_edge" and r.levelno >= logging.WARNING]
    return [r.getMessage() for r in found]


@pytest.mark.parametrize("owner", DIALECTS)
def test_a_remote_expert_writes_what_a_local_one_writes(tiny, local, owner):
    expected = local.generate(PROMPT)
    assert 0 < expected.stats.n_deferred < len(expected.steps)
    with (
        faking(owner, tiny["expert"]) as (url, fake),
        load(tiny["base"], url, "margin", n_threads=1, n_ctx=256, defaults=GREEDY) as pair,
    ):
        answer = pair.generate(PROMPT)
        assert answer.text == expected.text
        assert [s.source for s in answer.steps] == [s.source for s in expected.steps]
        assert pair.expert.name == url
        stats = answer.stats
        assert stats.expert_calls == len(fake.asked) == stats.n_deferred
        assert (stats.expert_failures, fake.n_connections) == (0, 1)
        # What the prefix cache holds is not evaluated again.
        assert stats.expert_tokens <= len(answer.prompt_tokens) + len(answer.steps)
        assert stats.expert_seconds > 0
        # Each deferral asks once, with the whole prefix.
        written = answer.prompt_tokens + [s.token for s in answer.steps]
        at = [i for i, s in enumerate(answer.steps) if s.source == "expert"]
        prefixes = [written[: len(answer.prompt_tokens) + i] for i in at]
        assert [body["prompt"] for body in fake.asked] == prefixes


# Whatever the server's generation_config.json says.
NEUTRAL = {
    "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "top_p": 1,
    "top_k": -1, "min_p": 0,
}  # fmt: skip
BODIES = {
    "llamacpp": {
        "model": "the model", "n_predict": 1, "n_probs": 64, "temperature": 0,
        "cache_prompt": True, "return_tokens": True, "stream": False,
    },
    "vllm": {
        "model": "the model", "max_tokens": 1, "temperature": 0, "logprobs": 20,
        "return_tokens_as_token_ids": True, "stream": False, **NEUTRAL,
    },
    "colm-edge": {
        "model": "the model", "max_tokens": 1, "temperature": 0, "logprobs": 20,
        "return_tokens_as_token_ids": True, "stream": False, "repeat_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0,
        "colm": {"threshold": 0, "strategy": "defer"},
    },
}  # fmt: skip


@pytest.mark.parametrize("owner", DIALECTS)
def test_what_each_dialect_asks(tiny, owner):
    with faking(owner, tiny["expert"]) as (url, fake), remote_pair(tiny, url + "/v1") as pair:
        expert = pair.expert.expert.session()
        for path, body in fake.requests:
            assert path == "/tokenize"
            if owner == "llamacpp":
                assert set(body) == {"model", "content", "add_special", "parse_special"}
                assert not body["add_special"] and not body["parse_special"]  # noqa: PT018
            else:
                own = {"parse_special"} if owner == "colm-edge" else set()
                assert set(body) == {"model", "prompt", "add_special_tokens"} | own
                assert body["add_special_tokens"] is False
                assert not body.get("parse_special")
        tokens = pair.base.tokenize(PROMPT)
        assert expert.sync(tokens) == len(tokens)
        assert fake.asked == [{"prompt": tokens, **BODIES[owner]}]
        assert expert.sync(tokens) == 0  # it is known
        assert expert.sync([*tokens, 7]) == 1
        assert len(fake.asked) == expert.n_calls == 2
        logits, hidden = expert.state(len(tokens))
        assert logits.shape == (pair.base.n_vocab,)
        assert len(hidden) == 0
        truth = fake.session.logits
        assert int(logits.argmax()) == int(truth.argmax())
        assert math.fsum(np.exp(logits.astype(np.float64))) == pytest.approx(1, abs=1e-4)
        with pytest.raises(ColmError, match="the last token"):
            expert.sync(tokens, [0, len(tokens) - 1])


def test_a_timeline_there_has_what_one_here_has(tiny):
    with faking("vllm", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        expert, n_connections = pair.expert.expert.session(), fake.n_connections
        assert expert.name == url
        assert expert.fingerprint == pair.expert.fingerprint
        assert expert.end_tokens == pair.base.end_tokens
        assert expert.n_shared == pair.base.n_vocab
        assert expert.n_ctx == 255  # of 256 tokens, one is for the answer
        expert.open()
        expert.follow([1, 2, 3])
        assert fake.asked == []
        assert expert.sync([1, 2, 3], (), lambda: True) == 3
        assert fake.n_connections == n_connections
        expert.close()
        assert pair.expert.expert._server._client.is_closed


def test_logits_are_the_told_ones_and_the_rest_shares_what_is_left():
    logits = logits_of({3: math.log(0.5), 1: math.log(0.3), 99: -1.0}, 6)
    assert np.exp(logits) == pytest.approx([0.05, 0.3, 0.05, 0.5, 0.05, 0.05])
    assert logits.dtype == np.float32
    alone = logits_of({2: 0.0}, 4)
    assert alone.tolist() == [-math.inf, -math.inf, 0.0, -math.inf]
    for garbage in ({}, {9: -1.0}, {1: math.nan}, {1: 2.0}):
        with pytest.raises(ValueError, match=r"no token below 4|is no log-probability"):
            logits_of(garbage, 4)


FAILURES = ("500", "garbage", "other JSON", "dies", "slow")


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("owner", DIALECTS)
def test_the_base_goes_on_alone(tiny, local, caplog, owner, failure):
    alone = local.generate(PROMPT, threshold=1)
    timeout = 0.2 if failure == "slow" else 20.0
    with (
        faking(owner, tiny["expert"]) as (url, fake),
        remote_pair(tiny, url, timeout=timeout) as pair,
        caplog.at_level(logging.WARNING, "colm_edge"),
    ):
        fake.always = failure
        answer = pair.generate(PROMPT)
        assert answer.text == alone.text
        assert {step.source for step in answer.steps} == {"base"}
        assert answer.stats.n_deferred == answer.stats.expert_calls == 0
        assert answer.stats.expert_failures > 1
        assert answer.stats.expert_seconds > 0
        # Three tries, then it is left alone for a while.
        assert len(fake.asked) == remote.TRIES
        (warning,) = warnings_in(caplog)
        assert warning.startswith(f"{url}: the expert does not answer: ")
        assert warning.endswith("; the base goes on alone")


@pytest.mark.parametrize("failure", FAILURES)
def test_one_failure_is_tried_again(tiny, local, caplog, failure):
    with (
        faking("llamacpp", tiny["expert"]) as (url, fake),
        remote_pair(tiny, url, timeout=1.0) as pair,
    ):
        fake.failures = [failure]
        answer = pair.generate(PROMPT)
        assert answer.text == local.generate(PROMPT).text
        assert answer.stats.expert_failures == 0
        assert len(fake.asked) == answer.stats.expert_calls + 1
    assert not warnings_in(caplog)


def test_a_required_expert_that_fails_is_an_error(tiny):
    with (
        faking("vllm", tiny["expert"]) as (url, fake),
        load(
            tiny["base"], url, "margin", n_threads=1, defaults=GREEDY, expert_required=True
        ) as pair,
    ):
        fake.always = "500"
        with pytest.raises(ModelError, match=r"does not answer: /v1/completions: HTTP 500"):
            pair.generate(PROMPT)
        assert len(fake.asked) == remote.TRIES
        fake.always = ""
        assert pair.generate(PROMPT).stats.n_deferred > 0
    with pytest.raises(ModelError, match="refused; start it, or check the address"):
        load(tiny["base"], f"http://127.0.0.1:{free_port()}", expert_required=True)


def test_a_refusal_is_not_tried_again(tiny):
    with faking("vllm", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        fake.failures = ["400"]
        with pytest.raises(AbsentExpertError, match=r"the expert refuses: .*HTTP 400"):
            pair.expert.expert.session().sync([1, 2, 3])
        assert len(fake.asked) == 1
        # And it says nothing of the next request.
        assert pair.expert.expert.session().sync([1, 2, 4]) == 3


def test_a_base_does_not_pass_for_the_expert(tiny, local):
    """Another colm-edge whose own expert is elsewhere, and absent."""
    with faking("colm-edge", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        fake.n_absent = 1
        answer = pair.generate(PROMPT)
        assert {step.source for step in answer.steps} == {"base"}
        assert answer.stats.expert_failures > 0


def test_a_key_that_no_header_may_have_is_named(tiny, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "schlüssel")
    with pytest.raises(ModelError, match="COLM_EDGE_EXPERT_KEY has characters that a key cannot"):
        load(tiny["base"], "http://127.0.0.1:1", "margin")


def test_what_is_not_an_address_is_said_at_the_start(tiny):
    for address in ("http://", "http://127.0.0.1:99999", "http://:80"):
        with pytest.raises(ModelError, match="expected http://host:port"):
            load(tiny["base"], address, "margin")
    with pytest.raises(ModelError, match=r"write a server as http://127.0.0.1:8080"):
        load(tiny["base"], "127.0.0.1:8080", "margin")
    with pytest.raises(ModelError, match="does not answer"):
        load(tiny["base"], "http://a..b:1", "margin", expert_required=True)


def test_an_expert_may_come_up_later(tiny, local):
    port, notes = free_port(), []
    url = f"http://127.0.0.1:{port}"
    with remote_pair(tiny, url, pause=0.0, note=notes.append) as pair:
        answer = pair.generate(PROMPT)
        assert {step.source for step in answer.steps} == {"base"}
        assert len(notes) == 1
        assert pair.n_shared == 400
        with faking("llamacpp", tiny["expert"], port) as (_, fake):
            fake.n_vocab = 390  # of which nobody was told at the start
            answer = pair.generate(PROMPT)
            assert answer.text == local.generate(PROMPT).text
            assert answer.stats.expert_failures == 0
            assert pair.n_shared == 390
        pair.generate("another outage")
        assert len(notes) == 2


def test_each_cause_of_an_outage_is_told_once(tiny, caplog):
    with faking("vllm", tiny["expert"]) as (url, fake), remote_pair(tiny, url, pause=0.0) as pair:
        for causes in (["500", "garbage"], ["400", "500"]):
            for cause in causes * 2:
                fake.always = cause
                answer = pair.generate(PROMPT, max_tokens=6, threshold=0.0)
                assert {step.source for step in answer.steps} == {"base"}
            fake.always = ""
            assert pair.generate(PROMPT, threshold=0.0).stats.n_deferred > 0
    told = warnings_in(caplog)
    assert len(told) == 4
    for warning, cause in zip(told, ["HTTP 500", "JSON", "HTTP 400", "HTTP 500"], strict=True):
        assert cause in warning


def test_a_server_that_comes_back_is_asked_again_what_it_has(tiny, local, caplog):
    with faking("vllm", tiny["expert"]) as (url, fake), remote_pair(tiny, url, pause=0.0) as pair:
        expected = local.generate(PROMPT)
        assert pair.generate(PROMPT).text == expected.text
        before = pair.expert.fingerprint
        # Another name: the first request is refused, and the next one knows it.
        fake.names = ["another model"]
        answer = pair.generate(PROMPT)
        assert answer.stats.expert_failures == 1
        (warning,) = warnings_in(caplog)
        assert "HTTP 404: The model `the model` does not exist." in warning
        assert fake.asked[-1]["model"] == "another model"
        assert pair.expert.fingerprint != before
        # An outage, after which the vocabulary is another one.
        fake.always = "500"
        assert pair.generate(PROMPT).stats.expert_failures > 0
        fake.always, fake.shift = "", 1
        with pytest.raises(MismatchError, match="differ: token 0"):
            pair.generate(PROMPT)
        fake.shift = 0
        assert pair.generate(PROMPT).text == expected.text


def test_one_of_several_models_is_named(tiny):
    with faking("vllm", tiny["expert"]) as (url, fake):
        fake.names = ["org/base", "adapter"]
        with pytest.raises(
            ModelError, match=r"several models; add # and the name of one: org/base, adapter"
        ):
            load(tiny["base"], url, "margin")
        with pytest.raises(ModelError, match="has no such model; it has org/base, adapter"):
            load(tiny["base"], url + "#base", "margin")
        prints = set()
        for name in fake.names:
            with remote_pair(tiny, f"{url}/v1#{name}") as pair:
                assert pair.expert.name == f"{url}#{name}"
                pair.generate(PROMPT)
                assert fake.asked[-1]["model"] == name
                prints.add(pair.expert.fingerprint)
        assert len(prints) == 2


def test_what_vllm_refuses_is_told_in_its_words(tiny, caplog):
    with faking("vllm", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        expert = pair.expert.expert.session()
        fake.max_logprobs = 5
        with pytest.raises(
            AbsentExpertError, match=r"HTTP 400: Requested sample logprobs of 20, .* allowed: 5 "
        ):
            expert.sync([1, 2, 3])
        fake.max_logprobs = 20
        pair.expert.expert.n_ctx = 1000  # as if the server had told no length
        with pytest.raises(AbsentExpertError, match="HTTP 400: This model's maximum context"):
            expert.sync([7] * 300)


def test_what_a_server_does_not_tell_it_evaluated_is_unknown(tiny):
    with faking("vllm", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        told = pair.generate(PROMPT)
        assert 0 < told.stats.expert_tokens <= len(told.prompt_tokens) + len(told.steps)
        fake.tells_cached = False
        answer = pair.generate("another one")
        assert answer.stats.expert_calls > 0
        assert answer.stats.expert_tokens is None
        assert "(? tokens)" in summary(answer.stats)


def test_a_long_wait_for_the_first_answer_is_told(tiny, local, monkeypatch):
    notes = []
    with faking("vllm", tiny["expert"]) as (url, fake):

        def note(text: str) -> None:
            notes.append(text)
            fake.released.set()

        with remote_pair(tiny, url, note=note) as pair:
            monkeypatch.setattr(remote, "LONG", 0.01)
            fake.failures = ["slow"]
            assert pair.generate(PROMPT).text == local.generate(PROMPT).text
            assert notes == [f"waiting for the expert's server, {url} …"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_no_answer_may_take_is_refused(tiny, seconds):
    with pytest.raises(ColmError, match=r"expert_timeout is .*; expected seconds, more than 0"):
        load(tiny["base"], "http://127.0.0.1:1", "margin", expert_timeout=seconds)


def test_an_answer_that_takes_too_long_names_the_option(tiny):
    with (
        faking("vllm", tiny["expert"]) as (url, fake),
        load(
            tiny["base"], url, "margin", n_threads=1, expert_timeout=0.5, expert_required=True
        ) as pair,
    ):
        fake.always = "slow"
        with pytest.raises(ModelError, match=r"no answer in 0.5 seconds \(--expert-timeout\)"):
            pair.generate(PROMPT, threshold=0.0)


@pytest.mark.parametrize("owner", DIALECTS)
def test_another_vocabulary_is_refused(tiny, owner):
    with faking(owner, tiny["expert"]) as (url, fake):
        fake.shift = 1
        with pytest.raises(MismatchError, match=r"base.gguf and http.* differ: token 0 of 'The"):
            load(tiny["base"], url, "margin")
        if owner == "llamacpp":
            fake.shift, fake.n_vocab = 0, fake.n_vocab + 500
            with pytest.raises(MismatchError, match="tokens in the base"):
                load(tiny["base"], url, "margin")


def test_a_server_of_another_kind_is_named(tiny):
    with (
        faking("somebody", tiny["expert"]) as (url, _),
        pytest.raises(
            ModelError,
            match="kind of server, 'somebody'; expected one of llamacpp, vllm, colm-edge",
        ),
    ):
        load(tiny["base"], url, "margin")
    with pytest.raises(ModelError, match="the base runs on this machine"):
        load("http://127.0.0.1:1", tiny["expert"], "margin")


def test_the_key_is_sent_and_no_password_shown(tiny, monkeypatch):
    with faking("vllm", tiny["expert"]) as (url, fake):
        with remote_pair(tiny, url.replace("//", "//me:secret@")) as pair:
            assert pair.expert.name == url
        monkeypatch.setenv(KEY_VARIABLE, "a key")
        with remote_pair(tiny, url):
            pass
        assert fake.keys[0].startswith("Basic ")
        assert fake.keys[1] == "Bearer a key"


def test_without_httpx_the_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ModelError, match=r"colm-edge\[remote\]"):
        load(tiny["base"], "http://127.0.0.1:1", "margin")


def test_compose_and_sampling_take_a_remote_expert(tiny, local):
    with faking("llamacpp", tiny["expert"]) as (url, _), remote_pair(tiny, url) as pair:
        composed = pair.generate(PROMPT, strategy="compose")
        assert composed.text == local.generate(PROMPT, strategy="compose").text
        options = {"temperature": 0.8, "seed": 3, "threshold": 0.0, "max_tokens": 12}
        assert pair.generate(PROMPT, **options).stats.n_deferred > 0


def test_the_command_line(tiny):
    with faking("llamacpp", tiny["expert"]) as (url, _):
        models = ["-m", tiny["base"], "-me", url, "-sw", "margin", "-t", "1"]
        args = ["run", PROMPT, *models, "--temp", "0", "-n", "9", "--threshold", "0.4", "--json"]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0
        answer = json.loads(result.stdout)
        assert answer["expert"] == url
        assert answer["stats"]["expert_failures"] == 0
        refused = CliRunner().invoke(main, ["bench", *models])
        assert refused.exit_code == 1
        assert f"they are at {url}; give a GGUF file (-me)" in refused.stderr
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0
    assert result.stderr.count("the base goes on alone") == 1
    assert json.loads(result.stdout)["stats"]["expert_failures"] > 0
    result = CliRunner().invoke(main, [*args, "--expert-required"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {url}: the expert does not answer")


def test_what_needs_the_weights_says_so(tiny, tmp_path):
    with faking("llamacpp", tiny["expert"]) as (url, _), remote_pair(tiny, url) as pair:
        for use in (
            lambda: pair.expert_session, pair.cost_tables, pair.unload_expert,
            lambda: pair.save_prompts(tmp_path / "prompts.npz"),
        ):  # fmt: skip
            with pytest.raises(ColmError, match="needs the expert's weights here"):
                use()


def test_our_own_server_is_an_expert(tiny, local):
    pytest.importorskip("schemathesis")
    from serving import serving

    with (
        load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as served,
        serving(served, n_slots=2) as (url, _),
        load(tiny["base"], url, "margin", n_threads=1, defaults=GREEDY) as pair,
    ):
        assert pair.expert.expert.n_ctx == 256
        for prompt in (PROMPT, "another one"):
            answer, expected = pair.generate(prompt), local.generate(prompt)
            assert answer.text == expected.text
            assert [s.source for s in answer.steps] == [s.source for s in expected.steps]
            assert answer.stats.expert_calls == answer.stats.n_deferred > 0
        told = httpx.post(f"{url}/tokenize", json={"prompt": PROMPT}).json()
        assert told["tokens"] == served.base.tokenize(PROMPT)


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
    expert_alone |= {"presence_penalty": 0, "frequency_penalty": 0}
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


def test_a_server_may_have_its_expert_elsewhere(tiny, local):
    pytest.importorskip("schemathesis")
    from serving import serving

    with (
        faking("llamacpp", tiny["expert"]) as (url, fake),
        load(tiny["base"], url, "margin", n_threads=1, n_ctx=256, defaults=GREEDY) as pair,
        serving(pair, n_slots=3) as (address, server),
    ):

        def ask(**more) -> dict:
            messages = [{"role": "user", "content": PROMPT}]
            body = {"messages": messages, "max_tokens": 24, **more}
            return httpx.post(f"{address}/v1/chat/completions", timeout=60, json=body).json()

        answer = ask(n=3)
        expected = local.generate(PROMPT)
        assert [choice["message"]["content"] for choice in answer["choices"]] == [expected.text] * 3
        assert answer["colm"]["expert_calls"] == 3 * expected.stats.n_deferred
        for prompt in ([50, 51], PROMPT):
            body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
            refused = httpx.post(f"{address}/v1/completions", json=body)
            assert refused.status_code == 400
            assert "give a GGUF file" in refused.json()["error"]["message"]
            body["colm"] = {"threshold": 1}  # the base tells its own
            assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
        # A slot that waits for the expert holds up no other.
        fake.always = "slow"
        slow: list[dict] = []
        thread = threading.Thread(target=lambda: slow.append(ask(colm={"threshold": 0})))
        n_asked = len(fake.asked)
        thread.start()
        end = time.monotonic() + 30
        while len(fake.asked) == n_asked:
            assert time.monotonic() < end
            time.sleep(0.01)
        alone = ask(colm={"threshold": 1})
        assert alone["colm"]["n_deferred"] == 0
        assert not slow
        fake.released.set()
        thread.join(60)
        assert not thread.is_alive()
        assert slow[0]["colm"]["expert_failures"] > 0
        assert slow[0]["choices"] == alone["choices"]
        assert not server.slots.expert_loaded


def test_answers_together_whose_expert_fails_are_each_the_base_alone(tiny, local):
    """What a slot reads of the base it still has after the others went on meanwhile."""
    prompts = ["hello", "what is this about, and why", "one two three four five six", "so"]
    options = GREEDY.with_changes(threshold=0.0)
    with (
        faking("llamacpp", tiny["expert"]) as (url, fake),
        remote_pair(tiny, url, pause=0.0) as pair,
    ):
        fake.always = "400"
        slots, results = Slots(pair, 4), {}

        def work(prompt: str) -> None:
            tokens = pair.base.tokenize(prompt)
            with slots.take(tokens) as timelines:
                results[prompt] = list(pair.stream_tokens(tokens, options, timelines))

        threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        slots.close()
    for prompt in prompts:
        tokens = local.base.tokenize(prompt)
        alone = list(local.stream_tokens(tokens, options.with_changes(threshold=1.0)))
        assert [s.token for s in results[prompt]] == [s.token for s in alone]
        assert [s.logprob for s in results[prompt]] == pytest.approx(
            [s.logprob for s in alone], abs=5e-2
        )


QUESTIONS = (
    "What is the symbol of tungsten?",
    "What is the capital of France?",
    "When did the last Caspian tiger die?",
)


def check_the_shipped_expert_at(url: str) -> None:
    """What the shipped pair writes with its expert there is what it writes with its own."""
    data, greedy = Path(colm_edge.__file__).parent / "data", Options(temperature=0.0)
    files = (data / "base.gguf", url, data / "switch.gguf")
    with (
        load(n_threads=1, defaults=greedy) as local,
        load(*files, n_threads=1, defaults=greedy, expert_required=True) as pair,
    ):
        for question in QUESTIONS:
            answer, expected = pair.generate(question), local.generate(question)
            assert answer.text == expected.text
            assert answer.stats.n_deferred > 0
        # Its scores of a document: those of the right text, and of an unlikely token.
        tokens = np.array([*expected.prompt_tokens, *[s.token for s in expected.steps], 7])
        start = len(expected.prompt_tokens)
        ((logprobs, right),) = pair.expert.expert.score([tokens], [start])
        for i, (logprob, is_likeliest) in enumerate(zip(logprobs, right, strict=True), start):
            local.expert_session.sync(tokens[:i].tolist())
            x = log_softmax(local.expert_session.logits)
            assert logprob == pytest.approx(x[tokens[i]], abs=5e-2)
            assert is_likeliest == (tokens[i] == x.argmax())
        assert logprobs[-1] < -8


@pytest.mark.skipif(
    "COLM_EDGE_VLLM_URL" not in os.environ,
    reason="set COLM_EDGE_VLLM_URL to the address of a vLLM server with the shipped expert",
)
def test_a_real_vllm_is_an_expert():
    url = os.environ["COLM_EDGE_VLLM_URL"]
    check_the_shipped_expert_at(url)
    base = Path(colm_edge.__file__).parent / "data" / "base.gguf"
    with pytest.raises(ModelError, match="the server has no such model; it has"):
        load(base, f"{url.partition('#')[0]}#no-such-model")


@pytest.mark.skipif(
    "COLM_EDGE_LLAMA_SERVER" not in os.environ,
    reason="set COLM_EDGE_LLAMA_SERVER to the path of a llama-server binary",
)
def test_a_real_llama_server_is_an_expert(tmp_path):
    data, port = Path(colm_edge.__file__).parent / "data", free_port()
    url = f"http://127.0.0.1:{port}"
    flags = f"-m {data}/expert.gguf -t 1 -np 1 --host 127.0.0.1 --port {port}".split()
    command = [os.environ["COLM_EDGE_LLAMA_SERVER"], *flags]
    with (tmp_path / "log").open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        check_the_shipped_expert_at(url)
    finally:
        server.terminate()
        server.wait(30)
