"""Print where the time of an answer goes: inside llama.cpp for each model, and outside.

    python tools/bench_loop.py                              # the pair that ships
    python tools/make_random_pair.py --out build/random
    python tools/bench_loop.py -m build/random/base.gguf -me build/random/expert.gguf --rate 0.2

The greedy sequential loop runs -n tokens, end tokens ignored, so that every round does the same
work. With --rate the switch's decisions are drawn from a seeded process at that defer rate, for
models of random weights, whose own p_defer means nothing; the switch is still read at each step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
from pathlib import Path

from colm_edge import readout
from colm_edge.decode import Decoder
from colm_edge.pair import load


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def drawn(read, rate: float, seed: int):
    """Wrap a switch: read it as always, then draw the decision."""
    draw = random.Random(seed)

    def decide(logits, hidden):
        _, choice, logsumexp = read(logits, hidden)
        return float(draw.random() < rate), choice, logsumexp

    return decide


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("-sw", "--switch")
    parser.add_argument("-p", "--prompt", default="When did the last Caspian tiger die?")
    parser.add_argument("-n", type=int, default=128)
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, help="draw deferrals at this rate")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()

    with load(args.model, args.model_expert, args.switch, n_threads=args.threads) as pair:
        prompt = pair.prompt_tokens([{"role": "user", "content": args.prompt}])
        read = pair.switch.reader(pair.base, pair.n_shared)
        rounds = []
        for i in range(args.rounds + 1):
            decoder = Decoder(
                pair.base_session,
                pair.expert_session,
                read if args.rate is None else drawn(read, args.rate, 1),
                prompt,
                threshold=pair.switch.threshold,
                n_choose=pair.n_shared,
                end_tokens=frozenset(),
                max_tokens=args.n,
            )
            steps = list(decoder)
            if i:  # the first round loads and warms up
                rounds.append(decoder.stats)
        deferred = sum(s.source == "expert" for s in steps)
    rows = {
        "total, ms per token": [s.total_seconds / args.n * 1e3 for s in rounds],
        "base in llama.cpp, ms per token": [s.base_seconds / args.n * 1e3 for s in rounds],
        "expert in llama.cpp, ms per token": [s.expert_seconds / args.n * 1e3 for s in rounds],
        "outside llama.cpp, µs per token": [
            (s.total_seconds - s.base_seconds - s.expert_seconds) / args.n * 1e6 for s in rounds
        ],
        "outside llama.cpp, % of total": [
            100 * (1 - (s.base_seconds + s.expert_seconds) / s.total_seconds) for s in rounds
        ],
        "tokens per second": [args.n / s.total_seconds for s in rounds],
    }
    facts = {
        "measured on": f"{cpu_name()}, {datetime.date.today()}",
        "models": f"{args.model or 'the shipped base'}, {args.model_expert or 'expert'}",
        "switch": f"{Path(pair.switch.name).name}, read by {readout.implementation}",
        "tokens": args.n,
        "deferred": deferred,
        "rounds": args.rounds,
        "threads": args.threads or "all",
    }
    if args.output == "json":
        print(json.dumps({"facts": facts, "rows": rows}))
        return
    print("; ".join(f"{key}: {value}" for key, value in facts.items()) + "\n")
    print("| figure | median | min | max |\n| --- | --- | --- | --- |")
    for name, values in rows.items():
        print(
            f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |"
        )


if __name__ == "__main__":
    main()
