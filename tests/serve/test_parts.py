"""An answer's parts are the same however its text comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_edge.serve.parts import Reply, Splitter
from colm_edge.serve.tools import GENERIC, HERMES, LLAMA, CallForm

CALLS = [("get_weather", '{"city": "Paris \\"}", "days": [1, {"a": 2}]}'), ("now", "{}")]


def written(form: CallForm) -> str:
    calls = (f'{{"name": "{name}", "{form.arguments}": {text}}}' for name, text in CALLS)
    return "\n".join(f"{form.begin}\n{call}\n{form.end}".strip() for call in calls)


# Form, text, and the parts: thought, text, calls.
ANSWERS = [
    (None, "hello", "", "hello", []),
    (None, "", "", "", []),
    (None, "<think>so</think>\n\nhello", "so", "hello", []),
    (None, "\n<think>\nso\n</think>hello", "\nso\n", "hello", []),
    (None, "<think>never ends", "never ends", "", []),
    (None, "<thin>k", "", "<thin>k", []),
    (None, "a <think>b</think>", "", "a <think>b</think>", []),
    (HERMES, "hello <tool> there\n", "", "hello <tool> there\n", []),
    (HERMES, written(HERMES), "", "", CALLS),
    (HERMES, f"I'll look.\n{written(HERMES)}", "", "I'll look.", CALLS),
    (HERMES, f"<think><tool_call></think>\n{written(HERMES)}", "<tool_call>", "", CALLS),
    (HERMES, '<tool_call>\n{"name": "now", "arguments": {"a', "", "", [("now", '{"a')]),
    (HERMES, written(GENERIC), "", "", CALLS),
    (HERMES, f"Look: {written(GENERIC)}", "", f"Look: {written(GENERIC)}", []),
    (HERMES, '{"name": "fly", "arguments": {}}', "", '{"name": "fly", "arguments": {}}', []),
    (LLAMA, written(LLAMA), "", "", CALLS),
    (LLAMA, '{"name": "Bob", "age": 7}', "", '{"name": "Bob", "age": 7}', []),
    (GENERIC, written(GENERIC), "", "", CALLS),
    (GENERIC, '{"a": 1}', "", '{"a": 1}', []),
    (GENERIC, '  {"na', "", '  {"na', []),
    (GENERIC, "no call {} here", "", "no call {} here", []),
]


def parts_of(form: CallForm | None, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    names = [name for name, _ in CALLS]
    splitter, reply = Splitter(form, names, thinks=True, thinking=False), Reply()
    for piece in pieces:
        for part in splitter.feed(piece):
            reply.add(part)
    for part in splitter.end():
        reply.add(part)
    assert splitter.n_calls == len(reply.calls)
    assert len({call.id for call in reply.calls}) == len(reply.calls)
    return reply.thought, reply.text, [(call.name, call.arguments) for call in reply.calls]


@pytest.mark.parametrize(("form", "text", "thought", "shown", "calls"), ANSWERS)
def test_the_parts_do_not_depend_on_the_pieces(form, text, thought, shown, calls):
    expected = (thought, shown, calls)
    assert parts_of(form, [text]) == expected
    assert parts_of(form, list(text)) == expected


@given(data=st.data())
def test_pieces_of_any_size(data):
    form, text, *expected = data.draw(st.sampled_from(ANSWERS))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parts_of(form, pieces) == tuple(expected)


def test_text_is_told_at_once_where_it_cannot_become_something_else():
    splitter = Splitter(HERMES, thinks=True, thinking=False)
    assert "".join(part.text for part in splitter.feed("A word <t")) == "A word"
    assert "".join(part.text for part in splitter.feed("able>")) == " <table>"


def test_an_answer_may_begin_inside_a_thought():
    splitter, reply = Splitter(None, thinks=True, thinking=True), Reply()
    for part in (*splitter.feed("so</think>\nyes"), *splitter.end()):
        reply.add(part)
    assert (reply.thought, reply.text) == ("so", "yes")
