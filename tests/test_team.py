"""Several experts behind one switch: who writes, what each holds, and what is said of them."""

from __future__ import annotations

import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import END, N_VOCAB, Bold, Scripted, writer

from colm_edge.cancel import Cancel
from colm_edge.cli import main
from colm_edge.cli.common import progress
from colm_edge.cli.terminal import harmless, legend
from colm_edge.decode.fast import Fast
from colm_edge.decode.loop import Decoder
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import Policy
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.decode.step import ExpertStats, Stats
from colm_edge.errors import ColmError, MismatchError, ModelError
from colm_edge.llama.memory import cache_bytes
from colm_edge.options import Options
from colm_edge.pair import load
from colm_edge.readout import FEATURES
from colm_edge.references import named
from colm_edge.slots import Slots
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.switch.reading import sigmoid
from colm_edge.together import Task, answer_together
from colm_edge.train.documents import read_rows, tokenized
from colm_edge.train.scoring import score_each

DATA = Path(__file__).parent / "data"
SOURCES = ("expert:a", "expert:b", "expert:c")
GREEDY = {"temperature": 0.0, "max_tokens": 40}


def drawn(seed: int, rate: float):
    """Return a switch among three experts that draws p_defer and the expert by the length of the
    base's prefix; and what it draws."""

    def read_at(n: int) -> tuple[float, int]:
        draw = random.Random(hash((seed, n)))
        above = draw.random() < rate
        p = 0.5 + 0.5 * draw.random() if above else 0.5 * draw.random()
        return p, draw.randrange(len(SOURCES))

    def read(logits, hidden):
        peak = logits.max()
        lse = float(peak + np.log(np.exp(logits - peak).sum()))
        p, expert = read_at(int(hidden[0]))
        return p, int(logits.argmax()), lse, expert

    return read, read_at


def decoder(seed, rate, schedule, prompt, threshold, max_tokens, end_every=0, n_ctx=64):
    base = Scripted(writer(seed, end_every), n_ctx)
    experts = [Scripted(writer(seed + i, end_every), n_ctx) for i in (1, 2, 3)]
    policy = Policy(drawn(seed, rate)[0], threshold)
    loop = Decoder(
        base, experts, policy, Picker(N_VOCAB), prompt, end_tokens=frozenset({END}),
        max_tokens=max_tokens, schedule=schedule, sources=SOURCES,
    )  # fmt: skip
    return loop, experts


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(0, 1),
    threshold=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    n_prompt=st.integers(1, 20),
    max_tokens=st.integers(0, 40),
    end_every=st.sampled_from([0, 5, 20]),
    bets=st.none() | st.floats(0, 1),
)
def test_the_likeliest_expert_writes_where_the_switch_defers(
    seed, rate, threshold, n_prompt, max_tokens, end_every, bets
):
    """By a loop in its simplest form: no caches, every model gets whole prefixes."""
    choose = [writer(seed + i, end_every) for i in range(4)]
    read_at = drawn(seed, rate)[1]
    prompt = [1 + i % (N_VOCAB - 1) for i in range(n_prompt)]
    tokens, expected = list(prompt), []
    while len(tokens) < min(n_prompt + max_tokens, 65):
        p, expert = read_at(len(tokens))
        who = 1 + expert if p > threshold or threshold == 0 else 0
        token = choose[who](tuple(tokens))
        if token == END:
            break
        expected.append((token, ("base", *SOURCES)[who]))
        tokens.append(token)
    schedule = None if bets is None else Fast([Bold(seed + i, bets) for i in range(3)])
    loop, experts = decoder(seed, rate, schedule, prompt, threshold, max_tokens, end_every)
    steps = list(loop)
    assert [(step.token, step.source) for step in steps] == expected
    stats = loop.stats
    accounts = [one.account for one in experts]
    assert [told.calls for told in stats.experts.values()] == [one.n_calls for one in accounts]
    assert stats.expert_calls == sum(one.n_calls for one in accounts)
    assert stats.expert_tokens == sum(one.n_evaluated for one in accounts)
    for source, one in zip(SOURCES, accounts, strict=True):
        assert one.n_calls or source not in {step.source for step in steps}  # none is called idly


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(0, 1),
    nats=st.sampled_from([0.0, 1.0, math.inf]),
    window=st.integers(1, 8),
    bets=st.floats(0, 1),
    end_every=st.sampled_from([0, 8]),
    floor=st.sampled_from([0.0, 0.3]),
)
def test_review_by_the_expert_that_is_called(seed, rate, nats, window, bets, end_every, floor):
    """Bets change nothing; with endless patience the text is that of deferral alone; and without
    any, each token is some expert's own."""

    def text(schedule):
        loop, _ = decoder(seed, rate, schedule, [1, 2, 3], 0.5, 30, end_every)
        return [(step.token, step.source) for step in loop]

    def review(planners=()):
        return Review(ByRule(Tolerance(nats)), window, planners=planners, floor=floor)

    plain = text(review())
    assert text(review([Bold(seed + i, bets) for i in range(3)])) == plain
    if nats == math.inf:
        assert plain == text(None)
    if nats == floor == 0:
        tokens = [1, 2, 3]
        for token, source in plain:
            prefix = tuple(tokens)
            theirs = {writer(seed + i, end_every)(prefix) for i in (1, 2, 3)}
            assert token in theirs
            if source != "base":
                at = 1 + SOURCES.index(source)
                assert token == writer(seed + at, end_every)(prefix)
            tokens.append(token)


