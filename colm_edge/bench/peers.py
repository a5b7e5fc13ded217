"""Run other programs for comparison: llama-cpp-python's `Llama` and llama.cpp's own programs."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from colm_edge.bench.rounds import Sample, clocked
from colm_edge.errors import ColmError
from colm_edge.llama import environment

if TYPE_CHECKING:
    from colm_edge.llama.session import Session
    from colm_edge.pair import Pair

# 0.02.033.145 I encoded   18 tokens in    0.427 seconds, speed:   65.639 t/s
FIGURES = re.compile(r"^.*(encoded|decoded) +(\d+) tokens in .*speed: +(\S+) t/s", re.MULTILINE)


class Output(NamedTuple):
    """What a program wrote."""

    stdout: str
    stderr: str


class HighLevel:
    """The expert through llama-cpp-python's own `Llama`, which a user would choose."""

    def __init__(self, session: Session) -> None:
        from llama_cpp import Llama, llama_cpp

        from colm_edge.llama.backend import model_params
        from colm_edge.llama.context import CACHE_TYPES

        self._model = session.model  # for the texts of tokens
        made = llama_cpp.llama_model_default_params
        # So that it also runs where llama.cpp's AMX code crashes.
        llama_cpp.llama_model_default_params = model_params
        try:
            self._llama = Llama(
                str(session.model.path),
                n_ctx=session.n_ctx,
                n_batch=session.n_batch,
                n_threads=session.n_threads,
                n_threads_batch=session.n_threads,
                n_gpu_layers=session.model.n_gpu_layers,
                n_ubatch=session.n_ubatch,
                flash_attn=session.flash_attn != "off",  # it has no "auto"
                type_k=CACHE_TYPES[session.options.cache_type_k],
                type_v=CACHE_TYPES[session.options.cache_type_v],
                verbose=False,
            )
        finally:
            llama_cpp.llama_model_default_params = made

    def run(self, prompt: list[int], n: int, end_tokens: frozenset[int] = frozenset()) -> Sample:
        """Write up to n tokens, greedily, or to an end token."""
        self._llama.reset()  # otherwise it would reuse the prompt
        generated = self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        try:
            tokens, seconds, first = clocked(_until(end_tokens, islice(generated, n)))
        finally:
            generated.close()
        # At an end token the model has been asked once more, about one more token.
        written = [token for token in tokens if token not in end_tokens]
        pieces = [self._model.piece(token) for token in written]
        return Sample(
            len(written),
            seconds,
            first,
            expert_calls=len(tokens),
            expert_tokens=len(prompt) + len(tokens) - 1,
            deferred=len(written),
            text=b"".join(pieces).decode("utf-8", "replace"),
        )

    def close(self) -> None:
        self._llama.close()


def _until(ends: Collection[int], tokens: Iterable[int]) -> Iterator[int]:
    """Yield tokens to the first of `ends`, that one included."""
    for token in tokens:
        yield token
        if token in ends:
            return


class Tools:
    """llama.cpp's own programs, a process for each run. Their seconds do not include loading.
    Raises ColmError when a program is missing or fails."""

    def __init__(self, folder: Path, pair: Pair) -> None:
        self._folder, self._base = folder, pair.base
        self._ends = [pair.base.text([token]) for token in pair.base.end_tokens]
        expert, base = pair.expert_session, pair.base_session
        # Each model has its own number of GPU layers; on a CPU they have no effect.
        self._expert = ["-m", str(expert.model.path), "-t", str(expert.n_threads)]
        self._expert += ["-ngl", str(expert.model.n_gpu_layers)]
        self._draft = ["-md", str(base.model.path), "-td", str(base.n_threads)]
        self._draft += ["-ngld", str(base.model.n_gpu_layers), "--spec-type", "draft-simple"]
        self._writing = ["-c", str(pair.n_ctx), "--temp", "0", "--no-escape"]

    def has(self, name: str) -> bool:
        """Return whether a program is there."""
        return (self._folder / name).exists()

    def prompt_of(self, tokens: list[int]) -> str:
        """Return the text that a program reads as these tokens; it puts a begin token first where
        the vocabulary asks for one."""
        text = self._base.text(tokens)
        return text.removeprefix(self._base.bos_text) if self._base.tokenize("") else text

    def bench(self, n: int) -> Sample:
        """Decode n tokens, which are not a text."""
        command = ["llama-bench", *self._expert, "-p", "0", "-n", str(n), "-r", "1", "-o", "json"]
        out = self._run(command).stdout
        return Sample(n, n / float(json.loads(out[out.index("[") :])[0]["avg_ts"]))

    def speculative(self, prompt: str, n: int) -> Sample:
        """Let the expert answer, greedily and with about n tokens at most; the base drafts."""
        return self._answer(["llama-speculative-simple", *self._expert, *self._draft], prompt, n)

    def lookup(self, prompt: str, n: int) -> Sample:
        """Let the expert answer, as above; drafts are copied from the text so far."""
        return self._answer(["llama-lookup", *self._expert], prompt, n)

    def _answer(self, command: list[str], prompt: str, n: int) -> Sample:
        done = self._run([*command, *self._writing, "-n", str(n), "-p", prompt])
        # Versions differ in which of the two they print the figures to.
        figures = dict[str, tuple[int, float]]()
        for what, tokens, speed in FIGURES.findall(done.stdout + done.stderr):
            figures[what] = int(tokens), int(tokens) / float(speed)
        if "decoded" not in figures:
            raise ColmError(f"{command[0]} printed no speed; use a llama.cpp of about this version")
        text = FIGURES.split(done.stdout.partition(prompt)[2])[0].rstrip()
        for end in self._ends:
            text = text.removesuffix(end)
        return Sample(figures["decoded"][0], sum(s for _, s in figures.values()), text=text)

    def _run(self, command: list[str]) -> Output:
        program = self._folder / command[0]
        try:
            done = subprocess.run(
                [program, *command[1:]], capture_output=True, check=False, env=environment()
            )
        except FileNotFoundError as e:
            raise ColmError(f"{program}: {e.strerror}; build llama.cpp's programs") from e
        except (OSError, ValueError) as e:  # a prompt that is too long, or holds a NUL
            why = getattr(e, "strerror", None) or e
            raise ColmError(f"{program}: cannot be run so: {why}") from e
        # As they are: a translated end of line would not be the prompt's.
        stdout, stderr = (out.decode("utf-8", "replace") for out in (done.stdout, done.stderr))
        if done.returncode != 0:
            last = (stderr.strip().splitlines() or ["no message"])[-1]
            raise ColmError(f"{program} failed: {last}")
        return Output(stdout, stderr)
