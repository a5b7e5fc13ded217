"""Results kept between runs: what is there is given back, what cannot be one is refused."""

from __future__ import annotations

import json

import pytest
from lib.fuzz.mutate import DEPTH
from progress import no_bar

from colm_edge.errors import DataError
from colm_edge.evaluate import methods
from colm_edge.evaluate.methods import Comparison, evaluate
from colm_edge.evaluate.proxy_tuning import Proxy
from colm_edge.journal import Journal, is_count, is_number, key_of
from colm_edge.options import Options


def test_a_result_is_given_back(tmp_path):
    journal = Journal(tmp_path / "new" / "j.jsonl")
    journal.add("a", {"x": 1})
    again = Journal(tmp_path / "new" / "j.jsonl")
    assert again.get("a", lambda entry: entry["x"] == 1) == {"key": "a", "x": 1}
    assert again.get("b", lambda entry: True) is None
    assert again.get("a", lambda entry: entry["y"] == 1) is None  # an earlier version kept less
    with pytest.raises(DataError, match=r"j\.jsonl: holds a result that cannot be one"):
        again.get("a", lambda entry: entry["x"] == 2)


@pytest.mark.parametrize(
    "line", ["[]", "3", '"text"', "{}", "{", "[" * DEPTH, '{"a":' * DEPTH, "\ud800", '{"key": ']
)
def test_another_file_is_refused(tmp_path, line):
    path = tmp_path / "j.jsonl"
    path.write_text(line + "\n", encoding="utf-8", errors="surrogatepass")
    with pytest.raises(DataError, match="not a file of kept results"):
        Journal(path)


@pytest.mark.parametrize("text", ['{"my": "only copy"}', "notes", '{"key" : 1}'])
def test_another_file_without_a_last_line_end_is_left_as_it_is(tmp_path, text):
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="not a file of kept results"):
        Journal(path)
    assert path.read_text() == text


@pytest.mark.parametrize("n", [0, 1, 5, 9, 20])
def test_a_first_line_that_was_not_finished_is_written_again(tmp_path, n):
    Journal(tmp_path / "j.jsonl").add("a", {"b": 1})
    line = (tmp_path / "j.jsonl").read_bytes()
    (tmp_path / "j.jsonl").write_bytes(line[:n])
    Journal(tmp_path / "j.jsonl").add("a", {"b": 1})
    assert (tmp_path / "j.jsonl").read_bytes() == line


def test_only_numbers_count_as_numbers():
    assert [is_count(x) for x in (0, 7, -1, True, 1.0, 10**400, None, "1")] == [True] * 2 + [
        False
    ] * 6
    assert is_count(2, 3)
    assert not is_count(3, 3)
    nan = float("nan")
    values = (0, 0.5, 1, -0.1, 1.1, nan, float("inf"), 10**400, True, None, "0")
    assert [is_number(x, 0, 1) for x in values] == [True] * 3 + [False] * 8


def test_keys_differ_by_what_they_are_of():
    assert key_of(1, "a") == key_of(1, "a") != key_of("1", "a")


HOSTILE = [None, "x", -1, 1.5, float("nan"), float("inf"), 10**400, [], {}, [[1]], True]


@pytest.fixture(scope="module")
def kept(pair, data, tmp_path_factory):
    """What three journals keep of an evaluation, and the evaluation."""
    work = tmp_path_factory.mktemp("kept")

    def run(proxy):
        comparison = Comparison(
            "exact", limit=2, methods=("base", "expert", "proxy"), proxy=proxy, on_expert=True
        )
        options = Options(temperature=0.0, max_tokens=3, threshold=0.5)
        return evaluate(pair, data, options, comparison, work=work, progress=no_bar)

    with Proxy(pair, pair.base.path) as proxy:
        run(proxy)
        yield {path: path.read_text() for path in work.glob("*.jsonl")}, lambda: run(proxy)


def test_every_field_of_a_kept_result_is_checked(kept, monkeypatch):
    monkeypatch.setattr(methods, "BOOTSTRAPS", 10)
    texts, run = kept
    assert {path.name for path in texts} == {
        "answers.jsonl", "proxy.jsonl", "expert-answers.jsonl"
    }  # fmt: skip
    for path, text in texts.items():
        entry, *_ = map(json.loads, text.splitlines())
        for field in entry.keys() - {"key", "method", "line", "threshold"}:
            right = type(entry[field])
            for value in HOSTILE:
                if type(value) is right and right not in (int, float, list):
                    continue
                path.write_text(json.dumps(entry | {field: value}) + "\n")
                if field == "seconds" and value in (1.5, 0):
                    continue
                with pytest.raises(DataError, match="holds a result that cannot be one"):
                    run()
        path.write_text(text)
    run()
