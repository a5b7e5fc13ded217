"""The chat on a real pseudo-terminal, and where there is none."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from colm_edge.cli import main
from colm_edge.cli.keyboard import LEAVE
from colm_edge.cli.terminal import COMMAND, HELP, Chat, harmless, mark
from colm_edge.decode.step import Step
from colm_edge.errors import ColmError, ContextError

posix_only = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX terminal")
PROMPT = r"(?s)\x1b\[\?2004h.*?>>>"  # pastes are bracketed while a prompt reads
UNDER_WAY = r"(?s)\x1b\[\?2004l.{200}"  # an answer, behind the end of its prompt
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def models_of(tiny) -> list[str]:
    return ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "--temp", "0", "-n", "30"]


def endless_of(tiny) -> list[str]:
    # One token takes well under a millisecond: this context is not full for half a minute.
    endless = tiny["endless"]
    return ["-m", endless, "-me", endless, "-t", "1", "--temp", "0", "-c", "100000"]


class Terminal:
    """`colm-edge` on a pseudo-terminal; `expect` reads on until a text appears."""

    # The terminal controls the process, as a shell's does, so that it turns Ctrl-C into a signal.
    # A job in the background hands an ignored SIGINT down to its children.
    START = (
        "import fcntl, signal, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from colm_edge.cli import main; main(sys.argv[1:])"
    )

    def __init__(self, *args: str, **environment: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        # This terminal does not answer when it is asked where its cursor is.
        surroundings = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", self.START, *args],
            stdin=slave, stdout=slave, stderr=slave, close_fds=True, start_new_session=True,
            env={**os.environ, **surroundings, **environment},
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def expect(self, pattern: str, *, after: str = "") -> str:
        """Read until the pattern appears.

        after: what is sent, and again when nothing has come for half a second. Python's input()
        does not see a signal between its prompt and its read.
        """
        deadline = time.monotonic() + 60
        self.send(after)
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[-500:]!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError as e:  # it has ended
                    raise AssertionError(f"exit {self.ends()} after {self.text[-500:]!r}") from e
            else:
                self.send(after)
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def say(self, text: str) -> str:
        """Send a message or a command; return what appears until the next prompt is there."""
        self.send(f"{text}\r")
        return self.expect(PROMPT)

    def ends(self) -> int:
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@contextmanager
def terminal(*args: str, **environment: str) -> Iterator[Terminal]:
    it = Terminal(*args, **environment)
    try:
        yield it
    finally:
        it.close()


@pytest.fixture
def history(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "colm-edge" / "history"


def entries(history: Path) -> list[str]:
    found = re.findall(r"(?:^\+.*\n)+", history.read_text(), re.MULTILINE)
    return [re.sub(r"^\+", "", entry, flags=re.MULTILINE).rstrip("\n") for entry in found]


@posix_only
def test_a_chat_in_a_terminal(tiny):
    with terminal("run", *models_of(tiny), "-sw", "margin") as it:
        it.expect(PROMPT)
        assert "/regen" in it.say("/help")
        it.say("/set threshold 0")
        answer = it.say("hello")
        assert "100% deferred" in answer
        assert "\x1b[36m\x1b[4m" in answer  # coloured and underlined
        it.say("/set threshold 1")
        answer = it.say("/regen")
        assert ", 0% deferred" in answer
        assert "\x1b[36m" not in answer
        assert "Error: no setting colour" in it.say("/set colour red")
        assert "Error: temperature is 'warm'" in it.say("/set temperature warm")
        assert "Error: the grammar is not valid" in it.say("/set grammar x")
        assert "Error: no command /dance" in it.say("/dance")
        it.send('"""two\r')
        it.expect(r"\.\.\.")
        assert it.say('lines"""').count("deferred") == 1
        it.send("/bye\r")
        assert it.ends() == 0


