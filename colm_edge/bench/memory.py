"""Measure the peak memory of a method, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from colm_edge.bench.replay import Trace

if TYPE_CHECKING:
    from colm_edge.pair import Pair

Note = Callable[[str], None]
CONTEXT = ("n_ctx", "n_threads", "n_ubatch", "flash_attn", "cache_type_k", "cache_type_v")


def memory_of(pair: Pair, trace: Trace, name: str, note: Note) -> float | None:
    """Return the peak memory, in MB, of a process that only runs a method once, or None where the
    system does not report it."""
    note(f"memory: {name} …")
    base, expert = pair.base, pair.expert_session.model
    if name in ("expert", "expert-llama-cpp-python"):  # the base must not be loaded
        base = expert
    options = pair.base_session.options
    arguments = {
        "model": str(base.path),
        "expert": str(expert.path),
        "switch": pair.switch.name,
        "lora": None if base.lora is None else str(base.lora),
        "n_gpu_layers": base.n_gpu_layers,
        "n_gpu_layers_expert": expert.n_gpu_layers,
        **{name: getattr(options, name) for name in CONTEXT},
    }
    if base is expert:
        arguments["switch"] = "margin"
    task = {"arguments": arguments, "trace": trace.__dict__, "name": name}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "colm_edge.bench.child"],
        input=json.dumps(task),
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        note(f"the memory of {name} could not be measured: {last}")
        return None
    peak: float | None = json.loads(done.stdout)
    return peak


def peak_memory() -> float | None:
    """Return this process's peak memory in MB, or None where the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage includes the parent's memory
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
