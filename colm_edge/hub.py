"""Files from the Hugging Face Hub, hashed before they are put into its own cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from colm_edge.errors import ModelError
from colm_edge.files import parts_of, sha256_of

# user/repo:file.gguf or user/repo:QUANT; a file may be in a folder of the repository.
REFERENCE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256_DIGITS = 64
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SPARE_BYTES = 1 << 30  # of the disk, left free by a download
TRIES = 5  # of a download whose connection is reset
Note = Callable[[str], None]


def is_reference(text: str) -> bool:
    """Return whether a text has the form of a reference to the Hub."""
    return REFERENCE.fullmatch(text) is not None


def fetch(reference: str, *, offline: bool = False, note: Note = lambda text: None) -> Path:
    """Return the file of a reference, downloaded if it is not in the Hub's cache yet.

    Of a model in several files, all are fetched, of one revision, and the first is returned. A
    download must have the checksum that the Hub states; one that was stopped, or killed, goes on
    where it was. What is in the cache is used as it is: the Hub is not asked whether it has
    something newer.

    offline: look only in the cache, as with HF_HUB_OFFLINE. note: told before a download begins.

    Raises ModelError: not found, gated, no space, a wrong checksum, no connection.
    """
    repo, name = _parse(reference)
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if (cached := find_cached(reference)) is not None:
        return cached
    if offline:
        raise ModelError(
            f"{reference} is not in the cache, and nothing is downloaded offline; "
            f"run `colm-edge pull {reference}` with a network"
        )
    with _explained(reference):
        if not _is_gguf(name):
            name = _file_of(repo, name)
        first, *others = parts_of(name)
        path, commit = _fetch_file(repo, first, None, note)
        for part in others:  # of two revisions they would not fit together
            _fetch_file(repo, part, commit, note)
        return path


def find_cached(reference: str) -> Path | None:
    """Return the file of a reference if it is in the Hub's cache with all its parts, else None.

    Does not use the network.
    """
    repo, name = _parse(reference)
    if not _is_gguf(name):
        found = _of_quantisation(_cached_names(repo), name)
        if found is None:
            return None
        name = found
    for commit in _cached_commits(repo):
        parts = [_cached_file(repo, part, commit) for part in parts_of(name)]
        if None not in parts:  # those of two revisions would not fit together
            return parts[0]
    return None


def _parse(reference: str) -> tuple[str, str]:
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelError(f"{reference!r} is not a reference; expected user/repo:file.gguf")
    if not _is_inside(match[2]):
        raise ModelError(f"{reference!r}: {match[2]} is not the name of a file in a repository")
    return match[1], match[2]


def _is_inside(name: str) -> bool:
    """Return whether a name is that of a file in a folder, and leads nowhere else."""
    return not set(name.split("/")) & {"", ".", ".."} and not set(name) & {"\\", ":", "\0"}


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _cached_file(repo: str, name: str, commit: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _cached_names(repo: str) -> list[str]:
    """Return the names of a repository's files in the cache."""
    snapshots = [_cache_of(repo) / "snapshots" / commit for commit in _cached_commits(repo)]
    return [
        path.relative_to(snapshot).as_posix()
        for snapshot in snapshots
        for path in snapshot.rglob("*")
    ]


def _cached_commits(repo: str) -> list[str]:
    """Return the revisions of a repository that the cache has files of, if it knows the latest:
    that one first. What was fetched of an earlier one stays of use."""
    folder = _cache_of(repo)
    try:
        latest = (folder / "refs" / "main").read_bytes().decode("ascii", "replace")
    except OSError:
        return []
    if not _COMMIT.fullmatch(latest):
        return []
    others = {path.name for path in (folder / "snapshots").glob("*")} - {latest}
    return [latest, *sorted(filter(_COMMIT.fullmatch, others))]


