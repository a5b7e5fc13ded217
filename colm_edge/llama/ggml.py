"""Call functions of ggml that llama-cpp-python does not wrap, and load ggml's backends."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from llama_cpp import _ggml, llama_cpp

_POINTER, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "backend_dev_count": (_SIZE, []),
    "backend_dev_get": (_POINTER, [_SIZE]),
    "backend_dev_name": (_TEXT, [_POINTER]),
    "backend_dev_description": (_TEXT, [_POINTER]),
    "backend_load_all_from_path": (None, [_TEXT]),
    "backend_reg_by_name": (_POINTER, [_TEXT]),
    "backend_reg_count": (_SIZE, []),
    "backend_reg_dev_count": (_SIZE, [_POINTER]),
    "backend_reg_dev_get": (_POINTER, [_POINTER, _SIZE]),
    "backend_reg_get_proc_address": (_POINTER, [_POINTER, _TEXT]),
    "backend_rpc_add_server": (_POINTER, [_TEXT]),
}


@cache
def function(name: str) -> Any:
    """Return `ggml_<name>`."""
    result, arguments = _SIGNATURES[name]
    if name == "backend_rpc_add_server":  # in a separate library, found through the registry
        registry = function("backend_reg_by_name")(b"RPC")
        address = function("backend_reg_get_proc_address")(registry, f"ggml_{name}".encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address)
    try:
        # Through llama.cpp's own library: a wheel may contain several copies of ggml, and the one
        # that llama-cpp-python opens may be another copy with another registry.
        found = getattr(llama_cpp._lib, f"ggml_{name}")
    except AttributeError:  # Windows does not search the libraries that a library depends on
        found = getattr(_ggml.libggml, f"ggml_{name}")
    found.restype, found.argtypes = result, arguments
    return found


def cpu_libraries() -> Iterator[Path]:
    """Yield the libraries with llama.cpp's CPU code: one, or one for each kind of CPU."""
    package = Path(llama_cpp.__file__).parent
    # A build of all variants installs them next to the package.
    for folder in (package / "lib", package.parent / "bin"):
        yield from sorted(folder.glob("*ggml-cpu*"))


def load_backends() -> None:
    """Load the best variant for this CPU, if llama.cpp was built with all variants.

    llama-cpp-python does not do this (its issue 2069).
    """
    if function("backend_reg_count")():
        return
    for folder in {library.parent for library in cpu_libraries()}:
        function("backend_load_all_from_path")(str(folder).encode())
