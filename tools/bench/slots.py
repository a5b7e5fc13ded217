"""Measure how many tokens per second several answers write together, against one alone.

    python tools/make_random_pair.py --out build/random
    python tools/bench/slots.py -m build/random/base.gguf -me build/random/expert.gguf

Every answer replays a drawn trace of its own, as in `colm-edge bench`, on one of a server's slots.
"""

from __future__ import annotations

import argparse
import statistics
import threading
from time import perf_counter

from colm_edge.bench.methods import measured_on
from colm_edge.bench.replay import Process, Trace, replay
from colm_edge.llama.costs import CostTable, seconds_per_token
from colm_edge.pair import Pair, load
from colm_edge.slots import Slots


def together(pair: Pair, slots: Slots, traces: list[Trace]) -> float:
    """Return the seconds that it takes to write all traces, each on a slot of its own."""
    begin = threading.Barrier(len(traces) + 1)

    def write(trace: Trace) -> None:
        read = pair.switch.reader(pair.base, pair.n_shared)
        with slots.take(trace.prompt) as timelines:
            base, expert = timelines or (pair.base_session, pair.expert)
            decoder = replay(base, expert, read, trace, 0.5, pair.n_shared)
            begin.wait()
            for _ in decoder:
                pass

    threads = [threading.Thread(target=write, args=(trace,)) for trace in traces]
    for thread in threads:
        thread.start()
    begin.wait()
    begun = perf_counter()
    for thread in threads:
        thread.join()
    return perf_counter() - begun


def limit(base: CostTable, expert: CostTable, rate: float, n: int) -> float:
    """Return how many times as fast as one alone n answers can be, by what decodes cost.

    Either model evaluates every token once: the base n at a time, each with its state, and the
    expert, at best, in batches that all n answers wait for.
    """
    if n == 1:
        return 1.0
    tokens = max(n, round(n / rate))
    outputs = expert.outputs(n)
    together = base.all_states(n) / n + (expert.best(tokens) + outputs) / tokens
    return seconds_per_token(base, [expert], rate) / together


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--replay", default="f=0.2", type=Process.parse, metavar="f=RATE")
    parser.add_argument("-n", type=int, default=96, help="tokens per answer")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--slots", default="1,2,4,8")
    args = parser.parse_args()
    counts = [int(count) for count in args.slots.split(",")]
    with load(args.model, args.model_expert, n_ctx=192, n_threads=args.threads) as pair:
        tables = pair.cost_tables()
        slots = Slots(pair, max(counts))
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for i in range(args.rounds + 1):
            for count in counts:
                traces = [
                    args.replay.draw(args.n, pair.n_shared, seed=1000 * i + 10 * count + j)
                    for j in range(count)
                ]
                took = together(pair, slots, traces)
                if i:  # the first round warms up
                    seconds[count].append(took)
        machine = measured_on(pair)
        slots.close()
    one = statistics.median(seconds[counts[0]])
    print("| answers at once | tokens/s together | times one | at most |")
    print("| ---: | ---: | ---: | ---: |")
    for count in counts:
        rates = sorted(count * args.n / s for s in seconds[count])
        median = statistics.median(rates)
        times = median * one / (counts[0] * args.n)
        most = limit(*tables, args.replay.rate, count)
        spread = f"{median:,.1f} ({rates[0]:,.0f}–{rates[-1]:,.0f})"
        print(f"| {count} | {spread} | {times:.2f} | {most:.2f} |")
    print("\n" + machine)


if __name__ == "__main__":
    main()
