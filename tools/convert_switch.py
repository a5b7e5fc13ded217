"""Turn the switch of a Co-LLM checkpoint into a switch file that colm-edge runs.

Co-LLM's training adds a token, <|defer|>, and its output row is the switch. CHECKPOINT is a
Hugging Face folder as the authors' training writes it, a gperp_init.bin, or a file (.bin, .pt, .npy
or .safetensors) that holds a bare row of shape (1, n_embd) or (n_embd,).

    python tools/convert_switch.py CHECKPOINT --outfile switch.gguf --strip-to base/

Only the row is read, so a checkpoint of any size converts in little memory. The base of such a
checkpoint is fine-tuned: --strip-to writes it as a Hugging Face folder without the <pad> and
<|defer|> rows that the training added, for llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from lib.co_llm import open_checkpoint, read_bare, read_row, write_base

from colm_edge import readout
from colm_edge.arrays import Floats
from colm_edge.cli import OneLineErrors
from colm_edge.errors import ColmError, ModelError, SwitchError
from colm_edge.files import check_writable, replacing
from colm_edge.switch.file import Switch
from colm_edge.switch.onnx import load_onnx

ONNX_TOLERANCE = 1e-5


def write_onnx(switch: Switch, path: Path) -> None:
    """Write a switch of the hidden state as ONNX: hidden (1, n_embd) -> p_defer (1, 1)."""
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError as e:
        raise ColmError("--onnx needs the onnx package: pip install 'colm-edge[onnx]'") from e

    def info(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["hidden", "weight", "bias"], ["d"], transB=1),
            helper.make_node("Sigmoid", ["d"], ["p_defer"]),
        ],
        "switch",
        [info("hidden", switch.n_embd)],
        [info("p_defer", 1)],
        [
            numpy_helper.from_array(np.ascontiguousarray(switch.weight), "weight"),
            numpy_helper.from_array(switch.bias, "bias"),
        ],
    )
    # Old enough for every onnxruntime that colm-edge runs with.
    model = helper.make_model(
        graph, producer_name="colm-edge", ir_version=8, opset_imports=[helper.make_opsetid("", 13)]
    )
    checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def in_onnxruntime(path: Path) -> Callable[[Floats], float]:
    """Return the head in an ONNX file as onnxruntime runs it: hidden (n_embd,) -> p_defer."""
    # onnxruntime calls its maker's host otherwise; nothing that it offers later stops that.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as e:
        raise ColmError(
            "--onnx needs the onnxruntime package: pip install 'colm-edge[onnx]'"
        ) from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # one row of work
    options.log_severity_level = 4  # errors come as exceptions
    session = onnxruntime.InferenceSession(path.read_bytes(), options, ["CPUExecutionProvider"])

    def run(hidden: Floats) -> float:
        (p,) = session.run(["p_defer"], {"hidden": hidden.reshape(1, -1)})
        return float(np.asarray(p).reshape(()))

    return run


def compare_onnx(path: Path, switch: Switch, n_states: int = 256, seed: int = 0) -> float:
    """Return the largest |Δp| between an ONNX head, in onnxruntime and as colm-edge reads it, and
    the switch.

    Half of the random states have the spread of a normalised state; the others are scaled so that
    p takes values from 0 to 1. Raises SwitchError above ONNX_TOLERANCE.
    """
    base = SimpleNamespace(n_embd=switch.n_embd, token_id=lambda _: None)
    ours, read, theirs = (
        switch.reader(base, 1), load_onnx(path).reader(base, 1), in_onnxruntime(path)
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n_states, switch.n_embd)).astype(np.float32)
    spread = 3 / max(float(np.linalg.norm(switch.weight)), 1e-6)
    hidden[n_states // 2 :] *= np.float32(spread)
    logits = np.zeros(8, np.float32)
    worst = 0.0
    for h in hidden:
        p = ours(logits, h)[0]
        worst = max(worst, abs(p - theirs(h)), abs(p - read(logits, h)[0]))
    if not worst <= ONNX_TOLERANCE:
        raise SwitchError(
            f"the ONNX head differs from the switch by {worst:.2g} in p_defer on random states, "
            f"expected at most {ONNX_TOLERANCE:g} (the switch read by {readout.implementation}); "
            "nothing was written; leave --onnx out or try another version of onnxruntime"
        )
    return worst


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside the target; put it in the target's place if all goes well."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target}: is there already; name a new folder")
    work = None
    try:
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        made = work / target.name
        made.mkdir()
        yield made
        if target.exists():
            target.rmdir()
        os.replace(made, target)
    except OSError as e:
        raise ModelError(f"{target}: cannot write: {e.strerror or e}") from e
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


@click.command(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--outfile",
    metavar="SWITCH.gguf",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the switch goes.",
)
@click.option(
    "--onnx",
    metavar="SWITCH.onnx",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the head as ONNX too, compared with the runtime in onnxruntime.",
)
@click.option(
    "--strip-to",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the base without the rows that the training added, for llama.cpp's converter.",
)
@click.option("--dry-run", is_flag=True, help="Print what was found and write nothing.")
def main(
    checkpoint: Path, outfile: Path | None, onnx: Path | None, strip_to: Path | None, dry_run: bool
) -> None:
    """Turn the switch of a Co-LLM checkpoint into a switch file.

    CHECKPOINT is a Hugging Face folder, a gperp_init.bin, or a file holding a bare row.
    """
    if outfile is None and not dry_run:
        raise click.UsageError("give --outfile SWITCH.gguf, or --dry-run to write nothing")
    if not checkpoint.exists():
        raise ModelError(
            f"{checkpoint}: no such file or folder; expected a Co-LLM folder, a gperp_init.bin or "
            "a file with the switch's row"
        )
    read = [checkpoint, *checkpoint.iterdir()] if checkpoint.is_dir() else [checkpoint]
    check_writable(outfile or os.devnull, *read)
    if onnx is not None:
        check_writable(onnx, *read, outfile)
    found = None
    if checkpoint.is_dir():
        found = open_checkpoint(checkpoint)
        source = read_row(found)
    else:
        source = read_bare(checkpoint)
    if strip_to is not None and found is None:
        raise click.UsageError(
            f"--strip-to needs a checkpoint folder, and {checkpoint} is a file: a bare row has no "
            "base"
        )
    switch = source.switch(str(outfile or checkpoint))
    found_lines = [f"{key:<10}  {text}" for key, text in source.facts]
    if dry_run or outfile is None:
        click.echo("\n".join(found_lines))
        return
    # No file takes its place before all of them are written.
    written = [f"{outfile}: written"]
    with ExitStack() as stack:
        switch.save(stack.enter_context(replacing(outfile)))
        if onnx is not None:
            temporary = stack.enter_context(replacing(onnx))
            write_onnx(switch, temporary)
            worst = compare_onnx(temporary, switch)
            written.append(f"{onnx}: written, p_defer within {worst:.1g} of the runtime's")
        if strip_to is not None and found is not None:
            write_base(found, stack.enter_context(_new_folder(strip_to)))
            written.append(f"{strip_to}: written, {found.n_kept} tokens")
    click.echo("\n".join([*found_lines, *written]), err=True)


if __name__ == "__main__":
    main(prog_name=Path(sys.argv[0]).name)
