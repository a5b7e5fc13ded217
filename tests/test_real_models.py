"""What tiny models cannot show: the templates, alphabets and attention windows of real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from progress import no_bar
from real_models import files

from colm_edge.errors import ContextError
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.quantize import quantize
from colm_edge.llama.session import Session
from colm_edge.pair import Pair, load
from colm_edge.switch.file import Switch
from colm_edge.train.fit import FitOptions, fit_switch
from colm_edge.train.prompts import answer_prompts

HELD_OUT = Path(__file__).parent / "data" / "demo_heldout.jsonl"
GREEDY = {"temperature": 0.0, "defer_rate": None, "threshold": 0.6, "max_tokens": 40}


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Iterator[Pair]:
    """SmolLM2 and itself in another quantisation: a pair of one vocabulary."""
    (expert,) = files("smollm2")
    base = tmp_path_factory.mktemp("smol") / "q4_0.gguf"
    quantize(expert, base, "Q4_0", allow_requantize=True, n_threads=1)
    with load(str(base), expert, "margin", n_threads=1, n_ctx=512) as pair:
        yield pair


def test_the_end_of_a_turn_is_the_one_that_the_template_writes(smol):
    """llama.cpp takes <|endoftext|> for it, by its name."""
    assert smol.base.token_text(smol.base.end_token) == "<|im_end|>"


def test_the_template_and_its_end_token_are_the_models_own(smol):
    text = smol.prompt_text([{"role": "user", "content": "What is the capital of France?"}])
    assert text.endswith("<|im_start|>assistant\n")
    expert_alone = GREEDY | {"threshold": 0.0}
    answer = smol.generate("What is 2+2?", **expert_alone)
    assert "4" in answer.text
    assert answer.finish_reason == "stop"
    assert "<|im_" not in answer.text


def test_both_write_and_the_schedules_agree(smol):
    prompts = ["Name three colours.", "Why is the sky blue?", "Count from one to ten."]
    for prompt in prompts:
        plain = smol.generate(prompt, schedule="sequential", n_probs=2, **GREEDY)
        fast = smol.generate(prompt, schedule="fast", **GREEDY)
        assert {step.source for step in plain.steps} == {"base", "expert"}
        for a, b in zip(plain.steps, fast.steps, strict=True):
            if (a.token, a.source) != (b.token, b.source):
                # Other batches, other last bits: only a near-tie may fall to the other side.
                (_, first), (_, second) = a.top
                assert first - second < 0.05 or abs(a.p_defer - 0.6) < 0.02
                break


@pytest.mark.parametrize("schedule", ["fast", "sequential"])
def test_a_lossless_review_writes_the_experts_own_text(smol, schedule):
    reviewed = GREEDY | {"threshold": None, "defer_rate": 0.1, "review": 0.0}
    n_undone = 0
    for prompt in ("Name three colours.", "Why is the sky blue?", "Count from one to ten."):
        alone = smol.generate(prompt, n_probs=2, **GREEDY | {"threshold": 0.0})
        answer = smol.generate(prompt, schedule=schedule, **reviewed)
        n_undone += answer.stats.n_undone
        for ours, theirs in zip(answer.steps, alone.steps, strict=False):
            if ours.token != theirs.token:
                # Tokens in a batch are evaluated by another kernel than a single one.
                (_, first), (_, second) = theirs.top
                assert first - second < 0.2
                break
        else:
            assert len(answer.steps) == len(alone.steps)
    assert n_undone > 0


@pytest.mark.parametrize("text", ["naïve café, 猫 and 🦤", "Größe: 5 µm — “yes”", "नमस्ते दुनिया"])
def test_alphabets_survive_the_vocabulary_and_the_stream(smol, text):
    tokens = smol.base.tokenize(text, bos=False)
    assert b"".join(map(smol.base.piece, tokens)).decode() == text
    stream = smol.stream(f"Repeat: {text}", **GREEDY)
    pieces = [step.text for step in stream]
    assert "".join(pieces) == stream.answer().text
    whole = b"".join(smol.base.piece(step.token) for step in stream.steps)
    assert "".join(pieces) == whole.decode("utf-8", "replace")


def test_a_stop_text_ends_the_answer_before_itself(smol):
    whole = smol.generate("Why is the sky blue?", **GREEDY).text
    for stop in (whole[10:14], whole[25:26]):
        answer = smol.generate("Why is the sky blue?", stop=(stop,), **GREEDY)
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"


def test_a_chat_longer_than_the_context_is_refused_and_the_next_is_answered(smol):
    with pytest.raises(ContextError, match="the context holds 512"):
        smol.generate("word " * 600, **GREEDY)
    assert smol.generate("Say hello.", **GREEDY).text


def test_a_switch_is_fitted_to_the_answers_of_a_real_expert(smol, tmp_path):
    """Its answers end as it ends them, and deferring where it would object removes its regret."""
    asked = ["Name a colour.", "What is 2+2?", "Say hello.", "Is water wet?", "Name a fruit."]
    rows = [(i, {"prompt": prompt}) for i, prompt in enumerate(asked, 1)]
    answered = answer_prompts(smol, rows, no_bar, max_tokens=30, n_slots=5, work=tmp_path)
    ends = {document.tokens[-1] for document in answered.documents}
    assert ends & smol.base.end_tokens
    how = {"progress": no_bar, "recorded": answered.recorded}
    fit = fit_switch(smol, answered.documents, FitOptions(), **how)
    assert fit.report["objective"] == "regret"
    assert fit.report["regret_removed_0.2"] > 0.2  # chance
    path = tmp_path / "switch.gguf"
    fit.switch.save(path)
    assert Switch.load(path).is_for("expert", smol.expert.fingerprint)


def test_rollbacks_behind_a_sliding_window_are_exact():
    """Gemma 3 attends to the last 512 tokens in most layers; what a rollback brings back into the
    window must still be in the cache."""
    (path,) = files("gemma-3")
    model = Model(path)
    options = ContextOptions(n_ctx=1024, n_threads=1)
    session, fresh = Session(model, options), Session(model, options)
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["prompt"] for line in lines]
    text, other = model.tokenize(" ".join(questions[:90])), model.tokenize(questions[-1])[1:]
    assert len(text) > 800
    tokens = text[:800]
    session.sync(tokens)
    try:
        for keep in (795, 700, 300):
            tokens = [*tokens[:keep], *other]
            session.sync(tokens)
            fresh.forget()
            fresh.sync(tokens)
            assert np.abs(session.logits - fresh.logits).max() < 1  # a lost window is 2 to 12 off
            assert session.logits.argmax() == fresh.logits.argmax()
    finally:
        session.close()
        fresh.close()
        model.close()
