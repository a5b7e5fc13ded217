"""Fixtures: pages in a real headless Chromium. conftest.py makes them known to all tests."""

from __future__ import annotations

import pytest
from browsing import ARGUMENTS, CHROMIUM, SCRIPT, Script
from serving import serving


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A browser without memory, in which nothing may go wrong that the page does not report."""
    context = browser.new_context(
        color_scheme="light", permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(15_000)
    problems: list[str] = []

    def watch(page) -> None:
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("requestfailed", lambda r: "/v1/" in r.url or problems.append(r.url))
        page.on(
            "console", lambda m: problems.append(m.text) if "Security Policy" in m.text else None
        )

    context.on("page", watch)
    yield context
    context.close()
    assert not problems


@pytest.fixture
def page(context):
    return context.new_page()


@pytest.fixture(scope="module")
def demo_url(demo):
    with serving(demo, n_slots=2) as (url, _):
        yield url


@pytest.fixture
def script(context, url):
    """A page whose answers the test writes."""
    context.add_init_script(SCRIPT)
    page = context.new_page()
    page.goto(url)
    return Script(page)
