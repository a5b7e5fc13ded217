"""What the fast schedule saves on answers to real prompts, in prices by measured tables of costs.

    python tools/studies/price_schedules.py record -m base.gguf -me expert.gguf \\
        --data prompts.jsonl --threshold 0.5 --out traces.json
    python tools/studies/price_schedules.py price traces.json

`record` answers prompts with the sequential schedule and notes of each token whether it was
deferred, whether the base would have written the same, and how sure the base was. `price` replays
that with both schedules over sessions that only count, and prices each batch by the tables below:
no clock, so the result is exact and the machine does not matter.
"""

from __future__ import annotations

import argparse
import json
import math
from array import array
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from colm_edge.arrays import Floats
from colm_edge.bench.replay import Trace, replay
from colm_edge.cancel import Cancel
from colm_edge.decode.fast import Fast
from colm_edge.decode.loop import Schedule
from colm_edge.decode.planner import Planner
from colm_edge.llama.account import Account
from colm_edge.llama.costs import CostTable
from colm_edge.llama.held import common_prefix
from colm_edge.pair import Pair, load
from colm_edge.train.documents import read_rows

N_VOCAB = 64  # of the replay: token ids are taken modulo this


def table(sizes: Sequence[int], milliseconds: Sequence[float], several: float = 0.0) -> CostTable:
    return CostTable(tuple(sizes), tuple(ms / 1e3 for ms in milliseconds), (several / 1e3,))


# Base and expert, by machine: measured ones (docs/speed.md), and a GPU on which a batch of 64 takes
# hardly longer than one token of an expert five times as dear as the base.
POWERS = (1, 2, 4, 8, 16, 32)
SMALL = table(POWERS, (6.2, 9, 12.5, 20, 32, 60))
MACHINES = {
    "Zen 5, 0.5B/1.5B Q4_0": (
        table(POWERS, (10.8, 14.9, 14.6, 21.5, 29.5, 52.7)),
        table(POWERS, (24.5, 39.8, 39.7, 67, 96, 164)),
    ),
    "Zen 5, 0.5B/1.5B Q4_K_M": (
        table(POWERS, (15.9, 30.6, 38.5, 52.9, 62.9, 118)),
        table(POWERS, (28.4, 40.3, 62.2, 100, 184, 214)),
    ),
    "AVX-512, 135M/1.1B": (
        SMALL,
        table((1, 2, 3, 4, 5, 7, 8, 12, 16, 32), (19, 30, 40, 28, 41, 63, 57, 73, 78, 158)),
    ),
    "AMX, 135M/1.1B": (
        table((1, 2, 5, 8, 16, 32), (7, 10, 12, 15, 20, 34)),
        table((1, 2, 5, 8, 16, 32, 33, 64), (30, 53, 58, 71, 93, 155, 255, 315), 3.5),
    ),
    "a GPU, expert 5 × base": (table((1, 64), (2, 2.6)), table((1, 8, 64), (10, 10.5, 13))),
}


class Priced:
    """A timeline that evaluates nothing and adds up what its batches would cost."""

    n_ctx = 1 << 30

    def __init__(self, costs: CostTable, trace: Trace, confidence: Sequence[float] = ()) -> None:
        self._costs, self._trace, self._confidence = costs, trace, confidence
        self._held = array("i")
        self.account = Account()
        self.cuts = False  # whether batches are cut and filled up to the cheapest sizes

    def turn_to(self, prompt: array[int]) -> None:
        """Keep what is held: nothing is evaluated."""

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        wanted = array("i", tokens)
        keep = common_prefix(self._held, wanted)
        if keep == len(wanted) == len(self._held) and not outputs:
            return 0
        keep = min(keep, outputs[0] if outputs else len(wanted) - 1)
        n, several = len(wanted) - keep, len(outputs) > 1
        pieces = self._costs.chunks(n, n + N_VOCAB, whole=several) if self.cuts else [(n, n)]
        seconds = sum(self._costs(size) for _, size in pieces)
        seconds += self._costs.outputs(len(outputs)) if several else 0.0
        self._held = wanted
        self.account += Account(n, 1, seconds)
        return n

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return logits that are as sure of the base's choice as the base was."""
        at, trace = i + 1 - len(self._trace.prompt), self._trace
        token, sure = 0, 0.99
        if 0 <= at < len(trace.tokens):
            token = (trace.tokens[at] + (not trace.agrees[at])) % N_VOCAB
            sure = self._confidence[at] if self._confidence else sure
        sure = min(max(sure, 0.02), 0.999)
        logits = np.full(N_VOCAB, math.log((1 - sure) / (N_VOCAB - 1)), np.float32)
        logits[token] = math.log(sure)
        return logits, np.empty(0, np.float32)


