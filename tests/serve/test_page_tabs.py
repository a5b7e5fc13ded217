"""Two tabs, a full storage, Back, Undo and the keyboard: nothing of the reader's is lost."""

from __future__ import annotations

import pytest
from browsing import SCRIPT, Script, ask

NO_LOCKS = "Object.defineProperty(navigator, 'locks', { value: undefined });"
FOCUS = "document.activeElement.textContent || document.activeElement.id"


def turns(page) -> list[str]:
    return page.locator(".question .words").all_inner_texts()


def press(page, n: int, name: str) -> None:
    """Press a button of the n-th turn by the keyboard."""
    found = page.locator(".turn").nth(n).get_by_role("button", name=name, exact=True)
    found.focus()
    page.keyboard.press("Enter")


@pytest.fixture(params=["locks", "no locks"])
def tab(request, context, url):
    """A page over https, or over plain http to another machine, which has no locks."""
    context.add_init_script(SCRIPT + (NO_LOCKS if request.param == "no locks" else ""))
    page = context.new_page()
    page.goto(url)
    return Script(page)


def test_what_another_tab_writes_is_left_alone(tab, context):
    page = tab.page
    tab.answers("one", "old answer")
    ask(page, "two")
    tab.asked(2)
    tab.write("begun ")
    other = context.new_page()
    other.goto(page.url)
    other.get_by_text("Another tab is writing this answer.").wait_for()
    for action in "Regenerate", "Delete":
        press(other, 0, action)
        other.get_by_text("Another tab is writing in this conversation.").wait_for()
    assert turns(other) == turns(page) == ["one", "two"]
    assert other.get_by_role("button", name="Continue").count() == 0
    tab.write("ended")
    tab.end()
    other.get_by_text("begun ended").wait_for()
    press(other, 0, "Delete")
    page.locator(".turn").nth(1).wait_for(state="detached")
    assert turns(page) == ["two"]


def test_an_answer_that_a_closed_tab_left_can_be_gone_on_with_at_once(tab):
    page = tab.page
    ask(page, "one")
    tab.asked(1)
    tab.write("begun ")
    page.locator(".answer").get_by_text("begun").wait_for()
    page.reload()
    page.get_by_role("button", name="Continue").click()
    tab.asked(1)
    tab.write("ended")
    tab.end()
    assert page.locator(".answer .text").inner_text() == "begun ended"


CHANGE = """change => {
  const key = "colm-edge/chat/" + location.hash.slice(1);
  const chat = JSON.parse(localStorage[key]);
  Object.assign(chat.turns[0].answer, change);
  localStorage[key] = JSON.stringify(chat);
  dispatchEvent(new StorageEvent("storage", { key }));
  return localStorage[key];
}"""
KEPT = "localStorage['colm-edge/chat/' + location.hash.slice(1)]"
LAST_WORDS = {"tokens": [["begun ", 0, 0.1], ["ended", 0, 0.1]], "state": "done"}


def test_the_last_words_of_another_tab_may_come_after_its_lock_is_free(script):
    page = script.page
    script.answers("one", "begun ")
    left = page.evaluate(CHANGE, {"state": "writing"})
    page.get_by_text("Cut here: the page was closed").wait_for()
    assert page.evaluate(KEPT) == left  # else the last words would be written over
    page.evaluate(CHANGE, LAST_WORDS)
    page.get_by_text("begun ended").wait_for()
    page.reload()
    page.get_by_text("begun ended").wait_for()


def test_below_an_answer_that_was_cut_another_question_can_be_asked(script):
    page = script.page
    script.answers("one", "begun ")
    page.evaluate(CHANGE, {"state": "writing"})
    page.get_by_text("Cut here: the page was closed").wait_for()
    ask(page, "two")
    script.asked(2)
    assert page.get_by_text("Another tab is writing").count() == 0
    script.write("answer")
    script.end()
    assert page.locator(".answer .text").all_inner_texts() == ["begun", "answer"]
    press(page, 0, "Delete")
    page.locator(".turn").nth(1).wait_for(state="detached")


