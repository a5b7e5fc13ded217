"""Count how often the same request gives another text: in another order, schedule, slot or batch.

    python tools/studies/same_text.py                       # the demo pair, 300 requests
    python tools/studies/same_text.py -fa on -ctk q8_0 -ctv q8_0
    python tools/studies/same_text.py -m base.gguf -me expert.gguf --pair qwen2.5-coder -n 40

Each drawn request is first written by itself, sequentially, by models that hold nothing. Greedy
answers that differ from that are looked into: what stands before the first other token is evaluated
again, cut into batches in 8 ways, and in 8 ways beside other answers in shared batches. It is a
near-tie if the two tokens' logits, or p_defer and the threshold in logits, lie no farther apart
than twice the range in which these 16 move that distance. What they do not explain is looked at
in four times as many ways before it is called a fault; then the command fails. Sampled answers are
compared by their texts alone.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from colm_edge.arrays import Floats
from colm_edge.decode.step import Step
from colm_edge.decode.timeline import Timeline
from colm_edge.options import Options
from colm_edge.pair import Pair, load
from colm_edge.slots import Slots
from colm_edge.stream import Stream
from colm_edge.together import Task, answer_together

# Ways to cut the same tokens into batches, and as many beside other answers: at first, and before
# a fault is told. In 3 of 200 runs 16 ways missed how far batches move a p_defer (0.87 to 0.95).
CUTS = (8, 32)
N_SLOTS = 4
REACH = 2.0  # times their range: what is nearer than that is a near-tie
QUESTIONS = (
    "List three facts about {}.", "What is {}?", "When did the last {} die?", "Where is {}?",
    "Say in one sentence what {} has to do with {}.", "Is {} larger than {}? Explain.",
    "Write a line of Python that prints {} and {}.",
)  # fmt: skip
THINGS = (
    "bees", "France", "the Caspian tiger", "tungsten", "the moon", "a river", "bread", "the dodo",
    "Japan", "iron", "an equation", "the sea", "a library", "Monday", "the symbol of gold",
)  # fmt: skip
State = tuple[Floats, Floats]  # logits and hidden state
SYSTEMS = ("You are brief.", "You answer like a careful teacher, in whole sentences. " * 12)


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and how it is answered."""

    tokens: list[int]
    options: Options


@dataclass(frozen=True)
class Written:
    """The steps of an answer, its end token included."""

    steps: list[Step]

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]

    @property
    def bits(self) -> list[tuple[int, float, float]]:
        """What would show another rounding of either model."""
        return [(step.token, step.p_defer, step.logprob) for step in self.steps]


def drawn(pair: Pair, draw: random.Random, n_tokens: int, context: int) -> Request:
    """Return a request: a question, often after a system prompt or a passage that others share."""
    question = draw.choice(QUESTIONS)
    question = question.format(*draw.sample(THINGS, question.count("{}")))
    if draw.random() < 0.4:
        passage = random.Random(draw.randrange(4)).choices(THINGS, k=draw.choice((10, 40, 80)))
        question = " ".join(passage) + "\n" + question
    messages = [{"role": "user", "content": question}]
    if draw.random() < 0.5:
        messages.insert(0, {"role": "system", "content": draw.choice(SYSTEMS)})
    threshold = draw.choices((None, 0.0, 1.0), (8, 1, 1))[0]
    options = Options(
        temperature=0.0, threshold=threshold, review=math.inf, max_tokens=draw.randint(8, n_tokens)
    )
    return Request(pair.prompt_tokens(messages)[-(context - n_tokens) :], options)


def written(stream: Stream) -> Written:
    steps = list(stream)
    return Written(steps if stream.end is None else [*steps, stream.end])


def forget(pair: Pair) -> None:
    pair.base_session.forget()
    pair.expert_session.forget()


