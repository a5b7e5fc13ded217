"""The text API over tiny random models: the plain loop's tokens, text, stop strings, templates."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import TEMPLATE
from lib.random_model import SHAPES, write_model
from reference import PlainModel, assert_same, plain_loop
from scripted import stream_of

import colm_edge
from colm_edge.decode.loop import PROMPT_OUTPUTS
from colm_edge.errors import ColmError, MismatchError, ModelError, PromptError
from colm_edge.llama.sampling import ChainSampler
from colm_edge.options import Options
from colm_edge.pair import Pair, load
from colm_edge.switch.file import FEATURE_SETS, Switch

GREEDY = {"temperature": 0.0, "max_tokens": 40}


@pytest.fixture(scope="module")
def switch(tmp_path_factory) -> str:
    """A random head on the hidden state and logit features that defers about half of the tokens."""
    rng = np.random.default_rng(5)
    weight = rng.normal(0, 0.3, (1, 64 + 8)).astype(np.float32)
    path = tmp_path_factory.mktemp("switch") / "random.gguf"
    Switch(
        FEATURE_SETS["both"],
        weight,
        np.zeros(1, np.float32),
        64,
        0.5,
        (0.0, 0.5, 1.0),
        (1.0, 0.5, 0.0),
    ).save(path)
    return str(path)


@pytest.mark.parametrize("kind", ["trained", "margin", "entropy"])
def test_the_runtime_is_the_plain_loop(tiny, switch, kind):
    base, expert = PlainModel(tiny["base"]), PlainModel(tiny["expert"])
    head = Switch.load(switch) if kind == "trained" else kind
    sources = set()
    with load(
        tiny["base"], tiny["expert"], switch if kind == "trained" else kind, n_threads=1, n_ctx=256
    ) as pair:
        for prompt in ("hello there", "12 + 7", "zebra quagga dodo", "été"):
            for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
                answer = pair.generate(prompt, threshold=threshold, **GREEDY)
                plain = plain_loop(
                    base, expert, head, answer.prompt_tokens, threshold, GREEDY["max_tokens"]
                )
                assert_same(answer.steps, plain, threshold)
                sources |= {(threshold, s.source) for s in answer.steps}
    assert {(0.5, "base"), (0.5, "expert")} <= sources
    base.close()
    expert.close()


@pytest.mark.parametrize("strategy", ["defer", "compose"])
@pytest.mark.parametrize("schedule", ["fast", "sequential"])
def test_reading_an_answer_back_gives_the_steps_of_writing_it(tiny, switch, strategy, schedule):
    options = Options(
        temperature=0.0,
        max_tokens=100,
        threshold=0.5,
        strategy=strategy,
        schedule=schedule,
        n_probs=3,
    )
    with load(tiny["base"], tiny["expert"], switch, n_threads=1, n_ctx=256) as pair:
        written = pair.generate("hello there", **vars(options))
        tokens = written.prompt_tokens + [step.token for step in written.steps]
        stream = pair.stream_tokens(tokens, options)
        read = stream.read_prompt()
        assert [step.token for step in read] == tokens[1:]
        read = read[-len(written.steps) :]
        assert {step.source for step in read} == {"base", "expert"}
        for before, after in zip(written.steps, read, strict=True):
            assert after.p_defer == pytest.approx(before.p_defer, abs=2e-2)
            if abs(before.p_defer - 0.5) < 2e-2:
                continue  # a near-tie of the two models
            assert after.source == before.source
            assert after.logprob == pytest.approx(before.logprob, abs=5e-2)
            # Greedy: the likeliest token was written.
            assert before.top[0] == (before.token, before.logprob)
            tops = [[x for _, x in step.top] for step in (before, after)]
            assert tops[1] == pytest.approx(tops[0], abs=5e-2)
            assert sorted(tops[0], reverse=True) == tops[0]
        # Reading the prompt back does not change how the answer continues.
        more = [step.token for step in stream]
        again = pair.stream_tokens(tokens, options)
        assert more == [step.token for step in again]


def test_cancelling_ends_reading_a_prompt_between_two_batches(tiny_pair, monkeypatch):
    tokens = [7 + i % 50 for i in range(3 * PROMPT_OUTPUTS)]
    stream = tiny_pair.stream_tokens(tokens, Options(threshold=1.0))
    sync = tiny_pair.base_session.sync

    def leave(*args):
        stream.cancel()
        return sync(*args)

    monkeypatch.setattr(tiny_pair.base_session, "sync", leave)
    with pytest.raises(ColmError, match="begins at token 1"):
        stream.read_prompt(0)
    assert len(stream.read_prompt()) == PROMPT_OUTPUTS
    assert list(stream) == []
    assert stream.finish_reason == "stop"


@pytest.mark.parametrize("more", [{}, {"stop": ["e", "a", " "]}, {"review": 1.0}])
def test_a_prompt_is_not_read_back_once_the_answer_has_begun(tiny_pair, more):
    """Not a step need be out: a stop text cut it, or it waits for review."""
    stream = tiny_pair.stream("hello", threshold=0.9, **GREEDY, **more)
    next(stream.events(), None)
    with pytest.raises(ColmError, match="before the first step"):
        stream.read_prompt()


def test_warnings_reach_a_log_of_warnings(tiny, caplog):
    with (
        caplog.at_level(logging.WARNING, "colm_edge"),
        load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=5000),
    ):
        assert "-c 5000 is more than" in caplog.text


def test_threshold_one_is_the_base_alone_and_never_loads_the_expert(tiny, switch):
    with load(tiny["base"], tiny["expert"], switch, n_threads=1) as pair:
        answer = pair.generate("hello", threshold=1.0, **GREEDY)
        assert not pair.expert_session.created
        assert not pair.expert_is_loaded
        assert answer.stats.expert_calls == answer.stats.expert_tokens == 0
    with load(tiny["base"], tiny["base"], "margin", n_threads=1) as alone:
        assert answer.text == alone.generate("hello", threshold=1.0, **GREEDY).text


@pytest.mark.parametrize(("n_threads", "ahead"), [(0, True), (1, True), (64, False)])
def test_the_expert_is_read_ahead_of_its_first_token(tiny, monkeypatch, n_threads, ahead):
    """But not beside as many threads as there are cores, if their number is the user's."""
    monkeypatch.setattr("colm_edge.decode.background.n_cores", lambda: 2)
    prepared = []
    with load(tiny["base"], tiny["expert"], "margin", n_threads=n_threads, n_ctx=256) as pair:
        pair.cost_tables()
        pair.unload_expert()
        prepare = pair.expert_session.model.prepare
        monkeypatch.setattr(
            pair.expert_session.model,
            "prepare",
            lambda: (prepared.append(pair.expert_is_loaded), prepare()),
        )
        stream = pair.stream("hello", threshold=0.9, **GREEDY)
        steps = list(stream)
        assert any(0.45 < step.p_defer <= 0.9 for step in steps)
        assert prepared == ([False] if ahead else [])
        assert pair.generate("hello", threshold=1.0, **GREEDY).text
        assert prepared == ([False] if ahead else [])


