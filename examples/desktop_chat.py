"""A chat window over colm-edge: tokens marked by their writer, a stop button, a threshold slider.

    pip install 'colm-edge[desktop]'
    python examples/desktop_chat.py                                    # the pair that ships
    python examples/desktop_chat.py -m BASE.gguf -me EXPERT.gguf -sw SWITCH.gguf
    python examples/desktop_chat.py --ask "What is the symbol of tungsten?"    # no window

The pair lives on a thread of its own, which signals each step to the window; the window never
waits for it.
"""

from __future__ import annotations

import argparse
import os
import sys

from PySide6 import QtWidgets as Qw
from PySide6.QtCore import QObject, Qt, QThread, Signal, Slot
from PySide6.QtGui import QCloseEvent, QColor, QFont, QPalette, QTextCharFormat, QTextCursor

import colm_edge

Turns = list[dict[str, str]]


class Writer(QObject):
    """The pair, on the thread this object is moved to; everything it says, it says by signals."""

    loaded = Signal(float, str)  # the switch's threshold, the names of the models
    progress = Signal(str, float)
    wrote = Signal(object)  # a Step
    finished = Signal(str, object)  # the whole answer, its Stats
    failed = Signal(str)

    def __init__(self, model: str | None, expert: str | None, switch: str | None) -> None:
        super().__init__()
        self._files = (model, expert, switch)
        self._pair: colm_edge.Pair | None = None
        self._stream: colm_edge.Stream | None = None
        self.stopped = False

    @Slot()
    def load(self) -> None:
        try:
            self._pair = pair = colm_edge.load(*self._files, progress=self._tell)
        except Exception as e:  # whatever it was, the window says it
            self.failed.emit(str(e) or type(e).__name__)
            return
        names = f"{pair.base.path.name} with {os.path.basename(pair.expert.name)}"
        self.loaded.emit(pair.threshold(pair.defaults), names)

    def _tell(self, what: str, share: float) -> None:
        if self.stopped and self._pair is None:  # the window was closed while it loads
            raise colm_edge.ColmError("stopped")
        self.progress.emit(what, share)

    @Slot(list, object)
    def write(self, turns: Turns, threshold: float | None) -> None:
        """Answer the last of the turns; the oldest are left out where all do not fit. Without a
        threshold the switch has its own, which for an untrained one follows a rate."""
        pair = self._pair
        if pair is None:
            return
        try:
            while len(turns) > 2 and len(pair.prompt_tokens(turns)) > pair.n_ctx * 3 // 4:
                turns = turns[2:]
            stream = pair.stream_chat(turns, threshold=threshold, temperature=0)
            self._stream = stream
            if self.stopped:  # before there was a stream to stop
                stream.cancel()
            for event in stream.events():
                self.wrote.emit(event)
            answer = stream.answer()
            self.finished.emit(answer.text, answer.stats)
        except Exception as e:  # whatever it was, the window goes on
            self.failed.emit(str(e) or type(e).__name__)
        finally:
            self._stream = None

    def stop(self) -> None:
        """End the load, or the answer after at most one more token; the window calls this."""
        self.stopped, stream = True, self._stream
        if stream is not None:
            stream.cancel()

    @Slot()
    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()
        QThread.currentThread().quit()


