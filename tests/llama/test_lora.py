"""--lora: a base with an adapter gives the same states as the base with the adapter merged in."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from lib.random_model import SHAPES, write_model

from colm_edge import load
from colm_edge.cli import main
from colm_edge.errors import ModelError
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.scorer import Scorer
from colm_edge.llama.session import Session

RANK, ALPHA = 4, 8.0
# Attention in float32; in float16 a difference of one bit grows to 1e-3.
CONTEXT = ContextOptions(
    n_ctx=128, n_threads=1, n_batch=16, flash_attn="off", cache_type_k="f32", cache_type_v="f32"
)
TOKENS = [int(t) for t in np.random.default_rng(5).integers(1, 400, 40)]


def matrices(path: str) -> dict[str, np.ndarray]:
    """Return every layer's matrices of a float32 GGUF, (rows, columns)."""
    tensors = gguf.GGUFReader(path).tensors
    return {
        t.name: np.array(t.data) for t in tensors if t.name.startswith("blk") and t.data.ndim == 2
    }


def write_adapter(path: Path, pairs, kind="adapter", architecture="llama") -> None:
    """Write an adapter. pairs: tensor name -> (A (rank, columns), B (rows, rank))."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_pairs(weights, scale=0.05):
    rng = np.random.default_rng(1)
    return {
        name: (
            rng.normal(0, scale, (RANK, w.shape[1])).astype(np.float32),
            rng.normal(0, scale, (w.shape[0], RANK)).astype(np.float32),
        )
        for name, w in weights.items()
    }


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory) -> dict[str, str]:
    """Adapters of the tiny base (random, zeros, and some that do not fit), and the merged base."""
    folder = tmp_path_factory.mktemp("lora")
    weights = matrices(tiny["base"])
    pairs = random_pairs(weights)
    write_adapter(folder / "random.gguf", pairs)
    zeros = {name: (a, np.zeros_like(b)) for name, (a, b) in pairs.items()}
    write_adapter(folder / "zeros.gguf", zeros)
    write_adapter(folder / "other.gguf", pairs, architecture="qwen2")
    narrow = {name: (a[:, :32].copy(), b) for name, (a, b) in pairs.items()}
    write_adapter(folder / "narrow.gguf", narrow)
    (folder / "text.gguf").write_text("not a GGUF")
    added = {name: b @ a * (ALPHA / RANK) for name, (a, b) in pairs.items()}
    # The same random weights, plus the adapter's product.
    write_model(folder / "merged.gguf", SHAPES["tiny"], seed=0, gain=20.0)
    merged = gguf.GGUFReader(folder / "merged.gguf", "r+")
    for tensor in merged.tensors:
        if tensor.name in added:
            assert np.array_equal(tensor.data, weights[tensor.name])
            tensor.data[:] += added[tensor.name]
    merged.data.flush()
    return {path.stem: str(path) for path in folder.iterdir()}


def states(path: str, lora: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and hidden states of TOKENS: the last from `sync`, then all from a scoring
    pass."""
    model = Model(path, lora=lora)
    session = Session(model, CONTEXT, hidden=True)
    session.sync(TOKENS)
    logits, hidden = [session.logits[None].copy()], [session.hidden[None].copy()]
    whole = np.array(TOKENS, np.int32), np.array([len(TOKENS)]), np.array([1])
    with Scorer(session, len(TOKENS), hidden=True) as scorer:
        for block, states in scorer.score(*whole):
            logits.append(block.copy())
            hidden.append(states.copy())
    session.close()
    model.close()
    return np.concatenate(logits), np.concatenate(hidden)


def test_an_adapter_acts_as_if_it_were_merged(tiny, lora):
    plain, adapted = states(tiny["base"]), states(tiny["base"], lora["random"])
    merged = states(lora["merged"])
    for kind in (0, 1):
        spread = float(merged[kind].std())
        assert np.abs(adapted[kind] - merged[kind]).max() < 1e-4 * max(1, spread)
        assert np.abs(adapted[kind] - plain[kind]).max() > 0.1 * spread


def test_an_adapter_of_zeros_changes_nothing(tiny, lora):
    for ours, plain in zip(states(tiny["base"], lora["zeros"]), states(tiny["base"]), strict=True):
        assert np.allclose(ours, plain, atol=1e-5)


def answers(*args: str):
    result = CliRunner().invoke(
        main, ["run", "--json", "--temp", "0", "-n", "24", "-t", "1", *args]
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    return [t["id"] for t in answer["tokens"]], np.array([t["p_defer"] for t in answer["tokens"]])


def test_run_answers_with_the_adapter(tiny, lora):
    others = ("-me", tiny["expert"], "-sw", "margin", "--threshold", "0.6", "hello there")
    ours = answers("-m", tiny["base"], "--lora", lora["random"], *others)
    merged = answers("-m", lora["merged"], *others)
    plain = answers("-m", tiny["base"], *others)
    assert ours[0] == merged[0] != plain[0]
    assert np.abs(ours[1] - merged[1]).max() < 1e-4


def test_the_adapter_is_only_for_the_base(tiny, lora):
    with load(tiny["base"], tiny["base"], "margin", lora=lora["random"], n_threads=1) as pair:
        assert pair.base.files == (Path(tiny["base"]), Path(lora["random"]))
        assert pair.expert_session.model.files == (Path(tiny["base"]),)
        for session in (pair.base_session, pair.expert_session):
            session.sync(TOKENS)
        assert np.abs(pair.base_session.logits - pair.expert_session.logits).max() > 1e-2


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("missing", "No such file"),
        ("text", "not a GGUF file"),
        ("base", "expect general.type to be 'adapter'"),
        ("other", "LoRA arch mismatch"),
        ("narrow", "incorrect shape"),
    ],
)
def test_what_is_not_an_adapter_of_the_base_is_refused(tiny, lora, tmp_path, adapter, message):
    path = {"base": tiny["expert"], "missing": str(tmp_path / "none.gguf")}.get(adapter)
    path = path or lora[adapter]
    with pytest.raises(ModelError, match=message) as caught:
        load(tiny["base"], tiny["expert"], "margin", lora=path, n_threads=1)
    assert path in str(caught.value)
    command = ["run", "-m", tiny["base"], "-me", tiny["expert"], "--lora", path, "hello"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_an_adapter_that_does_not_fit_leaves_the_model_usable(tiny, lora):
    model = Model(tiny["base"], lora=lora["narrow"])
    for _ in range(2):  # the vocabulary remains, and the adapter is refused each time
        with pytest.raises(ModelError, match="incorrect shape"):
            model.load()
    assert model.n_vocab == 400
    model.close()
