"""The server's page with real pairs: type, stream, stop, slide, reload."""

from __future__ import annotations

import re
import time

from browsing import ask, picture
from serving import GREEDY, serving, wait_for

from colm_edge.llama.context import Context
from colm_edge.options import Options
from colm_edge.pair import load


def answered(page) -> None:
    page.get_by_role("button", name="Send").wait_for()


def test_a_question_is_answered_and_the_writers_are_marked(page, demo_url):
    page.goto(demo_url)
    assert page.get_by_text("wherever the switch defers to it").is_visible()
    ask(page, "What is the symbol of tungsten?")
    answered(page)
    answer = page.locator(".answer .text")
    text = answer.inner_text()
    assert "W" in text
    expert = answer.locator(".token.expert")
    assert 0 < expert.count() < answer.locator(".token").count()
    tinted = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).borderBottomStyle]"
    tint, line = expert.first.evaluate(tinted)
    assert tint != "rgba(0, 0, 0, 0)"
    assert line == "dotted"  # to be read without colour too
    assert re.fullmatch(r"\d+ % deferred, [\d.]+ tok/s", page.locator(".speed").inner_text())
    page.reload()
    assert page.locator(".answer .text").inner_text() == text
    assert page.locator(".answer .expert").count() == expert.count()
    ask(page, "What is the capital of France?")
    answered(page)
    picture(page, "light")
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0
    page.reload()
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="What is the symbol of tungsten?", exact=True).click()
    assert page.locator("article").count() == 4


def test_hover_tap_and_keyboard_tell_how_sure_the_switch_was(browser, demo_url):
    context = browser.new_context(has_touch=True)
    page = context.new_page()
    page.goto(demo_url)
    ask(page, "What is the symbol of tungsten?")
    answered(page)
    tip = page.get_by_role("tooltip")
    told = re.compile(r"expert, p_defer [01]\.\d{3}")
    expert = page.locator(".token.expert").first
    expert.hover()
    assert told.fullmatch(tip.inner_text())
    page.mouse.move(0, 0)
    tip.wait_for(state="hidden")
    expert.tap()
    assert told.fullmatch(tip.inner_text())
    page.locator("#prompt").focus()
    tip.wait_for(state="hidden")
    # One token is a stop of Tab, and the arrows lead to the others.
    page.locator("#log").focus()
    while not page.evaluate("document.activeElement.matches('.token')"):
        page.keyboard.press("Tab")
    assert told.fullmatch(tip.inner_text())
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().startswith("base, p_defer")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    context.close()


def test_the_threshold_slides_from_one_writer_to_the_other_and_back(page, demo_url):
    page.goto(demo_url)
    for value, all_expert in (("0", True), ("1", False)):
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Threshold").fill(value)
        assert page.locator("#shown").inner_text() == f"{float(value):.2f}"
        page.keyboard.press("Escape")
        ask(page, "What is the symbol of iron?")
        answered(page)
        answer = page.locator(".answer .text").last
        n, experts = answer.locator(".token").count(), answer.locator(".token.expert").count()
        assert n > 0
        assert experts == (n if all_expert else 0)
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.locator("#shown").inner_text() == "1.00"
    page.get_by_role("button", name="Use the switch's own").click()
    assert page.locator("#shown").inner_text() == "own"
    page.reload()
    assert page.locator("#shown").text_content() == "own"


