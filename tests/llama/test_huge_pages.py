"""Huge pages are requested only for the memory that a load allocates."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_edge.llama import huge_pages
from colm_edge.llama.model import Model

MB = 1 << 20


def ranges(values: set[int]) -> list[tuple[int, int]]:
    """Return a set of addresses as ranges; neighbours become one range."""
    starts = sorted(v for v in values if v - 1 not in values)
    ends = sorted(v + 1 for v in values if v + 1 not in values)
    return list(zip(starts, ends, strict=True))


@given(before=st.sets(st.integers(0, 40)), now=st.sets(st.integers(0, 40)))
def test_new_ranges_are_those_that_were_not_there_before(before, now):
    found = huge_pages._beyond(ranges(before), ranges(now))
    assert {i for start, end in found for i in range(start, end)} == now - before
    assert all(start < end for start, end in found)


def asked_for(address: int) -> bool:
    """Return whether huge pages were requested at an address."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first:
                start, end = (int(text, 16) for text in first.split("-"))
                inside = start <= address < end
            elif inside and first == "VmFlags:":
                return "hg" in line.split()
    raise AssertionError("no such address")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs a Linux with huge pages"
)
def test_huge_pages_are_requested_only_for_new_memory(monkeypatch):
    def buffer():
        memory = mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))

    old = buffer()
    ask = huge_pages.watch()
    new = buffer()
    with monkeypatch.context() as patch:
        patch.setattr(huge_pages, "MIN_BYTES", 1 << 60)
        ask()
    assert not asked_for(new[1])  # too small
    ask()
    assert asked_for(new[1])
    assert not asked_for(old[1])


def test_a_load_asks_before_the_first_weights_are_read(tiny, monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(huge_pages, "watch", lambda: lambda: events.append("asked"))
    model = Model(tiny["base"], progress=lambda share: events.append("read"))
    assert not events  # only the vocabulary was read
    model.load()
    assert events[0] == "asked"
    assert events.count("asked") == 1
    assert "read" in events
    model.close()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on other systems")
def test_a_file_may_have_any_name(tiny, tmp_path):
    folder = os.fsencode(tmp_path) + b"/mod\xe9le"
    os.mkdir(folder)
    path = shutil.copy(os.fsencode(tiny["base"]), folder + b"/tiny.gguf")
    model = Model(os.fsdecode(path))
    model.load()
    assert huge_pages._allocated()  # now that it is mapped
    model.close()


def test_without_a_memory_map_nothing_is_requested(monkeypatch):
    def refuse(*args, **options):
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    huge_pages.watch()()
