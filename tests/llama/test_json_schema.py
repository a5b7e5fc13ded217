"""JSON schemas: what a grammar allows is valid; what cannot be kept to is refused by name."""

from __future__ import annotations

import json

import jsonschema
import pytest
from grammars import accepts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colm_edge.errors import ColmError
from colm_edge.llama.grammar import grammar_of
from colm_edge.llama.model import Model

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tiny):
    model = Model(tiny["base"])
    yield model
    model.close()


# A schema, texts that it allows, and texts that it does not.
KEPT = [
    ({"type": "integer", "minimum": -12, "maximum": 207}, "-12 -9 0 9 10 99 200 207", "-13 208 -0"),
    ({"type": "integer", "exclusiveMinimum": 9, "maximum": 1000}, "10 999 1000", "9 1001 010"),
    ({"type": "integer", "minimum": 0.5}, "1 12 999999", "0 -1"),
    ({"type": "integer", "maximum": -5}, "-5 -49 -50", "-4 0 5"),
    ({"type": "number", "minimum": 0, "maximum": 1}, "0 0.5 1 1.0", "1.01 -0.5 2"),
    ({"type": "number", "exclusiveMinimum": 0}, "0.001 1 17.5", "0 0.0 -1"),
    ({"type": "number", "exclusiveMaximum": 0}, "-0.001 -1", "0 -0 -0.0 1"),
    ({"type": "number", "minimum": -3, "exclusiveMaximum": 2}, "-3 -2.9 -0.5 1.99", "-3.1 2 2.0"),
    ({"type": ["integer", "null"], "minimum": 3}, "3 null 40", "2 -3"),
    ({"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, '"b"', '"a" "c"'),
    ({"type": "array", "maxItems": 1}, '[] [1] [{}]', "[1,2] 1"),
    ({"type": "array", "items": False}, "[]", "[null]"),
    ({"prefixItems": [{"type": "null"}], "minItems": 1}, "[null]", "[] [null,null]"),
    ({"items": {"type": "null"}, "minItems": 1.0, "maxItems": 2.0}, "[null]", "[]"),
    ({"const": "a", "enum": ["a", "b"], "type": "string"}, '"a"', '"b"'),
    (
        {"properties": {"ref-0": {"type": "object", "properties": {"x": {"const": 1}},
                                  "required": ["x"]}, "y": {"$ref": "#/$defs/a"}},
         "required": ["ref-0", "y"], "$defs": {"a": {"const": 2}}},
        '{"ref-0":{"x":1},"y":2}', '{"ref-0":{"x":1},"y":{"x":1}}',
    ),
    ({"type": "array", "items": {}, "minItems": 2}, '[1,"a"] [[],{}]', "[1]"),
    ({"required": ["a"]}, '{"a":1} {"a":[]}', "{} []"),
    ({"properties": {"a": True}, "required": ["a"]}, '{"a":null}', "{}"),
    ({"additionalProperties": {"type": "null"}}, '{} {"b":null}', '{"b":1}'),
    ({"title": "anything"}, '1 "a" [] {} null true', "x"),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 7}}}, "7", "8"),
    (
        {"properties": {"Item": {"type": "object", "properties": {"x": {"const": 1}}},
                        "y": {"$ref": "#/$defs/Item"}}, "$defs": {"Item": {"const": 2}}},
        '{"Item":{"x":1},"y":2}', '{"y":{"x":1}}',
    ),
    (
        {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
         "required": ["next"]},
        '{"next":{"next":null}}', '{"next":{}}',
    ),
    (
        {"$ref": "#/$defs/node", "$defs": {"node": {
            "type": "object", "required": ["v"], "additionalProperties": False,
            "properties": {"v": {"$ref": "#/$defs/v"}, "next": {"$ref": "#/$defs/node"}}},
            "v": {"$ref": "#/$defs/w"}, "w": {"enum": [1, 2]}}},
        '{"v":1} {"v":2,"next":{"v":1}}', '{"v":3} {"v":1,"next":{}}',
    ),
    # "type" holds for what stands beside it.
    ({"type": "integer", "anyOf": [{"minimum": 10}, {"maximum": -10}]}, "10 -11", "10.5 9 -9"),
    ({"type": "string", "enum": ["a", 1, None]}, '"a"', "1 null"),
    ({"type": ["integer", "null"], "enum": ["a", 1, 2.5, None, True]}, "1 null", '"a" 2.5 true'),
    ({"type": "object", "anyOf": [{"type": "string"}, {"type": "object"}]}, "{}", '"x"'),
    ({"type": "number", "oneOf": [{"type": "integer"}, {"type": "string"}]}, "3", '"x" 3.5'),
    ({"allOf": [{"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"type": "string"}]},
     '"a"', "1"),
    ({"properties": {"a": {"const": 1}}, "required": ["a"], "allOf": [
        {"properties": {"a": {"const": 1}}, "additionalProperties": False}]},
     '{"a":1}', '{"a":1,"b":2}'),
    ({"type": "string", "anyOf": [{"$ref": "#/$defs/a"}, True],
      "$defs": {"a": {"anyOf": [{"const": 1}, {"const": "b"}]}}}, '"b" "c"', "1"),
]  # fmt: skip


@pytest.mark.parametrize("text", [' \r \n " \\ ', "\\", "é😀", 'a"b', "\x00"])
def test_constants_and_names_of_any_characters(model, text):
    for schema, value in (
        ({"const": text}, text),
        ({"enum": [1, text]}, text),
        ({"properties": {text: {"const": 1}}, "required": [text]}, {text: 1}),
    ):
        written = json.dumps(value, ensure_ascii=False)
        assert accepts(model, grammar_of(schema), written), written


def test_a_name_like_our_own_is_the_users(model):
    names = ["colmrule0", "colmrulex", "colmrulex1", "colmref0", "colmref", "colmrefx0"]
    schema = {"properties": {name: {"$ref": "#/$defs/small"} for name in names}}
    schema |= {"required": names, "$defs": {"small": {"type": "integer", "maximum": 3}}}
    written = json.dumps(dict.fromkeys(names, 3))
    assert accepts(model, grammar_of(schema), written)
    assert accepts(model, grammar_of({"enum": names}), '"colmrulex1"')


@pytest.mark.parametrize(("schema", "allowed", "others"), KEPT)
def test_a_keyword_is_kept_to(model, schema, allowed, others):
    grammar = grammar_of(schema)
    for text in allowed.split():
        jsonschema.validate(json.loads(text), schema)
        assert accepts(model, grammar, text), text
    for text in others.split():
        assert not accepts(model, grammar, text), text


@STEADY
@given(bounds=st.tuples(st.integers(-2000, 2000), st.integers(-2000, 2000)), n=st.integers())
def test_whole_numbers_between_bounds(model, bounds, n):
    low, high = sorted(bounds)
    grammar = grammar_of({"type": "integer", "minimum": low, "maximum": high})
    for one in (n, low, high, low - 1, high + 1, (low + high) // 2):
        assert accepts(model, grammar, str(one)) == (low <= one <= high)


@STEADY
@given(
    ends=st.tuples(st.integers(-30, 30), st.integers(-30, 30)).filter(lambda x: x[0] != x[1]),
    n=st.integers(-3100, 3100),
    excludes=st.tuples(st.booleans(), st.booleans()),
)
def test_numbers_between_bounds(model, ends, n, excludes):
    low, high = sorted(ends)
    keys = [
        f"exclusive{name.capitalize()}" if excluded else name
        for name, excluded in zip(("minimum", "maximum"), excludes, strict=True)
    ]
    schema = {"type": "number", keys[0]: low, keys[1]: high}
    grammar = grammar_of(schema)
    for text in (f"{n / 100:.2f}", str(low), str(high), f"{low}.0", f"{high}.5"):
        valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        assert accepts(model, grammar, text) == valid, text


REFUSED = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "minProperties": {"type": "object", "minProperties": 1},
    "patternProperties": {"type": "object", "patternProperties": {"^a": {}}},
    "propertyNames": {"propertyNames": {"maxLength": 2}},
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "minimum": {"type": "number", "minimum": 0.5},
    "a length beside a pattern": {"type": "string", "minLength": 2, "pattern": "^a+$"},
    "contains": {"type": "array", "contains": {"const": 1}},
    "not": {"not": {"type": "null"}},
    "if": {"if": {}, "then": {"const": 1}},
    "required 'b'": {"properties": {}, "required": ["b"], "additionalProperties": False},
    "properties": {"properties": {"a": {"const": 1}}, "anyOf": [{"required": ["a"]}]},
    "minItems": {"prefixItems": [{"const": 1}], "minItems": 2},
    "additionalProperties in allOf": {
        "allOf": [
            {"properties": {"a": {"const": 1}}, "additionalProperties": False},
            {"properties": {"b": {"const": 2}}},
        ]
    },
    "maxLength in allOf": {"allOf": [{"maxLength": 2}, {"maxLength": 3}]},
}


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_cannot_be_kept_to_is_refused_by_name(keyword):
    schema = {"type": "object", "properties": {"deep": REFUSED[keyword]}}
    with pytest.raises(ColmError) as refused:
        grammar_of(schema)
    assert f"{keyword}" in str(refused.value)
    assert "of deep" in str(refused.value)


@pytest.mark.parametrize("keyword", REFUSED)
def test_or_is_left_out_where_that_is_wanted(keyword):
    assert "root" in grammar_of(REFUSED[keyword], strict=False)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "kaboom"}, "the type of the schema"),
        ({"type": 123}, "the type of the schema"),
        ({"properties": {"a": 7}}, "a is '7'"),
        ({"$ref": "#/nowhere"}, "which is not there"),
        ({"$ref": "http://a.example/b"}, "expected #/"),
        ({"$ref": "#item", "$defs": {"item": {"$anchor": "item", "const": 1}}}, "expected #/"),
        ({"const": 1, "enum": [2, 3]}, "is not in its enum"),
        ({"enum": []}, "enum of the schema is []"),
        ({"prefixItems": {"type": "null"}}, "prefixItems of the schema is not a list"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no number is between"),
        ({"type": "string", "const": 5}, "no const of the schema is of the type string"),
        ({"type": "null", "anyOf": [{"type": "string"}]}, "no anyOf of the schema is of the type"),
        ({"type": "array", "items": False, "minItems": 1}, "items allows none"),
        ({"$ref": "#"}, "which leads to itself"),
        (
            {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
            "which leads to itself",
        ),
        (
            {
                "type": "null",
                "anyOf": [{"$ref": "#/$defs/a"}],
                "$defs": {"a": {"$ref": "#/$defs/a"}},
            },
            "which leads to itself",
        ),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            },
            "which leads to itself",
        ),
        ({"type": "integer", "minimum": "3"}, "expected a number"),
        ({"type": "string", "pattern": 5}, "expected a text"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_schema_is_told(schema, words, strict):
    with pytest.raises(ColmError, match="the JSON schema cannot be used") as refused:
        grammar_of(schema, strict=strict)
    assert words in str(refused.value)


@pytest.mark.parametrize("keyword", ["anyOf", "allOf"])
def test_references_that_double_end_in_a_line(keyword):
    """Each of twenty leads twice to the next one."""
    both = {
        f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
        for i in range(20)
    }
    defs = {**both, "d20": {"const": "x"}}
    schema = {"type": "string", keyword: [{"$ref": "#/$defs/d0"}], "$defs": defs}
    with pytest.raises(ColmError, match="more than 10,000 references"):
        grammar_of(schema)