@posix_only
def test_chat_asks_its_prompt_first(tiny):
    with terminal("chat", "hello", "you", *models_of(tiny)) as it:
        assert it.expect(PROMPT).count("deferred") == 1
        assert it.say("/regen").count("deferred") == 1
        it.send(CTRL_D)
        assert it.ends() == 0


@posix_only
def test_a_long_chat_forgets_its_oldest_turns(tiny):
    with terminal("chat", *endless_of(tiny), "-c", "64", "-n", "9") as it:
        it.expect(PROMPT)
        for _ in range(8):
            seen = it.say("hello")
            assert "Error" not in seen
            assert "deferred" in seen
        assert "turn(s) forgotten" in seen
        assert "threshold 0.25" in it.say("/set threshold 0.25")
        assert "strategy compose" in " ".join(it.say("/set  strategy  compose").split())
        assert "threshold follows a defer rate of 0.2" in it.say("/set threshold")


@posix_only
def test_a_setting_goes_back_to_what_it_was_at_the_start(tiny):
    with terminal("chat", *endless_of(tiny), "--defer-rate", "0.3") as it:
        it.expect(PROMPT)
        assert "threshold 1.0" in it.say("/set threshold 1")
        assert "threshold follows a defer rate of 0.3" in it.say("/set threshold")


@posix_only
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny):
    with terminal("run", *endless_of(tiny)) as it:
        it.expect(PROMPT)
        it.send("hello\r")
        it.expect(UNDER_WAY)
        it.send(CTRL_C)
        it.expect(r"\(stopped\)")
        assert "^C" not in it.expect("deferred")
        it.expect(PROMPT)
        it.send(CTRL_C)
        it.expect(LEAVE)
        it.expect(PROMPT)
        it.send("junk")
        it.expect("junk")
        it.send(CTRL_C + CTRL_D)  # leaves an empty line only
        assert it.ends() == 0


@posix_only
def test_a_signal_at_the_prompt_does_not_end_the_chat(tiny):
    with terminal("chat", *models_of(tiny)) as it:
        it.expect(PROMPT)
        os.kill(it.process.pid, signal.SIGINT)
        it.expect(LEAVE)
        it.expect(PROMPT)
        assert "deferred" in it.say("hello")


@posix_only
def test_what_is_typed_during_an_answer_waits_for_its_end(tiny, history):
    with terminal("chat", *endless_of(tiny)) as it:
        it.expect(PROMPT)
        it.send("hello\r")
        it.expect(UNDER_WAY)
        it.send(f"typed early\rand more\r{CTRL_C}")
        answer = it.expect(PROMPT)
        assert "(stopped)" in answer
        assert "early" not in answer
        it.expect("(?s)typed early.*and more")
        it.send(" and now\r")
        it.expect(UNDER_WAY)
        it.send(CTRL_C)
        it.expect(PROMPT)
    assert entries(history) == ["hello", "typed early\nand more and now"]


@posix_only
def test_pasted_lines_are_one_message(tiny, history):
    with terminal("chat", *models_of(tiny)) as it:
        it.expect(PROMPT)
        it.send("\x1b[200~one\r\n\rthree\x1b[201~")
        it.expect("three")
        assert it.say("").count("deferred") == 1
    assert entries(history) == ["one\n\nthree"]


@posix_only
def test_a_history_lasts_until_it_is_not_wanted(tiny, history):
    with terminal("chat", *models_of(tiny)) as it:
        it.expect(PROMPT)
        it.say("remember me")
        it.send(CTRL_D)
        assert it.ends() == 0
    with terminal("run", *models_of(tiny)) as it:
        it.expect(PROMPT)
        it.send(UP)
        it.expect("remember me")
    kept = history.read_bytes()
    with terminal("chat", "--no-history", *models_of(tiny)) as it:
        it.expect(PROMPT)
        it.say("forget me")
        it.send(UP + UP)  # the second finds nothing
        it.expect("forget me")
        it.send(CTRL_C + CTRL_D)
        assert it.ends() == 0
    assert history.read_bytes() == kept
    assert [path for path in history.parents[1].rglob("*") if path.is_file()] == [history]


