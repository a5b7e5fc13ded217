"""numpy's files: read as numpy reads them, or refused, whatever their heads say."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from lib.fuzz.zip import bomb, members_of, zipped

from colm_edge.npy_files import read_array, read_arrays

KINDS = {"a": np.int32, "b": np.bool_, "c": np.float64, "t": str, "u": np.uint8}
ARRAYS = {
    "a": np.arange(5, dtype=np.int32),
    "b": np.array([True, False]),
    "c": np.array([0.5, -np.inf]),
    "t": np.array("tést"),
    "u": np.empty(0, np.uint8),
}
ENTRY = np.dtype([("key", np.uint64), ("rows", np.int64)])


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    return tmp_path / "a.npz"


def changed(path, name: str, old: bytes, new: bytes) -> None:
    members = dict(members_of(path.read_bytes()))
    assert old in members[name]
    members[name] = members[name].replace(old, new, 1)
    path.write_bytes(zipped([*members.items()]))


def test_it_reads_what_numpy_writes(path):
    found = read_arrays(path, KINDS | {"absent": np.int8})
    assert found.keys() == KINDS.keys()
    assert found.pop("t") == "tést"
    for name, values in found.items():
        assert values.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(values, ARRAYS[name])
    path.write_bytes(zipped(members_of(path.read_bytes())))
    assert read_arrays(path, {"t": str}) == {"t": "tést"}


def test_it_reads_rows_of_several_numbers(tmp_path):
    rows = np.array([(1, 2), (3, -4)], ENTRY)
    np.save(tmp_path / "r.npy", rows)
    np.testing.assert_array_equal(read_array(tmp_path / "r.npy", ENTRY), rows)
    with pytest.raises(ValueError, match="expected one row of"):
        read_array(tmp_path / "r.npy", np.int64)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"(5,)", b"(6,)", "as many bytes"),
        (b"(5,)", b"(4611686018427387904,)", "as many bytes|not an array"),
        (b"(5,), }      ", b"(99999999999,)", "not an array"),
        (b"(5,), }  ", b"(5, 1), }", "expected one row"),
        (b"'<i4'", b"'|O4'", "expected one row"),
        (b"'<i4'", b"'>i4'", "expected one row"),
        (b"False", b"True ", "not an array"),
        (b"{'descr'", b"((((((((", "not an array"),
        (b"NUMPY\x01", b"NUMPY\x03", "not an array"),
    ],
)
def test_a_head_that_lies_is_refused(path, old, new, words):
    changed(path, "a.npy", old, new)
    with pytest.raises(ValueError, match=words):
        read_arrays(path, KINDS)


def test_what_is_no_truth_or_no_text_is_refused(path):
    changed(path, "b.npy", b"\n\x01\x00", b"\n\x02\x00")
    with pytest.raises(ValueError, match="true or false"):
        read_arrays(path, {"b": bool})
    changed(path, "t.npy", b"\xe9\0\0\0", b"\0\xd8\0\0")  # half of a surrogate pair
    with pytest.raises(ValueError, match="t: "):
        read_arrays(path, {"t": str})
    changed(path, "t.npy", b"<U4", b"<U9")
    with pytest.raises(ValueError, match="expected a text"):
        read_arrays(path, {"t": str})


def test_nothing_is_unpickled(tmp_path):
    class Noticed:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.savez(tmp_path / "o.npz", a=np.array([Noticed()], object))
    with pytest.raises(ValueError, match="expected one row"):
        read_arrays(tmp_path / "o.npz", KINDS)


def test_what_is_packed_is_not_unpacked(path):
    members = members_of(path.read_bytes())
    path.write_bytes(bomb(members, 0))  # 3 GB of zeros
    with pytest.raises(ValueError, match=r"a\.npy is packed"):
        read_arrays(path, KINDS)
    assert "c" in read_arrays(path, {"c": np.float64})


def test_a_name_that_comes_twice_is_refused(path):
    members = members_of(path.read_bytes())
    path.write_bytes(zipped([*members, members[0]]))
    with pytest.raises(ValueError, match="twice"):
        read_arrays(path, KINDS)


def test_a_broken_archive_is_refused(path):
    whole = path.read_bytes()
    encrypted = bytearray(whole)
    for at in (whole.index(b"PK\3\4") + 6, whole.index(b"PK\1\2") + 8):
        encrypted[at] |= 1
    member = whole.index(b"\x93NUMPY") + 130
    other = whole[:member] + b"?" + whole[member + 1 :]  # its checksum is another
    for data in (b"", b"PK\5\6", whole[: len(whole) // 2], whole[40:], bytes(encrypted), other):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"archive|expected"):
            read_arrays(path, KINDS)
    assert zipfile.ZipFile(io.BytesIO(whole)).testzip() is None
