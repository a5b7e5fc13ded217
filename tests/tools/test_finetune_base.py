"""Joint training: the loss, exact resumption, and results that llama.cpp runs unchanged."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import finetune_base
import gguf
import numpy as np
import pytest
from checkpoints import N_SCORED_VOCAB as N_VOCAB
from checkpoints import convert, write_scores
from click.testing import CliRunner

from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.switch.file import Switch
from colm_edge.switch.rules import DEFER_TOKEN

torch = pytest.importorskip("torch", reason="needs the extra finetune")
transformers = pytest.importorskip("transformers", reason="needs the extra finetune")
pytest.importorskip("peft", reason="needs the extra finetune")
tuning = import_module("lib.tuning")

# PEFT still calls what transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = [int(t) for t in np.random.default_rng(3).integers(1, N_VOCAB, 30)]


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    return write_scores(tmp_path_factory.mktemp("scores") / "train.npz")


def tune(base, scores, out, *options, code=0):
    """Run the command line; return its JSON, or the one line of its error."""
    arguments = ["--scores", scores, "--out", out, "--lr", "1e-3", "--batch", "4", *options]
    result = CliRunner().invoke(finetune_base.main, [str(a) for a in (base, *arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    if code:
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def llama_logits(path, lora=None, tokens=TOKENS) -> np.ndarray:
    model = Model(path, lora=lora)
    session = Session(model, ContextOptions(n_ctx=64, n_threads=1))
    session.sync(tokens)
    logits = session.logits.copy()
    session.close()
    model.close()
    return logits


def hf_logits(folder, tokens=TOKENS) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].numpy()


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "checkpoint" / "model.safetensors")


class KilledError(Exception):
    pass


@pytest.mark.parametrize("lora", [0, 2])
def test_a_killed_run_goes_on_to_the_same_weights(tiny, scores, tmp_path, monkeypatch, lora):
    options = ("--save-every", "2", "--lora", lora, "--start-steps", "5")
    torch.manual_seed(1)  # two processes would begin with different states
    whole = tune(tiny["base"], scores, tmp_path / "whole", *options)
    assert whole["steps"] == 6
    save = tuning.Run.save

    def die(run):
        save(run)
        if run.done == 4:
            raise KilledError

    monkeypatch.setattr(tuning.Run, "save", die)
    torch.manual_seed(2)
    with pytest.raises(KilledError):
        tune(tiny["base"], scores, tmp_path / "killed", *options)
    monkeypatch.undo()
    torch.manual_seed(3)
    assert not (tmp_path / "killed" / "checkpoint").exists()
    message = tune(tiny["base"], scores, tmp_path / "killed", *options, "--epochs", 3, code=1)
    assert "another epochs" in message
    state = tmp_path / "killed" / "state.pt"
    good = state.read_bytes()
    state.write_bytes(b"x")
    assert "is not the state of a run" in tune(
        tiny["base"], scores, tmp_path / "killed", *options, code=1
    )
    state.write_bytes(good)
    # Memory that ran out is why a run is resumed with fewer documents at once.
    few = tune(tiny["base"], scores, tmp_path / "few", *options, "--micro-batch", 3)
    assert few["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    shutil.copytree(tmp_path / "killed", tmp_path / "smaller")
    fewer = tune(tiny["base"], scores, tmp_path / "smaller", *options, "--micro-batch", 3)
    assert fewer["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert tune(tiny["base"], scores, tmp_path / "killed", *options)["loss"] == whole["loss"]
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "killed" / "state.pt").exists()
    assert "exists already" in tune(tiny["base"], scores, tmp_path / "whole", code=1)


def test_joint_training_lowers_the_joint_loss_and_llama_cpp_runs_the_result(tiny, scores, tmp_path):
    before = tune(tiny["base"], scores, tmp_path / "none", "--valid", scores, "--lr", "1e-12")
    after = tune(tiny["base"], scores, tmp_path / "out", "--valid", scores, "--epochs", 8)
    assert after["nll_joint"] < before["nll_joint"] - 0.1
    assert after["nll_joint"] < min(after["nll_base"], after["nll_expert"])
    ours, theirs = llama_logits(tmp_path / "out/base.gguf"), hf_logits(tmp_path / "out/checkpoint")
    assert theirs.shape == (N_VOCAB + 1,)
    assert np.allclose(ours, theirs[:N_VOCAB], atol=2e-2)
    assert np.abs(ours - llama_logits(tiny["base"])).max() > 0.1
    # The row in the authors' layout is the switch that runs.
    convert(tmp_path / "out/checkpoint", "--outfile", tmp_path / "row.gguf")
    row, switch = Switch.load(tmp_path / "row.gguf"), Switch.load(tmp_path / "out/switch.gguf")
    assert np.array_equal(row.weight, switch.weight)
    assert len(switch.thresholds) == len(switch.defer_rates) > 0
    assert 0 < switch.threshold < 1
    file = Model(tmp_path / "out/base.gguf")
    assert switch.info["base_fingerprint"] == file.fingerprint
    session = Session(file, ContextOptions(n_ctx=64, n_threads=1), hidden=True)
    session.sync(TOKENS)
    assert np.isclose(float(session.hidden @ row.weight[0]), theirs[N_VOCAB], rtol=5e-3)
    session.close()
    file.close()


def test_an_adapter_runs_on_the_base_as_it_was(tiny, scores, tmp_path):
    tune(tiny["base"], scores, tmp_path, "--lora", 4, "--epochs", 4, "--lr", "1e-2")
    adapted = llama_logits(tiny["base"], tmp_path / "adapter.gguf")
    merged = llama_logits(tmp_path / "base.gguf")
    spread = float(merged.std())
    assert np.abs(adapted - merged).max() < 1e-3 * spread
    assert np.abs(adapted - llama_logits(tiny["base"])).max() > 0.05 * spread
    assert np.allclose(merged, hf_logits(tmp_path / "checkpoint")[:N_VOCAB], atol=2e-2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    # Nothing but the adapted layers moved.
    base, ours = (gguf.GGUFReader(p) for p in (tiny["base"], tmp_path / "base.gguf"))
    for old, new in zip(base.tensors, ours.tensors, strict=True):
        assert np.array_equal(old.data, new.data) == (
            not old.name.startswith("blk") or "norm" in old.name
        )


def test_supervised_training_leaves_no_row(tiny, scores, tmp_path):
    report = tune(tiny["base"], scores, tmp_path, "--objective", "sft", "--valid", scores)
    assert set(report) == {"steps", "loss", "seconds", "nll_base"}
    assert weights(tmp_path)["lm_head.weight"].shape[0] == N_VOCAB
    assert not (tmp_path / "switch.gguf").exists()
    assert np.allclose(
        llama_logits(tmp_path / "base.gguf"), hf_logits(tmp_path / "checkpoint"), atol=2e-2
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face base with a tokenizer of N_VOCAB tokens, tied and padded to 416 rows."""
    from tokenizers import Tokenizer, models

    path = tmp_path_factory.mktemp("hf")
    config = transformers.LlamaConfig(
        vocab_size=416,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(N_VOCAB)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@pytest.mark.parametrize("options", [(), ("--lora", 2), ("--dtype", "bfloat16")])
def test_a_folder_gets_the_row_behind_its_tokenizer(folder, scores, tmp_path, options):
    tune(folder, scores, tmp_path, *options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert tokenizer.convert_tokens_to_ids(DEFER_TOKEN) == N_VOCAB == len(tokenizer) - 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert model.get_output_embeddings().weight.shape == (N_VOCAB + 1, 32)
    convert(tmp_path / "checkpoint", "--outfile", tmp_path / "row.gguf")
    row, switch = Switch.load(tmp_path / "row.gguf"), Switch.load(tmp_path / "switch.gguf")
    exact = "--dtype" not in options  # a bfloat16 run writes a bfloat16 checkpoint
    assert np.allclose(row.weight, switch.weight, rtol=0 if exact else 1e-2, atol=0)
    assert not (tmp_path / "base.gguf").exists()


def test_bfloat16_and_recomputed_activations_go_the_same_way(tiny, scores, tmp_path):
    plain = tune(tiny["base"], scores, tmp_path / "a", "--valid", scores)
    coarse = tune(tiny["base"], scores, tmp_path / "b", "--valid", scores, "--dtype", "bfloat16")
    again = tune(tiny["base"], scores, tmp_path / "c", "--valid", scores, "--checkpointing")
    assert abs(plain["nll_joint"] - coarse["nll_joint"]) < 0.1
    assert plain["nll_joint"] == pytest.approx(again["nll_joint"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": np.array([3])}, "do not fit"),
        ({"tokens": np.full(1000, N_VOCAB, np.int32)}, "do not fit"),
        ({"starts": np.zeros(11, int)}, "do not fit"),
        ({"logprob": np.zeros(3)}, "do not fit"),
        ({"part": np.array([3, 14, 24])}, "has documents 4 to 14 of 24"),
        ({"part": np.array([3, 14])}, "do not fit"),
    ],
)
def test_broken_scores_are_one_clear_line(tiny, tmp_path, changes, message):
    path = write_scores(tmp_path / "bad.npz", **changes)
    assert message in tune(tiny["base"], path, tmp_path / "out", code=1)


def test_what_cannot_be_tuned_is_one_clear_line(tiny, folder, scores, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "text.npz").write_text("no scores")
    assert "not a file of `colm-edge score`" in tune(
        tiny["base"], tmp_path / "text.npz", out, code=1
    )
    assert "No such file" in tune(tiny["base"], tmp_path / "none.npz", out, code=1)
    with np.load(scores) as file:
        other = {"tokens": file["tokens"] + 100}
    path = write_scores(tmp_path / "other.npz", **other)
    assert "the base knows 400" in tune(tiny["base"], path, out, code=1)
    assert "no such file" in tune(tmp_path / "none", scores, out, code=1)
    assert "--device nowhere" in tune(tiny["base"], scores, out, "--device", "nowhere", code=1)
    assert "not a GGUF" in tune(scores, scores, out, code=1)
    assert "a recurrent model" in tune(tiny["recurrent"], scores, out, code=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "transformers cannot read it" in tune(empty, scores, out, code=1)
    tune(folder, scores, tmp_path / "first", "--epochs", 1)
    again = tune(tmp_path / "first" / "checkpoint", scores, out, code=1)
    assert f"has {DEFER_TOKEN} already" in again
