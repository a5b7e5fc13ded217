"""What guesses from the text save on answers to real prompts, and the most that any guesses could.

    python tools/studies/price_guesses.py -m base.gguf -me expert.gguf --data prompts.jsonl \\
        --out answers.json
    python tools/studies/price_guesses.py --out answers.json

The expert answers the prompts alone and greedily; the file keeps that. Then each answer is priced
three times by the tables of this machine's costs: token by token, with the guesses of
`colm_edge/decode/guess.py`, and with an oracle's, which looks in the same place of the text and
knows how many of its tokens will be repeated. No clock, so the result is exact.
"""

from __future__ import annotations

import argparse
import json
from array import array
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from colm_edge.decode.guess import MOST, Lookup
from colm_edge.files import replacing
from colm_edge.llama.costs import CostTable
from colm_edge.pair import load
from colm_edge.train.documents import read_rows

# Given the text so far and what follows it, returns the tokens that are guessed.
Policy = Callable[[Lookup, "array[int]", "array[int]"], "array[int]"]


def record(args: argparse.Namespace) -> dict[str, Any]:
    """Let the expert answer the prompts; return its answers, as token ids, and the costs."""
    with load(args.model, args.model_expert, n_ctx=args.ctx_size) as pair:
        tables = pair.cost_tables()
        answers = []
        for _, row in read_rows(args.data):
            answer = pair.generate(
                row["prompt"], temperature=0.0, threshold=0.0, max_tokens=args.n,
                schedule="sequential",
            )  # fmt: skip
            answers.append([answer.prompt_tokens, [step.token for step in answer.steps]])
    costs = [[table.sizes, table.seconds, table.more] for table in tables]
    return {"answers": answers, "costs": costs}


def seconds_of(prompt: list[int], answer: list[int], table: CostTable, policy: Policy) -> float:
    """Return what it costs to write an answer after a prompt whose last state is known."""
    text, at, total = array("i", prompt + answer), len(prompt) + 1, 0.0
    lookup = Lookup()
    while at < len(text):
        lookup.follow(text[:at])
        guess = policy(lookup, text[:at], text[at:])
        total += table.all_states(1 + len(guess))
        at += 1 + hits_of(guess, text[at:])
    return total


def hits_of(guess: array[int], rest: array[int]) -> int:
    """Return how many guessed tokens are right, up to the first that is not."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(guess, rest, strict=False))
    )


def priced(answers: list[tuple[list[int], list[int]]], table: CostTable) -> list[float]:
    """Return the seconds of all answers without guesses, with ours, and with an oracle's."""

    def none(lookup: Lookup, so_far: array[int], rest: array[int]) -> array[int]:
        return array("i")

    def ours(lookup: Lookup, so_far: array[int], rest: array[int]) -> array[int]:
        return lookup.guess(len(rest), table.all_states)

    def best(lookup: Lookup, so_far: array[int], rest: array[int]) -> array[int]:
        source = len(so_far) if lookup.source is None else lookup.source
        hits = hits_of(so_far[source : source + MOST], rest)
        return rest[: max(range(hits + 1), key=lambda n: (1 + n) / table.all_states(1 + n))]

    return [
        sum(seconds_of(prompt, answer, table, policy) for prompt, answer in answers)
        for policy in (none, ours, best)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--data", type=Path, help="prompts, a JSON object a line")
    parser.add_argument("-n", type=int, default=80, help="tokens per answer")
    parser.add_argument("-c", "--ctx-size", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True, help="where the answers are kept")
    args = parser.parse_args()
    if args.data is not None:
        found = record(args)
        with replacing(args.out) as temporary:
            temporary.write_text(json.dumps(found))
    found = json.loads(args.out.read_text())
    print("| model | token by token | with guesses | times | an oracle's | times |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (sizes, seconds, more) in zip(("base", "expert"), found["costs"], strict=True):
        table = CostTable(tuple(sizes), tuple(seconds), tuple(more))
        plain, ours, best = priced(found["answers"], table)
        print(
            f"| {name} | {plain:.1f} s | {ours:.1f} s | {plain / ours:.3f} | {best:.1f} s "
            f"| {plain / best:.3f} |"
        )


if __name__ == "__main__":
    main()
