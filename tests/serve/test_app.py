"""The server, asked by OpenAI's own client and by plain HTTP, over tiny models."""

from __future__ import annotations

import json
import socket

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import GREEDY, metrics_of, serving

from colm_edge.decode.loop import PROMPT_OUTPUTS
from colm_edge.errors import ColmError
from colm_edge.options import ServerOptions
from colm_edge.serve.answers import Server
from colm_edge.serve.app import create_app, listen
from colm_edge.serve.chat import ChatRequest
from colm_edge.serve.guard import MAX_BODY

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_chat_is_answered_as_the_pair_answers(client, pair):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=20)
    expected = pair.chat(CHAT, max_tokens=20)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    n_prompt, n = len(expected.prompt_tokens), len(expected.steps)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (n_prompt, n)
    assert usage.total_tokens == n_prompt + n
    assert answer.colm["defer_rate"] == expected.stats.defer_rate
    assert answer.colm["threshold"] == 0.4
    assert "trace" not in answer.colm


def test_streamed_pieces_are_the_answer(client, pair):
    expected = pair.chat(CHAT, max_tokens=20)
    stream = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(deltas) == expected.text
    assert len([d for d in deltas if d]) > 5
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [f for f in finishes if f] == [expected.finish_reason]
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == len(expected.steps)
    assert chunks[-2].colm["expert_calls"] > 0
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert len({c.id for c in chunks}) == 1


def test_events_end_as_openais_do(url):
    body = {"messages": CHAT, "max_tokens": 3, "stream": True, "colm": {"trace": True}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = "".join(response.iter_text()).split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    told = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    records = [t["colm"] for t in told if "source" in t.get("colm", {})]
    assert [set(r) for r in records] == [{"id", "text", "source", "p_defer"}] * 3


def test_requests_can_set_the_threshold(client):
    for threshold, source in ((1, "base"), (0, "expert")):
        answer = client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            max_tokens=8,
            extra_body={"colm": {"threshold": threshold, "trace": True}},
        )
        assert {record["source"] for record in answer.colm["trace"]} == {source}
        assert answer.colm["defer_rate"] == (source == "expert")
        text = "".join(record["text"] for record in answer.colm["trace"])
        assert text == answer.choices[0].message.content


def test_completions_take_text_or_token_ids(client, pair):
    tokens = pair.base.tokenize("hello world")
    expected = pair.stream_tokens(tokens, GREEDY.with_changes(max_tokens=10))
    steps = list(expected)
    text = "".join(step.text for step in steps)
    for prompt in ("hello world", tokens):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, logprobs=1)
        choice = answer.choices[0]
        assert choice.text == text
        assert choice.logprobs.token_logprobs == pytest.approx(
            [step.logprob for step in steps], abs=1e-2
        )
        assert "".join(choice.logprobs.tokens) == text
    echoed = client.completions.create(model="tiny", prompt="hello world", max_tokens=10, echo=True)
    assert echoed.choices[0].text == "hello world" + text
    several = client.completions.create(model="tiny", prompt=["hello world", "other"], max_tokens=4)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert text.startswith(several.choices[0].text)
    ids = client.completions.create(model="tiny", prompt=[tokens, tokens], max_tokens=4)
    assert ids.choices[0].text == ids.choices[1].text
    assert len(client.completions.create(model="tiny", prompt="hello").choices[0].text) > 0


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=5, logprobs=True
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    assert all(item.logprob <= 0 for item in content)
    spelled = bytes(b for item in content for b in item.bytes).decode("utf-8", "replace")
    assert spelled == answer.choices[0].message.content


