"""Functions that an answer may call: how the model is told of them, and how it writes a call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from colm_edge.errors import ColmError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
Choice = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class Tool:
    """A function. parameters: the JSON schema of its one argument, an object. strict: whether a
    schema that cannot be kept to is refused; else calls keep to it as far as possible."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as OpenAI's API and chat templates have it."""
        parameters = dict(self.parameters) or {"type": "object", "properties": {}}
        described = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": described}


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request, and what it says about their use.

    choice: "auto", "none", "required", or the one tool that has to be called.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice | Tool = "auto"
    parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that this answer may call."""
        if isinstance(self.choice, Tool):
            return (self.choice,)
        return () if self.choice == "none" else self.tools

    @property
    def several(self) -> bool:
        """Whether the answer may be several calls; one that is named is called once."""
        return self.parallel and not isinstance(self.choice, Tool)

    @property
    def forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice == "required" or isinstance(self.choice, Tool)


def use_of(
    tools: Sequence[Tool],
    choice: Choice = "auto",
    *,
    only: str | None = None,
    parallel: bool = True,
) -> ToolUse:
    """Return the tools of a request, and how they are to be used. only: the name of the one that
    has to be called, whatever the choice.

    Raises ColmError for names that are wrong, that come twice, or that no tool has.
    """
    by_name = {tool.name: tool for tool in tools}
    for tool in tools:
        if not NAME.fullmatch(tool.name):
            raise ColmError(
                f"a tool's name is {tool.name[:200]!r}; expected letters, digits, _, - and ., at "
                "most 128"
            )
    if len(by_name) < len(tools):
        raise ColmError("two tools have the same name; give each one its own")
    if not tools and (only is not None or choice == "required"):
        raise ColmError(f"tool_choice is {only or choice!r}, but there are no tools; give them")
    if only is not None and only not in by_name:
        raise ColmError(f"tool_choice is {only!r}; expected one of {', '.join(by_name)}")
    return ToolUse(tuple(tools), choice if only is None else by_name[only], parallel)


@dataclass(frozen=True)
class CallForm:
    """How a family of models writes a call: {"name": …, "arguments": {…}} between marks.

    begin, end: the marks, if it has them. Without, and because small models leave them out, such an
        object that begins the answer is a call too, if there is a tool of that name.
    arguments: the key of the arguments. native: whether the template tells the model of tools.
    """

    begin: str
    end: str
    arguments: Literal["arguments", "parameters"]
    native: bool = True


HERMES = CallForm("<tool_call>", "</tool_call>", "arguments")  # Hermes, Qwen
LLAMA = CallForm("", "", "parameters")  # Llama 3
GENERIC = CallForm("", "", "arguments", native=False)


def form_of(template: str) -> CallForm:
    """Return the form that a chat template teaches; where it teaches none of those known here, the
    one that `plain_messages` asks for."""
    if "<tool_call>" in template and "arguments" in template and "<function=" not in template:
        return HERMES
    if "ipython" in template and '"parameters"' in template.replace("\\", ""):
        return LLAMA
    return GENERIC


def plain_messages(
    messages: Sequence[dict[str, Any]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """Return a conversation for a template that knows no tools: they, their calls and what these
    returned are told in plain messages."""
    found = list[dict[str, Any]]()
    names = dict[str, str]()
    before = ""
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        names |= {c["id"]: c["function"]["name"] for c in message.get("tool_calls", ())}
        plain = {"role": message["role"], "content": message["content"]}
        if calls:
            written = [json.dumps(_written(call), ensure_ascii=False) for call in calls]
            plain["content"] = "\n".join(filter(None, [message["content"], *written]))
        elif message["role"] == "tool":
            name = names.get(message.get("tool_call_id", ""), "the function")
            plain = {"role": "user", "content": f"{name} returned: {message['content']}"}
        if {before, message["role"]} in ({"tool"}, {"tool", "user"}):
            found[-1]["content"] += "\n" + plain["content"]  # some templates want roles in turns
        else:
            found.append(plain)
        before = message["role"]
    if tools:
        offered = "\n".join(
            json.dumps(tool.as_dict()["function"], ensure_ascii=False) for tool in tools
        )
        text = (
            f"These functions can be called:\n{offered}\n"
            'To call one, answer with a JSON object {"name": its name, "arguments": {…}} and '
            "nothing else, several on a line each. Answer in words where no call is needed."
        )
        first = found[0]
        if first["role"] == "system":
            first["content"] += "\n\n" + text
        elif first["role"] == "user":  # some templates refuse a system message
            first["content"] = text + "\n\n" + first["content"]
        else:
            found.insert(0, {"role": "user", "content": text})
    return found


def _written(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call["name"], "arguments": call["arguments"]}