def test_threshold_zero_is_the_expert_alone(tiny, switch):
    with load(tiny["base"], tiny["expert"], switch, n_threads=1) as pair:
        answer = pair.generate("hello", threshold=0.0, **GREEDY)
    with load(tiny["expert"], tiny["expert"], "margin", n_threads=1) as alone:
        assert answer.text == alone.generate("hello", threshold=1.0, **GREEDY).text
    assert answer.stats.defer_rate == 1.0


def test_a_model_with_itself_writes_its_own_text(tiny, switch):
    texts = set()
    for kind in (switch, "margin", "entropy"):
        with load(tiny["base"], tiny["base"], kind, n_threads=1) as pair:
            for strategy in ("defer", "compose"):
                answer = pair.generate("hello", threshold=0.3, strategy=strategy, **GREEDY)
                texts.add(answer.text)
    assert len(texts) == 1


def test_the_defer_row_of_a_colm_vocabulary(tiny):
    """p_defer is σ of the row's logit; the row and the pad are never written."""
    plain = PlainModel(tiny["defer"])
    with load(tiny["defer"], tiny["expert"], "defer-row", n_threads=1) as pair:
        assert pair.n_shared == 400
        answer = pair.generate("hello", **GREEDY)
        tokens = list(answer.prompt_tokens)
        for step in answer.steps:
            logits, _ = plain.state(tokens)
            assert step.p_defer == pytest.approx(1 / (1 + np.exp(-logits[401])), abs=1e-3)
            assert step.token < 400
            tokens.append(step.token)
        alone = pair.generate("hello", threshold=1.0, n_probs=402, **GREEDY)
        assert all(step.token != 401 for step in alone.steps)
        assert all(token != 401 for step in alone.steps for token, _ in step.top)
        assert sum(np.exp(x) for _, x in alone.steps[0].top) == pytest.approx(1)
    plain.close()


