"""Models, contexts, sessions and the scorer over real llama.cpp contexts, with tiny models."""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import PlainModel
from split_models import split_into

from colm_edge.errors import ColmError, MismatchError, ModelError, PromptError
from colm_edge.llama import backend
from colm_edge.llama import context as context_module
from colm_edge.llama import scorer as scorer_module
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.scorer import Scorer
from colm_edge.llama.session import Session
from colm_edge.llama.vocabulary import shared_vocab

CONTEXT = ContextOptions(n_ctx=128, n_threads=1, n_batch=16)


def test_sync_evaluates_only_what_differs(model):
    session = Session(model, CONTEXT, hidden=True)
    assert not session.created
    assert session.sync([5, 6, 7, 8]) == 4
    assert session.sync([5, 6, 7, 8]) == 0
    assert session.sync([5, 6, 7, 8, 9]) == 1
    assert session.sync([5, 6, 10]) == 1
    assert session.sync([5, 6]) == 1  # the last token again, for its logits
    assert session.sync([1]) == 1
    assert session.account.n_evaluated == 8
    session.close()


def test_the_state_depends_on_the_prefix_and_not_on_the_history(model, tiny):
    """Random walks through prefixes: the states equal those of evaluating the whole prefix."""
    plain = PlainModel(tiny["base"], 128)
    draw = random.Random(0)
    session = Session(model, CONTEXT, hidden=True)
    tokens = [3]
    for _ in range(40):
        tokens = tokens[: draw.randint(1, len(tokens))]
        tokens += [draw.randrange(1, 400) for _ in range(draw.randint(0, 40))]
        tokens = tokens[:128]
        session.sync(tokens)
        logits, hidden = plain.state(tokens)
        assert np.allclose(session.logits, logits, atol=2e-2)
        assert np.allclose(session.hidden, hidden, atol=2e-2)
    session.close()
    plain.close()


@pytest.mark.parametrize("hidden", [True, False])
def test_scoring_packs_documents_and_returns_the_states_of_each(model, tiny, monkeypatch, hidden):
    """Documents of many lengths, some longer than a batch, with outputs in several batches."""
    monkeypatch.setattr(scorer_module, "SCORE_BATCH", 64)
    monkeypatch.setattr(scorer_module, "SCORE_BYTES", 4 * 400 * 50)
    draw = random.Random(1)
    plain = PlainModel(tiny["base"], 256)
    session = Session(model, CONTEXT)
    session.sync([7, 8, 9])
    groups = [[(30, 10), (2, 1), (150, 20), (5, 4)], [(40, 1)], [(3, 2)] * 64]
    with Scorer(session, 192, hidden=hidden) as scorer:
        for group in groups:
            documents = [[draw.randrange(1, 400) for _ in range(n)] for n, _ in group]
            expected = [
                plain.state(tokens[:i])
                for tokens, (n, start) in zip(documents, group, strict=True)
                for i in range(start, n)
            ]
            lengths, starts = np.array(group).T
            before = session.account.n_evaluated
            at = 0
            for logits, states in scorer.score(
                np.concatenate(documents).astype(np.int32), lengths, starts
            ):
                assert 0 < len(logits) <= 50
                assert states.shape == ((len(logits), 64) if hidden else (0,))
                for row in range(len(logits)):
                    assert np.allclose(logits[row], expected[at][0], atol=2e-2)
                    assert not hidden or np.allclose(states[row], expected[at][1], atol=2e-2)
                    at += 1
            assert at == len(expected)
            assert session.account.n_evaluated - before == sum(n - 1 for n, _ in group)
    assert session.sync([7, 8, 9]) == 0  # its own timeline did not change
    session.close()
    plain.close()