class Ways:
    """Ways to write the same requests. Each yields (index of a request, its answer)."""

    def __init__(self, pair: Pair, requests: Sequence[Request], seed: int) -> None:
        self.pair, self.requests, self._draw = pair, requests, random.Random(seed)

    def _shuffled(self) -> list[int]:
        return self._draw.sample(range(len(self.requests)), len(self.requests))

    def _ask(self, i: int, **changes: object) -> Written:
        request = self.requests[i]
        options = request.options.with_changes(**changes)
        return written(self.pair.stream_tokens(request.tokens, options))

    def alone(self, **changes: object) -> Iterator[tuple[int, Written]]:
        for i in range(len(self.requests)):
            forget(self.pair)
            yield i, self._ask(i, schedule="sequential", **changes)

    def in_turn(self, **changes: object) -> Iterator[tuple[int, Written]]:
        """One after the other, in a drawn order, in sessions that keep what they hold."""
        return ((i, self._ask(i, **changes)) for i in self._shuffled())

    def resumed(self) -> Iterator[tuple[int, Written]]:
        with tempfile.TemporaryDirectory() as folder:
            for i in self._shuffled():
                self._ask(i, schedule="sequential", max_tokens=2)
                self.pair.save_prompts(Path(folder, "prompts"))
                forget(self.pair)
                self.pair.load_prompts(Path(folder, "prompts"))
                yield i, self._ask(i, schedule="sequential")

    def slots(self, n_slots: int, seeded: bool = False) -> Iterator[tuple[int, Written]]:
        """As the server writes them, n_slots at a time."""
        tasks = [
            Task(i, request.tokens, request.options.with_changes(**sampled(i) if seeded else {}))
            for i, request in enumerate(self.requests)
        ]
        for done in answer_together(self.pair, (tasks[i] for i in self._shuffled()), n_slots):
            end = [] if done.end is None else [done.end]
            yield done.task.key, Written([*done.answer.steps, *end])


def sampled(i: int) -> dict[str, object]:
    return {"temperature": 0.8, "seed": i}


class Judge:
    """Says of two greedy answers to one request whether they parted at a near-tie."""

    def __init__(self, pair: Pair, requests: Sequence[Request], seed: int) -> None:
        self._pair, self._requests, self._draw = pair, requests, random.Random(seed)
        self._read = pair.switch.reader(pair.base, pair.n_shared)

    def is_near_tie(self, request: Request, one: Written, other: Written) -> bool:
        """Return whether what decided there is as near as batches move it."""
        pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), None)
        if at is None:  # one is a part of the other, and no end token ended it
            return False
        prefix = array("i", request.tokens + one.tokens[:at])
        a, b = one.steps[at], other.steps[at]
        by_switch = a.source != b.source
        for cuts in CUTS:
            states = self._states(
                prefix, len(request.tokens), cuts, base=by_switch or a.source == "base"
            )
            if by_switch:
                values = [logit(self._read(logits, hidden)[0]) for logits, hidden in states]
                bound = logit(self._pair.threshold(request.options))
            else:
                values, bound = [float(x[a.token]) - float(x[b.token]) for x, _ in states], 0.0
            if near(values, bound):
                return True
        return False

    def _states(self, prefix: array[int], n_prompt: int, cuts: int, *, base: bool) -> list[State]:
        """Return the states of a model after the tokens, in twice so many ways to evaluate them."""
        session = self._pair.base_session if base else self._pair.expert_session
        n = len(prefix)
        ways = [[n], [*range(n_prompt, n), n], [n - 1, n] if n > 1 else [n]]
        while len(ways) < cuts:
            ways.append(self._cut(n))
        states = []
        for ends in ways:
            session.forget()
            states.append(after(session, prefix, ends))
        with closing(Slots(self._pair, N_SLOTS)) as slots:
            for ends in ways:
                states.append(self._beside(slots, prefix, ends, 0 if base else 1))
        return states

    def _cut(self, n: int) -> list[int]:
        k = min(n - 1, self._draw.randint(1, 6))
        return [*sorted(self._draw.sample(range(1, n), k)), n]

    def _beside(self, slots: Slots, prefix: array[int], ends: list[int], which: int) -> State:
        """Return the state after the tokens, where other slots evaluate other prompts meanwhile."""

        def work(tokens: array[int], ends: list[int]) -> State:
            with slots.take(tokens) as timelines:
                assert timelines is not None
                timelines[which].turn_to(tokens)
                return after(timelines[which], tokens, ends)

        others = [array("i", one.tokens) for one in self._draw.choices(self._requests, k=3)]
        with ThreadPoolExecutor(N_SLOTS) as threads:
            mine = threads.submit(work, prefix, ends)
            beside = [threads.submit(work, other, self._cut(len(other))) for other in others]
            for one in beside:
                one.result()
            return mine.result()


