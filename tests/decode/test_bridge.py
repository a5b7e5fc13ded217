"""An expert of another vocabulary: both sides hold the same bytes, and none ever changes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.rows import write_rows
from scripted import reader
from spellings import ALPHABET, END, MARK, SCHEDULES, Speaker, Spellings, vocabulary

from colm_edge.cli import main
from colm_edge.decode import bridge as bridge_module
from colm_edge.decode.bridge import Bridge
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.decode.spelling import Crossing, Spelling
from colm_edge.errors import AbsentExpertError, MismatchError, ModelError
from colm_edge.evaluate.proxy_tuning import Proxy
from colm_edge.llama.model import Model
from colm_edge.llama.vocabulary import Vocabulary
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.together import Task, answer_together


def spell(crossing, tokens, wanted):
    """Return the expert's tokens of the base's, and the places of the wanted positions."""
    spelling = Spelling(crossing)
    spelling.turn_to(tokens)
    return spelling.ids, [spelling.place(i) for i in wanted]


def text(words, tokens) -> bytes:
    return b"".join(map(words.piece, tokens))


def probabilities(logits):
    p = np.exp(logits.astype(float) - logits.max())
    return p / p.sum()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_ours=st.integers(0, 30),
    n_theirs=st.integers(0, 30),
    begin=st.booleans(),
    review=st.booleans(),
)
def test_both_hold_the_same_bytes_and_none_ever_changes(seed, n_ours, n_theirs, begin, review):
    draw = random.Random(seed)
    ours, theirs = vocabulary(draw, n_ours), vocabulary(draw, n_theirs, begin=begin)
    base, expert = Speaker(ours, seed), Speaker(theirs, seed + 1)
    prompt = [ours.control(MARK), *ours.encode("ab a€".encode()), ours.control(MARK)]
    policy = Policy(reader(seed, 0.4)[0], 0.5)
    schedule = Review(ByRule(Tolerance(2.0)), 6) if review else None
    loop = Decoder(
        base, [Bridge(expert, Crossing(ours, theirs))], policy, Picker(ours.n_vocab), prompt,
        end_tokens=ours.ends, max_tokens=25, schedule=schedule,
    )  # fmt: skip
    seen = b""
    sync = expert.sync

    def checked(tokens, outputs=(), cancel=None):
        # What the expert holds spells what the base holds, its drafts included.
        assert text(theirs, tokens).startswith(text(ours, prompt))
        assert tokens[-1] not in theirs.ends
        return sync(tokens, outputs, cancel)

    expert.sync = checked
    for step in loop:
        now = text(ours, loop.tokens)
        assert now.startswith(seen)
        seen = now
        ids, _ = spell(Crossing(ours, theirs), loop.tokens, [len(loop.tokens) - 1])
        assert text(theirs, ids) == now
        assert math.isfinite(step.logprob)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 30), rate=st.floats(0, 1))
def test_with_one_vocabulary_the_bridge_writes_what_the_direct_path_writes(seed, n, rate):
    words = vocabulary(random.Random(seed), n)
    prompt = [words.control(MARK), *words.encode(b"ab a")]

    def written(bridged):
        base, expert = Speaker(words, seed), Speaker(words, seed + 1)
        timeline = Bridge(expert, Crossing(words, words)) if bridged else expert
        loop = Decoder(
            base, [timeline], Policy(reader(seed, rate)[0], 0.5), Picker(words.n_vocab), prompt,
            end_tokens=words.ends, max_tokens=25,
        )  # fmt: skip
        return [(step.token, step.source) for step in loop], loop, expert

    direct, loop, alone = written(False)
    bridged, _, expert = written(True)
    assert bridged == direct
    assert expert.held == alone.held
    assert loop.stats.n_generated == len(direct)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), n_ours=st.integers(0, 20), n_theirs=st.integers(0, 20))
def test_what_the_expert_says_is_a_distribution_over_what_follows(seed, n_ours, n_theirs):
    """At a settled place by hand: each of its tokens goes to the longest of the base's that it
    begins with."""
    draw = random.Random(seed)
    ours, theirs = vocabulary(draw, n_ours), vocabulary(draw, n_theirs)
    expert, crossing = Speaker(theirs, seed), Crossing(ours, theirs)
    bridge = Bridge(expert, crossing)
    tokens = [ours.control(MARK)]  # a control token is a place that both agree on
    bridge.sync(tokens)
    logits, _ = bridge.state(0)
    expected = np.zeros(ours.n_vocab)
    for token, p in enumerate(probabilities(expert.logits((theirs.control(MARK),)))):
        raw = theirs.piece(token)
        if token in theirs.ends:
            expected[ours.end] += p
        elif raw:
            expected[ours.first(raw)] += p
    assert np.exp(logits) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), n_ours=st.integers(0, 30), n_theirs=st.integers(0, 30))
def test_how_unlikely_the_bytes_are_that_are_there_does_not_count(seed, n_ours, n_theirs):
    """What is said of the next token sums to 1, however the expert came to its place."""
    draw = random.Random(seed)
    ours, theirs = vocabulary(draw, n_ours), vocabulary(draw, n_theirs)
    bridge = Bridge(Speaker(theirs, seed), Crossing(ours, theirs))
    tokens = [ours.control(MARK), *(draw.randrange(2, ours.n_vocab) for _ in range(30))]
    bridge.sync(tokens, range(len(tokens)))
    sums = []
    for i in range(len(tokens)):
        try:
            sums.append(np.exp(bridge.state(i)[0].astype(float)).sum())
        except AbsentExpertError:
            continue
    assert sums == pytest.approx([1.0] * len(sums), abs=1e-5)
    assert sums


def test_an_unsettled_end_is_spelt_again_with_what_follows():
    """The base has written half of a word that the expert knows as a whole."""
    ours = Spellings([b"c", b"a", b"t", b"s", b"ca", b"ts"])
    theirs = Spellings([b"c", b"a", b"t", b"s", b"cat", b"at"])
    crossing = Crossing(ours, theirs)
    mark = ours.control(MARK)
    ca, ts = ours.first(b"ca"), ours.first(b"ts")
    ids, (place,) = spell(crossing, [mark, ca], [1])
    # "c" + "a" of its own; both agree on the place before them.
    assert (list(map(theirs.piece, ids[1:])), place.given) == ([b"c", b"a"], b"ca")
    c, a = ours.first(b"c"), ours.first(b"a")
    ids, (place,) = spell(crossing, [mark, c, a, ts], [3])
    assert theirs.piece(ids[1]) == b"cat"
    # None of its tokens goes on from "cats", nor from the "s": it can be asked behind them.
    assert (place.row, place.given, place.path) == (2, b"", ())
    crossing = Crossing(ours, Spellings([b"c", b"a", b"t", b"s", b"cat", b"at", b"catsup"]))
    ids, (place,) = spell(crossing, [mark, c, a, ts], [3])
    assert (place.row, place.given, len(place.path)) == (0, b"cats", 2)
    bridge = Bridge(Speaker(theirs, 1), crossing)
    bridge.sync([mark, c, a], [2])
    assert np.exp(bridge.state(2)[0]).sum() == pytest.approx(1, abs=1e-5)


def test_a_broken_expert_is_an_error():
    ours, theirs = Spellings([b"a", b"b"]), Spellings([b"b", b"a"])
    expert = Speaker(theirs, 1)
    expert.logits = lambda prefix: np.full(theirs.n_vocab, np.nan, np.float32)
    bridge = Bridge(expert, Crossing(ours, theirs))
    bridge.sync([ours.control(MARK)])
    with pytest.raises(ModelError, match="the expert is broken"):
        bridge.state(0)


def test_an_end_that_looks_settled_is_healed_too():
    """The expert would have written ":" and a new line in one token; the base has only the ":"."""
    ours, theirs = Spellings([b":", b"\n", b"x"]), Spellings([b":", b"\n", b":\n", b"x"])
    crossing, expert = Crossing(ours, theirs), Speaker(theirs, 1)
    both, colon = theirs.first(b":\n"), theirs.first(b":")

    def logits(prefix):
        found = np.full(theirs.n_vocab, -20.0, np.float32)
        found[theirs.end if prefix[-1] == colon else both] = 0.0  # after ":" alone it is lost
        found[colon] = -2.0 if prefix[-1] != colon else -20.0
        return found

    expert.logits = logits
    bridge = Bridge(expert, crossing)
    mark = ours.control(MARK)
    bridge.sync([mark])
    assert bridge.state(0)[0].argmax() == ours.first(b":")
    bridge.sync([mark, ours.first(b":")])
    assert bridge.state(1)[0].argmax() == ours.first(b"\n")


@pytest.mark.parametrize("seed", range(30))
def test_many_states_are_read_in_parts(seed, monkeypatch):
    draw = random.Random(seed)
    ours, theirs = vocabulary(draw, seed), vocabulary(draw, 5)
    crossing, raw = Crossing(ours, theirs), "ab a€ ab a€😀 b€a".encode() * 2
    tokens = [ours.control(MARK), *ours.encode(raw)]
    outputs = range(1, len(tokens))
    _, places = spell(crossing, tokens, outputs)
    longest = max(len(place.path or ()) for place in places)

    def told() -> tuple[np.ndarray, int]:
        expert = Speaker(theirs, seed)
        bridge = Bridge(expert, crossing)
        bridge.sync(tokens, outputs)
        assert len(expert.outputs) <= bridge_module.MOST_ROWS
        states = []
        for i in outputs:
            try:
                states.append(bridge.state(i)[0])
            except AbsentExpertError:  # it would not go on from there
                states.append(np.full(ours.n_vocab, np.nan, np.float32))
        return np.stack(states), expert.account.n_calls

    whole, n_whole = told()
    monkeypatch.setattr(bridge_module, "MOST_ROWS", longest + 1)
    parts, n_parts = told()
    assert n_whole == 1 < n_parts
    assert np.array_equal(parts, whole, equal_nan=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(8))
def test_a_text_that_is_too_long_for_the_expert_is_the_bases_alone(schedule, seed):
    ours, theirs = Spellings([*ALPHABET, b"abab", b"baba"]), Spellings(ALPHABET)
    base, expert = Speaker(ours, seed), Speaker(theirs, seed + 1)
    notes: list[str] = []
    bridge = Bridge(expert, Crossing(ours, theirs), notes.append)
    prompt = [ours.control(MARK), *ours.encode(b"abab" * 4)]

    def written(n_ctx, rate):
        expert.n_ctx = Speaker.n_ctx  # which has room for as many tokens of the base's
        policy = Policy(reader(seed, rate)[0], 0.5)
        loop = Decoder(
            base, [bridge], policy, Picker(ours.n_vocab), prompt, end_tokens=ours.ends,
            max_tokens=25, schedule=SCHEDULES[schedule](),
        )  # fmt: skip
        expert.n_ctx = n_ctx
        return list(loop), loop.stats

    steps, stats = written(len(prompt), 1.0)
    assert {step.source for step in steps} == {"base"}
    assert stats.expert_failures > 0
    (note,) = notes
    assert "its context holds 5; the base goes on alone" in note
    tokens = prompt[:]
    for step in steps:  # the base's likeliest
        assert step.token == int(base.logits(tuple(tokens)).argmax())
        tokens.append(step.token)
    with pytest.raises(AbsentExpertError, match="its context holds 5"):
        bridge.sync(prompt)
    expert.n_ctx = Speaker.n_ctx
    policy = Policy(reader(seed, 1.0)[0], 0.5)
    loop = Decoder(
        base, [bridge], policy, Picker(ours.n_vocab), prompt, end_tokens=ours.ends
    )  # fmt: skip
    expert.n_ctx = len(prompt)
    assert [step.source for step in loop.read_prompt()] == ["base"] * (len(prompt) - 1)
    written(25, 0.6)  # it grows too long meanwhile, and the answer goes on


def test_an_end_crosses_by_its_name_too():
    """Both models may have several: what both call the end of a turn is one outcome."""
    ours = Spellings([b"a"], controls=(END, "<stop>", "<own>"))
    theirs = Spellings([b"a"], controls=("<their own>", "<stop>", END))
    ours.ends, theirs.ends = frozenset({0, 1, 2}), frozenset({0, 1, 2})
    crossing = Crossing(ours, theirs)
    assert [crossing.target(token, 0) for token in range(3)] == [ours.end, 1, 0]
    assert [crossing.target(token, 1) for token in range(3)] == [-1] * 3
    assert [crossing.controls(token) for token in range(3)] == [(2,), (1,), (theirs.end,)]


def test_control_tokens_cross_by_their_names():
    ours = Spellings([b"<", b">", *[bytes([c]) for c in b"otherand"]], (END, MARK, "<other>"))
    theirs = Spellings([b"<", b">", *[bytes([c]) for c in b"otherand"]], (MARK, END), begin=True)
    crossing = Crossing(ours, theirs)
    assert crossing.controls(ours.control(MARK)) == (theirs.control(MARK),)
    assert crossing.controls(ours.control(END)) == (theirs.end,)
    assert text(theirs, crossing.controls(ours.control("<other>"))) == b"<other>"
    ids, _ = spell(crossing, [ours.control(MARK)], [0])
    assert list(ids) == [theirs.begin, theirs.control(MARK)]


GREEDY = {"temperature": 0.0, "max_tokens": 30}


def opened(tiny, expert, **more):
    return load(tiny["base"], expert, "margin", n_threads=1, n_ctx=256, bridge=True, **more)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_real_models_of_one_vocabulary_write_the_same(tiny, threshold):
    options = {**GREEDY, "threshold": threshold, "schedule": "sequential"}
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        direct = pair.generate("hello", **options)
    with opened(tiny, tiny["expert"]) as pair:
        across = pair.generate("hello", **options)
        assert [(s.token, s.source) for s in across.steps] == [
            (s.token, s.source) for s in direct.steps
        ]
        assert [s.logprob for s in across.steps] == pytest.approx(
            [s.logprob for s in direct.steps], abs=1e-3
        )


def test_real_models_of_two_vocabularies(tiny, other):
    with pytest.raises(MismatchError, match="or --bridge"):
        load(tiny["base"], other, "margin", n_threads=1)
    with opened(tiny, other) as pair:
        plain = pair.generate("hello", threshold=0.3, schedule="sequential", **GREEDY)
        assert {step.source for step in plain.steps} == {"base", "expert"}
        assert pair.generate("hello", threshold=0.3, **GREEDY).text == plain.text
        tokens = plain.prompt_tokens + [step.token for step in plain.steps]
        spelt = b"".join(map(pair.base.piece, tokens))
        held = pair.expert_session
        model = pair.expert_session.model
        assert spelt.startswith(b"".join(map(model.piece, held._held.tokens)))
        reviewed = pair.generate("hello", threshold=0.3, review=1.0, **GREEDY)
        assert reviewed.stats.n_reviewed
        tasks = [Task(i, plain.prompt_tokens, Options(**GREEDY, threshold=0.3)) for i in range(3)]
        for done in answer_together(pair, tasks, 3):
            assert done.answer.text == plain.text


def test_what_reads_the_experts_own_tokens_refuses_a_bridge(tiny, other):
    with opened(tiny, other) as pair, pytest.raises(MismatchError, match="leave --bridge out"):
        Proxy(pair, Path(tiny["expert"]))
    assert "No such option" in CliRunner().invoke(main, ["bench", "--bridge"]).stderr


def test_the_switch_is_trained_across(tiny, other, tmp_path):
    data, prompts, out = (tmp_path / name for name in ("d.jsonl", "p.jsonl", "s.gguf"))
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * 7}"} for i in range(10)]
    write_rows(data, rows)
    write_rows(prompts, ({"prompt": row["prompt"]} for row in rows))
    models = ["-m", tiny["base"], "-me", other, "--bridge", "-t", "1", "-c", "128"]
    for text in (["--data", str(data)], ["--prompts", str(prompts), "-n", "8", "-np", "2"]):
        ran = CliRunner().invoke(main, ["train", *models, *text, "--outfile", str(out)])
        assert ran.exit_code == 0, ran.output
        report = json.loads(ran.stdout.splitlines()[-1])
        assert math.isfinite(report["nll_joint"])
        assert report["nll_expert"] > 0
    how = ["-sw", str(out), "--data", str(data), "--methods", "base,expert,colm", "-o", "json"]
    ran = CliRunner().invoke(main, ["eval", *models, *how])
    assert ran.exit_code == 0, ran.output
    assert [row["method"] for row in json.loads(ran.stdout)] == ["base", "expert", "colm"]


@pytest.mark.parametrize("raw", ["plain", "a€😀", b"\xe2\x82", b"a\xff\xfeb", "  two  spaces\n\n"])
def test_a_real_vocabulary_spells_every_byte(tiny, raw):
    raw = raw if isinstance(raw, bytes) else raw.encode()
    model = Model(tiny["base"])
    words = Vocabulary(model)
    tokens = words.encode(raw)
    assert b"".join(map(words.piece, tokens)) == raw
    if raw.isascii():
        assert tokens == model.tokenize(raw.decode(), special=False, bos=False)
    model.close()


def test_what_a_bridge_leaves_out_is_not_what_the_grammar_forbids():
    """It names thousands of tokens, of which none may go on; so the base writes what may."""
    with load(bridge=True, n_threads=1) as pair:
        wanted = {"grammar": 'root ::= "中中中"', "temperature": 0.0, "threshold": 0.0}
        said = pair.generate("What is the symbol of tungsten?", **wanted)
    assert said.text == "中中中"
    assert said.stats.expert_failures > 0
