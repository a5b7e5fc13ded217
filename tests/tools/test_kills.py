"""A command that is killed at some of what it does to files, and run again, has the same result."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import kills
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9")


@pytest.fixture(scope="module")
def prepared(tiny):
    with kills.prepared(12, Path(tiny["base"]), Path(tiny["expert"]), 0) as made:
        yield made


def test_a_lost_file_of_the_hubs_cache_is_a_difference(prepared):
    trials, known = prepared
    with trials.new() as folder:
        alone = trials.run(known["pull"], folder)
    (cache,) = alone.files
    assert len(cache) >= 3  # the blob, what refers to it, and the latest revision
    for name in cache:
        rest = {other: cache[other] for other in cache if other != name}
        assert kills.difference(known["pull"], alone, replace(alone, files=(rest,)))


@pytest.mark.parametrize("name", kills.NAMES)
def test_a_killed_command_is_run_again(prepared, name):
    trials, known = prepared
    case = known[name]
    with trials.new() as folder:
        alone = trials.run(case, folder)
    assert alone.n_events >= 2  # a file beside the result is opened, and put into its place
    draw = random.Random(name)
    for event in sorted(draw.sample(range(1, alone.n_events + 1), 2)):
        killed, _, differs = kills.trial(
            trials, case, alone, lambda at, n=event: trials.kill(case, at, event=n)
        )
        assert killed
        assert differs == "", f"killed before event {event} of {alone.n_events}"
