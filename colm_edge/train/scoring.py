"""Scoring: what each model says of every token of the data.

Each model evaluates the data once, several documents at a time. With a work folder the results are
files in it, mapped into memory once they are complete; a run that was killed goes on where it
stopped.

    tokens.int32                token ids of all documents
    token.int32, line.int64, importance.float64
                              of every scored token, in the documents' order
    base-<hash>/              columns logprob, likeliest, hidden, features (see FolderStore)
    choice-<hash>/            the base's for `score_expert`: logprob, likeliest
    expert-<hash>/            columns logprob, right, best, choice
    base-<hash>-<n>/          the same where models share only the first n token ids
    expert-answers.jsonl      what the expert wrote to prompts (prompts.py)
    answers.jsonl             of every method (evaluate/generate.py)
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Doubles, Floats, Ints, Tokens
from colm_edge.decode.bridge import NEAR_NATS
from colm_edge.decode.step import ZERO_PROBABILITY
from colm_edge.errors import AbsentExpertError, ColmError, DataError
from colm_edge.journal import key_of
from colm_edge.llama.model import Model
from colm_edge.remote.client import RemoteSession
from colm_edge.team import ends_of
from colm_edge.train.columns import Columns, check_columns
from colm_edge.train.documents import Documents
from colm_edge.train.importance import importance
from colm_edge.train.score_files import read_scores, write_scores
from colm_edge.train.scores import Scores
from colm_edge.train.store import FolderStore, MemoryStore, RowTypes, disk_errors, stored

if TYPE_CHECKING:
    from colm_edge.llama.scorer import Scorer
    from colm_edge.pair import Pair
    from colm_edge.remote.client import RemoteExpert
    from colm_edge.team import Member

BRIDGE_OUTPUTS = 64  # of an expert of another vocabulary, at once; each takes n_vocab floats
COPY_ROWS = 1 << 14  # written at once
PACK_TOKENS = 1024  # of short documents, evaluated together


class Bar(Protocol):
    """A progress bar: `update(n)` says how many more tokens were scored."""

    def update(self, n_steps: int) -> None: ...


MakeProgress = Callable[[str, int], AbstractContextManager[Bar]]
Shard = tuple[int, int]  # (k, n): the k-th of n parts
# What an expert told while it wrote documents, by their keys: of each of the tokens, its likeliest
# ones, best first, (n, k), and their log-probabilities.
Recorded = Mapping[int, tuple[Tokens, Doubles]]


def score(
    pair: Pair,
    documents: Documents,
    progress: MakeProgress,
    *,
    work: Path | None = None,
    expert_scores: Sequence[Path] = (),
    recorded: Recorded | None = None,
) -> Scores:
    """Evaluate every document once with each model.

    work: a folder that keeps the results; documents that it has scores of, also those of a killed
    run, are not evaluated again. It may hold other data and other experts, not another base.
    expert_scores: the files that `score_expert` wrote, instead of the expert. recorded: what the
    expert told when it wrote the documents, for which it is then not evaluated.

    Raises DataError for score files that do not belong to these documents, for another base's
    folder and for a full disk, ColmError for a model that gives NaN.
    """
    elsewhere = None
    if expert_scores:
        elsewhere = read_scores(expert_scores, documents, pair.base.fingerprint)
    base = score_model(pair, "base", documents, progress, work=work)
    likeliest = base["likeliest"]
    if recorded is not None:
        expert = _from_records(recorded, documents, likeliest)
    else:
        expert = elsewhere or score_model(
            pair, "expert", documents, progress, work=work, choices=likeliest
        )
    ends = ends_of(pair.base, pair.members)
    weigh = partial(importance, documents, likeliest, pair.base.piece, ends)
    return Scores(
        hidden=base["hidden"],
        logit_features=base["features"],
        base=base["logprob"],
        likeliest=likeliest,
        **_by_expert(expert),
        **_by_document(documents, weigh, work),
    )


def score_each(
    pair: Pair, documents: Documents, progress: MakeProgress, *, work: Path | None = None
) -> list[Scores]:
    """Evaluate every document once with the base and each expert; return the scores with each
    expert. work: as in `score`."""
    first = score(pair, documents, progress, work=work)
    others = (
        score_model(
            pair, "expert", documents, progress,
            work=work, choices=first.likeliest, which=which,
        )
        for which in range(1, len(pair.members))
    )  # fmt: skip
    return [first, *(replace(first, **_by_expert(columns)) for columns in others)]


def _by_expert(columns: Columns) -> Columns:
    """Return an expert's columns by their names in `Scores`."""
    names = {"expert": "logprob", "best": "best", "choice": "choice", "expert_right": "right"}
    return {name: columns[column] for name, column in names.items()}


