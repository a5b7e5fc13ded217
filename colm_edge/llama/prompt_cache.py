"""Save both sessions of a pair in a file, so that no prompt is evaluated again after a restart."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np

from colm_edge.errors import ColmError
from colm_edge.files import replacing
from colm_edge.llama.session import Snapshot
from colm_edge.npy_files import read_arrays

if TYPE_CHECKING:
    from colm_edge.llama.session import Session

VERSION = 2
KINDS = {
    "about": str, "base_tokens": np.int32, "base_stretches": np.int32, "base_state": np.uint8,
    "expert_tokens": np.int32, "expert_stretches": np.int32, "expert_state": np.uint8,
}  # fmt: skip


def save_prompts(path: str | os.PathLike[str], base: Session, expert: Session) -> None:
    """Write both sessions' tokens and states, a new file for its owner alone.

    Raises WriteError when the file cannot be written.
    """
    parts = {"about": np.array(json.dumps(_about(base, expert)))}
    for name, session in (("base", base), ("expert", expert)):
        kept = session.snapshot()
        parts |= {f"{name}_{part}": values.ravel() for part, values in kept._asdict().items()}
    with replacing(path, private=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **parts)  # type: ignore[arg-type]


def load_prompts(path: str | os.PathLike[str], base: Session, expert: Session) -> None:
    """Restore what `save_prompts` wrote; the expert is still loaded at its first call only.

    Raises ColmError when the file is missing, broken, or of other models or settings.
    """
    try:
        parts = read_arrays(path, KINDS)
        about = json.loads(parts["about"])
        if not isinstance(about, dict):
            raise ValueError("expected an object")
        states = [
            Snapshot(
                parts[f"{name}_tokens"],
                parts[f"{name}_stretches"].reshape(-1, 3),
                parts[f"{name}_state"],
            )
            for name in ("base", "expert")
        ]
    except OSError as e:
        raise ColmError(f"{path}: cannot read the prompt cache: {e.strerror or e}") from e
    except (ValueError, KeyError, RecursionError) as e:
        raise ColmError(f"{path}: not a prompt cache, or a broken one; give another file") from e
    ours = _about(base, expert)
    differs = [key for key in ours if about.get(key) != ours[key]]
    if differs:
        raise ColmError(
            f"{path}: a prompt cache of another {differs[0].replace('_', ' ')}; give another file"
        )
    try:
        for session, state in zip((base, expert), states, strict=True):
            session.restore(state)
    except ColmError:  # both or neither
        base.forget()
        expert.forget()
        raise


def _about(base: Session, expert: Session) -> dict[str, object]:
    """Return what must be equal for two pairs to share a prompt cache."""
    import llama_cpp

    options = base.options
    return {
        "version": VERSION,
        "llama.cpp": llama_cpp.__version__,
        "base_model": base.model.fingerprint,
        "expert_model": expert.model.fingerprint,
        "KV_cache_type": [options.cache_type_k, options.cache_type_v],
        "flash_attention": [base.flash_attn, expert.flash_attn],
        "batch_size_(-ub)": [base.n_ubatch, expert.n_ubatch],
    }