def test_an_interrupted_decode_is_forgotten(model, monkeypatch):
    session = Session(model, CONTEXT)
    session.sync([1, 2, 3])
    fresh = Session(model, CONTEXT)
    fresh.sync([1, 2, 3, 4])
    decode = Session._decode

    def interrupted(self, *args):
        decode(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.sync([1, 2, 3, 9, 9])
    monkeypatch.undo()
    assert session.snapshot().tokens.tolist() == [1, 2, 3]  # what stood before it is kept
    assert session.sync([1, 2, 3, 4]) == 1
    assert np.allclose(session.logits, fresh.logits, atol=2e-2)
    session.close()
    fresh.close()


def test_prompts_that_do_not_fit(model):
    session = Session(model, CONTEXT)
    with pytest.raises(PromptError, match="200 tokens do not fit the context of 128"):
        session.sync([1] * 200)
    with pytest.raises(PromptError, match="no tokens"):
        session.sync([])
    assert not session.created


def test_the_context_can_be_filled_completely(model):
    session = Session(model, CONTEXT)
    assert session.sync([1] * 128) == 128
    session.close()


def test_text_survives_the_vocabulary(model):
    for text in ("hello world", "naïve café, 猫 and 🦤\n\ttab", " leading"):
        assert b"".join(map(model.piece, model.tokenize(text))).decode() == text


def test_special_names_become_tokens_only_if_requested(model):
    assert model.tokenize("<|end|>") == [0]
    assert 0 not in model.tokenize("<|end|>", special=False)
    assert model.end_tokens == {0}
    assert model.piece(0) == b""


def test_weights_are_read_at_the_first_evaluation(model):
    assert (model.n_vocab, model.n_embd, model.n_ctx_train) == (400, 64, 512)
    assert not model.loaded
    session = Session(model, CONTEXT)
    session.sync([1])
    assert model.loaded
    session.close()


def test_bad_files_are_refused_by_name(tiny, tmp_path):
    whole = Path(tiny["expert"]).read_bytes()
    cases = {
        "absent.gguf": (None, "No such file"),
        "text.gguf": (b"hello, this is a text", "not a GGUF file"),
        "empty.gguf": (b"", "not a GGUF file"),
        "half.gguf": (whole[: len(whole) // 2], "ends beyond the file"),
        "stump.gguf": (whole[:200], "truncated"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match=words) as caught:
            Model(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ModelError, match="recurrent"):
        Model(tiny["recurrent"])


def test_shared_vocabularies(tiny):
    base, expert, defer, foreign = (Model(tiny[n]) for n in ("base", "expert", "defer", "foreign"))
    assert shared_vocab(base, expert) == 400
    assert shared_vocab(defer, expert) == 400
    with pytest.raises(MismatchError, match="400 tokens in the base, 600 in the expert"):
        shared_vocab(base, foreign)
    for model in (base, expert, defer, foreign):
        model.close()


def test_a_different_token_is_named(tiny, tmp_path):
    raw = bytearray(Path(tiny["expert"]).read_bytes())
    at = raw.index(b"\x02\x00\x00\x00\x00\x00\x00\x00aa\x02")  # the token "aa" after its length
    raw[at + 8 : at + 10] = b"~~"
    path = tmp_path / "other.gguf"
    path.write_bytes(raw)
    base, other = Model(tiny["base"]), Model(path)
    with pytest.raises(MismatchError, match="token 257 is 'aa' in the base, '~~' in the expert"):
        shared_vocab(base, other)
    base.close()
    other.close()


@pytest.mark.parametrize(
    ("note", "breaks"),
    [
        (b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0", True),
        (b"GCC: (GNU) 11.4.0", True),
        (b"GCC: (Ubuntu 12.4.0-2ubuntu1) 12.4.0", False),
        (b"GCC: (GNU) 13.2.0", True),
        (b"GCC: (GNU) 13.3.0", False),
        (b"GCC: (GNU) 14.1.0", False),
        (b"GCC: (GNU) 12.2.0\0Debian clang version 16.0.6", False),
        (b"no compiler told", False),
    ],
)
def test_a_compiler_whose_amx_code_crashes_is_recognised(note, breaks):
    assert backend._gcc_breaks_amx(b"\x7fELF\0" + note + b"\0") is breaks


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ColmError, match="a value cache in q8_0 needs flash attention"):
        ContextOptions(flash_attn="off", cache_type_v="q8_0")
    assert ContextOptions(flash_attn="off", cache_type_k="q8_0").cache_type_v == "f16"


@pytest.mark.parametrize("supported", [True, False])
def test_layers_for_a_gpu_that_is_not_there_are_told_once(monkeypatch, caplog, supported):
    monkeypatch.setattr(backend, "supports_gpu", lambda: supported)
    backend._warn_of_no_gpu.cache_clear()
    assert [backend.gpu_layers(n) for n in (0, 99, -1)] == [0, 99, -1]
    assert caplog.text.count("finds no GPU") == (0 if supported else 1)


@pytest.fixture
def has_amx(request, monkeypatch) -> Iterator[bool]:
    info = b"CPU : AVX512 = 1 | " + (b"AMX_INT8 = 1 | " if request.param else b"")
    monkeypatch.setattr(backend.llama, "llama_print_system_info", lambda: info)
    for check in (backend.amx_is_broken, backend.amx_is_shared):
        check.cache_clear()
    yield request.param
    for check in (backend.amx_is_broken, backend.amx_is_shared):
        check.cache_clear()


@pytest.mark.parametrize("has_amx", [True, False], indirect=True)
def test_without_amx_the_compiler_does_not_matter(monkeypatch, has_amx, caplog):
    monkeypatch.setattr(backend, "_gcc_breaks_amx", lambda library: True)
    assert backend.amx_is_broken() is has_amx
    assert backend.model_params().use_extra_bufts is not has_amx
    assert ("CC=clang" in caplog.text) is has_amx


@pytest.mark.parametrize("has_torch", [True, False])
@pytest.mark.parametrize("has_amx", [True, False], indirect=True)
def test_amx_is_left_to_pytorch(monkeypatch, has_amx, has_torch, caplog):
    monkeypatch.setattr(backend, "_gcc_breaks_amx", lambda library: False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if has_torch:
        monkeypatch.setitem(sys.modules, "torch", object())
    assert backend.model_params().use_extra_bufts is not (has_amx and has_torch)
    assert ("PyTorch is in this process" in caplog.text) is (has_amx and has_torch)


def test_flash_attention_is_off_where_it_slows(model, monkeypatch):
    auto = Session(model, CONTEXT)
    assert auto.flash_attn == "auto"  # a very small model
    monkeypatch.setattr(context_module, "SMALL_MODEL_BYTES", 0)
    assert auto.flash_attn == "off"
    fresh = Session(model, ContextOptions(n_ctx=128, n_threads=1, flash_attn="on"))
    assert fresh.flash_attn == "on"
    quantised = Session(model, ContextOptions(n_ctx=128, n_threads=1, cache_type_v="q8_0"))
    assert quantised.flash_attn == "auto"
    tokens = list(range(1, 100))
    for session in (auto, fresh, quantised):
        session.sync(tokens)
    assert np.allclose(auto.logits, fresh.logits, atol=2e-2)
    for session in (auto, fresh, quantised):
        session.close()


def test_a_split_model_is_all_of_its_files(tiny, tmp_path, model):
    """llama.cpp finds the other parts itself; their bytes and sizes count here."""
    first, *others = split_into(tmp_path, tiny["base"])
    split = Model(first)
    assert split.files == (first, *others)
    before = split.fingerprint
    session = Session(split, CONTEXT)
    session.sync([5, 6, 7])
    whole = Session(model, CONTEXT)
    whole.sync([5, 6, 7])
    assert np.array_equal(session.logits, whole.logits)
    session.close()
    split.close()
    content = bytearray(others[-1].read_bytes())
    content[-1] ^= 1
    others[-1].write_bytes(content)
    assert Model(first).fingerprint != before
    others[-1].unlink()
    with pytest.raises(ModelError, match=f"{others[-1].name}: No such file"):
        Model(first)


def test_what_the_last_batch_told_is_not_evaluated_again(model):
    """A shorter prefix whose state it told costs nothing, until another batch is evaluated."""
    session, tokens = Session(model, CONTEXT, hidden=True), array("i", range(5, 13))
    session.sync(tokens, (5, 6, 7))
    for n in (6, 7, 8):
        assert session.knows(tokens[:n])
        assert session.sync(tokens[:n]) == 0
    told = session.state(5)[0].copy()
    other = tokens[:6] + array("i", [9])
    assert not session.knows(tokens[:5])
    assert not session.knows(other)
    assert session.sync(other) == 1
    assert not session.knows(tokens[:6])
    session.sync(tokens[:6])
    assert np.allclose(session.state(5)[0], told, atol=1e-3)


def test_of_gaps_between_outputs_nothing_is_told(model):
    session, tokens = Session(model, CONTEXT), array("i", range(5, 13))
    session.sync(tokens, (4, 6, 7))
    assert session.knows(tokens)
    assert not session.knows(tokens[:7])