def test_drafts_are_shown_until_they_are_final_or_undone(page, tiny):
    defaults = Options(temperature=0.0, defer_rate=0.2, review=1.0, review_window=6)
    with (
        load(
            tiny["template"], tiny["expert"], "margin", n_threads=1, n_ctx=256, defaults=defaults
        ) as pair,
        serving(pair, n_slots=1, max_tokens=40) as (url, _),
    ):  # fmt: skip
        question = "one two three four five six seven"
        page.goto(url)
        ask(page, question)
        answered(page)
        answer = pair.chat([{"role": "user", "content": question}], max_tokens=40)
        assert answer.stats.n_undone > 0
        page.get_by_role("button", name="Copy", exact=True).last.click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == answer.text
        assert page.locator(".draft").count() == 0
        assert page.locator(".withdrawn").count() == len(answer.undone)
        for mark, undone in zip(page.locator(".withdrawn").all(), answer.undone, strict=True):
            mark.click()
            tip = page.get_by_role("tooltip")
            text = "".join(step.text for step in undone.steps)
            assert tip.locator("del").text_content() == text.strip()
            assert f"{undone.regret:.2f} nats" in tip.inner_text()


def test_escape_stops_an_answer(page, tiny, monkeypatch):
    with (
        load(
            tiny["endless"],
            tiny["endless"],
            "margin",
            n_threads=1,
            n_ctx=512,
            defaults=GREEDY.with_changes(threshold=0.9),
        ) as pair,
        serving(pair, n_slots=1) as (url, server),
    ):
        decode = Context.decode

        def slowly(*args, **more) -> None:
            time.sleep(0.02)  # as a real model: an answer takes ten seconds
            decode(*args, **more)

        monkeypatch.setattr(Context, "decode", slowly)
        page.goto(url)
        for stop in (
            lambda: page.get_by_role("button", name="Stop").click(),
            lambda: page.keyboard.press("Escape"),
        ):
            ask(page, "go on")
            page.locator(".answer .text").last.locator(".token").first.wait_for()
            stop()
            answered(page)
            wait_for(lambda: server.n_busy == 0)
            assert page.locator(".answer .text").last.locator(".token").count() < 480
            assert page.locator(".note").last.inner_text() == "Stopped."
        page.reload()
        assert page.locator("article").count() == 4


def test_what_goes_wrong_is_shown(page, demo_url):
    page.goto(demo_url)
    ask(page, "word " * 400)
    error = page.locator(".error")
    error.wait_for()
    assert "the context holds 192" in error.inner_text()
    assert page.get_by_role("button", name="Retry").is_visible()
    picture(page, "error")
    # And it does not become part of the conversation.
    ask(page, "What is the symbol of iron?")
    page.locator(".answer").nth(1).locator(".token").first.wait_for()
    answered(page)
    assert page.locator(".error").count() == 1


def test_the_oldest_turns_are_forgotten(page, demo):
    """As in the terminal's chat: a conversation longer than the context goes on."""
    with serving(demo, n_slots=1) as (url, _):
        page.goto(url)
        for i in range(12):
            ask(page, "What is the symbol of tungsten?")
            answer = page.locator(".answer .text").nth(i)
            answer.locator(".token").nth(5).wait_for()
            answered(page)
            assert answer.inner_text().endswith("W.")  # not cut for want of room
        assert page.locator(".error").count() == 0
        assert page.locator("article").count() == 24
        # The reader sees what is still sent.
        assert 0 < page.locator(".forgotten").count() < 12
        assert page.get_by_text("is not sent any more").is_visible()
        # Of a question that leaves room for little else, more.
        ask(page, "What is the symbol of iron? " * 17)
        page.locator(".answer").nth(12).locator(".token").first.wait_for()
        answered(page)
        assert "the context holds" not in page.locator("#log").inner_text()


def test_a_key_is_asked_for(page, demo):
    with serving(demo, n_slots=1, api_key="sesame") as (url, _):
        page.goto(url)
        ask(page, "What is the symbol of iron?")
        page.get_by_label("This server asks for its key").fill("sesame")
        page.keyboard.press("Enter")
        page.locator(".token.expert").first.wait_for()
        answered(page)
        assert page.locator("article").count() == 2


def test_the_models_are_named(page, url, pair):
    page.goto(url)
    legend = page.locator("#legend")
    legend.get_by_text("margin").wait_for()
    for name in (pair.base.path.stem, "expert", "margin"):
        assert name in legend.inner_text()
