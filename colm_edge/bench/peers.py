"""Run other programs for comparison: llama-cpp-python's `Llama` and llama.cpp's own programs."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from colm_edge.bench.replay import Trace
from colm_edge.decode.loop import Decoder
from colm_edge.errors import ColmError

if TYPE_CHECKING:
    from colm_edge.llama.session import Session
    from colm_edge.pair import Pair


@dataclass(frozen=True)
class Sample:
    """One run of one method; None where another program does not report a figure."""

    seconds: float
    first_token_seconds: float | None = None
    outside_seconds: float | None = None  # of seconds, spent outside llama.cpp
    expert_calls: int | None = None
    expert_tokens: int | None = None


def timed(decoder: Decoder) -> Sample:
    begun = perf_counter()
    next(decoder)
    first = perf_counter() - begun
    for _ in decoder:
        pass
    seconds, stats = perf_counter() - begun, decoder.stats
    # With the expert in the background, the two overlap.
    outside = max(0.0, seconds - stats.base_seconds - stats.expert_seconds)
    return Sample(seconds, first, outside, stats.expert_calls, stats.expert_tokens)


class HighLevel:
    """The expert through llama-cpp-python's own `Llama`, which a user would choose."""

    def __init__(self, session: Session) -> None:
        from llama_cpp import Llama, llama_cpp

        from colm_edge.llama.backend import model_params
        from colm_edge.llama.context import CACHE_TYPES

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
                flash_attn=session.flash_attn == "on",
                type_k=CACHE_TYPES[session.options.cache_type_k],
                type_v=CACHE_TYPES[session.options.cache_type_v],
                verbose=False,
            )
        finally:
            llama_cpp.llama_model_default_params = made

    def run(self, trace: Trace) -> Sample:
        self._llama.reset()  # otherwise it would reuse the prompt
        begun, n = perf_counter(), len(trace.tokens)
        generated = self._llama.generate(trace.prompt, temp=0.0, repeat_penalty=1.0)
        next(generated)
        first = perf_counter() - begun
        for _ in islice(generated, n - 1):
            pass
        seconds = perf_counter() - begun
        generated.close()
        return Sample(seconds, first, None, n, len(trace.prompt) + n - 1)

    def close(self) -> None:
        self._llama.close()


class Tools:
    """llama.cpp's own programs, a process for each run. Their figures do not include loading; they
    write texts of their own, to the trace's prompt if that is a text. Raises ColmError when a
    program is missing or fails."""

    def __init__(self, folder: Path, pair: Pair, trace: Trace) -> None:
        n = len(trace.tokens)
        self._folder = folder
        expert, base = pair.expert_session, pair.base_session
        # Each model has its own number of GPU layers; on a CPU they have no effect.
        layers = ["-ngl", str(expert.model.n_gpu_layers)]
        threads = ["-t", str(expert.n_threads)]
        model = ["-m", str(expert.model.path), *threads, *layers]
        self._n = n
        self._bench = ["llama-bench", *model, "-p", "0", "-n", str(n), "-r", "1", "-o", "json"]
        self._speculative = [
            "llama-speculative-simple",
            *model,
            "-c",
            str(pair.n_ctx),
            "--temp",
            "0",
            "-md",
            str(pair.base.path),
            "-td",
            str(base.n_threads),
            "--spec-type",
            "draft-simple",
            "-ngld",
            str(pair.base.n_gpu_layers),
            "-n",
            str(n),
            "-p",
            pair.base.text(trace.prompt) if trace.is_text else "Once upon a time",
            "--no-escape",
        ]
        self.names = {"llama-bench": self._run_bench, "llama-speculative-simple": self._run_draft}

    def _run_bench(self) -> Sample:
        out = self._run(self._bench)
        return Sample(self._n / float(json.loads(out[out.index("[") :])[0]["avg_ts"]))

    def _run_draft(self) -> Sample:
        # decoded   16 tokens in    0.016 seconds, speed:  991.326 t/s
        line = next(x for x in self._run(self._speculative).splitlines() if "decoded" in x)
        return Sample(self._n / float(line.split("speed:")[1].split()[0]))

    def _run(self, command: list[str]) -> str:
        program = self._folder / command[0]
        try:
            done = subprocess.run(
                [program, *command[1:]],
                capture_output=True,
                text=True,
                errors="replace",
                check=True,
            )
        except OSError as e:
            raise ColmError(f"{program}: {e.strerror or e}; build llama.cpp's programs") from e
        except subprocess.CalledProcessError as e:
            last = (e.stderr.strip().splitlines() or ["no message"])[-1]
            raise ColmError(f"{program} failed: {last}") from e
        # Versions differ in which of the two they print the figures to.
        return done.stdout + done.stderr
