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

from colm_edge.cli import main as colm_edge
from colm_edge.errors import MismatchError, SwitchError
from colm_edge.switch.file import Switch
from colm_edge.switch.load import load_switch
from colm_edge.switch.onnx import OnnxSwitch
from colm_edge.switch.reading import sigmoid


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


def onnx_head(path: Path, *, width=64, name="hidden", operator="Sigmoid", output="p_defer", rows=1):
    """Write hidden -> operator(sum of hidden), for heads that others made."""
    onnx = pytest.importorskip("onnx", reason="this test writes ONNX heads: pip install onnx")
    from onnx import helper

    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", [name], ["d"], axes=[1], keepdims=1),
            helper.make_node(operator, ["d"], [output]),
        ],
        "head",
        [helper.make_tensor_value_info(name, float32, [rows, width])],
        [helper.make_tensor_value_info(output, float32, [rows, 1])],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)


def test_onnx_heads_that_do_not_fit_are_refused(tmp_path):
    onnx_head(tmp_path / "named.onnx", name="x")
    onnx_head(tmp_path / "output.onnx", output="p")
    onnx_head(tmp_path / "open.onnx", width="n")
    onnx_head(tmp_path / "two.onnx", rows=2)
    (tmp_path / "text.onnx").write_text("not a model")
    for name, words in (
        ("named.onnx", "expected the input 'hidden'"),
        ("output.onnx", "the output 'p_defer'"),
        ("open.onnx", "expected the input"),
        ("two.onnx", "expected the input"),
        ("text.onnx", "onnxruntime cannot load it"),
        ("absent.onnx", "No such file"),
    ):
        with pytest.raises(SwitchError, match=words) as caught:
            OnnxSwitch.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    onnx_head(tmp_path / "any.onnx", rows="batch")
    onnx_head(tmp_path / "log.onnx", operator="Log")
    base = SimpleNamespace(n_embd=64, token_id=None)
    logits, hidden = np.zeros(4, np.float32), -np.ones(64, np.float32)
    p, *_ = load_switch(tmp_path / "any.onnx").reader(base, 4)(logits, hidden)
    assert p == pytest.approx(sigmoid(-1.0), abs=1e-6)
    with pytest.raises(ValueError, match="p_defer: expected one number"):
        load_switch(tmp_path / "log.onnx").reader(base, 4)(logits, hidden)


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
    onnx_head(tmp_path / "narrow.onnx", width=48)
    onnx_head(tmp_path / "log.onnx", operator="Log")
    for name, words in (("narrow", "48 numbers, the base has 64"), ("absent", "No such file")):
        failed = run(tmp_path / f"{name}.onnx")
        assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
        assert words in failed.stderr


def test_onnxruntime_is_loaded_only_for_onnx_heads(tmp_path):
    np.save(tmp_path / "row.npy", np.ones(4, np.float32))
    code = (
        "import sys\n"
        "from colm_edge.switch.load import load_switch\n"
        "load_switch('margin')\n"
        "assert 'onnxruntime' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