def after(timeline: Timeline, tokens: array[int], ends: Sequence[int]) -> State:
    """Return the state after tokens that are evaluated up to one end after the other."""
    for end in ends:
        timeline.sync(tokens[:end])
    logits, hidden = timeline.state(len(tokens) - 1)
    return logits.copy(), hidden.copy()


def logit(p: float) -> float:
    p = min(max(p, 1e-12), 1 - 1e-12)
    return math.log(p / (1 - p))


def near(values: Sequence[float], bound: float) -> bool:
    """Return whether values lie no farther from a bound than REACH times their range."""
    distance = min(abs(value - bound) for value in values)
    crosses = min(values) <= bound <= max(values)
    return crosses or distance <= REACH * (max(values) - min(values))


def compared(
    alone: dict[int, Written],
    answers: Iterable[tuple[int, Written]],
    is_near_tie: Callable[[int, Written], bool] | None,
) -> Counter[str]:
    """Count answers: same to the last bit, equal, near-ties, others; without a judge, different."""
    found, differing = Counter[str](), list[tuple[int, Written]]()
    for i, answer in answers:
        found["bits"] += answer.bits == alone[i].bits
        if answer.tokens == alone[i].tokens:
            found["equal"] += 1
        else:
            differing.append((i, answer))
    for i, answer in differing:  # judged at the end: it evaluates on the same sessions
        if is_near_tie is None:
            found["different"] += 1
        else:
            found["near-ties" if is_near_tie(i, answer) else "others"] += 1
    return found


def study(
    pair: Pair, requests: Sequence[Request], seed: int, chosen: Callable[[str], bool]
) -> Iterator[tuple[str, Counter[str]]]:
    """Yield what was counted, way by way, of those that are chosen."""
    ways, judge = Ways(pair, requests, seed), Judge(pair, requests, seed)
    alone = dict(ways.alone())

    def is_near_tie(i: int, answer: Written) -> bool:
        return judge.is_near_tie(requests[i], alone[i], answer)

    greedy: dict[str, Callable[[], Iterator[tuple[int, Written]]]] = {
        "sequential, in turn": lambda: ways.in_turn(schedule="sequential"),
        "resumed from a prompt cache": ways.resumed,
        "fast, in turn": ways.in_turn,
        "server, 1 slot": lambda: ways.slots(1),
        "server, 4 slots": lambda: ways.slots(4),
    }
    for name, write in greedy.items():
        if chosen(name):
            yield name, compared(alone, write(), is_near_tie)
    if not chosen("seeds"):
        return
    drawn = {i: ways._ask(i, schedule="sequential", **sampled(i)) for i in range(len(requests))}
    for n_slots in (1, 4):
        yield f"seeds, {n_slots} slot(s)", compared(drawn, ways.slots(n_slots, True), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--pair")
    parser.add_argument("-n", type=int, default=300, help="requests")
    parser.add_argument("--tokens", type=int, default=60, help="the most tokens of an answer")
    parser.add_argument("-c", "--context", type=int, default=512)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-fa", "--flash-attn", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-ctv", "--cache-type-v", default="f16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", default="", help="only ways whose names have one of these, by |")
    args = parser.parse_args()
    draw, wanted = random.Random(args.seed), args.ways.split("|")
    with load(
        args.model, args.model_expert, pair=args.pair, n_ctx=args.context, n_threads=args.threads,
        flash_attn=args.flash_attn, cache_type_k=args.cache_type_k, cache_type_v=args.cache_type_v,
        overlap=False,
    ) as pair:  # fmt: skip
        requests = [drawn(pair, draw, args.tokens, args.context) for _ in range(args.n)]
        print("| way | to the last bit | equal | near-ties | others | different |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        faults = 0
        chosen = lambda name: any(part in name for part in wanted)  # noqa: E731
        for name, found in study(pair, requests, args.seed, chosen):
            names = ("bits", "equal", "near-ties", "others", "different")
            print(f"| {name} | " + " | ".join(str(found[x]) for x in names) + " |", flush=True)
            faults += found["others"]
    if faults:
        raise SystemExit(f"{faults} answers differ, and no near-tie explains them")


if __name__ == "__main__":
    main()
