"""Score texts with several experts, each loaded by itself beside the base."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colm_edge.errors import DataError
from colm_edge.switch.file import role_of
from colm_edge.train.documents import MIN_LINES, Row, held_back_lines, tokenized
from colm_edge.train.fit import models_of
from colm_edge.train.prompts import answer_prompts, read_prompts
from colm_edge.train.scores import Scores
from colm_edge.train.scoring import MakeProgress, score
from colm_edge.train.team import TeamScores, likeliest_writers

if TYPE_CHECKING:
    from colm_edge.pair import Pair

# An expert's name -> its pair with the base, open inside the `with` block.
OpenPair = Callable[[str], AbstractContextManager["Pair"]]


def as_one_team(open_pair: OpenPair, names: Sequence[str]) -> OpenPair:
    """Return what opens the same pairs, each with the token ids that the base shares with all the
    experts, and with the context that fits all: these it has when they answer together."""
    shared, contexts = [], []
    for name in names:
        with open_pair(name) as pair:
            shared.append(pair.n_shared)
            contexts.append(pair.n_ctx)

    @contextmanager
    def opened(name: str) -> Iterator[Pair]:
        with open_pair(name) as pair:
            pair.most_shared, pair.n_ctx = min(shared), min(contexts)
            yield pair

    return opened


def of_expert(name: str, progress: MakeProgress) -> MakeProgress:
    """Return what makes progress bars that name an expert."""
    return lambda what, total: progress(f"{name}: {what}", total)


@dataclass(frozen=True)
class TeamData:
    """What a switch for several experts is fitted to. info: the models, as a switch remembers
    them."""

    team: TeamScores
    held_back: set[int]  # lines
    info: dict[str, str]
    n_cut: int  # documents that the context, or answers that the limit, ended
    n_dropped: int  # documents without a token to score
    n_answers: int | None = None  # of prompts


def score_texts(
    open_pair: OpenPair,
    names: Sequence[str],
    rows: Sequence[Row],
    progress: MakeProgress,
    *,
    raw: bool,
    work: Path,
    seed: int,
) -> TeamData:
    """Score every text with the base and each expert. work: as in `score`; seed: of a fit."""
    found, info = list[Scores](), {"expert_names": " ".join(names)}
    held_back, n_cut, n_dropped = set[int](), 0, 0
    opened = as_one_team(open_pair, names)
    for name in names:
        with opened(name) as pair:
            documents, bar = tokenized(rows, pair, raw=raw, work=work), of_expert(name, progress)
            held_back = held_back_lines(documents, seed)
            n_cut, n_dropped = documents.n_cut, documents.n_dropped
            found.append(score(pair, documents, bar, work=work))
            info |= _named(models_of(pair, None, elsewhere=False), name)
    team = TeamScores(found, likeliest_writers(found), by_all=True)
    return TeamData(team, held_back, info, n_cut, n_dropped)


def score_answers(
    open_pair: OpenPair,
    names: Sequence[str],
    rows: Sequence[Row],
    progress: MakeProgress,
    *,
    raw: bool,
    work: Path,
    seed: int,
    max_tokens: int,
    n_slots: int,
) -> TeamData:
    """Let each expert answer its prompts, those whose "expert" names it, and score the answers with
    it and the base. The other arguments are those of `answer_prompts`.

    Raises DataError for a prompt that names no expert, and an expert with too few prompts.
    """
    found, writers, held_back = list[Scores](), list[int](), set[int]()
    info, n_cut, n_answers = {"expert_names": " ".join(names)}, 0, 0
    by_name, opened = by_expert(rows, names), as_one_team(open_pair, names)
    with opened(names[0]) as pair:  # a bad prompt of the last one would be found after hours
        for each in by_name.values():
            deque(read_prompts(each, pair, raw), maxlen=0)
    for k, name in enumerate(names):
        with opened(name) as pair:
            bar = of_expert(name, progress)
            answered = answer_prompts(
                pair, by_name[name], bar, max_tokens=max_tokens, n_slots=n_slots, raw=raw,
                work=work / name,
            )  # fmt: skip
            documents = answered.documents
            scores = score(pair, documents, bar, work=work / name, recorded=answered.recorded)
            info |= _named(models_of(pair, None, elsewhere=False), name)
        found.append(scores)
        writers += [k] * len(scores.base)
        held_back |= held_back_lines(documents, seed)
        n_cut, n_answers = n_cut + answered.n_cut, n_answers + len(answered.entries)
    team = TeamScores(found, np.array(writers, np.int64), by_all=False)
    return TeamData(team, held_back, info, n_cut, 0, n_answers)


def by_expert(rows: Iterable[Row], names: Sequence[str]) -> dict[str, list[Row]]:
    """Return the rows of each expert, by its name in their "expert".

    Raises DataError for a row that names none of them, and an expert with too few to hold any back.
    """
    found: dict[str, list[Row]] = {name: [] for name in names}
    for number, row in rows:
        name = row.get("expert")
        if not isinstance(name, str) or name not in found:
            raise DataError(
                f"line {number}: expert is {name!r}; with several experts every "
                f"prompt names the one that answers it: {', '.join(names)}"
            )
        found[name].append((number, row))
    for name, own in found.items():
        if len(own) < MIN_LINES:
            raise DataError(
                f"{len(own)} prompts name the expert {name}; expected at least {MIN_LINES}, to "
                "hold one back: give it more, or leave it out"
            )
    return found


def _named(info: dict[str, str], name: str) -> dict[str, str]:
    """Return what a switch remembers of a pair with the expert's under its name."""
    prefix = role_of(name)
    return {
        key.replace("expert", prefix, 1) if key.startswith("expert") else key: value
        for key, value in info.items()
    }
