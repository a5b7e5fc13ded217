"""The same prompt is evaluated in the same batches, whatever was asked before, so its answer is the
same to the last bit. What goes on from an answer keeps it."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest

from colm_edge.llama.context import Context, ContextOptions
from colm_edge.llama.held import Held
from colm_edge.llama.session import Session
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.switch.file import Switch

BLOCK = 16
CONTEXT = ContextOptions(n_ctx=256, n_threads=1, n_batch=40, n_ubatch=BLOCK)
Batches = dict[int, tuple[int, int]]  # by position, where its batch began, and its tokens


@pytest.fixture
def batches(monkeypatch) -> dict[Context, Batches]:
    """Note the batch that each position of a context was last evaluated in, as llama.cpp cuts
    it."""
    noted: dict[Context, Batches] = {}
    decode = Context.decode

    def noting(context, n, *, hidden=False):
        decode(context, n, hidden=hidden)
        start, seen = int(context.batch.position[0]), noted.setdefault(context, {})
        for i in range(n):
            first = i // BLOCK * BLOCK
            seen[start + i] = start + first, min(BLOCK, n - first)

    monkeypatch.setattr(Context, "decode", noting)
    return noted


def evaluated(session: Session, batches: dict[Context, Batches], n: int) -> list[tuple[int, int]]:
    return [batches[session._context][i] for i in range(n)]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_prompt_is_evaluated_alike_whatever_was_asked_before(model, batches, hidden):
    draw = random.Random(4)
    words = [[draw.randrange(1, 400) for _ in range(n)] for n in (5, 16, 21, 40, 90)]
    session = Session(model, CONTEXT, hidden=hidden)
    shared = 0
    for _ in range(60):
        parts = draw.choices(words, k=draw.randint(1, 3))
        prompt = array("i", [3, *(token for part in parts for token in part)][:200])
        session.turn_to(prompt)
        n_evaluated = session.sync(prompt)
        shared += n_evaluated < len(prompt)
        fresh = Session(model, CONTEXT, hidden=hidden)
        fresh.turn_to(prompt)
        fresh.sync(prompt)
        n = len(prompt)
        assert evaluated(session, batches, n) == evaluated(fresh, batches, n)
        assert np.array_equal(session.logits, fresh.logits)
        assert np.array_equal(session.hidden, fresh.hidden)
        fresh.close()
        answer = prompt[:]
        for _ in range(draw.randint(0, 9)):  # tokens that no prompt has there
            answer.append(400 - len(answer))
            session.sync(answer)
    assert shared > 10
    session.close()


def test_a_catch_up_is_evaluated_alike_too(model, batches):
    """An expert is first asked somewhere within the answer."""
    prompt = array("i", range(1, 30))
    answer = prompt + array("i", range(100, 120))
    session = Session(model, CONTEXT)
    seen = []
    for _ in range(2):
        session.turn_to(prompt)
        for n in (41, 44):
            session.sync(answer[:n])
        seen.append((evaluated(session, batches, 44), session.logits.tolist()))
        session.turn_to(array("i", [7] * 50))
        session.sync([7] * 50)
    assert seen[0] == seen[1]
    session.close()


def test_a_conversation_keeps_its_answers_and_repeats_its_turns(model, batches):
    """The second turn evaluates what is new alone. Asked again, also after a third turn or
    differently worded, it goes on from the same place."""
    draw = random.Random(1)
    new = lambda n: array("i", [draw.randrange(1, 400) for _ in range(n)])  # noqa: E731
    session = Session(model, CONTEXT)

    def turn(prompt: array[int], answer: array[int]) -> tuple[int, object]:
        session.turn_to(prompt)
        n_evaluated = session.sync(prompt)
        told = evaluated(session, batches, len(prompt)), session.logits.tolist()
        for n in range(1, len(answer)):  # the last token is not evaluated
            session.sync(prompt + answer[:n])
        return n_evaluated, told

    first, reply = new(35), new(20)
    turn(first, reply)
    second, third, other = first + reply + new(30), new(25), new(30)
    n_new, told = turn(second, new(9))
    assert n_new == 31  # with the answer's last token
    turn(second + third, new(5))
    again = turn(second, new(3))
    assert again[1] == told
    assert again[0] <= 31
    n_other, told_other = turn(first + reply + other, new(4))
    assert n_other <= 31
    assert turn(second, new(2))[1] == told
    assert turn(first + reply + other, new(2))[1] == told_other
    session.close()


@pytest.mark.parametrize("hidden", [False, True])
def test_all_outputs_fit_a_batch_that_is_no_multiple_of_a_block(model, hidden):
    session, tokens = Session(model, CONTEXT, hidden=hidden), array("i", range(1, 101))
    outputs = range(61, 100)
    assert session.sync(tokens, outputs) == 100
    told = [session.state(i)[0].copy() for i in outputs]
    session.forget()
    for i, logits in zip(outputs, told, strict=True):
        session.sync(tokens[: i + 1])
        assert np.allclose(session.logits, logits, atol=2e-2)
    session.close()


def test_a_session_that_knows_nothing_of_prompts_evaluates_what_differs(model):
    session = Session(model, CONTEXT)
    session.sync(list(range(1, 60)))
    session.turn_to(array("i", range(1, 50)))
    assert session.sync(list(range(1, 50))) == 49  # nobody said how the others were evaluated
    session.close()


def test_held_tokens_survive_a_file():
    held = Held(4)
    held.turn_to(array("i", range(11)))
    held.tokens = array("i", range(11))
    held.evaluated(0, 11)
    other = Held(4)
    other.restore(np.array(held.tokens, np.int32), held.rows)
    for one in (held, other):
        assert one.turn_to(array("i", range(10))) == 8
        assert one.turn_to(array("i", [0, 1, 2, 3, 4, 9])) == 4


# Whole answers

PROMPTS = ["hello there", "x y z " * 12, "x y z " * 12 + "hello", "hello there, how are you? " * 3]
WAYS = {
    "own": {"temperature": 0.0, "threshold": 0.4},
    "sequential": {"temperature": 0.0, "threshold": 0.4, "schedule": "sequential"},
    "expert alone": {"temperature": 0.0, "threshold": 0.0},
    "base alone": {"temperature": 0.0, "threshold": 1.0},
    "review": {"temperature": 0.0, "threshold": 0.4, "review": 0.5},
    "sampled": {"seed": 3, "threshold": 0.4},
}


@pytest.fixture(params=["margin", "hidden"])
def switch(request, tmp_path) -> str:
    if request.param == "margin":
        return "margin"
    weight = np.random.default_rng(2).normal(0, 0.3, (1, 64 + 1)).astype(np.float32)
    path = str(tmp_path / "switch.gguf")
    Switch(("hidden", "entropy"), weight, np.zeros(1, np.float32), 64).save(path)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_the_same_request_gives_the_same_answer_to_the_last_bit(tiny, tmp_path, switch, way):
    """In any order, after an answer that was cut, and from a prompt cache."""
    options = Options(**WAYS[way], max_tokens=24)
    draw = random.Random(0)

    def load_pair():
        files = tiny["base"], tiny["expert"], switch
        return load(*files, n_threads=1, n_ctx=256, n_ubatch=BLOCK, overlap=False)

    def ask(pair, prompt):
        stream = pair.stream_tokens(pair.base.tokenize(prompt), options)
        return [(step.token, step.source, step.p_defer, step.logprob) for step in stream]

    alone = {}
    for prompt in PROMPTS:
        with load_pair() as pair:
            alone[prompt] = ask(pair, prompt)
            pair.save_prompts(tmp_path / "prompts")
        with load_pair() as pair:
            pair.load_prompts(tmp_path / "prompts")
            assert ask(pair, prompt) == alone[prompt]
    with load_pair() as pair:
        for _ in range(20):
            prompt = draw.choice(PROMPTS)
            assert ask(pair, prompt) == alone[prompt]
            cut = pair.stream_tokens(pair.base.tokenize(draw.choice(PROMPTS)), options)
            for _ in range(draw.randint(0, 5)):
                next(cut, None)
            cut.close()
