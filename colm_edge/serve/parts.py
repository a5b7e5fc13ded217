"""An answer's parts: what was thought, the text, and calls of tools, told apart while it is
written."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from colm_edge.decode.step import Step
from colm_edge.llama.chat_template import THINK, THINK_END
from colm_edge.serve.answers import Ended, Event
from colm_edge.serve.tools import CallForm

HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"(?P<name>[A-Za-z0-9_.-]+)"\s*,\s*"(?:arguments|parameters)"\s*:'
)


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Thought:
    text: str


@dataclass(frozen=True)
class CallBegan:
    """A call of a tool begins. index: 0 for an answer's first call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, a JSON object as the model writes it."""

    index: int
    text: str


Part = Text | Thought | CallBegan | CallArguments


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Reply:
    """A whole answer: its text without thoughts and calls, which stand beside it."""

    text: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    is_call: bool = False  # it ends with calls, all of them whole

    def add(self, part: Part) -> None:
        match part:
            case Text():
                self.text += part.text
            case Thought():
                self.thought += part.text
            case CallBegan():
                self.calls.append(Call(part.id, part.name))
            case CallArguments():
                self.calls[part.index].arguments += part.text


class Splitter:
    """Tells an answer's parts apart as its text comes.

    form: how calls are written; None: there are none. names: of the tools that may be called.
    thinks: whether the answer may begin with a thought. thinking: whether it is inside one.

    n_thought: how many of the steps that were read are thoughts.
    """

    def __init__(
        self,
        form: CallForm | None,
        names: Collection[str] = (),
        *,
        thinks: bool,
        thinking: bool,
    ) -> None:
        self._form, self._names, self._thinks = form, names, thinks
        self._state = self._thought if thinking else self._begin
        self._held = ""  # not yet told: later text decides what it is
        self.n_calls = self.n_thought = 0
        self._nesting = Nesting()

    @property
    def is_call(self) -> bool:
        """Whether the answer so far ends with a call, and all of its calls are whole."""
        begins = self._state == self._head and may_become_a_call(self._held, self._names)
        return self.n_calls > 0 and self._nesting.closed and not begins

    @property
    def in_call(self) -> bool:
        """Whether the answer so far ends inside the arguments of a call."""
        return self._state == self._arguments

    def read(self, event: Event) -> list[Part]:
        """Return the parts that an event of the answer adds."""
        if isinstance(event, Step):
            thinks = self._state == self._thought
            parts = self.feed(event.text)
            self.n_thought += thinks or self._state == self._thought
            return parts
        return self.end() if isinstance(event, Ended) else []

    def feed(self, text: str) -> list[Part]:
        """Return the parts that a text adds."""
        self._held += text
        return list(self._read(final=False))

    def end(self) -> list[Part]:
        """Return what was held back, at the answer's end."""
        return list(self._read(final=True))

    def _read(self, *, final: bool) -> Iterator[Part]:
        state = None
        while state != self._state:  # until it waits for more text
            state = self._state
            yield from state(final)

    def _begin(self, final: bool) -> Iterator[Part]:
        """The answer's start, where a thought may begin, or a call without a mark."""
        start = self._held.lstrip()
        if self._thinks and start.startswith(THINK):
            self._held = start[len(THINK) :]
            self._state = self._thought
        elif final or not (self._thinks and THINK.startswith(start)):
            self._state = self._reply
        return
        yield

    def _thought(self, final: bool) -> Iterator[Part]:
        thought, mark, after = self._held.partition(THINK_END)
        if mark:
            self._held = after.lstrip("\n")
            self._state = self._after_thought
        else:
            thought = self._without_begun(THINK_END, final)
        if thought:
            yield Thought(thought)

    def _after_thought(self, final: bool) -> Iterator[Part]:
        """Blank lines after a thought belong to neither."""
        self._held = self._held.lstrip("\n")
        if self._held or final:
            self._state = self._reply
        return
        yield

    def _reply(self, final: bool) -> Iterator[Part]:
        """Where text or a call begins."""
        if self._form is not None:
            head = HEAD.match(self._held)
            if head is not None and head["name"] in self._names:
                self._state = self._head
                return
            if head is None and not final and may_become_a_call(self._held, self._names):
                return
        self._state = self._text
        return
        yield

    def _text(self, final: bool) -> Iterator[Part]:
        mark = self._form.begin if self._form is not None else ""
        if not mark:
            text, self._held = self._held, ""
        elif mark in self._held:
            text, _, self._held = self._held.partition(mark)
            text = text.rstrip()
            self._state = self._head
        else:
            text = self._without_begun(mark, final)
            if not final:  # space before a call is not text
                shown = text.rstrip()
                self._held = text[len(shown) :] + self._held
                text = shown
        if text:
            yield Text(text)

    def _head(self, final: bool) -> Iterator[Part]:
        """The name of a call."""
        if head := HEAD.match(self._held):
            self._held = self._held[head.end() :]
            self._nesting = Nesting()
            self._state = self._arguments
            yield CallBegan(self.n_calls, "call_" + secrets.token_hex(12), head["name"])
            self.n_calls += 1
        elif final and not self.n_calls:  # cut inside it
            text, self._held = self._held, ""
            if text:
                yield Text(text)

    def _arguments(self, final: bool) -> Iterator[Part]:
        if not self._nesting.begun:
            self._held = self._held.lstrip()
        n = self._nesting.read(self._held)
        arguments, self._held = self._held[:n], self._held[n:]
        if arguments:
            yield CallArguments(self.n_calls - 1, arguments)
        if self._nesting.closed:
            self._state = self._between

    def _between(self, final: bool) -> Iterator[Part]:
        """Behind a call's arguments: its closing marks, and perhaps another call."""
        _, found, after = self._held.partition("{")
        if found:
            self._held = found + after
            self._state = self._head
        elif final:
            self._held = ""
        return
        yield

    def _without_begun(self, mark: str, final: bool) -> str:
        """Return the held text, but keep its end back if a mark may begin there."""
        text = self._held
        n = 0
        if not final:
            n = next(n for n in range(len(mark) - 1, -1, -1) if text.endswith(mark[:n]))
        self._held = text[len(text) - n :]
        return text[: len(text) - n]


class Nesting:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_text, self._escaped = 0, False, False
        self.closed = False

    @property
    def begun(self) -> bool:
        """Whether its first brace has come."""
        return self._depth > 0

    def read(self, text: str) -> int:
        """Return how many of the next characters belong to the object."""
        for i, character in enumerate(text):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_text = False
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return i + 1
        return len(text)


def may_become_a_call(text: str, names: Collection[str]) -> bool:
    """Return whether a call of such a name, without a mark, may begin with this text."""
    return any(
        _begins(text, ("{", '"name"', ":", f'"{name}"', ",", key, ":"))
        for name in names
        for key in ('"arguments"', '"parameters"')
    )


def _begins(text: str, pieces: Iterable[str]) -> bool:
    rest = text.lstrip()
    for piece in pieces:
        if not rest.startswith(piece):
            return piece.startswith(rest)
        rest = rest[len(piece) :].lstrip()
    return True


def reply_of(splitter: Splitter, text: str) -> Reply:
    """Return a whole answer's parts."""
    reply = Reply()
    for part in (*splitter.feed(text), *splitter.end()):
        reply.add(part)
    reply.is_call = splitter.is_call
    return reply
