"""The C extension, in every variant this CPU runs, equals its slow twin; so do its errors.

564 lines in one file, since the sanitizers run it by itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_edge import readout

SPEC = importlib.util.find_spec("_colm_edge_native")


def load_native(variant: str | None) -> Any:
    """A fresh module of the extension, with COLM_EDGE_NATIVE as given; None: unset."""
    assert SPEC is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLM_EDGE_NATIVE", raising=False)
        if variant is not None:
            patch.setenv("COLM_EDGE_NATIVE", variant)
        spec = importlib.util.spec_from_file_location("_colm_edge_native", SPEC.origin)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


# Without the extension, importing readout has failed already, unless numpy is forced.
VARIANTS = load_native(None).implementations if SPEC else ()
MODULES = {variant: load_native(variant) for variant in VARIANTS}
NATIVES = {variant: module.read for variant, module in MODULES.items()}
READERS = {**NATIVES, "numpy": readout.read_numpy}
ROW_READERS = {
    **{variant: module.read_rows for variant, module in MODULES.items()},
    "numpy": readout.read_rows_numpy,
}

native = pytest.mark.parametrize("variant", VARIANTS)
every = pytest.mark.parametrize("name", READERS)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def call(read, logits, *, head=(None,) * 4, n_choose=None, defer_row=-1):
    """Run one reader; returns (argmax, logsumexp, out)."""
    bias = head[3]
    n_experts = 1 if defer_row >= 0 else 0 if bias is None else len(bias)
    out = np.full(8 + n_experts, 777, np.float32)
    n_choose = len(logits) if n_choose is None else n_choose
    return (*read(logits, *head, out, n_choose, defer_row), out)


def assert_same(read, logits, *, tolerance=2e-7, **options):
    argmax, logsumexp, out = call(read, logits, **options)
    expected = call(readout.read_numpy, logits, **options)
    assert argmax == expected[0]
    assert logsumexp == pytest.approx(expected[1], rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(out[:8], expected[2][:8], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(out[8:], expected[2][8:], rtol=1e-5, atol=2e-5)
    return argmax, logsumexp, out


def random_head(rng, n_experts, n_embd):
    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    if n_embd == 0:
        return None, None, normal(n_experts, 8), normal(n_experts)
    return normal(n_embd), normal(n_experts, n_embd), normal(n_experts, 8), normal(n_experts)


# ---- native equals the twin ----


@native
@pytest.mark.parametrize("scale", [0.01, 3.0, 1e4])
def test_every_small_size(variant, scale):
    rng = np.random.default_rng(1)
    for n_vocab in range(1, 71):
        logits = rng.normal(0, scale, n_vocab).astype(np.float32)
        assert_same(NATIVES[variant], logits, head=random_head(rng, 1, n_vocab))


@native
@pytest.mark.parametrize("n_vocab", [1000, 32000, 128256])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "constant", "far"])
def test_large_vocabularies(variant, n_vocab, order):
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, n_vocab).astype(np.float32)
    if order == "ascending":
        logits.sort()
    elif order == "descending":
        logits[::-1].sort()
    elif order == "constant":
        logits[:] = 3.3
    elif order == "far":  # the tail is much of the mass, and x - max rounds alike all along it
        logits[:] = 0.1
        logits[n_vocab // 2] = 12.3
    head, tolerance = random_head(rng, 3, 4096), 1e-6 if order == "far" else 2e-7
    argmax, _, out = assert_same(NATIVES[variant], logits, head=head, tolerance=tolerance)
    assert argmax == int(logits.argmax())
    if order == "constant":
        assert out[0] == pytest.approx(math.log(n_vocab), rel=1e-6)


@native
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_logits(variant, data):
    value = st.one_of(
        st.floats(-1e4, 1e4, width=32),
        st.sampled_from([-math.inf, 0.0, -0.0, 1.0, 3e38, -3e38, 1e-45]),
    )
    logits = floats(*data.draw(st.lists(value, min_size=1, max_size=200)))
    n_choose = data.draw(st.integers(1, len(logits)))
    defer_row = data.draw(st.one_of(st.just(-1), st.integers(0, len(logits) - 1)))
    choosable = np.delete(logits, defer_row) if defer_row >= 0 else logits
    choosable = choosable[: n_choose - (0 <= defer_row < n_choose)]
    if np.isfinite(choosable).any():
        assert_same(NATIVES[variant], logits, n_choose=n_choose, defer_row=defer_row)
    else:
        for read in (NATIVES[variant], readout.read_numpy):
            with pytest.raises(ValueError, match="nothing to choose"):
                call(read, logits, n_choose=n_choose, defer_row=defer_row)


@native
@pytest.mark.parametrize("n_experts", [1, 2, 7])
@pytest.mark.parametrize("n_embd", [0, 1, 15, 16, 17, 4096])
def test_heads(variant, n_experts, n_embd):
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, 500).astype(np.float32)
    hidden, w_hidden, w_logit, bias = head = random_head(rng, n_experts, n_embd)
    _, _, out = assert_same(NATIVES[variant], logits, head=head)
    d = bias + w_logit @ out[:8] + (0 if hidden is None else w_hidden @ hidden)
    np.testing.assert_allclose(out[8:], d, rtol=1e-4, atol=1e-4)


@native
def test_the_dot_product_does_not_overflow_on_the_way(variant):
    hidden, w_hidden = floats(3e38, 3e38, 1), floats(3e38, -3e38, 2)
    head = hidden, w_hidden, np.zeros(8, np.float32), floats(0.5)
    assert call(NATIVES[variant], floats(0, 1), head=head)[2][8] == 2.5


# ---- laws, for the twin too ----


@every
def test_features_of_a_known_distribution(name):
    p = np.array([0.5, 0.2, 0.1, 0.1, 0.06, 0.04])
    logits = np.log(p).astype(np.float32)
    argmax, logsumexp, out = call(READERS[name], logits)
    assert argmax == 0
    assert logsumexp == pytest.approx(0, abs=1e-6)
    expected = [-(p * np.log(p)).sum(), math.log(0.5), 0.3, *p[:5]]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@every
def test_fewer_than_five_logits(name):
    _, logsumexp, out = call(READERS[name], floats(2.5))
    assert logsumexp == 2.5
    assert out.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert call(READERS[name], floats(1, 1))[2][3:].tolist() == [0.5, 0.5, 0, 0, 0]


@every
def test_minus_infinity_is_probability_zero(name):
    out = call(READERS[name], floats(-math.inf, 1.0, -math.inf))[2]
    assert out.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


@every
def test_the_lowest_id_wins_a_tie(name):
    for n_vocab in (2, 63, 64, 65, 200, 1000):
        assert call(READERS[name], np.full(n_vocab, -7, np.float32))[0] == 0
        logits = np.zeros(n_vocab, np.float32)
        logits[[n_vocab // 3, n_vocab - 1]] = 1
        assert call(READERS[name], logits)[0] == n_vocab // 3


@every
def test_n_choose_limits_the_argmax_only(name):
    logits = np.arange(100, dtype=np.float32) % 90
    whole = call(READERS[name], logits)
    for n_choose in (1, 2, 64, 65, 89, 90, 100):
        argmax, logsumexp, out = call(READERS[name], logits, n_choose=n_choose)
        assert argmax == min(n_choose, 90) - 1
        assert logsumexp == whole[1]
        assert (out == whole[2]).all()


@every
@pytest.mark.parametrize("row", [0, 1, 63, 64, 199])
def test_a_defer_row_is_as_if_it_were_not_there(name, row):
    logits = np.random.default_rng(4).normal(0, 3, 200).astype(np.float32)
    logits[row] = 50
    without = np.delete(logits, row)
    for n_choose in (1 + (row == 0), 64, 65, 200):
        argmax, logsumexp, out = call(READERS[name], logits, n_choose=n_choose, defer_row=row)
        expected = call(READERS[name], without, n_choose=n_choose - (row < n_choose))
        assert argmax == expected[0] + (expected[0] >= row)
        assert logsumexp == pytest.approx(expected[1], rel=1e-7)
        np.testing.assert_allclose(out[:8], expected[2], rtol=1e-6, atol=1e-7)
        assert out[8] == 50


@every
def test_a_defer_row_of_minus_infinity_never_defers(name):
    assert call(READERS[name], floats(1, 2, -math.inf), defer_row=2)[2][8] == -math.inf


@every
def test_any_buffer_of_floats_will_do(name):
    array = (ctypes.c_float * 3)(1, 2, 3)  # ctypes says '<f' where numpy says 'f'
    out = memoryview(bytearray(32)).cast("@f")
    read = READERS[name]
    assert read(array, None, None, None, None, out, np.int64(3), -1)[0] == 2
    table = np.zeros((2, 8), np.float32)
    assert call(read, floats(1, 2, 3), head=(None, None, table, table[:, 0].copy()))[0] == 2


def call_rows(name, logits, n_choose=None, *, features=True):
    """Run one reader of many rows; returns (features, argmax, logsumexp)."""
    n = len(logits)
    table = np.full((n, 8), 777, np.float32) if features else None
    argmax, logsumexp = np.full(n, -7, np.int32), np.full(n, 777.0)
    n_choose = logits.shape[1] if n_choose is None else n_choose
    assert ROW_READERS[name](logits, table, argmax, logsumexp, n_choose) is None
    return table, argmax, logsumexp


@every
@pytest.mark.parametrize(("n", "n_vocab"), [(1, 1), (1, 70), (7, 300), (40, 1000)])
def test_many_rows_are_read_as_each_alone(name, n, n_vocab):
    logits = np.random.default_rng(5).normal(0, 4, (n, n_vocab)).astype(np.float32)
    logits[n // 2, 5:] = -math.inf
    for n_choose in {1, n_vocab // 2 or 1, n_vocab}:
        features, argmax, logsumexp = call_rows(name, logits, n_choose)
        for row in range(n):
            alone = call(READERS[name], logits[row], n_choose=n_choose)
            assert (argmax[row], logsumexp[row]) == alone[:2]
            assert (features[row] == alone[2]).all()
        without = call_rows(name, logits, n_choose, features=False)
        assert without[0] is None
        assert (without[1] == argmax).all()
        assert (without[2] == logsumexp).all()


@native
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 20), n_vocab=st.integers(1, 200))
def test_many_rows_are_those_of_the_twin(variant, seed, n, n_vocab):
    logits = np.random.default_rng(seed).normal(0, 5, (n, n_vocab)).astype(np.float32)
    ours, twins = call_rows(variant, logits), call_rows("numpy", logits)
    assert (ours[1] == twins[1]).all()
    np.testing.assert_allclose(ours[0], twins[0], rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(ours[2], twins[2], rtol=2e-7, atol=2e-7)


@every
def test_a_bad_row_is_named(name):
    logits = np.zeros((4, 300), np.float32)
    for bad in (math.nan, math.inf):
        logits[2, 100] = bad
        with pytest.raises(ValueError, match=rf"got {bad} at id 100 of row 2$"):
            call_rows(name, logits)
    logits[2] = -math.inf
    logits[2, 299] = 0
    with pytest.raises(ValueError, match=r"ids below n_choose = 299, got none in row 2$"):
        call_rows(name, logits, 299)


ROWS = np.zeros((3, 10), np.float32)
ROW_ARGUMENTS = ("logits", "features", "argmax", "logsumexp", "n_choose")
GOOD_ROWS = dict(
    zip(
        ROW_ARGUMENTS,
        (ROWS, np.zeros((3, 8), np.float32), np.zeros(3, np.int32), np.zeros(3), 10),
        strict=True,
    )
)
ROW_ERRORS = [
    ({"logits": None}, TypeError, "logits: expected a buffer of float32, got NoneType"),
    ({"argmax": None}, TypeError, "argmax: expected a buffer of int32, got NoneType"),
    ({"argmax": np.zeros(3)}, TypeError, "argmax: expected int32 (format 'i'), got format 'd'"),
    (
        {"logsumexp": np.zeros(3, np.float32)},
        TypeError,
        "logsumexp: expected float64 (format 'd'), got format 'f'",
    ),
    (
        {"logsumexp": memoryview(bytearray(25))[1:].cast("d")},
        ValueError,
        "logsumexp: expected 8-byte alignment, got an unaligned buffer",
    ),
    (
        {"argmax": memoryview(bytes(12)).cast("i")},
        BufferError,
        "argmax: expected a writable buffer, got a read-only one",
    ),
    ({"argmax": np.zeros(0, np.int32)}, ValueError, "argmax: expected at least 1 row, got 0"),
    ({"logits": ROWS[:0]}, ValueError, "logits: expected n_rows x n_vocab = 3 x n_vocab values"),
    (
        {"logits": np.zeros(31, np.float32)},
        ValueError,
        "logits: expected n_rows x n_vocab = 3 x n_vocab values, got 31",
    ),
    ({"logsumexp": np.zeros(4)}, ValueError, "logsumexp: expected n_rows = 3 values, got 4"),
    (
        {"features": np.zeros(25, np.float32)},
        ValueError,
        "features: expected n_rows x 8 = 3 x 8 values, got 25",
    ),
    ({"n_choose": 0}, ValueError, "n_choose: expected 1 to n_vocab = 10, got 0"),
    ({"n_choose": 11}, ValueError, "n_choose: expected 1 to n_vocab = 10, got 11"),
    ({"n_choose": "x"}, TypeError, "'str' object cannot be interpreted as an integer"),
]


@every
@pytest.mark.parametrize(("change", "error", "message"), ROW_ERRORS)
def test_errors_of_many_rows(name, change, error, message):
    ROW_READERS[name](*GOOD_ROWS.values())
    with pytest.raises(error, match="^" + re.escape(message)):
        ROW_READERS[name](*{**GOOD_ROWS, **change}.values())


# ---- errors: the same class and the same words from every implementation ----

X, H, W, B = floats(*range(10)), floats(*range(4)), np.zeros((2, 8), np.float32), floats(0, 0)
WH, OUT = np.zeros((2, 4), np.float32), np.zeros(10, np.float32)
READ_ONLY = OUT.copy()
READ_ONLY.flags.writeable = False
UNALIGNED = memoryview(bytearray(41))[1:]

ARGUMENTS = ("logits", "hidden", "w_hidden", "w_logit", "bias", "out", "n_choose", "defer_row")
GOOD = dict(zip(ARGUMENTS, (X, H, WH, W, B, OUT, 10, -1), strict=True))
NO_HEAD = {"hidden": None, "w_hidden": None, "w_logit": None, "bias": None}


def with_value(array: np.ndarray, index: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[index] = value
    return changed


ERRORS = [
    ({"logits": [1.0]}, TypeError, "logits: expected a buffer of float32, got list"),
    ({"logits": None}, TypeError, "logits: expected a buffer of float32, got NoneType"),
    ({"out": None}, TypeError, "out: expected a buffer of float32, got NoneType"),
    (
        {"logits": X.astype(float)},
        TypeError,
        "logits: expected float32 (format 'f'), got format 'd'",
    ),
    ({"hidden": b"1234"}, TypeError, "hidden: expected float32 (format 'f'), got format 'B'"),
    ({"w_logit": W.astype(">f4")}, TypeError, "w_logit: expected float32 (format 'f'), got format"),
    ({"bias": floats(*range(4))[::2]}, ValueError, "bias: expected a C-contiguous buffer, got a"),
    ({"w_hidden": WH.T}, ValueError, "w_hidden: expected a C-contiguous buffer, got a strided one"),
    ({"out": UNALIGNED.cast("f")}, ValueError, "out: expected 4-byte alignment, got an unaligned"),
    ({"out": READ_ONLY}, BufferError, "out: expected a writable buffer, got a read-only one"),
    ({"out": OUT[:9]}, ValueError, "out: expected 8 + n_experts = 8 + 2 values, got 9"),
    ({"out": OUT[:7]}, ValueError, "out: expected 8 + n_experts = 8 + 2 values, got 7"),
    ({"logits": X[:0]}, ValueError, "logits: expected at least 1 value, got 0"),
    ({"hidden": H[:0]}, ValueError, "hidden: expected at least 1 value, got 0"),
    (
        {"hidden": H[:3]},
        ValueError,
        "w_hidden: expected n_experts x n_embd = 2 x 3 values, got 8",
    ),
    ({"w_logit": W[0]}, ValueError, "w_logit: expected n_experts x 8 = 2 x 8 values, got 8"),
    (
        {"w_logit": floats(*range(17))},
        ValueError,
        "w_logit: expected n_experts x 8 = 2 x 8 values, got 17",
    ),
    ({"bias": B[:0]}, ValueError, "bias: expected one value per expert, got 0"),
    ({"w_logit": None}, ValueError, "w_logit: expected a buffer together with bias, got None"),
    ({"hidden": None}, ValueError, "hidden: expected a buffer together with w_hidden, got None"),
    ({"w_hidden": None}, ValueError, "w_hidden: expected a buffer together with hidden, got None"),
    ({"bias": None}, ValueError, "hidden: expected None together with no bias, got a buffer"),
    ({"defer_row": 3}, ValueError, "hidden: expected None together with defer_row, got a buffer"),
    (
        {**NO_HEAD, "bias": B, "defer_row": 3},
        ValueError,
        "bias: expected None together with defer_row, got a buffer",
    ),
    (
        {**NO_HEAD, "defer_row": 3},
        ValueError,
        "out: expected 8 + n_experts = 8 + 1 values, got 10",
    ),
    (NO_HEAD, ValueError, "out: expected 8 + n_experts = 8 + 0 values, got 10"),
    ({"n_choose": 0}, ValueError, "n_choose: expected 1 to n_vocab = 10, got 0"),
    ({"n_choose": 11}, ValueError, "n_choose: expected 1 to n_vocab = 10, got 11"),
    ({"n_choose": 1 << 80}, ValueError, "n_choose: expected 1 to n_vocab = 10, got"),
    ({"n_choose": 1.0}, TypeError, "'float' object cannot be interpreted as an integer"),
    ({"defer_row": "x"}, TypeError, "'str' object cannot be interpreted as an integer"),
    ({"defer_row": -2}, ValueError, "defer_row: expected -1 or an id below n_vocab = 10, got -2"),
    ({"defer_row": 10}, ValueError, "defer_row: expected -1 or an id below n_vocab = 10, got 10"),
    (
        {"logits": with_value(X, 7, math.nan)},
        ValueError,
        "logits: expected finite values or -inf, got nan at id 7",
    ),
    (
        {"logits": with_value(X, 9, math.inf), "n_choose": 2},
        ValueError,
        "logits: expected finite values or -inf, got inf at id 9",
    ),
    (
        {
            **NO_HEAD,
            "logits": with_value(X, 4, math.nan),
            "defer_row": 4,
            "out": np.zeros(9, np.float32),
        },
        ValueError,
        "logits: expected finite values or -inf, got nan at id 4",
    ),
    (
        {"logits": np.full(10, -math.inf, np.float32)},
        ValueError,
        "logits: nothing to choose: expected a finite value among the ids below n_choose = 10 "
        "(defer_row = -1 left out), got none",
    ),
    (
        {**NO_HEAD, "n_choose": 1, "defer_row": 0, "out": np.zeros(9, np.float32)},
        ValueError,
        "logits: nothing to choose: expected a finite value among the ids below n_choose = 1 "
        "(defer_row = 0 left out), got none",
    ),
    (
        {"hidden": with_value(H, 2, math.nan)},
        ValueError,
        "hidden: expected finite values, got nan at index 2",
    ),
    (
        {"hidden": with_value(H, 0, -math.inf)},
        ValueError,
        "hidden: expected finite values, got -inf at index 0",
    ),
    (
        {"bias": with_value(B, 1, math.inf)},
        ValueError,
        "d: expected a finite value, got inf for expert 1",
    ),
    (
        {"w_logit": with_value(W, 8, math.nan)},
        ValueError,
        "d: expected a finite value, got nan for expert 1",
    ),
    (
        {"w_logit": with_value(W, 0, math.inf), "logits": floats(0), "n_choose": 1},
        ValueError,
        "d: expected a finite value, got nan for expert 0",  # the entropy is 0
    ),
    (
        {"hidden": H * 1e38, "w_hidden": WH - 1e38},
        ValueError,
        "d: expected a finite value, got -inf for expert 0",
    ),
]


@every
@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(name, change, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        READERS[name](*{**GOOD, **change}.values())


@every
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 5, 63, 64, 200, 959, 960, 998, 999])
def test_a_bad_logit_is_found_wherever_it_is(name, bad, at):
    logits = -np.arange(1000, dtype=np.float32)  # nothing else makes the later blocks look twice
    logits[at] = bad
    for n_choose in (1, 500, 1000):
        with pytest.raises(ValueError, match=f"got (nan|inf) at id {at}$"):
            call(READERS[name], logits, n_choose=n_choose)


@every
def test_the_good_call_of_the_error_tests_is_good(name):
    assert READERS[name](*GOOD.values())[0] == 9


@native
def test_the_number_of_arguments_is_checked(variant):
    with pytest.raises(TypeError, match="read: expected 8 positional arguments, got 1"):
        NATIVES[variant](X)
    with pytest.raises(TypeError, match="read_rows: expected 5 positional arguments, got 1"):
        ROW_READERS[variant](X)


@native
def test_buffers_are_given_back(variant):
    logits, out = (memoryview(bytearray(n)).cast("f") for n in (40, 32))
    NATIVES[variant](logits, None, None, None, None, out, 10, -1)
    with pytest.raises(ValueError, match="n_choose"):
        NATIVES[variant](logits, None, None, None, None, out, 99, -1)
    wrong = memoryview(bytearray(8))
    with pytest.raises(TypeError, match="bias"):
        NATIVES[variant](logits, None, None, None, wrong, out, 10, -1)
    rows = [memoryview(bytearray(size)).cast(code) for size, code in ((12, "i"), (24, "d"))]
    with pytest.raises(ValueError, match="n_rows x n_vocab"):
        ROW_READERS[variant](logits, None, *rows, 10)
    for view in (logits, out, wrong, *rows):
        view.release()  # BufferError if anything still held it


# ---- which implementation ----


def in_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "COLM_EDGE_NATIVE"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@native
def test_the_module_says_which_variant_runs(variant):
    assert load_native(variant).implementation == variant
    assert VARIANTS[-1] == "portable"
    assert load_native(None).implementation == load_native("").implementation == VARIANTS[0]


@pytest.mark.skipif(not VARIANTS, reason="the extension is not built, and numpy is forced")
def test_an_unknown_variant_is_refused():
    possible = re.escape(repr(VARIANTS))
    with pytest.raises(ImportError, match=f"expected numpy or one of {possible}.*got 'sse9'"):
        load_native("sse9")


@pytest.mark.parametrize("name", [*VARIANTS[:1], "numpy"])
def test_the_environment_forces_each(name):
    code = "from colm_edge import readout as r; print(r.implementation, r.read is r.read_numpy)"
    done = in_python(code, COLM_EDGE_NATIVE=name)
    assert (done.stdout, done.stderr) == (f"{name} {name == 'numpy'}\n", "")


def test_an_extension_that_is_not_built_is_an_error_and_no_fallback():
    hide = "sys.modules['_colm_edge_native'] = None\nfrom colm_edge import readout"
    assert "_colm_edge_native is not built; `pip install .` builds it" in in_python(hide).stderr
    assert in_python(hide, COLM_EDGE_NATIVE="numpy").returncode == 0