GONE = """() => {
  const key = "colm-edge/chat/" + location.hash.slice(1);
  localStorage.removeItem(key);
  dispatchEvent(new StorageEvent("storage", { key }));
}"""


def test_a_conversation_that_another_tab_deleted_can_no_longer_be_renamed(script):
    page = script.page
    script.answers("one", "x")
    failed: list[object] = []
    page.on("pageerror", lambda error: failed.append(error))  # noqa: PLW0108 - it is given a mark
    page.get_by_role("button", name="More of one").press("Enter")
    page.get_by_role("button", name="Rename").press("Enter")
    page.evaluate(GONE)
    page.keyboard.press("Enter")
    page.locator("#none").wait_for()
    assert page.locator("#list li").count() == 0
    assert not failed


def test_a_question_that_was_being_changed_outlives_its_turn(script):
    page = script.page
    script.answers("one", "x")
    press(page, 0, "Edit")
    page.keyboard.type("one more")
    page.evaluate(CHANGE.replace("Object.assign", "chat.turns[0].id += '2'; Object.assign"), {})
    page.get_by_text("That turn is no longer shown").wait_for()
    assert page.get_by_label("Your message").input_value() == "oneone more"
    assert turns(page) == ["one"]


def test_a_server_that_says_nothing_of_itself_does_not_hold_up_the_reader(context, url):
    context.add_init_script(SCRIPT)
    page = context.new_page()
    page.route("**/v1/models", lambda route: None)
    page.goto(url)
    ask(page, "one")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Send").wait_for()
    press(page, 0, "Delete")
    page.locator(".turn").wait_for(state="detached")


def test_a_writing_whose_turn_another_tab_deleted_ends(script, context):
    page = script.page
    ask(page, "one")
    script.asked(1)
    page.evaluate(
        """() => {
          const key = "colm-edge/chat/" + location.hash.slice(1);
          const chat = JSON.parse(localStorage[key]);
          localStorage[key] = JSON.stringify({ ...chat, turns: [] });
          dispatchEvent(new StorageEvent("storage", { key }));
        }"""
    )
    page.get_by_role("button", name="Send").wait_for()
    assert turns(page) == []


def ask_where_the_storage_is_full(script) -> None:
    """Ask a second question, for which the browser has no room under `filling`."""
    page = script.page
    script.answers("one", "x")
    page.evaluate("localStorage.setItem('filling', 'z'.repeat(5 * 2 ** 20 - 3000))")
    ask(page, "two " + "y" * 4000)
    page.get_by_text("The browser keeps no more").wait_for()
    script.asked(2)


def test_what_was_not_kept_is_kept_once_there_is_room(script):
    page = script.page
    ask_where_the_storage_is_full(script)
    script.write("answer")
    script.end()
    page.evaluate(
        """() => {
          localStorage.removeItem("filling");
          dispatchEvent(new StorageEvent("storage", { key: "filling" }));
        }"""
    )
    page.reload()
    page.locator(".turn").nth(1).wait_for()
    assert page.locator(".answer .text").last.inner_text() == "answer"


def test_what_was_not_kept_does_not_replace_what_another_tab_wrote(script):
    page = script.page
    ask_where_the_storage_is_full(script)
    script.end()
    kept = page.evaluate(
        """() => {
          const key = "colm-edge/chat/" + location.hash.slice(1);
          const chat = { ...JSON.parse(localStorage[key]), title: "elsewhere" };
          localStorage.removeItem("filling");
          localStorage[key] = JSON.stringify(chat);
          dispatchEvent(new StorageEvent("storage", { key }));
          return JSON.parse(localStorage[key]).title;
        }"""
    )
    assert kept == "elsewhere"


