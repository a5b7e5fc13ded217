"""The page to chat on: its files are read when the server starts, and served by their names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from colm_edge.serve.errors import RefusalError

HOME = Path(__file__).parent.parent / "data" / "page"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".txt": "text/plain",
}
# Only the page's own files run and style it, and it asks this server only. What a model writes
# becomes elements through DOMPurify alone.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)


@dataclass(frozen=True)
class File:
    body: bytes
    media_type: str
    tag: str  # of this very content, so that a browser need not load it again


def _read(path: Path) -> File:
    body = path.read_bytes()
    return File(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"')


FILES = {
    path.relative_to(HOME).as_posix(): _read(path)
    for path in sorted(HOME.rglob("*"))
    if path.suffix in TYPES
}

router = APIRouter()


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
def page(request: Request) -> Response:
    return _answer("index.html", request)


@router.head("/page/{name:path}", include_in_schema=False)
@router.get("/page/{name:path}", include_in_schema=False)
def file(name: str, request: Request) -> Response:
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    if name not in FILES:
        raise RefusalError(404, f"the page has no file {name[:100]!r}")
    found = FILES[name]
    headers = {
        "Cache-Control": "no-cache",  # ask whether it is still the same
        "ETag": found.tag,
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
    if found.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type=found.media_type)
