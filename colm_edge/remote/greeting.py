"""What an expert's server tells of itself before it is asked for tokens: its kind, its model, and
how it tokenizes some texts."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from colm_edge.errors import ModelError
from colm_edge.llama.held import common_prefix
from colm_edge.llama.model import Model
from colm_edge.llama.vocabulary import MAX_VOCAB_DIFFERENCE
from colm_edge.remote import colm_edge, llama_cpp, vllm
from colm_edge.remote.dialect import Dialect
from colm_edge.remote.http import TOLD, RequestError, Server

DIALECTS = {
    dialect.owner: dialect for dialect in (llama_cpp.DIALECT, vllm.DIALECT, colm_edge.DIALECT)
}
MOST_TOKENS = 1 << 20  # of a vocabulary; real ones have less than 300,000
# Texts that both sides tokenize, besides words of the base's vocabulary.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, 3.14159 and 1,000,000; (a+b)^2 = a^2 + 2ab + b^2!",
    "def f(x):\n    return [i ** 2 for i in range(x)]\n\n\tprint(f(10))",
    "Größe, señor, déjà vu — naïve “quotes” … 中文 русский العربية 😀",
)
# What is raised by reading an answer of another shape.
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Greeting:
    """What a server told. model: its name there. n_vocab, n_ctx: None where it does not tell.

    difference: where its vocabulary differs from the base's, "" if it does not. probed: its tokens
    of the texts that were compared, which tell one vocabulary from another.
    """

    dialect: Dialect
    model: str
    n_vocab: int | None
    n_ctx: int | None
    difference: str
    probed: tuple[tuple[int, ...], ...]


def greet(server: Server, base: Model) -> Greeting:
    """Ask a server what it is, and compare its vocabulary with the base's.

    Raises RequestError, and ModelError for a server of an unknown kind or without the model.
    """
    listed = server.request("/v1/models")
    try:
        entry = _chosen(server, {str(entry["id"]): entry for entry in listed["data"]})
        owner, model = str(entry.get("owned_by")), str(entry["id"])
        meta = entry.get("meta") or {}
        n_vocab = int(meta.get("n_vocab") or 0) or None
        n_ctx = int(entry.get("max_model_len") or meta.get("n_ctx") or 0) or None
        if min(n_ctx or 1, n_vocab or 1) <= 0:
            raise ValueError(f"a context of {n_ctx} tokens, a vocabulary of {n_vocab}")
    except MALFORMED as e:
        message = f"its list of models is malformed ({shown(e)})"
        raise RequestError(message, "malformed") from e
    dialect = DIALECTS.get(owner)
    if dialect is None:
        raise ModelError(
            f"{server.name}: an unknown kind of server, {owner!r}; expected one of "
            f"{', '.join(DIALECTS)}"
        )
    probed: list[tuple[int, ...]] = []

    def tokenized(text: str) -> list[int]:
        answer = server.request("/tokenize", dialect.tokenize(model, text))
        try:
            theirs = [int(token) for token in answer["tokens"]]
            if not all(0 <= token < MOST_TOKENS for token in theirs):
                raise ValueError("a token's id that no vocabulary has")
        except MALFORMED as e:
            message = f"its answer to /tokenize is malformed ({shown(e)})"
            raise RequestError(message, "malformed") from e
        probed.append(tuple(theirs))
        return theirs

    difference = _difference(base, n_vocab, tokenized)
    return Greeting(dialect, model, n_vocab, n_ctx, difference, tuple(probed))


def _chosen(server: Server, models: dict[str, Any]) -> Any:
    """Return the model that the address names, or the only one. Raises as `greet` does."""
    named, names = server.model, ", ".join(models)
    if not models:
        raise RequestError("its list of models is empty", "no model")
    if named in models:
        return models[named]
    if named:
        raise ModelError(f"{server.name}: the server has no such model; it has {names}")
    if len(models) > 1:
        raise ModelError(
            f"{server.name}: the server has several models; add # and the name of one: {names}"
        )
    return next(iter(models.values()))


def _difference(base: Model, n_vocab: int | None, tokenized: Callable[[str], list[int]]) -> str:
    """Return where the two vocabularies differ, "" if they do not.

    tokenized: the server's token ids of a text.
    """
    found = ""
    for text in (*PROBES, probe_words(base)):
        ours, theirs = base.tokenize(text, special=False, bos=False), tokenized(text)
        if ours != theirs:
            at = common_prefix(array("i", ours), array("i", theirs))
            cut = text if len(text) < 60 else text[:57] + "…"
            one, other = (str(*ids[at : at + 1]) or "missing" for ids in (ours, theirs))
            found = found or f"token {at} of {cut!r} is {one} in the base, {other} in the expert"
    if n_vocab is not None and abs(base.n_vocab - n_vocab) > MAX_VOCAB_DIFFERENCE:
        most = f"at most {MAX_VOCAB_DIFFERENCE} more or fewer"
        return f"{base.n_vocab} tokens in the base, {n_vocab} in the expert ({most})"
    return found


def probe_words(base: Model) -> str:
    """Return plain words from all over the base's vocabulary; other vocabularies lack some."""
    tokens = range(0, base.n_vocab, max(1, base.n_vocab // 1000))
    pieces = [base.piece(token).decode("utf-8", "replace").strip() for token in tokens]
    return " ".join(piece for piece in pieces if piece.isascii() and piece.isalpha())


def shown(e: Exception) -> str:
    """Return an error as text, which may hold what the server sent: megabytes of it."""
    return repr(e)[:TOLD]
