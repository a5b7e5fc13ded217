"""Measure a pair whose expert is on a server, with the base waiting for it and going on meanwhile.

    colm-edge serve -m base.gguf -me expert.gguf --threshold 0 --port 8099 -np 1 &
    python tools/bench/remote.py -m base.gguf -me http://127.0.0.1:8099 --data prompts.jsonl

The server may run on this machine, which it would share with the base. So its replies are recorded
first, with the time that each took, and played back: a request then sleeps as long, and takes
nothing from the base. --delay adds a network's time to each. Both ways take turns at each prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from colm_edge.pair import Pair, load
from colm_edge.remote.client import RemoteExpert, RemoteSession
from colm_edge.train.documents import read_rows


@contextmanager
def recorded(delay: float) -> Iterator[None]:
    """Ask each thing once inside the `with` block; the next time, sleep as long as that took."""
    ask, known = RemoteExpert.ask, dict[tuple[int, ...], tuple[Any, float]]()

    def again(self: RemoteExpert, tokens: list[int]) -> Any:
        key = tuple(tokens)
        if key in known:
            reply, seconds = known[key]
            sleep(seconds + delay)
            return reply
        begun = perf_counter()
        reply = ask(self, tokens)
        known[key] = reply, perf_counter() - begun
        return reply

    RemoteExpert.ask = again  # type: ignore[method-assign]
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
    tokens, seconds, deferred, same = [0, 0], [0.0, 0.0], [0, 0], 0
    with ExitStack() as opened, recorded(args.delay / 1e3):
        pairs: list[Pair] = [
            opened.enter_context(
                load(
                    args.model, args.model_expert, pair=args.pair, n_ctx=1024,
                    n_threads=args.threads, overlap=overlap, expert_required=True,
                )
            )
            for overlap in (False, True)
        ]  # fmt: skip

        def written(pair: Pair, prompt: str) -> Any:
            assert isinstance(pair.expert, RemoteSession)
            pair.expert.forget()
            pair.base_session.forget()
            return pair.generate(
                prompt, temperature=0.0, max_tokens=args.n, defer_rate=args.defer_rate
            )

        for row in rows:
            for pair in pairs:  # a near-tie may part the two
                written(pair, row["prompt"])
            answers = [written(pair, row["prompt"]) for pair in pairs]
            same += answers[0].text == answers[1].text
            for i, answer in enumerate(answers):
                tokens[i] += answer.stats.n_generated
                deferred[i] += answer.stats.n_deferred
                seconds[i] += answer.stats.total_seconds
    print("| | tokens/s | times | deferred |\n| --- | ---: | ---: | ---: |")
    for name, n, s, d in zip(names, tokens, seconds, deferred, strict=True):
        print(f"| {name} | {n / s:.1f} | {n / s * seconds[0] / tokens[0]:.2f} | {d / n:.1%} |")
    print(f"\n{same} of {len(rows)} texts were the same")


if __name__ == "__main__":
    main()
