"""Experts behind HTTP: what is asked of each kind of server, and what is refused."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from expert_servers import faking
from remote_pairs import DIALECTS, GREEDY, NEUTRAL, PROMPT, remote_pair

from colm_edge.cancel import Cancel
from colm_edge.cli import main
from colm_edge.cli.terminal import summary
from colm_edge.errors import AbsentExpertError, ColmError, MismatchError, ModelError
from colm_edge.pair import load
from colm_edge.remote.http import EXPERT_KEY_VARIABLE, Server
from colm_edge.remote.logprobs import logits_of

pytestmark = pytest.mark.usefixtures("no_back_off")


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


def test_a_token_that_ends_inside_a_character_is_no_failure(tiny, local):
    expected = local.generate(PROMPT)
    with faking("llamacpp", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        fake.cuts_characters = True
        answer = pair.generate(PROMPT)
    assert (answer.text, answer.stats.expert_failures) == (expected.text, 0)


BODIES = {
    "llamacpp": {
        "model": "the model", "n_predict": 1, "n_probs": 64, "temperature": 0,
        "logit_bias": [["\n", 1000]],
        "cache_prompt": True, "return_tokens": True, "stream": False,
    },
    "vllm": {
        "model": "the model", "max_tokens": 1, "temperature": 0, "logprobs": 20,
        "return_tokens_as_token_ids": True, "stream": False, **NEUTRAL,
    },
    "colm-edge": {
        "model": "the model", "max_tokens": 1, "temperature": 0, "logprobs": 20,
        "return_tokens_as_token_ids": True, "stream": False, "repeat_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "stop": [],
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
        assert len(fake.asked) == expert.account.n_calls == 2
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
        assert expert.sync([1, 2, 3], (), Cancel()) == 3
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
        with pytest.raises(ValueError, match=r"no token below 4|is not a log-probability"):
            logits_of(garbage, 4)


def test_a_key_that_no_header_may_have_is_named(tiny, monkeypatch):
    monkeypatch.setenv(EXPERT_KEY_VARIABLE, "schlüssel")
    with pytest.raises(ModelError, match="COLM_EDGE_EXPERT_KEY has characters that a key cannot"):
        load(tiny["base"], "http://127.0.0.1:1", "margin")


def test_what_is_not_an_address_is_said_at_the_start(tiny):
    for address in ("http://", "http://127.0.0.1:99999", "http://:80", "http://127.0.0.1:80?x=1"):
        with pytest.raises(ModelError, match="expected http://host:port"):
            load(tiny["base"], address, "margin")
    with pytest.raises(ModelError, match=r"write a server as http://127.0.0.1:8080"):
        load(tiny["base"], "127.0.0.1:8080", "margin")
    with pytest.raises(ModelError, match="does not answer"):
        load(tiny["base"], "http://a..b:1", "margin", expert_required=True)


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
        monkeypatch.setenv(EXPERT_KEY_VARIABLE, "a key")
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


@pytest.mark.parametrize("rest", ["host:8080?x=1", "host:99999", ":80", "host:80x"])
def test_an_address_that_is_refused_tells_no_password(rest):
    with pytest.raises(ModelError) as refused:
        Server(f"http://user:secret@{rest}", 1.0)
    assert "secret" not in str(refused.value)
