"""Quantise a model, as llama.cpp's own llama-quantize does."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as llama

from colm_edge.errors import ModelError, WriteError
from colm_edge.files import cache_folder, check_writable, fingerprint, parts_of, replacing
from colm_edge.llama.backend import last_errors
from colm_edge.llama.model import WAIT, Model
from colm_edge.llama.threads import n_cores

HEAD_BYTES = 1 << 25  # of a file, in which its metadata stand
_PREFIXES = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
# llama.cpp's mixes by the names that people write: Q4_0, Q4_K_M, F16 …
TYPES: dict[str, int] = {
    name.removeprefix(prefix): getattr(llama, name)
    for prefix in _PREFIXES
    for name in dir(llama)
    if name.startswith(prefix)
}
# Those that are not quantised.
FLOATS = ("F32", "F16", "BF16")
# The types of a single tensor.
TENSOR_TYPES: dict[str, int] = {
    name.removeprefix("GGML_TYPE_"): getattr(llama, name)
    for name in dir(llama)
    if name.startswith(("GGML_TYPE_F16", "GGML_TYPE_F32", "GGML_TYPE_Q", "GGML_TYPE_IQ"))
    and name not in ("GGML_TYPE_Q8_1", "GGML_TYPE_Q8_K")  # of products, not of weights
}


def file_type(model: Model) -> str:
    """Return the type that a model's file says it has, "" if it does not say."""
    number = model.metadata("general.file_type")
    return next((name for name, value in TYPES.items() if str(value) == number), "")


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type_name: str,
    *,
    output_type: str | None = None,
    allow_requantize: bool = False,
    n_threads: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Write a model's weights in another type; nothing is left behind where that fails.

    type_name: one of TYPES, in either case. output_type: one of TENSOR_TYPES, for the output
    matrix, which llama.cpp would keep in a larger type than the rest. allow_requantize: also from a
    file that is quantised already, which loses more than quantising the original would. note: told
    where it is.

    Raises ModelError for an unknown type, a file that is not a model, and one that is quantised
    already, WriteError when the result cannot be written.
    """
    number = _number(type_name, TYPES)
    output = None if output_type is None else _number(output_type, TENSOR_TYPES)
    model = Model(source)
    try:
        known = file_type(model)
    finally:
        model.close()
    again = known not in ("", *FLOATS)
    if again and not allow_requantize:
        raise ModelError(
            f"{source}: is quantised already ({known}); quantise the {' or '.join(FLOATS)} file, "
            "or accept the loss (--allow-requantize)"
        )
    check_writable(target, *model.files)
    if again:
        note("Quantising a second time loses quality; start from F16 or BF16 where you can.")
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, n_threads or n_cores()
    params.allow_requantize = allow_requantize
    if output is not None:
        params.output_tensor_type = output
    last_errors.clear()
    with replacing(target) as temporary:
        paths = (os.fsencode(Path(source)), os.fsencode(temporary))
        if _without_signals(llama.llama_model_quantize, *paths, ctypes.byref(params)) != 0:
            reason = last_errors[-1] if last_errors else "llama.cpp gave no reason"
            if "iostream" in reason:  # which says no more
                raise WriteError(f"{target}: cannot be written to its end; make room on the disk")
            raise ModelError(f"{source}: cannot be quantised to {type_name.upper()}: {reason}")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised before it is used. The types are those of `quantize`.

    Raises ModelError for an unknown type.
    """

    type_name: str
    output_type: str | None = None

    def __post_init__(self) -> None:
        _number(self.type_name, TYPES)
        if self.output_type is not None:
            _number(self.output_type, TENSOR_TYPES)

    def made_from(self, source: str, note: Callable[[str], None]) -> str:
        """Return the path of a model that is made so, from the cache, or written there now.

        Raises ModelError where there is no such model, WriteError where it cannot be written.
        """
        parts = [Path(source).with_name(name) for name in parts_of(Path(source).name)]
        try:
            content = _content_of(parts)
        except OSError as e:
            raise ModelError(f"{source}: cannot be read ({e.strerror or e})") from e
        types = "+".join(filter(None, (self.type_name, self.output_type))).upper()
        name = f"{Path(source).stem}@{types}.gguf"
        target = cache_folder() / "quantized" / content[:16] / name
        if not target.exists():
            note(f"quantising {Path(source).name} to {types}, once …")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise WriteError(f"{target.parent}: cannot be made ({e.strerror or e})") from e
            quantize(
                source, target, self.type_name,
                output_type=self.output_type, allow_requantize=True,
            )  # fmt: skip
        return str(target)


def _content_of(parts: list[Path]) -> str:
    """Return a hash of a model's files: of samples, and of their heads whole, where the metadata
    stand that people change in place."""
    digest = hashlib.sha256(fingerprint(*parts).encode())
    for part in parts:
        with part.open("rb") as file:
            digest.update(file.read(HEAD_BYTES))
    return digest.hexdigest()


def _without_signals(call: Callable[..., int], *args: Any) -> int:
    """Return what a call returns, made on a thread of its own: Ctrl-C, which Python would lose
    where llama.cpp calls back to log, ends the wait for it. The thread ends with the process."""
    returned: list[int] = []
    thread = threading.Thread(target=lambda: returned.append(call(*args)), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(WAIT)
    return returned[0]


def _number(name: str, types: Mapping[str, int]) -> int:
    if name.upper() not in types:
        raise ModelError(f"{name!r} is not a type; expected one of {', '.join(types)}")
    return types[name.upper()]
