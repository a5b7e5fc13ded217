"""Proxy Tuning: its limits, a plain twin of it, and models that do not belong."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from progress import no_bar
from reference import PlainModel, log_softmax
from test_methods import GREEDY, HELD_OUT, WHOLE, timeless

from colm_edge.errors import DataError, MismatchError, ModelError
from colm_edge.evaluate.methods import Comparison, evaluate
from colm_edge.evaluate.proxy_tuning import Proxy, _side_by_side
from colm_edge.journal import Journal
from colm_edge.pair import load
from colm_edge.train.documents import read_rows, tokenized
from colm_edge.train.scoring import score


@pytest.fixture
def third(tiny):
    """A tiny pair and a third model, whose vocabulary has two tokens more."""
    with (
        load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair,
        Proxy(pair, Path(tiny["defer"]), alpha=0.7, n_threads=1) as proxy,
    ):
        yield pair, proxy


def test_it_is_the_plain_sum_of_three(tiny, third):
    """Likelihoods and answers against the three models evaluated from the whole prefix."""
    pair, proxy = third
    plain = [PlainModel(tiny[name]) for name in ("base", "expert", "defer")]
    n = pair.base.n_vocab
    assert proxy.model.n_vocab == n + 2

    def logits(tokens):
        base, expert, anti = (model.state(tokens)[0][:n] for model in plain)
        return base + 0.7 * (expert - anti)

    rows = [(i, {"prompt": f"p{i}", "completion": f"and c{i}"}) for i in range(3)]
    documents = tokenized(rows, pair)
    expected = [
        log_softmax(logits(list(d.tokens[:i])))[d.tokens[i]]
        for d in documents
        for i in range(d.start, len(d.tokens))
    ]
    assert proxy.score(documents, no_bar, Journal()) == pytest.approx(np.array(expected), abs=1e-3)

    for _, row in rows:
        prompt = pair.prompt_tokens([{"role": "user", "content": row["prompt"]}])
        stream = proxy.stream_tokens(prompt, GREEDY)
        steps = list(stream)
        tokens = list(prompt)
        for step in steps:
            by_hand = logits(tokens)
            assert by_hand[step.token] == pytest.approx(by_hand.max(), abs=1e-2)
            assert step.logprob == pytest.approx(log_softmax(by_hand)[step.token], abs=1e-3)
            tokens.append(step.token)
        assert len(steps) == GREEDY.max_tokens or plain[0].is_end(int(logits(tokens).argmax()))
        stats = stream.answer().stats
        assert stats.n_deferred == stats.n_generated == len(steps)
    for model in plain:
        model.close()


@pytest.mark.parametrize(("anti", "twin"), [("base", "expert"), ("expert", "base")])
def test_without_a_contrast_one_model_is_left(demo, anti, twin):
    """base + (expert − base) is the expert, base + (expert − expert) the base; answers too."""
    models = {"base": demo.base, "expert": demo.expert_session.model}
    with Proxy(demo, models[anti].path, n_threads=1) as proxy:
        proxied, alone = (
            evaluate(
                demo,
                HELD_OUT,
                WHOLE,
                Comparison(metric="contains", limit=6, methods=[name], proxy=proxy),
                progress=no_bar,
            )[0]
            for name in ("proxy", twin)
        )
    assert (proxied["threshold"], proxied["defer_rate"]) == (None, 1.0)
    # Documents one by one, as the proxy has them: packed ones differ in their last bits.
    rows = list(islice(read_rows(HELD_OUT), 6))
    scores = [score(demo, tokenized([row], demo), no_bar) for row in rows]
    expected = -np.concatenate([getattr(s, twin) for s in scores]).mean()
    assert proxied["nll"] == proxied["nll_hard"] == pytest.approx(expected, abs=1e-5)
    for key in ("accuracy", "tokens_per_answer", "cut"):
        assert proxied[key] == alone[key]


@pytest.mark.parametrize("sizes", [(5, 5, 5), (2, 3, 7), (1, 9, 4)])
def test_blocks_of_different_lengths_are_read_side_by_side(sizes):
    def scorer(size):
        def score(tokens, lengths, starts):
            buffer = np.zeros((size, 1), np.float32)  # overwritten by the next block
            for at in range(starts[0], lengths[0], size):
                block = tokens[at : at + size]
                buffer[: len(block), 0] = block
                yield buffer[: len(block)], None

        return SimpleNamespace(score=score)

    tokens = list(range(100, 111))
    seen = [[], [], []]
    for at, blocks in _side_by_side([scorer(size) for size in sizes], tokens, 2):
        assert at == 2 + len(seen[0])
        for values, block in zip(seen, blocks, strict=True):
            values.extend(block[:, 0].tolist())
    assert seen == [tokens[2:]] * 3


def test_sampled_answers_are_seeded(third):
    pair, proxy = third
    options = GREEDY.with_changes(temperature=1.0, seed=3)
    texts = [
        [step.token for step in proxy.stream_tokens(pair.base.tokenize("hello"), chosen)]
        for chosen in (options, options, options.with_changes(seed=4))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_killed_scoring_pass_goes_on(third, tmp_path):
    pair, proxy = third
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(4)))
    alone = Comparison(methods=["proxy"], proxy=proxy)
    whole = evaluate(pair, str(data), GREEDY, alone, progress=no_bar)
    work = tmp_path / "work"
    kept = {"work": work, "progress": no_bar}
    assert timeless(evaluate(pair, str(data), GREEDY, alone, **kept)) == timeless(whole)
    lines = (work / "proxy.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4
    (work / "proxy.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    before = proxy.session.account.n_evaluated
    assert evaluate(pair, str(data), GREEDY, alone, **kept) == whole
    documents = tokenized(read_rows(data), pair)
    n_new = sum(len(d.tokens) - 1 for d in documents[2:])
    assert proxy.session.account.n_evaluated - before <= n_new
    assert (work / "proxy.jsonl").read_text().splitlines(keepends=True) == lines


def test_what_does_not_belong_is_refused(tiny, tiny_pair, tmp_path):
    with pytest.raises(MismatchError, match=r"foreign.gguf cannot be the anti-expert.*tokens in"):
        Proxy(tiny_pair, Path(tiny["foreign"]))
    with pytest.raises(ModelError, match="expected a GGUF file"):
        Proxy(tiny_pair, tmp_path / "none.gguf")
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "no prompt"}\n')
    with (
        Proxy(tiny_pair, Path(tiny["defer"]), n_threads=1) as proxy,
        pytest.raises(DataError, match="line 1"),
    ):
        evaluate(tiny_pair, data, GREEDY, Comparison(metric="exact", proxy=proxy), progress=no_bar)
