"""A switch as an ONNX head."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from colm_edge import readout
from colm_edge.errors import SwitchError
from colm_edge.switch.reading import HIDDEN, N_LOGIT, Base, Floats, Reader, check_width


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())


@dataclass(frozen=True)
class OnnxSwitch:
    """A head that onnxruntime runs: "hidden" float32 (1, n_embd) -> "p_defer", one probability."""

    name: str
    n_embd: int
    run: Callable[[Floats], float] = field(repr=False)
    threshold: float = 0.5
    needs_hidden: bool = True

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OnnxSwitch:
        """Open an ONNX file. Raises SwitchError when it is missing or is not such a head."""
        # onnxruntime calls its maker's host otherwise; nothing that it offers later stops that.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime as ort

        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as e:
            raise SwitchError(f"{path}: {e.strerror or e}; expected an ONNX head") from e
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # one row of work
        options.log_severity_level = 4  # errors come as exceptions
        try:
            session = ort.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # onnxruntime's errors have no common class
            raise SwitchError(f"{path}: onnxruntime cannot load it ({_one_line(e)})") from e
        inputs = [(i.name, i.type, list(i.shape)) for i in session.get_inputs()]
        outputs = [o.name for o in session.get_outputs()]
        rows, width = inputs[0][2] if len(inputs) == 1 and len(inputs[0][2]) == 2 else (0, 0)
        fits = inputs and inputs[0][:2] == (HIDDEN, "tensor(float)") and "p_defer" in outputs
        # A dimension without a size is a name or None.
        if not fits or not isinstance(width, int) or (isinstance(rows, int) and rows != 1):
            raise SwitchError(
                f"{path}: inputs {inputs} and outputs {outputs}; expected the input 'hidden', "
                "float32 (1, n_embd), and the output 'p_defer'"
            )

        def run(hidden: Floats) -> float:
            try:
                (p,) = session.run(["p_defer"], {HIDDEN: hidden.reshape(1, -1)})
            except Exception as e:
                raise SwitchError(f"{path}: onnxruntime cannot run it ({_one_line(e)})") from e
            values = np.asarray(p, np.float64).reshape(-1)
            if len(values) != 1 or not 0 <= values[0] <= 1:
                raise ValueError(f"p_defer: expected one number from 0 to 1, got {values}")
            return float(values[0])

        return cls(str(path), width, run)

    def reader(self, base: Base, n_choose: int) -> Reader:
        check_width(self.name, self.n_embd, base)
        out = np.empty(N_LOGIT, np.float32)
        read_native, run = readout.read, self.run

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            choice, logsumexp = read_native(logits, None, None, None, None, out, n_choose, -1)
            return run(hidden), choice, logsumexp, 0

        return read

    def threshold_for(self, defer_rate: float) -> float:
        raise SwitchError(f"{self.name}: an ONNX head has no calibration; give --threshold")
