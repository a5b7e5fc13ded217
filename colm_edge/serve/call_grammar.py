"""The grammar of an answer that may call tools: text is free, calls keep to what was offered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from colm_edge.errors import ColmError
from colm_edge.llama.chat_template import THINK, THINK_END
from colm_edge.llama.grammar import grammar_of
from colm_edge.serve.tools import CallForm, Tool, ToolUse

# What GBNF has beside names of rules: texts, sets of characters, counts.
GBNF = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{[0-9,]*\}|#[^\n]*|[A-Za-z][\w-]*')
SPACE = " \\n\\t"


def grammar_for(
    form: CallForm,
    use: ToolUse,
    schema: Mapping[str, Any] | None,
    thinks: Literal["no", "may", "does"],
) -> str | None:
    """Return the grammar of an answer, None where any text will do.

    schema: of the JSON that an answer without calls is, if it is one. thinks: whether the answer
    may begin with a thought between marks, or is inside one from the start.

    Raises ColmError for a schema that cannot be used.
    """
    offered = use.callable
    if not offered and schema is None:
        return None
    rules = [f"ws ::= [{SPACE}]{{0,8}}"]
    if schema is not None:
        rules.append(_prefixed(grammar_of(schema), "json-"))
    if not offered:
        rules.append("answer ::= json-root")
    else:
        rules += _calls(form, offered, several=use.several)
        if use.forced:
            rules.append("answer ::= calls")
        elif schema is not None:
            rules.append("answer ::= calls | json-root")
        else:
            rules += ["answer ::= calls | bare | text-0", *_text_unlike_a_call(form, offered)]
    if thinks == "no":
        rules.append("root ::= answer")
    else:
        rules += _text_before(THINK_END, "ws answer", "thought", ends=False)
        begun = f'"{THINK}" thought'
        rules.append("root ::= thought" if thinks == "does" else f"root ::= {begun} | answer")
    return "\n".join(rules)


def _calls(form: CallForm, tools: Sequence[Tool], *, several: bool) -> list[str]:
    """Return the rules of one or several calls: `calls`, `calls-on` after the first mark, and
    `bare` without marks."""
    rules = []
    for i, tool in enumerate(tools):
        try:
            schema = tool.as_dict()["function"]["parameters"]
            parameters = grammar_of(schema, strict=tool.strict)
        except ColmError as e:
            raise ColmError(f"the parameters of the tool {tool.name!r}: {e}") from e
        rules += [
            _prefixed(parameters, f"t{i}-"),
            f'call-{i} ::= "{{" ws "\\"name\\"" ws ":" ws "\\"{tool.name}\\"" ws "," ws '
            f'"\\"{form.arguments}\\"" ws ":" ws t{i}-root "}}"',
        ]
    one_of = " | ".join(f"call-{i}" for i in range(len(tools)))
    # Llama 3 may write the mark of its calls, which is no text.
    begin = f'"{form.begin}" ws' if form.begin else '"<|python_tag|>"?'
    end = f'ws "{form.end}"' if form.end else ""
    more = f"(ws {begin} call {end})*" if several else ""
    return [
        *rules,
        f"call ::= {one_of}",
        f"calls-on ::= ws call {end} {more}",
        f"calls ::= ws {begin} call {end} {more}",
        f"bare ::= ws call {'(ws call)*' if several else ''}",
    ]


def _text_before(mark: str, then: str, name: str, *, ends: bool = True) -> list[str]:
    """Return the rules of any text up to a mark, and of what follows that; `ends` tells whether the
    text may also end without it. Each rule stands for how much of the mark was just written, which
    needs a mark whose first character comes once."""
    first = mark[0]
    assert first not in mark[1:]
    empty = '"" | ' if ends else ""
    rules = []
    for i, character in enumerate(mark):
        states = [name, *(f"{name}-{j}" for j in range(1, len(mark)))]
        onward = states[i + 1] if i + 1 < len(mark) else then
        again = f' | "{first}" {name}-1' if i else ""
        others = f"[^{first}{character if i else ''}]"
        rules.append(f'{states[i]} ::= {empty}"{character}" {onward}{again} | {others} {name}')
    return rules


def _text_unlike_a_call(form: CallForm, tools: Sequence[Tool]) -> list[str]:
    """Return the rules of any text, `text-0`, that does not begin as a call without marks does,
    and of the calls with marks that may follow it. Each rule stands for how much of such a
    beginning was written."""
    onward: dict[str, set[str]] = {}  # by what was written, without space: the next characters
    ends, loose = set[str](), set[str]()  # whole beginnings, and where space may stand
    for tool in tools:
        pieces = ("{", '"name"', ":", f'"{tool.name}"')
        whole = "".join(pieces)
        ends.add(whole)
        loose |= {"".join(pieces[:i]) for i in range(len(pieces))}
        for i, character in enumerate(whole):
            onward.setdefault(whole[:i], set()).add(character)
    names = {written: f"text-{i}" for i, written in enumerate(onward)}
    rules = _text_before(form.begin, "calls-on", "rest") if form.begin else ["rest ::= .*"]
    mark = form.begin[:1]
    for written, following in onward.items():
        space = SPACE if written in loose else ""
        # A hyphen stands last in a set, where it is no range.
        known = "".join(sorted(following, key=lambda c: (c == "-", c))).replace('"', '\\"')
        options = ['""', f"[^{space}{mark}{known}] rest"]
        options += [f"[{space}] {names[written]}"] if space else []
        options += [f'"{mark}" rest-1'] if mark else []
        options += [
            f"{_literal(one)} {names[written + one]}"
            for one in sorted(following)
            if written + one not in ends
        ]
        rules.append(f"{names[written]} ::= " + " | ".join(options))
    return rules


def _literal(character: str) -> str:
    return '"\\""' if character == '"' else f'"{character}"'


def _prefixed(grammar: str, prefix: str) -> str:
    """Return a grammar whose rules have other names, to stand beside others in one text."""

    def renamed(found: re.Match[str]) -> str:
        return prefix + found[0] if found[0][0].isalpha() else found[0]

    return GBNF.sub(renamed, grammar)
