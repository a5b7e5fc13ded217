"""A model's chat template: a conversation as the text that the model was trained to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from colm_edge.errors import PromptError
from colm_edge.llama.owners import HomeLock

THINK, THINK_END = "<think>", "</think>"
LONGEST_FORM = 200  # of a date
MAX_DEPTH = 200  # of objects and lists in each other
Message = Mapping[str, Any]  # role, content, and what the template reads besides


class ChatTemplate:
    """text: in Jinja. bos, eos: the texts of the begin and the end token."""

    def __init__(self, text: str, bos: str, eos: str) -> None:
        self.text, self._bos, self._eos = text, bos, eos
        self._compiled: tuple[Any, Any] | None = None  # Jinja's, once they are needed
        self._lock = HomeLock()

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """Return a conversation as the template writes it, up to where the assistant goes on:
        after its last message, if that is the last and a text alone.

        variables: what the template may read besides, such as `tools` or `enable_thinking`. Its
            clock, `strftime_now`, may be another than today's.

        Raises PromptError where the template refuses, or takes too much time or memory; ModelError
        in a child of fork.
        """
        n = len(messages)
        while n > 1 and _is_begun(messages[n - 1]):
            n -= 1
        begun, messages = messages[n:], messages[:n]
        from colm_edge.llama.template_sandbox import Spent, TemplateLimitError

        known = {
            **dict.fromkeys(("functions", "function_call", "tools", "tool_choice")),
            "strftime_now": _now,
            **variables,
            "messages": [dict(message) for message in messages],
            "bos_token": self._bos,
            "eos_token": self._eos,
            "add_generation_prompt": True,
            "raise_exception": _raise,
        }
        with self._lock.held():
            try:
                environment, template = self._environment()
                environment.spent = Spent()
                text = str(template.render(known))
            except TemplateLimitError as e:
                raise PromptError(
                    f"the base's chat template was ended: {e}; send less, or use a model from "
                    "people you trust"
                ) from e
            except Exception as e:  # templates raise anything, for example for unknown roles
                raise PromptError(f"the base's chat template refuses this conversation: {e}") from e
        written = "".join(str(message["content"]) for message in begun)
        if written and text.rstrip().endswith(THINK) and THINK_END not in written:
            text = f"{text.rstrip()}\n\n{THINK_END}\n\n"  # what goes on is the answer
        return text + written

    def _environment(self) -> tuple[Any, Any]:
        """Return Jinja's environment and the compiled template. Hold the lock."""
        if self._compiled is None:
            from colm_edge.llama.template_sandbox import LONGEST_TEMPLATE, BoundedEnvironment

            if len(self.text) > LONGEST_TEMPLATE:
                raise ValueError(f"it has {len(self.text):,} characters")
            environment = BoundedEnvironment()
            self._compiled = environment, environment.from_string(self.text)
        return self._compiled


def _is_begun(message: Message) -> bool:
    """Return whether a message, if it is the last, is an answer to go on from."""
    return bool(message["role"] == "assistant" and not message.get("tool_calls"))


def _raise(message: str) -> None:
    raise ValueError(message)


def on_one_day(form: str) -> str:
    """Return the date of always the same day, which Llama 3's template falls back to."""
    return _date(datetime(2024, 7, 26), form)


def _now(form: str) -> str:
    return _date(datetime.now(), form)


def _date(day: datetime, form: str) -> str:
    if len(form) > LONGEST_FORM:
        raise ValueError("a form of the date that is too long")
    return day.strftime(form)


def check(messages: Sequence[Message]) -> None:
    """Raise PromptError for what is not a list of messages, each with a role and a content."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise PromptError(f"a conversation is {messages!r}; expected a list of messages")
    for message in messages:
        given = message if isinstance(message, Mapping) else {}
        if not all(isinstance(given.get(key), str) for key in ("role", "content")):
            raise PromptError(f"a message is {message!r}; expected role and content, as texts")
    if not messages:
        raise PromptError("the conversation is empty; give at least one message")


def joined(messages: Sequence[Message]) -> str:
    """Return what a model without a template is given: the contents, with blank lines between."""
    return "\n\n".join(message["content"] for message in messages)


def lost_roles(messages: Sequence[Message]) -> str:
    """Return a warning where that loses something; "" for one message of the user's."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return ""
    return (
        "has no chat template: what system, user and assistant say is joined by blank lines, and "
        "who says it is not passed on."
    )


def each_text(given: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of what JSON can hold, each text in it changed; keys too, which templates may
    write as well.

    Raises PromptError where it is nested too deep.
    """
    return _changed(given, change, MAX_DEPTH)


def _changed(given: Any, change: Callable[[str], str], depth: int) -> Any:
    if depth == 0:  # what Python's own limit ends, it ends in the middle of llama.cpp's work too
        raise PromptError("the conversation is nested too deep; send less of it")
    if isinstance(given, str):
        return change(given)
    if isinstance(given, Mapping):
        return {
            change(key) if isinstance(key, str) else key: _changed(value, change, depth - 1)
            for key, value in given.items()
        }
    if isinstance(given, list | tuple):
        return [_changed(value, change, depth - 1) for value in given]
    return given
