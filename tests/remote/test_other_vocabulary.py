"""Experts behind HTTP whose vocabulary is not the base's, through each kind of server."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from expert_servers import faking, free_port
from lib.random_model import END, SHAPES, write_model
from lib.rows import write_rows

from colm_edge.cli import main
from colm_edge.errors import LONGEST, AbsentExpertError, MismatchError, ModelError
from colm_edge.options import Options
from colm_edge.pair import Pair, load
from colm_edge.remote.greeting import DIALECTS, PROBES
from colm_edge.remote.vocabulary import RemoteVocabulary
from colm_edge.slots import Slots
from colm_edge.together import Task, answer_together

pytestmark = pytest.mark.usefixtures("no_back_off")

GREEDY = Options(temperature=0.0, max_tokens=30, threshold=0.3)
START = "<|im_start|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bridge") / "base.gguf"
    write_model(path, SHAPES["tiny"], seed=0, gain=20.0, of_text=True)
    return str(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A model of a smaller vocabulary, which has a control token more."""
    path = tmp_path_factory.mktemp("bridge") / "other.gguf"
    shape = replace(SHAPES["tiny"], n_vocab=268)
    write_model(path, shape, seed=7, gain=20.0, extra_tokens=(START,), of_text=True)
    return str(path)


@pytest.fixture
def all_told(monkeypatch) -> None:
    """Let servers tell all log-probabilities."""
    for owner, dialect in list(DIALECTS.items()):
        monkeypatch.setitem(DIALECTS, owner, replace(dialect, n_probs=269))


@contextmanager
def opened(base, expert: str, **more: Any) -> Iterator[Pair]:
    settings = {"n_threads": 1, "n_ctx": 255, "bridge": True, "defaults": GREEDY} | more
    with load(base, expert, "margin", **settings) as pair:
        yield pair


@contextmanager
def served(owner: str, other: str) -> Iterator[tuple[str, Any]]:
    with faking(owner, other) as (url, fake):
        fake.max_logprobs = 1000
        yield url, fake


def sources(answer) -> list[str]:
    return [step.source for step in answer.steps]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("owner", DIALECTS)
def test_it_writes_what_the_same_expert_here_writes(base, other, all_told, owner, overlap):
    with opened(base, other) as pair:
        prompts = ("hello world", "a €uro 😀 and more, and so on")
        expected = [pair.generate(p, threshold=t) for p in prompts for t in (0.0, 0.3)]
    assert any({"base", "expert"} <= set(sources(answer)) for answer in expected)
    with (
        served(owner, other) as (url, _),
        opened(base, url, overlap=overlap, expert_required=True) as pair,
    ):
        answers = [pair.generate(p, threshold=t) for p in prompts for t in (0.0, 0.3)]
        assert [a.text for a in answers] == [a.text for a in expected]
        assert list(map(sources, answers)) == list(map(sources, expected))
        # Some bytes that no text has, vLLM cannot tell of.
        near = 0.05 if owner == "vllm" else 1e-3
        for answer, same in zip(answers, expected, strict=True):
            ours, theirs = ([s.logprob for s in a.steps] for a in (answer, same))
            assert ours == pytest.approx(theirs, abs=near)
            assert answer.stats.expert_failures == 0
            assert answer.stats.expert_calls <= answer.stats.n_deferred
        tasks = [Task(i, answers[1].prompt_tokens, GREEDY) for i in range(3)]
        for done in answer_together(pair, tasks, 3):
            assert done.answer.text == expected[1].text


def test_a_slots_next_answer_has_a_bridge_of_its_own(base, other, all_told):
    """That of a cancelled one may still be asking."""
    with served("llamacpp", other) as (url, _), opened(base, url) as pair:
        slots = Slots(pair, 2)
        with slots.take([1]) as one:
            pass
        with slots.take([1]) as another:
            assert one[1] is not another[1]
            assert another[1].account.n_calls == 0
        slots.close()


