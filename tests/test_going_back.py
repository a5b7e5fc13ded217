"""Review on real models: tiny ones, and what streams, slots and the server tell of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from expert_servers import faking
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import END, Scripted, decoder, reader
from serving import serving

from colm_edge.cancel import Cancel
from colm_edge.cli.drafts import Drafts, column_behind
from colm_edge.decode.policy import Policy
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.decode.step import Drafted, Event, Stats, Step, Undone
from colm_edge.errors import ColmError
from colm_edge.options import Options, ServerOptions
from colm_edge.pair import load
from colm_edge.readout import FEATURES
from colm_edge.serve.answers import Server
from colm_edge.slots import Slots
from colm_edge.stream import Stream
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.together import Task, answer_together

PROMPTS = ["hello", "what is this about, and why", "one two three four five six seven", "so"]
REVIEWED = Options(temperature=0.0, defer_rate=0.2, max_tokens=30, review=2.0, review_window=6)


def text_of(pair, prompt: str, options: Options) -> list[int]:
    tokens = pair.base.tokenize(prompt)
    return [step.token for step in pair.stream_tokens(tokens, options)]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("schedule", ["fast", "sequential"])
def test_without_tolerance_the_text_is_the_experts_own(tiny_pair, prompt, schedule):
    options = REVIEWED.with_changes(review=0.0, schedule=schedule)
    alone = text_of(tiny_pair, prompt, options.with_changes(threshold=0.0))
    assert text_of(tiny_pair, prompt, options) == alone


@pytest.mark.parametrize("prompt", PROMPTS)
def test_off_is_the_plain_loop(tiny_pair, prompt):
    off = REVIEWED.with_changes(review="off")
    assert not off.reviews
    endless = REVIEWED.with_changes(review=1e9)
    assert text_of(tiny_pair, prompt, endless) == text_of(tiny_pair, prompt, off)


def test_one_model_alone_is_not_reviewed(tiny_pair):
    for threshold in (0.0, 1.0):
        off = Options(temperature=0.0, threshold=threshold, max_tokens=9)
        answer = tiny_pair.generate("hello", **off.with_changes(review=0.0).changed)
        assert answer.text == tiny_pair.generate("hello", **off.changed).text
        assert answer.stats.n_reviewed == 0


@pytest.mark.parametrize("floor", [0.0, 0.9])
def test_slots_write_the_same_reviewed_texts(tiny_pair, floor):
    options = REVIEWED.with_changes(review_floor=floor)
    tasks = [Task(i, tiny_pair.base.tokenize(text), options) for i, text in enumerate(PROMPTS)]
    found = {
        done.task.key: [step.token for step in done.answer.steps]
        for done in answer_together(tiny_pair, tasks, 3)
    }
    alone = [text_of(tiny_pair, text, options) for text in PROMPTS]
    one_by_one = options.with_changes(schedule="sequential")
    assert alone == [text_of(tiny_pair, text, one_by_one) for text in PROMPTS]
    assert [found[i] for i in range(len(PROMPTS))] == alone


@pytest.mark.parametrize("floor", [0.0, 0.9])
@pytest.mark.parametrize("stop", [(), ("e",)])
def test_events_tell_what_waits_and_what_is_undone(tiny_pair, stop, floor):
    options = REVIEWED.with_changes(review=1.0, stop=stop, review_floor=floor)
    tokens = tiny_pair.base.tokenize(PROMPTS[2])
    plain = tiny_pair.stream_tokens(tokens, options)
    steps = [step.token for step in plain]
    stream = tiny_pair.stream_tokens(tokens, options)
    drafts: list[Step] = []  # that a reader shows behind the final text
    n_undone = 0
    for event in stream.events():
        if isinstance(event, Drafted):
            drafts.append(event.step)
            assert len(drafts) <= options.review_window
        elif isinstance(event, Undone):
            n_undone += len(event.steps)
            assert drafts[len(drafts) - len(event.steps) :] == list(event.steps)
            del drafts[len(drafts) - len(event.steps) :]
        else:
            assert not drafts or event is drafts.pop(0)
    answer = stream.answer()
    assert [step.token for step in answer.steps] == steps
    assert answer.text == plain.answer().text
    if not stop:
        assert answer.stats.n_undone == n_undone == sum(len(one.steps) for one in answer.undone) > 0
    for one in answer.undone:
        assert one.regret > options.review
        record = one.record()
        assert list(record) == ["at", "tokens", "text", "source", "regret"]
        assert record["tokens"] == [step.token for step in one.steps]
        assert record["source"] == "base"


@settings(max_examples=300)
@given(st.data())
def test_a_step_is_the_first_draft_whatever_waits_for_its_text(data):
    """A token of the expert is held back where it may begin a stop text, or ends inside a
    character; drafts come meanwhile."""
    events: list[Event] = []
    drafts: list[Step] = []
    final = b""
    bytes_of = [b"a", b"b", b" x", b"ab", b"\xc3", b"\xa9", b"\xe6\xbc", b"\xa2", b"\xff"]
    pieces = st.sampled_from(bytes_of)
    spelt: list[bytes] = []

    def step(source: str) -> Step:
        spelt.append(data.draw(pieces))
        return Step(len(spelt) - 1, source, 0.5, -1.0)

    for kind in data.draw(st.lists(st.sampled_from(["draft", "undone", "expert"]), max_size=12)):
        if kind == "draft":
            drafts.append(step("base"))
            events.append(Drafted(drafts[-1]))
            continue
        if kind == "undone" and drafts:
            n = data.draw(st.integers(1, len(drafts)))
            events.append(Undone(0, tuple(drafts[-n:]), 1.0))
            del drafts[-n:]
        events += [*drafts, step("expert")]
        drafts.clear()
    events += drafts
    final = b"".join(spelt[one.token] for one in events if isinstance(one, Step))
    decoder = SimpleNamespace(
        tokens=[], stats=Stats(), undone=[], policy=Policy(None, 0.5), sources=("expert",),
        finish_reason="stop", ended_by=None, events=lambda: iter(events),
    )  # fmt: skip
    model = SimpleNamespace(piece=spelt.__getitem__)
    stop = data.draw(st.sampled_from([(), ("ab",), ("a", "bé"), ("漢",)]))
    shown: list[Step] = []
    text = ""
    for event in Stream(decoder, model, stop, Cancel()).events():
        if isinstance(event, Drafted):
            shown.append(event.step)
        elif isinstance(event, Undone):
            assert shown[len(shown) - len(event.steps) :] == list(event.steps)
            del shown[len(shown) - len(event.steps) :]
        else:
            assert not shown or event is shown.pop(0)
            text += event.text
    whole = final.decode("utf-8", "replace")
    assert text == whole[: min((whole.find(s) for s in stop if s in whole), default=len(whole))]


@pytest.mark.parametrize("n", [0, 2, 5])
def test_the_first_steps_have_the_figures_of_these(tiny_pair, n):
    stream = tiny_pair.stream(PROMPTS[2], **REVIEWED.with_changes(review=0.0).changed)
    list(stream)
    answer = stream.answer(n)
    assert answer.stats.n_generated == len(answer.steps) == n
    assert answer.stats.n_undone == sum(len(one.steps) for one in answer.undone)


def test_a_stop_text_inside_a_draft_ends_nothing(tiny_pair):
    """Only a final token can complete a stop text."""
    options = REVIEWED.with_changes(review=0.0)
    whole = tiny_pair.generate(PROMPTS[1], **options.changed)
    undone = "".join(step.text for one in whole.undone for step in one.steps)
    stops = sorted(set(undone) - set(whole.text))
    assert stops  # what only undone drafts held
    for stop in stops:
        cut = tiny_pair.generate(PROMPTS[1], **options.with_changes(stop=(stop,)).changed)
        assert cut.text == whole.text


def test_an_end_that_the_expert_puts_there_is_told(tiny_pair):
    """The base would go on; the undone tokens stand where the answer has ended."""
    base = Scripted(lambda prefix: 5)
    expert = Scripted(lambda prefix: 5 if len(prefix) < 6 else END)
    run = decoder(
        base, expert, reader(0, 0.0)[0], [1, 2], schedule=Review(ByRule(Tolerance(1.0)), 8)
    )
    stream = Stream(run, tiny_pair.base, (), run.cancel)
    assert [step.token for step in stream] == [5] * 4
    (undone,) = stream.answer().undone
    assert undone.at == 4
    assert stream.answer().stats.n_undone == len(undone.steps) == 4


def test_what_cannot_go_together_is_said():
    with pytest.raises(ColmError, match="cannot go together"):
        Options(review=1.0, doubt=1.0)
    with pytest.raises(ColmError, match="the expert's own text, compose a mixture"):
        Options(review=0.0, strategy="compose")
    with pytest.raises(ColmError, match="expected a number from 0, or 'off'"):
        Options(review="on")


def test_one_model_alone_samples_as_without_review(tiny_pair):
    for threshold in (0.0, 1.0):
        sampled = Options(seed=7, threshold=threshold, max_tokens=12)
        plain = tiny_pair.generate("hello", **sampled.changed)
        assert tiny_pair.generate("hello", **sampled.changed, review=0.0).text == plain.text


def test_an_expert_on_a_server_cannot_review(tiny):
    with (
        faking("llamacpp", tiny["expert"]) as (url, _),
        load(tiny["base"], url, "margin", n_threads=1, n_ctx=128) as pair,
    ):
        for what in ("review", "doubt"):
            with pytest.raises(ColmError, match=f"{what}: this needs"):
                pair.generate("hello", max_tokens=3, **{what: 2.0})
        pair.defaults = Options(review=2.0)
        with pytest.raises(ColmError, match="review: this needs"):
            Server(pair, ServerOptions(), "tiny")


def test_the_server_tells_drafts_beside_the_final_text(tiny):
    defaults = REVIEWED.with_changes(review="off")
    with (
        load(
            tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256, defaults=defaults
        ) as pair,
        serving(pair, n_slots=1) as (url, _),
    ):  # fmt: skip

        def chunks(**colm) -> list[dict]:
            body = {"prompt": PROMPTS[2], "max_tokens": 30, "stream": True, "colm": colm}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                assert response.status_code == 200
                lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
            return [json.loads(line) for line in lines]

        def text(chunks: list[dict]) -> str:
            return "".join(chunk["choices"][0]["text"] for chunk in chunks)

        plain = chunks(review=1.0, review_window=6)
        told = chunks(review=1.0, review_window=6, provisional=True)
        assert text(told) == text(plain) != text(chunks(review="off"))
        side = [chunk["colm"] for chunk in told if "colm" in chunk]
        assert any("draft" in one for one in side)
        assert any("undone" in one for one in side)
        assert not any({"draft", "undone"} & set(chunk.get("colm", {})) for chunk in plain)


class Terminal:
    """One line of a terminal."""

    def __init__(self) -> None:
        self.line, self.at, self.saved = "", 0, 0

    def write(self, text: str) -> None:
        while text:
            if text.startswith("\x1b["):
                end = next(i for i, c in enumerate(text[2:], 2) if c.isalpha())
                command, text = text[end], text[end + 1 :]
                if command == "K":
                    self.line = self.line[: self.at]
            elif text.startswith("\x1b"):
                if text[1] == "7":
                    self.saved = self.at
                else:
                    self.at = self.saved
                text = text[2:]
            else:
                self.line = self.line[: self.at] + text[0]
                self.at, text = self.at + 1, text[1:]


def test_a_terminal_shows_drafts_that_fit_and_takes_them_back():
    drafts, screen = Drafts(width=20), Terminal()
    screen.write(drafts.step("before\nfinal ", "final "))
    for text in ("and ", "dim", "\tnot this", "nor this"):
        screen.write(drafts.add(text))
    assert screen.line == "final and dim"
    screen.write(drafts.undo(2))
    assert screen.line == "final and dim"
    screen.write(drafts.undo(1))
    assert screen.line == "final and "
    screen.write(drafts.add("more"))
    screen.write(drafts.step("and ", "AND "))  # marked, and the rest still waits
    assert (screen.line, screen.at) == ("final AND more", 10)
    screen.write(drafts.end())
    assert screen.line == "final AND "
    screen.write(drafts.add("x" * 20))  # too wide for this line
    assert screen.line == "final AND "
    assert drafts.end() == ""
    screen.write(drafts.step("x" * 10, "x" * 10))  # the line is full: the cursor waits there
    assert drafts.add("dim") == ""
    assert drafts.undo(1) == ""
    screen.write(drafts.step(" next", " next"))
    assert drafts.add("dim") != ""
    drafts.end()
    drafts, screen = Drafts(width=20), Terminal()
    screen.write(drafts.step("final ", "final "))
    screen.write(drafts.add("dim"))
    screen.write(drafts.interrupted())  # by a note on the next line
    assert screen.line == "final "
    screen = Terminal()
    screen.write(drafts.add(" more"))
    assert screen.line == "dim more"
    drafts.width = 3  # of a smaller window
    screen.write(drafts.undo(1))
    assert screen.line == ""
    assert column_behind("漢" * 105, 0, 39) == 20  # a wide one does not begin in the last column
    assert [column_behind("x" * n, 0, 20) for n in (19, 20, 21, 40)] == [19, 20, 1, 20]
    assert column_behind("\t" * 9, 3, 20) == 19  # a tab does not wrap
    assert column_behind("aé日\u0301\u0941") == 4
    assert (column_behind("\t\t"), column_behind("ab\tc", 5)) == (16, 9)


def test_slots_are_free_after_a_reviewed_answer_is_cancelled(tiny_pair):
    slots = Slots(tiny_pair, 2)
    tokens = tiny_pair.base.tokenize(PROMPTS[1])
    with slots.take(tokens) as timelines:
        stream = tiny_pair.stream_tokens(tokens, REVIEWED, timelines)
        next(stream)
        stream.cancel()
        assert len(list(stream)) <= 1
    for _ in range(3):
        with slots.take(tokens) as timelines:
            assert list(tiny_pair.stream_tokens(tokens, REVIEWED, timelines))
    slots.close()


def carried(pair, nats):
    """The pair with a switch that carries a tolerance of review."""
    n_embd = pair.base.n_embd
    weight = np.zeros((1, n_embd + len(FEATURES)), np.float32)
    weight[0, n_embd + FEATURES.index("margin")] = -8.0
    switch = Switch(
        FEATURE_SETS["both"], weight, np.array([2.0], np.float32), n_embd, 0.5, review=nats
    )
    return pair.switched(switch)


def test_the_switch_says_whether_to_review_where_nothing_else_does(tiny_pair):
    greedy = {"temperature": 0.0, "max_tokens": 24}
    with carried(tiny_pair, None):
        plain = tiny_pair.generate(PROMPTS[0], **greedy).text
        reviewed = tiny_pair.generate(PROMPTS[0], **greedy, review=0.5)
        assert reviewed.stats.n_undone > 0
    with carried(tiny_pair, 0.5):
        assert tiny_pair.generate(PROMPTS[0], **greedy).text == reviewed.text
        assert tiny_pair.generate(PROMPTS[0], **greedy, review="off").text == plain
        assert tiny_pair.generate(PROMPTS[0], **greedy, doubt=1.0).stats.n_reviewed == 0
    with carried(tiny_pair, 0.0):
        mixed = tiny_pair.generate(PROMPTS[0], **greedy, strategy="compose")
        assert mixed.stats.n_reviewed == 0
    with carried(tiny_pair, math.inf):
        assert tiny_pair.generate(PROMPTS[0], **greedy).text == plain


def test_sixty_percent_of_the_bases_tokens_are_reviewed_by_the_switchs_calibration(tiny_pair):
    greedy = {"temperature": 0.0, "max_tokens": 40, "threshold": 0.99}

    def n_reviewed(switch, **options):
        with tiny_pair.switched(switch):
            return tiny_pair.generate(PROMPTS[0], **greedy, **options).stats.n_reviewed

    with carried(tiny_pair, None):
        own = tiny_pair.switch
        steps = tiny_pair.generate(PROMPTS[0], **greedy).steps
    p_defer = [step.p_defer for step in steps]
    rates = tuple(np.linspace(0, 1, 21).tolist())
    thresholds = (1.0, *np.quantile(p_defer, 1 - np.array(rates[1:-1])).tolist(), 0.0)
    calibrated = replace(own, defer_rates=rates, thresholds=thresholds)
    floor = calibrated.threshold_for(0.6)
    n, n_all = n_reviewed(calibrated, review=50.0), n_reviewed(own, review=50.0)
    assert n_all >= len(steps)  # the end token may be one more
    assert abs(n - 0.6 * len(steps)) <= 2
    assert n_reviewed(calibrated, review=50.0, review_floor=floor) == pytest.approx(n, abs=1)
    assert n_reviewed(calibrated, review=50.0, review_floor=0.0) == n_all
    assert n_reviewed(calibrated, review=0.0) > n
    assert n_reviewed(calibrated, review=0.0, review_floor=1.0) > n
    # Where more is deferred, it is the same share of what is left.
    greedy["threshold"] = calibrated.threshold_for(0.5)
    left, some = n_reviewed(own, review=50.0), n_reviewed(calibrated, review=50.0)
    assert 0.3 * left < some < 0.9 * left
