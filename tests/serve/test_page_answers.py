"""How the page shows answers: Markdown, who wrote it, what was withdrawn. Answers are scripted."""

from __future__ import annotations

import re

import pytest
from browsing import ask, picture, pieces

RICH = """# Two ways

Some **bold and *nested* words**, `code span`, an escaped \\*, &amp; and
a [link](http://example.org/a?b=1 "t"), http://example.org/c and page.py.

- one
- two with `x`

  more of two

> quoted **words**

| name | value |
|:-----|------:|
| a    | **1** |
| b    |     2 |

```python
def f(x):
    return x * 2  # twice
```

1. first
2. ![a picture](http://example.org/p.png)

<b onclick="alert(1)">not a tag</b> <script>alert(2)</script>
"""
# Each text in the page's order, and what the source has there.
TEXTS = """(place) => {
    const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT), found = [];
    while (walker.nextNode()) {
        const { data, parentElement } = walker.currentNode;
        if (!data.trim() || parentElement.closest(".code-head")) continue;
        found.push([data, parentElement.closest(".token")?.dataset.i ?? null]);
    }
    return found;
}"""


@pytest.fixture
def rich(script):
    tokens = pieces(RICH, range(0, 400, 3))
    script.answers("How?", *tokens)
    return script


def test_markdown_becomes_elements_and_nothing_else_does(rich):
    text = rich.page.locator(".answer .text")
    for inside in ("h3", "strong em", "p > code", "li p", "blockquote strong", "ol li"):
        assert text.locator(inside).count() > 0, inside
    assert text.locator("td.right").all_inner_texts() == ["1", "2"]
    assert text.locator("script, b, img, [style], [onclick]").count() == 0
    assert '<b onclick="alert(1)">not a tag</b>' in text.inner_text()
    links = {link.get_attribute("href"): link for link in text.locator("a").all()}
    assert list(links) == [
        "http://example.org/a?b=1", "http://example.org/c", "http://example.org/p.png",
    ]  # fmt: skip
    for link in links.values():
        assert link.get_attribute("target") == "_blank"
        assert link.get_attribute("rel") == "noopener noreferrer"
    assert links["http://example.org/p.png"].inner_text() == "a picture"


def test_each_block_of_code_is_copied_as_it_is(rich):
    page = rich.page
    assert page.locator(".code-head span").inner_text() == "python"
    page.locator(".code-head").get_by_role("button").click()
    page.locator(".code-head").get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "def f(x):\n    return x * 2  # twice\n"
    page.locator(".answer > .buttons").get_by_role("button", name="Copy").click()
    page.locator(".answer > .buttons").get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == RICH


def test_every_rendered_character_has_the_token_that_wrote_it(rich):
    tokens = [RICH[i : i + 4] for i in range(0, len(RICH), 4)]
    texts = rich.page.locator(".answer .text").evaluate(TEXTS)
    last = -1
    for text, i in texts:
        if i is None:  # a space before a tint
            raise AssertionError(f"{text!r} has no writer")
        assert last <= int(i)  # in their order
        last = int(i)
        whole = tokens[last]
        assert text.strip("\n") in whole or text in ("&", "*") or whole.startswith("&")
    shown = {int(i) for _, i in texts}
    for i, token in enumerate(tokens):
        assert i in shown or not re.search(r"\w{4}", token) or RICH[: 4 * i].count("](") > 0
    for span in rich.page.locator(".answer .token").all()[:60]:
        by_expert = int(span.get_attribute("data-i")) % 3 == 0
        assert ("expert" in span.get_attribute("class")) is by_expert


def test_what_cannot_be_followed_is_shown_without_writer(script):
    script.answers(
        "Table?", *pieces("| a \\| b | c |\n|---|---|\n| d | e |\n\nAfter it.", [0, 1, 8, 9])
    )
    text = script.page.locator(".answer .text")
    assert text.locator("th").first.inner_text() == "a | b"
    assert text.locator("th .token").count() == 0
    assert text.locator("p .token").count() > 0


