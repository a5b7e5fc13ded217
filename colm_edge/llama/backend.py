"""Start llama.cpp as a library: its log, its devices, and a workaround for its AMX code."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from functools import cache
from typing import Any

import llama_cpp as llama

from colm_edge.llama import ggml
from colm_edge.options import INT_MAX, check_whole

log = logging.getLogger("colm_edge.llama")
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
last_errors: list[str] = []  # llama.cpp's latest error messages, the newest last


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: Any) -> None:
    message = text.decode("utf-8", "replace").rstrip()
    if level == 4:
        last_errors.append(message)
        del last_errors[:-4]
    # Errors reach the user as exceptions, so nothing is logged above INFO.
    log.log(min(_LEVELS.get(level, logging.DEBUG), logging.INFO), message)


def _start_backend() -> None:
    llama.llama_log_set(_on_log, ctypes.c_void_p(0))
    ggml.load_backends()
    llama.llama_backend_init()


_start_backend()


def model_params() -> Any:
    """Return llama.cpp's default model parameters, changed where this machine would crash."""
    params = llama.llama_model_default_params()
    if amx_is_broken() or ("torch" in sys.modules and amx_is_shared()):
        params.use_extra_bufts = False
    return params


def build_info() -> str:
    """Return what this llama.cpp was built for."""
    return " ".join(llama.llama_print_system_info().decode().replace("|", "").split())


def devices() -> list[str]:
    """Return the devices that this llama.cpp can put layers on, each as "name: description"."""
    get, name, description = (
        ggml.function(f"backend_dev_{what}") for what in ("get", "name", "description")
    )
    found = [get(i) for i in range(ggml.function("backend_dev_count")())]
    return [f"{name(d).decode()}: {description(d).decode()}" for d in found]


def supports_gpu() -> bool:
    """Return whether this llama.cpp can put layers on another device than the CPU."""
    return bool(llama.llama_supports_gpu_offload())


def gpu_layers(n_gpu_layers: int) -> int:
    """Return this number of layers; where there is no GPU for them, log that once.

    Raises ColmError for what is no number of layers; -1 stands for all.
    """
    check_whole("n_gpu_layers", n_gpu_layers, -1, INT_MAX)
    if n_gpu_layers and not supports_gpu():
        _warn_of_no_gpu()
    return n_gpu_layers


@cache
def _warn_of_no_gpu() -> None:
    log.warning(
        "llama.cpp finds no GPU here, so all layers stay on the CPU; `colm-edge --version` shows "
        "how it was built and its devices"
    )


@cache
def amx_is_broken() -> bool:
    """Return whether llama.cpp would crash in AMX instructions; if so, log the cure.

    Before GCC 12.4, 13.3 and 14, _tile_loadconfig tells the optimiser that it reads 8 bytes of a
    64-byte structure (PR target/114098). llama.cpp built by such a GCC loads garbage (llama.cpp
    issue 20824). llama.cpp uses AMX only for repacked weights, so turning those off avoids it.
    """
    if not _has_amx():
        return False
    broken = any(_gcc_breaks_amx(library.read_bytes()) for library in ggml.cpu_libraries())
    if broken:
        log.warning(
            "llama.cpp was built with a GCC whose AMX code crashes, so it runs without AMX and "
            "repacked weights; to make it faster, build it with CC=clang CXX=clang++ or a newer GCC"
        )
    return broken


@cache
def amx_is_shared() -> bool:
    """Return whether llama.cpp could use AMX next to PyTorch in this process; if so, log it.

    llama.cpp configures AMX's tiles once per thread. PyTorch releases them after a product of
    bfloat16 matrices, and llama.cpp's next product then crashes the process (docs/speed.md).
    """
    if _has_amx():
        log.warning("PyTorch is in this process, so llama.cpp runs without AMX, which is slower")
    return _has_amx()


def _has_amx() -> bool:
    return b"AMX_INT8 = 1" in llama.llama_print_system_info()


def _gcc_breaks_amx(library: bytes) -> bool:
    """Return whether the compiler's note in a shared library names a GCC with the AMX bug.

    A library that clang built names GCC as well, for its start files.
    """
    versions = re.findall(rb"GCC: \([^)]*\) (\d+)\.(\d+)", library)
    if b"clang version" in library or not versions:
        return False
    major, minor = max((int(a), int(b)) for a, b in versions)
    return major < 12 or (major, minor) < (12, 4) or (13, 0) <= (major, minor) < (13, 3)
