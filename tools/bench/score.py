"""Compare a scoring pass with a bare llama.cpp loop over the same tokens, base and expert.

    python tools/bench/score.py -t 1                        # the pair that ships
    python tools/make_random_pair.py --out build/random
    python tools/bench/score.py -m build/random/base.gguf -me build/random/expert.gguf -t 2 -n 24

The bare loop decodes the tokens in full batches, each from an empty cache, with the scored
positions as outputs, and reads nothing. The pass evaluates each document by itself, asks the base
for its hidden states, and computes and keeps every figure. Rounds are interleaved; the ratio is
bare seconds / pass seconds, median of rounds. The ratio of CPU seconds means little with several
threads, which wait busily; with one thread it is the ratio that other programs do not disturb.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any, Literal

import llama_cpp as llama
import numpy as np

from colm_edge import readout
from colm_edge.bench.methods import cpu_name
from colm_edge.llama.model import Model
from colm_edge.llama.scorer import SCORE_BATCH
from colm_edge.llama.session import Session
from colm_edge.pair import Pair, load
from colm_edge.train import scoring
from colm_edge.train.documents import Documents, read_rows, tokenized

Side = Literal["base", "expert"]
SIDES: tuple[Side, ...] = ("base", "expert")
DATA = Path(__file__).parents[2] / "tests" / "data" / "demo_heldout.jsonl"


def random_documents(n: int, n_vocab: int, rng: np.random.Generator) -> Documents:
    """Return n documents of 50 to 300 tokens, the first quarter of each a prompt."""
    lengths = rng.integers(50, 301, n)
    tokens = rng.integers(1, n_vocab, lengths.sum()).astype(np.int32)
    return Documents(tokens, lengths, lengths // 4, np.arange(n))


def bare_loop(session: Session, documents: Documents) -> tuple[float, float]:
    """Return the seconds, by the clock and of the CPU, that llama.cpp takes for a pass's tokens."""
    made = session.new_context(SCORE_BATCH, SCORE_BATCH)
    made.open()
    context = made.handle
    memory = llama.llama_get_memory(context)
    tokens = [t for d in documents for t in d.tokens[:-1]]
    outputs = [i >= d.start - 1 for d in documents for i in range(len(d.tokens) - 1)]
    batch = llama.llama_batch_init(SCORE_BATCH, 0, 1)
    seconds = cpu = 0.0
    for at in range(0, len(tokens), SCORE_BATCH):
        n = batch.n_tokens = min(SCORE_BATCH, len(tokens) - at)
        for i in range(n):
            batch.token[i], batch.pos[i] = tokens[at + i], i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = outputs[at + i]
        begun, cpu_begun = perf_counter(), process_time()
        llama.llama_memory_clear(memory, False)
        assert llama.llama_decode(context, batch) == 0
        llama.llama_synchronize(context)
        seconds += perf_counter() - begun
        cpu += process_time() - cpu_begun
    llama.llama_batch_free(batch)
    made.close()
    return seconds, cpu


def scoring_pass(
    pair: Pair, name: Side, documents: Documents, work: bool
) -> tuple[float, float, float]:
    """Return the seconds of a whole pass, by the clock and of the CPU, and those in llama.cpp."""
    session = session_of(pair, name)
    with tempfile.TemporaryDirectory() if work else nullcontext() as folder:
        place = Path(folder) if folder else None
        inside = session.account.seconds
        begun, cpu_begun = perf_counter(), process_time()
        # What an expert is asked about its base's choices costs the same, whatever they are.
        choices = documents.scored(0, len(documents)) if name == "expert" else None
        scoring.score_model(pair, name, documents, no_bar, work=place, choices=choices)
        cpu = process_time() - cpu_begun
        return perf_counter() - begun, cpu, session.account.seconds - inside


def session_of(pair: Pair, name: Side) -> Session:
    return pair.base_session if name == "base" else pair.expert_session


def no_bar(name: str, total: int) -> Any:
    return nullcontext(SimpleNamespace(update=lambda n: None))


def measure(
    pair: Pair, name: Side, documents: Documents, n_rounds: int, work: bool
) -> dict[str, Any]:
    """Return one model's row: medians over the rounds, and the range of the ratio."""
    session = session_of(pair, name)
    session.open()
    rounds = []
    for _ in range(n_rounds + 1):
        bare_seconds = bare_loop(session, documents)
        rounds.append((*bare_seconds, *scoring_pass(pair, name, documents, work)))
    # The first round warms up.
    bare, bare_cpu, whole, whole_cpu, inside = zip(*rounds[1:], strict=True)
    ratios = [b / w for b, w in zip(bare, whole, strict=True)]
    cpu_ratios = [b / w for b, w in zip(bare_cpu, whole_cpu, strict=True)]
    outside = [1 - i / w for i, w in zip(inside, whole, strict=True)]
    n_tokens = n_evaluated(documents)
    return {
        "model": name,
        "description": session.model.metadata("general.name") or "",
        "megabytes": round(session.model.path.stat().st_size / 1e6),
        "bare_tokens_per_second": n_tokens / statistics.median(bare),
        "pass_tokens_per_second": n_tokens / statistics.median(whole),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_cpu": statistics.median(cpu_ratios),
        "outside_llama_cpp": statistics.median(outside),
    }


def n_evaluated(documents: Documents) -> int:
    """Return how many tokens are evaluated: all but the last of each document."""
    return documents.n_tokens - len(documents)


def quantisation(model: Model) -> str:
    size = llama.llama_model_size(model.load())
    return f"{8 * size / llama.llama_model_n_params(model.load()):.1f} bits a weight"


def render(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the facts in one line and a Markdown table."""
    lines = [
        "; ".join(f"{key}: {value}" for key, value in facts.items()),
        "",
        "| model | bare tok/s | pass tok/s | ratio | min | max | of CPU time | outside llama.cpp |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        ratios = [f"{r[key]:.2f}" for key in ("ratio", "ratio_min", "ratio_max", "ratio_cpu")]
        speeds = [f"{r[f'{kind}_tokens_per_second']:,.0f}" for kind in ("bare", "pass")]
        cells = [r["model"], *speeds, *ratios, f"{100 * r['outside_llama_cpp']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--data", type=Path, help="JSONL; default: a test's, or random documents")
    parser.add_argument("-n", type=int, default=100, help="documents at most")
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--work", action="store_true", help="with a work folder, on /tmp")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()

    data = args.data or (None if args.model else DATA)
    switch = "margin" if args.model else None
    with load(args.model, args.model_expert, switch, n_threads=args.threads) as pair:
        if data is None:
            documents = random_documents(args.n, pair.n_shared, np.random.default_rng(0))
        else:
            documents = tokenized(read_rows(data), pair)[: args.n]
        rows = [measure(pair, name, documents, args.rounds, args.work) for name in SIDES]
        models = pair.base, pair.expert_session.model
        facts = {
            "measured on": f"{cpu_name()}, {datetime.date.today()}",
            "models": ", ".join(str(model.path) for model in models),
            "quantisation": ", ".join(quantisation(m) for m in models),
            "documents": f"{len(documents)} of {data.name if data else 'random tokens'}",
            "tokens": f"{n_evaluated(documents)} evaluated, {documents.n_scored} scored",
            "rows read by": readout.implementation,
            "rounds": args.rounds,
            "threads": args.threads or "as colm-edge chooses",
            "work folder": args.work,
        }
    if args.output == "json":
        print(json.dumps({"facts": facts, "rows": rows}))
    else:
        print(render(facts, rows))


if __name__ == "__main__":
    main()
