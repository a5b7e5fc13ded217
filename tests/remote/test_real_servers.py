"""Our own server as the expert, and others where they are installed."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from expert_servers import faking, free_port, log_softmax
from remote_pairs import GREEDY, PROMPT

import colm_edge
from colm_edge.errors import ModelError
from colm_edge.options import Options
from colm_edge.pair import load

pytestmark = pytest.mark.usefixtures("no_back_off")


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


QUESTIONS = (
    "What is the symbol of tungsten?",
    "What is the capital of France?",
    "When did the last Caspian tiger die?",
)


def check_the_shipped_expert_at(url: str) -> None:
    """What the demo pair writes with its expert there is what it writes with its own."""
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
    reason="set COLM_EDGE_VLLM_URL to the address of a vLLM server with the demo pair's expert",
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
