"""The loss of joint training, and what its steps and its start do to the weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from checkpoints import N_SCORED_VOCAB as N_VOCAB
from checkpoints import write_scores

from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.train.objectives import marginal_loss

torch = pytest.importorskip("torch", reason="needs the extra finetune")
pytest.importorskip("transformers", reason="needs the extra finetune")
tuning = import_module("lib.tuning")

SETTINGS = {
    "objective": "joint",
    "lora": 0,
    "epochs": 2,
    "lr": 1e-3,
    "batch": 4,
    "micro_batch": 2,
    "start_steps": 5,
    "dtype": "float32",
    "seed": 0,
    "checkpointing": False,
}


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    return write_scores(tmp_path_factory.mktemp("scores") / "train.npz")


def tuned(base, **changes):
    settings = tuning.Settings(**(SETTINGS | changes))
    torch.manual_seed(0)
    model, _ = tuning.open_base(Path(base), settings)
    return tuning.Tuned(model, settings, "cpu")


def test_the_loss_is_the_marginal_likelihood_of_the_scored_tokens(tiny, scores):
    model = tuned(tiny["base"])
    data = tuning.ScoredData(scores, N_VOCAB)
    file = Model(tiny["base"])
    session = Session(file, ContextOptions(n_ctx=64, n_threads=1), hidden=True)
    base, d, row = [], [], model.row.detach().numpy()
    for i, start in enumerate(data.starts):
        tokens = data.tokens[data.at[i] : data.at[i + 1]].tolist()
        for at in range(start, len(tokens)):
            session.sync(tokens[:at])
            logits = session.logits.astype(np.float64)
            base.append(logits[tokens[at]] - np.logaddexp.reduce(logits))
            d.append(float(session.hidden @ row))
    session.close()
    file.close()
    wanted, _ = marginal_loss(np.array(base), data.logprob, np.array(d))
    losses = np.zeros(len(base))
    with torch.no_grad():
        for batch in data.batches(np.arange(len(data)), 4):
            losses[batch.rows] = model.losses(batch).numpy()
    assert np.isclose(losses.mean(), wanted, atol=1e-3)
    ours, our_d = model.judge(data)
    assert np.allclose(ours, base, atol=2e-2)
    assert np.allclose(our_d, d, atol=2e-2)
    # Supervised training looks at the base alone.
    supervised = tuned(tiny["base"], objective="sft")
    losses = [
        x for b in data.batches(np.arange(len(data)), 3) for x in supervised.losses(b).tolist()
    ]
    assert np.isclose(np.mean(losses), -np.mean(base), atol=1e-3)


def test_cutting_a_step_into_micro_batches_changes_nothing(tiny, scores, tmp_path):
    made = []
    for size in (1, 3, 8):
        model = tuned(tiny["base"], batch=8, micro_batch=size, start_steps=0)
        data = tuning.ScoredData(scores, N_VOCAB)
        run = tuning.Run(model, data, Path(tiny["base"]), tmp_path)
        next(run.steps())
        made.append((run.loss, {n: p.detach().clone() for n, p in model.trained().items()}))
    for loss, parameters in made[1:]:
        assert np.isclose(loss, made[0][0], rtol=1e-5)
        # Adam's first step is the gradient's sign: compare where that is not a near-tie.
        moved = [torch.isclose(p, made[0][1][n], atol=1e-6) for n, p in parameters.items()]
        assert torch.cat([m.flatten() for m in moved]).float().mean() > 0.999


def test_weak_supervision_starts_the_row_where_only_the_expert_is_right(tiny, scores):
    model, data = tuned(tiny["base"], start_steps=200), tuning.ScoredData(scores, N_VOCAB)
    before = model.row.detach().clone()
    others = {n: p.detach().clone() for n, p in model.base.named_parameters()}
    model.start(data)
    _, d = model.judge(data)
    # A random base is right of next to no random token.
    assert d[data.right].mean() > d[~data.right].mean() + 1
    assert not torch.equal(model.row, before)
    assert all(torch.equal(p, others[n]) for n, p in model.base.named_parameters())
