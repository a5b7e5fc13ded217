"""Answers that a grammar allows: under every schedule, by whichever model writes."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
from contextlib import suppress
from importlib import import_module

import jsonschema
import llama_cpp as llama
import numpy as np
import pytest
from click.testing import CliRunner

from colm_edge.cli import main
from colm_edge.errors import ColmError
from colm_edge.llama import sampling
from colm_edge.llama.grammar import CANDIDATE, Grammar, array_of, grammar_of
from colm_edge.llama.sampling import ChainSampler
from colm_edge.options import Options

RECORD = r'root ::= "{" [a-z]{1,6} ":" [0-9]{1,4} "}"'
WHOLE = re.compile(r"\{[a-z]{1,6}:[0-9]{1,4}\}")
WAYS = {
    "greedy": {"temperature": 0.0, "defer_rate": 0.3},
    "sampled": {"seed": 5, "defer_rate": 0.3},
    "compose": {"seed": 5, "strategy": "compose", "threshold": 0.4},
    "penalised": {"temperature": 0.0, "defer_rate": 0.3, "repeat_penalty": 1.3},
    "review": {"temperature": 0.0, "defer_rate": 0.3, "review": 0.5, "review_window": 4},
    "sampled review": {"seed": 7, "defer_rate": 0.3, "review": 0.5, "review_window": 4},
    "floor": {"temperature": 0.0, "defer_rate": 0.3, "review": 0.5, "review_floor": 0.9},
    "sampled floor": {"seed": 7, "defer_rate": 0.3, "review": 0.5, "review_floor": 0.9},
    "lossless": {"temperature": 0.0, "defer_rate": 0.3, "review": 0.0},
    "sampled lossless": {"seed": 3, "defer_rate": 0.3, "review": 0.0},
    "doubt": {"temperature": 0.0, "defer_rate": 0.3, "doubt": 0.5},
    "base alone": {"temperature": 0.0, "threshold": 1.0},
    "expert alone": {"temperature": 0.0, "threshold": 0.0},
}


@pytest.mark.parametrize("schedule", ["fast", "sequential"])
@pytest.mark.parametrize("way", WAYS)
def test_every_answer_is_what_the_grammar_allows(tiny_pair, way, schedule):
    for prompt in ("hello", "one two", "zzz"):
        options = {**WAYS[way], "schedule": schedule, "max_tokens": 60}
        answer = tiny_pair.generate(prompt, grammar=RECORD, **options)
        assert WHOLE.fullmatch(answer.text), answer.text
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize("way", ["greedy", "sampled", "compose", "penalised"])
def test_the_fast_schedule_writes_the_same(tiny_pair, way):
    options = {**WAYS[way], "grammar": RECORD, "max_tokens": 60}
    fast, plain = (
        tiny_pair.generate("hello", **options, schedule=schedule)
        for schedule in ("fast", "sequential")
    )
    assert [(s.token, s.source) for s in fast.steps] == [(s.token, s.source) for s in plain.steps]


def test_review_without_tolerance_writes_the_experts_own_text(tiny_pair):
    for prompt in ("hello", "one two", "zzz"):
        expert = tiny_pair.generate(prompt, grammar=RECORD, max_tokens=60, **WAYS["expert alone"])
        reviewed = tiny_pair.generate(prompt, grammar=RECORD, max_tokens=60, **WAYS["lossless"])
        assert reviewed.text == expert.text


def test_the_switch_is_read_before_the_grammar(tiny_pair):
    """So what it says of the first token does not depend on what is allowed."""
    options = {"temperature": 0.0, "defer_rate": 0.3, "max_tokens": 1}
    free = tiny_pair.generate("hello", **options)
    bound = tiny_pair.generate("hello", grammar=RECORD, **options)
    assert bound.steps[0].p_defer == free.steps[0].p_defer
    assert bound.steps[0].source == free.steps[0].source
    assert bound.text == "{"


def test_a_grammar_is_parsed_once_for_answers_that_share_it(tiny_pair, monkeypatch):
    parsed = []
    parse = Grammar.__init__
    monkeypatch.setattr(
        Grammar, "__init__", lambda *given: (parsed.append(given[1]), parse(*given))[1]
    )
    for text in (RECORD, RECORD, 'root ::= "yes"', RECORD):
        answer = tiny_pair.generate("hello", grammar=text, temperature=0.0, max_tokens=60)
        assert answer.text == "yes" or WHOLE.fullmatch(answer.text)
    assert len(parsed) == 3


def test_a_grammar_is_read_where_there_is_no_stderr(tiny_pair, monkeypatch):
    def dup(number):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("colm_edge.llama.grammar.os.dup", dup)
    assert Grammar('root ::= "a"', tiny_pair.base)
    with pytest.raises(ColmError, match="does not parse"):
        Grammar("root ::= (", tiny_pair.base)


def test_the_next_answer_is_free_again(tiny_pair):
    options = {"temperature": 0.0, "defer_rate": 0.3, "max_tokens": 20}
    before = tiny_pair.generate("hello", **options).text
    tiny_pair.generate("hello", grammar=RECORD, **options)
    assert tiny_pair.generate("hello", **options).text == before


def test_an_answer_that_is_cut_is_the_start_of_one(tiny_pair):
    answer = tiny_pair.generate("hello", grammar=RECORD, temperature=0.0, max_tokens=2)
    assert answer.finish_reason == "length"
    assert re.fullmatch(r"\{[a-z]*:?[0-9]*", answer.text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('root ::= "a', "unexpected end of input"),
        ("root ::= x", "Undefined rule identifier 'x'"),
        ('other ::= "a"', "root"),
        ("", "no root"),
        ("  ", "no root"),
    ],
)
def test_a_grammar_that_does_not_parse_is_told_in_one_line(tiny_pair, text, reason, capfd):
    with pytest.raises(ColmError, match="the grammar is not valid") as raised:
        tiny_pair.generate("hello", grammar=text)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""  # llama.cpp would print it


def test_a_grammar_too_deep_for_the_stack_is_an_error_and_no_crash(tiny_pair):
    text = "root ::= " + 100_000 * "(" + '"a"' + 100_000 * ")"
    with pytest.raises(ColmError, match="nested deeper than 2000"):
        Grammar(text, tiny_pair.base)


def test_a_token_that_is_not_allowed_is_an_error_and_no_crash(tiny_pair):
    grammar = Grammar(RECORD, tiny_pair.base)
    (brace,) = tiny_pair.base.tokenize("{", bos=False)
    (digit,) = tiny_pair.base.tokenize("7", bos=False)
    assert grammar.allows(brace)
    assert not grammar.allows(digit)
    with pytest.raises(ColmError, match="no token of the vocabulary"):
        grammar.accept(digit)
    copied = grammar.copy()
    grammar.accept(brace)
    assert not grammar.allows(brace)
    assert copied.allows(brace)


@pytest.mark.parametrize("tried", [1, 3, 256])
def test_trying_the_likeliest_tokens_finds_what_judging_all_finds(tiny_pair, tried, monkeypatch):
    """Also where none of those tried is allowed."""
    monkeypatch.setattr(sampling, "TRIED", tried)
    options, n = Options(temperature=0.0), tiny_pair.n_shared
    for seed in range(30):
        logits = np.random.default_rng(seed).normal(0, 3, n).astype(np.float32)
        grammar = Grammar(RECORD, tiny_pair.base)
        quick = sampling.ChainSampler(options, n, grammar=grammar.copy())
        while True:
            whole = np.zeros(n, CANDIDATE)
            whole["id"], whole["logit"] = np.arange(n), logits
            grammar.mask(array_of(whole))
            expected = int(whole["logit"].argmax())
            assert quick.likeliest(logits, int(logits.argmax())) == expected
            assert quick(logits) == expected
            if expected in tiny_pair.base.end_tokens or seed % 3 == 0:
                break
            grammar.accept(expected)
            logits = np.roll(logits, 17)


SCHEMAS = [
    {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    {"enum": ["yes", "no"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"const": 1}, {"type": "null"}]},
]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 1}, {"seed": 2}])
def test_answers_of_a_schema_are_valid_json(tiny_pair, schema, options):
    text = tiny_pair.generate("hello", grammar=grammar_of(schema), max_tokens=200, **options).text
    jsonschema.validate(json.loads(text), schema)
    assert grammar_of(json.dumps(schema)) == grammar_of(schema)


def test_an_empty_schema_is_any_object():
    assert grammar_of({}) == grammar_of(" {} ") == grammar_of({"type": "object"})


def test_a_string_of_a_schema_holds_no_line_end(tiny_pair):
    base = tiny_pair.base
    grammar = Grammar(grammar_of({"type": "string"}), base)
    quote, line_end, letter = (base.tokenize(text, bos=False)[-1] for text in ('"', "\n", "a"))
    grammar.accept(quote)
    assert grammar.allows(letter)
    assert not grammar.allows(line_end)


@pytest.mark.parametrize("schema", ["", "[", "5", '{"$ref": "#/$defs/none"}', '{"type": "king"}'])
def test_a_schema_that_cannot_be_translated_is_told(schema):
    with pytest.raises(ColmError, match="the JSON schema cannot be used") as raised:
        grammar_of(schema)
    assert "\n" not in str(raised.value)


def test_a_grammar_alone_makes_greedy_answers_depend_on_what_was_written():
    assert Options(temperature=0.0).is_likeliest
    assert not Options(temperature=0.0, grammar=RECORD).is_likeliest
    assert not Options(temperature=0.0, grammar=RECORD).is_plain


def run(tiny, *flags: str):
    files = "-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "--temp", "0", "-n", "60"
    return CliRunner().invoke(main, ["run", *files, *flags, "hello"])


def test_the_command_line_takes_grammars_and_schemas(tiny, tmp_path):
    grammar, schema = tmp_path / "g.gbnf", tmp_path / "s.json"
    grammar.write_text(RECORD)
    schema.write_text(json.dumps(SCHEMAS[1]))
    for flags in (("--grammar", RECORD), ("--grammar-file", str(grammar))):
        assert WHOLE.fullmatch(run(tiny, *flags).stdout.strip())
    for flags in (("-j", json.dumps(SCHEMAS[1])), ("--json-schema", str(schema))):
        assert run(tiny, *flags).stdout.strip() in ('"yes"', '"no"')
    assert run(tiny, "-j", "{}").stdout.strip().startswith("{")


def test_the_command_line_says_what_is_wrong_with_a_grammar(tiny, tmp_path):
    both = run(tiny, "--grammar", RECORD, "-j", "{}")
    assert both.exit_code == 2
    assert "--grammar and --json-schema both say what is allowed; give one" in both.stderr
    missing = run(tiny, "-j", str(tmp_path / "none"))
    assert missing.exit_code == 2
    assert "No such file" in missing.stderr
    assert "the JSON schema cannot be used" in run(tiny, "-j", "[").stderr
    for text in ('root ::= "\udcff"', 'root ::= "a" \0 and ((('):  # half a character; NUL
        refused = run(tiny, "--grammar", text)
        assert refused.exit_code == 1
        assert "the grammar holds NUL or half a character" in refused.stderr


def test_a_copy_that_is_interrupted_frees_nothing_twice(tiny_pair, monkeypatch):
    """Ctrl-C may come while the chain of samplers is cloned."""
    gc.collect()  # what other tests have left
    options = Options(temperature=0.8, seed=1)
    sampler = ChainSampler(options, 100, grammar=Grammar('root ::= "a"*', tiny_pair.base))
    freed = []
    for kind in ("sampling", "grammar"):
        module = import_module(f"colm_edge.llama.{kind}")
        with monkeypatch.context() as patch:
            patch.setattr(module.llama, "llama_sampler_free", freed.append)
            patch.setattr(module.llama, "llama_sampler_clone", interrupted)
            with pytest.raises(KeyboardInterrupt):
                sampler.copy()
            gc.collect()
    assert freed == []


def interrupted(chain) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("text", ['root ::= "a"', "root ::= [a-z", "root ::= y"])
def test_what_is_printed_while_a_grammar_is_read_is_not_lost(tiny_pair, capfd, monkeypatch, text):
    """The reason is printed to the standard error of the whole process, which others write to."""
    read = llama.llama_sampler_init_grammar

    def beside(*given):
        os.write(2, b"another thread's line\n")
        made = read(*given)
        os.write(2, b"and another\n")
        return made

    monkeypatch.setattr(llama, "llama_sampler_init_grammar", beside)
    with suppress(ColmError):
        Grammar(text, tiny_pair.base)
    assert capfd.readouterr().err == "another thread's line\nand another\n"
