"""The pickle in a file of torch.save, read as data.

A pickle is a program for a small machine with a stack. The machine here knows the steps that
describe tensors and plain values, and no other: it imports nothing, calls nothing, and sets nothing
on an object. Each step takes time and memory for the bytes that it has in the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Of torch's classes of storages: safetensors' name of their numbers.
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
STORAGE_NAMES = {f"torch {name}": dtype for name, dtype in STORAGES.items()}
DICT, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
PARAMETERS = (
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
)
KNOWN = {DICT, TENSOR, *PARAMETERS, *STORAGE_NAMES}


@dataclass(frozen=True)
class Storage:
    """Where a tensor's numbers are: a member of the zip file, and safetensors' name of them."""

    key: str
    dtype: str


@dataclass(frozen=True)
class Described:
    """A tensor as the pickle has it. Nothing about its numbers is checked."""

    storage: Storage
    first: Any
    shape: Any
    strides: Any


@dataclass(frozen=True)
class _Named:
    """What the pickle would import."""

    name: str


class ForbiddenError(ValueError):
    """The pickle asks for something else than plain tensors."""


def read_pickle(data: bytes) -> Any:
    """Return what a pickle describes: a `Described`, or dicts, lists and tuples with them inside.

    Raises ForbiddenError where it wants more than that, ValueError where it is broken.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            return machine.pop()
        step = STEPS.get(opcode.name)
        if step is None:
            raise ForbiddenError(f"the step {opcode.name}")
        step(machine, argument)
    raise ValueError("it has no end")


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []  # how high the stack was
        self._memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes what it did not put down")
        return self._stack.pop()

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def pop_marked(self) -> list[Any]:
        if not self._marks:
            raise ValueError("it takes what it did not put down")
        at = self._marks.pop()
        found = self._stack[at:]
        del self._stack[at:]
        return found

    def pop_tuple(self, n: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(n)])))

    def keep(self, index: int) -> None:
        self.push(value := self.pop())
        self._memo[index] = value

    def keep_next(self, _: Any) -> None:
        self.keep(len(self._memo))

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError("it takes what it did not put down")
        self.push(self._memo[index])

    def name(self, text: str) -> None:
        if text not in KNOWN:
            raise ForbiddenError(text.replace(" ", ".", 1))
        self.push(_Named(text))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.name(f"{_text(module)} {_text(name)}")

    def storage(self, _: Any) -> None:
        what = self.pop()
        if not isinstance(what, tuple) or len(what) < 3 or what[0] != "storage":
            raise ValueError("a storage is none")
        kind, key = what[1:3]
        if not isinstance(kind, _Named) or kind.name not in STORAGE_NAMES:
            raise ValueError("a storage has no type")
        self.push(Storage(_text(key), STORAGE_NAMES[kind.name]))

    def call(self, _: Any) -> None:
        """Put down what torch's functions would return."""
        arguments, what = self.pop(), self.pop()
        if not isinstance(what, _Named) or not isinstance(arguments, tuple):
            raise ValueError("a call of nothing")
        if what.name == DICT and not arguments:
            self.push({})
        elif what.name in PARAMETERS and arguments and isinstance(arguments[0], Described):
            self.push(arguments[0])
        elif what.name == TENSOR and len(arguments) > 3 and isinstance(arguments[0], Storage):
            self.push(Described(*arguments[:4]))
        else:
            raise ValueError(f"{what.name.split()[-1]} is called with something else")

    def add_items(self, items: list[Any]) -> None:
        self.push(target := self.pop())
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for what is not a dict")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str | int):
                raise ValueError("a name that is neither text nor a number")
            target[name] = value

    def append(self, values: list[Any]) -> None:
        self.push(target := self.pop())
        if not isinstance(target, list):
            raise ValueError("values for what is not a list")
        target += values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is not a text")
    return value


def _pair(machine: _Machine, _: Any) -> None:
    value, name = machine.pop(), machine.pop()
    machine.add_items([name, value])


Step = Callable[[_Machine, Any], object]
_VALUES = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES",
)  # fmt: skip
STEPS: dict[str, Step] = {
    **dict.fromkeys(_VALUES, _Machine.push),
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": _Machine.mark,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_marked())),
    "TUPLE1": lambda m, _: m.pop_tuple(1),
    "TUPLE2": lambda m, _: m.pop_tuple(2),
    "TUPLE3": lambda m, _: m.pop_tuple(3),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_marked()),
    "SETITEM": _pair,
    "SETITEMS": lambda m, _: m.add_items(m.pop_marked()),
    "BINPUT": _Machine.keep,
    "LONG_BINPUT": _Machine.keep,
    "MEMOIZE": _Machine.keep_next,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "BUILD": lambda m, _: m.pop(),  # an attribute, such as _metadata of a state dict
}
