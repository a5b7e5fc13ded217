"""What the page keeps and lets a reader do with it. Answers are scripted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import Script, ask, pieces


def titles(page) -> list[str]:
    return page.locator("#list .title").all_inner_texts()


def shown(page, text: str):
    """The text in the conversation; the page also says it to who cannot see."""
    return page.locator("#log").get_by_text(text)


def menu(page, title: str, action: str) -> None:
    page.get_by_role("button", name=f"More of {title}").click()
    page.locator("#menu").get_by_role("button", name=action).click()


def test_what_is_written_survives_a_reload_and_is_gone_on_with(script):
    page = script.page
    ask(page, "Count")
    script.asked(1)
    script.write("one", (" two", "expert"))
    shown(page, "two").wait_for()
    page.reload()
    shown(page, "Cut here: the page was closed").wait_for()
    assert page.locator(".answer .text").inner_text() == "one two"
    assert page.locator(".answer .expert").count() == 1
    page.get_by_role("button", name="Continue").click()
    messages = script.asked(1)["messages"]
    assert messages[-1] == {"role": "assistant", "content": "one two"}
    script.undo(0, " too", 1)
    script.write(" three")
    script.end()
    assert page.locator(".answer .text").inner_text() == "one two three"
    assert page.locator("article").count() == 2
    mark = page.get_by_role("button", name="Withdrawn")  # counted from what was there
    assert mark.evaluate("e => e.nextElementSibling.textContent").strip() == "three"


def test_an_answer_is_saved_while_it_is_written(script):
    page = script.page
    ask(page, "Count")
    script.asked(1)
    kept = (
        "Object.entries(localStorage).find(([key]) => key.startsWith('colm-edge/chat/'))?.[1] ?? ''"
    )
    assert "Count" in page.evaluate(kept)
    script.write("one")
    while "three" not in page.evaluate(kept):  # tokens go on, and each second what is there is kept
        script.write(" three")
    script.end()


def test_tabs_share_what_they_keep(script, context):
    page = script.page
    script.answers("First question", "First answer.")
    other = context.new_page()
    other.goto(page.url)
    shown(other, "First answer.").wait_for()
    # Each writes a conversation of its own, and both keep both.
    second = Script(other)
    other.get_by_role("button", name="New chat").click()
    second.answers("Second question", "Second answer.")
    page.get_by_role("button", name="Second question", exact=True).wait_for()
    script.answers("Third question", "Third answer.", n=2)
    other.get_by_role("button", name="First question", exact=True).click()
    shown(other, "Third answer.").wait_for()
    for one in (page, other):
        one.reload()
        assert titles(one) == ["First question", "Second question"]
        assert shown(one, "Third answer.").count() == 1
    # A conversation that one of them writes in is the other's to read.
    ask(page, "Fourth question")
    script.asked(1)
    script.write("Fourth")
    shown(other, "Another tab is writing this answer.").wait_for()
    other.locator(".token", has_text="Fourth").wait_for()
    ask(other, "Fifth question")
    other.get_by_text("Another tab is writing in this conversation.").wait_for()
    assert other.get_by_label("Your message").input_value() == "Fifth question"
    page.close()  # before the answer is complete
    other.get_by_role("button", name="Continue").wait_for()


def test_a_conversation_deleted_in_another_tab_stays_deleted(script, context):
    page = script.page
    ask(page, "First question")
    script.asked(1)
    script.write("First")
    other = context.new_page()
    other.goto(page.url)
    menu(other, "First question", "Delete")
    other.get_by_text("Deleted.").wait_for()
    shown(page, "Two models write").wait_for()
    for one in (page, other):
        one.reload()
        assert titles(one) == []


def test_conversations_are_opened_renamed_and_deleted(script):
    page = script.page
    script.answers("First question", "First answer.")
    page.get_by_role("button", name="New chat").click()
    script.answers("Second question", "Second answer.", n=2)
    assert titles(page) == ["Second question", "First question"]
    page.get_by_role("button", name="First question", exact=True).click()
    assert shown(page, "First answer.").is_visible()
    page.go_back()
    assert shown(page, "Second answer.").is_visible()
    menu(page, "First question", "Rename")
    page.get_by_label("Name of the conversation").fill("A name")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="A name", exact=True).click()
    assert page.title() == "A name – colm-edge"
    menu(page, "A name", "Delete")
    assert titles(page) == ["Second question"]
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="Undo").click()
    assert sorted(titles(page)) == ["A name", "Second question"]
    assert shown(page, "First answer.").is_visible()
    page.reload()
    assert shown(page, "First answer.").is_visible()


def test_a_conversation_is_exported(script):
    page = script.page
    script.answers("What?", "This", (" one.", "expert"))
    with page.expect_download() as download:
        menu(page, "What?", "Export as Markdown")
    assert download.value.suggested_filename == "What.md"
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text == "# What?\n\n## You\n\nWhat?\n\n## Answer\n\nThis one.\n"
    with page.expect_download() as download:
        menu(page, "What?", "Export as JSON")
    chat = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert (chat["title"], chat["model"]) == ("What?", "tiny")
    question, answer = chat["messages"]
    assert question == {"role": "user", "content": "What?"}
    assert answer["content"] == "This one."
    assert answer["tokens"][1] == {"text": " one.", "source": "expert", "p_defer": 0.9}


def test_what_was_written_since_is_not_undone(script):
    page = script.page
    script.answers("First question", "First answer.")
    script.answers("Second question", "Second answer.", n=2)
    page.locator(".question").first.get_by_role("button", name="Delete").click()
    script.answers("Third question", "Third answer.", n=3)
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("The conversation has gone on since, and stays as it is.").wait_for()
    assert page.locator(".words").all_inner_texts() == ["Second question", "Third question"]
    assert page.get_by_role("button", name="Undo").count() == 0


def test_a_question_is_edited_and_what_followed_can_be_brought_back(script):
    page = script.page
    script.answers("First question", "First answer.")
    script.answers("Second question", "Second answer.", n=2)
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Your question").fill("Another question")
    page.keyboard.press("Enter")
    assert [m["content"] for m in script.asked(3)["messages"]] == ["Another question"]
    script.write("Another answer.")
    script.end()
    assert page.locator(".words").all_inner_texts() == ["Another question"]
    page.get_by_role("button", name="Undo").click()
    assert page.locator(".words").all_inner_texts() == ["First question", "Second question"]
    # Arrow up in the empty box: the last one.
    page.get_by_label("Your message").focus()
    page.keyboard.press("ArrowUp")
    assert page.get_by_label("Your question").input_value() == "Second question"
    page.keyboard.press("Escape")
    assert page.get_by_label("Your question").count() == 0
    assert shown(page, "Second answer.").is_visible()


def test_an_answer_is_written_again_and_a_turn_deleted(script):
    page = script.page
    script.answers("First question", "First answer.")
    script.answers("Second question", "Second answer.", n=2)
    page.locator(".answer").nth(1).get_by_role("button", name="Regenerate").click()
    contents = [m["content"] for m in script.asked(3)["messages"]]
    assert contents == ["First question", "First answer.", "Second question"]
    script.write("Third answer.")
    script.end()
    page.locator(".question").first.get_by_role("button", name="Delete").click()
    assert page.locator(".words").all_inner_texts() == ["Second question"]
    ask(page, "And?")
    contents = [m["content"] for m in script.asked(4)["messages"]]
    assert contents == ["Second question", "Third answer.", "And?"]


def test_settings_are_sent_and_kept_and_left_to_the_server_when_empty(script):
    page = script.page
    script.answers("One?", "One.")
    assert script.asked(1)["colm"] == {"trace": True, "provisional": True}
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Token limit").fill("7")
    page.get_by_label("Threshold").fill("0.25")
    page.get_by_label("Review").select_option("2 nats")
    page.get_by_label("Temperature").fill("-1")  # no temperature: the last one stays
    page.reload()
    script.answers("Two?", "Two.", n=1)
    asked = script.asked(1)
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["temperature"], asked["max_tokens"]) == (0.5, 7)
    assert asked["colm"] == {"trace": True, "provisional": True, "threshold": 0.25, "review": 2}
    page.get_by_role("button", name="Settings").click()
    for label in ("System prompt", "Temperature", "Token limit"):
        page.get_by_label(label).fill("")
    page.get_by_label("Review").select_option("off")
    page.get_by_role("button", name="Use the switch's own").click()
    page.keyboard.press("Escape")
    script.answers("Three?", "Three.", n=2)
    asked = script.asked(2)
    assert asked["messages"][0]["role"] == "user"
    assert asked.keys().isdisjoint({"temperature", "max_tokens"})
    assert asked["colm"] == {"trace": True, "provisional": True, "review": "off"}


def test_a_failed_question_is_tried_again(script):
    page = script.page
    for status, words in ((0, "The server does not answer."), (503, "3 requests are waiting")):
        script.refuse(status, words)
        ask(page, "Why?")
        shown(page, words).wait_for()
        assert page.locator(".words").last.inner_text() == "Why?"
    page.get_by_role("button", name="Retry").first.click()
    script.asked(3)
    assert page.locator(".words").count() == 1
    page.get_by_role("button", name="Undo").click()
    page.locator(".words").nth(1).wait_for()
    page.get_by_role("button", name="Retry").last.click()
    # The first one had no answer: it is no part of the conversation.
    assert [m["content"] for m in script.asked(4)["messages"]] == ["Why?"]
    script.write("Because.")
    page.evaluate("answer.close()")  # without an end
    shown(page, "The answer broke off.").wait_for()
    page.get_by_role("button", name="Continue").click()
    script.asked(5)
    script.end()
    assert shown(page, "broke off").count() == 0


def test_the_key_is_asked_for_until_it_is_right(script):
    page = script.page
    script.refuse(401, "the API key is missing or wrong")
    script.refuse(401, "the API key is missing or wrong")
    ask(page, "Why?")
    for n, key in ((2, "wrong"), (3, "right")):
        page.get_by_label("This server asks for its key").fill(key)
        page.keyboard.press("Enter")
        assert script.asked(n)["key"] == f"Bearer {key}"
    script.write("Because.")
    script.end()
    script.refuse(401, "the API key is missing or wrong")
    ask(page, "Why?")
    page.get_by_label("This server asks for its key").wait_for()
    page.keyboard.press("Escape")
    shown(page, "the API key is missing or wrong").wait_for()


def test_what_the_context_forgot_is_marked(script):
    page = script.page
    for n in (1, 2, 3):
        script.answers(f"Question {n}", f"Answer {n}.", n=n)
    for _ in range(2):
        script.refuse(400, "the context is full", "context_length_exceeded")
    ask(page, "Question 4")
    contents = [m["content"] for m in script.asked(6)["messages"]]
    assert contents == ["Question 3", "Answer 3.", "Question 4"]
    script.write("Answer 4.")
    script.end()
    page.reload()
    assert page.locator(".forgotten .words").all_inner_texts() == ["Question 1", "Question 2"]
    border = shown(page, "is not sent any more").bounding_box()["y"]
    for n, below in ((2, False), (3, True)):
        place = page.locator(".words", has_text=f"Question {n}").bounding_box()["y"]
        assert (place > border) is below
    # A question that is too long alone forgets nothing.
    for _ in range(3):
        script.refuse(400, "the context is full", "context_length_exceeded")
    ask(page, "Question 5")
    shown(page, "the context is full").wait_for()
    assert page.locator(".forgotten").count() == 0


def test_enter_sends_and_shift_enter_is_a_new_line(script):
    page = script.page
    box = page.get_by_label("Your message")
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert page.evaluate("asked.length") == 0
    box.press("Enter")
    assert script.asked(1)["messages"][0]["content"] == "one\ntwo"
    assert box.input_value() == ""
    page.keyboard.press("Escape")
    shown(page, "Stopped.").wait_for()


def test_a_full_storage_is_told_and_loses_nothing_before_the_tab_is_closed(script):
    page = script.page
    full = "() => { throw new DOMException('', 'QuotaExceededError'); }"
    page.evaluate(f"void (Storage.prototype.setItem = {full})")
    script.answers("One?", "One.")
    page.get_by_text("The browser keeps no more").wait_for()
    script.answers("Two?", "Two.", n=2)
    assert [m["content"] for m in script.asked(2)["messages"]] == ["One?", "One.", "Two?"]


def test_the_list_is_a_drawer_on_a_phone(script):
    page = script.page
    script.answers("First question", "First answer.")
    page.set_viewport_size({"width": 320, "height": 568})
    drawer = page.get_by_role("navigation", name="Conversations")
    assert drawer.is_hidden()
    page.get_by_role("button", name="Chats").click()
    drawer.get_by_role("button", name="New chat").click()
    assert drawer.is_hidden()
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="Chats").click()
    drawer.get_by_role("button", name="First question", exact=True).click()
    assert drawer.is_hidden()
    assert shown(page, "First answer.").is_visible()
    page.get_by_role("button", name="Chats").click()
    page.keyboard.press("Escape")
    assert drawer.is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_axe_finds_nothing(script, scheme, width):
    page, axe = script.page, Axe()
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 700})

    def check(what: str) -> None:
        found = axe.run(page)
        assert found.violations_count == 0, f"{what}: {found.generate_report()}"

    check("empty")
    script.refuse(503, "3 requests are waiting")
    ask(page, "Why?")
    page.get_by_role("button", name="Retry").wait_for()
    code = "## Two\n\n> said **once** in `code`\n\n```c\nint x = 1;\n```\n\n"
    code += "| a | b |\n|---|---|\n| 1 | [l](http://e.org) |\n"
    ask(page, "How?")
    script.asked(2)
    script.undo(1, "old", 1)
    script.write(*pieces(code, range(0, 30, 2)))
    script.end("length")
    page.locator(".withdrawn").first.click()
    check("an answer")
    script.refuse(400, "the context is full", "context_length_exceeded")
    ask(page, "Long?")
    script.asked(4)
    shown(page, "is not sent any more").wait_for()
    check("waiting")
    script.draft("A draft", (" of the expert", "expert"), ".")
    page.locator(".draft.expert").wait_for()
    check("drafts")
    script.end()
    page.get_by_role("button", name="Settings").click()
    check("settings")
    page.keyboard.press("Escape")
    if width < 800:
        page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="More of Why?").click()
    check("the list and its menu")
