"""The tensors of a Hugging Face checkpoint, left in their files: nothing is loaded, no pickle runs.

A `Tensor` is a place in a file. Of a `.safetensors` file only the header is read, and of PyTorch's
zip files (`pytorch_model*.bin`, what torch.save writes) only the pickle that describes the tensors,
by an unpickler that knows no functions except those that rebuild tensors. Numbers are mapped or
streamed when they are needed, so the memory used does not depend on the file's size.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from colm_edge.errors import ModelError

# Safetensors' names of types; numpy has no bfloat16, so its bits are read as integers.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "F8_E8M0": "u1", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16", "F64")
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
MAX_HEADER_BYTES = 100 << 20  # of a safetensors header (the format's own limit) or a pickle
COPY_BYTES = 16 << 20
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Tensor:
    """A tensor's place: the byte where element 0 begins, and its strides in elements."""

    name: str
    path: Path
    offset: int
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        return self.strides == row_major(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows as a tensor of their own."""
        offset = self.offset + start * self.strides[0] * self.itemsize
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def stored(self) -> npt.NDArray[Any]:
        """Return the elements as stored, mapped from the file."""
        if 0 in self.shape:
            return np.empty(self.shape, DTYPES[self.dtype])
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        try:
            flat = np.memmap(
                self.path, DTYPES[self.dtype], mode="r", offset=self.offset, shape=(last + 1,)
            )
        except (OSError, ValueError) as e:
            raise ModelError(f"{self.path}: cannot read {self.name or 'the tensor'}: {e}") from e
        steps = [s * self.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)

    def floats(self) -> npt.NDArray[np.float32]:
        """Return a float32 copy. Raises ModelError for integers and 8-bit floats."""
        if self.dtype not in FLOATS:
            raise ModelError(
                f"{self.path}: {self.name or 'the tensor'} is {self.dtype}; expected one of "
                f"{', '.join(FLOATS)}; a quantised checkpoint cannot be converted, use its original"
            )
        stored = np.array(self.stored())
        if self.dtype == "BF16":  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)

    def chunks(self) -> Iterator[bytes]:
        """Yield the elements in row-major order, a bounded number of bytes at a time."""
        if self.is_contiguous:
            left = self.n_bytes
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while left:
                    chunk = file.read(min(COPY_BYTES, left))
                    if not chunk:
                        raise ModelError(f"{self.path}: ends inside {self.name}; download it again")
                    left -= len(chunk)
                    yield chunk
            return
        step = max(1, COPY_BYTES * self.shape[0] // max(1, self.n_bytes))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0])).stored().tobytes()


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of an array without gaps."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by name; a bare one has the name "".

    Reads .safetensors, .npy and PyTorch's zip files. Raises ModelError for anything else, and for
    a file that is truncated or would run code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            size = file.seek(0, io.SEEK_END)
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror or e}") from e
    if start == LFS_POINTER:
        raise ModelError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if start[:4] == b"PK\x03\x04":
        return _read_torch(path)
    if start[:6] == b"\x93NUMPY":
        return {"": _read_npy(path)}
    if path.suffix == ".safetensors":
        return _read_safetensors(path, size)
    if start[:1] == b"\x80":
        raise ModelError(
            f"{path}: a plain pickle or PyTorch's file format from before version 1.6, expected "
            "its zip format; load the file with PyTorch and save it again with torch.save"
        )
    raise ModelError(
        f"{path}: neither safetensors, .npy nor a PyTorch file (starts with {start[:4]!r}); "
        "download it again, or save it as one of these"
    )


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    def broken(why: str) -> NoReturn:
        raise ModelError(
            f"{path}: a broken or truncated safetensors file ({why}); download it again"
        )

    with path.open("rb") as file:
        head = file.read(8)
        n = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < n <= min(MAX_HEADER_BYTES, size - 8):
            broken("its header does not fit the file")
        try:
            header = json.loads(file.read(n))
        except ValueError as e:
            broken(f"its header is not valid JSON: {e}")
    if not isinstance(header, dict):
        broken("its header is not an object")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, (start, stop) = entry["dtype"], map(int, entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
        except (KeyError, TypeError, ValueError):
            broken(f"{name} has no valid dtype, shape or data_offsets")
        if dtype not in DTYPES:
            raise ModelError(
                f"{path}: {name} is {dtype!r}, expected one of {', '.join(DTYPES)}; save it as one"
            )
        tensor = Tensor(name, path, 8 + n + start, dtype, shape, row_major(shape))
        if min(shape, default=0) < 0 or start < 0 or tensor.n_bytes != stop - start:
            broken(f"the shape of {name} does not fit its data_offsets")
        if 8 + n + stop > size:
            broken(f"{name} is beyond its end")
        tensors[name] = tensor
    return tensors


def _read_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy parses the header as Python, with Python's errors
        raise ModelError(f"{path}: a broken or truncated .npy file ({e}); download it again") from e
    names = {np.dtype(DTYPES[name]): name for name in ("F64", "F32", "F16")}
    if array.dtype not in names:
        raise ModelError(
            f"{path}: holds {array.dtype}, expected float32, float16 or float64; save it as one"
        )
    strides = tuple(s // array.itemsize for s in array.strides)
    return Tensor("", path, array.offset, names[array.dtype], array.shape, strides)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


class _Describe(pickle.Unpickler):
    """Read what torch.save pickled as `Tensor`s; refuse anything but tensors and dicts."""

    def __init__(self, file: io.BytesIO, path: Path, places: dict[str, tuple[int, int]]) -> None:
        super().__init__(file)
        self._path, self._places = path, places
        self._allowed: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        }
        self._allowed |= {f"torch.{name}": dtype for name, dtype in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        found = self._allowed.get(f"{module}.{name}")
        if found is None:
            raise ModelError(
                f"{self._path}: its pickle asks for {module}.{name}, which a checkpoint of plain "
                "tensors never does; nothing was run; save it as safetensors if you trust it"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in DTYPES or key not in self._places:
            raise ModelError(f"{self._path}: storage {key!r} is missing; download it again")
        return _Storage(dtype, key)

    def _tensor(
        self,
        storage: _Storage,
        first: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: Any,
    ) -> Tensor:
        start, size = self._places[storage.key]
        numbers = (first, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ModelError(
                f"{self._path}: a tensor has the impossible shape {shape} and strides {strides}; "
                "download it again"
            )
        width = np.dtype(DTYPES[storage.dtype]).itemsize
        last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * width > size:
            raise ModelError(f"{self._path}: a tensor is beyond its storage; download it again")
        offset = start + first * width
        return Tensor("", self._path, offset, storage.dtype, tuple(shape), tuple(strides))


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            pickles = [i for i in archive.infolist() if i.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path}: a zip file, but not one of torch.save; save the tensors again with it"
                )
            prefix = pickles[0].filename.removesuffix("data.pkl")
            if f"{prefix}byteorder" in archive.namelist():
                order = archive.read(f"{prefix}byteorder")
                if order != b"little":
                    raise ModelError(
                        f"{path}: its numbers are big-endian, expected little-endian; load and "
                        "save it on a little-endian machine"
                    )
            places = {}
            for info in archive.infolist():
                if info.filename.startswith(f"{prefix}data/") and not info.compress_type:
                    key = info.filename.removeprefix(f"{prefix}data/")
                    places[key] = (_member_start(file, info), info.file_size)
            described = _Describe(io.BytesIO(archive.read(pickles[0])), path, places).load()
    except ModelError:
        raise
    except (OSError, zipfile.BadZipFile) as e:
        raise ModelError(
            f"{path}: a broken or truncated PyTorch file ({e}); download it again"
        ) from e
    except Exception as e:  # a pickle can go wrong in as many ways as it has opcodes
        raise ModelError(f"{path}: its pickle describes no tensors ({e}); download it again") from e
    if isinstance(described, Tensor):
        return {"": described}
    if not isinstance(described, dict):
        raise ModelError(
            f"{path}: holds an object of type {type(described).__name__}, expected a tensor or a "
            "dict of tensors; save one of these"
        )
    return {
        name: replace(tensor, name=name)
        for name, tensor in described.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _member_start(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of an uncompressed member begin; its local header may be padded."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename}")
    n_name, n_extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + int(n_name) + int(n_extra)


class Weights:
    """All tensors of a checkpoint folder, one file or several with an index.

    Safetensors are preferred to .bin, as in transformers. Raises ModelError when there are none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, dict[str, Tensor]] = {}
        for stem in ("model.safetensors", "pytorch_model.bin"):
            if (folder / stem).exists():
                self.layout = stem
                self.files = dict.fromkeys(self._tensors(folder / stem), folder / stem)
                return
            if (folder / f"{stem}.index.json").exists():
                self.files = self._index(folder / f"{stem}.index.json")
                self.layout = f"{stem}.index.json, {len(set(self.files.values()))} shards"
                return
        self._refuse()

    def _refuse(self) -> NoReturn:
        for name, what in (
            ("adapter_config.json", "holds a LoRA adapter; merge it into its base model first"),
            (
                "gperp_init.bin",
                "holds no weights, only gperp_init.bin, the row that the training "
                "began with; give that file to convert it",
            ),
        ):
            if (self.folder / name).exists():
                raise ModelError(f"{self.folder}: {what}")
        raise ModelError(
            f"{self.folder}: expected model.safetensors or pytorch_model.bin, or an index of their "
            "shards (*.index.json); found none; give the folder that the training wrote"
        )

    def _index(self, path: Path) -> dict[str, Path]:
        named = read_json(path).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ModelError(f"{path}: has no weight_map; download it again")
        for file in set(map(str, named.values())):
            if not re.fullmatch(r"[\w.-]+", file):
                raise ModelError(
                    f"{path}: names the shard {file!r}, expected a plain file name; download the "
                    "index again"
                )
        return {name: self.folder / str(file) for name, file in named.items()}

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        if path not in self._read:
            self._read[path] = read_file(path)
        return self._read[path]

    def find(self, *names: str) -> Tensor | None:
        """Return the first of these tensors that exists, or None."""
        for name in names:
            if name in self.files:
                tensor = self._tensors(self.files[name]).get(name)
                if tensor is None:
                    raise ModelError(
                        f"{self.files[name]}: the index says it holds {name}, but it does not; "
                        "download both again"
                    )
                return tensor
        return None

    def shards(self) -> Iterator[tuple[Path, list[Tensor]]]:
        """Yield every file with its tensors."""
        for path in sorted(set(self.files.values())):
            found = [self.find(name) for name, file in self.files.items() if file == path]
            yield path, [tensor for tensor in found if tensor is not None]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror or e}") from e
    except ValueError as e:
        raise ModelError(f"{path}: not valid JSON ({e}); download it again") from e
    if not isinstance(value, dict):
        raise ModelError(
            f"{path}: expected a JSON object, found a {type(value).__name__}; download it again"
        )
    return value


def write_safetensors(path: Path, tensors: list[Tensor]) -> int:
    """Write tensors to a new file, chunk by chunk; return how many bytes of numbers it holds."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        place = [at, at + t.n_bytes]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": place}
        at += t.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            for chunk in t.chunks():
                file.write(chunk)
    return at


Change = Callable[[Tensor], Tensor | None]


def copy_weights(weights: Weights, folder: Path, change: Change) -> None:
    """Write every shard as safetensors into a folder, each tensor as `change` returns it."""
    weight_map: dict[str, str] = {}
    total = 0
    paths = list(weights.shards())
    for path, tensors in paths:
        kept = [new for t in tensors if (new := change(t)) is not None]
        name = path.name.replace("pytorch_model", "model").removesuffix(".bin")
        name = name.removesuffix(".safetensors") + ".safetensors"
        total += write_safetensors(folder / name, kept)
        weight_map |= {t.name: name for t in kept}
    if len(paths) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
