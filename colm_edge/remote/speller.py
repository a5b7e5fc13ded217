"""What the tokens of an expert's server spell: the requests for it, and checks of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from colm_edge.remote.dialect import Body, Dialect, Spelt
from colm_edge.remote.greeting import MOST_TOKENS
from colm_edge.remote.http import TOLD, RequestError

T = TypeVar("T")
MOST_PIECE = 4096  # bytes of a token


class Line(Protocol):
    """The server, as `client.RemoteExpert` reaches it."""

    model: str
    is_same: bool | None

    def connected(self) -> Dialect: ...

    def read(
        self, dialect: Dialect, body: Body | None, read: Callable[[Any], T], path: str = ""
    ) -> T: ...

    def with_retries(self, work: Callable[[], T], *, settles: bool) -> T: ...


class Speller:
    """Asks a server what its tokens spell. All methods raise AbsentExpertError when it fails, or
    ModelError if it is required."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._keeps_names: bool | None = None

    def is_same(self) -> bool:
        """Return whether the server has the base's own vocabulary."""
        if self._line.is_same is None:
            self._tried(self._line.connected)
        return bool(self._line.is_same)

    def keeps_names(self) -> bool:
        """Return whether names of control tokens in a text can stay text there."""
        if self._keeps_names is None:
            self._keeps_names = self._tried(self._line.connected).spelling.keeps_names
        return self._keeps_names

    def end_name(self) -> str:
        """Return the name of the token that ends the server's texts, "" if it does not tell."""

        def read(answer: Any) -> str:
            name = answer.get("eos_token")
            return name[:TOLD] if isinstance(name, str) else ""

        def work() -> str:
            dialect = self._line.connected()
            about = dialect.spelling.about
            return self._line.read(dialect, None, read, about) if about else ""

        return self._tried(work)

    def spelt(
        self,
        text: str,
        learn: Callable[[Spelt], None] | None = None,
        *,
        special: bool = False,
        begin: bool = False,
    ) -> Spelt:
        """Return a text's tokens and their bytes. special, begin: as in `dialect.Tokenize`.

        learn: called with them; may raise ValueError for what cannot be.
        """

        def work() -> Spelt:
            dialect = self._line.connected()

            def read(answer: Any) -> Spelt:
                spelt = dialect.spelling.read(answer, text)
                if not 0 < len(spelt) <= len(text.encode()) + 8:
                    raise ValueError(f"{len(spelt)} tokens of {len(text)} characters")
                for token, piece in spelt:
                    check_piece(token, piece)
                    if not piece:
                        raise ValueError(f"token {token} of a text has no bytes")
                if learn is not None:
                    learn(spelt)
                return spelt

            body = dialect.tokenize(
                self._line.model, text, special=special, begin=begin, pieces=True
            )
            return self._line.read(dialect, body, read, "/tokenize")

        return self._tried(work)

    def pieces(
        self,
        tokens: Sequence[int],
        parting: tuple[str, int],
        learn: Callable[[Spelt, bool], None],
    ) -> None:
        """Ask what tokens spell that the server named as likely.

        parting: the name and the id of a control token. learn: called with the tokens and their
        bytes, none where they cannot be told, and whether these are exact.
        """

        def work() -> None:
            dialect = self._line.connected()
            spelling = dialect.spelling
            if spelling.pieces is None or spelling.read_pieces is None:
                return learn([(token, b"") for token in tokens], True)
            read_pieces = spelling.read_pieces

            def read(answer: Any) -> None:
                found = read_pieces(answer, tokens, parting[0])
                learn([(token, found.get(token, b"")) for token in tokens], spelling.is_exact)

            body = spelling.pieces(self._line.model, tokens, parting)
            return self._line.read(dialect, body, read, "/detokenize")

        self._tried(work)

    def refuse(self, why: str) -> NoReturn:
        """Raise AbsentExpertError for a text that the server cannot go on from."""

        def work() -> NoReturn:
            raise RequestError(why, "spelling", final=True)

        self._tried(work)
        raise AssertionError

    def _tried(self, work: Callable[[], T]) -> T:
        return self._line.with_retries(work, settles=False)


def check_piece(token: int, piece: bytes) -> None:
    """Raise ValueError for what no vocabulary has."""
    if not 0 <= token < MOST_TOKENS:
        raise ValueError(f"a token {token}, which no vocabulary has")
    if len(piece) > MOST_PIECE:
        raise ValueError(f"token {token} has {len(piece)} bytes")