def truth(pair, tokens, threshold):
    """Return by the pair's own sessions, one token at a time: for each token after the first the
    log-probabilities (n_shared,) of the model that would have written it."""
    expert = []
    for i in range(1, len(tokens)):
        pair.base_session.sync(tokens[:i])
        logits, hidden = pair.base_session.state(i - 1)
        p_defer = pair.switch.reader(pair.base, pair.n_shared)(logits, hidden)[0]
        if p_defer > threshold or threshold == 0:
            pair.expert_session.sync(tokens[:i])
            logits, _ = pair.expert_session.state(i - 1)
        x = logits.astype(np.float64)
        expert.append((x - np.log(np.exp(x - x.max()).sum()) - x.max())[: pair.n_shared])
    return expert


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n_words", [3, 150])
def test_echoed_prompts_report_their_own_probabilities(client, pair, threshold, n_words):
    """As evaluation harnesses use them: no token is written, the prompt's log-probabilities are."""
    prompt = " ".join(f"word{i}" for i in range(n_words))
    tokens = pair.base.tokenize(prompt)[:250]
    prompt = b"".join(map(pair.base.piece, tokens)).decode()
    assert (len(tokens) > PROMPT_OUTPUTS) == (n_words == 150)
    expected = truth(pair, tokens, threshold)
    fields = {"prompt_logprobs": 2, "colm": {"threshold": threshold}}
    answer = client.completions.create(
        model="tiny", prompt=[tokens], max_tokens=0, logprobs=2, echo=True, extra_body=fields
    )
    choice = answer.choices[0]
    assert choice.text == prompt
    told = choice.logprobs
    assert "".join(told.tokens) == prompt
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(tokens))]
    assert told.token_logprobs[0] is told.top_logprobs[0] is choice.prompt_logprobs[0] is None
    own = [x[token] for x, token in zip(expected, tokens[1:], strict=True)]
    assert told.token_logprobs[1:] == pytest.approx(own, abs=5e-2)
    for x, token, top in zip(expected, tokens[1:], choice.prompt_logprobs[1:], strict=True):
        assert str(token) in top
        for i, entry in top.items():
            assert entry["logprob"] == pytest.approx(x[int(i)], abs=5e-2)
            assert entry["decoded_token"] == pair.base.piece(int(i)).decode("utf-8", "replace")
        ranked = {entry["rank"]: entry["logprob"] for entry in top.values() if entry["rank"]}
        assert [ranked[1], ranked[2]] == pytest.approx(np.sort(x)[:-3:-1], abs=5e-2)


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_token_has_its_probability_reported(demo, stream):
    """Evaluation harnesses ask for one token after the text and expect it to be reported."""
    written = demo.generate("What is the symbol of tungsten?", temperature=0)
    tokens = written.prompt_tokens + [step.token for step in written.steps]
    with serving(demo, n_slots=1) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        answer = client.completions.create(
            model="any",
            prompt=tokens,
            max_tokens=1,
            temperature=0,
            logprobs=1,
            echo=True,
            stream=stream,
            extra_body={"return_tokens_as_token_ids": True},
        )
        choices = [e.choices[0] for e in answer if e.choices] if stream else answer.choices
    assert choices[-1].finish_reason == "stop"
    told = [choice.logprobs for choice in choices if choice.logprobs]
    names = [name for part in told for name in part.tokens]
    logprobs = [x for part in told for x in part.token_logprobs]
    assert names[:-1] == [f"token_id:{token}" for token in tokens]
    assert int(names[-1].removeprefix("token_id:")) in demo.base.end_tokens
    assert logprobs[-1] > -0.1
    assert told[-1].top_logprobs[-1][names[-1]] == logprobs[-1]


def test_of_tokens_with_the_same_text_the_most_likely_is_kept(client, pair):
    """Parts of characters all have the same text."""
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=8, logprobs=20)
    stream = pair.stream("hello", **vars(GREEDY.with_changes(max_tokens=8, n_probs=20, raw=True)))
    for step, top in zip(stream, answer.choices[0].logprobs.top_logprobs, strict=True):
        best: dict[str, float] = {}
        for token, logprob in step.top:
            text = pair.base.piece(token).decode("utf-8", "replace")
            best.setdefault(text if token != step.token else step.text, logprob)
        assert top == pytest.approx(best, abs=5e-2)
        assert len(top) < 20


def test_prompt_logprobs_cannot_be_streamed(client):
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs cannot be streamed"):
        client.completions.create(
            model="tiny", prompt="hello", stream=True, extra_body={"prompt_logprobs": 1}
        )


def test_offsets_count_characters_that_are_whole(client, pair):
    """The first token of an echoed prompt may end inside one."""
    pieces = {pair.base.piece(token): token for token in reversed(range(pair.base.n_vocab))}
    tokens = [pieces[bytes([byte])] for byte in "é.".encode()]
    told = client.completions.create(
        model="tiny", prompt=[tokens], max_tokens=0, logprobs=1, echo=True
    ).choices[0]
    assert told.text == "é."
    assert told.logprobs.text_offset == [0, 0, 1]


