"""A trained switch: a small GGUF file, with keys `colm.switch.*`."""

from __future__ import annotations

import math
import os
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Doubles, Floats
from colm_edge.errors import SwitchError
from colm_edge.files import replacing
from colm_edge.gguf_header import read_header, read_tensor
from colm_edge.switch.reading import HIDDEN, N_LOGIT, Base, Reader, check_width, sigmoid, sigmoids

ARCHITECTURE = "colmswitch"
VERSION = 1
PREFIX = "colm.switch."
FEATURE_SETS = {
    "hidden": (HIDDEN,),
    "logits": readout.FEATURES,
    "both": (HIDDEN, *readout.FEATURES),
}


@dataclass(frozen=True)
class Switch:
    """A head on the base's state: d = weight · features + bias, one number for each expert.

    The base's share and those of the experts are softmax(0, d), and p_defer is the experts' sum: of
    one expert, σ(d).

    features: column names in order; "hidden" stands for n_embd columns.
    weight (n_experts, n_columns) and bias (n_experts,), float32.
    defer_rates, thresholds: the calibration, rising rates and the falling thresholds for them.
    review: the tolerance in nats with which the expert reviews where nothing else is asked for;
    infinity is off, None says nothing.
    """

    features: tuple[str, ...]
    weight: Floats
    bias: Floats
    n_embd: int
    threshold: float = 0.5
    defer_rates: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    review: float | None = None
    name: str = "switch"
    # Notes: how it was trained, and for which models (SHA-256 and fingerprints of their files).
    info: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [f for f in self.features if f != HIDDEN and f not in readout.FEATURES]
        if unknown or len(set(self.features)) != len(self.features):
            known = ", ".join((HIDDEN, *readout.FEATURES))
            raise SwitchError(
                f"{self.name}: features {list(self.features)}; expected some of {known}, each once"
            )
        columns = sum(self.n_embd if f == HIDDEN else 1 for f in self.features)
        if self.weight.shape != (len(self.bias), columns):
            raise SwitchError(
                f"{self.name}: switch.weight has shape {self.weight.shape}, expected "
                f"({len(self.bias)}, {columns}) for its features"
            )
        numbers = (self.weight, self.bias, self.threshold, self.defer_rates, self.thresholds)
        if not all(np.isfinite(np.asarray(x)).all() for x in numbers):
            raise SwitchError(f"{self.name}: holds NaN or infinite numbers; train it again")
        if not 0 <= self.threshold <= 1:
            raise SwitchError(f"{self.name}: its threshold is {self.threshold}, expected 0 to 1")
        if self.review is not None and not self.review >= 0:
            raise SwitchError(
                f"{self.name}: its tolerance of review is {self.review}, expected 0 or more"
            )
        rates, thresholds = self.defer_rates, self.thresholds
        if list(rates) != sorted(rates) or list(thresholds) != sorted(thresholds, reverse=True):
            raise SwitchError(
                f"{self.name}: its calibration is out of order; expected rising defer rates and "
                "falling thresholds"
            )
        if len(self.defer_rates) != len(self.thresholds):
            raise SwitchError(
                f"{self.name}: calibration has {len(self.defer_rates)} defer rates but "
                f"{len(self.thresholds)} thresholds"
            )

    @property
    def needs_hidden(self) -> bool:
        return HIDDEN in self.features

    @property
    def n_experts(self) -> int:
        return len(self.bias)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names that its experts had when it was fitted, in the order of its rows; none where
        it does not say."""
        return tuple(self.info.get("expert_names", "").split())

    def columns(self) -> tuple[Floats | None, Floats]:
        """Return the weights in the native order: hidden (n_experts, n_embd) or None, and logit
        features (n_experts, 8) with zeros where the switch has no such feature."""
        hidden: Floats | None = None
        logit = np.zeros((len(self.bias), N_LOGIT), np.float32)
        at = 0
        for name in self.features:
            if name == HIDDEN:
                hidden = np.ascontiguousarray(self.weight[:, at : at + self.n_embd])
                at += self.n_embd
            else:
                logit[:, readout.FEATURES.index(name)] = self.weight[:, at]
                at += 1
        return hidden, logit

    def reader(self, base: Base, n_choose: int) -> Reader:
        """Return the function that reads p_defer off a base's state.

        Raises MismatchError when the base has another width.
        """
        if self.needs_hidden:
            check_width(self.name, self.n_embd, base)
        w_hidden, w_logit = self.columns()
        bias, out = self.bias, np.empty(N_LOGIT + self.n_experts, np.float32)
        read_native, wants_hidden = readout.read, w_hidden is not None

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            choice, logsumexp = read_native(
                logits, hidden if wants_hidden else None, w_hidden, w_logit, bias, out, n_choose, -1
            )
            return sigmoid(float(out[N_LOGIT])), choice, logsumexp, 0

        def read_several(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            _, choice, logsumexp, _ = read(logits, hidden)
            d = out[N_LOGIT:].tolist()
            best = max(d)
            total = best + math.log(sum(math.exp(one - best) for one in d))
            return sigmoid(total), choice, logsumexp, d.index(best)

        return read if self.n_experts == 1 else read_several

    def d(self, logit_features: Floats, hidden: Floats | None) -> Doubles:
        """Return d of each token, (n, n_experts), from (n, 8) and (n, n_embd)."""
        w_hidden, w_logit = self.columns()
        logit_features = logit_features.astype(np.float64)
        columns = []
        for k, bias in enumerate(self.bias.tolist()):
            d = logit_features @ w_logit[k] + bias
            if w_hidden is not None:
                assert hidden is not None, "this switch reads the hidden state"
                d += hidden @ w_hidden[k]
            columns.append(d)
        return np.stack(columns, axis=1)

    def p_defer(self, logit_features: Floats, hidden: Floats | None) -> Doubles:
        """Return p_defer of each token, (n,), from (n, 8) and (n, n_embd)."""
        return sigmoids(np.logaddexp.reduce(self.d(logit_features, hidden), axis=1))

    def is_for(self, role: str, fingerprint: str) -> bool:
        """Return whether it was fitted for a model, or does not say. role: "base", or an expert's
        by `role_of`."""
        known = self.info.get(f"{role}_fingerprint", "").split()
        return not known or fingerprint in known

    def threshold_for(self, defer_rate: float) -> float:
        """Return the threshold that defers about this share of the tokens.

        Raises SwitchError when the switch has no calibration.
        """
        if not self.defer_rates:
            raise SwitchError(f"{self.name} has no calibration for defer rates; give --threshold")
        return float(np.interp(defer_rate, self.defer_rates, self.thresholds))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the switch as GGUF. Raises WriteError when the file cannot be written."""
        from gguf import GGUFWriter

        writer = GGUFWriter(None, ARCHITECTURE)
        writer.add_uint32("colm.switch.version", VERSION)
        writer.add_array("colm.switch.features", list(self.features))
        writer.add_uint32("colm.switch.n_embd", self.n_embd)
        writer.add_uint32("colm.switch.n_experts", len(self.bias))
        writer.add_float32("colm.switch.threshold", self.threshold)
        if self.defer_rates:  # GGUF has no empty arrays
            writer.add_array("colm.switch.calibration.defer_rates", list(self.defer_rates))
            writer.add_array("colm.switch.calibration.thresholds", list(self.thresholds))
        if self.review is not None:
            writer.add_float32("colm.switch.review", self.review)
        for key, value in self.info.items():
            writer.add_string(f"colm.switch.{key}", value)
        writer.add_tensor("switch.weight", np.ascontiguousarray(self.weight, np.float32))
        writer.add_tensor("switch.bias", np.ascontiguousarray(self.bias, np.float32))
        with replacing(path) as temporary, closing(writer):
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Switch:
        """Read a switch file. Raises SwitchError when it is missing or broken."""
        try:
            header = read_header(path)
            if header.architecture != ARCHITECTURE:
                raise SwitchError(
                    f"{path}: its architecture is {header.architecture!r}, expected "
                    f"{ARCHITECTURE!r}: this is a model, not a switch"
                )
            keys = header.keys
            tensors = {name: read_tensor(path, one) for name, one in header.tensors.items()}
        except OSError as e:
            expected = "a switch file, or margin, entropy or defer-row"
            raise SwitchError(f"{path}: {e.strerror or e}; expected {expected}") from e
        except ValueError as e:
            raise SwitchError(f"{path}: {e}; expected a switch file") from e
        try:
            version = int(keys["colm.switch.version"])
            if version != VERSION:
                raise SwitchError(
                    f"{path}: switch version {version}, this colm-edge reads {VERSION}; update it"
                )
            bias = tensors["switch.bias"].reshape(-1)
            experts = int(keys["colm.switch.n_experts"])
            if len(bias) != experts:
                raise SwitchError(f"{path}: switch.bias is for {len(bias)}, not {experts} experts")
            return cls(
                features=tuple(keys["colm.switch.features"]),
                weight=tensors["switch.weight"].reshape(experts, -1),
                bias=bias,
                n_embd=int(keys["colm.switch.n_embd"]),
                threshold=float(keys["colm.switch.threshold"]),
                defer_rates=_floats(keys.get("colm.switch.calibration.defer_rates", [])),
                thresholds=_floats(keys.get("colm.switch.calibration.thresholds", [])),
                review=_float_or_none(keys.get("colm.switch.review")),
                name=str(path),
                info={
                    key.removeprefix(PREFIX): value
                    for key, value in keys.items()
                    if key.startswith(PREFIX) and isinstance(value, str)
                },
            )
        except KeyError as e:
            raise SwitchError(f"{path}: the switch lacks {e.args[0]}; train it again") from e
        except (TypeError, ValueError, OverflowError) as e:
            raise SwitchError(f"{path}: a key or tensor has the wrong type or shape ({e})") from e


def role_of(expert: str) -> str:
    """Return what an expert is called in a switch file's notes: of several, by its name."""
    return f"expert.{expert}" if expert else "expert"


def _float_or_none(value: Any) -> float | None:
    return None if value is None else float(value)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