@posix_only
def test_without_colour_the_experts_tokens_are_underlined(tiny):
    with terminal("run", "hello", *models_of(tiny), "--threshold", "0", NO_COLOR="1") as it:
        answer = it.expect("100% deferred")
        assert "\x1b[4m" in answer
        assert "\x1b[36m" not in answer


@posix_only
def test_a_dumb_terminal_gets_plain_lines(tiny, history):
    with terminal("chat", *models_of(tiny), "--threshold", "0", TERM="dumb") as it:
        seen = it.expect(">>> ")
        it.send("hello\n")
        seen += it.expect("100% deferred")
        seen += it.expect(">>> ")
        seen += it.expect(LEAVE, after=CTRL_C)
        seen += it.expect(">>> ")
        it.send('"""two\n')
        seen += it.expect(r"\.\.\. ")
        it.send('lines"""\n')
        seen += it.expect("100% deferred")
        assert "\x1b" not in seen
        it.expect(">>> ")
        it.send(CTRL_D)
        assert it.ends() == 0
    assert not history.exists()


def test_a_chat_is_read_from_a_file_too(tiny):
    def ask(*args: str, said: str | bytes = ""):
        result = CliRunner().invoke(main, [*args, *models_of(tiny)], input=said)
        assert result.exit_code == 0, result.output
        return result

    one = ask("run", "hello")
    chat = ask("chat", said='hello\n/clear\n"""hello\n"""\n/bye\nnot this')
    assert chat.stdout == one.stdout * 2
    assert ask("chat", "hello").stdout == one.stdout
    assert ask("chat", said='"""hello').stdout == one.stdout  # the end of the file closes it
    assert ask("chat", "-", said="hello").stdout == one.stdout
    assert "tok/s" in ask("chat", said=b"caf\xe9 and more").stderr


def test_the_manual_shows_the_help_of_the_chat():
    manual = Path(__file__).parents[2] / "docs" / "cli.md"
    assert f"```text\n>>> /help\n{HELP}\n```" in manual.read_text(encoding="utf-8")


def test_a_path_is_a_message_and_no_command():
    for line in ("/help", "/?", "/set temperature 0", "/nonsense", " /help", "/Help"):
        assert COMMAND.fullmatch(line)
    others = "/etc/hosts is a file", "/usr/bin", "hello", "// a comment", "/ is the root"
    for line in (*others, "/usage\nof this"):
        assert not COMMAND.fullmatch(line)


def test_an_empty_system_prompt_is_one(tiny_pair, monkeypatch):
    tiny_pair.defaults = tiny_pair.defaults.with_changes(max_tokens=1)
    asked: list[list[dict[str, str]]] = []
    stream_chat = tiny_pair.stream_chat
    monkeypatch.setattr(
        tiny_pair, "stream_chat", lambda given: asked.append(given) or stream_chat(given)
    )
    chat, user = Chat(tiny_pair, ""), {"role": "user", "content": "x"}
    for command in ("/clear", "/set system", '/set system ""'):
        chat.command("/clear")
        chat.command(command)
        chat.ask("x")
    empty = {"role": "system", "content": ""}
    assert asked == [[empty, user], [user], [empty, user]]


def test_an_answer_cannot_drive_the_terminal():
    step = Step(1, "expert", 0.9, -0.1)
    step.text = "a\x1b[2J\x07\x9b31mb\tc\n\r"
    assert harmless(step.text) == "a[2J31mb\tc\n"
    assert click.unstyle(mark(step, {"expert": "cyan"})) == "a[2J31mb\tc\n"


def say_of(run) -> list[str]:
    return run.stderr.splitlines()


