"""Data lines as token ids: every form, bad lines, and how much memory they take."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from colm_edge.errors import DataError
from colm_edge.pair import load
from colm_edge.train.documents import read_rows, tokenized


def write_lines(path, lines) -> str:
    path.write_bytes(b"\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a", ', "line 2: "),
        (b"[1, 2]", "line 2: expected a JSON object, got list"),
        (b"[" * 100_000, "line 2: "),
        (b'{"prompt": "a", "completion": "  "}', "line 2: completion must be a text"),
        (b'{"prompt": 3, "completion": "b"}', "line 2: prompt must be a text"),
        (b'{"question": "a"}', "line 2: expected prompt and completion, or messages, or text"),
        (b'{"messages": "hello"}', "line 2: messages must be a list"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2: messages must hold"),
        (b'{"text": "\xff\xfe"}', "line 2: .*utf-8"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tiny_pair, tmp_path, line, words):
    path = write_lines(tmp_path / "d.jsonl", [b'{"text": "good line"}', line])
    with pytest.raises(DataError, match=words):
        tokenized(read_rows(path), tiny_pair)


def test_no_data_is_an_error(tiny_pair, tmp_path):
    with pytest.raises(DataError, match="No such file"):
        tokenized(read_rows(tmp_path / "absent"), tiny_pair)
    with pytest.raises(DataError, match="no documents"):
        tokenized(read_rows(write_lines(tmp_path / "e.jsonl", [b"", b"  "])), tiny_pair)


def test_documents_of_every_form(tiny_pair, tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    lines = [
        {"text": "abc"},
        {"prompt": "a", "completion": "b"},
        {"messages": turns},
        {"text": "w" * 1000},
    ]
    path = write_lines(tmp_path / "d.jsonl", [json.dumps(line).encode() for line in lines])
    documents = tokenized(read_rows(path), tiny_pair)
    tokenize = tiny_pair.base.tokenize
    assert len(documents) == 5
    assert documents[0].tokens == tokenize("abc")
    assert documents[0].start == 1
    assert documents[1].tokens == [*tokenize("a"), *tokenize("b"), 0]
    assert documents[2] == replace(documents[1], line=3)
    assert [d.line for d in documents] == [1, 2, 3, 3, 4]
    assert documents[3].tokens == [*tokenize("a\n\nb\n\nc"), *tokenize("d"), 0]
    assert len(documents[4].tokens) == tiny_pair.n_ctx


def test_tokens_of_the_base_alone_are_refused_by_line(tiny, tmp_path):
    with load(tiny["defer"], tiny["expert"], "margin", n_threads=1) as pair:
        path = write_lines(tmp_path / "d.jsonl", [b'{"text": "a <|pad|> b"}'])
        with pytest.raises(DataError, match=r"line 1: '<\|pad\|>' is a token of the base alone"):
            tokenized(read_rows(path), pair)


def test_the_arrays_say_what_the_documents_say(tiny_pair, tmp_path):
    rows = [(i, {"prompt": f"p{i}", "completion": "c" * (1 + i % 5)}) for i in range(1, 30)]
    documents = tokenized(rows, tiny_pair)
    assert documents.n_tokens == sum(len(d.tokens) for d in documents)
    assert documents.n_scored == sum(len(d.tokens) - d.start for d in documents)
    for first, last in ((0, 29), (3, 4), (7, 20), (5, 5)):
        gold = [t for i in range(first, last) for t in documents[i].tokens[documents[i].start :]]
        assert documents.scored(first, last).tolist() == gold
    part = documents[7:9]
    assert [part[0], part[1]] == [documents[7], documents[8]]
    assert documents[-1] == documents[28]
    with pytest.raises(IndexError):
        documents[29]
    disk = tokenized(rows, tiny_pair, work=tmp_path / "w")
    assert isinstance(disk.tokens, np.memmap)
    assert list(disk) == list(documents)
    assert np.array_equal(disk.keys, documents.keys)
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["tokens.int32"]


def test_a_key_depends_on_tokens_and_start_alone(tiny_pair):
    def keys(*rows):
        return tokenized(list(enumerate(rows)), tiny_pair).keys.tolist()

    one, two = {"prompt": "a", "completion": "b c"}, {"prompt": "a b", "completion": " c"}
    assert keys(one, two, one)[0] == keys(two, one)[1] == keys(one)[0]
    same = [tokenized([(1, {"prompt": "aé", "completion": "b"})], tiny_pair)]
    same.append(replace(same[0], starts=same[0].starts - 1))
    assert same[0].key(0) != same[1].key(0)
    assert keys(one) != keys(two)


def test_documents_longer_than_the_context_are_cut_and_counted(tiny_pair):
    rows = [
        {"text": "fits"},
        {"prompt": "p", "completion": "w" * 1000},
        {"prompt": "p" * 1000, "completion": "nothing of it is left"},
        {"text": "x"},  # has nothing before its only token
    ]
    documents = tokenized(enumerate(rows, 1), tiny_pair)
    assert [len(d.tokens) for d in documents][1:] == [256]
    assert (len(documents), documents.n_cut, documents.n_dropped) == (2, 1, 2)
    assert documents.cut_note == (
        "documents: 2; 1 longer than the context of 256 tokens and cut there (-c); "
        "2 without a token left to score and left out"
    )
    assert tokenized([(1, rows[0])], tiny_pair).cut_note == ""
    with pytest.raises(
        DataError, match="documents, none has a token to score in a context of 256 tokens"
    ):
        tokenized([(3, rows[2])], tiny_pair)


def test_memory_grows_by_a_few_numbers_a_document(tiny_pair, tmp_path):
    """On disk nothing is kept for a token; in memory, its four bytes."""

    def measure(n, **options):
        rows = ((i, {"prompt": "p", "completion": f"{i:0200}"}) for i in range(n))
        tracemalloc.start()
        documents = tokenized(rows, tiny_pair, **options)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert documents.n_tokens > 200 * n
        return kept, peak, documents

    measure(10)
    small, large = (measure(n, work=tmp_path) for n in (200, 1200))
    for before, after in zip(small[:2], large[:2], strict=True):
        assert (after - before) / 1000 < 100  # bytes a document; its tokens are 800
    small, large = measure(200), measure(1200)
    assert (large[0] - small[0]) / 1000 < 1100


def test_a_conversation_of_very_many_turns_is_not_written_again_for_each(tiny_pair, monkeypatch):
    """What stands behind the context's end is dropped, and counted, without the template."""
    turns = [{"role": role, "content": "well"} for role in ("user", "assistant")] * 500
    n_rendered, render = 0, tiny_pair.prompt_tokens

    def counted(messages, **options):
        nonlocal n_rendered
        n_rendered += 1
        return render(messages, **options)

    monkeypatch.setattr(tiny_pair, "prompt_tokens", counted)
    documents = tokenized([(1, {"messages": turns})], tiny_pair)
    assert documents.n_dropped == 500 - len(documents)
    assert len(documents) > 10
    assert n_rendered == len(documents) + 1
