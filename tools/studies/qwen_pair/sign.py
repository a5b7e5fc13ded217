"""Write into a switch which files it is for: one pair of models in several quantisations.

    python tools/studies/qwen_pair/sign.py SWITCH.gguf --base Q4_0.gguf --base Q4_K_M.gguf \\
        --expert Q4_0.gguf --expert Q4_K_M.gguf

`colm-edge train` names the two files that it was given. Beside any other file, loading the switch
warns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from colm_edge.files import fingerprint, sha256_of
from colm_edge.switch.file import Switch

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("switch", type=FILE)
@click.option("--base", "bases", type=FILE, multiple=True, required=True)
@click.option("--expert", "experts", type=FILE, multiple=True, required=True)
def main(switch: Path, bases: tuple[Path, ...], experts: tuple[Path, ...]) -> None:
    """Write into a switch which files it is for."""
    found = Switch.load(switch)
    info = dict(found.info)
    for role, files in (("base", bases), ("expert", experts)):
        info[role] = " ".join(file.name for file in files)
        info[f"{role}_fingerprint"] = " ".join(map(fingerprint, files))
        info[f"{role}_sha256"] = " ".join(map(sha256_of, files))
    replace(found, info=info).save(switch)


if __name__ == "__main__":
    main()
