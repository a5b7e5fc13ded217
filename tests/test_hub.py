"""Downloads from a local server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import COMMIT, Hub

from colm_edge import hub, references
from colm_edge.cli import main
from colm_edge.errors import ModelError
from colm_edge.files import parts_of
from colm_edge.hub import fetch


@pytest.fixture
def server(tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub_server = Hub()
    threading.Thread(target=hub_server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()


def downloads(server: Hub) -> list[str | None]:
    return [rng for method, path, rng in server.requests if method == "GET" and "/cdn/" in path]


def test_a_file_is_downloaded_checked_and_kept(server, tmp_path):
    content = b"GGUF" + bytes(range(256)) * 4000
    server.repos["them/model"] = {"model-Q4_0.gguf": content}
    said: list[str] = []
    path = fetch("them/model:model-Q4_0.gguf", note=said.append)
    assert path.read_bytes() == content
    assert path.is_relative_to(tmp_path / "hub")
    assert len(said) == 1
    assert path.resolve().name == hashlib.sha256(content).hexdigest()
    n = len(server.requests)
    assert fetch("them/model:model-Q4_0.gguf", note=said.append) == path
    assert len(server.requests) == n  # no new request
    assert len(said) == 1


def test_a_broken_download_is_resumed(server):
    content = b"GGUF" + bytes(range(251)) * 100_000
    server.repos["them/model"] = {"m.gguf": content}
    # What has arrived is written in pieces of constants.DOWNLOAD_CHUNK_SIZE, 10 MB.
    server.break_after = [15_000_000, 1000]
    assert fetch("them/model:m.gguf").read_bytes() == content
    first, *later = downloads(server)
    assert first is None
    assert [int(range_.removeprefix("bytes=").split("-")[0]) for range_ in later] == [10485760] * 2


# A script that is killed where the library waits before it asks again for the rest.
STOPPED = """
import os, signal, time
from huggingface_hub import constants
from colm_edge import hub
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGKILL)
hub.fetch("them/model:m.gguf")
"""


def test_a_download_that_was_killed_goes_on(server, tmp_path, monkeypatch):
    content = b"GGUF" + bytes(range(251)) * 10_000
    server.repos["them/model"] = {"m.gguf": content}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for kept in (15, 22):  # of the pieces of 64 KiB; what was in flight is lost
        server.break_after = [1_000_000 if kept == 15 else 500_000]
        killed = subprocess.run([sys.executable, "-c", STOPPED], check=False, capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        assert hub.find_cached("them/model:m.gguf") is None
    said: list[str] = []
    path = fetch("them/model:m.gguf", note=said.append)
    assert path.read_bytes() == content
    assert said == ["downloading them/model:m.gguf (1.4 MB of 2.5 MB are here) …"]
    assert downloads(server) == [None, f"bytes={15 << 16}-", f"bytes={22 << 16}-"]
    assert list(path.resolve().parent.iterdir()) == [path.resolve()]


def test_what_was_begun_of_another_file_of_that_name_is_removed(server, tmp_path):
    server.repos["them/model"] = {"m.gguf": b"GGUF new", "n.gguf": b"GGUF too"}
    server.reset, server.break_after = True, [2] * hub.TRIES
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch("them/model:m.gguf")
    blobs = tmp_path / "hub" / "models--them--model" / "blobs"
    (begun,) = blobs.iterdir()
    server.repos["them/model"]["m.gguf"] = b"GGUF newer"
    paths = {fetch(f"them/model:{name}.gguf").resolve() for name in "mn"}
    assert not begun.exists()
    assert set(blobs.iterdir()) == paths


def test_a_part_that_is_longer_than_the_file_is_not_used(server, tmp_path):
    server.repos["them/model"] = {"m.gguf": b"GGUF something"}
    server.reset, server.break_after = True, [2] * hub.TRIES
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch("them/model:m.gguf")
    (begun,) = (tmp_path / "hub" / "models--them--model" / "blobs").iterdir()
    begun.write_bytes(bytes(100))
    assert fetch("them/model:m.gguf").read_bytes() == b"GGUF something"


def test_a_download_whose_connection_is_reset_is_tried_again(server):
    content = b"GGUF" + bytes(range(251)) * 10_000
    server.repos["them/model"] = {"m.gguf": content}
    server.break_after, server.reset = [1_000_000] * (hub.TRIES - 1), True
    assert fetch("them/model:m.gguf").read_bytes() == content
    assert downloads(server) == [None] * hub.TRIES
    server.repos["them/model"]["other.gguf"] = content + b"other"
    server.break_after = [1_000_000] * hub.TRIES
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch("them/model:other.gguf")


def test_the_cache_is_laid_out_as_other_programs_expect(server, tmp_path):
    import huggingface_hub

    server.repos["them/model"] = {"a/m.gguf": b"GGUF1", "n.gguf": b"GGUF2"}
    paths = [fetch("them/model:a/m.gguf"), fetch("them/model:n.gguf")]
    for name, path in zip(("a/m.gguf", "n.gguf"), paths, strict=True):
        found = huggingface_hub.hf_hub_download("them/model", name, local_files_only=True)
        assert found == str(path)
    scanned = huggingface_hub.scan_cache_dir()
    assert scanned.warnings == []
    (repo,) = scanned.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == ("them/model", COMMIT, {"main"})
    assert {str(file.file_path) for file in revision.files} == set(map(str, paths))
    blobs = tmp_path / "hub" / "models--them--model" / "blobs"
    assert {path.resolve() for path in paths} == set(blobs.iterdir())  # nothing else is left


def test_what_another_program_has_downloaded_is_used(server):
    import huggingface_hub

    server.repos["them/model"] = {"m.gguf": b"GGUF"}
    path = huggingface_hub.hf_hub_download("them/model", "m.gguf", endpoint=server.url)
    n = len(server.requests)
    assert str(fetch("them/model:m.gguf")) == path
    assert len(server.requests) == n


def test_a_cache_without_links_has_the_files_themselves(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    server.repos["them/model"] = {"m.gguf": b"GGUF"}
    path = fetch("them/model:m.gguf")
    assert not path.is_symlink()
    assert path.read_bytes() == b"GGUF"
    assert fetch("them/model:m.gguf", offline=True) == path


# A script that is killed when a function is called.
KILLED = """
import os, signal, sys
from colm_edge import hub
hub.{} = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
hub.fetch("them/model:m.gguf")
"""


@pytest.mark.parametrize(
    ("where", "is_right", "n_hashed"),
    [
        ("sha256_of", True, 1),
        ("sha256_of", False, 1),
        ("os.replace", True, 1),
        ("_add_to_snapshot", True, 0),
    ],
)
def test_a_file_that_was_not_hashed_is_not_trusted(
    server, tmp_path, monkeypatch, where, is_right, n_hashed
):
    server.repos["them/model"] = {"m.gguf": b"GGUF something"}
    server.wrong_hash = not is_right
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    killed = subprocess.run([sys.executable, "-c", KILLED.format(where)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert hub.find_cached("them/model:m.gguf") is None
    with pytest.raises(ModelError, match="not in the cache"):
        fetch("them/model:m.gguf", offline=True)
    hashed: list[Path] = []
    sha256 = hub.sha256_of
    monkeypatch.setattr(hub, "sha256_of", lambda path: hashed.append(path) or sha256(path))
    if not is_right:
        with pytest.raises(ModelError, match="the Hub states"):
            fetch("them/model:m.gguf")
        assert hub.find_cached("them/model:m.gguf") is None
        server.wrong_hash = False
    path = fetch("them/model:m.gguf")
    assert path.read_bytes() == b"GGUF something"
    if is_right:
        assert len(downloads(server)) == 1  # the downloaded file is used
        assert len(hashed) == n_hashed
    assert list(path.resolve().parent.iterdir()) == [path.resolve()]


def test_concurrent_requests_for_a_file_download_it_once(server):
    server.repos["them/model"] = {"m.gguf": bytes(3_000_000)}
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, ["them/model:m.gguf"] * 4))
    assert len(paths) == 1
    assert len(downloads(server)) == 1


def test_a_wrong_checksum_is_not_kept(server, tmp_path):
    server.repos["them/model"] = {"m.gguf": b"GGUF something"}
    server.wrong_hash = True
    with pytest.raises(ModelError, match="the Hub states"):
        fetch("them/model:m.gguf")
    assert hub.find_cached("them/model:m.gguf") is None
    assert not [p for p in (tmp_path / "hub").rglob("*") if p.is_file() and p.stat().st_size == 14]
    server.wrong_hash = False
    assert fetch("them/model:m.gguf").read_bytes() == b"GGUF something"


def test_a_gated_model_names_the_token(server, monkeypatch):
    server.repos["them/model"] = {"m.gguf": b"GGUF"}
    server.gated, server.token = {"them/model"}, "hf_secret"
    with pytest.raises(ModelError, match=r"accept their terms first.*HF_TOKEN"):
        fetch("them/model:m.gguf")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch("them/model:m.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nobody/model:m.gguf", "no such repository, or a private one"),
        ("them/model:other.gguf", "has no such file"),
        ("them/model:Q9_Z", "has no file of Q9_Z; it has a-Q4_0.gguf"),
        ("model", "is not a reference"),
    ],
)
def test_a_missing_repository_or_file_is_named(server, reference, words):
    server.repos["them/model"] = {"a-Q4_0.gguf": b"GGUF", "readme.md": b"x"}
    with pytest.raises(ModelError, match=words):
        fetch(reference)


def test_a_hub_that_fails_or_cannot_be_reached(server, monkeypatch):
    server.status = 500
    with pytest.raises(ModelError, match="the Hub answers 500; try again later"):
        fetch("them/model:m.gguf")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch("them/model:m.gguf")


def test_a_quantisation_names_a_file_and_all_its_parts_are_downloaded(server):
    server.repos["them/model"] = {
        "m-Q4_0.gguf": b"GGUF4",
        "m-Q4_K_M-00001-of-00002.gguf": b"GGUF1",
        "m-Q4_K_M-00002-of-00002.gguf": b"GGUF2",
        "mmproj-f16.gguf": b"GGUF3",
        "m-mmproj-f16.gguf": b"GGUF5",
        "m-text-f16.gguf": b"GGUF6",
    }
    assert fetch("them/model:f16").read_bytes() == b"GGUF6"
    assert fetch("them/model:q4_0").read_bytes() == b"GGUF4"
    path = fetch("them/model:Q4_K_M")
    assert path.read_bytes() == b"GGUF1"
    assert (path.parent / "m-Q4_K_M-00002-of-00002.gguf").read_bytes() == b"GGUF2"
    assert fetch("them/model:Q4_K_M", offline=True) == path
    with pytest.raises(ModelError, match="them/model:Q8_0 is not in the cache"):
        fetch("them/model:Q8_0", offline=True)


def test_a_cached_quantisation_needs_no_hub(server, monkeypatch):
    server.repos["them/model"] = {"m-Q4_0.gguf": b"GGUF"}
    path = fetch("them/model:Q4_0")
    n = len(server.requests)
    assert fetch("them/model:Q4_0") == fetch("them/model:Q4_0", offline=True) == path
    assert hub.find_cached("them/model:Q4_0") == path
    assert hub.find_cached("them/model:Q8_0") is None
    assert len(server.requests) == n
    server.status = 503
    assert fetch("them/model:Q4_0") == path
    with pytest.raises(ModelError, match="the Hub answers 503"):
        fetch("them/model:Q8_0")
    assert len(server.requests) == n + 1  # a user waits for no further tries
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert fetch("them/model:Q4_0") == path
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch("them/model:Q8_0")


def test_a_model_in_parts_is_cached_if_all_its_parts_are(server):
    names = ["m-Q4_0-00001-of-00002.gguf", "m-Q4_0-00002-of-00002.gguf"]
    server.repos["them/model"] = {names[0]: b"GGUF1"}
    with pytest.raises(ModelError, match="has no such file"):
        fetch("them/model:Q4_0")
    assert hub.find_cached("them/model:Q4_0") is None
    server.repos["them/model"][names[1]] = b"GGUF2"
    assert hub.find_cached(f"them/model:{names[1]}") is None
    path = fetch(f"them/model:{names[1]}")
    assert path.name == names[0]
    assert hub.find_cached("them/model:Q4_0") == path


def test_a_file_of_an_earlier_revision_stays_of_use(server):
    parts = ["p-F16-00001-of-00002.gguf", "p-F16-00002-of-00002.gguf"]
    server.repos["them/model"] = {"a-Q4_0.gguf": b"GGUFa", parts[0]: b"GGUF1", parts[1]: b"GGUF2"}
    first = fetch("them/model:Q4_0")
    hub._fetch_file("them/model", parts[0], None, lambda text: None)
    server.commit = "b" * 40
    server.repos["them/model"] |= {"c-Q8_0.gguf": b"GGUFc"}
    newer = fetch("them/model:Q8_0")
    hub._fetch_file("them/model", parts[1], None, lambda text: None)
    n = len(server.requests)
    for reference in ("them/model:a-Q4_0.gguf", "them/model:Q4_0"):
        assert hub.find_cached(reference) == fetch(reference, offline=True) == first
    assert fetch("them/model:Q8_0") == newer
    assert len(server.requests) == n
    # The parts of two revisions do not make one model.
    assert hub.find_cached("them/model:F16") is None
    whole = fetch("them/model:F16")
    assert {path.name for path in whole.parent.glob("p-*")} == set(parts)


def test_the_parts_of_a_model_are_of_one_revision(server):
    parts = ["p-F16-00001-of-00002.gguf", "p-F16-00002-of-00002.gguf"]
    server.repos["them/model"] = {parts[0]: b"GGUF1", parts[1]: b"GGUF2"}
    _, before = hub._fetch_file("them/model", parts[0], None, lambda text: None)
    server.requests.clear()
    fetch("them/model:F16")
    heads = [path for method, path, _ in server.requests if method == "HEAD"]
    assert heads == [f"/them/model/resolve/{before}/{parts[1]}"]


@pytest.mark.parametrize("name", ["../m.gguf", "a/../../m.gguf", "/m.gguf", "a//m.gguf"])
def test_no_name_leads_out_of_its_repository(server, name):
    server.repos["them/model"] = {name: b"GGUF", "x-Q4_0.gguf": b"GGUF"}
    with pytest.raises(ModelError, match="is not the name of a file in a repository"):
        fetch(f"them/model:{name}")
    server.repos["them/model"] = {f"{name[:-5]}-Q8_0.gguf": b"GGUF"}
    with pytest.raises(ModelError, match="has no file of Q8_0"):
        fetch("them/model:Q8_0")


@pytest.mark.parametrize("commit", ["", "../../../up", "main"])
def test_no_commit_leads_out_of_the_cache(server, commit):
    server.repos["them/model"] = {"m.gguf": b"GGUF"}
    server.commit = commit
    with pytest.raises(ModelError, match="does not answer as the Hub does"):
        fetch("them/model:m.gguf")


def test_the_number_of_a_part_is_one_of_them():
    for name in ("m-00001-of-00000.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf"):
        assert parts_of(name) == [name]


def test_a_small_file_has_gits_checksum(tmp_path):
    """`printf hello | git hash-object --stdin`"""
    file = tmp_path / "f"
    file.write_bytes(b"hello")
    git = "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    assert hub._checksum(file, git) == git


def test_a_vision_projector_is_not_the_model(server):
    server.repos["them/model"] = {"mmproj-f16.gguf": b"GGUF1", "qwen-f16.gguf": b"GGUF2"}
    assert fetch("them/model:F16").name == "qwen-f16.gguf"
    assert fetch("them/model:mmproj-f16.gguf").read_bytes() == b"GGUF1"


def test_offline_no_request_is_sent(server, monkeypatch):
    server.repos["them/model"] = {"m.gguf": b"GGUF"}
    with pytest.raises(ModelError, match="not in the cache, and nothing is downloaded offline"):
        fetch("them/model:m.gguf", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="offline"):
        fetch("them/model:m.gguf")
    assert server.requests == []


def test_a_full_disk_is_noticed_before_the_download(server, monkeypatch):
    server.repos["them/model"] = {"m.gguf": b"GGUF"}
    monkeypatch.setattr(hub, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ModelError, match="make room, or set HF_HOME"):
        fetch("them/model:m.gguf")
    assert downloads(server) == []


def test_a_file_too_large_for_http_is_told(server, monkeypatch):
    from huggingface_hub import constants

    server.repos["them/model"] = {"m.gguf": b"GGUF" + bytes(2_000_000)}
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1_000_000)
    with pytest.raises(ModelError, match=r"has 2.0 MB in one file.*hf download them/model m.gguf"):
        fetch("them/model:m.gguf")
    assert downloads(server) == []


def test_a_pair_is_pulled_by_name_and_run(server, tiny, tmp_path, monkeypatch):
    server.repos["them/tiny"] = {
        "base.gguf": Path(tiny["base"]).read_bytes(),
        "expert.gguf": Path(tiny["expert"]).read_bytes(),
    }
    listing = tmp_path / "models.txt"
    listing.write_text(
        "mine base them/tiny:base.gguf@Q8_0 MIT small\n"
        "mine expert them/tiny:expert.gguf MIT large\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "_models_txt", lambda: listing)
    result = CliRunner().invoke(main, ["pull", "mine"])
    assert result.exit_code == 0, result.output
    assert [Path(path).name for path in result.stdout.split()] == ["base@Q8_0.gguf", "expert.gguf"]
    assert "quantising base.gguf to Q8_0, once" in result.stderr
    listed = CliRunner().invoke(main, ["models"]).stdout
    assert "* mine base    them/tiny:base.gguf@Q8_0" in listed
    n = len(server.requests)
    references_of_both = ["-m", "them/tiny:base.gguf", "-me", "them/tiny:expert.gguf"]
    for choice in (["--pair", "mine"], ["-m", "mine", "-me", "mine"], references_of_both):
        args = ["run", *choice, "--offline", "-t", "1", "-n", "3", "--temp", "0", "hello"]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
    assert len(server.requests) == n
    result = CliRunner().invoke(main, ["pull", "yours"])
    assert result.exit_code == 1
    assert "neither a name in models.txt nor a reference" in result.stderr


def test_every_line_of_models_txt_is_a_valid_reference():
    """Each line has a reference, and each pair has a base and an expert."""
    for alias, roles in references.known_pairs().items():
        assert {"base", "expert"} <= set(roles), alias
        for known in roles.values():
            source = references.source_of(known.reference)
            assert source.startswith("package:") or hub.is_reference(source)
            assert known.licence
            assert known.note


@pytest.mark.parametrize(
    "commit", [b"", b"\xff", b"../../x", b"a\0b", b"x" * 5000, COMMIT.encode()]
)
def test_a_broken_note_of_the_latest_revision_counts_as_none(tmp_path, monkeypatch, commit):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--model"
    for path, data in (("refs/main", commit), (f"snapshots/{COMMIT}/m-Q4_0.gguf", b"GGUF")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(data)
    found = [hub.find_cached(f"me/model:{name}") for name in ("Q4_0", "m-Q4_0.gguf")]
    assert [path is not None for path in found] == [commit == COMMIT.encode()] * 2
