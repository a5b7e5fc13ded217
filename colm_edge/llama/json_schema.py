"""JSON schemas in the few words that llama-cpp-python translates into a grammar as they are meant.

Its translation ignores what it does not know, and then answers are not valid. So each keyword is
rewritten here, or refused by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from colm_edge.llama.json_pattern import MOST_REPEATED, string_between, string_of

Json = dict[str, Any]
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "number": BOUNDS,
    "integer": BOUNDS,
    "boolean": set[str](),
    "null": set[str](),
}
# What says nothing about which answers are valid, as validators read it.
ANNOTATIONS = {
    "title", "description", "default", "examples", "example", "format", "strict", "deprecated",
    "readOnly", "writeOnly", "discriminator", "contentEncoding", "contentMediaType", "nullable",
    "$schema", "$id", "$comment", "$defs", "$anchor", "definitions",
}  # fmt: skip
ANY: Json = {"type": ["object", "array", "string", "number", "boolean", "null"]}
DIGITS = 15  # the most of an unbounded number
# References that are looked up: where each of two leads to two more, they would not end.
MOST_LOOKUPS = 10_000


class Plain:
    """A schema that was rewritten.

    strict: whether a keyword that cannot be kept to is an error; else it is left out.
    schema: for the translation. rules: by a constant text in it, the GBNF that has to stand there.

    Raises ValueError that names a keyword and its place.
    """

    def __init__(self, schema: Mapping[str, Any], *, strict: bool) -> None:
        self._root, self._strict = schema, strict
        self._refs: dict[str, str] = {}  # the name of each definition that is referred to
        self._defs: Json = {}
        self._n_lookups = 0
        self.rules: dict[str, str] = {}
        said = json.dumps(schema)
        self._stand_in, self._ref = _not_in(said, "colmrule"), _not_in(said, "colmref")
        self.schema = self._of(schema, "") if schema else {"type": "object"}
        if "$ref" in self.schema:  # at the root the translation does not look it up
            self.schema = {"anyOf": [self.schema]}
        if self._defs:
            self.schema = {**self.schema, "$defs": self._defs}

    def _of(self, schema: Any, path: str) -> Json:
        """Return a schema rewritten. path: where it stands."""
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise ValueError(f"{_place(path)} is {str(schema)[:40]!r}; expected an object")
        given = {
            key: value
            for key, value in schema.items()
            if key not in ANNOTATIONS and not key.startswith("x-")
        }
        if "allOf" in given:
            return self._of(self._merged(given, path), path)
        for key, more in (
            ("$ref", ()),
            ("anyOf", ("type",)),
            ("oneOf", ("type",)),
            ("const", ("type", "enum")),
            ("enum", ("type",)),
        ):
            if key in given:
                self._only(given, {key, *more}, path)
                if key == "const" and given[key] not in given.get("enum", [given[key]]):
                    raise ValueError(f"const of {_place(path)} is not in its enum")
                kinds = self._kinds(given.get("type"), path)
                value = self._of_kinds(key, given[key], kinds, path) if kinds else given[key]
                return self._choice(key, value, path)
        kinds = self._kinds(given.pop("type", None), path)
        if not kinds:
            kinds = [kind for kind, keys in KEYWORDS.items() if keys & given.keys()][:1]
        self._only(given, {"uniqueItems"}.union(*(KEYWORDS[kind] for kind in kinds)), path)
        if not kinds:
            return ANY
        found = [self._typed(kind, given, path, schema.get("format")) for kind in kinds]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def _kinds(self, given: Any, path: str) -> list[str]:
        """Return the types that a "type" names; none where there is none."""
        kinds = [given] if isinstance(given, str) else given or []
        if not isinstance(kinds, list) or not all(kind in TYPES for kind in kinds):
            raise ValueError(f"the type of {_place(path)} is {str(given)[:40]}")
        return kinds

    def _of_kinds(self, key: str, value: Any, kinds: Sequence[str], path: str) -> Any:
        """Return the value of a keyword beside "type", with what is of these types alone."""
        if key == "$ref" or (key != "const" and not (value and isinstance(value, list))):
            return value  # which is refused for itself
        left = self._left(key, value, kinds, path)
        if not left:
            raise ValueError(f"no {key} of {_place(path)} is of the type {' or '.join(kinds)}")
        return left[0] if key == "const" else left

    def _left(self, key: str, value: Any, kinds: Sequence[str], path: str) -> list[Any]:
        """Return what is of these types, of the one value or the several of a keyword."""
        if key in ("const", "enum"):
            return [one for one in ([value] if key == "const" else value) if _is_of(one, kinds)]
        found = (self._branch(one, kinds, f"{path}.{key}.{i}") for i, one in enumerate(value))
        return [one for one in found if one is not None]

    def _branch(self, branch: Any, kinds: Sequence[str], path: str) -> Any:
        """Return a branch of anyOf with what is of these types, None if nothing of it is."""
        if not isinstance(branch, Mapping):
            return {"type": list(kinds)} if branch is True else branch
        flat = self._flat(branch, path)
        own = self._kinds(flat.get("type"), path)
        both = [
            kind for kind in own or kinds
            if not own or kind in kinds or (kind == "integer" and "number" in kinds)
        ]  # fmt: skip
        if own and "number" in own and "integer" in kinds and "integer" not in both:
            both.append("integer")
        for key in flat.keys() & {"const", "enum", "anyOf", "oneOf"} if both else ():
            if not self._left(key, flat[key], both, path):
                return None
        if own == both:
            return branch
        return {**flat, "type": both} if both else None

    def _refuse(self, keyword: str, path: str) -> None:
        """Raise ValueError where that is wanted; else the keyword counts as left out."""
        if self._strict:
            raise ValueError(f"{keyword} of {_place(path)} cannot be kept to; leave it out")

    def _only(self, given: Json, known: set[str], path: str) -> None:
        for keyword in sorted(given.keys() - known):
            self._refuse(keyword, path)

    def _choice(self, key: str, value: Any, path: str) -> Json:
        if key == "$ref":
            return {"$ref": f"#/$defs/{self._name_of(value, path)}"}
        if key == "const":
            return {"const": self._written(value)}
        if not isinstance(value, list) or not value:
            raise ValueError(f"{key} of {_place(path)} is {str(value)[:40]}; expected a list")
        if key == "enum":
            return {"enum": [self._written(one) for one in value]}
        return {"anyOf": [self._of(one, f"{path}.{key}.{i}") for i, one in enumerate(value)]}

    def _written(self, value: Any) -> Any:
        """Return a constant, or what stands for one that the translation would not quote right."""
        if "\\" not in json.dumps(value):
            return value
        text = json.dumps(value, ensure_ascii=False)
        escaped = text.replace("\\", r"\\").replace('"', r"\"")
        return self._stands_for(f'"{escaped}"')

    def _stands_for(self, rule: str) -> str:
        """Return a constant that stands for a rule."""
        name = f"{self._stand_in}{len(self.rules)}"
        self.rules[name] = rule
        return name

    def _name_of(self, ref: Any, path: str) -> str:
        """Return the name of what a reference points to, which is rewritten once."""
        if ref not in self._refs:
            target, seen = self._target(ref, path), [ref]
            while isinstance(target, Mapping) and target.keys() - ANNOTATIONS == {"$ref"}:
                self._see(target["$ref"], seen, path)
                target = self._target(target["$ref"], path)
            name = self._refs[ref] = f"{self._ref}{len(self._refs)}"
            self._defs[name] = self._of(target, str(ref))
        return self._refs[ref]

    def _found(self, schema: Any, path: str) -> Any:
        """Return a schema with what its reference leads to, over others if need be, in it."""
        seen = list[Any]()
        while isinstance(schema, Mapping) and "$ref" in schema:
            ref, more = schema["$ref"], {key: x for key, x in schema.items() if key != "$ref"}
            self._see(ref, seen, path)
            target = self._target(ref, path)
            schema = {**target, **more} if isinstance(target, Mapping) else target
        return schema

    @staticmethod
    def _see(ref: Any, seen: list[Any], path: str) -> None:
        if ref in seen:
            raise ValueError(f"$ref of {_place(path)} is {ref!r}, which leads to itself")
        seen.append(ref)

    def _target(self, ref: Any, path: str) -> Any:
        if not isinstance(ref, str) or not f"{ref}/".startswith("#/"):
            raise ValueError(f"$ref of {_place(path)} is {str(ref)[:80]!r}; expected #/…")
        self._n_lookups += 1
        if self._n_lookups > MOST_LOOKUPS:
            raise ValueError(f"it leads through more than {MOST_LOOKUPS:,} references; simplify it")
        target: Any = self._root
        for escaped in ref.removeprefix("#").split("/")[1:]:
            key = escaped.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key) if isinstance(target, list) else key]
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"$ref of {_place(path)} is {ref!r}, which is not there") from None
        return target

    def _merged(self, given: Mapping[str, Any], path: str) -> Json:
        """Return one schema for a schema and all of its allOf."""
        found = {key: value for key, value in given.items() if key != "allOf"}
        parts = [self._flat(one, path) for one in given["allOf"]]
        self._check_others([found, *parts], path)
        for part in parts:
            for key, value in part.items():
                if key in ANNOTATIONS or found.get(key, value) == value:
                    found.setdefault(key, value)
                elif key == "properties" and not found[key].keys() & value.keys():
                    found[key] = {**found[key], **value}
                elif key == "required":
                    found[key] = [*found[key], *value]
                elif key == "enum":
                    found[key] = [one for one in found[key] if one in value]
                else:
                    self._refuse(f"{key} in allOf", path)
        return found

    def _check_others(self, parts: Sequence[Mapping[str, Any]], path: str) -> None:
        """Refuse what a part says of properties beside its own, where other parts have some."""
        each = [part.get("properties", {}) for part in parts]
        names = {name for own in each if isinstance(own, Mapping) for name in own}
        for part, own in zip(parts, each, strict=True):
            if part.get("additionalProperties", True) is not True and names - {*own}:
                self._refuse("additionalProperties in allOf", path)

    def _flat(self, part: Any, path: str) -> Json:
        """Return a part of an allOf without references and parts of its own."""
        part = self._found(part, path)
        if not isinstance(part, Mapping):
            raise ValueError(f"allOf of {_place(path)} holds {str(part)[:40]!r}; expected objects")
        return self._merged(part, path) if "allOf" in part else dict(part)

    def _typed(self, kind: str, given: Json, path: str, form: Any) -> Json:
        """Return the schema of one type, from the keywords that are about it."""
        mine = {key: value for key, value in given.items() if key in KEYWORDS[kind]}
        match kind:
            case "object":
                return self._object(mine, path)
            case "array":
                if given.get("uniqueItems") and given.get("maxItems", 2) > 1:
                    self._refuse("uniqueItems", path)
                return self._array(mine, path)
            case "string":
                if mine and (rule := self._string(mine, path)):
                    return {"const": self._stands_for(f"{rule} space")}
                return {"type": kind, **({"format": form} if form and not mine else {})}
            case "integer" | "number" if mine:
                return self._number(mine, path, whole=kind == "integer")
        return {"type": kind}

    def _string(self, given: Json, path: str) -> str | None:
        """Return the GBNF of strings with a pattern or of some lengths; None where that was refused
        and is left out."""
        if "pattern" not in given:
            low, high = given.get("minLength", 0), given.get("maxLength")
            self._check_limits("Length", low, high, path)
            return string_between(int(low), None if high is None else int(high))
        pattern = given["pattern"]
        if len(given) > 1:
            self._refuse("a length beside a pattern", path)
        if not isinstance(pattern, str):
            raise ValueError(f"pattern of {_place(path)} is {str(pattern)[:40]!r}; expected a text")
        try:
            return string_of(pattern)
        except ValueError as e:
            self._refuse(f"pattern {pattern[:40]} ({e})", path)
            return None

    @staticmethod
    def _check_limits(of_what: str, low: Any, high: Any, path: str) -> None:
        """Raise ValueError for limits that are not numbers, or contradict each other."""
        for key, value in (f"min{of_what}", low), (f"max{of_what}", high):
            if value is not None and (isinstance(value, bool) or not _is_count(value)):
                raise ValueError(f"{key} of {_place(path)} is {str(value)[:40]}; expected a count")
        if high is not None and high < low:
            raise ValueError(f"max{of_what} of {_place(path)} is {high}, below min{of_what}, {low}")

    def _object(self, given: Json, path: str) -> Json:
        properties = {
            name: self._of(one, f"{path}.{name}")
            for name, one in given.get("properties", {}).items()
        }
        required, others = given.get("required", []), given.get("additionalProperties", True)
        for name in required:
            if name not in properties and others is False:
                self._refuse(f"required {name!r}, which is not among the properties,", path)
            elif name not in properties:
                properties[name] = self._of(others, f"{path}.{name}")
        if properties:  # a name that comes twice would not be seen: no others are written
            names = {name: self._written(name) for name in properties}
            return {
                "type": "object",
                "properties": {names[name]: one for name, one in properties.items()},
                "required": [names[name] for name in required if name in names],
                "additionalProperties": False,
            }
        if others is False:
            return {"type": "object", "additionalProperties": False}
        if others is True or not others:
            return {"type": "object"}
        values = self._of(others, f"{path}.additionalProperties")
        return {"type": "object", "additionalProperties": values}

    def _array(self, given: Json, path: str) -> Json:
        if not given:
            return {"type": "array"}
        items, first = given.get("items", True), given.get("prefixItems")
        low, high = given.get("minItems", 0), given.get("maxItems")
        first = items if isinstance(items, list) else first
        if first is not None:  # exactly these are written
            if not isinstance(first, list):
                raise ValueError(f"prefixItems of {_place(path)} is not a list; expected schemas")
            if low > len(first) or (high is not None and high < len(first)):
                self._refuse("minItems or maxItems beside prefixItems", path)
            return {"prefixItems": [self._of(x, f"{path}.{i}") for i, x in enumerate(first)]}
        if items is False:
            if low > 0:
                raise ValueError(f"minItems of {_place(path)} is {low}, and items allows none")
            return {"type": "array", "items": {"type": "null"}, "maxItems": 0}
        self._check_limits("Items", low, high, path)
        limits = {"minItems": int(low)} | ({} if high is None else {"maxItems": int(high)})
        for key in [key for key, value in limits.items() if value > MOST_REPEATED]:
            self._refuse(f"{key} {limits.pop(key)}, which is above {MOST_REPEATED},", path)
        return {"type": "array", "items": self._of(items, f"{path}.items"), **limits}

    def _number(self, given: Json, path: str, *, whole: bool) -> Json:
        """Return a constant that stands for the numbers between bounds."""
        low, high = -math.inf, math.inf
        open_low = open_high = False
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{key} of {_place(path)} is {value!r}; expected a number")
            if not whole and value != int(value):
                self._refuse(f"{key} {value}, which is not whole,", path)
                continue
            excludes = key.startswith("exclusive")
            if key.lower().endswith("minimum") and (value, excludes) > (low, open_low):
                low, open_low = value, excludes
            elif key.lower().endswith("maximum") and (-value, excludes) > (-high, open_high):
                high, open_high = value, excludes
        if whole:
            rule = " | ".join(_signed(_first(low, past=open_low), -_first(-high, past=open_high)))
        else:
            rule = " | ".join(_reals(low, high, open_low=open_low, open_high=open_high))
        if not rule:
            raise ValueError(f"no number is between the bounds of {_place(path)}")
        return {"const": self._stands_for(f"({rule}) space")}


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0 and value == int(value)


def _is_of(value: Any, kinds: Sequence[str]) -> bool:
    """Return whether a JSON value is of one of these types."""
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, int | float):
        return "number" in kinds or ("integer" in kinds and value == int(value))
    known: dict[str, type] = {
        "string": str, "null": type(None), "array": list, "object": dict,
    }  # fmt: skip
    return any(isinstance(value, known[kind]) for kind in kinds if kind in known)


def _not_in(text: str, word: str) -> str:
    """Return a word that a text does not hold, by adding to it if need be."""
    while word in text:
        word += "x"
    return word


def _place(path: str) -> str:
    return path.lstrip(".") or "the schema"


def _first(bound: float, *, past: bool) -> float:
    """Return the first whole number from a bound on. past: whether the bound is excluded."""
    if math.isinf(bound):
        return bound
    return math.floor(bound) + 1 if past else math.ceil(bound)


def _signed(low: float, high: float) -> Iterator[str]:
    """Yield GBNF for the whole numbers from low to high."""
    if low < 0:
        yield from (f'"-" {one}' for one in _whole(max(1, -high), -low))
    if high >= 0:
        yield from _whole(max(0, low), high)


def _reals(low: float, high: float, *, open_low: bool, open_high: bool) -> Iterator[str]:
    """Yield GBNF for the numbers between two whole ones. open: whether a bound is excluded."""
    if low < 0:
        ends = {"open_low": open_high, "open_high": open_low}
        yield from (f'"-" {one}' for one in _unsigned(max(0, -high), -low, **ends, past=high <= 0))
    if high > 0 or (high == 0 and not open_high):
        past = low >= 0
        yield from _unsigned(
            max(0, low), high, open_low=open_low and past, open_high=open_high, past=past
        )


def _unsigned(
    low: float, high: float, *, open_low: bool, open_high: bool, past: bool
) -> Iterator[str]:
    """Yield GBNF for the numbers from low to high, neither negative. past: whether low is a bound,
    and not the zero between negative and positive numbers."""
    if low > high:
        return
    if past and open_low:
        if low < high:
            yield f'"{int(low)}" "." "0"{{0,{DIGITS}}} [1-9] [0-9]{{0,{DIGITS}}}'
        low += 1
    if low < high:
        whole = " | ".join(_whole(low, high - 1))
        yield f'({whole}) ("." [0-9]{{1,{DIGITS}}})?'
    if high < math.inf and not open_high and low <= high:
        yield f'"{int(high)}" ("." "0"{{1,{DIGITS}}})?'


def _whole(low: float, high: float) -> Iterator[str]:
    """Yield GBNF for the whole numbers from low to high, neither negative."""
    if low > high:
        return
    start = str(int(low))
    if high == math.inf:
        yield from _same_length(start, "9" * len(start))
        if len(start) <= DIGITS:
            yield f"[1-9] [0-9]{{{len(start)},{DIGITS}}}"
        return
    end = str(int(high))
    for n in range(len(start), len(end) + 1):
        first = start if n == len(start) else "1" + "0" * (n - 1)
        yield from _same_length(first, end if n == len(end) else "9" * n)


def _same_length(low: str, high: str) -> Iterator[str]:
    """Yield GBNF for the numbers from low to high, which have as many digits."""
    if not low:
        yield ""
        return
    rest = len(low) - 1
    if low[0] == high[0]:
        yield from (f'"{low[0]}" {one}' for one in _same_length(low[1:], high[1:]))
        return
    first, last = int(low[0]), int(high[0])
    if low[1:] != "0" * rest:
        yield from (f'"{first}" {one}' for one in _same_length(low[1:], "9" * rest))
        first += 1
    ends_early = high[1:] != "9" * rest
    if first <= last - ends_early:
        any_digits = f" [0-9]{{{rest}}}" if rest else ""
        yield f"[{first}-{last - ends_early}]{any_digits}"
    if ends_early:
        yield from (f'"{last}" {one}' for one in _same_length("0" * rest, high[1:]))
