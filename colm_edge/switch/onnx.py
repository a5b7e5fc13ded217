"""A head in ONNX, read as a switch: a matrix, a bias and a sigmoid.

An ONNX file is a graph of any operators, and so a program. Here it is none: the few operators of
such a head are folded into the weights of a `Switch`, in a time that the file's length bounds.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from colm_edge.arrays import Doubles
from colm_edge.errors import SwitchError
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import HIDDEN

P_DEFER = "p_defer"
MOST_BYTES = 2 << 20  # of a file; a head of 8,192 numbers has 33,000
MOST_NODES = 64
FLOAT = 1  # TensorProto's float32
SAME_NUMBER = ("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze")

# A message of protocol buffers: of each field, by its number, what it holds, in the file's order.
Value = int | memoryview
Message = dict[int, list[Value]]


def load_onnx(path: str | os.PathLike[str]) -> Switch:
    """Read σ(hidden · weight + bias) from an ONNX file: "hidden", float32 (1, n_embd) -> "p_defer".

    Raises SwitchError when it is missing or is not such a head.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"longer than {MOST_BYTES:,} bytes")
        with np.errstate(all="ignore"):  # a switch refuses what is not finite
            weight, bias = _Graph.of(_graph_of(data)).fold()
            row, biases = weight[None].astype(np.float32), np.array([bias], np.float32)
    except OSError as e:
        raise SwitchError(f"{path}: {e.strerror or e}; expected an ONNX head") from e
    except (ValueError, struct.error) as e:
        raise SwitchError(
            f"{path}: {e}; expected an ONNX head that multiplies 'hidden' by a matrix, adds a "
            "bias, and ends in a sigmoid, 'p_defer'"
        ) from e
    return Switch((HIDDEN,), row, biases, len(weight), name=os.fspath(path))


@dataclass(frozen=True)
class _Node:
    operator: str
    inputs: list[str]
    numbers: dict[str, float]  # attributes

    def number(self, name: str, default: float) -> float:
        return self.numbers.get(name, default)


@dataclass(frozen=True)
class _Graph:
    """nodes: by the name of what they make. constants: float32 as float64, of at most two
    dimensions. n_embd: the width of "hidden"."""

    nodes: dict[str, _Node]
    constants: dict[str, Doubles]
    n_embd: int

    @classmethod
    def of(cls, graph: Message) -> _Graph:
        if len(graph.get(1, [])) > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES} nodes")
        constants = dict(_constant(_message(tensor)) for tensor in graph.get(5, []))
        nodes = {}
        for each in graph.get(1, []):
            message = _message(each)
            (name, *others), operator = _texts(message, 2) or [""], _text(message, 4)
            if _text(message, 7) not in ("", "ai.onnx") or others:
                raise ValueError(f"the operator {_shown(operator)} of another kind")
            attributes = [_message(a) for a in message.get(5, [])]
            if operator == "Constant":
                (tensor,) = [a[5][-1] for a in attributes if 5 in a] or [memoryview(b"")]
                constants[name] = _constant(_message(tensor))[1]
            else:
                numbers = {_text(a, 1): _number(a) for a in attributes}
                nodes[name] = _Node(operator, _texts(message, 1), numbers)
        inputs = [_message(i) for i in graph.get(11, [])]
        given = [i for i in inputs if _text(i, 1) not in constants]
        outputs = [_text(_message(o), 1) for o in graph.get(12, [])]
        if [_text(i, 1) for i in given] != [HIDDEN] or P_DEFER not in outputs:
            raise ValueError("has not the input 'hidden' and the output 'p_defer'")
        return cls(nodes, constants, _width(given[0]))

    def fold(self) -> tuple[Doubles, float]:
        """Return weight (n_embd,) and bias. They are carried from the end to the beginning: what is
        after a node reads its output o as weight · o + bias."""
        nodes, weight, bias, at = dict(self.nodes), np.ones(1), 0.0, P_DEFER
        sigmoids = 0
        while at != HIDDEN:
            node = nodes.pop(at, None)
            if node is None:
                raise ValueError(f"nothing makes {_shown(at)} of 'hidden'")
            if node.operator == "Sigmoid" and not sigmoids and len(weight) == 1:
                sigmoids += 1
            elif not (node.operator in SAME_NUMBER and len(weight) == 1):
                if not sigmoids:
                    raise ValueError(f"ends in {_shown(node.operator)}")
                at, weight, bias = self._through(node, weight, bias)
                continue
            at = (node.inputs or [""])[0]
        if not sigmoids or weight.shape != (self.n_embd,):
            raise ValueError(f"reads {len(weight)} of {self.n_embd} numbers")
        return weight, float(bias)

    def _through(self, node: _Node, weight: Doubles, bias: float) -> tuple[str, Doubles, float]:
        """Return what a node reads, and weight and bias of that, given those after it."""
        first, *others = [n for n in node.inputs if n and n not in self.constants] or [""]
        fixed = [self.constants[name] for name in node.inputs if name in self.constants]
        n_fixed, ahead = len(fixed), node.inputs[:1] == [first]
        if others or not fixed:
            raise ValueError(f"the operator {_shown(node.operator)} of other things")
        if node.operator == "Gemm" and ahead and n_fixed < 3 and not node.number("transA", 0):
            matrix = fixed[0].T if node.number("transB", 0) else fixed[0]
            if n_fixed == 2:
                bias += node.number("beta", 1) * _sum(fixed[1], weight)
            return first, node.number("alpha", 1) * _product(matrix, weight), bias
        if node.operator == "MatMul" and ahead and n_fixed == 1:
            return first, _product(fixed[0], weight), bias
        if node.operator == "Add" and n_fixed == 1:
            return first, weight, bias + _sum(fixed[0], weight)
        if node.operator == "Mul" and n_fixed == 1:
            return first, weight * _row(fixed[0], len(weight)), bias
        raise ValueError(f"the operator {_shown(node.operator)}")


