"""What is closed or unloaded is so as a whole, whatever fails; the first error is told."""

from __future__ import annotations

import threading
import time

import pytest

from colm_edge.errors import ColmError, ModelError, PromptError
from colm_edge.llama.owners import close_each
from colm_edge.pair import Pair, load
from colm_edge.slots import Slots

GREEDY = {"temperature": 0.0, "max_tokens": 6}


class BrokenError(Exception):
    pass


def failing(method, words: str):
    """Return what does as a method, and then fails."""

    def close(*args):
        method(*args)
        raise BrokenError(words)

    return close


def opened(models) -> Pair:
    refs, switch = models
    return load(**refs, switch=switch, n_threads=1, n_ctx=256)


def test_each_is_called_and_the_first_error_raised():
    called: list[int] = []
    failures = {1: BrokenError("first"), 3: BrokenError("second")}

    def closer(i: int):
        def close() -> None:
            called.append(i)
            if i in failures:
                raise failures[i]

        return close

    with pytest.raises(BrokenError, match="first"):
        close_each(*map(closer, range(5)))
    assert called == [0, 1, 2, 3, 4]
    close_each(closer(0))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        close_each(interrupted, closer(9))
    assert 9 not in called  # what was interrupted may still be in use


@pytest.mark.parametrize("ends", ["close", "unload_expert"])
def test_a_pair_frees_the_other_models_where_one_fails(models, ends, monkeypatch):
    pair = opened(models)
    for k in (0, 1):
        pair.members[k].session.open()
    first = pair.members[0]
    what = "close" if ends == "close" else "unload"
    monkeypatch.setattr(first, what, failing(getattr(first, what), "the first of them"))
    with pytest.raises(BrokenError, match="the first of them"):
        getattr(pair, ends)()
    assert not pair.expert_is_loaded
    assert not any(member.here.created for member in pair.members)
    assert pair.base.loaded is (ends != "close")
    assert pair.base_session.created is (ends != "close")
    monkeypatch.undo()
    pair.close()


def test_an_expert_whose_catch_up_failed_is_unloaded(tiny, monkeypatch):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256, overlap=True) as pair:
        member = pair.members[0]
        member.session.open()

        def broken(*args):
            raise BrokenError("the catch-up")

        monkeypatch.setattr(member.here, "sync", broken)
        member.timeline.begin(pair.prompt_tokens([{"role": "user", "content": "hello"}]))
        with pytest.raises(BrokenError, match="the catch-up"):
            pair.unload_expert()
        assert not pair.expert_is_loaded
        monkeypatch.undo()
        assert pair.generate("hello", threshold=0.0, **GREEDY).text


@pytest.mark.parametrize("ends", ["close", "unload_expert"])
def test_slots_free_the_other_contexts_where_one_fails(models, ends, monkeypatch):
    with opened(models) as pair:
        slots = Slots(pair, 2)
        slots.open()
        for shared in slots.experts:
            shared.open()
        failing_one = slots.base if ends == "close" else next(iter(slots.experts))
        monkeypatch.setattr(failing_one, "close", failing(failing_one.close, "the first"))
        with pytest.raises(BrokenError, match="the first"):
            getattr(slots, ends)()
        assert not any(shared.context.created for shared in slots.experts)
        assert slots.base.context.created is (ends != "close")
        assert {member.n_contexts for member in pair.members} == {1 if ends == "close" else 2}
        monkeypatch.undo()
        slots.close()


def test_a_token_that_a_model_lacks_is_told_without_counting_models(models, tiny):
    with opened(models) as pair, pytest.raises(PromptError, match="vocabulary of all models"):
        pair.check_prompt([1, 10_000], 0.5)
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1) as pair:
        with pytest.raises(PromptError, match="token 10000 is not in the vocabulary of all models"):
            pair.check_prompt([10_000], 0.5)
        with pytest.raises(ColmError, match=r"vocabulary of the base; expected ids below 400"):
            pair.check_prompt([10_000], 1.0)


def test_closing_ends_an_answer_that_is_being_generated(tiny):
    with load(tiny["endless"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        sync, begun, errors = pair.base_session.sync, threading.Event(), []

        def slow(*args):
            begun.set()
            time.sleep(0.02)
            return sync(*args)

        pair.base_session.sync = slow

        def generate() -> None:
            with pytest.raises(ModelError, match="is closed") as raised:
                pair.generate("x", temperature=0.0, threshold=1.0)
            errors.append(raised)

        answers = threading.Thread(target=generate)
        answers.start()
        assert begun.wait(30)
        pair.close()
        answers.join(30)
        assert errors
        assert pair.base_session.account.n_calls < 100


def test_a_closed_pair_saves_no_prompts(tiny, tmp_path):
    path = tmp_path / "prompts"
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        pair.generate("hello", **GREEDY)
        pair.save_prompts(path)
    before = path.read_bytes()
    with pytest.raises(ModelError, match="is closed"):
        pair.save_prompts(path)
    assert path.read_bytes() == before