def _cache_of(repo: str) -> Path:
    """Return the folder of a repository in the Hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))


def _file_of(repo: str, quantisation: str) -> str:
    """Return the name of a repository's file of a quantisation, as the Hub tells it."""
    # `list_repo_files` would try for 24 s where there is no network.
    names = [file.rfilename for file in _api().model_info(repo).siblings or ()]
    names = list(filter(_is_inside, names))
    found = _of_quantisation(names, quantisation)
    if found is None:
        files = sorted(filter(_is_gguf, names))
        has = ", ".join(files[:8]) + (" …" if len(files) > 8 else "") or "no GGUF files"
        raise ModelError(f"{repo} has no file of {quantisation}; it has {has}")
    return found


def _of_quantisation(names: list[str], quantisation: str) -> str | None:
    """Return the first GGUF file of a quantisation; of a model in parts, any part. Not a vision
    projector, which lies beside some models."""
    end = re.compile(
        rf"[-._/]{re.escape(quantisation)}(-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE
    )
    models = (name for name in sorted(names) if "mmproj" not in Path(name).name.lower())
    return next((name for name in models if end.search(name)), None)


def _fetch_file(repo: str, name: str, revision: str | None, note: Note) -> tuple[Path, str]:
    """Return one file of a repository, from the cache or downloaded into it, and its commit.

    revision: the commit; by default the latest that is known here, else the latest.
    """
    for commit in [revision] if revision else _cached_commits(repo)[:1]:
        if (cached := _cached_file(repo, name, commit)) is not None:
            return cached, commit
    import huggingface_hub as hub

    api = _api()
    url = hub.hf_hub_url(repo, name, revision=revision, endpoint=api.endpoint)
    about = api.get_hf_file_metadata(url=url)
    # Both become parts of paths, and what is fetched is trusted by its checksum alone.
    etag, latest = about.etag or "", about.commit_hash or ""
    if not _CHECKSUM.fullmatch(etag) or not _COMMIT.fullmatch(latest):
        raise ModelError(
            f"{repo}:{name}: {api.endpoint} does not answer as the Hub does; check HF_ENDPOINT"
        )
    folder = _cache_of(repo)
    blob = folder / "blobs" / etag
    # Whenever this process is killed, a blob has been hashed; what is unchecked has not, and the
    # next run goes on with it. Each of the repository's files has one at most.
    mark = hashlib.sha256(name.encode()).hexdigest()[:16]
    unchecked = blob.with_name(f"{mark}.{blob.name}.unchecked")
    lock = folder.parent / ".locks" / folder.name / f"{blob.name}.lock"  # huggingface_hub's own
    for needed in (blob.parent, folder / "snapshots", lock.parent):
        needed.mkdir(parents=True, exist_ok=True)
    with hub.utils.WeakFileLock(lock):
        if not blob.exists():
            for other in set(blob.parent.glob(f"{mark}.*.unchecked")) - {unchecked}:
                other.unlink()  # of what the Hub had under this name before
            _download(repo, name, about, unchecked, note)
            os.replace(unchecked, blob)
        return _add_to_snapshot(blob, latest, name), latest


def _download(repo: str, name: str, about: Any, file: Path, note: Note) -> None:
    """Download a file, from where an earlier run left it, and hash it.

    Raises ModelError, and removes the file, when the checksum is wrong.
    """
    what, size = f"{repo}:{name}", about.size or 0
    known = file.stat().st_size if file.exists() else 0
    if not 0 < known == size:
        _check_space(size - known, what)
        if not known and size > _most_by_http():
            raise ModelError(
                f"{what} has {as_size(size)} in one file, which is too large for this download; "
                f"fetch it with huggingface_hub's own program, hf download {repo} {name}"
            )
        amount = f"{as_size(known)} of {as_size(size)} are here" if known else as_size(size)
        note(f"downloading {what} ({amount}) …")
    _download_to(file, repo, name, about)
    found = _checksum(file, about.etag)
    if found != about.etag:
        file.unlink()
        raise ModelError(
            f"{what}: its checksum is {found[:12]}…, the Hub states {about.etag[:12]}…; the file "
            "was removed, download it again"
        )


