"""The switch's arithmetic on logits and hidden state: the C extension (native/switch.c), or its
slow twin in numpy, in this module.

`implementation` names the one in use: avx512, avx2, neon or portable in C, or numpy. The
environment variable COLM_EDGE_NATIVE forces one; by default it is the best that the CPU can run.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from colm_edge.arrays import Doubles, Floats, Tokens
from colm_edge.errors import ColmError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    # Before Python 3.12, type checkers do not know that an array is a buffer.
    Buffer = ReadableBuffer | Floats | Doubles | Tokens
    Read = Callable[
        [
            Buffer,
            Buffer | None,
            Buffer | None,
            Buffer | None,
            Buffer | None,
            Buffer,
            SupportsIndex,
            SupportsIndex,
        ],
        tuple[int, float],
    ]
    ReadRows = Callable[[Buffer, Buffer | None, Buffer, Buffer, SupportsIndex], None]

FEATURES: tuple[str, ...] = ("entropy", "logp1", "margin", "p1", "p2", "p3", "p4", "p5")
"""The logit features in order: the entropy in nats, log p1, p1 - p2, the five largest p."""

N_TOP = 5
VARIABLE = "COLM_EDGE_NATIVE"


def read_numpy(
    logits: Buffer,
    hidden: Buffer | None,
    w_hidden: Buffer | None,
    w_logit: Buffer | None,
    bias: Buffer | None,
    out: Buffer,
    n_choose: SupportsIndex,
    defer_row: SupportsIndex,
    /,
) -> tuple[int, float]:
    """Return the argmax and the logsumexp of the logits; write the features and d to `out`.

    Every buffer is C-contiguous, aligned float32; its shape does not matter, only its length.
    logits: (n_vocab,); -inf is probability 0
    hidden: (n_embd,), and w_hidden: (n_experts, n_embd); both None if the head does not read hidden
    w_logit: (n_experts, 8), in the order of FEATURES, and bias: (n_experts,); with bias None
        there is no head and n_experts is 0
    out: (8 + n_experts,), writable: FEATURES, then d for each expert,
        d = w_hidden·hidden + w_logit·features + bias; unspecified after an error
    n_choose: the argmax is over ids below it, and the lowest id wins a tie; the features are over
        all of n_vocab
    defer_row: -1, or the id of the row that is the switch itself: it is left out of all else, out
        is (9,) and ends in its logit as d (-inf: never defer), and there must be no other head

    Raises TypeError for anything but a float32 buffer, BufferError for a read-only `out`, and
    ValueError for wrong lengths and for values without a result: NaN or +inf in the logits, only
    -inf below n_choose, NaN or inf in hidden or d.
    """
    choose, row = operator.index(n_choose), operator.index(defer_row)
    x = _borrow("logits", logits)
    parts = {"hidden": hidden, "w_hidden": w_hidden, "w_logit": w_logit, "bias": bias}
    head = {name: _borrow(name, part) for name, part in parts.items() if part is not None}
    result = _borrow("out", out, writable=True)

    n_experts = _check(x, head, result, choose, row)
    reading = x.astype(np.float64)
    if row >= 0:
        _check_logits(x[row : row + 1], row)
        reading[row] = -math.inf  # probability 0 leaves the row out
    _check_logits(reading)
    argmax = int(reading[:choose].argmax())
    if reading[argmax] == -math.inf:
        raise ValueError(
            "logits: nothing to choose: expected a finite value among the ids below n_choose = "
            f"{choose} (defer_row = {row} left out), got none"
        )
    features, logsumexp = _features(reading)
    result[: len(FEATURES)] = features
    if row >= 0:
        result[-1] = x[row]
    elif n_experts:
        with np.errstate(invalid="ignore", over="ignore"):  # _check_d raises the error
            d = head["w_logit"].reshape(n_experts, -1) @ features + head["bias"]
            if "hidden" in head:
                h = head["hidden"].astype(np.float64)
                d += head["w_hidden"].reshape(n_experts, -1) @ h
            result[len(FEATURES) :] = d
        _check_d(result[len(FEATURES) :], head.get("hidden"))
    return argmax, logsumexp


def read_rows_numpy(
    logits: Buffer,
    features: Buffer | None,
    argmax: Buffer,
    logsumexp: Buffer,
    n_choose: SupportsIndex,
    /,
) -> None:
    """Read many rows of logits as `read` reads one, without a head; fill the other buffers.

    Every buffer is C-contiguous and aligned; its shape does not matter, only its length.
    logits: (n, n_vocab) float32; -inf is probability 0
    features: (n, 8) float32, FEATURES of each row, or None if they are not needed
    argmax: (n,) int32, over ids below n_choose; the lowest id wins a tie
    logsumexp: (n,) float64, over all of n_vocab

    Raises TypeError for another type of number, BufferError for a read-only buffer, and ValueError
    for wrong lengths and for the first row without a result: NaN or +inf in it, or only -inf below
    n_choose. After such an error, that row and the later ones are unspecified.
    """
    choose = operator.index(n_choose)
    x = _borrow("logits", logits)
    table = None if features is None else _borrow("features", features, writable=True)
    best = _borrow("argmax", argmax, writable=True, kind=np.int32)
    totals = _borrow("logsumexp", logsumexp, writable=True, kind=np.float64)

    n = len(best)
    if n < 1:
        raise ValueError("argmax: expected at least 1 row, got 0")
    if len(x) < n or len(x) % n:
        raise ValueError(f"logits: expected n_rows x n_vocab = {n} x n_vocab values, got {len(x)}")
    if len(totals) != n:
        raise ValueError(f"logsumexp: expected n_rows = {n} values, got {len(totals)}")
    if table is not None and len(table) != n * len(FEATURES):
        raise ValueError(f"features: expected n_rows x 8 = {n} x 8 values, got {len(table)}")
    n_vocab = len(x) // n
    if not 1 <= choose <= n_vocab:
        raise ValueError(f"n_choose: expected 1 to n_vocab = {n_vocab}, got {choose}")
    for row, values in enumerate(x.reshape(n, n_vocab)):
        _check_logits(values, where=f" of row {row}")
        best[row] = values[:choose].argmax()
        if values[best[row]] == -math.inf:
            raise ValueError(
                "logits: nothing to choose: expected a finite value among the ids below "
                f"n_choose = {choose}, got none in row {row}"
            )
        found, total = _features(values.astype(np.float64))
        totals[row] = total
        if table is not None:
            table[row * len(FEATURES) : (row + 1) * len(FEATURES)] = found


def _features(logits: Doubles) -> tuple[Doubles, float]:
    """Return FEATURES (8,) and the logsumexp of logits (n_vocab,), whose maximum is finite."""
    n_top = min(N_TOP, len(logits))
    top = np.full(N_TOP, -math.inf)
    top[:n_top] = -np.sort(-np.partition(logits, len(logits) - n_top)[-n_top:])
    z = top[0] - logits  # >= 0, inf for probability 0
    e = np.exp(-z)
    total = e.sum()
    z[np.isinf(z)] = 0.0  # the term 0 * inf is 0
    log_total = np.log(total)
    features = np.empty(len(FEATURES))
    features[0] = log_total + (e * z).sum() / total
    features[1] = -log_total
    features[3:] = np.exp(top - top[0]) / total
    features[2] = features[3] - features[4]
    return features, float(top[0] + log_total)


def _borrow(name: str, buffer: Buffer, writable: bool = False, kind: type = np.float32) -> Any:
    kind_name, code = np.dtype(kind).name, np.dtype(kind).char
    try:
        view = memoryview(buffer)  # type: ignore[arg-type,unused-ignore]
    except TypeError:
        got = type(buffer).__name__
        raise TypeError(f"{name}: expected a buffer of {kind_name}, got {got}") from None
    native = (code, f"@{code}", f"={code}", ("<" if np.little_endian else ">") + code)
    if view.format not in native:
        raise TypeError(
            f"{name}: expected {kind_name} (format '{code}'), got format '{view.format}'"
        )
    if not view.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous buffer, got a strided one")
    values = np.asarray(view).reshape(-1)
    if not values.flags.aligned:
        size = np.dtype(kind).itemsize
        raise ValueError(f"{name}: expected {size}-byte alignment, got an unaligned buffer")
    if writable and view.readonly:
        raise BufferError(f"{name}: expected a writable buffer, got a read-only one")
    return values


def _check(x: Floats, head: dict[str, Floats], out: Floats, n_choose: int, defer_row: int) -> int:
    """Return n_experts. Raises ValueError for a wrong length."""
    n_vocab, n_experts = len(x), 0
    if n_vocab < 1:
        raise ValueError("logits: expected at least 1 value, got 0")
    if not 1 <= n_choose <= n_vocab:
        raise ValueError(f"n_choose: expected 1 to n_vocab = {n_vocab}, got {n_choose}")
    if not -1 <= defer_row < n_vocab:
        raise ValueError(
            f"defer_row: expected -1 or an id below n_vocab = {n_vocab}, got {defer_row}"
        )
    if defer_row >= 0 or "bias" not in head:
        why = "defer_row" if defer_row >= 0 else "no bias"
        for name in head:
            raise ValueError(f"{name}: expected None together with {why}, got a buffer")
        n_experts = int(defer_row >= 0)
    else:
        n_experts = len(head["bias"])
        _check_head(head, n_experts)
    if len(out) != len(FEATURES) + n_experts:
        raise ValueError(f"out: expected 8 + n_experts = 8 + {n_experts} values, got {len(out)}")
    return n_experts


def _check_head(head: dict[str, Floats], n_experts: int) -> None:
    if n_experts < 1:
        raise ValueError("bias: expected one value per expert, got 0")
    if "w_logit" not in head:
        raise ValueError("w_logit: expected a buffer together with bias, got None")
    n = len(head["w_logit"])
    if n != n_experts * len(FEATURES):
        raise ValueError(f"w_logit: expected n_experts x 8 = {n_experts} x 8 values, got {n}")
    for name, other in (("hidden", "w_hidden"), ("w_hidden", "hidden")):
        if name not in head and other in head:
            raise ValueError(f"{name}: expected a buffer together with {other}, got None")
    if "hidden" in head:
        n_embd, n = len(head["hidden"]), len(head["w_hidden"])
        if n_embd < 1:
            raise ValueError("hidden: expected at least 1 value, got 0")
        if n != n_experts * n_embd:
            raise ValueError(
                f"w_hidden: expected n_experts x n_embd = {n_experts} x {n_embd} values, got {n}"
            )


def _check_logits(logits: npt.NDArray[np.floating], first_id: int = 0, where: str = "") -> None:
    bad = np.flatnonzero(~(logits < math.inf))  # NaN compares false
    if len(bad):
        raise ValueError(
            f"logits: expected finite values or -inf, got {logits[bad[0]]} at id "
            f"{first_id + bad[0]}{where}"
        )


def _check_d(d: Floats, hidden: Floats | None) -> None:
    if np.isfinite(d).all():
        return
    if hidden is not None and not np.isfinite(hidden).all():
        at = int(np.flatnonzero(~np.isfinite(hidden))[0])
        raise ValueError(f"hidden: expected finite values, got {hidden[at]} at index {at}")
    expert = int(np.flatnonzero(~np.isfinite(d))[0])
    raise ValueError(f"d: expected a finite value, got {d[expert]} for expert {expert}")


def _in_use() -> tuple[Read, ReadRows, str]:
    if os.environ.get(VARIABLE) == "numpy":
        return read_numpy, read_rows_numpy, "numpy"
    try:
        native = import_module("_colm_edge_native")
    except ModuleNotFoundError as e:
        raise ColmError(
            "the C extension _colm_edge_native is not built; `pip install .` builds it, and "
            f"{VARIABLE}=numpy runs the slow implementation instead"
        ) from e
    except ImportError as e:  # the variable names a variant that this CPU cannot run
        raise ColmError(str(e)) from e
    return native.read, native.read_rows, native.implementation


read, read_rows, implementation = _in_use()


def read_alone(
    logits: Buffer, out: Buffer, n_choose: SupportsIndex, defer_row: SupportsIndex = -1
) -> tuple[int, float]:
    """Read logits as `read` does, without a head; out: (8,), or (9,) with a defer row."""
    return read(logits, None, None, None, None, out, n_choose, defer_row)
