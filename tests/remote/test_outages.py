"""Experts that fail: tried again, told once, and the base goes on alone."""

from __future__ import annotations

import logging
import math
import threading
import time

import pytest
from expert_servers import faking, free_port
from remote_pairs import DIALECTS, GREEDY, PROMPT, remote_pair, warnings_in
from serving import wait_for

from colm_edge.errors import AbsentExpertError, ColmError, MismatchError, ModelError
from colm_edge.pair import load
from colm_edge.remote import client as remote
from colm_edge.remote.http import RequestError
from colm_edge.slots import Slots

pytestmark = pytest.mark.usefixtures("no_back_off")

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


def test_of_an_expert_alone_a_refused_token_is_asked_for_once(tiny, local):
    alone = local.generate(PROMPT, threshold=1)
    with faking("vllm", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        fake.always = "400"
        answer = pair.generate(PROMPT, threshold=0)
        assert answer.text == alone.text
        assert len(fake.asked) == answer.stats.expert_failures == len(answer.steps)


def test_after_the_end_of_a_pair_its_answers_say_so(tiny):
    with faking("llamacpp", tiny["expert"]) as (url, _):
        with remote_pair(tiny, url) as pair:
            stream = pair.stream(PROMPT, threshold=0)
            next(stream)
        with pytest.raises(ModelError, match="closed; load it again"):
            next(stream)


def test_a_server_without_a_model_says_so(tiny):
    notes = []
    with faking("llamacpp", tiny["expert"]) as (url, fake):
        fake.listed = {"data": []}
        with remote_pair(tiny, url, note=notes.append):
            assert "its list of models is empty" in notes[0]


def test_a_base_does_not_pass_for_the_expert(tiny, local):
    """Another colm-edge whose own expert is elsewhere, and absent."""
    with faking("colm-edge", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        fake.n_absent = 1
        answer = pair.generate(PROMPT)
        assert {step.source for step in answer.steps} == {"base"}
        assert answer.stats.expert_failures > 0


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


def test_a_server_that_tells_no_size_while_it_loads_is_the_same_one(tiny, local):
    with faking("llamacpp", tiny["expert"]) as (url, fake):
        told, fake.n_vocab = fake.n_vocab, None
        with remote_pair(tiny, url, pause=0.0) as pair:
            for fake.n_vocab in (told, None, told):
                assert pair.generate(PROMPT).text == local.generate(PROMPT).text
                fake.always = "500"
                assert pair.generate(PROMPT).stats.expert_failures > 0
                fake.always = ""
            fake.n_vocab = told - 1
            with pytest.raises(MismatchError, match="came back with another vocabulary"):
                pair.generate(PROMPT)


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


def test_answers_together_share_the_tries_of_an_expert_that_is_silent(tiny, monkeypatch):
    """They do not wait for one another's: that would take the timeout of each in turn."""
    n_answers, waiting, greeted = 4, [], []

    def silent(*_):
        greeted.append(1)
        wait_for(lambda: len(waiting) == n_answers)
        time.sleep(0.05)
        raise RequestError("no answer", "timeout")

    with faking("llamacpp", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        fake.always = "dies"
        pair.generate(PROMPT)  # from here on it may come back as another one
        expert = pair.expert.expert
        expert._absent_until = -math.inf
        monkeypatch.setattr(remote, "greet", silent)

        def ask() -> None:
            waiting.append(1)
            with pytest.raises(AbsentExpertError):
                expert.ask([1, 2, 3])

        threads = [threading.Thread(target=ask) for _ in range(n_answers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert remote.TRIES <= len(greeted) < 2 * remote.TRIES


def test_a_server_with_a_smaller_context_leaves_the_rest_to_the_base(tiny, local, caplog):
    """It may have come up after the pair was loaded."""
    prompt = " ".join(["word"] * 40)
    with faking("llamacpp", tiny["expert"]) as (url, _), remote_pair(tiny, url) as pair:
        n_prompt = len(pair.prompt_tokens([{"role": "user", "content": prompt}]))
        for n_ctx, source in ((8, "base"), (n_prompt + 3, "expert")):
            pair.expert.expert.n_ctx = n_ctx
            answer = pair.generate(prompt, threshold=0.0, max_tokens=8)
            assert answer.steps[0].source == source
            assert answer.steps[-1].source == "base"
            assert len(answer.steps) == 8 or answer.finish_reason == "stop"
        alone = pair.generate(prompt, threshold=1.0, max_tokens=8)
        assert alone.text == local.generate(prompt, threshold=1.0, max_tokens=8).text != ""
        assert any("do not fit its 8" in warning for warning in warnings_in(caplog))


def test_an_answer_that_waits_for_a_server_can_be_cancelled(tiny):
    with faking("llamacpp", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        fake.always = "slow"
        stream = pair.stream(PROMPT, threshold=0.0)
        writing = threading.Thread(target=list, args=(stream,))
        writing.start()
        wait_for(lambda: fake.asked)
        stream.cancel()
        writing.join(30)
        assert not writing.is_alive()
        assert not fake.released.is_set()  # the server is still silent
        assert stream.answer().finish_reason == "stop"


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
