"""From options to the parts of the loop."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from random import Random

from colm_edge.decode.ahead import Ahead, Awaited
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

WATCHED = 4  # tokens behind one of the expert's that may make it doubtful


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
    expert: Expert,
    options: Options,
    threshold: float,
    *,
    goes_back: bool,
    overlaps: bool,
) -> tuple[Timeline, Timeline]:
    """Return a pair's timelines for one answer; under the fast schedule they evaluate guesses.

    goes_back: as for `picker_of`. overlaps: whether the base may go on while the expert evaluates.
    """
    guessing, other = with_guesses(base, expert, options, threshold)
    fast = overlaps and options.schedule == "fast" and 0 < threshold < 1 and not goes_back
    if not (fast and isinstance(expert, Background | RemoteSession)):
        return guessing, other
    ahead = Ahead(guessing, base.end_tokens)
    return ahead, Awaited(expert, ahead)


def schedule_of(
    options: Options,
    threshold: float,
    *,
    goes_back: bool,
    follow: Follow | None,
    planner: Planner | None,
) -> Schedule:
    """Return in which batches the models are evaluated.

    goes_back: as for `picker_of`. planner: of the fast schedule's bets, if they may be placed.
    """
    if threshold <= 0 and options.strategy == "defer":
        return ExpertAlone()
    if goes_back and options.doubts:
        return Doubt(options.doubt, WATCHED, follow)
    if goes_back:
        assert options.review is not None, "settled by the pair"
        is_exact = options.review == 0 and not options.is_likeliest
        reviewer = Exact() if is_exact else ByRule(Tolerance(options.review))
        return Review(reviewer, options.review_window, follow, planner)
    return Fast(planner, follow) if planner is not None else Sequential(follow)
