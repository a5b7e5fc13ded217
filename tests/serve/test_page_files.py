"""The files of the page: their names are fixed, and nothing but them runs in it."""

from __future__ import annotations

import json
import re
from contextlib import closing
from http.client import HTTPConnection

import httpx
import pytest

from colm_edge.serve.page import FILES


def test_each_file_is_served_with_its_type_and_kept_until_it_changes(url):
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "txt": "text/plain"}
    assert len(FILES) > 10
    for name, file in FILES.items():
        for path in {f"/page/{name}", "/" if name == "index.html" else f"/page/{name}"}:
            answer = httpx.get(url + path)
            assert answer.status_code == 200
            assert answer.content == file.body
            kind = types[name.rpartition(".")[2]]
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            assert answer.headers["cache-control"] == "no-cache"
            again = httpx.get(url + path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


def test_the_policy_lets_nothing_in_from_elsewhere(url):
    policy = httpx.get(url).headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["img-src"] == "data:"
    assert "unsafe" not in policy
    # So the page holds no script, no style and no handler of its own, and names no other place.
    text = FILES["index.html"].body.decode()
    assert not re.search(r"<style|<script>| style=| on\w+=|https?://(?!www\.w3\.org)", text)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "../base.gguf",
        "%2e%2e/base.gguf",
        "..%2f..%2fpair.py",
        "vendor",
        "vendor/../page.js",
    ],
)
def test_no_other_name_is_served(url, name):
    # As it is: other clients would resolve the dots.
    with closing(HTTPConnection(url.removeprefix("http://"))) as connection:
        connection.request("GET", f"/page/{name}")
        answer = connection.getresponse()
        assert answer.status == 404
        assert "has no file" in json.load(answer)["error"]["message"]


def test_what_is_not_ours_has_its_licence():
    licences = FILES["vendor/LICENSES.txt"].body.decode()
    for name in FILES:
        if name.startswith("vendor/") and name.endswith(".js"):
            assert name.removeprefix("vendor/") in licences