@pytest.mark.parametrize("owner", DIALECTS)
def test_how_many_requests_a_deferral_takes(base, other, all_told, owner):
    """One for the tokens of what is new, and one or a few for what follows them."""
    with served(owner, other) as (url, fake), opened(base, url) as pair:
        # One text is enough to differ, but all of them tell which vocabulary it is.
        assert [path for path, _ in fake.requests] == ["/tokenize"] * (len(PROBES) + 1)
        for prompt in ("hello world", "another one"):
            before = len(fake.requests)
            answer = pair.generate(prompt)
            n = answer.stats.n_deferred
            assert n > 5
            asked = Counter(path for path, _ in fake.requests[before:])
            setup = 8  # what the tokens of ends are, the begin token, single bytes
            assert asked.pop("/tokenize") <= n + setup
            assert asked.pop("/detokenize", 0) <= (3 if owner == "vllm" else 0)
            (completions,) = asked.values()
            alone = sum(
                step.source == "expert" and before == "base"
                for before, step in zip(["base", *sources(answer)], answer.steps, strict=False)
            )
            # llama.cpp is asked for each state by itself; those that are known are not asked again.
            assert completions <= (n + 3 * alone if owner == "llamacpp" else n)
        spelt = [json.dumps(body) for path, body in fake.requests if "tokenize" in path]
        assert len(spelt) == len(set(spelt))  # nothing is asked twice


@pytest.mark.parametrize("owner", DIALECTS)
def test_with_the_bases_vocabulary_nothing_is_spelt_anew(base, tiny, all_told, owner):
    with opened(base, tiny["expert"], bridge=False) as pair:
        expected = pair.generate("hello world")
    with served(owner, tiny["expert"]) as (url, fake), opened(base, url) as pair:
        before = len(fake.requests)
        answer = pair.generate("hello world")
        assert answer.text == expected.text
        assert sources(answer) == sources(expected)
        assert {path for path, _ in fake.requests[before:]} == {DIALECTS[owner].path}
        assert len(fake.asked) == answer.stats.n_deferred


@pytest.mark.parametrize("owner", DIALECTS)
def test_names_in_a_text_stay_text(base, other, owner):
    """Whoever writes "<|im_start|>" begins no turn, on a server that would read it as one too."""
    words = f"hello {END}{END}\n{START}system, {START}"
    with served(owner, other) as (url, fake), opened(base, url, expert_required=True) as pair:
        tokens = pair.base.tokenize(words, special=False)
        vocabulary = pair.members[0].model.words
        found = vocabulary.encode(words.encode())
        assert b"".join(map(fake.model.piece, found)) == words.encode()
        assert not {fake.model.token_id(name) for name in (END, START)} & set(found)
        pair.generate(words, raw=True, threshold=0.0, max_tokens=2)
        prompt = fake.asked[-1]["prompt"]
        prompt = prompt[-1] if isinstance(prompt[-1], list) else prompt
        assert fake.model.token_id(START) not in prompt
        assert len(tokens) > 10


@pytest.mark.parametrize("owner", DIALECTS)
def test_control_tokens_cross_by_their_names(base, other, owner):
    with served(owner, other) as (url, fake), opened(base, url) as pair:
        words = pair.members[0].model.words
        assert words.control(START) == fake.model.token_id(START)
        assert words.control("<|im_end|>") is None
        assert words.ends == {fake.model.token_id(END)}
        assert words.end == fake.model.token_id(END)
        assert words.begin is None
        assert words.piece(words.end) == b""


def test_an_expert_may_come_up_later_but_not_with_another_vocabulary(base, tiny, other, all_told):
    port, notes = free_port(), []
    url = f"http://127.0.0.1:{port}"
    with opened(base, other) as pair:
        expected = pair.generate("hello world")
    with opened(base, url, note=notes.append) as pair:
        expert = pair.expert.expert
        expert._pause, expert._absent_until = 0.0, -math.inf
        answer = pair.generate("hello world", schedule="sequential")
        assert {*sources(answer)} == {"base"}
        assert answer.stats.expert_failures > 1
        assert len(notes) == 1
        with faking("llamacpp", other, port) as (_, fake):
            assert pair.generate("hello world").text == expected.text
            fake.always = "500"
            assert pair.generate("hello world").stats.expert_failures > 0
        with (
            faking("llamacpp", tiny["expert"], port),
            pytest.raises(MismatchError, match="came back with another vocabulary"),
        ):
            pair.generate("hello world")


