"""Patterns and lengths of strings in JSON schemas: what the grammar allows is what matches."""

from __future__ import annotations

import json
import re

import pytest
from grammars import accepts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colm_edge.errors import ColmError
from colm_edge.llama.grammar import Grammar, grammar_of
from colm_edge.llama.json_pattern import string_of
from colm_edge.llama.model import Model

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ATOMS = (
    "a", "b", "1", " ", '"', "-", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"\.", r"\\",
    "[ab]", "[^ab]", "[^@]", "[a-c1]", r"[\w.-]", r"[^\s\"]", r"[\\\"]", "[ -~]", "[-a]", "[a-]",
    "(a|b)", "(?:ab)", "(?<x>a|1b)", "(a(b|1)?)", "é", r"\u00e9", r"\x61", r"\n", "{",
)  # fmt: skip
TIMES = ("", "", "", "*", "+", "?", "{2}", "{1,2}", "{1,}", "*?", "{0}")
LETTERS = 'aab1 "\\é_-.@\n{'


@pytest.fixture(scope="module")
def model(tiny):
    model = Model(tiny["base"])
    yield model
    model.close()


def patterns():
    part = st.tuples(st.sampled_from(ATOMS), st.sampled_from(TIMES)).map("".join)
    inside = st.lists(part, max_size=4).map("".join)
    one = st.tuples(st.sampled_from(["^", "^", ""]), inside, st.sampled_from(["$", "$", ""]))
    return st.lists(one.map("".join), min_size=1, max_size=2).map("|".join)


@STEADY
@given(pattern=patterns(), text=st.text(LETTERS, max_size=6))
def test_a_string_is_allowed_where_the_pattern_is_found(model, pattern, text):
    grammar = grammar_of({"type": "string", "pattern": pattern})
    ours = pattern.replace("(?<", "(?P<").replace("$", r"\Z")
    if ours.count("(?P<x>") > 1:
        return  # Python wants each name once
    expected = re.search(ours, text, re.ASCII) is not None
    assert accepts(model, grammar, json.dumps(text, ensure_ascii=False)) == expected


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("^yes|no$", ['"yes"', '"no"', '"yes!"', '"oh no"'], ['"maybe"', '"yes', 'no"']),
        ("^yes$|^no$", ['"yes"', '"no"'], ['"yes!"', '"oh no"', 'no"']),
        ("^.{3}$", ['"abc"', r'"a\"b"', r'"a\\b"'], ['"a"b"', '"ab"', '"a\nb"']),
        ("^[^@]+@[^@]+$", ['"a@b"'], ['"a", "b@c"', '"a\n@c"', '"a@b@c"']),
        (r"^\d{5}$", ['"01234"'], ['"0123"', '"0123a"']),
        (r"^\w+$", ['"a_1"'], ['"a b"', '""']),
        ("abc", ['"abc"', '"xabcx"'], ['"ab"']),
        ("", ['""', '"anything"'], ["1"]),
    ],
)
def test_what_a_pattern_allows_is_json(model, pattern, right, wrong):
    grammar = grammar_of({"type": "string", "pattern": pattern})
    for text in right:
        json.loads(text)
        assert accepts(model, grammar, text), text
    for text in wrong:
        assert not accepts(model, grammar, text), text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("^(?=a)a$", "looking ahead or behind"),
        ("^(?<!a)b$", "looking ahead or behind"),
        (r"^(a)\1$", r"the escape \\1"),
        (r"^\ba$", r"the escape \\b"),
        (r"^\p{L}$", r"the escape \\p"),
        ("^a{1001}$", "more than 1,000 repetitions"),
        ("^a{3,2}$", "a repetition of"),
        ("^(a$)", r"a \$ that a grammar cannot keep to"),
        ("^a$b", r"a \$ that is not at an end"),
        ("^(a", r"a \( without its \)"),
        ("a)", r"a \) without its \("),
        ("^[a", "it ends too early"),
        ("^[b-a]$", "ends before it begins"),
        ("^*$", r"a \* that a grammar cannot keep to"),
        (r"^\u00g0$", r"the escape \\u00g0"),
        (r"^\x01$", "a character that JSON does not hold"),
        ("^[]$", "a character that JSON does not hold"),
        ("\\", "it ends too early"),
    ],
)
def test_what_a_grammar_cannot_keep_to_is_refused(pattern, words):
    with pytest.raises(ColmError, match=f"pattern .*{words}.* of a.b cannot"):
        grammar_of({"properties": {"a": {"properties": {"b": {"pattern": pattern}}}}})
    loose = grammar_of({"type": "string", "pattern": pattern}, strict=False)
    assert loose == grammar_of({"type": "string"}, strict=False)


@STEADY
@given(pattern=st.text("^$()[]{}|?*+\\-,:<>=!.adbBuxwWpk01 ", max_size=12))
def test_any_pattern_is_read_or_refused(model, pattern):
    try:
        rule = string_of(pattern)
    except ValueError:
        return
    Grammar(f"root ::= {rule}", model)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (2, 2), (3, None), (1500, 2500), (0, 40_000)])
def test_lengths(model, low, high):
    limits = {"minLength": low} | ({} if high is None else {"maxLength": high})
    grammar = grammar_of({"type": "string", **limits})
    for n in {low - 1, low, low + 1, (high or low) - 1, high or low, (high or low) + 1}:
        if 0 <= n < 3000:
            right = low <= n and (high is None or n <= high)
            assert accepts(model, grammar, json.dumps('a\n"é'[n % 4] * n)) == right
            assert accepts(model, grammar, json.dumps("x" * n)) == right
    assert not accepts(model, grammar, '"a"b"')


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"minLength": 3, "maxLength": 2}, "maxLength of s is 2, below minLength, 3"),
        ({"minLength": -1}, "minLength of s is -1; expected a count"),
        ({"maxLength": "5"}, "maxLength of s is 5; expected a count"),
        ({"pattern": 5}, "pattern of s is '5'; expected a text"),
        ({"type": "array", "maxItems": 2500}, "maxItems 2500, which is above 1000, of s cannot"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "maxItems of s is 1, below minItems, 2"),
    ],
)
def test_limits_that_are_none_are_refused_by_name(schema, words):
    with pytest.raises(ColmError, match=words):
        grammar_of({"properties": {"s": schema}})