def _checksum(file: Path, wanted: str) -> str:
    """Return a file's checksum of the wanted one's kind: SHA-256, or git's SHA-1 of a small file
    that is not in LFS."""
    if len(wanted) == SHA256_DIGITS:
        return sha256_of(file)
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def _most_by_http() -> int:
    """Return the bytes of the largest file that huggingface_hub's `http_get` begins with."""
    from huggingface_hub import constants

    return int(constants.MAX_HTTP_DOWNLOAD_SIZE)


def _download_to(path: Path, repo: str, name: str, about: Any) -> None:
    """Download the rest of a file, and go on if the connection is reset.

    huggingface_hub (2.4) goes on by itself where a connection is closed or times out. For a reset
    one it raises ReadError, and what `hf_hub_download` had from a run before, it downloads again:
    so its `http_get` is told here how much there is.
    """
    import huggingface_hub as hub
    from huggingface_hub.file_download import http_get

    url = hub.hf_hub_url(
        repo, name, revision=about.commit_hash, endpoint=_api().endpoint
    )  # which redirects to where the bytes are, and that address holds for a while only
    headers = hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    for attempt in range(1, TRIES + 1):
        with path.open("ab") as file:
            if about.size is None or file.tell() > about.size:
                file.truncate(0)
            known = file.seek(0, os.SEEK_END)
            try:
                http_get(
                    url, file, resume_size=known, headers=headers, expected_size=about.size,
                    displayed_filename=name,
                )  # fmt: skip
                return
            except _http().ReadError:
                if attempt == TRIES:
                    raise
        time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _add_to_snapshot(blob: Path, commit: str, name: str) -> Path:
    """Name a blob as the repository does, where huggingface_hub looks for it; return the path."""
    from huggingface_hub import constants

    folder = blob.parents[1]
    path, main = folder / "snapshots" / commit / name, folder / "refs" / "main"
    for needed in (path.parent, main.parent):
        needed.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:  # huggingface_hub asks by making a folder, which a killed process leaves
        if constants.HF_HUB_DISABLE_SYMLINKS:
            raise NotImplementedError
        path.symlink_to(os.path.relpath(blob, path.parent))
    except (OSError, NotImplementedError):
        os.replace(blob, path)
    whole = blob.with_name(f"{blob.name}.main")
    whole.write_text(commit)
    os.replace(whole, main)
    return path


def _check_space(size: int, what: str) -> None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise ModelError(
            f"{what} has {as_size(size)}, {folder} has {as_size(free)} free; make room, or "
            "set HF_HOME to another disk"
        )


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as e:
        raise ModelError(
            f"{reference}: its authors ask you to accept their terms first; do so on the model's "
            "page, then set HF_TOKEN to a token of your account"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"{reference}: no such repository, or a private one; check the name, or set HF_TOKEN"
        ) from e
    except errors.RemoteEntryNotFoundError as e:
        raise ModelError(f"{reference}: the repository has no such file; check the name") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else "no status"
        hint = "set HF_TOKEN" if status == 401 else "try again later"
        raise ModelError(f"{reference}: the Hub answers {status}; {hint}") from e
    except (_http().HTTPError, OSError, ValueError) as e:
        message = " ".join(str(e).split())[:200] or type(e).__name__
        raise ModelError(f"{reference}: cannot be downloaded: {message}; try again") from e


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _http() -> Any:
    """Return the HTTP library that huggingface_hub uses: which one depends on its version."""
    from huggingface_hub import get_session

    return import_module(type(get_session()).__module__.partition(".")[0])


def as_size(n: int) -> str:
    """Return bytes in the unit that suits them: 2.1 MB, 4.7 GB."""
    return f"{n / 1e6:.1f} MB" if n < 1e9 else f"{n / 1e9:.1f} GB"