@pytest.fixture(scope="module")
def alone(base, other) -> str:
    """What the base writes by itself."""
    with opened(base, other) as pair:
        return pair.generate("hello world", max_tokens=12, threshold=1.0).text


SPELLINGS: dict[str, Any] = {
    "no pieces": lambda told: {"tokens": [1, 2, 3]},
    "no text": lambda told: spelt(told, "piece", 7.5),
    "no bytes": lambda told: spelt(told, "piece", [300]),
    "other bytes": lambda told: spelt(told, "piece", "x"),
    "nothing": lambda told: spelt(told, "piece", ""),
    "half a character": lambda told: spelt(told, "piece", "\ud800"),
    "huge": lambda told: spelt(told, "piece", "a" * 5000),
    "negative ids": lambda told: spelt(told, "id", -5),
    "huge ids": lambda told: spelt(told, "id", 10**40),
    "one id for all": lambda told: spelt(told, "id", 5),
    "an endless list": lambda told: {"tokens": told["tokens"] * 5},
    "an empty list": lambda told: {"tokens": []},
    "control characters": lambda told: b'{"error": {"message": "\\u001b[2J no"}}',
    "brackets": lambda told: b"[" * 200_000,
}


def spelt(told: dict, name: str, value: Any) -> dict:
    if not told["tokens"] or not isinstance(told["tokens"][0], dict):
        return told
    return {"tokens": [{**token, name: value} for token in told["tokens"]]}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("owner", ["llamacpp", "colm-edge"])
def test_spellings_that_cannot_be_are_refused(base, other, alone, owner, name):
    """At any time: one warning, and the base goes on alone."""
    for n_well in (0, 4):
        told: list[str] = []
        with served(owner, other) as (url, fake), opened(base, url, note=told.append) as pair:
            asked = Counter[str]()

            def twisted(answer: dict, asked=asked, n_well=n_well) -> Any:
                asked[""] += 1
                return answer if asked[""] <= n_well else SPELLINGS[name](answer)

            fake.twist_spelling = twisted
            answer = pair.generate("hello world", max_tokens=12, threshold=0.0)
            if n_well == 0:
                assert answer.text == alone
            assert sources(answer)[-1] == "base"
            assert answer.stats.expert_failures > 1
            (warning,) = [line for line in told if "measuring" not in line]
            assert warning.isprintable()
            assert len(warning) <= LONGEST + 3
            assert warning.endswith("the base goes on alone")


NAMED: dict[str, Any] = {
    "no bytes": [500],
    "no text": 7.5,
    "another token's": list(b"xyz"),
    "huge": list(b"a" * 5000),
}


@pytest.mark.parametrize("name", NAMED)
def test_pieces_of_likely_tokens_that_cannot_be_are_refused(base, other, name):
    told: list[str] = []

    def twisted(answer: dict) -> dict:
        for item in answer["completion_probabilities"][0]["top_logprobs"]:
            item["bytes"] = NAMED[name]
        return answer

    with served("llamacpp", other) as (url, fake), opened(base, url, note=told.append) as pair:
        pair.generate("hello world", max_tokens=4, threshold=0.0)  # what tokens spell is known now
        fake.twist = twisted
        answer = pair.generate("hello world", max_tokens=12, threshold=0.0)
        assert {*sources(answer)} == {"base"}
        (warning,) = [line for line in told if "measuring" not in line]
        assert warning.endswith("the base goes on alone")


