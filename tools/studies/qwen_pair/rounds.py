"""Does a second, on-policy round of training pay? Compare heads on text that the pair wrote itself.

    python tools/studies/qwen_pair/rounds.py PROMPTS.jsonl WORK -m base.gguf -me expert.gguf

Round 1 is `colm-edge train --prompts`: both models are scored on the expert's answers; WORK is the
work folder of that run. Round 2: the pair answers some of the prompts, each at a defer rate drawn
for it, and both models are scored on those answers. A token of the base matters there, by rule W
(after FLy, arXiv 2511.22972), unless the expert is unsure itself, by the entropy of its three
likeliest tokens, and the next five tokens are its own choices. Heads are fitted on round 1 and on
both, and judged on answers of both rounds that were held back: by the share of the regret, of all
tokens or of those that matter, that they remove. What came out is in docs/studies/qwen-pair.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from colm_edge import load, readout
from colm_edge.arrays import Bools, Doubles, Floats, Ints
from colm_edge.decode.picker import likeliest
from colm_edge.files import replacing, sha256_of
from colm_edge.journal import Journal, is_count, key_of
from colm_edge.llama.scorer import Scorer
from colm_edge.options import Options
from colm_edge.pair import Pair
from colm_edge.together import Task, answer_together
from colm_edge.train.documents import Document, Documents, gathered, read_rows
from colm_edge.train.fit import feature_columns
from colm_edge.train.heads import Head, Standardised
from colm_edge.train.objectives import regret_loss, regret_removed
from colm_edge.train.prompts import answer_prompts
from colm_edge.train.scores import Scores
from colm_edge.train.scoring import identity, score

RATES = (0.03, 0.1, 0.2, 0.4)  # of round 2, drawn for each answer
ENTROPY, N_NEXT = 0.3, 5  # rule W
L2, FOLDS = 0.1, 4


@dataclass(frozen=True)
class Round:
    """The tokens of one round, and of each what it is fitted and judged by."""

    columns: Floats  # the base's state
    margin: Doubles
    regret: Doubles
    matters: Bools  # by rule W
    line: Ints

    def some(self, rows: Bools) -> Round:
        return Round(*(column[rows] for column in vars(self).values()))

    def and_(self, other: Round) -> Round:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Round(*(np.concatenate(pair) for pair in pairs))

    @property
    def weighed(self) -> Doubles:
        """The regret of the tokens that matter."""
        return np.where(self.matters, self.regret, 0.0)


@contextmanager
def bar(name: str, total: int) -> Iterator[Any]:
    with click.progressbar(length=total, label=name) as shown:
        yield SimpleNamespace(update=shown.update)


def of_scores(scores: Scores, matters: Bools | None = None) -> Round:
    names = ("hidden", *readout.FEATURES)
    rows = np.arange(len(scores.base))
    regret = scores.regret(rows)
    return Round(
        feature_columns(scores, rows, names),
        scores.logit_features[:, readout.FEATURES.index("margin")].astype(np.float64),
        regret,
        regret > 0 if matters is None else matters,
        scores.line.copy(),
    )


def own_answers(pair: Pair, prompts: list[tuple[int, str]], work: Path) -> Documents:
    """Let the pair answer, each prompt at a defer rate drawn for it."""
    journal = Journal(work / "own-answers.jsonl")
    draw = np.random.default_rng(0)
    tasks, keys = [], dict[int, str]()
    for line, prompt in prompts:
        tokens = pair.prompt_tokens([{"role": "user", "content": prompt}])
        options = Options(temperature=0.0, defer_rate=float(draw.choice(RATES)), max_tokens=400)
        models = *identity(pair, pair.members), sha256_of(pair.switch.name)
        keys[line] = key_of(models, options.changed, tokens)
        tasks.append(Task(line, tokens, options))
    todo = [task for task in tasks if journal.get(keys[task.key], _is_kept) is None]
    with bar("own answers", len(tasks)) as shown:
        shown.update(len(tasks) - len(todo))
        for done in answer_together(pair, todo, 20):
            steps = [*done.answer.steps, *([done.end] if done.end else [])]
            journal.add(keys[done.task.key], {"tokens": [step.token for step in steps]})
            shown.update(1)
    answers = ((task, (journal.get(keys[task.key], _is_kept) or {})["tokens"]) for task in tasks)
    return gathered(
        (Document([*task.tokens, *told], len(task.tokens), task.key) for task, told in answers),
        pair.n_ctx,
        work,
    )


def _is_kept(entry: dict[str, Any]) -> bool:
    return all(is_count(token) for token in entry["tokens"])


def unsure(pair: Pair, documents: Documents) -> Bools:
    """Return whether the expert is unsure of each scored token, (n,)."""
    found: list[bool] = []
    with (
        Scorer(pair.expert_session, 2048, hidden=False) as scorer,
        bar("entropy", len(documents)) as shown,
    ):
        for document in documents:
            tokens, lengths = np.array(document.tokens, np.int32), np.array([len(document.tokens)])
            for logits, _ in scorer.score(tokens, lengths, np.array([document.start])):
                for row in logits:
                    p = np.exp([x for _, x in likeliest(row, float(row.max()), 3)])
                    p /= p.sum()
                    found.append(bool(-(p * np.log(p)).sum() >= ENTROPY))
            shown.update(1)
    return np.array(found)


def by_rule_w(scores: Scores, is_unsure: Bools) -> Bools:
    """Return whether the base's choice at each position is a mismatch that matters."""
    n = len(scores.base)
    regret = scores.regret(np.arange(n))
    goes_on = np.ones(n, np.bool_)
    for k in range(1, N_NEXT + 1):  # after the end of an answer there is nothing that disagrees
        same_line = scores.line[k:] == scores.line[:-k]
        goes_on[:-k] &= scores.expert_right[k:] | ~same_line
    # Where the expert wrote, what follows the base's choice is not known.
    wrote = scores.token == scores.likeliest
    return np.asarray((regret > 0) & ~(wrote & is_unsure & goes_on), np.bool_)