def test_back_leads_to_no_conversation_that_is_gone(script):
    page = script.page
    script.answers("one", "x")
    first = page.url
    page.get_by_role("button", name="New chat").click()
    script.answers("two", "x", n=2)
    page.get_by_role("button", name="More of two").click()
    page.locator("#menu").get_by_role("button", name="Delete").click()
    page.locator("#hint, .hint").wait_for()
    page.evaluate("history.go(-2)")  # over the new chat that the second one began in
    page.wait_for_url(first)
    assert turns(page) == ["one"]


def test_an_undo_that_comes_too_late_stops_nothing(script):
    page = script.page
    script.answers("one", "x")
    script.answers("two", "y", n=2)
    press(page, 0, "Delete")
    ask(page, "three")
    script.asked(3)
    script.write("begun ")
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("The conversation has gone on since").wait_for()
    script.write("ended")
    script.end()
    assert page.locator(".answer .text").last.inner_text() == "begun ended"


def test_arrow_up_edits_the_last_turn_after_an_undo(script):
    page = script.page
    for i, question in enumerate(("one", "two", "three"), 1):
        script.answers(question, "x", n=i)
    press(page, 1, "Delete")
    page.get_by_role("button", name="Undo").click()
    page.locator(".turn").nth(2).wait_for()
    page.get_by_label("Your message").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator(".edit textarea").input_value() == "three"


def test_the_keyboard_stays_where_it_was(script):
    page = script.page
    script.answers("one", "x")
    script.answers("two", "y", n=2)
    press(page, 0, "Edit")
    page.keyboard.press("Escape")
    assert page.evaluate(FOCUS) == "Edit"
    press(page, 1, "Regenerate")
    page.wait_for_function("() => document.activeElement.id === 'prompt'")
    script.asked(3)
    script.write("z")
    script.end()
    press(page, 0, "Delete")
    page.wait_for_function("() => document.activeElement.id === 'prompt'")


def test_the_keyboard_goes_on_at_what_takes_a_buttons_place(script):
    page = script.page
    page.get_by_label("Your message").fill("one")
    while page.evaluate(FOCUS) != "Send":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    script.asked(1)
    page.wait_for_function("() => document.activeElement.id === 'stop'")
    script.end()
    page.wait_for_function("() => document.activeElement.id === 'prompt'")
    page.get_by_role("button", name="More of one").press("Enter")
    page.get_by_role("button", name="Rename").press("Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUS) == "two"


def test_the_key_that_ends_a_composition_sends_nothing(script):
    """Safari says it by its number alone."""
    page = script.page
    page.get_by_label("Your message").fill("half a wo")
    page.get_by_label("Your message").evaluate(
        """box => box.dispatchEvent(new KeyboardEvent("keydown",
          { key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))"""
    )
    assert turns(page) == []
    page.keyboard.press("Enter")
    script.asked(1)
    script.end()


def test_the_list_keeps_its_order_while_answers_grow_and_names_are_left(script):
    page = script.page
    ask(page, "one")
    script.asked(1)
    page.evaluate("window.first = answer")
    page.get_by_role("button", name="New chat").click()
    ask(page, "two")
    script.asked(2)
    order = page.locator("#list .title").all_inner_texts()
    assert order == ["two", "one"]
    page.evaluate(
        """() => first.enqueue('data: {"choices": [{}], "colm": '
          + '{"id": 0, "text": "w", "source": "base", "p_defer": 0.1}}\\n\\n')"""
    )
    kept = "() => Object.values(localStorage).some((chat) => chat.includes('[\"w\"'))"
    page.wait_for_function(kept)
    assert page.locator("#list .title").all_inner_texts() == order
    page.get_by_role("button", name="More of one").click()
    page.locator("#menu").get_by_role("button", name="Rename").click()
    page.keyboard.press("Escape")
    assert page.locator("#list .title").all_inner_texts() == order


def test_a_long_run_of_spaces_is_drawn_soon(script):
    """A pattern that looks back from each of them would take a quarter of a minute."""
    page = script.page
    script.answers("one", "a", *[" " * 1000] * 130, "b")
    page.reload()
    page.locator(".answer .token", has_text="b").wait_for(timeout=8000)
