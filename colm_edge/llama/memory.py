"""How much memory a context takes, and how much there is.

Linux grants any amount, and then ends the process that uses it.
"""

from __future__ import annotations

from pathlib import Path

from colm_edge.errors import ModelError
from colm_edge.llama.model import Model

MEMORY_FACTS = Path("/proc/meminfo")
F16_BITS = 16


def cache_bytes(
    model: Model, n_ctx: int, key_bits: float = F16_BITS, value_bits: float = F16_BITS
) -> int:
    """Return the size of a KV cache of n_ctx tokens, 0 where the model's layers differ, or do not
    look back at all tokens.

    key_bits, value_bits: of a number.
    """
    kind = model.metadata("general.architecture")
    listed = model.metadata(f"{kind}.attention.head_count_kv") or ""
    if model.number("attention.sliding_window") or (listed and not listed.isdecimal()):
        return 0
    n_head = model.number("attention.head_count")
    n_head_kv = model.number("attention.head_count_kv") or n_head
    width = model.number("attention.key_length") or model.n_embd // max(1, n_head)
    numbers = model.number("block_count") * n_head_kv * width * n_ctx
    return int(numbers * (key_bits + value_bits) / 8)


def available_bytes() -> int | None:
    """Return how much memory programs can still have, None where the system does not tell."""
    try:
        facts = MEMORY_FACTS.read_text(encoding="ascii").splitlines()
        found = next(line for line in facts if line.startswith("MemAvailable:"))
        return int(found.split()[1]) << 10
    except (OSError, ValueError, StopIteration):
        return None


def check_room(model: Model, n_ctx: int, key_bits: float, value_bits: float) -> None:
    """Raise ModelError where a context of n_ctx tokens takes more memory than there is."""
    needed, there = cache_bytes(model, n_ctx, key_bits, value_bits), available_bytes()
    if there is not None and needed > there:
        raise ModelError(
            f"{model.path}: a context of {n_ctx:,} tokens takes {needed / 1e9:,.1f} GB, and "
            f"{there / 1e9:,.1f} GB of memory are free; try a smaller one (-c)"
        )
