"""Training text from prompts alone: the expert answers them, greedily and many at once.

Its likeliest tokens are kept with each answer, so the expert does not evaluate the text again: they
say how much it would dislike the base's choice, wherever that is among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from colm_edge.decode.bridge import NEAR_NATS
from colm_edge.errors import DataError, PromptError
from colm_edge.journal import MOST_SECONDS, Journal, is_count, is_number, key_of
from colm_edge.options import Options
from colm_edge.together import Done, Task, answer_together
from colm_edge.train.columns import LEAST_NATS, ROUNDING
from colm_edge.train.documents import Document, Documents, Row, gathered, prompt_of
from colm_edge.train.scoring import MakeProgress, Recorded, identity

if TYPE_CHECKING:
    from colm_edge.decode.step import Step
    from colm_edge.pair import Pair

EXPERT_ANSWERS_FILE = "expert-answers.jsonl"
# The expert's likeliest tokens that are kept of each position. Where the base's choice is not among
# them, it counts as likely as the last of them: on this much regret, more changes nothing.
N_KEPT = 8
N_LIMITS = 2  # of an entry: the context, and of the answer
N_PACE = 4  # what an entry's pace tells: `pace_of`, and the schedule; older entries have none


@dataclass(frozen=True)
class Answered:
    """The expert's answers, as documents of tokens, and what it thought of each token."""

    documents: Documents
    recorded: Recorded
    entries: list[dict[str, Any]]  # one for each row: text, tokens, ids, logprobs, seconds, cut

    @property
    def n_cut(self) -> int:
        """How many answers the limit or the context ended."""
        return sum(entry["cut"] for entry in self.entries)