def test_the_expert_evaluates_only_what_a_deferral_needs(tiny_pair):
    answer = tiny_pair.generate("hello", threshold=0.5, **GREEDY)
    stats, steps = answer.stats, answer.steps
    deferred = [i for i, s in enumerate(steps) if s.source == "expert"]
    assert deferred
    assert stats.n_deferred == len(deferred)
    if answer.finish_reason == "length":
        assert stats.expert_tokens == stats.n_prompt + deferred[-1]
    again = tiny_pair.generate("hello", threshold=0.5, **GREEDY)
    assert again.text == answer.text


def test_the_same_seed_gives_the_same_answer(tiny_pair):
    sampled = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 20}
    ask = lambda seed: tiny_pair.generate("hello", seed=seed, **sampled).text  # noqa: E731
    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1
    assert ask(-1) != ask(-1) or ask(-1) != ask(-1)


def test_narrow_sampling_is_greedy(tiny_pair):
    greedy = tiny_pair.generate("hello", **GREEDY).text
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-4}):
        sampled = {"temperature": 1.0, "max_tokens": 40} | narrow
        assert tiny_pair.generate("hello", **sampled).text == greedy


def test_repeat_penalty_forbids_repeats(tiny_pair):
    answer = tiny_pair.generate("hello", repeat_penalty=1e6, **GREEDY)
    tokens = [s.token for s in answer.steps]
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_prevent_repeated_tokens(tiny_pair, penalty):
    plain = [s.token for s in tiny_pair.generate("hello", **GREEDY).steps]
    assert len(set(plain)) < len(plain)
    steps = tiny_pair.generate("hello", **GREEDY, **{penalty: 100.0}).steps
    assert len({s.token for s in steps}) == len(steps) == len(plain)


def test_the_frequency_penalty_counts_and_the_presence_penalty_does_not():
    logits = np.zeros(8, np.float32)
    logits[3], logits[4] = 2.0, 0.5
    history = [3, 3, 4]  # 3 came twice: below 4 by the frequency penalty, above it by presence
    for penalties, choice in (
        ({"presence_penalty": 1.0}, 3),
        ({"frequency_penalty": 1.0}, 0),
        ({"stop": ()}, 3),
    ):
        sample = ChainSampler(Options(temperature=0.0, **penalties), 8, history)
        assert sample(logits) == choice


BAD_VALUES = (
    {"temperature": None},
    {"seed": 1.5},
    {"top_k": 1.5},
    {"max_tokens": "9"},
    {"stop": 5},
    {"stop": [5]},
    {"temperature": float("nan")},
)


def test_a_bad_prompt_or_option_is_one_clear_error(tiny_pair):
    for bad in BAD_VALUES:
        with pytest.raises(ColmError, match=f"{next(iter(bad))} is .*expected"):
            tiny_pair.generate("hello", **bad)
    for messages in ("hi", None, [5], [{"role": "user"}], [{"role": "user", "content": 5}]):
        with pytest.raises(PromptError, match="expected"):
            tiny_pair.chat(messages)
    with pytest.raises(PromptError, match="expected role and content, as texts"):
        tiny_pair.generate(None)


def test_stop_strings_cut_the_answer(tiny_pair):
    whole = tiny_pair.generate("hello", **GREEDY)
    text = whole.text
    stop = text[7:10]
    answer = tiny_pair.generate("hello", stop=("never there", stop), **GREEDY)
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(s.text for s in answer.steps) == answer.text
    assert answer.stats.n_generated == len(answer.steps)


def test_a_stop_string_that_only_begins_removes_nothing(tiny_pair):
    text = tiny_pair.generate("hello", **GREEDY).text
    answer = tiny_pair.generate("hello", stop=(text[5:9] + "\x00", text[-1] + "\x00"), **GREEDY)
    assert answer.text == text


def test_characters_that_span_tokens_are_not_split():
    text = "a猫é🦤b"
    stream = stream_of(text.encode())
    pieces = [s.text for s in stream]
    assert "".join(pieces) == text
    assert all("�" not in p for p in pieces)
    assert pieces == ["a", "", "", "猫", "", "é", "", "", "", "🦤", "b"]