def read_nothing(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
    return 0.0, 1, 0.0, 0  # the replay decides


def cost(
    answers: list[dict[str, Any]], tables: tuple[CostTable, CostTable], planner: Planner | None
) -> float:
    """Return the seconds of all answers, with the fast schedule if there is a planner."""
    total = 0.0
    for answer in answers:
        deferred, agrees = [bool(x) for x in answer["deferred"]], answer["agrees"]
        tokens = [token % N_VOCAB for token in answer["tokens"]]
        trace = Trace([1] * answer["n_prompt"], tokens, deferred, [bool(x) for x in agrees])
        base = Priced(tables[0], trace, answer["confidence"])
        expert = Priced(tables[1], trace)
        schedule: Schedule | None = None
        if planner is not None:
            expert.cuts, schedule = True, Fast([planner])
        written = replay(base, expert, read_nothing, trace, 0.5, N_VOCAB, schedule)
        assert [step.token for step in written] == tokens
        total += base.account.seconds + expert.account.seconds
    return total


def price(path: Path) -> None:
    """Print what the fast schedule saves on recorded answers, for each machine."""
    answers = json.loads(path.read_text())
    deferred = [x for answer in answers for x in answer["deferred"]]
    agrees = [
        same
        for answer in answers
        for same, is_deferred in zip(answer["agrees"], answer["deferred"], strict=True)
        if is_deferred
    ]
    print(
        f"{len(answers)} answers, {len(deferred)} tokens, {np.mean(deferred):.1%} deferred, of "
        f"which the expert repeats the base's choice in {np.mean(agrees):.0%}\n"
    )
    print("| machine | sequential / fast |\n| --- | ---: |")
    for name, tables in MACHINES.items():
        planner = Planner(lambda cancel, tables=tables: tables)  # type: ignore[misc]
        ratio = cost(answers, tables, None) / cost(answers, tables, planner)
        print(f"| {name} | {ratio:.3f} |")


def record(args: argparse.Namespace) -> None:
    """Answer prompts and write what the schedules need to know of each token."""
    with load(args.model, args.model_expert, args.switch, n_ctx=args.ctx_size) as pair:
        rows = islice(read_rows(args.data), args.limit)
        answers = [answered(pair, row["prompt"], args) for _, row in rows]
    args.out.write_text(json.dumps(answers) + "\n")


def answered(pair: Pair, prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return one answer's tokens and, of each, whether it was deferred, whether the base would have
    written it, and the probability of the base's choice."""
    options = {"temperature": 0.0, "max_tokens": args.n_predict, "threshold": args.threshold}
    stream = pair.stream(prompt, schedule="sequential", **options)
    agrees, confidence = list[bool](), list[float]()
    for step in stream:
        if step.source == "base":
            agrees.append(True)
            confidence.append(math.exp(step.logprob))
            continue
        logits = pair.base_session.logits.astype(np.float64)
        choice = int(logits[: pair.n_shared].argmax())
        agrees.append(choice == step.token)
        confidence.append(float(1 / np.exp(logits - logits[choice]).sum()))
    return {
        "n_prompt": len(stream.prompt_tokens),
        "tokens": [step.token for step in stream.steps],
        "deferred": [step.source == "expert" for step in stream.steps],
        "agrees": agrees,
        "confidence": confidence,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="answer prompts with two models")
    recording.add_argument("-m", "--model", required=True)
    recording.add_argument("-me", "--model-expert", required=True)
    recording.add_argument("-sw", "--switch", default="margin")
    recording.add_argument("-c", "--ctx-size", type=int, default=1024)
    recording.add_argument("-n", "--n-predict", type=int, default=160)
    recording.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl")
    recording.add_argument("--limit", type=int, default=14, help="prompts")
    recording.add_argument("--threshold", type=float, default=0.5)
    recording.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    pricing = commands.add_parser("price", help="price recorded answers")
    pricing.add_argument("traces", type=Path)
    args = parser.parse_args()
    if args.command == "price":
        price(args.traces)
    else:
        record(args)


if __name__ == "__main__":
    main()
