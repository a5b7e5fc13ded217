"""What a checkpoint's file may be: read where it lies, or refused and never run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import N_EMBD, convert, make_checkpoint, write_safetensors
from lib import checkpoint_files, co_llm

from colm_edge.errors import LONGEST, ModelError
from colm_edge.switch.file import Switch


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
        (b"\x80\x02", "broken or truncated PyTorch"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "called with something else"),
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


# Files that were made to harm. Each is small, and so must be what it takes to refuse it.


@contextmanager
def refused(words: str, most_bytes: int = 4 << 20) -> Iterator[None]:
    """One line that can be printed, and no more memory than this."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=words) as caught:
            yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= LONGEST


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tensor(shape: list[int], strides: list[int], first: int = 0) -> bytes:
    """Return the steps that put down a tensor of floats."""

    def numbers(values: list[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + text("0") + text("cpu") + b"K\x06tQ" + number(first) + numbers(shape)
        + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


ROW = tensor([1, N_EMBD], [N_EMBD, 1])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (tensor([1, 2_000_000_000], [0, 0]), "beyond its storage"),
        (tensor([1 << 40], [1]), "beyond its storage"),
        (tensor([2, 2], [1 << 47, 1]), "beyond its storage"),
        (tensor([2], [1 << 90]), "impossible strides"),
        (tensor([1 << 90], [1]), "impossible shape"),
        (tensor([0, 1 << 47, 1 << 47], [1, 1, 1]), "impossible shape"),
        (tensor([-1], [1]), "impossible shape"),
        (tensor([1], [1], first=-1), "impossible strides"),
        (tensor([1], [1], first=N_EMBD), "beyond its storage"),
        (tensor([1] * 9, [1] * 9), "impossible shape"),
        (b"}" + text("a\x1b[31m") + ROW + b"s", "cannot be printed"),
        (b"}" + text("\ud800") + ROW + b"s", "cannot be printed"),
        (b"}" + b"r\xff\xff\xff\x7f" + text("w") + b"r\xfe\xff\xff\xff" + tensor([7], [1])
         + b"s", "w is beyond its storage"),  # places in the memo, up to 2^32
        (b"}q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
         + b"h\x00h\x3cK\x01s",
         "neither text nor a number"),  # a name that takes 2^60 steps to hash
        (b"}(" + b"".join(text(str(i)) + b"h\x00" for i in range(20)) + b"u", "what it did not"),
        (b"ctorch\n" + b"x" * 100_000 + b"\n", "asks for torch.x"),
        (b"\x8e" + struct.pack("<Q", 1 << 40), "broken or truncated"),
        (b"\x81", "asks for the step NEWOBJ"),
        (b"0" * 10, "asks for the step POP"),
    ],
)  # fmt: skip
def test_a_small_pickle_takes_little(tmp_path, steps, words):
    write_torch_zip(tmp_path / "bad.bin", b"\x80\x02" + steps + b".")
    with refused(words):
        co_llm.read_bare(tmp_path / "bad.bin")


def test_the_same_bytes_are_not_written_many_times(tmp_path):
    """Two names of one tensor are tied weights; a hundred would fill a disk from a small file."""
    entry = {"dtype": "F32", "shape": [1 << 14], "data_offsets": [0, 1 << 16]}
    for n, path in ((2, tmp_path / "tied.safetensors"), (100, tmp_path / "bad.safetensors")):
        raw = json.dumps({str(i): entry for i in range(n)}).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(1 << 16))
    assert len(checkpoint_files.read_file(tmp_path / "tied.safetensors")) == 2
    with refused("more than the file does"):
        checkpoint_files.read_file(tmp_path / "bad.safetensors")


def test_a_pickle_sets_nothing_on_a_tensor(tmp_path):
    """The step BUILD once gave a tensor another file's path, and its bytes went into the switch."""
    (tmp_path / "secret").write_bytes(b"a secret of somebody else's"[:24])
    state = b"}" + text("path") + text(str(tmp_path / "secret")) + b"s"
    write_torch_zip(tmp_path / "row.bin", b"\x80\x02" + ROW + state + b"b.")
    assert convert(tmp_path / "row.bin", "--outfile", tmp_path / "s.gguf").exit_code == 0
    assert Switch.load(tmp_path / "s.gguf").weight.tolist() == [[0] * N_EMBD]


