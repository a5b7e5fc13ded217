"""Write a pair of llama-shaped GGUF files with random weights, for measuring speed.

python tools/make_random_pair.py --base 135M:Q4_K_M --expert 1.1B:Q4_0 --out build/random
"""

from __future__ import annotations

from pathlib import Path

import click
from lib.llama_gguf import Shape
from lib.random_model import MIXES, SHAPES, shape_of, write_model

from colm_edge.cli import OneLineErrors
from colm_edge.errors import ColmError

KNOWN = ", ".join(name for name in SHAPES if name != "tiny")
CHOICES = f"PARAMETERS:MIX; parameters as {KNOWN} or 30B, from 17M on, mix {', '.join(MIXES)}"


def read_choice(role: str, choice: str) -> tuple[Shape, str]:
    """Return the shape and the mix of types that --base or --expert names."""
    name, _, mix = choice.partition(":")
    try:
        shape = shape_of(name)
    except (ValueError, KeyError) as e:
        raise ColmError(f"--{role} {choice}: expected {CHOICES}") from e
    if mix not in MIXES:
        raise ColmError(f"--{role} {choice}: expected {CHOICES}")
    return shape, mix


@click.command(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--base", metavar="SHAPE", default="135M:Q4_K_M", show_default=True, help=CHOICES)
@click.option(
    "--expert", metavar="SHAPE", default="1.1B:Q4_0", show_default=True, help="As --base."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="build/random",
    show_default=True,
    help="A folder for base.gguf and expert.gguf.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(base: str, expert: str, out: Path, seed: int) -> None:
    """Write a pair of llama-shaped GGUF files with random weights, for measuring speed."""
    wanted = [(out / "base.gguf", *read_choice("base", base), seed)]
    wanted += [(out / "expert.gguf", *read_choice("expert", expert), seed + 1)]
    out.mkdir(parents=True, exist_ok=True)
    for path, *_ in wanted:
        if path.exists():
            raise ColmError(f"{path}: exists already; give another --out, or remove it")
    for path, shape, mix, drawn in wanted:
        write_model(path, shape, mix, drawn)
        size = path.stat().st_size / 1e6
        click.echo(f"{path}: {shape.n_params / 1e6:,.0f}M parameters, {mix}, {size:,.0f} MB")


if __name__ == "__main__":
    main()
