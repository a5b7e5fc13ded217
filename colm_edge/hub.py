"""Files from the Hugging Face Hub, through huggingface_hub and its cache, checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from colm_edge.errors import ModelError

# user/repo:file.gguf or user/repo:QUANT; a file may lie in a folder of the repository.
REFERENCE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+)")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
SPARE_BYTES = 1 << 30  # of the disk, that a download leaves free
TRIES = 5  # of a connection that breaks
Note = Callable[[str], None]


def is_reference(text: str) -> bool:
    return REFERENCE.fullmatch(text) is not None


def fetch(reference: str, *, offline: bool = False, note: Note = lambda text: None) -> Path:
    """Return the file of a reference, downloaded if it is not in the Hub's cache yet.

    Of a model in several files all are fetched and the first is returned. A download that breaks
    goes on where it was; what arrives must have the SHA-256 that the Hub states.

    offline: look in the cache alone, as with HF_HUB_OFFLINE. note: told what is about to begin.

    Raises ModelError: not found, gated, no space, a wrong checksum, no connection.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelError(f"{reference!r} is no reference; expected user/repo:file.gguf")
    repo, name = match.groups()
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    with _explained(reference):
        if not name.lower().endswith(".gguf"):
            name = _file_of(repo, name, offline)
        shard = _SHARD.search(name)
        count = int(shard.group(2)) if shard else 1
        names = [name] if shard is None else [
            f"{name[: shard.start()]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)
        ]  # fmt: skip
        paths = [_fetch_one(repo, name, offline, note) for name in names]
        return paths[0]


def _fetch_one(repo: str, name: str, offline: bool, note: Note) -> Path:
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repo, name)
    if isinstance(cached, str):
        return Path(cached)
    if offline:
        raise ModelError(
            f"{repo}:{name} is not in the cache, and nothing is downloaded offline; "
            f"`colm-edge pull {repo}:{name}` gets it where there is a network"
        )
    endpoint = os.environ.get("HF_ENDPOINT") or None
    about = hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, endpoint=endpoint))
    _check_space(about.size or 0, f"{repo}:{name}")
    note(f"downloading {repo}:{name} ({as_size(about.size or 0)})")
    path = Path(_download(repo, name, endpoint))
    stated = (about.etag or "").strip('"')
    if _SHA256.fullmatch(stated) is not None:
        found = _sha256(path)
        if found != stated:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise ModelError(
                f"{repo}:{name}: its SHA-256 is {found[:12]}…, the Hub states {stated[:12]}…; "
                "the file is removed, download it again"
            )
        _record(f"{repo}:{name}", path, found)
    return path


def _download(repo: str, name: str, endpoint: str | None) -> str:
    """Download a file into the cache; begin again where a connection broke."""
    import huggingface_hub as hub

    for attempt in range(TRIES):
        try:
            return str(hub.hf_hub_download(repo, name, endpoint=endpoint))
        except (_http().TransportError, ConnectionError):
            if attempt == TRIES - 1:
                raise
            time.sleep(min(0.5 * 2**attempt, 10))
    raise AssertionError


def _file_of(repo: str, quantisation: str, offline: bool) -> str:
    """Return the name of a repository's file of a quantisation, the first where it has parts."""
    import huggingface_hub as hub

    if offline:
        found = [
            str(Path(file.file_path).relative_to(revision.snapshot_path))
            for r in hub.scan_cache_dir().repos if r.repo_id == repo
            for revision in r.revisions for file in revision.files
        ]  # fmt: skip
    else:
        endpoint = os.environ.get("HF_ENDPOINT") or None
        found = hub.HfApi(endpoint=endpoint).list_repo_files(repo)
    files = sorted(name for name in found if name.lower().endswith(".gguf"))
    end = re.compile(
        rf"[-._/]{re.escape(quantisation)}(-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE
    )
    match = next((name for name in files if end.search(name)), None)
    if match is None:
        has = ", ".join(files[:8]) + (" …" if len(files) > 8 else "") or "no GGUF files"
        raise ModelError(f"{repo} has no file of {quantisation}; it has {has}")
    return match


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
    """Turn what huggingface_hub raises into a line that says what to do."""
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
    except errors.EntryNotFoundError as e:
        raise ModelError(f"{reference}: the repository has no such file; check the name") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else "no status"
        hint = "set HF_TOKEN" if status == 401 else "try again later"
        raise ModelError(f"{reference}: the Hub answers {status}; {hint}") from e
    except (_http().HTTPError, OSError, ValueError) as e:
        told = " ".join(str(e).split())[:200] or type(e).__name__
        raise ModelError(f"{reference}: cannot be downloaded: {told}; try again") from e


def _http() -> Any:
    """Return the HTTP library that huggingface_hub uses: which one depends on its version."""
    from huggingface_hub import get_session

    return import_module(type(get_session()).__module__.partition(".")[0])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "colm-edge" / "pulled.json"


def pulled() -> dict[str, Any]:
    """Return what was downloaded and checked: reference -> {"path", "sha256", "bytes"}."""
    try:
        records: dict[str, Any] = json.loads(_records().read_text())
    except (OSError, ValueError):
        return {}
    return records


def _record(reference: str, path: Path, sha256: str) -> None:
    records = pulled()
    records[reference] = {"path": str(path), "sha256": sha256, "bytes": path.stat().st_size}
    target = _records()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        json.dump(records, file, indent=1)
    os.replace(file.name, target)


def as_size(n: int) -> str:
    """Return bytes in the unit that suits them: 2.1 MB, 4.7 GB."""
    return f"{n / 1e6:.1f} MB" if n < 1e9 else f"{n / 1e9:.1f} GB"