def test_what_cuts_an_answer_says_so(tiny):
    """Also in a chat; an answer that ends by itself says nothing."""
    endless = ["-m", tiny["endless"], "-me", tiny["endless"], "-t", "1", "--temp", "0", "-c", "64"]
    limit, full = "cut: the limit of tokens (-n)", "cut: the context is full (-c)"
    for options, end in (["-n", "5"], limit), ([], full), (["-n", "500"], full):
        run = CliRunner().invoke(main, ["run", *endless, *options, "hello"])
        assert run.exit_code == 0
        assert say_of(run)[-1].endswith("; " + end)
        run = CliRunner().invoke(main, ["chat", *endless, *options], input="hello\n")
        assert sum(line.endswith("; " + end) for line in say_of(run)) == 1
    run = CliRunner().invoke(main, ["run", "-t", "1", "--temp", "0", "What is the symbol of iron?"])
    assert "cut" not in run.stderr


def test_a_second_ctrl_c_at_the_end_of_an_answer_leaves_the_chat_as_it_is(tiny_pair, monkeypatch):
    tiny_pair.defaults = tiny_pair.defaults.with_changes(temperature=0.0, max_tokens=2)
    lines, ends = iter(["hello", " /Set top_k 3", "again", None]), []

    def interrupted(*args) -> None:
        ends.append(args)
        if len(ends) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("colm_edge.cli.terminal.say_end", interrupted)
    chat = Chat(tiny_pair, read=lambda: next(lines))
    chat.loop()
    assert len(ends) == 2
    assert [turn["content"] for turn in chat.turns[::2]] == ["hello", "again"]
    assert tiny_pair.defaults.top_k == 3


def test_a_message_that_does_not_fit_leaves_the_conversation(tiny_pair, capsys):
    tiny_pair.defaults = tiny_pair.defaults.with_changes(temperature=0.0, max_tokens=5)
    chat = Chat(tiny_pair)
    chat.ask("hello")
    turns = chat.turns[:]
    with pytest.raises(ContextError, match="the context holds 256"):
        chat.ask("x y z " * 200)
    assert chat.turns == turns
    assert "forgotten" not in capsys.readouterr().err
    chat.ask("x y z " * 30)  # it fits alone
    assert chat.turns[-2]["content"] == "x y z " * 30
    assert "1 old turn(s) forgotten" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ColmError])
@pytest.mark.parametrize("at", ["stream_chat", "write"])
def test_whatever_ends_a_message_early_leaves_the_conversation(tiny_pair, monkeypatch, at, stop):
    tiny_pair.defaults = tiny_pair.defaults.with_changes(temperature=0.0, max_tokens=5)
    chat = Chat(tiny_pair)
    chat.ask("hello")
    chat.ask("x y z " * 10)
    turns = chat.turns[:]

    def ends(*args) -> None:
        raise stop("here")

    if at == "write":
        monkeypatch.setattr("colm_edge.cli.terminal.write", ends)
    else:
        monkeypatch.setattr(tiny_pair, at, ends)
    for run in (lambda: chat.command("/regen"), lambda: chat.ask("x y z " * 30)):
        with pytest.raises(stop):
            run()
        assert chat.turns == turns


def test_a_context_beyond_training_and_lost_roles_warn_once(tiny):
    files = ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1", "--temp", "0", "-n", "3"]
    beyond = "-c 1000 is more than the 512 tokens the models are made for."
    roles = (
        "base.gguf has no chat template: what system, user and assistant say is joined by blank "
        "lines, and who says it is not passed on."
    )

    def said(*args: str, text: str | None = None) -> list[str]:
        run = CliRunner().invoke(main, [*args, *files], input=text)
        assert run.exit_code == 0
        return [line for line in say_of(run) if line in (beyond, roles)]

    assert said("run", "-c", "1000", "hello") == [beyond]
    assert said("run", "hello") == []
    assert said("run", "-sys", "be brief", "--raw", "hello") == []
    assert said("run", "-sys", "be brief", "hello") == [roles]
    assert said("chat", "-c", "1000", text="one\ntwo\nthree\n") == [beyond, roles]
