"""Jinja in bounds: a chat template is a program, and comes with a model from anywhere.

Jinja's sandbox keeps a template from Python's insides, not from looping for ever or filling the
memory. Here everything that a template makes is measured where it is made: each text, list and dict
has a greatest size, and all of them together have one. What could make much of little (`*`, `%`,
`join`, `replace` …) tells how much it will be before it runs. Every step looks at the clock.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sized,
    ValuesView,
)
from functools import wraps
from typing import Any

from jinja2 import BaseLoader, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 10.0
# Sizes are counted in characters; an item of a list or dict counts as many.
ITEM = 64
STEP = 16  # one more time around a loop
LONGEST_TEMPLATE = 100_000
LARGEST = 1 << 23  # one text, or one list with all that is in it
MOST = 1 << 27  # all that is made during one rendering
MOST_BITS = 4096  # of a whole number
LONGEST_PATTERN = 1000  # where looking for one takes the product of both lengths
# Filters that make no more than they are given, and the others, whose size is told before.
FILTERS_KEPT = (
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e",
    "escape", "first", "float", "forceescape", "format", "groupby", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string",
    "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
)  # fmt: skip
TEXT_METHODS = {
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum",
    "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle",
    "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper", "zfill",
}  # fmt: skip
PARENTHESIS = re.compile("[()]")
WIDTH = re.compile(r"[-+ #0-9.*]*")  # in what follows a % and its name
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # as str.splitlines has them


class TemplateLimitError(Exception):
    """A template takes too long, or makes too much."""


class Spent:
    """What one rendering has taken."""

    def __init__(self) -> None:
        self._until = time.monotonic() + SECONDS
        self._left = MOST
        # A list may be in another a thousand times. Each is kept, so that its id stays its own.
        self._weights: dict[int, tuple[object, int]] = {}

    def step(self, size: int = STEP) -> None:
        """Count what is made or done. Raises TemplateLimitError where that is too much."""
        self._left -= max(0, size)
        if size > LARGEST or self._left < 0:
            raise TemplateLimitError("it makes too much text, or too long a list")
        if time.monotonic() > self._until:
            raise TemplateLimitError(f"it was not done after {SECONDS:g} seconds")

    def weight(self, value: object) -> int:
        """Return how much a value holds, all that is in it included."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, list | tuple | Mapping):
            return ITEM
        known = self._weights.get(id(value))
        if known is None:
            inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            weight = ITEM
            for item in inside:
                weight += ITEM + self.weight(item)
                if weight > LARGEST:
                    raise TemplateLimitError("it makes too large a list")
            known = self._weights[id(value)] = value, weight
        return known[1]


class _Steps:
    """Something to loop over, a step each."""

    def __init__(self, spent: Spent, value: Iterable[Any]) -> None:
        self._spent, self._value = spent, value

    def __iter__(self) -> Iterator[Any]:
        for item in self._value:
            self._spent.step()
            yield item


class _SizedSteps(_Steps):
    def __len__(self) -> int:
        return len(self._value)  # type: ignore[arg-type]