TOPS: dict[str, Any] = {
    "NaN": {1: math.nan, 2: -1.0},
    "a likelihood above 1": {1: 2.0},
    "huge ids": {10**40: -0.1},
    "more than was asked for": dict.fromkeys(range(200), -9.0),
    "nothing": {},
}


@pytest.mark.parametrize("name", TOPS)
@pytest.mark.parametrize("owner", DIALECTS)
def test_likely_tokens_that_cannot_be_are_refused(base, other, owner, name):
    told: list[str] = []
    tops = TOPS[name]

    def twisted(answer: dict) -> dict:
        if owner == "llamacpp":
            items = [{"id": token, "logprob": x, "bytes": [97]} for token, x in tops.items()]
            answer["completion_probabilities"][0]["top_logprobs"] = items
        for choice in answer.get("choices", []):
            choice["logprobs"]["top_logprobs"] = [{f"token_id:{t}": x for t, x in tops.items()}]
        return answer

    with served(owner, other) as (url, fake), opened(base, url, note=told.append) as pair:
        fake.twist = twisted
        answer = pair.generate("hello world", max_tokens=12, threshold=0.0)
        assert {*sources(answer)} == {"base"}
        (warning,) = [line for line in told if "measuring" not in line]
        assert warning.endswith("the base goes on alone")


@pytest.mark.parametrize("owner", DIALECTS)
def test_one_warning_though_its_tokenizer_is_well(base, other, owner):
    told: list[str] = []
    with served(owner, other) as (url, fake), opened(base, url, note=told.append) as pair:
        fake.always = "400"  # a refusal, so that every deferral asks again
        answer = pair.generate("hello world", max_tokens=12, threshold=0.0)
        assert {*sources(answer)} == {"base"}
        assert len(fake.asked) > 5
        (warning,) = told
        assert "HTTP 400" in warning
        fake.always = ""
        assert pair.generate("hello world", max_tokens=4, threshold=0.0).stats.n_deferred == 4


@pytest.mark.parametrize("texts", [["", "", ""], ["a"] * 5000, None])
def test_texts_of_vllms_tokens_that_cannot_be_are_refused(base, other, texts):
    told: list[str] = []

    def twisted(answer: dict) -> dict:
        return answer if "tokens" in answer else {"prompt": texts and END.join(texts)}

    with served("vllm", other) as (url, fake), opened(base, url, note=told.append) as pair:
        fake.twist_spelling = twisted
        answer = pair.generate("hello world", max_tokens=12, threshold=0.0)
        assert {*sources(answer)} == {"base"}
        (warning,) = [line for line in told if "measuring" not in line]
        assert warning.endswith("the base goes on alone")


def unread(tokenized: Any) -> Any:
    return lambda body: tokenized(body | {"parse_special": False})


def test_a_vocabulary_without_a_known_end_is_told_once(base, other):
    told: list[str] = []
    with served("llamacpp", other) as (url, fake), opened(base, url, note=told.append) as pair:
        fake.tokenized = unread(fake.tokenized)
        answer = pair.generate("hello world", max_tokens=12, threshold=0.0)
        assert {*sources(answer)} == {"base"}
        (warning,) = [line for line in told if "measuring" not in line]
        assert "none of its tokens is known to end a text" in warning
    with served("llamacpp", other) as (url, fake), opened(base, url, expert_required=True) as pair:
        fake.tokenized = unread(fake.tokenized)
        with pytest.raises(ModelError, match="none of its tokens is known"):
            pair.generate("hello world", threshold=0.0)


def test_bytes_that_no_text_has_leave_the_base_alone(base, other):
    told: list[str] = []
    with served("llamacpp", other) as (url, _), opened(base, url, note=told.append) as pair:
        words = pair.members[0].model.words
        for raw in (b"\xe2\x82", b"a\xf0\x9f", "😀".encode()[:3] + b"b"):
            tokens = words.encode(raw)
            assert b"".join(map(words.piece, tokens)) == raw
        with pytest.raises(AbsentExpertError):
            words.encode(b"a\xff")
        assert len(told) == 1
        assert "no token is known for the byte 0xff" in told[0]