@pytest.mark.parametrize(
    "source", [RICH, "- a\n*b* c\n\n1. x\n\ny\n===\nz", "p\n\n- q\n\n  r\n\n    s\n\nt"]
)
def test_an_answer_that_grew_looks_as_one_that_was_there(script, source):
    """Only the last blocks are drawn again: the law is that nobody can tell."""
    grown = script.page.evaluate(
        """async (source) => {
            const { Rendering } = await import("/page/markdown.js");
            const tokens = source.match(/[^]{1,3}/g).map((text, i) => ({ text, expert: i % 2 }));
            const withdrawn = [{ at: 2 }, { at: 7 }, { at: tokens.length }];
            const places = [0, 1].map(() => document.createElement("div"));
            const [one, other] = places.map((place) => new Rendering(place));
            const n = (i) => withdrawn.filter(({ at }) => at <= i);
            for (let i = 1, length = 0; i <= tokens.length; i++) {
                length += tokens[i - 1].text.length;
                const drafts = tokens.slice(i, i + 3).map((token) => ({ ...token, draft: true }));
                one.show([...tokens.slice(0, i), ...drafts], n(i), length);
            }
            one.show(tokens, withdrawn);
            other.show(tokens, withdrawn);
            return places.map((place) => place.innerHTML);
        }""",
        source,
    )
    assert grown[0] == grown[1]
    assert grown[0].count('class="withdrawn"') == 3


def test_what_is_drawn_stays_where_it_is(script):
    """So a long answer costs no more for each token than a short one."""
    page = script.page
    ask(page, "Go on")
    script.asked(1)
    script.write("One.\n\nTwo.\n\nThree.\n\nFour.\n\n", "Five")
    page.locator(".text .block").nth(4).wait_for()
    page.evaluate(
        "document.querySelectorAll('.text .block').forEach((one) => { one.mine = true; })"
    )
    script.write(" and more.\n\n", "Six")
    page.locator(".text .block").nth(5).wait_for()
    kept = page.evaluate("[...document.querySelectorAll('.text .block')].map((one) => !!one.mine)")
    assert kept == [True] * 4 + [False] * 2
    script.end()


def test_what_was_withdrawn_can_be_seen_where_it_stood(script):
    page = script.page
    ask(page, "Capital?")
    script.asked(1)
    script.write("The", " capital")
    script.draft(" is", " Lyon", ".")
    page.locator(".draft").nth(2).wait_for()
    assert page.locator(".answer .text").inner_text() == "The capital is Lyon."
    script.write(" is")
    script.undo(3, " Lyon.", 2)
    script.write((" Paris", "expert"), ".")
    script.end()
    for _ in range(2):  # and after the page was loaded anew
        assert page.locator(".answer .text").inner_text() == "The capital is Paris."
        assert page.locator(".draft").count() == 0
        mark = page.get_by_role("button", name="Withdrawn")
        following = "e => e.nextSibling.textContent + e.nextElementSibling.textContent"
        assert mark.evaluate(following).split() == ["Paris"]
        mark.click()
        tip = page.get_by_role("tooltip")
        assert tip.locator("del").inner_text().strip() == "Lyon."
        assert "2.50 nats" in tip.inner_text()
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        page.reload()
    # What is copied is what is meant.
    page.locator(".answer > .buttons").get_by_role("button", name="Copy").click()
    page.locator(".answer > .buttons").get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "The capital is Paris."


def test_the_marks_can_be_put_away(rich):
    page = rich.page
    tint = "e => getComputedStyle(e).backgroundColor"
    expert = page.locator(".answer .token.expert").first
    assert expert.evaluate(tint) != "rgba(0, 0, 0, 0)"
    page.get_by_label("Show who wrote").uncheck()
    assert expert.evaluate(tint) == "rgba(0, 0, 0, 0)"
    assert page.locator("#legend .expert").evaluate(tint) != "rgba(0, 0, 0, 0)"
    page.reload()
    assert not page.get_by_label("Show who wrote").is_checked()
    assert expert.evaluate(tint) == "rgba(0, 0, 0, 0)"