def fitted(data: Round, target: Doubles) -> Head:
    loss = partial(regret_loss, target)
    block = Standardised(data.columns.copy())
    weight = np.zeros(data.columns.shape[1])
    weight[readout.FEATURES.index("margin") - len(readout.FEATURES)] = -1.0
    return block.fit(loss, L2, None, block.rescaled(Head(weight, 0.0), loss, 0.0))


def compare(first: Round, second: Round, common: set[int]) -> None:
    """Print what each head removes of both rounds' regret, by cross-validation over the prompts.

    common: the prompts that were answered in both rounds.
    """
    lines = np.random.default_rng(0).permutation(sorted(common))
    results: dict[str, list[Doubles]] = {}
    for k in range(FOLDS):
        held = lines[k::FOLDS]
        fit_1, fit_2 = (data.some(~np.isin(data.line, held)) for data in (first, second))
        both = fit_1.and_(fit_2)
        heads = {
            "margin": None,
            "round 1": fitted(fit_1, fit_1.regret),
            "round 2 alone, regret": fitted(fit_2, fit_2.regret),
            "both rounds, regret": fitted(both, both.regret),
            "both rounds, rule W in the second": fitted(
                both, np.concatenate([fit_1.regret, fit_2.weighed])
            ),
        }
        for name, head in heads.items():
            parts = []
            for data in (first, second):
                test = data.some(np.isin(data.line, held))
                rank = -test.margin if head is None else head(test.columns)
                parts += [regret_removed(rank, test.regret), regret_removed(rank, test.weighed)]
            results.setdefault(name, []).append(np.array(parts))
    click.echo("| fitted on | expert's answers | own answers | own, what matters |")
    click.echo("| --- | ---: | ---: | ---: |")
    for name, parts in results.items():
        mean = np.mean(parts, axis=0)
        cells = (" / ".join(f"{x:.3f}".removeprefix("0") for x in mean[i]) for i in (0, 2, 3))
        click.echo(f"| {name} | " + " | ".join(cells) + " |")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-m", "base", required=True)
@click.option("-me", "expert", required=True)
@click.option("-sw", "switch", default="package:switches/qwen2.5-coder.gguf", show_default=True)
@click.option("-n", "n_own", default=100, show_default=True, help="Prompts of round 2.")
@click.option("-ngl", "n_gpu_layers", default=0, help="Layers of both models on the GPU.")
def main(
    prompts: Path, work: Path, base: str, expert: str, switch: str, n_own: int, n_gpu_layers: int
) -> None:
    """Compare a head fitted on the expert's answers with one fitted on the pair's own as well."""
    rows = list(read_rows(prompts))
    chosen = rows[:: max(1, len(rows) // n_own)][:n_own]
    with load(base, expert, switch, n_ctx=2048, n_gpu_layers=n_gpu_layers) as pair:
        asked = [(number, row["prompt"]) for number, row in chosen]
        own = own_answers(pair, asked, work / "own")
        told = answer_prompts(pair, rows, bar, max_tokens=400, n_slots=20, work=work)
        first = of_scores(score(pair, told.documents, bar, work=work, recorded=told.recorded))
        scores = score(pair, own, bar, work=work / "own")
        key = key_of(identity(pair, pair.members), own.keys.tolist())
        kept = work / "own" / f"unsure-{key[:8]}.npy"
        if not kept.exists():
            with replacing(kept) as temporary, temporary.open("wb") as file:
                np.save(file, unsure(pair, own))
        second = of_scores(scores, by_rule_w(scores, np.load(kept)))
    mean = second.regret.mean(), second.weighed.mean()
    click.echo(
        f"own answers: {len(own)}, {len(second.regret)} tokens; regret {mean[0]:.3f} nats per "
        f"token, {mean[1]:.3f} of tokens that matter; {second.matters.mean():.1%} matter"
    )
    compare(first, second, {number for number, _ in asked})


if __name__ == "__main__":
    main()
