"""Several experts behind the server: its side object, metrics, model list, and the page."""

from __future__ import annotations

import httpx
import pytest
from browsing import ask
from serving import GREEDY, metrics_of, serving

from colm_edge.pair import load


@pytest.fixture(scope="module")
def team_url(models):
    refs, switch = models
    with (
        load(**refs, switch=switch, n_threads=1, n_ctx=256, defaults=GREEDY) as pair,
        serving(pair, n_slots=2) as (url, _),
    ):
        yield url


def asked(url: str, **more):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 40} | more
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()


def test_an_answer_says_what_each_expert_did(team_url):
    before = metrics_of(team_url)
    colm = asked(team_url, colm={"trace": True, "threshold": 0.5})["colm"]
    written = [token["source"] for token in colm["trace"]]
    assert set(colm["experts"]) == {"expert:a", "expert:b"}
    assert sum(one["n_deferred"] for one in colm["experts"].values()) == colm["n_deferred"]
    for source, told in colm["experts"].items():
        assert told["n_deferred"] == written.count(source)
        name = f'colm_calls_by_expert_total{{expert="{source[-1]}"}}'
        assert metrics_of(team_url).get(name, 0) - before.get(name, 0) == told["calls"]


def test_the_list_of_models_names_each_expert(team_url):
    meta = httpx.get(f"{team_url}/v1/models").json()["data"][0]["meta"]
    assert meta["experts"] == {"a": "expert", "b": "base"}


def test_the_page_tells_the_experts_apart(team_url, page):
    page.goto(team_url)
    ask(page, "hello")
    page.locator(".answer .speed").wait_for()
    names = [text.split() for text in page.locator("#experts .who").all_inner_texts()]
    assert names == [["a", "expert"], ["b", "base"]]
    shown = page.locator(".answer .token.expert")
    tips = set()
    for i in range(shown.count()):
        classes = shown.nth(i).get_attribute("class").split()
        shown.nth(i).hover()
        tip = page.locator("#tip").inner_text()
        assert ("expert-1" in classes) == tip.startswith("expert b")
        tips.add(tip[:8])
    assert tips
    colours = page.evaluate(
        """() => [...document.querySelectorAll("#experts .expert")].map(
            (one) => getComputedStyle(one).backgroundColor)"""
    )
    assert len(set(colours)) == 2
    written = [one.get_attribute("class") for one in page.locator(".answer .token").all()]
    page.reload()
    page.locator("#experts .who").nth(1).wait_for()
    kept = [one.get_attribute("class") for one in page.locator(".answer .token").all()]
    assert kept == written
