"""Does doubt bring back what a wrong expert has lost? Its digits are wrong at a known rate.

    python tools/studies/wrong_expert.py

The demo pair answers its held-back questions. A wrapper around its expert exchanges, with
probability q, the likeliest digit for another one, always the same after the same tokens. Printed
for each q and each bound of doubt: exact facts in the answers, all and those that are numbers,
tokens that were undone, and what both models evaluated. Then, how well each model's likeliest next
token tells a right digit from a wrong one: the probability that it costs more after the wrong one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np

from colm_edge import load
from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel
from colm_edge.evaluate.metrics import METRICS
from colm_edge.llama.session import Session
from colm_edge.options import Options
from colm_edge.pair import Pair
from colm_edge.train.documents import Row, read_rows

DATA = Path(__file__).parents[2] / "tests" / "data" / "demo_heldout.jsonl"
WRONG = (0.0, 0.05, 0.2)
BOUNDS = (float("inf"), 3.0, 1.0, 0.3, 0.1)


class Wrong:
    """A session whose likeliest digit is, with probability q, another one."""

    def __init__(self, session: Session, q: float) -> None:
        self._session, self._q = session, q
        pieces = [session.model.piece(token) for token in range(session.model.n_vocab)]
        self._digits = [token for token, piece in enumerate(pieces) if piece.isdigit()]
        self._tokens: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        self._tokens = list(tokens)
        return self._session.sync(tokens, outputs, cancel)

    def state(self, i: int) -> tuple[Floats, Floats]:
        logits, hidden = self._session.state(i)
        draw = random.Random(json.dumps(self._tokens[: i + 1]))
        best = int(logits.argmax())
        if best in self._digits and draw.random() < self._q:
            other = draw.choice([digit for digit in self._digits if digit != best])
            logits = logits.copy()
            logits[[best, other]] = logits[[other, best]]
        return logits, hidden


def answers(pair: Pair, rows: list[Row], q: float, nats: float) -> Iterator[tuple[Any, Any]]:
    options = Options(temperature=0.0, doubt=nats, max_tokens=60)
    expert = Wrong(pair.expert_session, q)
    for _, row in rows:
        tokens = pair.prompt_tokens([{"role": "user", "content": row["prompt"]}])
        stream = pair.stream_tokens(tokens, options, (pair.base_session, expert))
        for _ in stream:
            pass
        yield row, stream.answer()


def cost_behind(session: Session, tokens: list[int]) -> float:
    """Return what the likeliest token costs after these, in nats."""
    session.sync(tokens)
    logits = session.logits.astype(np.float64)
    return float(np.log(np.exp(logits - logits.max()).sum()))


def signals(pair: Pair, rows: list[Row]) -> dict[str, float]:
    """Return by model the AUC of that cost, over one of the expert's digits in each answer."""
    draw = random.Random(0)
    digits = [t for t in range(pair.base.n_vocab) if pair.base.piece(t).isdigit()]
    costs: dict[str, list[list[float]]] = {"base": [[], []], "expert": [[], []]}
    for _, row in rows:
        answer = pair.generate(row["prompt"], temperature=0)
        ids = [step.token for step in answer.steps]
        spots = [
            i for i, step in enumerate(answer.steps)
            if step.source == "expert" and step.token in digits
        ]  # fmt: skip
        if not spots:
            continue
        at = draw.choice(spots)
        wrong = draw.choice([digit for digit in digits if digit != ids[at]])
        for name, session in (("base", pair.base_session), ("expert", pair.expert_session)):
            for cost, digit in zip(costs[name], (ids[at], wrong), strict=True):
                cost.append(cost_behind(session, [*answer.prompt_tokens, *ids[:at], digit]))
    found = {}
    for name, (right, wrong_one) in costs.items():
        one, other = np.array(right)[:, None], np.array(wrong_one)[None, :]
        found[name] = float(((other > one) + 0.5 * (other == one)).mean())
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--limit", default=768, show_default=True, help="Questions.")
def main(limit: int) -> None:
    """Compare bounds of doubt for an expert that is wrong at a known rate."""
    rows = list(read_rows(DATA))[:limit]
    numbers = np.array([any(c.isdigit() for c in row["answer"]) for _, row in rows])
    click.echo(f"{len(rows)} questions, {numbers.sum()} with a number for an answer")
    click.echo(
        "| wrong | doubt | exact | of numbers | undone | base tokens | expert tokens | time |"
    )
    click.echo("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with load(n_threads=1) as pair:
        pair.generate("hello", temperature=0)  # loads the expert
        for q in WRONG:
            plain = 0.0
            for nats in BOUNDS:
                begun = perf_counter()
                told = list(answers(pair, rows, q, nats))
                seconds = perf_counter() - begun
                plain = plain or seconds
                right = np.array([METRICS["contains"](a.text, row) for row, a in told])
                sums = [
                    sum(getattr(answer.stats, name) for _, answer in told)
                    for name in ("n_undone", "base_tokens", "expert_tokens")
                ]
                click.echo(
                    f"| {q:.0%} | {nats:g} | {right.mean():.1%} | {right[numbers].mean():.1%} | "
                    + " | ".join(f"{x:,}" for x in sums)
                    + f" | {seconds / plain:.2f} |"
                )
        for name, auc in signals(pair, rows).items():
            click.echo(f"{name}: AUC {auc:.2f}")


if __name__ == "__main__":
    main()
