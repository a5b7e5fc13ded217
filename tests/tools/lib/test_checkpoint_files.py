"""What a checkpoint's file may be: read where it lies, or refused and never run."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import N_EMBD, convert, write_safetensors
from lib import checkpoint_files

from colm_edge.errors import ModelError


def test_broken_files_are_refused(tmp_path):
    row = np.zeros((1, N_EMBD), np.float32)
    write_safetensors(tmp_path / "good.safetensors", {"w": row})
    good = (tmp_path / "good.safetensors").read_bytes()
    cases = {
        "half.safetensors": (good[:-4], "is beyond its end"),
        "head.safetensors": (good[:20], "header does not fit"),
        "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "old.bin": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before version 1.6"),
        "cut.bin": (b"PK\x03\x04" + bytes(60), "broken or truncated PyTorch"),
        "text.bin": (b"weights", "neither safetensors"),
        "three.npy": (b"", "neither safetensors"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=words) as caught:
            checkpoint_files.read_file(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ModelError, match="No such file"):
        checkpoint_files.read_file(tmp_path / "absent")


class Run:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def write_torch_zip(path: Path, pickled: bytes, *, byteorder: bytes = b"little") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", byteorder)
        archive.writestr("a/data/0", bytes(4 * N_EMBD))


def rebuild(key: bytes = b"0", size: int = N_EMBD, kind: bytes = b"FloatStorage") -> bytes:
    """Return the pickle of one float tensor (1, size), as torch.save writes it."""
    text = b"X" + struct.pack("<I", len(key)) + key
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + kind
        + b"\n" + text + b"X\x03\x00\x00\x00cpuK\x06tQK\x00K\x01" + bytes([ord("K"), size])
        + b"\x86" + bytes([ord("K"), size]) + b"K\x01\x86\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


def test_a_pickle_that_asks_for_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    evil = [
        pickle.dumps(Run(f"touch {mark}"), protocol=2),
        pickle.dumps({"lm_head.weight": Run(f"touch {mark}")}),
        b"cbuiltins\nexec\n(S'open(%r, \"w\")'\ntR." % str(mark).encode(),
        b"\x80\x04\x8c\x08builtins\x8c\x0cgetattr.call\x93.",
    ]
    for i, pickled in enumerate(evil):
        path = tmp_path / f"{i}.bin"
        write_torch_zip(path, pickled)
        result = convert(path, "--outfile", tmp_path / "s.gguf")
        assert result.exit_code == 1
        assert "nothing was run" in result.stderr
    assert not mark.exists()


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (rebuild(key=b"1"), "storage '1' is missing"),
        (rebuild(size=7), "is beyond its storage"),
        (rebuild(kind=b"QInt8Storage"), "asks for torch.QInt8Storage"),
        (b"\x80\x02K\x01.", "holds an object of type int"),
        (b"\x80\x02", "describes no tensors"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "describes no tensors"),
    ],
)
def test_a_pickle_of_broken_tensors_is_refused(tmp_path, pickled, words):
    write_torch_zip(tmp_path / "good.bin", rebuild())
    assert checkpoint_files.read_file(tmp_path / "good.bin")[""].shape == (1, N_EMBD)
    write_torch_zip(tmp_path / "bad.bin", pickled)
    with pytest.raises(ModelError, match=words):
        checkpoint_files.read_file(tmp_path / "bad.bin")


def test_a_big_endian_file_is_refused(tmp_path):
    write_torch_zip(tmp_path / "big.bin", rebuild(), byteorder=b"big")
    with pytest.raises(ModelError, match="big-endian"):
        checkpoint_files.read_file(tmp_path / "big.bin")