def test_an_incomplete_character_at_the_end_is_marked():
    stream = stream_of("ab🦤".encode()[:-1])
    assert "".join(s.text for s in stream) == "ab�"
    assert stream.answer().text == "ab�"


@pytest.mark.parametrize("stop", ["猫é", "🦤", "c", "b猫", "éx", "b猫é🦤c!"])
def test_stop_strings_across_tokens(stop):
    text = "ab猫é🦤c!"
    answer = stream_of(text.encode(), (stop,))
    assert "".join(s.text for s in answer) == text.split(stop, maxsplit=1)[0]


def test_a_full_context_ends_the_answer_with_length(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=32) as pair:
        pair.base.__dict__["end_tokens"] = pair.expert_session.model.__dict__["end_tokens"] = (
            frozenset()
        )
        answer = pair.generate("hello", temperature=0.0)
        assert answer.finish_reason == "length"
        assert len(answer.prompt_tokens) + len(answer.steps) == 33
        with pytest.raises(PromptError, match="context holds 32; shorten it or raise -c"):
            pair.generate("hello " * 40)


def test_empty_prompts_are_refused(tiny_pair):
    for prompt in ("", "  \n"):
        with pytest.raises(PromptError, match="empty"):
            tiny_pair.generate(prompt)
    with pytest.raises(PromptError, match="at least one message"):
        tiny_pair.chat([])
    with pytest.raises(PromptError, match="expected role and content"):
        tiny_pair.chat([{"content": "hello"}])


def test_templates_come_from_the_base(tiny):
    with load(tiny["template"], tiny["expert"], "margin", n_threads=1) as pair:
        messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
        assert pair.base.chat_template == TEMPLATE
        assert pair.prompt_text(messages) == "system: be short\nuser: hi\nassistant:"
        assert pair.prompt_tokens(messages) == pair.base.tokenize(pair.prompt_text(messages))
        begun = [*messages, {"role": "assistant", "content": " Well,"}]
        assert pair.prompt_text(begun) == pair.prompt_text(messages) + " Well,"
        assert pair.prompt_tokens(messages, raw=True) == pair.base.tokenize("be short\n\nhi")
        assert pair.generate("hi", system="be short", **GREEDY).prompt_tokens == (
            pair.prompt_tokens(messages)
        )


def test_chat_turns_reuse_the_cache(tiny):
    with load(tiny["template"], tiny["expert"], "margin", n_threads=1, n_ubatch=8) as pair:
        first = pair.chat([{"role": "user", "content": "hi there"}], threshold=1.0, **GREEDY)
        before = pair.base_session.account.n_evaluated
        turns = [
            {"role": "user", "content": "hi there"},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "go on"},
        ]
        second = pair.chat(turns, threshold=1.0, temperature=0.0, max_tokens=1)
        evaluated = pair.base_session.account.n_evaluated - before
        assert evaluated < len(second.prompt_tokens) - len(first.prompt_tokens) + 8


def test_leaving_a_stream_early_leaves_the_pair_usable(tiny_pair):
    whole = tiny_pair.generate("hello", **GREEDY).text
    stream = tiny_pair.stream("something else", **GREEDY)
    next(stream)
    stream.close()
    for _ in tiny_pair.stream("and more", **GREEDY):
        break
    gc.collect()
    assert tiny_pair.generate("hello", **GREEDY).text == whole


def test_looking_at_an_answer_early_changes_nothing(tiny_pair):
    whole = tiny_pair.generate("hello", stop=("never there",), **GREEDY)
    stream = tiny_pair.stream("hello", stop=("never there",), **GREEDY)
    first = next(stream)
    early = stream.answer()
    for _ in stream:
        stream.answer()
    assert early.steps == [first]
    assert early.stats.n_generated == 1
    assert stream.answer().text == whole.text
    assert stream.answer().stats.n_generated == GREEDY["max_tokens"]


def test_a_stop_string_before_a_broken_character_is_found():
    answer = stream_of(b"ab STOP\xf0", ("STOP",))
    assert "".join(s.text for s in answer) == "ab "


def test_broken_models_are_named(tiny, tmp_path):
    raw = bytearray(Path(tiny["base"]).read_bytes())
    raw[-4000:] = np.full(1000, np.nan, np.float32).tobytes()
    (tmp_path / "nan.gguf").write_bytes(raw)
    for base, expert, threshold, words in (
        (tmp_path / "nan.gguf", tiny["expert"], 0.5, "the base or the switch is broken"),
        (tiny["base"], tmp_path / "nan.gguf", 0.0, "the expert is broken"),
    ):
        with (
            load(base, expert, "margin", n_threads=1) as pair,
            pytest.raises(ModelError, match=words),
        ):
            pair.generate("hello", threshold=threshold)