STOPS = Options(stop=("e", " "))  # for answers of the server's own


def test_our_own_server_is_an_expert(base, other):
    pytest.importorskip("schemathesis")
    from serving import serving

    with opened(base, other) as pair:
        expected = [pair.generate(p) for p in ("hello world", "another one")]
    for n_slots in (1, 2):
        with (
            load(other, other, "margin", n_threads=1, n_ctx=256, defaults=STOPS) as held,
            serving(held, n_slots=n_slots) as (url, _),
            opened(base, url, expert_required=True) as pair,
        ):
            answers = [pair.generate(p) for p in ("hello world", "another one")]
            assert [a.text for a in answers] == [a.text for a in expected]
            assert list(map(sources, answers)) == list(map(sources, expected))
            assert all(a.stats.expert_calls == a.stats.n_deferred > 0 for a in answers)


@pytest.mark.parametrize("owner", DIALECTS)
def test_the_switch_is_trained_across(base, other, tmp_path, all_told, owner):
    data, prompts, out = (tmp_path / name for name in ("d.jsonl", "p.jsonl", "s.gguf"))
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * 7} é"} for i in range(10)]
    write_rows(data, rows)
    write_rows(prompts, ({"prompt": row["prompt"]} for row in rows))
    told = {}
    with served(owner, other) as (url, fake):
        for expert in (other, url):
            models = ["-m", base, "-me", expert, "--bridge", "-t", "1", "-c", "128"]
            for text in (["--data", str(data)], ["--prompts", str(prompts), "-n", "8"]):
                ran = CliRunner().invoke(main, ["train", *models, *text, "--outfile", str(out)])
                assert ran.exit_code == 0, ran.output
                report = json.loads(ran.stdout.splitlines()[-1])
                assert math.isfinite(report["nll_joint"])
                told[expert, text[0]] = report["nll_expert"]
            how = ["-sw", str(out), "--data", str(data), "--methods", "expert,colm", "-o", "json"]
            ran = CliRunner().invoke(main, ["eval", *models, *how])
            assert ran.exit_code == 0, ran.output
            table = {row["method"]: row["nll"] for row in json.loads(ran.stdout)}
            told[expert, "eval"] = table["expert"]
        for name in ("--data", "--prompts", "eval"):
            near = 0.2 if owner == "vllm" else 1e-2
            assert told[url, name] == pytest.approx(told[other, name], abs=near), name
        fake.always = "500"
        ran = CliRunner().invoke(main, ["eval", *models, *how])
        assert ran.exit_code == 1


class OneNameMore:
    """A server's tokenizer that reads another name in a text as a token each time it is asked."""

    def __init__(self) -> None:
        self.n_asked = 0

    def keeps_names(self) -> bool:
        return False

    def spelt(self, text: str, learn: Any = None, **_: Any) -> list[tuple[int, bytes]]:
        self.n_asked += 1
        name = re.search(r"<\w+>", text)
        if name is None:
            return [(i, bytes([byte])) for i, byte in enumerate(text.encode())]
        before, behind = text[: name.start()], text[name.end() :]
        parts = [(1, before.encode()), (2, name[0].encode()), (3, behind.encode())]
        return [(token, piece) for token, piece in parts if piece]

    def refuse(self, why: str) -> None:
        raise AbsentExpertError(why)


@pytest.mark.parametrize(
    ("text", "is_spelt"),
    [("".join(f"<a{i}>" for i in range(1200)), False), ("x<td>" * 2000, True), ("<a><b>", True)],
)
def test_names_in_a_text_take_a_bounded_number_of_requests(text, is_spelt):
    asked = OneNameMore()
    vocabulary = RemoteVocabulary(asked, None)
    if is_spelt:
        pieces = vocabulary.encode(text.encode())
        assert len(pieces) == len(text)
    else:
        with pytest.raises(AbsentExpertError, match="do not spell"):
            vocabulary.encode(text.encode())
    assert asked.n_asked < 30
