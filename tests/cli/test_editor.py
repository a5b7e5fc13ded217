"""What the editor makes of keys: one message for each Enter that is meant to send."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from colm_edge.cli.editor import MOST_ENTRIES, Editor
from colm_edge.cli.keyboard import LEAVE, is_open, unquoted
from colm_edge.cli.terminal import COMMANDS, HELP, SETTINGS, Chat, following
from colm_edge.errors import ColmError

UP, DOWN, LEFT = "\x1b[A", "\x1b[B", "\x1b[D"
CTRL_C, CTRL_D, TAB, ENTER = "\x03", "\x04", "\t", "\r"


def pasted(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


class Typist(DummyOutput):
    """A terminal where somebody types: one text for each prompt that appears."""

    def __init__(self, keyboard, texts: tuple[str, ...]) -> None:
        self.keyboard, self.texts = keyboard, list(texts)

    def enable_bracketed_paste(self) -> None:  # the first thing at each prompt
        self.keyboard.send_text(self.texts.pop(0))


def read(*texts: str, history: Path | None = None, before: str = "") -> list[str | None]:
    """Return the messages that an editor reads until Ctrl-D, which is added at the end.

    before: typed before the first prompt appears.
    """
    with create_pipe_input() as keyboard:
        typist = Typist(keyboard, (*texts, CTRL_D))
        with create_app_session(input=keyboard, output=typist):
            editor = Editor(following, history)
            keyboard.send_text(before)
            messages = list(iter(editor.read, None))
        assert typist.texts == []
        return messages


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello" + ENTER, "hello"),
        ("helo" + LEFT + "l" + ENTER, "hello"),
        (pasted("one\ntwo\r\n\tthree") + ENTER, "one\ntwo\n\tthree"),
        (pasted("one\ntwo") + UP + "X" + ENTER, "oneX\ntwo"),
        ('"""one' + ENTER + 'two"""' + ENTER, "one\ntwo"),
        ('"""one' + ENTER + "two" + UP + "X" + DOWN + '"""' + ENTER, "Xone\ntwo"),
        ('"""' + ENTER + "one" + ENTER + '"""' + ENTER, "one"),
        ('"""' + pasted('a "quote"\n"""') + ENTER, 'a "quote"'),
        ("junk" + CTRL_C + "kept" + ENTER, "kept"),
        ('"""junk' + ENTER + "more" + CTRL_C + "kept" + ENTER, "kept"),
        ("/he" + TAB + ENTER, "/help "),
        ("/set thr" + TAB + "0.5" + ENTER, "/set threshold 0.5"),
        ("/set strategy c" + TAB + ENTER, "/set strategy compose "),
        ("wor" + TAB + "d" + ENTER, "word"),
    ],
)
def test_keys_make_one_message(keys, message):
    assert read(keys) == [message]


def test_the_name_of_a_file_is_completed(tmp_path):
    (tmp_path / "a question.txt").touch()
    assert read(f"/read {tmp_path}/a{TAB}{ENTER}") == [f"/read {tmp_path}/a question.txt"]


def test_ctrl_c_on_an_empty_line_says_how_to_leave(capsys):
    assert read(CTRL_C, "still here" + ENTER) == ["still here"]
    assert LEAVE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "then", "message"),
    [
        ("next" + ENTER, ENTER, "next"),
        ("one" + ENTER + "two" + ENTER, " and three" + ENTER, "one\ntwo and three"),
        ("one\ntwo\n", ENTER, "one\ntwo"),  # the terminal has made a line feed of Enter
        ("nex" + LEFT, "e" + ENTER, "neex"),
        ("if x:\r\ty\r", ENTER, "if x:\n\ty"),
        ("x" * 3000 + ENTER + "y", ENTER, "x" * 3000 + "\ny"),
    ],
)
def test_what_was_typed_during_an_answer_waits_to_be_sent(before, then, message):
    assert read(then, before=before) == [message]


