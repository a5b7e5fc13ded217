"""How a model is evaluated, and the batches that llama.cpp is handed."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any, Literal

import llama_cpp as llama
import numpy as np
import numpy.typing as npt

from colm_edge.errors import ColmError

Floats = npt.NDArray[np.float32]
# Below this size a model is evaluated by one thread.
SMALL_MODEL_BYTES = 32 << 20
# Tokens of a batch that are evaluated at a time without flash attention; more than any draft has.
SMALL_BATCH = 128
CACHE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2,
}  # fmt: skip
PLAIN_TYPES = ("f32", "f16", "bf16")
_FLASH = {"auto": -1, "off": 0, "on": 1}
_BATCH_FIELDS = dict(llama.llama_batch._fields_)


@dataclass(frozen=True)
class ContextOptions:
    """How a model is evaluated; names and values are llama.cpp's. Zero: let colm-edge choose."""

    n_ctx: int = 0
    n_threads: int = 0
    n_batch: int = 512
    n_ubatch: int = 0
    flash_attn: Literal["auto", "on", "off"] = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"

    def __post_init__(self) -> None:
        for name, known in (
            ("flash_attn", _FLASH), ("cache_type_k", CACHE_TYPES), ("cache_type_v", CACHE_TYPES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise ColmError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if self.flash_attn == "off" and self.cache_type_v not in PLAIN_TYPES:
            raise ColmError(
                f"a cache of values in {self.cache_type_v} needs flash attention; leave that on, "
                f"or take {', '.join(PLAIN_TYPES)}"
            )


class Batch:
    """A llama_batch whose fields are numpy arrays, (n,) each; `head` names its first so many."""

    def __init__(self, n: int) -> None:
        self.token, self.position, self.sequence = np.zeros((3, n), np.int32)
        self.output = np.zeros(n, np.int8)
        self._one = np.ones(n, np.int32)
        # llama.cpp wants a pointer to each token's sequences.
        first = self.sequence.ctypes.data
        self._pointer = first + np.arange(n, dtype=np.uintp) * self.sequence.itemsize
        self._batch = llama.llama_batch()
        for name, values in (
            ("token", self.token), ("pos", self.position), ("n_seq_id", self._one),
            ("seq_id", self._pointer), ("logits", self.output),
        ):  # fmt: skip
            setattr(self._batch, name, ctypes.cast(values.ctypes.data, _BATCH_FIELDS[name]))

    def head(self, n: int) -> Any:
        self._batch.n_tokens = n
        return self._batch


def _threads_for(n_bytes: int) -> int:
    """Return how many threads evaluate a model: every core, or one for a very small model.

    There a decode takes less than threads need to meet, and where another program wants the cores
    too, waiting for each other at every layer costs hundreds of times the work.
    """
    return 1 if n_bytes < SMALL_MODEL_BYTES else n_cores()


def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
