"""Options: what they refuse, and that one declaration is enough for CLI, chat and server."""

from __future__ import annotations

import math

import numpy as np
import pytest
from click.testing import CliRunner

from colm_edge.cli import main
from colm_edge.cli.terminal import HELP, SETTINGS
from colm_edge.errors import ColmError
from colm_edge.options import OPTIONS, Options
from colm_edge.serve.chat import ChatRequest
from colm_edge.serve.requests import ColmFields, CompletionRequest

FLAGGED = {name: option for name, option in OPTIONS.items() if option.flags}
REQUESTED = {name: option for name, option in OPTIONS.items() if option.request}
# Requests give these in a form of their own; serve/requests.py converts them.
CONVERTED = {"max_tokens", "seed", "stop"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; expected a number from 0 to 1"),
        ({"defer_rate": -0.1}, "defer_rate is -0.1"),
        ({"temperature": -1}, "expected a number from 0 to"),
        ({"temperature": "1"}, "temperature is '1'; expected a number"),
        ({"seed": 2**32 - 1}, "seed is 4294967295"),
        ({"top_k": 2**40}, "top_k is"),
        ({"repeat_penalty": math.nan}, "repeat_penalty is nan"),
        ({"threshold": 0.5, "defer_rate": 0.5}, "give one"),
        ({"strategy": "both"}, "expected 'defer' or 'compose'"),
        ({"stop": ("",)}, "a stop text is empty"),
        ({"repeat_penalty": 0}, "expected a number from 1e-06"),
        ({"colour": 1}, "unknown option 'colour'"),
        ({"max_tokens": True}, "max_tokens is True; expected a whole number"),
        ({"seed": np.float32(1)}, "expected a whole number"),
    ],
)
def test_options_say_what_is_wrong(change, words):
    with pytest.raises(ColmError, match=words):
        Options().with_changes(**change)


def test_numbers_of_numpy_are_numbers(tiny_pair):
    given = {"seed": np.int64(3), "max_tokens": np.int32(4), "temperature": np.float32(0.5)}
    plain = {name: value.item() for name, value in given.items()}
    answers = [tiny_pair.generate("hello", **options) for options in (given, plain)]
    assert answers[0].text == answers[1].text


@pytest.mark.parametrize("given", ["20", "20%", "-1"])
def test_a_rate_in_per_cent_is_told_what_a_share_is(given):
    ran = CliRunner().invoke(main, ["run", "hi", "--defer-rate", given])
    assert ran.exit_code == 2
    assert "expected a share of the tokens: 0.2 is 20 %" in ran.stderr
    with pytest.raises(ColmError, match=r"from 0 to 1, a share of the tokens: 0\.2 is 20 %"):
        Options(defer_rate=20.0)


def test_the_later_of_two_exclusive_options_counts():
    options = Options(threshold=0.5).with_changes(defer_rate=0.2)
    assert (options.threshold, options.defer_rate) == (None, 0.2)
    assert options.with_changes(threshold=0.1).defer_rate is None


def test_an_option_is_declared_once():
    assert Options() == Options(**{name: option.default for name, option in OPTIONS.items()})
    for option in OPTIONS.values():
        option.check(option.default)


@pytest.mark.parametrize("command", ["run", "eval", "serve"])
def test_every_flag_is_an_option_of_the_command_line(command):
    text = CliRunner().invoke(main, [command, "-h"], terminal_width=200).stdout
    parameters = {parameter.name: parameter for parameter in main.commands[command].params}
    for name, option in FLAGGED.items():
        if (command, name) == ("eval", "strategy"):  # its methods say which
            continue
        assert parameters[name].opts == list(option.flags)
        assert f"{', '.join(option.flags)} " in text
        assert option.help
        assert option.help in text


def test_every_flag_with_one_value_is_a_setting_of_the_chat():
    assert set(SETTINGS) == {n for n, o in FLAGGED.items() if o.kind not in (bool, tuple)}
    for name, option in SETTINGS.items():
        assert f"{name}," in HELP or f"{name}\n" in HELP
        assert option.parse(str(option.default or 0)) is not None
        assert [option.parse(word) for word in option.words] == list(option.words.values())


@pytest.mark.parametrize("body", [ChatRequest, CompletionRequest])
def test_a_request_has_every_option_that_it_may_set(body):
    named = {name for name, option in REQUESTED.items() if option.request == "body"}
    assert set(body.model_fields) & set(OPTIONS) == named | CONVERTED
    assert set(ColmFields.model_fields) - {"trace", "provisional"} == set(REQUESTED) - named


@pytest.mark.parametrize("name", REQUESTED)
def test_what_a_request_sets_reaches_the_options(name):
    option = REQUESTED[name]
    limits = option.request_limits
    values = option.choices or ([limits.get("ge", 1e-3), limits["le"]] if limits else ["a text"])
    for value in values:
        given = {name: value} if option.request == "body" else {"colm": {name: value}}
        request = CompletionRequest(prompt="hello", **given)
        assert getattr(request.options(Options(), choice=0, limit=9), name) == value
    unset = CompletionRequest(prompt="hello").options(Options(), choice=0, limit=9)
    assert getattr(unset, name) == option.default


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grammar", {"type": "object"}, "a text"),
        ("grammar", 5, "a text"),
        ("raw", "yes", "True or"),
    ],
)
def test_a_value_of_another_type_is_one_line(name, value, words):
    with pytest.raises(ColmError, match=f"{name} is .*; expected {words}"):
        Options(**{name: value})
