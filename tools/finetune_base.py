"""Fine-tune a base together with its switch, as the Co-LLM paper does.

The loss is the marginal likelihood of base and expert. The expert does not change; its scores of
the data come from `colm-edge score`. BASE is a Hugging Face folder or a GGUF file.

    colm-edge score -m base.gguf -me expert.gguf --data train.jsonl --outfile train.npz
    python tools/finetune_base.py base.gguf --scores train.npz --out tuned
    colm-edge run -m tuned/base.gguf -me expert.gguf -sw tuned/switch.gguf

The folder --out gets `checkpoint`, a Hugging Face folder in the layout of the authors' releases,
whose last row is <|defer|>; `switch.gguf`; `base.gguf` if BASE is a GGUF file; and then with --lora
`adapter.gguf`, which runs on the original base: `colm-edge run -m base.gguf --lora adapter.gguf`.
With --objective sft there is no switch, and no such row.
A run that was killed resumes from its last save when the same command is given again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from colm_edge.cli import OneLineErrors
from colm_edge.errors import ColmError, ModelError
from colm_edge.files import check_writable

LR = 2e-5  # the paper's, for 7 billion parameters
LR_LORA = 2e-4
RESULTS = ("base.gguf", "switch.gguf", "adapter.gguf")  # files in --out, beside a checkpoint
POSITIVE = click.IntRange(1)
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base", type=click.Path(path_type=Path))
@click.option(
    "--scores",
    required=True,
    metavar="FILE.npz",
    type=FILE,
    help="The training data, as `colm-edge score` wrote it.",
)
@click.option(
    "--valid",
    metavar="FILE.npz",
    type=FILE,
    help="Other data, scored the same way, for the figures, the threshold and the calibration.",
)
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the results go.",
)
@click.option(
    "--objective",
    type=click.Choice(["joint", "sft"]),
    default="joint",
    show_default=True,
    help="Base and switch under the marginal likelihood, or the base alone (supervised).",
)
@click.option(
    "--lora",
    metavar="RANK",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Train a LoRA adapter of this rank; 0 trains all weights.",
)
@click.option("--epochs", type=POSITIVE, default=2, show_default=True)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    help=f"Learning rate; small bases need more.  [default: {LR:g}, the paper's; LoRA {LR_LORA:g}]",
)
@click.option("--batch", type=POSITIVE, default=128, show_default=True, help="Documents per step.")
@click.option(
    "--micro-batch",
    type=POSITIVE,
    default=8,
    show_default=True,
    help="Documents evaluated at once; fewer take less memory and change nothing else.",
)
@click.option(
    "--start-steps",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    help="Steps of L-BFGS that first fit the row alone under weak supervision.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the matrix products (autocast) and of a base under LoRA; trained weights are "
    "float32.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …")
@click.option("--checkpointing", is_flag=True, help="Compute activations twice to save memory.")
@click.option(
    "--save-every",
    metavar="STEPS",
    type=POSITIVE,
    default=100,
    show_default=True,
    help="Save what is needed to resume the run.",
)
@click.option("-s", "--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    base: Path,
    scores: Path,
    valid: Path | None,
    out: Path,
    device: str,
    save_every: int,
    lr: float | None,
    **settings: Any,
) -> None:
    """Fine-tune BASE and its switch under the marginal likelihood.

    BASE is a Hugging Face folder or a GGUF file. The last line printed is JSON.
    """
    if not base.exists():
        raise ModelError(f"{base}: no such file; expected a Hugging Face folder or a GGUF file")
    if (out / "checkpoint").exists():
        raise ColmError(f"{out}/checkpoint: exists already; give another --out, or remove it")
    for name in RESULTS if out.is_dir() else ():
        check_writable(out / name, base, scores, valid)
    if lr is None:
        lr = LR_LORA if settings["lora"] else LR
    click.echo(json.dumps(finetune(base, scores, valid, out, device, save_every, lr, **settings)))


def finetune(
    base: Path,
    scores: Path,
    valid: Path | None,
    out: Path,
    device: str,
    save_every: int,
    lr: float,
    **settings: Any,
) -> dict[str, Any]:
    """Run the training to its end and return what it did, with losses on `valid` if given."""
    try:
        from lib import tuning
    except ImportError as e:
        raise ColmError(f"{e}; fine-tuning needs: pip install 'colm-edge[finetune]'") from e

    chosen = tuning.Settings(lr=lr, **settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ColmError(
            f"{out}: cannot make the folder: {e.strerror or e}; give another --out"
        ) from e
    tuning.check_device(device)
    model, source = tuning.open_base(base, chosen)
    n_vocab = model.get_input_embeddings().weight.shape[0]
    data = tuning.ScoredData(scores, n_vocab)
    held_back = None if valid is None else tuning.ScoredData(valid, n_vocab)
    tuned = tuning.Tuned(model, chosen, device)
    run = tuning.Run(tuned, data, base, out)
    resumed_at, begun = run.done, time.perf_counter()
    for done in run.steps():
        left = (run.n_steps - done) * (time.perf_counter() - begun) / (done - resumed_at)
        click.echo(f"step {done}/{run.n_steps}  loss {run.loss:.4f}  {left:.0f} s left", err=True)
        if done % save_every == 0 or done == run.n_steps:
            run.save()
    report = tuning.write_results(tuned, source, base, out, held_back)
    run.state.unlink(missing_ok=True)
    seconds = round(time.perf_counter() - begun, 1)
    return {"steps": run.n_steps, "loss": run.loss, "seconds": seconds, **report}


if __name__ == "__main__":
    main(prog_name=Path(sys.argv[0]).name)
