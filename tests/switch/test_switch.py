"""The switch file, its probabilities and its errors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from reference import p_defer

from colm_edge import readout
from colm_edge.errors import MismatchError, SwitchError, WriteError
from colm_edge.files import fingerprint
from colm_edge.pair import load
from colm_edge.readout import FEATURES
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.switch.load import load_switch
from colm_edge.switch.reading import FeatureSwitch, sigmoid, sigmoids
from colm_edge.switch.rules import RULES, DeferRow, Untrained

BASE = SimpleNamespace(n_embd=6, token_id=lambda text: None)


def make(features=FEATURE_SETS["both"], seed=0, **more) -> Switch:
    columns = sum(6 if f == "hidden" else 1 for f in features)
    weight = np.random.default_rng(seed).normal(size=(1, columns)).astype(np.float32)
    return Switch(tuple(features), weight, np.array([0.3], np.float32), 6, **more)


def test_a_file_gives_back_the_switch(tmp_path):
    switch = make(threshold=0.37, defer_rates=(0.0, 0.5, 1.0), thresholds=(1.0, 0.4, 0.0))
    switch.save(tmp_path / "s.gguf")
    again = Switch.load(tmp_path / "s.gguf")
    assert again.features == switch.features
    assert np.array_equal(again.weight, switch.weight)
    assert np.array_equal(again.bias, switch.bias)
    assert again.threshold == pytest.approx(0.37)
    assert again.threshold_for(0.25) == pytest.approx(0.7)
    assert again.threshold_for(0.0) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["s.gguf"]


def test_the_file_has_the_documented_keys(tmp_path):
    make(defer_rates=(0.0, 1.0), thresholds=(1.0, 0.0)).save(tmp_path / "s.gguf")
    reader = GGUFReader(tmp_path / "s.gguf")
    values = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert values == {
        "general.architecture": "colmswitch",
        "colm.switch.version": 1,
        "colm.switch.features": ["hidden", *FEATURES],
        "colm.switch.n_embd": 6,
        "colm.switch.n_experts": 1,
        "colm.switch.threshold": 0.5,
        "colm.switch.calibration.defer_rates": [0.0, 1.0],
        "colm.switch.calibration.thresholds": [1.0, 0.0],
    }
    assert {t.name: tuple(t.data.shape) for t in reader.tensors} == {
        "switch.weight": (1, 14),
        "switch.bias": (1,),
    }


@given(
    seed=st.integers(0, 10_000),
    features=st.permutations(["hidden", *FEATURES]).flatmap(
        lambda order: st.integers(1, 9).map(lambda n: tuple(order[:n]))
    ),
)
def test_p_defer_is_the_documented_formula(seed, features):
    """Any features in any order: σ(weight · features + bias), by the slow twin."""
    switch = make(features, seed)
    rng = np.random.default_rng(seed + 1)
    logits = rng.normal(0, 3, 50).astype(np.float32)
    hidden = rng.normal(0, 1, 6).astype(np.float32)
    p, choice, logsumexp, expert = switch.reader(BASE, 40)(logits, hidden)
    assert p == pytest.approx(p_defer(switch, logits.astype(float), hidden.astype(float)), abs=1e-5)
    assert (choice, expert) == (logits[:40].argmax(), 0)
    assert logsumexp == pytest.approx(math.log(np.exp(logits.astype(float)).sum()), abs=1e-5)


@pytest.mark.parametrize("name", ["margin", "entropy"])
def test_untrained_switches(name):
    logits = np.random.default_rng(1).normal(0, 3, 50).astype(np.float32)
    p, *_ = load_switch(name).reader(BASE, 50)(logits, logits)
    assert p == pytest.approx(p_defer(name, logits.astype(float), logits), abs=1e-5)


@pytest.mark.parametrize("switch", [make(), make(("p2", "margin")), *map(Untrained, RULES)])
def test_many_rows_at_once_are_what_is_read_one_by_one(switch):
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (20, 50)).astype(np.float32)
    hidden = rng.normal(0, 1, (20, 6)).astype(np.float32)
    features = np.empty((20, len(FEATURES)), np.float32)
    readout.read_rows(logits, features, np.empty(20, np.int32), np.empty(20), 50)
    reader = switch.reader(BASE, 50)
    one_by_one = [reader(*row)[0] for row in zip(logits, hidden, strict=True)]
    assert isinstance(switch, FeatureSwitch)
    together = switch.p_defer(features, hidden)
    assert (together.shape, together.dtype) == ((20,), np.float64)
    assert together == pytest.approx(one_by_one, abs=1e-5)
    if not switch.needs_hidden:
        assert (switch.p_defer(features, None) == together).all()


def test_a_name_or_a_file_gives_a_switch(tmp_path):
    for name, kind in (("margin", Untrained), ("entropy", Untrained), ("defer-row", DeferRow)):
        switch = load_switch(name)
        assert (type(switch), switch.name, switch.threshold) == (kind, name, 0.5)
    for name in ("s.gguf", "s", "margin"):  # a path is a file, whatever its name
        make().save(tmp_path / name)
        assert load_switch(tmp_path / name).name == str(tmp_path / name)


@given(st.floats(-1e6, 1e6))
def test_sigmoid_never_overflows(d):
    assert 0.0 <= sigmoid(d) <= 1.0
    assert sigmoid(d) + sigmoid(-d) == pytest.approx(1.0)
    assert sigmoids(np.array([d, -d])) == pytest.approx([sigmoid(d), sigmoid(-d)], abs=1e-15)


def test_what_does_not_fit_is_named():
    with pytest.raises(SwitchError, match="expected some of hidden, entropy"):
        make(("hidden", "colour"))
    with pytest.raises(SwitchError, match="each once"):
        make(("p1", "p1"))
    with pytest.raises(SwitchError, match=r"shape \(1, 3\), expected \(1, 6\)"):
        Switch(("hidden",), np.zeros((1, 3), np.float32), np.zeros(1, np.float32), 6)
    with pytest.raises(SwitchError, match="NaN or infinite"):
        Switch(("p1",), np.full((1, 1), np.nan, np.float32), np.zeros(1, np.float32), 6)
    with pytest.raises(SwitchError, match="2 defer rates but 1 thresholds"):
        make(defer_rates=(0.0, 1.0), thresholds=(1.0,))
    with pytest.raises(SwitchError, match="threshold is 7"):
        make(threshold=7.0)
    with pytest.raises(SwitchError, match="out of order"):
        make(defer_rates=(1.0, 0.0), thresholds=(0.0, 1.0))
    with pytest.raises(MismatchError, match="6 numbers, the base has 7"):
        make().reader(SimpleNamespace(n_embd=7, token_id=None), 4)
    # The logit features fit a base of any width.
    make(("p1",)).reader(SimpleNamespace(n_embd=7, token_id=None), 4)


def test_broken_files_are_refused(tmp_path, tiny):
    make().save(tmp_path / "good.gguf")
    whole = (tmp_path / "good.gguf").read_bytes()
    cases = {
        "half": (whole[: len(whole) // 2], "truncated"),
        "text": (b"weights = 3", "not a GGUF file"),
        "empty": (b"", "not a GGUF file"),
        "nan": (whole[:-64] + np.full(16, np.nan, np.float32).tobytes(), "NaN"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(SwitchError, match=words) as caught:
            Switch.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(SwitchError, match="No such file"):
        Switch.load(tmp_path / "absent")
    with pytest.raises(SwitchError, match="this is a model, not a switch"):
        Switch.load(tiny["base"])


def test_missing_keys_and_later_versions_are_refused(tmp_path):
    for version, words in ((1, "lacks"), (2, "this colm-edge reads 1")):
        path = tmp_path / f"{version}.gguf"
        writer = GGUFWriter(str(path), "colmswitch")
        writer.add_uint32("colm.switch.version", version)
        writer.add_tensor("switch.bias", np.zeros(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(SwitchError, match=words):
            Switch.load(path)


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    make().save(tmp_path / "s.gguf")
    before = (tmp_path / "s.gguf").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(WriteError, match=r"s\.gguf: cannot write: No space left"):
        make(seed=1).save(tmp_path / "s.gguf")
    assert (tmp_path / "s.gguf").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.gguf"]
    with pytest.raises(WriteError, match="No such file"):
        make().save(tmp_path / "absent" / "s.gguf")


def test_a_switch_remembers_the_files_that_it_was_fitted_for(tiny, tmp_path):
    marks = {role: fingerprint(Path(tiny[role])) for role in ("base", "expert")}
    path = tmp_path / "s.gguf"
    info = {f"{role}_fingerprint": mark for role, mark in marks.items()}
    make(FEATURE_SETS["logits"], info=info | {"base_sha256": "ab" * 32}).save(path)
    again = Switch.load(path)
    assert again.info == info | {"base_sha256": "ab" * 32}
    assert again.is_for("base", marks["base"])
    assert not again.is_for("base", marks["expert"])
    notes = []
    with load(tiny["base"], tiny["expert"], path, n_threads=1, note=notes.append):
        assert notes == []
    with load(tiny["base"], tiny["base"], path, n_threads=1, note=notes.append):
        assert len(notes) == 1
        assert "was fitted for another expert than" in notes[0]


@pytest.mark.parametrize("nats", [None, 0.0, 2.5, math.inf])
def test_a_file_carries_its_tolerance_of_review(tmp_path, nats):
    make(review=nats).save(tmp_path / "s.gguf")
    assert Switch.load(tmp_path / "s.gguf").review == nats


@pytest.mark.parametrize("nats", [-1.0, math.nan])
def test_a_tolerance_is_not_negative(nats):
    with pytest.raises(SwitchError, match="tolerance of review is"):
        make(review=nats)