class ChatWindow(Qw.QMainWindow):
    """The window. `answered` and `failed` say that it waits for the next question."""

    asked = Signal(list, object)
    leaving, ready = Signal(), Signal()
    answered, failed = Signal(str), Signal(str)

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.setWindowTitle("colm-edge")
        self.resize(680, 460)
        self.turns: Turns = []
        self._drafts: list[str] = []  # at the end of the text; they may be taken back
        self._threshold: float | None = None  # once the slider was moved
        self._writer, self._thread = writer, QThread(self)
        self._build()
        writer.moveToThread(self._thread)
        self._thread.started.connect(writer.load)
        self.asked.connect(writer.write)
        self.leaving.connect(writer.close)
        writer.loaded.connect(self._on_loaded)
        writer.progress.connect(self._on_progress)
        writer.wrote.connect(self._on_wrote)
        writer.finished.connect(self._on_finished)
        writer.failed.connect(self._on_failed)
        self._thread.start()

    def _build(self) -> None:
        self.text = Qw.QTextEdit(readOnly=True)
        self.text.document().setDocumentMargin(12)
        self.prompt = Qw.QLineEdit(placeholderText="Ask something", enabled=False)
        self.prompt.returnPressed.connect(self.ask)
        self.send = Qw.QPushButton("Ask", enabled=False)
        self.send.clicked.connect(self.ask)
        self.stop = Qw.QPushButton("Stop", enabled=False)
        self.stop.clicked.connect(self._writer.stop, Qt.ConnectionType.DirectConnection)
        self.slider = Qw.QSlider(Qt.Orientation.Horizontal, minimum=0, maximum=100, enabled=False)
        self.slider.setToolTip("The expert writes where the switch is surer than this: 1 is never")
        self.slider.valueChanged.connect(self._choose_threshold)
        self.threshold = Qw.QLabel()
        self.threshold.setMinimumWidth(self.fontMetrics().horizontalAdvance("threshold 0.00 "))
        self.bar = Qw.QProgressBar(maximum=100, textVisible=False)
        self.bar.setMaximumWidth(120)
        self._show_threshold(0)
        centre = Qw.QWidget()
        self.setCentralWidget(centre)
        column = Qw.QVBoxLayout(centre)
        column.addWidget(self.text)
        for widgets in (
            (Qw.QLabel("expert"), self.slider, Qw.QLabel("base"), self.threshold),
            (self.prompt, self.send, self.stop),
        ):
            row = Qw.QHBoxLayout()
            column.addLayout(row)
            for widget in widgets:
                row.addWidget(widget)
        self.statusBar().addPermanentWidget(self.bar)
        self.statusBar().showMessage("loading …")

    def ask(self) -> None:
        """Send the prompt that was typed."""
        question = self.prompt.text().strip()
        if not question or not self.send.isEnabled():
            return
        self.prompt.clear()
        self._set_busy(True)
        bold = QTextCharFormat()
        bold.setFontWeight(QFont.Weight.Bold)
        self._append(question + "\n", bold)
        self.turns.append({"role": "user", "content": question})
        self._writer.stopped = False
        self.asked.emit(list(self.turns), self._threshold)

    def _set_busy(self, busy: bool) -> None:
        self.stop.setEnabled(busy)
        for widget in (self.prompt, self.send, self.slider):
            widget.setEnabled(not busy)
        if not busy:
            self.prompt.setFocus()

    def _append(self, text: str, style: QTextCharFormat) -> None:
        at_end = QTextCursor(self.text.document())
        at_end.movePosition(QTextCursor.MoveOperation.End)
        at_end.insertText(text, style)
        bar = self.text.verticalScrollBar()
        bar.setValue(bar.maximum())

    def _choose_threshold(self, percent: int) -> None:
        self._threshold = percent / 100
        self._show_threshold(self._threshold)

    def _show_threshold(self, threshold: float) -> None:
        self.threshold.setText(f"threshold {threshold:.2f}")

    def _on_loaded(self, threshold: float, names: str) -> None:
        self.slider.blockSignals(True)  # nobody has moved it
        self.slider.setValue(round(100 * threshold))
        self.slider.blockSignals(False)
        self._show_threshold(threshold)
        self.bar.hide()
        self.statusBar().showMessage(names)
        self._set_busy(False)
        self.ready.emit()

    def _on_progress(self, what: str, share: float) -> None:
        self.bar.setVisible(share < 1)
        self.bar.setValue(round(100 * share))

    def _on_wrote(self, event: colm_edge.Step | colm_edge.Drafted | colm_edge.Undone) -> None:
        self._rub_out_drafts()
        if isinstance(event, colm_edge.Drafted):
            self._drafts.append(event.step.text)
        elif isinstance(event, colm_edge.Undone):
            del self._drafts[len(self._drafts) - len(event.steps) :]
        else:
            del self._drafts[:1]  # it has become this step
            self._append(event.text, self._style_of(event))
        pale = QTextCharFormat()
        pale.setForeground(self.palette().color(QPalette.ColorRole.PlaceholderText))
        self._append("".join(self._drafts), pale)

    def _style_of(self, step: colm_edge.Step) -> QTextCharFormat:
        style = QTextCharFormat()
        if step.by_expert:  # underlined too: colour alone does not reach everybody
            style.setFontUnderline(True)
            dark = self.palette().color(QPalette.ColorRole.Base).lightness() < 128
            style.setForeground(QColor("#4dd0e1" if dark else "#00738c"))
        return style

    def _rub_out_drafts(self) -> None:
        n = len("".join(self._drafts).encode("utf-16-le")) // 2  # as Qt counts
        drafts = QTextCursor(self.text.document())
        drafts.movePosition(QTextCursor.MoveOperation.End)
        left, keep = QTextCursor.MoveOperation.Left, QTextCursor.MoveMode.KeepAnchor
        drafts.movePosition(left, keep, n)
        drafts.removeSelectedText()

    def _on_finished(self, text: str, stats: colm_edge.Stats) -> None:
        self._rub_out_drafts()
        self._drafts.clear()
        self.turns.append({"role": "assistant", "content": text})
        self._append("\n\n", QTextCharFormat())
        told = f"{stats.n_generated} tokens, {stats.defer_rate:.0%} by the expert"
        self.statusBar().showMessage(told)
        self._set_busy(False)
        self.answered.emit(text)

    def _on_failed(self, error: str) -> None:
        self.statusBar().showMessage(error)
        if self.turns and self.turns[-1]["role"] == "user":
            self._rub_out_drafts()
            self._drafts.clear()
            self._append("\n\n", QTextCharFormat())
            self.turns.pop()
            self._set_busy(False)
        self.failed.emit(error)

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802  (Qt's name)
        self._writer.stop()
        self.leaving.emit()
        self._thread.wait()
        super().closeEvent(event)


def main() -> int:
    parser = argparse.ArgumentParser(description="A chat window over colm-edge.")
    parser.add_argument("-m", "--model", help="the base, a GGUF file")
    parser.add_argument("-me", "--model-expert", help="the expert, a GGUF file")
    parser.add_argument("-sw", "--switch", help="the switch, a file or a name")
    parser.add_argument("--ask", metavar="QUESTION", help="print the answer and leave")
    args = parser.parse_args()
    if args.ask is not None and not args.ask.strip():
        parser.error("--ask: the question is empty")
    if args.ask:
        os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    app = Qw.QApplication(sys.argv[:1])
    window = ChatWindow(Writer(args.model, args.model_expert, args.switch))
    if not args.ask:
        window.show()
        return app.exec()

    def leave(code: int) -> None:
        window.close()
        app.exit(code)

    window.ready.connect(lambda: (window.prompt.setText(args.ask), window.ask()))
    window.answered.connect(lambda text: (print(text), leave(0)))
    window.failed.connect(lambda error: (print(f"Error: {error}", file=sys.stderr), leave(1)))
    return app.exec()


if __name__ == "__main__":
    sys.exit(main())