def test_an_echo_comes_first_in_a_stream(client):
    events = list(
        client.completions.create(
            model="tiny", prompt="hello world", max_tokens=3, logprobs=1, echo=True, stream=True
        )
    )
    whole = client.completions.create(
        model="tiny", prompt="hello world", max_tokens=3, logprobs=1, echo=True
    )
    choices = [event.choices[0] for event in events if event.choices]
    assert choices[0].text == "hello world"
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    told = [choice.logprobs for choice in choices if choice.logprobs]
    for name in ("tokens", "text_offset"):
        parts = [x for part in told for x in getattr(part, name)]
        assert parts == getattr(whole.choices[0].logprobs, name)


def test_the_most_likely_tokens_are_reported(client, pair):
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=5, logprobs=True, top_logprobs=3
    )
    steps = list(pair.stream_chat(CHAT, **vars(GREEDY.with_changes(max_tokens=5, n_probs=3))))
    content = answer.choices[0].logprobs.content
    for item, step in zip(content, steps, strict=True):
        told = [(bytes(top.bytes), top.logprob) for top in item.top_logprobs]
        spelled = [(pair.base.piece(token), logprob) for token, logprob in step.top]
        assert [text for text, _ in told] == [text for text, _ in spelled]
        assert [x for _, x in told] == pytest.approx([x for _, x in spelled], abs=1e-2)
        assert (item.token, item.logprob) == (item.top_logprobs[0].token, told[0][1])
    completion = client.completions.create(model="tiny", prompt="hello", max_tokens=3, logprobs=2)
    told = completion.choices[0].logprobs
    for text, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert logprob == top[text] == max(top.values())
        assert len(top) <= 3


@pytest.mark.parametrize("n", [1, 3])
def test_every_chunk_has_a_choice_unless_usage_is_asked_for(client, n):
    """The loop in OpenAI's own examples reads the first choice of every chunk."""
    for chunks in (
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3, n=n, stream=True),
        client.completions.create(model="tiny", prompt="hello", max_tokens=3, n=n, stream=True),
    ):
        seen = list(chunks)
        assert all(len(chunk.choices) == 1 for chunk in seen)
        counts = [chunk.colm for chunk in seen if hasattr(chunk, "colm")]
        assert [set(c) >= {"defer_rate", "expert_calls"} for c in counts] == [True]
        assert hasattr(seen[-1], "colm")


def test_what_a_request_sets_reaches_the_options():
    given = {"presence_penalty": 1.5, "frequency_penalty": -0.5, "top_p": 0.5, "seed": 3}
    request = ChatRequest(messages=CHAT, max_completion_tokens=7, max_tokens=9, **given)
    options = request.options(GREEDY, 0, 100)
    assert {name: getattr(options, name) for name in given} == given
    assert options.max_tokens == 7  # OpenAI's newer name
    assert request.options(GREEDY, 1, 5).max_tokens == 5


def test_a_host_that_cannot_be_is_told():
    for host in ("b\u00fccher..de", "no such host"):
        with pytest.raises(ColmError, match="cannot listen on"):
            listen(host, 0)


def test_small_answers_leave_at_once():
    """asyncio sets TCP_NODELAY on the connections of a socket whose protocol is given."""
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_seeds_and_choices(client):
    def ask(**more):
        answer = client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=12, temperature=1.5, n=3, **more
        )
        return [choice.message.content for choice in answer.choices]

    first = ask(seed=7)
    assert first == ask(seed=7)
    assert len(set(first)) == 3
    assert first != ask(seed=100)


def test_stop_texts(client, pair):
    text = pair.chat(CHAT, max_tokens=20).text
    stop = text[4:6]
    for value in (stop, [stop, "\x00"]):
        answer = client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=20, stop=value
        )
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_messages_in_parts_and_other_roles(client):
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    parts = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("hel", "lo")]},
    ]
    texts = [
        client.chat.completions.create(model="tiny", messages=m, max_tokens=5).choices[0].message
        for m in (plain, parts)
    ]
    assert texts[0] == texts[1]


