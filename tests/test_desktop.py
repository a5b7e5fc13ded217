"""The example window, offscreen: it shows answers, marks the expert's tokens, stops, and stays
responsive."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip(
    "PySide6.QtWidgets", reason="the window needs the extra [desktop]", exc_type=ImportError
)

import PySide6
from PySide6.QtCore import QEventLoop, QTimer
from PySide6.QtWidgets import QApplication

import colm_edge

if PySide6.__version__ == "6.12.0" and sys.version_info < (3, 12):
    # Every signal drops a reference to True, until Python crashes.
    pytest.skip("PySide 6.12.0 needs Python 3.12", allow_module_level=True)

EXAMPLE = Path(__file__).parent.parent / "examples" / "desktop_chat.py"
QUESTION = "What is the symbol of tungsten?"


@pytest.fixture(scope="module")
def example():
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    spec = importlib.util.spec_from_file_location("desktop_chat", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["desktop_chat"] = module
    spec.loader.exec_module(module)
    module.app = QApplication.instance() or QApplication([])
    return module


def wait_for(signal, begin=lambda: None) -> list:
    """Run the event loop until a signal is emitted; return its arguments."""
    loop, got = QEventLoop(), []
    signal.connect(lambda *args: (got.append(args), loop.quit()))
    late = QTimer(singleShot=True)
    late.timeout.connect(loop.quit)
    late.start(60_000)
    QTimer.singleShot(0, begin)
    loop.exec()
    assert got, "the signal did not come in a minute"
    return got[0]


@pytest.fixture
def window(example):
    window = example.ChatWindow(example.Writer(None, None, None))
    window.show()
    wait_for(window.ready)
    yield window
    window.close()


@pytest.fixture
def endless_window(example, tiny):
    """A window over a pair that writes slowly, to the end of its context."""
    writer = example.Writer(tiny["endless"], tiny["expert"], "margin")
    window = example.ChatWindow(writer)
    wait_for(window.ready)
    pair = writer._pair
    pair.base.__dict__["end_tokens"] = pair.expert_session.model.__dict__["end_tokens"] = (
        frozenset()
    )
    sync = pair.base_session.sync

    def slow(tokens, *rest):
        time.sleep(0.01)
        return sync(tokens, *rest)

    pair.base_session.sync = slow
    window.slider.setValue(100)
    yield window
    window.close()


def ask(window, question: str) -> str:
    def begin() -> None:
        window.prompt.setText(question)
        window.send.click()

    return wait_for(window.answered, begin)[0]


def runs(window) -> list[tuple[str, bool]]:
    """Return the window's text in pieces of one format, each with whether it is underlined."""
    found = []
    block = window.text.document().begin()
    while block.isValid():
        at = block.begin()
        while not at.atEnd():
            piece = at.fragment()
            found.append((piece.text(), piece.charFormat().fontUnderline()))
            at += 1
        block = block.next()
    return found


def test_the_answer_is_shown_with_the_experts_tokens_marked(window):
    answer = ask(window, QUESTION)
    assert "W" in answer
    assert answer in window.text.toPlainText()
    marked = "".join(text for text, underlined in runs(window) if underlined)
    assert "W" in marked
    assert marked != answer
    assert "by the expert" in window.statusBar().currentMessage()
    assert window.send.isEnabled()
    assert not window.stop.isEnabled()


def test_until_the_slider_is_moved_a_switch_has_its_own_threshold(window, monkeypatch):
    """That of an untrained one follows a rate; a number would hold it where it begins."""
    asked = []
    monkeypatch.setattr(
        window._writer._pair, "stream_chat", lambda turns, **how: asked.append(how) or stop()
    )

    def stop():
        raise colm_edge.ColmError("enough")

    wait_for(window.failed, lambda: (window.prompt.setText("x"), window.ask()))
    window.slider.setValue(40)
    wait_for(window.failed, lambda: (window.prompt.setText("x"), window.ask()))
    assert [how["threshold"] for how in asked] == [None, 0.4]


def test_the_slider_sets_which_model_writes(window):
    window.slider.setValue(100)
    answer = ask(window, QUESTION)
    assert answer
    assert not any(underlined for _, underlined in runs(window))
    window.text.clear()
    window.slider.setValue(0)
    answer = ask(window, QUESTION)
    assert answer == "".join(text for text, underlined in runs(window) if underlined)


def test_a_failure_leaves_no_drafts_that_later_tokens_would_replace(endless_window):
    window = endless_window
    window.turns.append({"role": "user", "content": "one"})
    window._on_wrote(colm_edge.Step(1, "base", 0.1, -0.1, "Kept"))
    window._on_wrote(colm_edge.Drafted(colm_edge.Step(1, "base", 0.1, -0.1, " and withdrawn")))
    window._on_failed("the expert is gone")
    window.text.textCursor().insertText("two")
    window._on_wrote(colm_edge.Step(1, "base", 0.1, -0.1, "Yes"))
    assert window.text.toPlainText() == "Kept\n\ntwoYes"


def test_an_answer_is_stopped(endless_window):
    window = endless_window
    steps = []

    def stop_at_the_third(step) -> None:
        steps.append(step)
        if len(steps) == 3:
            window.stop.click()

    window._writer.wrote.connect(stop_at_the_third)
    stopped = ask(window, "hello")
    assert 3 <= len(steps) < window._writer._pair.n_ctx / 2
    assert stopped == "".join(step.text for step in steps)
    steps.clear()
    assert ask(window, "again") != ""  # the pair is usable


def test_the_window_is_responsive_while_an_answer_is_written(endless_window):
    """A timer ticks between the tokens; one that waited for the answer could not stop it."""
    window, steps, ticks = endless_window, [], []

    def tick() -> None:
        if steps:
            ticks.append(len(steps))
        if len(ticks) == 30:
            window.stop.click()

    window._writer.wrote.connect(steps.append)
    ticking = QTimer(interval=5)
    ticking.timeout.connect(tick)
    ticking.start()
    ask(window, "hello")
    ticking.stop()
    assert len(steps) < window._writer._pair.n_ctx / 2
    assert len(set(ticks[:30])) > 5


def test_a_window_closes_in_the_middle_of_an_answer(endless_window):
    window = endless_window
    wait_for(window._writer.wrote, lambda: (window.prompt.setText("hello"), window.send.click()))
    window.close()
    assert window._thread.isFinished()
    assert window._writer._pair.base._handle is None


def test_a_missing_model_is_reported(example):
    window = example.ChatWindow(example.Writer("none.gguf", "none.gguf", None))
    assert "none.gguf" in wait_for(window.failed)[0]
    assert not window.send.isEnabled()
    window.close()


def test_ask_prints_the_answer_and_exits():
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--ask", QUESTION],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "W" in done.stdout


def test_a_window_closes_while_it_loads(example):
    writer = example.Writer(None, None, None)
    window = example.ChatWindow(writer)
    wait_for(writer.progress, lambda: None)
    window.close()
    assert window._thread.isFinished()
    assert writer._pair is None or writer._pair.base._handle is None
    early = example.Writer(None, None, None)
    early.stopped = True
    window = example.ChatWindow(early)
    assert wait_for(window.failed)[0] == "stopped"
    assert early._pair is None
    window.close()