class _Namespace(Namespace):
    """Its text tells nothing of what it holds, which may be itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """The tag {% generation %}, which only training reads."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Code(CodeGenerator):
    """Writes Jinja's code with a look at whatever an expression makes or a loop walks over."""

    MADE = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Getitem, nodes.BinExpr)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        looks = isinstance(node, self.MADE) and getattr(node, "ctx", "load") == "load"
        if looks:
            self.write("environment.made(")
        super().visit(node, *args, **kwargs)
        if looks:
            self.write(")")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        steps = nodes.EnvironmentAttribute("steps")
        node.iter = nodes.Call(steps, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's environment for chat templates, as transformers sets it up. One rendering at a time:
    `spent` is its own."""

    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            loader=BaseLoader(), trim_blocks=True, lstrip_blocks=True, optimized=False,
            extensions=[_Generation, loopcontrols], finalize=self._written,
        )  # fmt: skip
        self.spent = Spent()
        self.filters = {
            name: self._bounded(name, FILTERS[name] if name != "tojson" else self._to_json)
            for name in FILTERS_KEPT
        }
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace

    # What is made

    def made(self, value: Any) -> Any:
        """Count a new value, and return it; a list instead of what makes its items later."""
        if isinstance(value, str):
            self.spent.step(len(value) + STEP)
        elif isinstance(value, list | tuple | dict):
            self.spent.step(ITEM * len(value))
            self.spent.weight(value)
        elif isinstance(value, int):
            self.spent.step()
            if value.bit_length() > MOST_BITS:
                raise TemplateLimitError("it makes too large a number")
        elif isinstance(value, Iterator | ItemsView | KeysView | ValuesView):
            return self.made(list(self._all_of(value)))
        else:
            self.spent.step()
        return value

    def _all_of(self, items: Iterable[Any]) -> Iterator[Any]:
        for n, item in enumerate(items):
            self.spent.step(ITEM)
            if n * ITEM > LARGEST:
                raise TemplateLimitError("it makes too long a list")
            yield item

    def steps(self, value: Any) -> Any:
        """Return what a loop walks over."""
        return (_SizedSteps if isinstance(value, Sized) else _Steps)(self.spent, value)

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces that a template writes."""
        found, size = [], 0
        for piece in pieces:
            size += len(piece)
            self.spent.step(len(piece) + STEP)
            if size > LARGEST:
                raise TemplateLimitError("it makes too long a text")
            found.append(piece)
        return "".join(found)

    def joined(self, values: tuple[Any, ...]) -> str:
        """Return `a ~ b`."""
        for value in values:
            self.spent.step(self.spent.weight(value))
        return self.concat(map(str, values))

    @pass_context
    def _written(self, _: Context, value: Any) -> Any:
        """Count a value that is written as text."""
        self.spent.step(self.spent.weight(value))
        return value

    # What makes it

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self.spent.step(_size_of_product(self.spent, left, right))
        elif operator == "%" and isinstance(left, str):
            self.spent.step(_size_of_percent(self.spent, left, right))
        elif operator == "**" and not (abs(right) <= 64 and abs(left) < 1 << 64):
            raise TemplateLimitError("it makes too large a number")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spent.step()
        text = getattr(obj, "__self__", None)
        size = TEXT_SIZES.get(obj.__name__) if isinstance(text, str) else None
        if size is not None:
            named = {name: value for name, value in kwargs.items() if name[0] != "_"}  # Jinja's own
            self.spent.step(size(self.spent, text, *args, **named))
        return self.made(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in TEXT_METHODS
        return not isinstance(obj, int | float) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        plain = super().wrap_str_format(value)
        if plain is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            size = _size_of_braces(self.spent, value.__self__, [args, kwargs])
            self.spent.step(size)
            return plain(*args, **kwargs)

        return bounded

    def _bounded(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that tells before how much it makes, and counts it."""
        first = 1 if hasattr(run, "jinja_pass_arg") else 0  # after Jinja's own argument
        size = FILTER_SIZES.get(name)

        @wraps(run)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            for value in (*args[first:], *kwargs.values()):
                self.spent.step(STEP + (len(value) if isinstance(value, str) else 0))
                self.spent.weight(value)
            if size is not None:
                self.spent.step(size(self.spent, *args[first:], **kwargs))
            return self.made(run(*args, **kwargs))

        return bounded

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Return JSON as transformers writes it in templates, without escapes for HTML."""
        width = indent if isinstance(indent, int) else len(indent or "")
        if width > 16 or sum(map(len, separators or ())) > 16:
            raise TemplateLimitError("it makes too long a text")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self.concat(encoder.iterencode(value))


# How much something makes of what it is given, in characters: told before it runs.


def _size_of_product(spent: Spent, left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            return max(0, times) * (len(value) if isinstance(value, str) else spent.weight(value))
    return STEP


def _size_of_percent(spent: Spent, text: str, *values: Any, **named: Any) -> int:
    widths = list(_widths(text))
    if any("*" in width for width in widths):
        raise TemplateLimitError("it sets a width by a number")
    each = spent.weight([list(values), list(named.values())])
    return len(text) + len(widths) * each + _sum_of_numbers(widths)


def _widths(text: str) -> Iterator[str]:
    """Yield the width and precision of each % in a text. Python's names of values nest."""
    at = text.find("%") + 1
    while at:
        if text.startswith("(", at):
            depth = 0
            for found in PARENTHESIS.finditer(text, at):
                depth, at = depth + (1 if found[0] == "(" else -1), found.end()
                if not depth:
                    break
        width = WIDTH.match(text, at)
        assert width is not None, "it may be empty"
        yield width[0]
        at = text.find("%", width.end()) + 1


def _size_of_braces(spent: Spent, text: str, values: Any) -> int:
    fields = re.findall(r"\{([^{}]*)([{}]?)", text.replace("{{", "").replace("}}", ""))
    if any(end == "{" for _, end in fields):
        raise TemplateLimitError("it sets a width by a number")
    each = spent.weight([list(values[0]), values[1]])
    return len(text) + len(fields) * each + _sum_of_numbers(inside for inside, _ in fields)


def _sum_of_numbers(texts: Iterable[str]) -> int:
    found = [number for text in texts for number in re.findall(r"\d+", text)]
    if any(len(number) > 9 for number in found):
        raise TemplateLimitError("it makes too long a text")
    return sum(map(int, found))


def _size_of_join(spent: Spent, value: Any, d: Any = "", attribute: Any = None) -> int:
    if not isinstance(value, Sized):
        value = ()
    each = len(d) if isinstance(d, str) else ITEM
    return len(value) * each + STEP


def _size_of_replace(spent: Spent, text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    return len(str(text)) + len(str(new)) * str(text).count(str(old))


def _size_of_width(spent: Spent, text: Any, width: Any = 80, *_: Any) -> int:
    return int(width)


def _size_of_indent(spent: Spent, text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    each: int = width if isinstance(width, int) else len(str(width))
    lines = str(text)
    return (sum(map(lines.count, LINE_ENDS)) + 2) * each


def _size_of_strip(spent: Spent, text: Any, characters: Any = None) -> int:
    """Each character of the text is looked for among the others."""
    return LARGEST + 1 if len(str(characters or "")) > LONGEST_PATTERN else STEP


def _size_of_search(spent: Spent, text: Any, pattern: Any = None, *_: Any, **__: Any) -> int:
    """From the end, Python looks for a pattern at each place of a text."""
    return _size_of_strip(spent, text, pattern)


def _size_of_number(spent: Spent, value: Any, *_: Any, **__: Any) -> int:
    """Python's way to a float takes the square of its digits."""
    return _size_of_strip(spent, value, value if isinstance(value, str) else None)


def _size_of_rows(spent: Spent, value: Any, n: Any, *_: Any, **__: Any) -> int:
    return abs(int(n)) * ITEM


def _size_of_round(spent: Spent, value: Any, precision: Any = 0, *_: Any, **__: Any) -> int:
    if abs(int(precision)) > 300:
        raise TemplateLimitError("it makes too large a number")
    return STEP


def _size_of_sum(spent: Spent, value: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise TemplateLimitError("it adds up what are no numbers")
    return STEP


Size = Callable[..., int]
TEXT_SIZES: dict[str, Size] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _size_of_width),
    "join": lambda spent, text, values: _size_of_join(spent, values, text),
    "replace": _size_of_replace,
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _size_of_strip),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "rsplit"), _size_of_search),
}
FILTER_SIZES: dict[str, Size] = {
    "batch": _size_of_rows,
    "center": _size_of_width,
    "float": _size_of_number,
    "format": _size_of_percent,
    "indent": _size_of_indent,
    "join": _size_of_join,
    "replace": _size_of_replace,
    "round": _size_of_round,
    "slice": _size_of_rows,
    "sum": _size_of_sum,
    "trim": _size_of_strip,
}