def test_what_follows_enter_at_once_waits_too():
    """As from a terminal that does not bracket what is pasted."""
    assert read("one\rtwo\rthree\r", ENTER) == ["one", "two\nthree"]


def test_bytes_that_are_not_text_do_no_harm(tmp_path):
    with create_pipe_input() as keyboard:
        typist = Typist(keyboard, ("\r",))
        with create_app_session(input=keyboard, output=typist):
            editor = Editor(following, tmp_path / "history")
            keyboard.send_bytes(b"caf\xe9")
            assert editor.read() == "caf?"


def test_a_history_outlives_its_chat(tmp_path):
    history = tmp_path / "new" / "history"
    read("first" + ENTER, '"""two' + ENTER + 'lines"""' + ENTER, history=history)
    assert read(UP + ENTER, history=history) == ["two\nlines"]
    assert read(UP + UP + UP + ENTER, history=history) == ["first"]
    assert read("\x12fir" + ENTER + ENTER, history=history) == ["first"]  # Ctrl-R


def test_without_a_file_a_history_ends_with_its_chat(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("one" + ENTER, UP + ENTER) == ["one", "one"]
    assert read(UP + "two" + ENTER) == ["two"]
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_history_is_its_owners_alone(tmp_path):
    history = tmp_path / "history"
    umask = os.umask(0)
    try:
        read("secret" + ENTER, history=history)
        assert history.stat().st_mode & 0o777 == 0o600
        history.chmod(0o644)
        read("secret" + ENTER, history=history)
        assert history.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(umask)


def test_a_history_keeps_the_newest(tmp_path):
    history = tmp_path / "history"
    history.write_text("".join(f"\n# then\n+entry {i}\n" for i in range(MOST_ENTRIES + 5)))
    assert read("newest" + ENTER, history=history) == ["newest"]
    entries = [line for line in history.read_text().splitlines() if line.startswith("+")]
    kept = [f"+entry {i}" for i in range(5, MOST_ENTRIES + 5)]
    assert entries == [*kept, "+newest"]
    assert [path.name for path in tmp_path.iterdir()] == ["history"]


def test_a_history_that_cannot_be_kept_is_one_line(tmp_path, capsys):
    history = tmp_path / "file" / "history"
    history.parent.touch()
    assert read("hello" + ENTER, UP + ENTER, history=history) == ["hello", "hello"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Messages are not kept for later chats: ")


def test_a_full_disk_does_not_end_a_chat(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileHistory, "store_string", full)
    history = tmp_path / "history"
    assert read("one" + ENTER, UP + ENTER, history=history) == ["one", "one"]
    assert history.read_bytes() == b""


@pytest.mark.parametrize(
    ("text", "still_open", "message"),
    [
        ("one", False, "one"),
        ('one"""', False, 'one"""'),
        ('"""', True, None),
        ('""""', True, None),
        ('""""""', False, ""),
        ('"""one', True, None),
        ('"""one"""', False, "one"),
        ('"""one""" ', False, "one"),
        ('"""\n  one\n"""', False, "  one"),
    ],
)
def test_triple_quotes_hold_a_message_together(text, still_open, message):
    assert is_open(text) == still_open
    if not still_open:
        assert unquoted(text) == message


def test_every_completion_is_understood(tiny_pair):
    chat = Chat(tiny_pair)
    for command in following([]):
        with suppress(ColmError) if command in ("/read", "/regen") else nullcontext():
            chat.command(command)
    with pytest.raises(ColmError, match="no command /dance"):
        chat.command("/dance")
    assert list(following(["/dance"])) == []
    assert set(following(["/set"])) == {*SETTINGS, "system"}
    for name in SETTINGS:
        for value in following(["/set", name]):
            chat.command(f"/set {name} {value}")
    assert len(COMMANDS) == 9
    assert all(command in HELP for command in COMMANDS)