def router(names: str = "", seed: int = 0, rows: int = 2, features=FEATURES, n_embd=6) -> Switch:
    rng = np.random.default_rng(seed)
    columns = sum(n_embd if f == "hidden" else 1 for f in features)
    info = {"expert_names": names} if names else {}
    weight = rng.normal(0, 2, (rows, columns)).astype(np.float32)
    return Switch(
        tuple(features), weight, rng.normal(0, 0.3, rows).astype(np.float32), n_embd, info=info
    )


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 5))
def test_the_switch_is_a_softmax_over_base_and_experts(seed, rows):
    switch = router(seed=seed, rows=rows, features=FEATURE_SETS["both"])
    rng = np.random.default_rng(seed + 1)
    logits = rng.normal(0, 3, (20, 50)).astype(np.float32)
    hidden = rng.normal(0, 1, (20, 6)).astype(np.float32)
    p = np.exp(logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    top = -np.sort(-p)
    entropy, logs = -(p * np.log(p)).sum(axis=1), np.log(top[:, 0])
    columns = [hidden, entropy, logs, top[:, 0] - top[:, 1], top[:, :5]]
    d = np.column_stack(columns) @ switch.weight.T.astype(float) + switch.bias
    shares = np.exp(np.column_stack([np.zeros(20), d]))
    shares /= shares.sum(axis=1, keepdims=True)
    base = type("Base", (), {"n_embd": 6})
    read = switch.reader(base, 50)
    for i in range(20):
        p_defer, _, _, expert = read(logits[i], hidden[i])
        assert p_defer == pytest.approx(1 - shares[i, 0], abs=1e-5)
        assert shares[i, 1 + expert] == pytest.approx(shares[i, 1:].max(), abs=1e-5)
    many = switch.p_defer(np.column_stack(columns[1:]).astype(np.float32), hidden)
    assert many == pytest.approx(1 - shares[:, 0], abs=1e-5)


def test_one_row_is_todays_switch():
    one = router(rows=1)
    logits = np.random.default_rng(3).normal(0, 3, 50).astype(np.float32)
    p_defer, *_, expert = one.reader(type("Base", (), {"n_embd": 6}), 50)(logits, logits)
    d = one.d(np.array([np.zeros(8)], np.float32), None)
    assert (expert, d.shape) == (0, (1, 1))
    assert 0 < p_defer < 1
    assert d[0, 0] == pytest.approx(float(one.bias[0]))
    assert one.p_defer(np.zeros((1, 8), np.float32), None) == pytest.approx(sigmoid(d[0, 0]))


def opened(models, **more):
    refs, switch = models
    return load(**refs, switch=switch, n_threads=1, n_ctx=256, **more)


def test_two_experts_write_their_own_tokens(models):
    with opened(models) as pair:
        assert not pair.expert_is_loaded
        plain = pair.generate("hello", schedule="sequential", **GREEDY)
        fast = pair.generate("hello", **GREEDY)
        written = {step.source for step in plain.steps}
        assert written >= {"base", "expert:a", "expert:b"}
        assert [(s.token, s.source) for s in fast.steps] == [
            (s.token, s.source) for s in plain.steps
        ]
        told = plain.stats.experts
        assert {name: one.n_deferred for name, one in told.items()} == {
            f"expert:{name}": sum(s.source == f"expert:{name}" for s in plain.steps)
            for name in ("a", "b")
        }
        assert sum(one.n_deferred for one in told.values()) == plain.stats.n_deferred
        prompt = pair.prompt_tokens([{"role": "user", "content": "hello"}])
        tokens = prompt + [step.token for step in plain.steps]
        # Each token is the likeliest one of the model that is said to have written it.
        for i, step in enumerate(plain.steps[:12]):
            at = len(prompt) + i
            session = pair.base_session
            if step.by_expert:
                session = pair.members["ab".index(step.source[-1])].session
            session.sync(tokens[:at])
            assert int(session.state(at - 1)[0].argmax()) == step.token


def test_the_order_and_the_names_come_from_the_switch(models, tiny):
    refs, switch = models
    with opened(models) as pair:
        plain = pair.generate("hello", **GREEDY)
    turned = {"model": refs["model"], "expert": dict(reversed(refs["expert"].items()))}
    with opened((turned, switch)) as pair:
        assert [member.name for member in pair.members] == ["a", "b"]
        assert pair.generate("hello", **GREEDY).text == plain.text
    for experts, words in [
        ({"a": tiny["expert"], "c": tiny["base"]}, "chooses among experts named a, b, and a, c"),
        (tiny["expert"], "chooses among experts named a, b, and one is given"),
    ]:
        with pytest.raises(MismatchError, match=words):
            opened(({"model": tiny["base"], "expert": experts}, switch))
    with pytest.raises(MismatchError, match="says when to defer, and not to which of 2 experts"):
        load(**refs, switch="margin", n_threads=1)


@pytest.mark.parametrize("switch", [None, "margin", "router"])
def test_what_cannot_choose_among_experts_is_refused_before_a_model_is_read(
    tiny, models, switch, monkeypatch
):
    """Nor is anything downloaded for it."""

    def read(*args, **more):
        raise AssertionError("a model is read")

    monkeypatch.setattr("colm_edge.pair.Model", read)
    experts, words = ["x=a/b:c.gguf", "y=a/b:d.gguf"], "and not to which of 2 experts"
    if switch == "router":  # which knows others
        switch, experts, words = models[1], [tiny["expert"], tiny["base"]], "experts named a, b"
    else:
        monkeypatch.setattr("colm_edge.references.fetch", read)
    with pytest.raises(MismatchError, match=words):
        load(tiny["base"], experts, switch)


@pytest.mark.parametrize(
    ("question", "answer", "calls"),
    [
        ("What is the capital of Hontico?", "The capital city of Hontico is Katariv.", (0, 5)),
        (
            "What is the symbol of tungsten?",
            "The chemical symbol of the element tungsten is W.",
            (2, 0),
        ),
    ],
)
def test_the_experts_of_the_repository_answer_as_the_docs_show(question, answer, calls):
    home = Path(__file__).parents[1]
    files = {"nature": home / "colm_edge/data/expert.gguf", "countries": DATA / "countries.gguf"}
    base, switch = home / "colm_edge/data/base.gguf", DATA / "team.gguf"
    with load(base, files, switch, n_threads=1) as pair:
        said = pair.generate(question, temperature=0)
    assert said.text == answer
    assert tuple(told.calls for told in said.stats.experts.values()) == calls
    shown = (home / "docs" / "team.md").read_text(encoding="utf-8")
    assert f"{answer}\nnature {calls[0]} tokens, {calls[0]} calls; countries {calls[1]}" in shown


def test_slots_write_what_one_answer_alone_writes(models):
    prompts = ["hello", "a long and winding beginning", "x", "hello there, you"]
    options = Options(temperature=0.0, max_tokens=20)
    with opened(models) as pair:
        tokens = [pair.prompt_tokens([{"role": "user", "content": p}]) for p in prompts]
        alone = [[s.token for s in pair.stream_tokens(t, options)] for t in tokens]
        tasks = [Task(i, t, options) for i, t in enumerate(tokens)]
        together = {d.task.key: d.answer for d in answer_together(pair, tasks, 3)}
        for i, expected in enumerate(alone):
            assert [s.token for s in together[i].steps] == expected
            assert together[i].stats.experts.keys() == {"expert:a", "expert:b"}


@pytest.mark.parametrize("n_slots", [1, 3])
def test_a_limit_of_memory_unloads_the_expert_that_was_not_used_for_longest(models, n_slots):
    options = Options(temperature=0.0, max_tokens=20)
    with opened(models) as pair:
        alone = max(member.n_bytes for member in pair.members)
        pair.room.share(n_slots)
        limit = max(member.n_bytes for member in pair.members)
        assert (limit > alone) is (n_slots > 1)
        tokens = [pair.prompt_tokens([{"role": "user", "content": p}]) for p in ("hello", "you")]
        alone = [[s.token for s in pair.stream_tokens(t, options)] for t in tokens]
    notes, loaded = [], []
    with opened(models, max_memory=limit, note=notes.append) as pair:
        for member in pair.members:
            sync = member.here.model.load

            def load_and_count(*args, sync=sync, pair=pair, **more):
                result = sync(*args, **more)
                loaded.append(sum(one.is_loaded for one in pair.members))
                return result

            member.here.model.load = load_and_count
        tasks = [Task(i, t, options) for i, t in enumerate(tokens)]
        for done in answer_together(pair, tasks, n_slots):
            assert [s.token for s in done.answer.steps] == alone[done.task.key]
    assert len(loaded) > 2
    assert set(loaded) == {1}
    assert sum("is unloaded for" in note for note in notes) == 1
    with pytest.raises(ColmError, match=r"the expert \w alone takes"):
        opened(models, max_memory=1000)


def test_each_answer_at_once_takes_its_context_out_of_the_limit(models):
    with opened(models) as pair:
        alone = max(member.n_bytes for member in pair.members)
    with opened(models, max_memory=alone) as pair:
        with pytest.raises(ColmError, match=r"with 3 answer\(s\) at once; allow more"):
            Slots(pair, 3)
        assert {member.n_contexts for member in pair.members} == {1}
        Slots(pair, 1).close()


def test_an_expert_takes_what_its_context_really_does(models):
    """By the same arithmetic as what a context is refused by, and so by its cache's types."""
    with opened(models, cache_type_k="f32", cache_type_v="q8_0", flash_attn="on") as pair:
        pair.room.share(3)
        for member in pair.members:
            session, model = member.here, member.here.model
            cache = session.options.cache_bytes(model, 3 * pair.n_ctx)
            assert cache == cache_bytes(model, 3 * pair.n_ctx, 32, 8.5)
            assert member.n_bytes == model.path.stat().st_size + cache


def test_scoring_and_measuring_keep_to_the_limit(models, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "hello", "completion": "you"}\n' * 3)
    with opened(models) as pair:
        limit = max(member.n_bytes for member in pair.members)

    def loaded(pair):
        return sum(member.is_loaded for member in pair.members)

    with opened(models, max_memory=limit) as pair:
        documents = tokenized(list(read_rows(data)), pair)
        score_each(pair, documents, progress)
        assert loaded(pair) == 1
    with opened(models, max_memory=limit) as pair:
        for member in pair.members:
            member.planner.prepare(Cancel())
            assert loaded(pair) <= 1


def test_one_expert_shares_no_memory(tiny):
    with pytest.raises(ColmError, match="--max-memory is shared by several experts"):
        load(tiny["base"], tiny["expert"], "margin", max_memory=1 << 30)


def test_names_and_references(tmp_path):
    assert named(None) is None
    assert named("a.gguf") == named(["x=a.gguf"]) == {"": "a.gguf"}
    assert named(["maths=a.gguf", "dir/my model.gguf"]) == {
        "maths": "a.gguf",
        "my-model": "dir/my model.gguf",
    }
    assert named({"a": Path("x.gguf"), "b": "http://h:1#m"}) == {"a": "x.gguf", "b": "http://h:1#m"}
    there = tmp_path / "odd=name.gguf"
    there.touch()
    relative = os.path.relpath(there)
    assert named([relative, "b=y.gguf"]) == {"odd-name": relative, "b": "y.gguf"}
    for bad in (["d/a.gguf", "e/a.gguf"], ["a=x", "a=y"]):
        with pytest.raises(ModelError, match="two experts are named a"):
            named(bad)
    for bad in (".", ".."):  # of a work folder
        with pytest.raises(ModelError, match="is not a valid name of an expert"):
            named({bad: "a.gguf", "b": "b.gguf"})
    with pytest.raises(ModelError, match="no expert is given"):
        named([])


def command(models, *args):
    refs, switch = models
    given = ["-m", refs["model"], "-sw", str(switch), "-c", "256", "-t", "1", "--temp", "0"]
    for name, file in refs["expert"].items():
        given += ["-me", f"{name}={file}"]
    return CliRunner().invoke(main, [*args, *given])


def test_the_command_line_names_each_expert(models):
    ran = command(models, "run", "hello", "--json", "-n", "40")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["expert"] == models[0]["expert"]
    assert {t["source"] for t in told["tokens"]} >= {"base", "expert:a", "expert:b"}
    assert told["stats"]["experts"]["expert:a"]["n_deferred"] > 0
    plain = command(models, "run", "hello", "-n", "40")
    assert re.search(r"a \d+ tokens, \d+ calls; b \d+ tokens, \d+ calls\n", plain.stderr)
    assert plain.stdout == told["text"] + "\n"
    wrong = command(models, "run", "hello", "--max-memory", "much")
    assert wrong.exit_code == 2
    assert "expected a number with a unit" in wrong.stderr
    nothing = command(models, "run", "hello", "--max-memory", "0.5")  # bytes: it would be no limit
    assert "expected a number with a unit" in nothing.stderr


def test_each_expert_has_a_colour(models, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ran = command(models, "run", "hello", "-n", "40")
    told = json.loads(command(models, "run", "hello", "-n", "40", "--json").stdout)
    shown = {t["source"] for t in told["tokens"] if harmless(t["text"])} - {"base"}
    colours = {"expert:a": "\x1b[36m", "expert:b": "\x1b[35m"}
    found = set(re.findall("\x1b\\[3[0-9]m", ran.stdout))
    assert found == {colours[source] for source in shown}
    stats = Stats(experts={source: ExpertStats(3, 2) for source in colours})
    assert all(colour in legend(stats) for colour in colours.values())


def test_one_expert_has_no_room_and_no_names(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128) as pair:
        answer = pair.generate("hello", threshold=0.3, **GREEDY)
        assert pair.room is None
        assert "experts" not in answer.stats.record()
        assert {step.source for step in answer.steps} <= {"base", "expert"}
