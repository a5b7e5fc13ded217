"""Measure a pair whose expert is on a server, with the base waiting for it and going on meanwhile.

    colm-edge serve -m base.gguf -me expert.gguf --threshold 0 --port 8099 -t 1 &
    python tools/bench/remote.py -m base.gguf -me http://127.0.0.1:8099 --data prompts.jsonl -t 1

Both ways take turns at each prompt. --delay adds a network's to each request.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from time import sleep
from typing import Any

from colm_edge.pair import Pair, load
from colm_edge.remote.client import RemoteExpert
from colm_edge.train.documents import read_rows


@contextmanager
def delayed(seconds: float) -> Iterator[None]:
    """Let every request of an expert take longer inside the `with` block."""
    ask = RemoteExpert.ask

    def later(self: RemoteExpert, tokens: list[int]) -> Any:
        sleep(seconds)
        return ask(self, tokens)

    RemoteExpert.ask = later  # type: ignore[method-assign]
    try:
        yield
    finally:
        RemoteExpert.ask = ask  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-me", "--model-expert", required=True, metavar="URL")
    parser.add_argument("--pair", help="a pair whose switch to use")
    parser.add_argument("--defer-rate", type=float, default=0.1)
    parser.add_argument("--data", type=Path, required=True, help="prompts, a JSON object a line")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS")
    parser.add_argument("-n", type=int, default=80, help="tokens per answer")
    parser.add_argument("-t", "--threads", type=int, default=0)
    args = parser.parse_args()
    rows = [row for _, row in islice(read_rows(args.data), args.limit)]
    names = "the base waits", "the base goes on"
    tokens, seconds, deferred = [0, 0], [0.0, 0.0], [0, 0]
    texts: tuple[list[str], list[str]] = ([], [])
    with ExitStack() as opened, delayed(args.delay / 1e3):
        pairs: list[Pair] = [
            opened.enter_context(
                load(
                    args.model, args.model_expert, pair=args.pair, n_ctx=1024,
                    n_threads=args.threads, overlap=overlap, expert_required=True,
                )
            )
            for overlap in (False, True)
        ]  # fmt: skip
        for row in rows:
            for i, pair in enumerate(pairs):
                answer = pair.generate(
                    row["prompt"], temperature=0.0, max_tokens=args.n, defer_rate=args.defer_rate
                )
                tokens[i] += answer.stats.n_generated
                deferred[i] += answer.stats.n_deferred
                seconds[i] += answer.stats.total_seconds
                texts[i].append(answer.text)
    same = sum(one == other for one, other in zip(*texts, strict=True))
    print("| | tokens/s | times | deferred |\n| --- | ---: | ---: | ---: |")
    for name, n, s, d in zip(names, tokens, seconds, deferred, strict=True):
        times = n / s * seconds[0] / tokens[0]
        print(f"| {name} | {n / s:.1f} | {times:.2f} | {d / n:.1%} |")
    print(f"\n{same} of {len(rows)} texts were the same")


if __name__ == "__main__":
    main()