def distinct(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Return the rows that ask something new, and how many do not. What stands twice would be both
    fitted to and held back."""
    found: dict[str, Row] = {}
    n = 0
    for number, row in rows:
        found.setdefault(json.dumps([asked(row), row.get("expert")]), (number, row))
        n += 1
    return [*found.values()], n - len(found)


def answer_prompts(
    pair: Pair,
    rows: Iterable[Row],
    progress: MakeProgress,
    *,
    max_tokens: int,
    n_slots: int,
    raw: bool = False,
    schedule: Literal["fast", "sequential"] = "fast",
    work: Path | None = None,
) -> Answered:
    """Let the expert answer every row's prompt, or continue its messages.

    work: a folder that keeps each answer as it comes; those found there are not written again.
    Raises DataError with the number of a line that has no prompt, or one that does not fit.
    """
    prompts = list(read_prompts(rows, pair, raw))
    if not prompts:
        raise DataError("the data has no prompts; expected one JSON object a line")
    journal = Journal(work and work / EXPERT_ANSWERS_FILE)
    options = Options(
        temperature=0.0, threshold=0.0, max_tokens=max_tokens, n_probs=N_KEPT, schedule=schedule
    )
    pace = [*pace_of(pair, n_slots), schedule]
    # The base says how an answer is spelt, and where it may end.
    what = [*identity(pair, pair.members[:1]), pair.n_shared]
    keys = [key_of(what, p.tokens) for p in prompts]
    limits = [pair.n_ctx, max_tokens if max_tokens >= 0 else pair.n_ctx]
    entries: dict[int, dict[str, Any]] = {}
    is_kept = partial(_is_kept, n_vocab=pair.n_shared)
    for i, key in enumerate(keys):
        known = journal.get(key, is_kept)
        if known is not None and _is_whole(known, len(prompts[i].tokens), limits):
            entries[i] = known
    tasks = [Task(i, p.tokens, options) for i, p in enumerate(prompts) if i not in entries]
    with progress("answers", len(prompts)) as bar, ExitStack() as open_answers:
        bar.update(len(entries))
        written: Iterable[Done] = ()
        if tasks:
            written = open_answers.enter_context(closing(answer_together(pair, tasks, n_slots)))
        for done in written:
            i = done.task.key
            entry = entries[i] = {**_entry(done), "limits": limits, "pace": pace}
            journal.add(keys[i], entry)
            bar.update(1)
    found = [(prompts[i], entries[i]) for i in sorted(entries) if entries[i]["tokens"]]
    if not found:
        raise DataError("the expert gave no answer to any prompt")
    documents = gathered(
        (Document([*p.tokens, *entry["tokens"]], p.start, p.line) for p, entry in found),
        pair.n_ctx,
        work,
    )
    recorded = {
        key: (np.array(entry["ids"], np.int32), np.array(entry["logprobs"], np.float64))
        for key, (_, entry) in zip(documents.keys.tolist(), found, strict=True)
    }
    return Answered(documents, recorded, [entries[i] for i in range(len(prompts))])


def pace_of(pair: Pair, n_slots: int) -> list[Any]:
    """Return what the time that answers take depends on, and hardly their text: how many are
    written at once, how the contexts are set up, and where each model is."""
    context = pair.base_session.options
    models = [pair.base, *(member.model for member in pair.members)]
    places = [  # a server tells none
        [getattr(model, "n_gpu_layers", None), *getattr(model, "rpc", ())] for model in models
    ]
    set_up = [context.n_threads, context.threads_auto, context.n_ubatch, context.flash_attn]
    return [n_slots, set_up, [*places, *(member.overlaps for member in pair.members)]]


def read_prompts(rows: Iterable[Row], pair: Pair, raw: bool) -> Iterator[Document]:
    """Yield each prompt as a document that begins where the answer will."""
    for number, row in rows:
        if not row.keys() & {"prompt", "messages"}:
            raise DataError(f"line {number}: expected prompt, a text, or messages")
        if row.get("prompt") == "" and "messages" not in row:
            raise DataError(f"line {number}: the prompt is empty; write one, or remove the line")
        try:
            tokens = prompt_of(pair, asked(row), raw=raw)
            pair.check_prompt(tokens, 0.0)
        except PromptError as e:
            raise DataError(f"line {number}: {e}") from e
        if len(tokens) == pair.n_ctx:
            raise DataError(f"line {number}: the prompt leaves no room for an answer; raise -c")
        yield Document(tokens, len(tokens), number)


def asked(row: dict[str, Any]) -> Any:
    """Return the conversation that a line asks to be continued: its prompt, or its messages without
    the answer at their end, if they have one."""
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    while isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        if messages[-1].get("role") != "assistant":
            break
        messages = messages[:-1]
    return messages


def _entry(done: Done) -> dict[str, Any]:
    """Return what is kept of an answer; its end token is one of the tokens."""
    steps: list[Step] = [*done.answer.steps, *([done.end] if done.end is not None else [])]
    return {
        "text": done.answer.text,
        "tokens": [step.token for step in steps],
        "ids": [[token for token, _ in _top(step)] for step in steps],
        "logprobs": [[round(logprob, 4) for _, logprob in _top(step)] for step in steps],
        "seconds": done.seconds,
        "cut": done.answer.finish_reason == "length",
    }


def _is_whole(entry: dict[str, Any], n_prompt: int, limits: list[int]) -> bool:
    """Return whether these limits, of the context and of an answer, would give the same answer."""
    if entry["limits"] == limits:
        return True
    n = len(entry["tokens"])
    return not entry["cut"] and n <= limits[1] and n_prompt + n <= limits[0]


def _is_kept(entry: dict[str, Any], n_vocab: int) -> bool:
    """Return whether an entry of a journal is what `_entry` keeps."""
    tokens, tops, logprobs = entry["tokens"], entry["ids"], entry["logprobs"]
    return (
        isinstance(entry["text"], str)
        and is_number(entry["seconds"], 0, MOST_SECONDS)
        and isinstance(entry["cut"], bool)
        and isinstance(limits := entry["limits"], list)
        and len(limits) == N_LIMITS
        and all(is_count(limit) for limit in limits)
        and isinstance(pace := entry.get("pace", [None] * N_PACE), list)
        and len(pace) == N_PACE
        and all(isinstance(each, list) for each in (tokens, tops, logprobs))
        and len(tokens) == len(tops) == len(logprobs)
        and all(is_count(token, n_vocab) for token in tokens)
        and all(isinstance(top, list) and len(top) == N_KEPT for top in (*tops, *logprobs))
        and all(is_count(token) or token == -1 for top in tops for token in top)
        and all(is_number(x, LEAST_NATS, ROUNDING) for top in logprobs for x in top)
    )


def _top(step: Step) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens, padded where fewer are known, as behind a bridge: what it leaves
    out is less likely than all that it looks at."""
    return step.top + ((-1, min(step.top[-1][1], -NEAR_NATS)),) * (N_KEPT - len(step.top))