def test_models_and_health(client, url, pair):
    assert [model.id for model in client.models.list()] == ["tiny"]
    model = client.models.retrieve("tiny")
    assert model.owned_by == "colm-edge"
    # The names of the files, and nothing of where they are.
    meta = model.meta
    assert "/" not in meta["base"] + meta["expert"] + meta["switch"]
    assert (meta["base"], meta["switch"]) == (pair.base.path.stem, "margin")
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": CHAT, "temperature": -1}, 400, "temperature"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": CHAT, "n": 99}, 400, "n:"),
        ({"messages": CHAT, "stop": ""}, 400, "stop"),
        ({"messages": CHAT, "colm": {"threshold": 2}}, 400, "threshold"),
        ({"messages": CHAT, "colm": {"treshold": 0}}, 400, "colm.treshold: Extra inputs"),
        (
            {"messages": CHAT, "tools": [{"type": "function"}]},
            400,
            "tools.0.function: Field required",
        ),
        ({"messages": CHAT, "response_format": {"type": "xml"}}, 400, "response_format.type:"),
        ({"messages": CHAT, "response_format": {"type": "json_schema"}}, 400, "schema is missing"),
        (
            {"messages": CHAT, "response_format": {"type": "json_object", "schema": {"type": 5}}},
            400,
            "the JSON schema cannot be used",
        ),
        ({"messages": CHAT, "grammar": 'root ::= "a'}, 400, "the grammar is not valid"),
        ({"messages": CHAT, "grammar": "root ::= 'a'", "json_schema": {}}, 400, "give one"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0: content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content: expected a"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            400,
            "tool_calls.0.function: Field required",
        ),
        ({"messages": CHAT, "logit_bias": {"5": 3}}, 400, "logit_bias is not supported"),
        ({"messages": CHAT, "best_of": 3}, 400, "best_of is not supported"),
        ({"messages": CHAT, "repeat_last_n": 0}, 400, "repeat_last_n is not supported"),
        ({"messages": CHAT, "top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
        ({"messages": CHAT * 10_001}, 400, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "expected a text, or parts of type text",
        ),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "the context holds 256"),
        ({"messages": CHAT, "colm": {"threshold": 0.1, "defer_rate": 0.2}}, 400, "give one"),
    ],
)
def test_errors_have_openais_shape(url, body, status, words):
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert response.status_code == status


def test_invalid_requests_are_refused(url):
    for response, status in (
        (httpx.get(f"{url}/v1/nothing"), 404),
        (httpx.get(f"{url}/v1/completions"), 405),
        (httpx.post(f"{url}/v1/completions", content=b"{"), 400),
        (httpx.post(f"{url}/v1/completions", json={"prompt": []}), 400),
        (httpx.post(f"{url}/v1/completions", json={"prompt": [10**6]}), 400),
        (httpx.post(f"{url}/v1/completions", content=b"x" * (MAX_BODY + 1)), 413),
        (httpx.get(f"{url}/health", headers={"Host": "evil.example"}), 400),
        (httpx.get(f"{url}/../../etc/passwd"), 404),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_requests_are_counted_by_the_path_of_their_route(pair):
    with serving(pair) as (url, _):
        for path in ("/", "/health", "/v1/models", "/v1/models/a", "/v1/models/b", "/c", "/d/e"):
            httpx.get(url + path)
        httpx.post(f"{url}/tokenize", json={"prompt": "hello"})
        httpx.get(f"{url}/tokenize")
        httpx.get(f"{url}/health", headers={"Host": "evil.example"})
        values = metrics_of(url)
    counted = {
        (name.split('"')[1], name.split('"')[3]): n
        for name, n in values.items()
        if name.startswith("colm_requests_total")
    }
    assert counted == {
        ("/", "200"): 1, ("/health", "200"): 1, ("/v1/models", "200"): 1,
        ("/v1/models/{model}", "404"): 2, ("/tokenize", "200"): 1, ("/tokenize", "405"): 1,
        ("other", "404"): 2, ("other", "400"): 1,
    }  # fmt: skip


def test_metrics_are_prometheus_own(pair):
    with serving(pair) as (url, _):
        httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 6}, timeout=60)
        text = httpx.get(f"{url}/metrics").text
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    written = [float(v) for k, v in values.items() if k.startswith("colm_tokens_total")]
    assert sum(written) == 6
    assert values['colm_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert values["colm_busy_slots"] == "0.0"
    assert values["colm_first_token_seconds_count"] == "1.0"


def test_the_document_holds(pair):
    """Whatever the server's own OpenAPI document allows is answered as it says."""
    server = Server(pair, ServerOptions(max_tokens=4), "tiny")
    app = create_app(server)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "127.0.0.1"})
    n_seen = 0
    for operation in schema.get_all_operations():

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def check(case):
            nonlocal n_seen
            n_seen += 1
            response = case.call(base_url="http://127.0.0.1")
            # A schema cannot say what fits a context.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])
            if response.status_code >= 400:
                error = response.json()["error"]
                assert error if isinstance(error, str) else error["message"]

        check()
    assert n_seen > 30
    server.close()
