"""What a base would save whose head knows the first N tokens of the vocabulary alone, and what it
could not write.

    python tools/studies/smaller_head.py base.gguf --texts answers.txt docs/*.md

FR-Spec (arXiv 2502.14856) drafts with a head reduced to the tokens that occur often. A vocabulary
of byte pairs is in the order of their frequency, so here the first N rows are kept, of embeddings
and head alike, which is enough to time decodes. The files are made in a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import gguf
import numpy as np

from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session

N_PAST, N_TOKENS = 200, 6


def cut(source: Path, target: Path, n: int) -> None:
    """Write a copy of a model with the first n tokens of its vocabulary."""
    reader = gguf.GGUFReader(source)
    kept = {field.name: field for field in reader.fields.values()}
    writer = gguf.GGUFWriter(target, kept.pop("general.architecture").contents())
    for name, field in kept.items():
        value, kind = field.contents(), field.types[0]
        if name.startswith("GGUF."):
            continue
        if kind == gguf.GGUFValueType.ARRAY:
            per_token = name.startswith("tokenizer.ggml.") and len(value) > n
            writer.add_array(name, value[:n] if per_token else value)
        else:
            writer.add_key_value(
                name, min(value, n - 1) if name.endswith("_token_id") else value, kind
            )
    for tensor in reader.tensors:
        rows = (
            tensor.data[:n]
            if tensor.name in ("token_embd.weight", "output.weight")
            else tensor.data
        )
        writer.add_tensor(tensor.name, np.ascontiguousarray(rows), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def milliseconds(sessions: list[Session], rounds: int) -> list[float]:
    """Return what a decode of one token takes each session: medians, taken in turns."""
    prefix = list(range(1000, 1000 + N_PAST))
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, taken in zip(sessions, times, strict=True):
            session.sync(prefix)
            session.sync([*prefix, 500])
            for i in range(N_TOKENS):
                begun = perf_counter()
                session.sync([*prefix, *range(500, 502 + i)])
                taken.append(1e3 * (perf_counter() - begun))
    return [statistics.median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sizes", default="100000,65536,32768,16384")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("-r", "--rounds", type=int, default=15)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    whole = Model(args.model)
    n_vocab = whole.n_vocab
    occur: Counter[int] = Counter()
    for path in args.texts:
        occur.update(whole.tokenize(path.read_text(), special=False, bos=False))
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{n}.gguf" for n in sizes]
        for n, path in zip(sizes, paths, strict=True):
            cut(args.model, path, n)
        options = ContextOptions(n_ctx=2 * N_PAST)
        sessions = [Session(model, options, hidden=True) for model in (whole, *map(Model, paths))]
        taken = milliseconds(sessions, args.rounds)
        for session in sessions:
            session.close()
            session.model.close()
    print("| tokens in the head | ms per token | of the texts' tokens it lacks |")
    print("| ---: | ---: | ---: |")
    for n, ms in zip([n_vocab, *sizes], taken, strict=True):
        lacks = sum(count for token, count in occur.items() if token >= n)
        print(f"| {n:,} | {ms:.2f} | {lacks / max(1, occur.total()):.2%} |")


if __name__ == "__main__":
    main()
