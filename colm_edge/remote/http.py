"""One server: its address, its key, and requests whose answers are JSON."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from colm_edge.errors import ColmError, ModelError
from colm_edge.options import MAX_TIMEOUT
from colm_edge.references import is_this_machine
from colm_edge.remote.dialect import Body

CONNECT_TIMEOUT = 5.0  # seconds
EXPERT_KEY_VARIABLE = "COLM_EDGE_EXPERT_KEY"
MOST_BYTES = 64 << 20  # of an answer: the log-probabilities of a vocabulary take 10 MB
WRITTEN_AT_ONCE = 16 << 10  # bytes of a request
TOLD = 200  # characters of a server's own words that an error repeats


class RequestError(Exception):
    """A request failed; `final` if another try would fail too.

    cause: the kind of failure, the same for every request that fails in this way.
    """

    def __init__(self, message: str, cause: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.cause, self.final = cause, final

    def again(self) -> RequestError:
        """Return an error that says the same, for another thread to raise."""
        return RequestError(str(self), self.cause, final=self.final)


class Server:
    """Whoever answers at http://host:port, or http://host:port#MODEL. Any thread may use it.

    name: the address as it is shown: without a password and a trailing /v1, with the model.
    model: the part after #, "" without one. is_local: whether the server runs on this machine.
    """

    def __init__(self, url: str, timeout: float) -> None:
        """timeout: seconds that an answer may take. Raises ModelError for an invalid address."""
        if not 0 < timeout <= MAX_TIMEOUT:
            raise ColmError(
                f"expert_timeout is {timeout!r}; expected seconds, more than 0 and at most "
                f"{MAX_TIMEOUT:g}"
            )
        self._httpx = httpx = import_httpx()
        address, _, self.model = url.partition("#")
        shown = re.sub(r"//[^/@#]*@", "//", url)  # without a password
        try:
            parsed = httpx.URL(address)
        except httpx.InvalidURL as e:
            raise ModelError(f"{shown}: {e}; expected http://host:port") from e
        if not parsed.host or not 0 < (parsed.port or 80) < 1 << 16:
            raise ModelError(f"{shown} is not an address; expected http://host:port")
        if parsed.query:
            raise ModelError(f"{shown} has a query; expected http://host:port")
        self.is_local = is_this_machine(parsed.host)
        self.address = str(parsed.copy_with(userinfo=b"")).rstrip("/").removesuffix("/v1")
        self.name = f"{self.address}#{self.model}" if self.model else self.address
        key = os.environ.get(EXPERT_KEY_VARIABLE, "")
        if not (key.isascii() and key.isprintable()):
            raise ModelError(
                f"the variable {EXPERT_KEY_VARIABLE} has characters that a key cannot have; "
                "expected printable ASCII"
            )
        self._timeout = timeout
        self._client = httpx.Client(
            trust_env=not self.is_local,  # a proxy is not asked for this machine
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            # A small answer could unpack to any size.
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            auth=(parsed.username, parsed.password) if parsed.userinfo else None,
        )
        self._ends = threading.local()
        for transport in (self._client._transport, *self._client._mounts.values()):
            if transport is not None:  # httpx has no total time, and no place to say one
                pool = transport._pool
                pool._network_backend = _Timely(pool._network_backend, self._seconds_left)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def request(self, path: str, body: Body | None = None) -> Any:
        """Return the JSON that answers a GET, or a POST if there is a body.

        Raises RequestError, and ModelError once it is closed.
        """
        try:
            status, content = self._exchange(path, body)
        except (self._httpx.ReadTimeout, self._httpx.WriteTimeout) as e:
            message = f"no answer in {self._timeout:g} seconds (--expert-timeout)"
            raise RequestError(f"{path}: {message}", "timeout") from e
        except (self._httpx.HTTPError, UnicodeError) as e:
            what = type(e).__name__
            raise RequestError(f"{path}: {str(e) or what}", what) from e
        except RuntimeError as e:
            if not self._client.is_closed:
                raise
            raise ModelError("the pair is closed; load it again") from e
        if status != 200:
            message = _message_in(content)
            if status in (401, 403):
                message += f" (set the variable {EXPERT_KEY_VARIABLE} to its key)"
            busy = status >= 500 or status in (408, 429)
            cause = f"HTTP {status}"
            raise RequestError(f"{path}: {cause}: {message}", cause, final=not busy)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as e:
            raise RequestError(f"{path}: its answer is not valid JSON", "no JSON") from e

    def _exchange(self, path: str, body: Body | None) -> tuple[int, bytes]:
        """Return the status and the body of an answer that comes in time and is not too large."""
        method, content = "GET" if body is None else "POST", bytearray()
        self._ends.at = time.monotonic() + self._timeout
        with self._client.stream(method, self.address + path, json=body) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                message = "its answer is compressed, which it was not asked for"
                raise RequestError(f"{path}: {message}", "compressed", final=True)
            for piece in response.iter_raw():
                content += piece
                if len(content) > MOST_BYTES:
                    message = f"its answer has more than {MOST_BYTES >> 20} MB"
                    raise RequestError(f"{path}: {message}", "size", final=True)
            return response.status_code, bytes(content)

    def _seconds_left(self) -> float:
        """Return the seconds that this thread's request may still take."""
        return float(self._ends.at - time.monotonic())


class _Timely:
    """A network of httpcore, or a stream of it, each of whose reads and writes ends in time: a
    server that sends a byte now and then would otherwise never end, in its headers either."""

    def __init__(self, inner: Any, seconds_left: Callable[[], float]) -> None:
        self._inner, self._left = inner, seconds_left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def connect_tcp(self, *args: Any, **more: Any) -> _Timely:
        return _Timely(self._inner.connect_tcp(*args, **more), self._left)

    def start_tls(self, *args: Any, **more: Any) -> _Timely:
        return _Timely(self._inner.start_tls(*args, **more), self._left)

    def read(self, most: int, timeout: float | None = None) -> bytes:
        return bytes(self._inner.read(most, self._within(timeout)))

    def write(self, content: bytes, timeout: float | None = None) -> None:
        # httpcore gives each part that is sent all of the time again.
        for at in range(0, len(content), WRITTEN_AT_ONCE):
            self._inner.write(content[at : at + WRITTEN_AT_ONCE], self._within(timeout))

    def _within(self, timeout: float | None) -> float:
        import httpcore

        left = self._left()
        if left <= 0:
            raise httpcore.ReadTimeout
        return left if timeout is None else min(left, timeout)


def _message_in(content: bytes) -> str:
    """Return what a server says is wrong: the message of an OpenAI error, or else all of it."""
    try:
        text = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content[: 4 * TOLD].decode("utf-8", "replace")
    return " ".join(text[:TOLD].split())


def import_httpx() -> Any:
    """Return httpx. Raises ModelError with the cure where it is missing."""
    try:
        import httpx
    except ModuleNotFoundError as e:
        raise ModelError(
            "a remote expert needs httpx; install the extra: pip install 'colm-edge[remote]'"
        ) from e
    return httpx
