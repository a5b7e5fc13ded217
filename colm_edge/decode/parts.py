"""From options to the parts of the loop."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from random import Random

from colm_edge.decode.ahead import Ahead, Awaited, Away
from colm_edge.decode.background import Background
from colm_edge.decode.doubt import Doubt
from colm_edge.decode.fast import Fast
from colm_edge.decode.fresh import Fresh
from colm_edge.decode.guess import with_guesses
from colm_edge.decode.loop import ExpertAlone, Follow, Schedule, Sequential
from colm_edge.decode.picker import Picker
from colm_edge.decode.planner import Planner
from colm_edge.decode.policy import Policy, RatePolicy, running_rate
from colm_edge.decode.review import ByRule, Exact, Review, Tolerance
from colm_edge.decode.timeline import Expert, Timeline
from colm_edge.llama.grammar import Grammar
from colm_edge.llama.sampling import ChainSampler
from colm_edge.llama.session import Session
from colm_edge.options import Options
from colm_edge.remote.client import RemoteSession
from colm_edge.switch.reading import AnySwitch, Base

WATCHED = 4  # tokens after one of the expert's that may make it doubtful


def policy_of(
    switch: AnySwitch, base: Base, options: Options, threshold: float, n_choose: int
) -> Policy:
    """Return who writes: by a threshold, or by one that follows a defer rate."""
    read = switch.reader(base, n_choose)
    rate = running_rate(switch, options)
    return Policy(read, threshold) if rate is None else RatePolicy(read, rate)


def picker_of(
    options: Options,
    n_choose: int,
    tokens: Sequence[int],
    grammar: Grammar | None,
    defer_row: int | None,
    *,
    goes_back: bool,
) -> Picker:
    """Return what picks tokens.

    tokens: of the prompt, for the penalties. grammar: at the answer's start, if there is one.
    defer_row: the id that is a Co-LLM base's switch, if it has one. goes_back: whether the schedule
    takes tokens back.
    """
    sampler: ChainSampler | Fresh | None = None
    if not options.is_likeliest:
        never = [] if defer_row is None else [defer_row]
        sampler = ChainSampler(options, n_choose, tokens, never, grammar)
        if goes_back:
            seed = options.seed if options.seed >= 0 else secrets.randbits(32)
            sampler = Fresh(sampler, Random(seed))
    return Picker(
        n_choose,
        sampler,
        n_probs=options.n_probs,
        composes=options.strategy == "compose",
        defer_row=-1 if defer_row is None else defer_row,
    )


def timelines_of(
    base: Session,
    experts: Mapping[Expert, bool],
    options: Options,
    threshold: float,
    *,
    n_choose: int,
    defer_row: int | None,
    goes_back: bool,
    across: Sequence[Callable[[Timeline], Timeline]],
) -> tuple[Timeline, list[Timeline]]:
    """Return a pair's timelines for one answer; under the fast schedule they evaluate guesses.

    experts: each with whether the base may go on while it evaluates. n_choose, defer_row,
    goes_back: as for `picker_of`. across: of each, what makes its timeline one by the base's
    tokens.
    """
    guessing, theirs = with_guesses(base, list(experts), options, threshold)
    others = [bridged(timeline) for bridged, timeline in zip(across, theirs, strict=True)]
    if options.schedule != "fast" or not 0 < threshold < 1 or goes_back:
        return guessing, others
    ahead: Ahead | None = None
    for i, (expert, overlaps) in enumerate(experts.items()):
        away = others[i]
        if overlaps and isinstance(expert, Background | RemoteSession) and isinstance(away, Away):
            row = -1 if defer_row is None else defer_row
            ahead = ahead or Ahead(guessing, base.end_tokens, n_choose, row)
            others[i] = Awaited(away, ahead)
    return ahead or guessing, others


def schedule_of(
    options: Options,
    threshold: float,
    *,
    goes_back: bool,
    floor: float,
    follow: Follow | None,
    planners: Sequence[Planner | None],
    only: int | None,
) -> Schedule:
    """Return in which batches the models are evaluated.

    goes_back: as for `picker_of`. floor: as for `Review`. planners: as for `Bets`; empty where none
    may be placed. only: the expert that writes every token at a threshold of 0; None where that
    depends on the base.
    """
    if threshold <= 0 and options.strategy == "defer" and only is not None:
        return ExpertAlone(only)
    if goes_back and options.doubts:
        return Doubt(options.doubt, WATCHED, follow)
    if goes_back:
        assert options.review is not None, "settled by the pair"
        is_exact = options.review == 0 and not options.is_likeliest
        reviewer = Exact() if is_exact else ByRule(Tolerance(options.review))
        return Review(reviewer, options.review_window, follow, planners, floor)
    return Fast(planners, follow) if planners else Sequential(follow)
