"""Messages typed at a terminal, edited with prompt_toolkit. Import it only when a chat starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.shortcuts import CompleteStyle

from colm_edge.cli.keyboard import FIRST, LEAVE, MORE, is_open, unquoted
from colm_edge.errors import WriteError
from colm_edge.files import replacing

MOST_ENTRIES = 1000  # kept of earlier chats
ENTER = (Keys.ControlM, Keys.ControlJ)
# The text of keys that do something else at a prompt.
TEXTS: dict[Keys | str, str] = {**dict.fromkeys(ENTER, "\n"), Keys.ControlI: "\t"}

Following = Callable[[Sequence[str]], Iterable[str]]


class Editor:
    """Reads messages: arrow keys, a history, Tab, and several lines pasted as one message."""

    def __init__(self, following: Following, history: Path | None = None) -> None:
        """following: gives the words that can follow those of a command.
        history: the file that keeps messages for later chats; None: they are not kept."""
        self._session: PromptSession[str] = PromptSession(
            FIRST,
            multiline=Condition(lambda: is_open(self._session.default_buffer.text)),
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else MORE,
            history=_opened(history),
            completer=_Words(following),
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=self._keys(),
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
            enable_suspend=True,
        )

    def read(self) -> str | None:
        """Return one message, None for Ctrl-D."""
        while True:
            try:
                self._take_typed()
                text = self._session.prompt()
            except KeyboardInterrupt:
                click.echo(LEAVE, err=True)
            except EOFError:
                return None
            else:  # a terminal can send bytes that are not UTF-8
                return unquoted(text.encode("utf-8", "replace").decode())

    def _take_typed(self) -> None:
        """Begin the next message with what was typed during an answer. It waits to be edited and
        sent: several lines pasted meanwhile would otherwise be as many messages."""
        source = self._session.input
        with source.raw_mode():
            read = chain.from_iterable(iter(source.read_keys, []))
            keys = [*get_typeahead(source), *read, *source.flush_keys()]
        while keys and keys[-1].key in ENTER:
            keys.pop()
        store_typeahead(source, list(_as_pasted(keys)))

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typed = Condition(lambda: bool(self._session.default_buffer.text))

        @keys.add("c-c", filter=has_focus(DEFAULT_BUFFER) & typed)
        def clear(event: KeyPressEvent) -> None:
            event.current_buffer.reset()

        return keys


def _as_pasted(keys: Iterable[KeyPress]) -> Iterator[KeyPress]:
    """Yield keys, with what is text among them pasted: Enter then does not send, and a long text
    is there at once."""
    for is_text, some in groupby(
        keys, lambda key: key.key in TEXTS or not isinstance(key.key, Keys)
    ):
        if is_text:
            text = "".join(TEXTS.get(key.key, key.data) for key in some)
            yield KeyPress(Keys.BracketedPaste, text)
        else:
            yield from some


class _Words(Completer):
    """Completes commands, and the name of a file after /read."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/read "):
            name = Document(text.removeprefix("/read ").lstrip())
            yield from self._files.get_completions(name, event)
            return
        *before, word = text.split(" ")
        for choice in self._following(before):
            if choice.startswith(word):
                yield Completion(f"{choice} ", -len(word))


class _Kept(FileHistory):
    """Messages of earlier chats and of this one, in a file that only its owner reads."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.chmod(0o600)  # another program may have written it
        kept = list(self.load_history_strings())
        if len(kept) > MOST_ENTRIES:
            with replacing(path) as whole:
                newest = FileHistory(whole)
                for text in reversed(kept[:MOST_ENTRIES]):  # the newest comes first
                    newest.store_string(text)

    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a full disk does not end a chat
            super().store_string(string)


def _opened(path: Path | None) -> History:
    if path is not None:
        try:
            return _Kept(path)
        except (OSError, WriteError) as e:
            click.echo(f"Messages are not kept for later chats: {e}", err=True)
    return InMemoryHistory()
