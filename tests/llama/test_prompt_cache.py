"""The prompt cache: both sessions of a pair are saved in a file and restored."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from colm_edge.cli import main
from colm_edge.errors import ColmError, WriteError
from colm_edge.pair import load

GREEDY = {"temperature": 0.0, "max_tokens": 30, "schedule": "sequential", "threshold": 0.3}


def pair_of(tiny, **options):
    settings = {"n_threads": 1, "n_ctx": 256, "n_ubatch": 8, "overlap": False} | options
    return load(tiny["base"], tiny["expert"], "margin", **settings)


def test_an_answer_from_a_cache_evaluates_what_is_new(tiny, tmp_path):
    prompt, path = "hello world, how are you?", tmp_path / "prompts"
    with pair_of(tiny) as pair:
        first = pair.generate(prompt, **GREEDY)
        pair.save_prompts(path)
        whole = pair.generate(prompt + " well", **GREEDY)
    n_prompt = first.stats.n_prompt
    assert first.stats.n_deferred > 0
    with pair_of(tiny) as pair:
        pair.load_prompts(path)
        assert not pair.expert_session.created  # not before its first call
        again = pair.generate(prompt, **GREEDY)
        assert [s.token for s in again.steps] == [s.token for s in first.steps]
        # Whole batches of the prompt are kept; its rest and the written tokens are evaluated again.
        kept = (n_prompt - 1) // 8 * 8
        assert again.stats.base_tokens == first.stats.base_tokens - kept
        assert again.stats.expert_tokens < first.stats.expert_tokens
        pair.load_prompts(path)
        longer = pair.generate(prompt + " well", **GREEDY)
        assert longer.text == whole.text
        assert longer.stats.base_tokens < n_prompt + longer.stats.n_generated
        pair.load_prompts(path)
        pair.save_prompts(tmp_path / "again")  # a state that was not used is saved unchanged
    one, two = (np.load(tmp_path / name) for name in ("prompts", "again"))
    assert all(np.array_equal(one[name], two[name]) for name in one.files)


def test_with_the_base_alone_the_expert_is_not_saved(tiny, tmp_path):
    with pair_of(tiny) as pair:
        pair.generate("hello", temperature=0, max_tokens=5, threshold=1.0)
        pair.save_prompts(tmp_path / "prompts")
        assert not pair.expert_session.created
    with pair_of(tiny) as pair:
        pair.load_prompts(tmp_path / "prompts")
        assert pair.generate("hello", **GREEDY).stats.n_deferred > 0


def test_a_cache_of_other_models_or_settings_is_refused(tiny, tmp_path):
    path = tmp_path / "prompts"
    with pair_of(tiny) as pair:
        pair.generate("hello there " * 10, **GREEDY)
        pair.save_prompts(path)
    kept = path.read_bytes()
    with (
        load(tiny["expert"], tiny["base"], "margin", n_threads=1) as other,
        pytest.raises(ColmError, match="a prompt cache of another base model"),
    ):
        other.load_prompts(path)
    with (
        pair_of(tiny, cache_type_k="f32") as other,
        pytest.raises(ColmError, match="another KV cache type"),
    ):
        other.load_prompts(path)
    with (
        pair_of(tiny, n_ctx=32) as small,
        pytest.raises(ColmError, match="the context holds 32; raise -c"),
    ):
        small.load_prompts(path)
    with pair_of(tiny) as pair:
        for content in (b"", b"hello", kept[: len(kept) // 2]):
            path.write_bytes(content)
            with pytest.raises(ColmError, match="not a prompt cache"):
                pair.load_prompts(path)
        with pytest.raises(ColmError, match="No such file"):
            pair.load_prompts(tmp_path / "absent")
        with pytest.raises(WriteError, match="prompts: cannot write: No such file"):
            pair.save_prompts(tmp_path / "absent" / "prompts")
        assert pair.generate("hello", **GREEDY).text  # still usable


def test_a_broken_state_leaves_an_empty_timeline(tiny, tmp_path):
    with pair_of(tiny) as pair:
        whole = pair.generate("hello", **GREEDY)
        saved = pair.base_session.snapshot()
        rows, state = saved.stretches, saved.state
        for changed in (
            {"state": state[: len(state) // 2]},
            {"state": state[:0]},
            {"stretches": rows[:, :2]},
            {"stretches": rows + 1000},
            {"stretches": -1 - rows},
        ):
            with pytest.raises(ColmError, match="the saved state is not of this model"):
                pair.base_session.restore(saved._replace(**changed))
            assert pair.generate("hello", **GREEDY).text == whole.text


def test_a_broken_state_of_the_expert_leaves_both_empty(tiny, tmp_path):
    path = tmp_path / "prompts"
    with pair_of(tiny) as pair:
        whole = pair.generate("hello", **GREEDY)
        pair.save_prompts(path)
        parts = dict(np.load(path))
        parts["expert_state"] = parts["expert_state"][:9]
        with path.open("wb") as file:
            np.savez(file, **parts)
        with pytest.raises(ColmError, match="the saved state is not of this model"):
            pair.load_prompts(path)
        again = pair.generate("hello", **GREEDY)
        assert again.text == whole.text
        assert again.stats.base_tokens == whole.stats.base_tokens


def rewritten(path, **changes) -> None:
    parts = dict(np.load(path)) | changes
    with path.open("wb") as file:
        np.savez(file, **parts)


def test_a_cache_that_lies_about_itself_is_refused(tiny, tmp_path):
    path = tmp_path / "prompts"
    with pair_of(tiny) as pair:
        whole = pair.generate("hello there", **GREEDY)
        pair.save_prompts(path)
        kept, parts = path.read_bytes(), dict(np.load(path))
        tokens, state = parts["base_tokens"], parts["base_state"]
        for about in ("[]", "3", "[" * 100_000, "{", "\0"):
            rewritten(path, about=np.array(about))
            with pytest.raises(ColmError, match="not a prompt cache"):
                pair.load_prompts(path)
        path.write_bytes(kept)
        for other in (tokens[:, None], tokens.astype(np.int64), tokens.astype(float)):
            rewritten(path, base_tokens=other)
            with pytest.raises(ColmError, match="not a prompt cache"):
                pair.load_prompts(path)
        for other in (tokens - 1000, tokens + 1_000_000, tokens[:-1], np.tile(tokens, 2)):
            path.write_bytes(kept)
            rewritten(path, base_tokens=other)
            with pytest.raises(ColmError, match="the saved state is not of this model"):
                pair.load_prompts(path)
        path.write_bytes(kept)
        moved = state.copy()
        moved[8:12] = np.frombuffer(np.int32(len(tokens) + 90).tobytes(), np.uint8)
        rewritten(path, base_state=moved)  # the position of its first token
        with pytest.raises(ColmError, match="the saved state is not of this model"):
            pair.load_prompts(path)
        assert pair.generate("hello there", **GREEDY).text == whole.text


def test_the_command_saves_and_loads_a_cache(tiny, tmp_path):
    path = tmp_path / "prompts"
    args = ["run", "--json", "-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "-c", "128"]
    args += ["--temp", "0", "-n", "10", "-ub", "4", "--prompt-cache", str(path), "hello there"]
    answers = [json.loads(CliRunner().invoke(main, args).stdout) for _ in range(2)]
    assert path.exists()
    assert not list(tmp_path.glob(".prompts*"))
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[1]["stats"]["base_tokens"] < answers[0]["stats"]["base_tokens"]
    path.write_text("mine")
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    assert "not a prompt cache" in result.output
    assert path.read_text() == "mine"


def test_chat_turns_evaluate_only_what_is_new(tiny):
    """Without a file, both models still reuse a prefix: a second turn, a shared system prompt."""
    settings = {"n_threads": 1, "n_ctx": 256, "n_ubatch": 8}
    with load(tiny["template"], tiny["expert"], "margin", **settings) as pair:
        system = {"role": "system", "content": "be brief and kind, whatever is asked of you"}
        messages = [system, {"role": "user", "content": "hello"}]
        first = pair.chat(messages, **GREEDY | {"threshold": 1e-9})
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "and then?"},
        ]
        second = pair.chat(messages, **GREEDY | {"threshold": 1e-9})
        n_shared = len(pair.prompt_tokens([system])) - 16  # whole batches are kept
        stats = second.stats
        assert stats.base_tokens < stats.n_prompt + stats.n_generated - n_shared
        assert stats.expert_tokens < stats.n_prompt + stats.n_generated - n_shared
        other = pair.chat([system, {"role": "user", "content": "goodbye"}], **GREEDY)
        assert other.stats.base_tokens < other.stats.n_prompt + other.stats.n_generated - n_shared
