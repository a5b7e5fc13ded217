"""ONNX heads: written beside a switch file, and run in its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import convert_switch
import numpy as np
import pytest
from checkpoints import N_EMBD, convert, make_checkpoint
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colm_edge.cli import main as colm_edge
from colm_edge.errors import MismatchError, SwitchError
from colm_edge.switch.file import Switch
from colm_edge.switch.load import load_switch
from colm_edge.switch.onnx import load_onnx
from colm_edge.switch.reading import sigmoid, sigmoids


def test_an_onnx_head_gives_what_the_switch_gives(tmp_path):
    pytest.importorskip("onnx", reason="--onnx writes with the onnx package: pip install onnx")
    tensors = make_checkpoint(tmp_path / "c", tensors={"lm_head.bias": np.full(11, 0.3)})
    result = convert(
        tmp_path / "c", "--outfile", tmp_path / "s.gguf", "--onnx", tmp_path / "s.onnx"
    )
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "s.gguf", "s.onnx"]
    base = SimpleNamespace(n_embd=N_EMBD, token_id=None)
    head = load_switch(tmp_path / "s.onnx")
    assert (head.threshold, head.needs_hidden, head.name) == (0.5, True, str(tmp_path / "s.onnx"))
    reader = head.reader(base, 5)
    logits = np.array([1, 3, 2, 0, 0, 9], np.float32)
    for hidden in np.random.default_rng(3).normal(size=(9, N_EMBD)).astype(np.float32):
        p, choice, logsumexp, _ = reader(logits, hidden)
        d = float(tensors["lm_head.weight"][-1].astype(float) @ hidden) + 0.3
        assert p == pytest.approx(sigmoid(d), abs=1e-6)
        assert choice == 1
        assert logsumexp == pytest.approx(np.log(np.exp(logits).sum()), abs=1e-5)
    with pytest.raises(MismatchError, match="6 numbers, the base has 7"):
        head.reader(SimpleNamespace(n_embd=7, token_id=None), 5)
    with pytest.raises(SwitchError, match="no calibration"):
        head.threshold_for(0.2)


def test_an_onnx_head_that_differs_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="--onnx writes with the onnx package: pip install onnx")
    make_checkpoint(tmp_path / "c")
    write = convert_switch.write_onnx

    def slightly_off(switch, path):
        wrong = Switch(("hidden",), switch.weight, switch.bias + np.float32(1e-4), switch.n_embd)
        write(wrong, path)

    monkeypatch.setattr(convert_switch, "write_onnx", slightly_off)
    result = convert(
        tmp_path / "c", "--outfile", tmp_path / "s.gguf", "--onnx", tmp_path / "s.onnx"
    )
    assert result.exit_code == 1
    assert "differs from the switch by 2.5e-05 in p_defer" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_without_the_onnx_package_the_cure_is_named(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "c")
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = convert(
        tmp_path / "c", "--outfile", tmp_path / "s.gguf", "--onnx", tmp_path / "s.onnx"
    )
    assert result.stderr == "Error: --onnx needs the onnx package: pip install 'colm-edge[onnx]'\n"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_without_onnxruntime_the_cure_is_named(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "c")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = convert(
        tmp_path / "c", "--outfile", tmp_path / "s.gguf", "--onnx", tmp_path / "s.onnx"
    )
    assert result.stderr == (
        "Error: --onnx needs the onnxruntime package: pip install 'colm-edge[onnx]'\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


WIDTH = 64
rng = np.random.default_rng(8)
ROW = rng.normal(0, 0.3, (WIDTH, 1)).astype(np.float32)
SQUARE = rng.normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float32)
BIAS = np.array([0.3], np.float32)
MANY = rng.normal(0, 1, WIDTH).astype(np.float32)
ONE = ("Sigmoid", ["d"], "p_defer")


def write_head(
    path: Path, nodes, constants=None, *, width=WIDTH, name="hidden", output="p_defer", rows=1,
    flat=False, kind="FLOAT",
):  # fmt: skip
    """Write a graph. nodes: operator, inputs, output and attributes of each."""
    onnx = pytest.importorskip("onnx", reason="this test writes ONNX heads: pip install onnx")
    from onnx import helper, numpy_helper

    def tensor(key, array):
        if not flat:
            return numpy_helper.from_array(array, key)
        return helper.make_tensor(key, onnx.TensorProto.FLOAT, array.shape, array.reshape(-1))

    made = [
        helper.make_node(op, reads, [makes], **(more[0] if more else {}))
        for op, reads, makes, *more in nodes
    ]
    kind = getattr(onnx.TensorProto, kind)
    graph = helper.make_graph(
        made,
        "head",
        [helper.make_tensor_value_info(name, kind, [rows, width])],
        [helper.make_tensor_value_info(output, kind, None)],
        [tensor(key, array) for key, array in (constants or {}).items()],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)


def constant(array, name):
    numpy_helper = pytest.importorskip("onnx.numpy_helper", reason="writes ONNX: pip install onnx")
    return ("Constant", [], name, {"value": numpy_helper.from_array(array)})


HEADS = {
    "gemm": ([("Gemm", ["hidden", "w", "b"], "d"), ONE], {"w": ROW, "b": BIAS}),
    "turned": (
        [("Gemm", ["hidden", "w", "b"], "d", {"transB": 1}), ONE], {"w": ROW.T.copy(), "b": BIAS}
    ),
    "scaled": (
        [("Gemm", ["hidden", "w", "b"], "d", {"alpha": 0.5, "beta": -2.0}), ONE],
        {"w": ROW, "b": BIAS},
    ),
    "without": ([("Gemm", ["hidden", "w"], "d"), ONE], {"w": ROW}),
    "matmul": (
        [("MatMul", ["hidden", "w"], "m"), ("Add", ["m", "b"], "d"), ONE], {"w": ROW, "b": BIAS}
    ),
    "bias first": (
        [("MatMul", ["hidden", "w"], "m"), ("Add", ["b", "m"], "d"), ONE],
        {"w": ROW, "b": BIAS.reshape(1, 1)},
    ),
    "two": (
        [("Gemm", ["hidden", "v", "c"], "h", {"transB": 1}), ("MatMul", ["h", "w"], "d"), ONE],
        {"w": ROW, "v": SQUARE, "c": MANY},
    ),
    "normalised": (
        [("Add", ["hidden", "c"], "a"), ("Mul", ["a", "m"], "n"), ("Mul", ["two", "n"], "o"),
         ("Add", ["o", "two"], "r"), ("MatMul", ["r", "w"], "d"), ONE],
        {"w": ROW, "c": MANY, "m": MANY.reshape(1, -1), "two": np.array(2, np.float32)},
    ),
    "reshaped": (
        [("MatMul", ["hidden", "w"], "m"), ("Identity", ["m"], "d"),
         ("Sigmoid", ["d"], "s"), ("Reshape", ["s", "shape"], "p_defer")],
        {"w": ROW, "shape": np.array([1], np.int64)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_what_onnxruntime_says(tmp_path, name, flat):
    """To the rounding of float32: up to 1e-6 of p_defer."""
    pytest.importorskip("onnxruntime", reason="compares with it: pip install onnxruntime")
    nodes, constants = HEADS[name]
    write_head(tmp_path / "h.onnx", nodes, constants, flat=flat and "shape" not in constants)
    reader = load_switch(tmp_path / "h.onnx").reader(BASE, 4)
    theirs = convert_switch.in_onnxruntime(tmp_path / "h.onnx")
    seen = []
    for hidden in np.random.default_rng(3).normal(size=(99, WIDTH)).astype(np.float32):
        seen.append(theirs(hidden))
        assert reader(np.zeros(4, np.float32), hidden)[0] == pytest.approx(seen[-1], abs=1e-6)
    assert max(seen) - min(seen) > 0.2  # the comparison is about something


BASE = SimpleNamespace(n_embd=WIDTH, token_id=None)


def test_weights_may_be_in_constant_nodes(tmp_path):
    nodes, constants = HEADS["matmul"]
    write_head(tmp_path / "a.onnx", nodes, constants, rows="batch")
    write_head(tmp_path / "b.onnx", [constant(ROW, "w"), constant(BIAS, "b"), *nodes])
    a, b = (load_switch(tmp_path / f"{name}.onnx") for name in "ab")
    assert np.array_equal(a.weight, ROW.T)
    assert np.array_equal(a.weight, b.weight)
    assert a.bias == b.bias == BIAS


def test_an_onnx_head_is_scored_like_any_trained_switch(tmp_path):
    write_head(tmp_path / "h.onnx", *HEADS["gemm"])
    head = load_switch(tmp_path / "h.onnx")
    hidden = np.random.default_rng(3).normal(size=(9, WIDTH)).astype(np.float32)
    p = head.p_defer(np.zeros((9, 8), np.float32), hidden)
    assert p == pytest.approx(sigmoids((hidden @ ROW)[:, 0].astype(float) + 0.3), abs=1e-6)


@pytest.mark.parametrize(
    ("nodes", "constants", "more", "words"),
    [
        (*HEADS["gemm"], {"name": "x"}, "has not the input 'hidden'"),
        (*HEADS["gemm"], {"output": "p"}, "has not .* the output 'p_defer'"),
        (*HEADS["gemm"], {"width": "n"}, "not float32"),
        (*HEADS["gemm"], {"rows": 2}, "not float32"),
        (*HEADS["gemm"], {"kind": "DOUBLE"}, "not float32"),
        (*HEADS["gemm"], {"width": 48}, "reads 64 of 48"),
        ([("MatMul", ["hidden", "w"], "p_defer")], {"w": ROW}, {}, "ends in 'MatMul'"),
        ([("MatMul", ["hidden", "w"], "d"), ("Log", ["d"], "p_defer")], {"w": ROW}, {}, "'Log'"),
        ([("ReduceMean", ["hidden"], "d"), ONE], {}, {}, "'ReduceMean'"),
        ([("MatMul", ["hidden", "w"], "m"), ("Relu", ["m"], "d"), ONE], {"w": ROW}, {}, "'Relu'"),
        ([("Add", ["hidden", "hidden"], "s"), ("MatMul", ["s", "w"], "d"), ONE], {"w": ROW}, {},
         "of other things"),
        ([("Loop", ["n", "c", "hidden"], "d"), ONE], {"n": BIAS, "c": BIAS}, {}, "'Loop'"),
        ([("MatMul", ["d", "w"], "d"), ONE], {"w": ROW}, {}, "matrix of another shape|nothing"),
        ([ONE], {}, {}, "nothing makes 'd'"),
        ([("MatMul", ["hidden", "w"], "d"), ONE], {"w": SQUARE}, {}, "another shape"),
        ([("MatMul", ["hidden", "w"], "d"), ONE], {"w": ROW.astype(np.float64)}, {}, "a float32"),
        ([("MatMul", ["hidden", "w"], "d"), ONE], {"w": ROW * np.nan}, {}, "NaN or infinite"),
        ([("Add", ["hidden", "c"], "a0")]
         + [("Add", [f"a{i}", "c"], f"a{i + 1}") for i in range(70)], {"c": MANY}, {},
         "more than 64 nodes"),
    ],
)  # fmt: skip
def test_other_graphs_are_refused_in_one_line(tmp_path, nodes, constants, more, words):
    write_head(tmp_path / "h.onnx", nodes, constants, **more)
    with pytest.raises(SwitchError, match=words) as caught:
        load_onnx(tmp_path / "h.onnx")
    assert str(caught.value).isprintable()


def test_weights_in_another_file_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx", reason="this test writes ONNX heads: pip install onnx")
    write_head(tmp_path / "h.onnx", *HEADS["gemm"])
    model = onnx.load(tmp_path / "h.onnx")
    onnx.save(model, tmp_path / "h.onnx", save_as_external_data=True, size_threshold=0,
              location="secret")  # fmt: skip
    with pytest.raises(SwitchError, match="another file"):
        load_onnx(tmp_path / "h.onnx")


def test_what_is_no_onnx_file_is_refused(tmp_path):
    for name, content, words in (
        ("text", b"not a model", "truncated|not an ONNX model"),
        ("empty", b"", "not an ONNX model"),
        ("long", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "truncated"),
        ("large", bytes(3 << 20), "longer than"),
    ):
        (tmp_path / f"{name}.onnx").write_bytes(content)
        with pytest.raises(SwitchError, match=words):
            load_onnx(tmp_path / f"{name}.onnx")
    with pytest.raises(SwitchError, match="No such file"):
        load_onnx(tmp_path / "absent.onnx")


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_head_is_read_or_refused_in_one_line(tmp_path, data):
    path = tmp_path / "h.onnx"
    if not path.exists():
        write_head(path, *HEADS["turned"])
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        whole[at : at + len(piece)] = piece
    mutated = tmp_path / "mutated.onnx"
    mutated.write_bytes(bytes(whole[: data.draw(st.none() | st.integers(0, len(whole)))]))
    try:
        head = load_onnx(mutated)
    except SwitchError as e:
        told = str(e)
        assert told.isprintable()
        assert len(told) <= 300
    else:
        assert np.isfinite(head.weight).all()


def test_run_takes_an_onnx_head(tiny, tmp_path):
    pytest.importorskip("onnx", reason="--onnx writes with the onnx package: pip install onnx")
    np.save(tmp_path / "row.npy", np.random.default_rng(4).normal(0, 0.3, 64).astype(np.float32))
    convert(tmp_path / "row.npy", "--outfile", tmp_path / "s.gguf", "--onnx", tmp_path / "s.onnx")

    def run(switch, *more):
        args = ["run", "hello", "-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "--temp", "0",
                "-n", "24", "--json", "-sw", str(switch), *more]  # fmt: skip
        return CliRunner().invoke(colm_edge, args)

    native, onnx = (json.loads(run(tmp_path / f"s.{kind}").stdout) for kind in ("gguf", "onnx"))
    assert [t["id"] for t in native["tokens"]] == [t["id"] for t in onnx["tokens"]]
    assert 0 < native["stats"]["n_deferred"] < 24
    for ours, theirs in zip(native["tokens"], onnx["tokens"], strict=True):
        assert ours["p_defer"] == pytest.approx(theirs["p_defer"], abs=1e-5)
    nodes = [("MatMul", ["hidden", "w"], "d"), ONE]
    write_head(tmp_path / "narrow.onnx", nodes, {"w": ROW[:48]}, width=48)
    for name, words in (("narrow", "48 numbers, the base has 64"), ("absent", "No such file")):
        failed = run(tmp_path / f"{name}.onnx")
        assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
        assert words in failed.stderr


def test_an_onnx_head_needs_no_other_package(tmp_path):
    write_head(tmp_path / "h.onnx", *HEADS["gemm"])
    code = (
        "import sys\n"
        "from colm_edge.switch.load import load_switch\n"
        "load_switch(sys.argv[1])\n"
        "assert not {'onnx', 'onnxruntime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "h.onnx"], check=True)


def test_onnxruntime_is_asked_not_to_call_home(tmp_path):
    """Before it is imported: nothing that it offers later stops it."""
    pytest.importorskip("onnxruntime", reason="looks at its telemetry: pip install onnxruntime")
    write_head(tmp_path / "h.onnx", *HEADS["gemm"])
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(convert_switch.__file__).parent)!r})\n"
        "import convert_switch\n"
        "from pathlib import Path\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "convert_switch.in_onnxruntime(Path(sys.argv[1]))\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "h.onnx"], check=True)
