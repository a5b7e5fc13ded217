"""Names of other packages that they do not promise, and that are used: they are there, as expected.

httpx has no total time of a request, and no place to say one but its network. The Hub's library
downloads a file anew where a run before left a part of it, except by a function of its own.
`pyproject.toml` bounds the versions of both.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]


def test_the_network_of_a_client_of_httpx():
    httpx = pytest.importorskip("httpx")
    with httpx.Client(mounts={"all://a.example": httpx.HTTPTransport()}) as client:
        for transport in (client._transport, *client._mounts.values()):
            backend = transport._pool._network_backend
            assert {"connect_tcp", "connect_unix_socket", "sleep"} <= set(dir(backend))


def test_the_download_of_the_hub():
    from huggingface_hub import constants, get_session, utils
    from huggingface_hub.file_download import http_get, repo_folder_name

    wanted = {"url", "temp_file", "resume_size", "headers", "expected_size", "displayed_filename"}
    assert wanted <= inspect.signature(http_get).parameters.keys()
    folder = repo_folder_name(repo_id="a/b", repo_type="model")
    assert folder == "models--a--b"
    assert hasattr(constants, "HF_HUB_DISABLE_SYMLINKS")
    assert callable(utils.WeakFileLock)
    assert callable(get_session)


@pytest.mark.parametrize("name", ["huggingface-hub", "httpx"])
def test_their_versions_are_bounded(name):
    project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = [*project["dependencies"], *project["optional-dependencies"]["remote"]]
    (ours,) = [line for line in given if re.match(rf"{name}\b", line)]
    assert re.search(r",<\d", ours)
