"""The tensors of a Hugging Face checkpoint, left in their files: nothing is loaded, no pickle runs.

A `Tensor` is a place in a file. Of a `.safetensors` file only the header is read, and of PyTorch's
zip files (`pytorch_model*.bin`, what torch.save writes) only the pickle that describes the tensors,
as data (`torch_pickle`). Numbers are mapped or streamed when they are needed, so the memory used
does not depend on the file's size. Files come from anywhere: what they say of sizes is compared
with their own length before anything is allocated or looped over.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from colm_edge.arrays import Floats
from colm_edge.errors import ModelError, printable
from lib.json_files import MOST_JSON_BYTES, opened, parse_json, read_json
from lib.torch_pickle import Described, ForbiddenError, read_pickle

# Safetensors' names of types; numpy has no bfloat16, so its bits are read as integers.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "F8_E8M0": "u1", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16", "F64")
# Files come from anywhere, and this is more than any real one has.
MOST_PICKLE_BYTES = 4 << 20  # some 20,000 tensors in a file
MOST_DIMENSIONS = 8
MOST_NUMBERS = 1 << 48  # also of a tensor without any, whose other sizes mean nothing
MOST_SHARES = 16  # how often the same bytes may be named, by tied weights
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

    def floats(self) -> Floats:
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
    with opened(path) as (file, size):
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise ModelError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if start[:4] == b"PK\x03\x04":
        tensors = _read_torch(path, size)
    elif start[:6] == b"\x93NUMPY":
        tensors = {"": _read_npy(path, size)}
    elif path.suffix == ".safetensors":
        tensors = _read_safetensors(path, size)
    elif start[:1] == b"\x80":
        raise ModelError(
            f"{path}: a plain pickle or PyTorch's file format from before version 1.6, expected "
            "its zip format; load the file with PyTorch and save it again with torch.save"
        )
    else:
        raise ModelError(
            f"{path}: neither safetensors, .npy nor a PyTorch file (starts with {start[:4]!r}); "
            "download it again, or save it as one of these"
        )
    if sum(tensor.n_bytes for tensor in tensors.values()) > MOST_SHARES * size:
        raise ModelError(f"{path}: its tensors hold more than the file does; download it again")
    return tensors


def _tensor(
    name: str,
    path: Path,
    dtype: str,
    place: tuple[int, int],
    first: Any,
    shape: Any,
    strides: Any = None,
) -> Tensor:
    """Return a tensor that a file describes, if all of it lies in its place.

    place: the first byte and the length. first: the element that it begins with, counted from
    there. strides: in elements; without, it has no gaps. Raises ModelError.
    """
    what = f"{path}: {printable(name)[:60] or 'the tensor'}"
    if not name.isprintable():
        raise ModelError(f"{what}: a name that cannot be printed; save the tensors under others")
    sizes = _whole_numbers(shape, MOST_DIMENSIONS)
    n = math.prod(size or 1 for size in sizes or ())
    if sizes is None or n > MOST_NUMBERS:
        raise ModelError(f"{what} has an impossible shape; download it again")
    steps = row_major(sizes) if strides is None else _whole_numbers(strides, len(sizes))
    begins = _whole_numbers([first], 1)
    if begins is None or steps is None or len(steps) != len(sizes):
        raise ModelError(f"{what} has impossible strides; download it again")
    if 0 in sizes:
        return Tensor(name, path, place[0], dtype, sizes, row_major(sizes))
    width = np.dtype(DTYPES[dtype]).itemsize
    last = begins[0] + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    # More elements than the place holds means that they lie on each other.
    if max(last + 1, n) * width > place[1]:
        raise ModelError(f"{what} is beyond its storage; download it again")
    offset = place[0] + begins[0] * width
    # Where there is one only, its stride means nothing.
    used = [
        plain if size == 1 else step
        for size, step, plain in zip(sizes, steps, row_major(sizes), strict=True)
    ]
    return Tensor(name, path, offset, dtype, sizes, tuple(used))


def _whole_numbers(found: Any, most: int) -> tuple[int, ...] | None:
    """Return what may be sizes, or None for what may not."""
    if not isinstance(found, list | tuple) or len(found) > most:
        return None
    if not all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in found):
        return None
    return tuple(found)


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    def broken(why: str) -> NoReturn:
        raise ModelError(
            f"{path}: a broken or truncated safetensors file ({why}); download it again"
        )

    with opened(path) as (file, _):
        head = file.read(8)
        n = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < n <= min(MOST_JSON_BYTES, size - 8):
            broken("its header does not fit the file")
        header = parse_json(path, file.read(n))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shown = printable(name)[:60]
        place = _whole_numbers(entry.get("data_offsets"), 2) if isinstance(entry, dict) else None
        if place is None or len(place) != 2 or place[0] > place[1]:
            broken(f"{shown} has no valid data_offsets")
        if 8 + n + place[1] > size:
            broken(f"{shown} is beyond its end")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ModelError(
                f"{path}: {shown} is of an unknown type, expected one of {', '.join(DTYPES)}; save "
                "it as one"
            )
        start, n_bytes = 8 + n + place[0], place[1] - place[0]
        tensor = _tensor(name, path, dtype, (start, n_bytes), 0, entry.get("shape"))
        if tensor.n_bytes != n_bytes:
            broken(f"the shape of {shown} does not fit its data_offsets")
        tensors[name] = tensor
    return tensors


def _read_npy(path: Path, size: int) -> Tensor:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy parses the header as Python, with Python's errors
        raise ModelError(
            f"{path}: a broken or truncated .npy file ({str(e)[:80]}); download it again"
        ) from e
    names = {np.dtype(DTYPES[name]): name for name in ("F64", "F32", "F16")}
    if array.dtype not in names:
        raise ModelError(
            f"{path}: holds {str(array.dtype)[:60]}, expected float32, float16 or float64; save it "
            "as one"
        )
    strides = tuple(s // array.itemsize for s in array.strides)
    place = array.offset, size - array.offset
    return _tensor("", path, names[array.dtype], place, 0, array.shape, strides)


def _read_torch(path: Path, size: int) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            places, pickled = _members(archive, file, size)
        described = read_pickle(pickled)
    except ForbiddenError as e:
        raise ModelError(
            f"{path}: its pickle asks for {str(e)[:60]}, which a checkpoint of plain tensors never "
            "does; nothing was run; save it as safetensors if you trust it"
        ) from e
    except Exception as e:  # the errors of a broken zip file have no common class
        raise ModelError(
            f"{path}: a broken or truncated PyTorch file ({str(e)[:80]}); download it again"
        ) from e
    if not isinstance(described, Described | dict):
        raise ModelError(
            f"{path}: holds an object of type {type(described).__name__}, expected a tensor or a "
            "dict of tensors; save one of these"
        )
    tensors = described if isinstance(described, dict) else {"": described}
    return {
        name: _torch_tensor(name, path, tensor, places)
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, Described)
    }


def _members(
    archive: zipfile.ZipFile, file: BinaryIO, size: int
) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Return where the storages are, by name: their first byte and length; and the pickle.

    Raises ValueError where it is not an archive of torch.save, which compresses nothing.
    """
    stored = {}
    for info in archive.infolist():
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            start = _member_start(file, info)
            if start + info.file_size > size:
                raise ValueError("a member ends beyond the file")
            stored[info.filename] = start, info.file_size
    pickles = [name for name in stored if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip file, but not one of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")

    def content(name: str, most: int) -> bytes:
        start, n_bytes = stored[name]
        if n_bytes > most:
            raise ValueError(f"{name} has {n_bytes:,} bytes, expected at most {most:,}")
        file.seek(start)
        return file.read(n_bytes)

    if f"{prefix}byteorder" in stored and content(f"{prefix}byteorder", 64) != b"little":
        raise ValueError(
            "its numbers are big-endian, expected little-endian: load and save it on such a machine"
        )
    storages = f"{prefix}data/"
    places = {
        name.removeprefix(storages): place
        for name, place in stored.items()
        if name.startswith(storages)
    }
    return places, content(pickles[0], MOST_PICKLE_BYTES)


def _torch_tensor(
    name: str, path: Path, tensor: Described, places: dict[str, tuple[int, int]]
) -> Tensor:
    storage = tensor.storage
    if storage.key not in places:
        raise ModelError(f"{path}: storage {storage.key[:60]!r} is missing; download it again")
    start, size = places[storage.key]
    return _tensor(
        name, path, storage.dtype, (start, size), tensor.first, tensor.shape, tensor.strides
    )


def _member_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
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
        for file in named.values():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+", file):
                raise ModelError(
                    f"{path}: a shard has no name, expected a plain file name; download it again"
                )
        return {name: self.folder / file for name, file in named.items()}

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
        if len(paths) == 1:  # one part needs no index
            name = "model.safetensors"
        total += write_safetensors(folder / name, kept)
        weight_map |= {t.name: name for t in kept}
    if len(paths) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