@pytest.mark.parametrize("template", ["{% broken", "{{ raise_exception('only\\nusers') }}"])
def test_templates_that_fail_are_refused(tiny, tmp_path, template):
    path = tmp_path / "template.gguf"
    write_model(path, SHAPES["tiny"], chat_template=template)
    with (
        load(path, tiny["expert"], "margin", n_threads=1) as pair,
        pytest.raises(PromptError, match="chat template refuses"),
    ):
        pair.generate("hello")


def test_threads_take_turns(tiny_pair):
    alone = [tiny_pair.generate(p, **GREEDY).text for p in ("hello", "other")]
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda p=p: found.update({p: tiny_pair.generate(p, **GREEDY).text}))
        for p in ("hello", "other")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found["hello"], found["other"]] == alone


@pytest.mark.parametrize("schedule", ["fast", "sequential"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1.0])
def test_a_switch_without_a_calibration_is_held_to_a_rate(tiny, rate, schedule):
    options = {"temperature": 0.0, "max_tokens": 200, "schedule": schedule, "defer_rate": rate}
    with load(tiny["endless"], tiny["endless"], "margin", n_threads=1, n_ctx=256) as pair:
        answer = pair.generate("hello", **options)
        assert answer.stats.defer_rate == pytest.approx(rate, abs=0.02)
        again = pair.generate("hello", **options)
        assert [s.token for s in again.steps] == [s.token for s in answer.steps]


def test_a_calibrated_switch_turns_a_rate_into_its_threshold(tiny, switch):
    with load(tiny["base"], tiny["expert"], switch, n_threads=1) as pair:
        assert pair.generate("hello", defer_rate=0.25, **GREEDY).threshold == pytest.approx(0.75)


def test_pairs_that_do_not_fit_are_refused_before_the_first_token(tiny, tmp_path, switch):
    with pytest.raises(MismatchError, match="400 tokens in the base, 600 in the expert"):
        load(tiny["base"], tiny["foreign"])
    with pytest.raises(ModelError, match="recurrent"):
        load(tiny["base"], tiny["recurrent"])
    narrow = tmp_path / "narrow.gguf"
    Switch(("hidden",), np.zeros((1, 48), np.float32), np.zeros(1, np.float32), 48).save(narrow)
    with pytest.raises(MismatchError, match="hidden state of 48 numbers, the base has 64"):
        load(tiny["base"], tiny["expert"], narrow)
    several = tmp_path / "several.gguf"
    Switch(("margin",), np.zeros((2, 1), np.float32), np.zeros(2, np.float32), 64).save(several)
    with pytest.raises(MismatchError, match="chooses among 2 experts"):
        load(tiny["base"], tiny["expert"], several)
    with pytest.raises(MismatchError, match=r"no token <\|defer\|>"):
        load(tiny["base"], tiny["expert"], "defer-row")
    with pytest.raises(ModelError, match="-m without -me"):
        load(tiny["base"])
    for absurd in ({"n_ctx": "9"}, {"n_threads": 513}, {"n_gpu_layers": 1.5}, {"max_memory": -1}):
        with pytest.raises(ColmError, match=r"\w+ is .*; expected a whole number from"):
            load(**absurd)
    with pytest.raises(ColmError, match=r"10\.0\.0\.1:50052: --offline allows only servers"):
        load(rpc="10.0.0.1:50052", offline=True)


def test_a_closed_pair_is_freed_and_raises_errors(tiny):
    pair = load(tiny["base"], tiny["expert"], n_threads=1)
    pair.generate("hello", **GREEDY)
    pair.close()
    assert not pair.base_session.created
    with pytest.raises(ModelError, match="closed"):
        pair.generate("hello", **GREEDY)
    pair.close()
    untouched = load(tiny["base"], tiny["expert"], n_threads=1)
    untouched.close()
    with pytest.raises(ModelError, match="closed"):
        untouched.generate("hello", **GREEDY)


def test_the_public_names_resolve():
    assert colm_edge.Pair is Pair
    assert set(colm_edge.__all__) <= set(dir(colm_edge))
    for name in colm_edge.__all__:
        assert getattr(colm_edge, name) is not None