def _from_records(recorded: Recorded, documents: Documents, choices: Tokens) -> Columns:
    """Return the expert's columns as it told them itself. A token that is not among those that it
    named counts as likely as the last of these."""
    rows = [_rows_of(recorded, documents, i) for i in range(len(documents))]
    ids = np.concatenate([ids for ids, _ in rows])
    logprobs = np.concatenate([logprobs for _, logprobs in rows])
    gold = documents.scored(0, len(documents))

    def logprob_of(tokens: Tokens) -> Doubles:
        named = ids == tokens[:, None]
        place = np.where(named.any(axis=1), named.argmax(axis=1), ids.shape[1] - 1)
        return np.take_along_axis(logprobs, place[:, None], axis=1)[:, 0]

    return {
        "logprob": logprob_of(gold),
        "right": ids[:, 0] == gold,
        "best": logprobs[:, 0],
        "choice": logprob_of(choices),
    }


def _rows_of(recorded: Recorded, documents: Documents, i: int) -> tuple[Tokens, Doubles]:
    ids, logprobs = recorded[documents.key(i)]
    n = int(documents.counts[i])
    return ids[:n], logprobs[:n]


def _by_document(
    documents: Documents, weigh: Callable[[int, int], Doubles], work: Path | None
) -> Columns:
    """Return token, line and importance of every row, (n,) each; with a work folder from its files.
    weigh: gives the importance in the documents from one to before another."""
    columns: Columns = {}
    for name, kind, rows in (
        ("token", np.dtype(np.int32), documents.scored),
        ("line", np.dtype(np.int64), documents.scored_lines),
        ("importance", np.dtype(np.float64), weigh),
    ):
        if work is None:
            columns[name] = rows(0, len(documents))
        else:
            parts = (rows(first, last) for first, last in documents.chunks(COPY_ROWS))
            path = work / f"{name}.{kind.name}"
            columns[name] = stored(path, kind, documents.n_scored, parts)
    return columns


def score_expert(
    pair: Pair,
    documents: Documents,
    path: Path,
    progress: MakeProgress,
    *,
    shard: Shard = (1, 1),
    work: Path | None = None,
) -> dict[str, Any]:
    """Write the expert's log-probabilities of the documents to a file that `score` reads.

    shard: (k, n), to score only the k-th of n parts, by `bounds_of`. work: as in `score`.

    Returns a summary. Raises WriteError when the file cannot be written, and DataError for a shard
    without documents.
    """
    first, last = bounds_of(documents, shard)
    part = documents if shard == (1, 1) else documents[first:last]
    base = score_model(pair, "choice", part, progress, work=work)
    columns = score_model(pair, "expert", part, progress, work=work, choices=base["likeliest"])
    names = pair.expert.name, pair.base.fingerprint
    write_scores(path, part, first, len(documents), columns, *names)
    return {
        "model": pair.expert.name,
        "n_documents": len(part),
        "n_tokens": part.n_scored,
        "n_cut": documents.n_cut,
        "n_dropped": documents.n_dropped,
        "nll": float(-columns["logprob"].mean()),
    }