def test_members_that_are_packed_or_lie_outside_are_not_read(tmp_path):
    path = tmp_path / "bad.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/data.pkl", bytes(50 << 20))
    with refused("not one of torch.save"):
        checkpoint_files.read_file(path)
    write_torch_zip(path, b"\x80\x02" + ROW + b".")
    whole = path.read_bytes()
    directory = whole.rindex(b"PK\x01\x02")  # of the last member, the storage
    long = struct.pack("<II", 1 << 31, 1 << 31)
    path.write_bytes(whole[: directory + 20] + long + whole[directory + 28 :])
    with refused("ends beyond the file"):
        checkpoint_files.read_file(path)
    write_torch_zip(path, b"\x80\x02" + ROW + b".", byteorder=b"b" * 1000)
    with refused("expected at most 64"):
        checkpoint_files.read_file(path)


GOOD = {"dtype": "F32", "shape": [1, 6], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"a": 1}', "no valid data_offsets"),
        ('{"a": []}', "no valid data_offsets"),
        (json.dumps({"a": GOOD | {"dtype": []}}), "unknown type"),
        (json.dumps({"a": GOOD | {"dtype": {}}}), "unknown type"),
        (json.dumps({"a": GOOD | {"shape": None}}), "impossible shape"),
        (json.dumps({"a": GOOD | {"shape": [1e999, 6]}}), "impossible shape"),
        (json.dumps({"a": GOOD | {"shape": [float("nan")]}}), "impossible shape"),
        (json.dumps({"a": GOOD | {"shape": ["1", 6]}}), "impossible shape"),
        (json.dumps({"a": GOOD | {"shape": [True, 6]}}), "impossible shape"),
        (json.dumps({"a": GOOD | {"shape": [10**4000] * 200}}), "impossible shape"),
        (json.dumps({"a": GOOD | {"shape": [1 << 40, 6]}}), "beyond its storage"),
        (json.dumps({"a": GOOD | {"shape": [1, 5]}}), "does not fit"),
        (json.dumps({"a": GOOD | {"data_offsets": [0, 1 << 60]}}), "no valid data_offsets"),
        (json.dumps({"a": GOOD | {"data_offsets": [0, 1 << 40]}}), "beyond its end"),
        (json.dumps({"a": GOOD | {"data_offsets": [24, 0]}}), "no valid data_offsets"),
        (json.dumps({"\x1b[31m": GOOD}), "cannot be printed"),
        (json.dumps({"\ud800": GOOD}), "cannot be printed"),
        (json.dumps({"\u202e" * 5000: GOOD}), "cannot be printed"),
    ],
)
def test_a_small_header_takes_little(tmp_path, header, words):
    path = tmp_path / "bad.safetensors"
    raw = header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(24))
    with refused(words, 32 << 20):
        co_llm.read_bare(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", '{"<|defer|>": 1e999}'),
        ("added_tokens.json", '{"<|defer|>": -1}'),
        ("added_tokens.json", "[" * 100_000),
        ("tokenizer.json", '{"added_tokens": [{"content": []}]}'),
        ("tokenizer.json", '{"added_tokens": {"a": 1}}'),
        ("tokenizer.json", '{"padding": 1}'),
        ("tokenizer.json", '{"added_tokens": [], "model": "\\ud800"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": []}}, "a": NaN, '
         '"additional_special_tokens": "\\udfff"}'),
        ("config.json", '{"logit_scale": 1%s}' % ("0" * 400)),
        ("config.json", '{"dim_model_base": "a", "hidden_size": [1]}'),
        ("config.json", '{"text_config": {"vocab_size": "\\ud800", "a": "\\ud800"}}'),
    ],
)  # fmt: skip
def test_json_of_any_kind_is_refused_in_one_line(tmp_path, name, content):
    make_checkpoint(tmp_path / "c")
    (tmp_path / "c" / name).write_text(content)
    arguments = "--outfile", tmp_path / "s.gguf", "--strip-to", tmp_path / "base"
    result = convert(tmp_path / "c", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.rstrip("\n").isprintable()
    assert len(result.stderr) <= LONGEST + 8
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a named pipe is a POSIX thing")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    with refused("not a plain file"):
        checkpoint_files.read_file(tmp_path / "pipe.bin")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_of_files_are_printed_as_they_can_be(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\x1b[31m"
    os.mkdir(folder)
    make_checkpoint(Path(os.fsdecode(folder)))
    result = convert(os.fsdecode(folder), "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith("checkpoint  \\udcff\\x1b[31m\n")
    assert convert(os.fsdecode(folder), "--outfile", tmp_path / "s.gguf").exit_code == 0
    assert Switch.load(tmp_path / "s.gguf").info["checkpoint"] == "\\udcff\\x1b[31m"