@pytest.mark.parametrize(
    ("media", "width"), [({"color_scheme": "dark"}, "1px"), ({"forced_colors": "active"}, "2px")]
)
def test_the_writer_is_seen_in_the_dark_and_in_forced_colours(rich, media, width):
    rich.page.emulate_media(**media)
    line = (
        "e => { const s = getComputedStyle(e); return s.borderBottomStyle + s.borderBottomWidth; }"
    )
    expert = rich.page.locator(".answer .token.expert").first
    assert expert.evaluate(line) == f"dotted{width}"


def test_the_end_is_followed_unless_the_reader_scrolled_up(script):
    page = script.page
    ask(page, "Long?")
    script.asked(1)
    left = (
        "(() => { const e = document.querySelector('#log'); return e.scrollHeight - e.clientHeight"
    )
    left += " - e.scrollTop; })()"
    end = page.get_by_role("button", name="To the end")
    script.write(*(f"Line {i}.\n\n" for i in range(60)), "Here.")
    page.get_by_text("Here.").wait_for()
    page.wait_for_function(f"{left} < 2")
    assert end.is_hidden()
    page.locator("#log").hover()
    page.mouse.wheel(0, -300)
    end.wait_for()
    before = page.locator("#log").evaluate("e => e.scrollTop")
    script.write(*(f" Line {i}.\n\n" for i in range(20)), "There.")
    page.get_by_text("There.").wait_for()
    assert page.locator("#log").evaluate("e => e.scrollTop") == before
    end.click()
    assert page.evaluate(left) < 2
    end.wait_for(state="hidden")
    script.write(*(f" Line {i}.\n\n" for i in range(20)), "Last.")
    page.get_by_text("Last.").wait_for()
    page.wait_for_function(f"{left} < 2")
    script.end()


def test_what_a_token_tells_stays_while_the_keyboard_scrolls_to_it(script):
    page = script.page
    script.answers("Long?", *(f"Line {i}.\n\n" for i in range(60)))
    tip, log = page.get_by_role("tooltip"), page.locator("#log")
    log.evaluate("e => { e.scrollTop = 0; }")
    page.locator(".token").first.focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#log').scrollTop > 0")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    assert tip.is_visible()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.locator("#prompt").focus()
    tip.wait_for(state="hidden")


def test_the_reader_is_told_that_an_answer_is_awaited_and_when_it_is_there(script):
    page = script.page
    ask(page, "Slow?")
    script.asked(1)
    waiting = page.get_by_text("Waiting for the first token")
    assert waiting.is_visible()
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    script.write("Word", " by word.")
    page.get_by_text("by word.").wait_for()
    assert waiting.is_hidden()
    said = page.locator("#said")  # once, and not token by token
    assert said.inner_text() == "The answer is being written."
    script.end()
    assert said.inner_text() == "Answer: Word by word."
    assert page.locator(".answer").get_attribute("aria-busy") == "false"
    assert page.locator("[aria-live], [role=log], [role=alert]").count() == 0


def test_it_fits_a_narrow_window(rich):
    page = rich.page
    wide = (
        "`"
        + "x" * 200
        + "`\n\n```\n"
        + "y" * 300
        + "\n```\n\n| "
        + " | ".join("z" * 30 for _ in range(8))
    )
    wide += " |\n|" + "---|" * 8 + "\n\nhttp://example.org/" + "w" * 200
    rich.answers("v" * 200, *pieces(wide), n=2)
    for width, height in ((320, 568), (320, 240), (390, 780), (1280, 800)):  # 240: a keyboard is up
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#log").evaluate("e => e.scrollWidth <= e.clientWidth")
        assert page.locator("#prompt").bounding_box()["y"] < height
        picture(page, f"rich-{width}-{height}")