def _product(matrix: Doubles, weight: Doubles) -> Doubles:
    if matrix.ndim != 2 or matrix.shape[1] != len(weight):
        raise ValueError("a matrix of another shape")
    return np.asarray(matrix @ weight, np.float64)


def _sum(row: Doubles, weight: Doubles) -> float:
    return float(_row(row, len(weight)) @ weight)


def _row(numbers: Doubles, width: int) -> Doubles:
    """Return the numbers that are added to a row, or multiply it, each with its own."""
    if numbers.size not in (1, width):
        raise ValueError("numbers of another shape")
    return np.broadcast_to(numbers.reshape(-1), (width,))


def _graph_of(data: bytes) -> Message:
    model = _message(memoryview(data))
    if not model.get(7):
        raise ValueError("not an ONNX model")
    return _message(model[7][-1])


def _constant(tensor: Message) -> tuple[str, Doubles]:
    """Return a tensor's name and numbers."""
    shape = list(_whole_numbers(tensor, 1))
    if _whole_numbers(tensor, 2)[-1:] != [FLOAT] or 13 in tensor or len(shape) > 2:
        if not _is_shape(tensor):
            raise ValueError("a tensor that is not a float32 matrix, or lies in another file")
        return _text(tensor, 8), np.zeros(0)
    raw = b"".join(bytes(_bytes(part)) for part in tensor.get(9) or tensor.get(4, []))
    if len(raw) != 4 * math.prod(shape) or max(shape, default=0) > MOST_BYTES:
        raise ValueError(f"a tensor of {len(raw)} bytes and the shape {shape}")
    return _text(tensor, 8), np.frombuffer(raw, "<f4").reshape(shape).astype(np.float64)


def _is_shape(tensor: Message) -> bool:
    """Whether it is what Reshape and its like read: int64, whose numbers mean nothing here."""
    return _whole_numbers(tensor, 2)[-1:] == [7] and len(_whole_numbers(tensor, 1)) < 2


def _width(given: Message) -> int:
    """Return the width of the input "hidden"."""
    tensor = _message(_last(_message(_last(given, 2)), 1))
    sizes = [_whole_numbers(_message(d), 1) for d in _message(_last(tensor, 2)).get(1, [])]
    rows, width = sizes if len(sizes) == 2 else ([0], [0])
    # A dimension without a size has a name, or nothing.
    if _whole_numbers(tensor, 1) != [FLOAT] or rows not in ([1], []) or not width or not width[0]:
        raise ValueError("the input 'hidden' is not float32 (1, n_embd)")
    return width[0]


# Protocol buffers


def _message(value: Value) -> Message:
    """Return the fields of a message. Raises ValueError where it ends within one."""
    data = _bytes(value)
    found = Message()
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = (8 if kind == 1 else 4, at) if kind != 2 else _varint(data, at)
            if size > len(data) - at:
                raise ValueError("truncated")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("not an ONNX model")
        found.setdefault(key >> 3, []).append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return a number that begins at a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("not an ONNX model")


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("not an ONNX model")
    return value


def _last(message: Message, field: int) -> Value:
    return message[field][-1] if field in message else memoryview(b"")


def _texts(message: Message, field: int) -> list[str]:
    return [bytes(_bytes(value)).decode("utf-8", "replace") for value in message.get(field, [])]


def _text(message: Message, field: int) -> str:
    return (_texts(message, field) or [""])[-1]


def _number(attribute: Message) -> float:
    """Return an attribute that is one number, NaN for any other."""
    if 2 in attribute:
        number: float = struct.unpack("<f", _bytes(attribute[2][-1]))[0]
        return number
    whole = _whole_numbers(attribute, 3)
    return float(whole[-1]) if whole else math.nan


def _whole_numbers(message: Message, field: int) -> list[int]:
    return list(_each_number(message.get(field, [])))


def _each_number(values: list[Value]) -> Iterator[int]:
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):  # packed
            number, at = _varint(value, at)
            yield number


def _shown(name: str) -> str:
    return ascii(name)[:60]
