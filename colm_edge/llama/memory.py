"""How much memory a context takes, and how much there is.

Linux grants any amount, and then ends the process that uses it.
"""

from __future__ import annotations

from pathlib import Path

from colm_edge.errors import ModelError
from colm_edge.llama.model import Model

MEMORY_FACTS = Path("/proc/meminfo")
F16_BITS = 16
CELLS = 256  # llama.cpp rounds a context up to a multiple of so many tokens


def cache_bytes(
    model: Model, n_ctx: int, key_bits: float = F16_BITS, value_bits: float = F16_BITS
) -> int:
    """Return the size of a KV cache of n_ctx tokens.

    Layers that look back at a window of tokens alone hold all of them too (`swa_full`): a cache
    that forgot some could not be rolled back. key_bits, value_bits: of a number.
    """
    of_queries = _by_layer(model, "attention.head_count") or [0]
    heads = _by_layer(model, "attention.head_count_kv") or of_queries  # of each layer, or of all
    n_heads = sum(heads) if len(heads) > 1 else heads[0] * model.number("block_count")
    width = model.n_embd // next(filter(None, of_queries), 1)  # layers may have no attention
    bits = key_bits * (model.number("attention.key_length") or width)
    bits += value_bits * (model.number("attention.value_length") or width)
    return int(-(-n_ctx // CELLS) * CELLS * n_heads * bits / 8)


def _by_layer(model: Model, key: str) -> list[int]:
    """Return the whole numbers that a model's header has of each layer, or the one of all."""
    found = model.metadata(f"{model.metadata('general.architecture')}.{key}") or ""
    numbers = [part.strip() for part in found.strip("[]").split(",")]
    known = all(number.isdecimal() and len(number) < 20 for number in numbers)
    return [int(number) for number in numbers] if known else []


def available_bytes() -> int | None:
    """Return how much memory programs can still have, None where the system does not tell."""
    try:
        facts = MEMORY_FACTS.read_text(encoding="ascii").splitlines()
        found = next(line for line in facts if line.startswith("MemAvailable:"))
        return int(found.split()[1]) << 10
    except (OSError, ValueError, StopIteration):
        return None


def check_room(model: Model, n_ctx: int, needed: int) -> None:
    """Raise ModelError where a context of n_ctx tokens takes more memory than there is.

    needed: bytes that it takes.
    """
    there = available_bytes()
    if there is not None and needed > there:
        raise ModelError(
            f"{model.path}: a context of {n_ctx:,} tokens takes {needed / 1e9:,.1f} GB, and "
            f"{there / 1e9:,.1f} GB of memory are free; try a smaller one (-c)"
        )
