"""A real browser for the tests of the page, and answers that a test writes itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip

# In the place of the server's answers: `asked` holds the requests, `answer` is the stream of the
# last one, and what is in `refusals` is answered first.
SCRIPT = """
window.asked = [];
window.refusals = [];
const real = window.fetch;
window.fetch = async (path, options) => {
  if (!String(path).endsWith("chat/completions")) return real(path, options);
  asked.push({ ...JSON.parse(options.body), key: options.headers.Authorization });
  if (refusals.length) {
    const [status, error] = refusals.shift();
    if (!status) throw new TypeError("no connection");
    return new Response(JSON.stringify({ error }), { status });
  }
  let own;
  const body = new ReadableStream({ start(controller) { own = window.answer = controller; } });
  options.signal.addEventListener("abort", () => own.error(new DOMException("", "AbortError")));
  return new Response(body.pipeThrough(new TextEncoderStream()));
};
"""

Token = str | tuple[str, str]  # a text, and who wrote it; the base if that is not said


class Script:
    """Writes the answers of one page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def asked(self, n: int) -> dict[str, Any]:
        """Wait for the n-th request since the page was loaded; return it."""
        self.page.wait_for_function("n => asked.length >= n", arg=n)
        found: dict[str, Any] = self.page.evaluate("n => asked[n - 1]", n)
        return found

    def refuse(self, status: int, message: str = "", code: str | None = None) -> None:
        """Answer the next request with an error; status 0: not at all."""
        self.page.evaluate(
            "one => refusals.push(one)", [status, {"message": message, "code": code}]
        )

    def events(self, *events: dict[str, Any]) -> None:
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self.page.evaluate("text => answer.enqueue(text)", text)

    def write(self, *tokens: Token) -> None:
        self.events(*({"choices": [{}], "colm": record(token)} for token in tokens))

    def draft(self, *tokens: Token) -> None:
        self.events(*({"choices": [{}], "colm": {"draft": record(token)}} for token in tokens))

    def undo(self, at: int, text: str, n: int, regret: float = 2.5) -> None:
        undone = {"at": at, "tokens": [0] * n, "text": text, "source": "base", "regret": regret}
        self.events({"choices": [{}], "colm": {"undone": undone}})

    def end(self, reason: str = "stop", total: int = 10) -> None:
        self.events({"choices": [{"finish_reason": reason}], "colm": {"defer_rate": 0}})
        self.events({"choices": [], "usage": {"total_tokens": total}})
        self.page.evaluate("answer.enqueue('data: [DONE]\\n\\n'); answer.close()")
        self.page.get_by_role("button", name="Send").wait_for()

    def answers(self, question: str, *tokens: Token, n: int = 1) -> None:
        """Ask a question, the n-th request of the page, and answer it."""
        ask(self.page, question)
        self.asked(n)
        self.write(*tokens)
        self.end()


def record(token: Token) -> dict[str, Any]:
    text, source = (token, "base") if isinstance(token, str) else token
    return {"id": 0, "text": text, "source": source, "p_defer": 0.9 if source == "expert" else 0.1}


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def picture(page: Page, name: str) -> None:
    """Keep a screenshot where COLM_EDGE_SCREENSHOTS says, to be looked at."""
    folder = os.environ.get("COLM_EDGE_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png")


def pieces(text: str, experts: Sequence[int] = ()) -> list[Token]:
    """Cut a text as a tokenizer might, in fours; the expert wrote some of the pieces."""
    cut = [text[i : i + 4] for i in range(0, len(text), 4)]
    return [(one, "expert") if i in experts else one for i, one in enumerate(cut)]
