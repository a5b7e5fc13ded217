"""A model's chat template: a conversation as the text that the model was trained to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from colm_edge.errors import PromptError

Message = Mapping[str, Any]  # role, content, and what the template reads besides


class ChatTemplate:
    """text: in Jinja. bos, eos: the texts of the begin and the end token."""

    def __init__(self, text: str, bos: str, eos: str) -> None:
        self.text, self._bos, self._eos = text, bos, eos
        self._formatter: Any = None  # llama-cpp-python's, once it is needed

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """Return a conversation as the template writes it, up to where the assistant goes on:
        behind its last message, if that is the last and a text alone.

        variables: what the template may read besides, such as `tools` or `enable_thinking`.

        Raises PromptError where the template refuses.
        """
        last = messages[-1]
        if len(messages) > 1 and last["role"] == "assistant" and not last.get("tool_calls"):
            return self.render(messages[:-1], **variables) + str(last["content"])
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            if self._formatter is None:
                self._formatter = Jinja2ChatFormatter(self.text, self._eos, self._bos)
            found = self._formatter(messages=[dict(m) for m in messages], **variables)
        except Exception as e:  # templates raise anything, for example for unknown roles
            raise PromptError(f"the base's chat template refuses this conversation: {e}") from e
        return str(found.prompt)


def check(messages: Sequence[Message]) -> None:
    """Raise PromptError for what is no list of messages, each a role and a content."""
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
    try:
        return _changed(given, change)
    except RecursionError as e:
        raise PromptError("the conversation is nested too deep; send less of it") from e


def _changed(given: Any, change: Callable[[str], str]) -> Any:
    if isinstance(given, str):
        return change(given)
    if isinstance(given, Mapping):
        return {_changed(key, change): _changed(value, change) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [_changed(value, change) for value in given]
    return given
