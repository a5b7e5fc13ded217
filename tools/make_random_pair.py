"""Write a pair of llama-shaped GGUF files with random weights, for measuring speed.

python tools/make_random_pair.py --base 135M:Q4_K_M --expert 1.1B:Q4_0 --out build/random
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.random_model import MIXES, SHAPES, shape_of, write_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    known = [name for name in SHAPES if name != "tiny"]
    choices = f"PARAMETERS:MIX; parameters as {', '.join(known)} or 30B, mix {', '.join(MIXES)}"
    parser.add_argument("--base", default="135M:Q4_K_M", help=choices)
    parser.add_argument("--expert", default="1.1B:Q4_0", help=choices)
    parser.add_argument("--out", type=Path, default=Path("build/random"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for role, choice, seed in (
        ("base", args.base, args.seed),
        ("expert", args.expert, args.seed + 1),
    ):
        name, _, mix = choice.partition(":")
        try:
            shape = shape_of(name)
        except (ValueError, KeyError):
            parser.error(f"--{role} {choice}: expected {choices}")
        if mix not in MIXES:
            parser.error(f"--{role} {choice}: expected {choices}")
        path = args.out / f"{role}.gguf"
        write_model(path, shape, mix, seed)
        size = path.stat().st_size / 1e6
        print(f"{path}: {shape.n_params / 1e6:,.0f}M parameters, {mix}, {size:,.0f} MB")


if __name__ == "__main__":
    main()