def bounds_of(documents: Documents, shard: Shard) -> tuple[int, int]:
    """Return the number of a shard's first document, and of the one after its last.

    A shard is made of whole groups that are evaluated together, so its scores are to the last bit
    those that it would have among all.
    """
    k, n = shard
    groups = list(_groups(documents, np.arange(len(documents))))
    chosen = groups[len(groups) * (k - 1) // n : len(groups) * k // n]
    if not chosen:
        raise DataError(
            f"shard {k} of {n} has no documents: the data makes {len(groups)} batches; use at most "
            "so many shards"
        )
    return int(chosen[0][0]), int(chosen[-1][-1]) + 1


def score_model(
    pair: Pair,
    name: Literal["base", "choice", "expert"],
    documents: Documents,
    progress: MakeProgress,
    *,
    work: Path | None = None,
    choices: Tokens | None = None,
    which: int = 0,
) -> Columns:
    """Evaluate every document with one model, except for those that the work folder has scores of.

    Returns columns of a row for each scored token: logprob float64 of the gold token in nats; of
    the base likeliest int32, hidden float32 (n, n_embd) and features float32 (n, 8); of the expert
    right bool, and best and choice float64, the log-probabilities of its own likeliest token and of
    choices (n,), the base's likeliest; NaN from a server. "choice" is the base without hidden and
    features. which: of several experts.
    """
    types: RowTypes = {"logprob": np.dtype(np.float64)}
    if name == "expert":
        assert choices is not None, "an expert is asked about the base's choices"
        types |= {"right": np.dtype(np.bool_), "best": np.dtype(np.float64)}
        types |= {"choice": np.dtype(np.float64)}
    else:
        types["likeliest"] = np.dtype(np.int32)
    if name == "base":
        types["hidden"] = np.dtype((np.float32, (pair.base.n_embd,)))
        types["features"] = np.dtype((np.float32, (len(readout.FEATURES),)))
    store: MemoryStore | FolderStore
    if work is None:
        store = MemoryStore(types, documents)
    else:
        folder = _model_folder(work, name, pair, which)
        store = FolderStore(folder, types, documents, n_choose=pair.n_shared)
    with ExitStack() as stack:
        stack.enter_context(store)
        bar = stack.enter_context(progress(name, documents.n_tokens))
        bar.update(documents.n_tokens - int(documents.lengths[store.to_do].sum()))
        scorer: Scorer | None = None
        expert = pair.members[which].timeline
        if name == "expert":
            pair.members[which].make_room()
        for group in _groups(documents, store.to_do):
            if name == "expert" and pair.members[which].crossing is not None:
                assert choices is not None
                columns = _score_across(pair.members[which], documents, group, choices)
            elif name == "expert" and isinstance(expert, RemoteSession):
                columns = _score_remotely(expert.expert, documents, group)
            else:
                scorer = scorer or stack.enter_context(_scorer(pair, name, which))
                columns = _score_locally(scorer, documents, group, pair.n_shared, choices)
            _check_told(columns, pair, name, which)
            store.append(columns, len(group))
            bar.update(int(documents.lengths[group].sum()))
    return store.columns()


def _check_told(columns: Columns, pair: Pair, name: str, which: int) -> None:
    """Raise ColmError for scores that no model gives, now rather than after the whole pass."""
    try:
        check_columns(columns, pair.n_shared)
    except ValueError as e:
        model = pair.members[which].timeline.name if name == "expert" else pair.base.path
        raise ColmError(f"{model}: {e}; the file or the server is broken") from e


def _scorer(pair: Pair, name: str, which: int) -> Scorer:
    from colm_edge.llama.scorer import Scorer

    session = pair.members[which].session if name == "expert" else pair.base_session
    # No smaller than in use: some models scale their positions by the context's size.
    return Scorer(session, max(PACK_TOKENS, session.n_ctx), hidden=name == "base")


def _groups(documents: Documents, to_do: Ints) -> Iterator[Ints]:
    """Yield the numbers of documents that are evaluated together.

    A store's documents end with whole groups, so an interrupted run goes on with the groups that
    it would have had: the last bits of a score depend on what was evaluated beside it.
    """
    from colm_edge.llama.scorer import MAX_SEQUENCES

    group: list[int] = []
    n_tokens = 0
    for i in to_do.tolist():
        n = int(documents.lengths[i])
        if group and (n_tokens + n > PACK_TOKENS or len(group) == MAX_SEQUENCES):
            yield np.array(group)
            group, n_tokens = [], 0
        group.append(i)
        n_tokens += n
    if group:
        yield np.array(group)


def _score_remotely(expert: RemoteExpert, documents: Documents, group: Ints) -> Columns:
    """Return a group's columns from an expert on a server."""
    spans = [documents.span(i) for i in group]
    logprobs, right = list[float](), list[bool]()
    for some, likeliest in expert.score(spans, documents.starts[group].tolist()):
        logprobs += some
        right += likeliest
    if not (np.array(logprobs) > ZERO_PROBABILITY).all():
        raise ColmError(f"{expert.url}: gives NaN or zero probability to a token of the data")
    untold = np.full(len(right), np.nan)
    columns: Columns = {"logprob": np.array(logprobs), "right": np.array(right, np.bool_)}
    return columns | {"best": untold, "choice": untold}


def _score_across(member: Member, documents: Documents, group: Ints, choices: Tokens) -> Columns:
    """Return a group's columns from an expert of another vocabulary: what its bridge says of the
    base's tokens. What it leaves out is as likely as the least that it looks at.

    Raises DataError for a line that is longer than the expert's context in its own tokens.
    """
    assert member.crossing is not None
    timeline = member.another() if member.here is None else member.across(member.session)
    n_vocab = member.crossing.ours.n_vocab
    columns: dict[str, list[Any]] = {name: [] for name in ("logprob", "right", "best", "choice")}
    for i in group:
        span, start = documents.span(i).tolist(), int(documents.starts[i])
        asked = choices[documents.scored_offsets[i] : documents.scored_offsets[i + 1]].tolist()
        for first in range(start, len(span), BRIDGE_OUTPUTS):
            last = min(first + BRIDGE_OUTPUTS, len(span))
            try:
                timeline.sync(array("i", span[:last]), range(first - 1, last - 1))
            except AbsentExpertError as e:
                line = documents.lines[i]
                raise DataError(f"line {line}: {e}; shorten it, or raise -c") from e
            for at in range(first, last):
                try:
                    logits, _ = timeline.state(at - 1)
                except AbsentExpertError:  # it prefers nothing that the base could write
                    logits = np.full(n_vocab, -NEAR_NATS, np.float32)
                gold, best = span[at], float(logits.max())
                columns["logprob"].append(max(float(logits[gold]), -NEAR_NATS))
                columns["right"].append(float(logits[gold]) == best > -NEAR_NATS)
                columns["best"].append(best)
                columns["choice"].append(max(float(logits[asked[at - start]]), -NEAR_NATS))
    return {name: np.array(values) for name, values in columns.items()}


def _score_locally(
    scorer: Scorer,
    documents: Documents,
    group: Ints,
    n_shared: int,
    choices: Tokens | None,
) -> Columns:
    """Return a group's columns from a model file; with hidden and features if the scorer has them.

    n_shared: the size of the vocabulary that both models share. choices: the base's likeliest
    tokens of all documents, if the model is the expert.
    """
    spans = [documents.span(i) for i in group]
    lengths, starts = documents.lengths[group], documents.starts[group]
    gold = np.concatenate([span[start:] for span, start in zip(spans, starts, strict=True)])
    asked = None
    if choices is not None:
        at = documents.scored_offsets
        asked = np.concatenate([choices[at[i] : at[i + 1]] for i in group])
    parts: list[Columns] = []
    done = 0
    for logits, hidden in scorer.score(np.concatenate(spans), lengths, starts):
        n = len(logits)
        try:
            some = None if asked is None else asked[done : done + n]
            parts.append(_read_outputs(logits, hidden, gold[done : done + n], n_shared, some))
        except ValueError as e:
            raise ColmError(
                f"{scorer.model.path}: gives NaN or zero probability to a token of the data; "
                f"the file is broken or not the model that the data needs ({e})"
            ) from e
        done += n
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read_outputs(
    logits: Floats,
    hidden: Floats,
    gold: Tokens,
    n_shared: int,
    choices: Tokens | None,
) -> Columns:
    """Return the columns of some outputs and their gold tokens, (n, n_vocab) and (n,).

    choices (n,): the base's likeliest tokens, if the outputs are the expert's.

    Raises ValueError for NaN, and where a gold token has no probability.
    """
    n = len(logits)
    features = np.empty((n, len(readout.FEATURES)), np.float32) if hidden.size else None
    likeliest, logsumexp = np.empty(n, np.int32), np.empty(n)
    readout.read_rows(logits, features, likeliest, logsumexp, n_shared)
    rows = np.arange(n)
    columns: Columns = {"logprob": logits[rows, gold] - logsumexp}
    if not np.isfinite(columns["logprob"]).all():
        raise ValueError("a token of the data has no probability")
    if choices is None:
        columns["likeliest"] = likeliest
    else:
        columns["right"] = likeliest == gold
        columns["best"] = logits[rows, likeliest] - logsumexp
        columns["choice"] = np.maximum(logits[rows, choices] - logsumexp, ZERO_PROBABILITY)
    if features is not None:
        columns |= {"hidden": hidden.copy(), "features": features}
    return columns


def identity(pair: Pair, members: Sequence[Member]) -> list[str]:
    """Return what identifies the evaluations of a pair's base and of these experts, beside what is
    evaluated: the files, how the context is kept, and its size where that scales positions."""
    options = pair.base_session.options
    models = [pair.base.fingerprint, *(member.timeline.fingerprint for member in members)]
    scaled = map(_scales_positions, (pair.base, *(member.model for member in members)))
    size = [str(pair.n_ctx)] if any(scaled) else []
    return [*models, options.cache_type_k, options.cache_type_v, *size]


def _scales_positions(model: Model | RemoteExpert) -> bool:
    """Return whether a model may read the same tokens otherwise in a larger context (LongRoPE)."""
    if not isinstance(model, Model):
        return False
    kind = model.metadata("general.architecture")
    return model.metadata(f"{kind}.rope.scaling.original_context_length") is not None


def _model_folder(work: Path, name: str, pair: Pair, which: int) -> Path:
    """Return the folder of a model's columns. Raises DataError if there is another base's.

    Each model has its own, so that no two are ever mixed, and an expert one for each base whose
    choices it was asked about; a former expert's folder stays, and is used again if that expert
    comes back. What each finds likeliest depends on the ids to choose from, so they are part of
    the name if they are not all.
    """
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    is_base = name != "expert"
    mark = key_of(*identity(pair, () if is_base else (pair.members[which],)))
    own, n = f"{name}-{mark[:8]}", pair.n_shared
    folder = work / (own if n == pair.base.n_vocab else f"{own}-{n}")
    others = [
        p for p in work.iterdir()
        if re.fullmatch(rf"{name}-[0-9a-f]{{8}}(-\d+)?", p.name) and not p.name.startswith(own)
    ]  # fmt: skip
    if is_base and others and not folder.exists():
        raise DataError(
            f"{others[0]}: holds scores of another model than {pair.base.path}, or by another "
            "cache type; name another work folder, or remove this one"
        )
    return folder
