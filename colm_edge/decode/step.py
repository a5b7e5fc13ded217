"""The record of a written token (`Step`), and the statistics of an answer (`Stats`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from colm_edge.llama.account import Account, plus

# The log-probability of what cannot be: JSON has no infinity. vLLM tells the same.
ZERO_PROBABILITY = -9999.0
# Who wrote a token: "base"; "expert" where there is one, else "expert:NAME".
Source = str


@dataclass(slots=True)
class Step:
    """One written token: which model wrote it, its p_defer, and how likely it was."""

    token: int
    source: Source
    p_defer: float
    logprob: float  # of the token, under the model (or mixture) that wrote it, before sampling
    text: str = ""  # whole characters only: a split one comes with its last token
    # The likeliest tokens, best first, and their log-probabilities, if requested.
    top: tuple[tuple[int, float], ...] = ()

    @property
    def by_expert(self) -> bool:
        return self.source != "base"

    def record(self) -> dict[str, Any]:
        """Return the step as `run --json` and the server's traces write it."""
        return {"id": self.token, "text": self.text, "source": self.source, "p_defer": self.p_defer}


@dataclass(frozen=True, slots=True)
class Undone:
    """Tokens that are taken back: the first was rejected, the others followed it.

    regret: how much better the token is that stands there instead, in nats. Under review, by which
    the expert preferred its own likeliest token; under doubt, a token, by both models' mean.
    """

    at: int  # the first one's place in the answer, from 0
    steps: tuple[Step, ...]
    regret: float

    def record(self) -> dict[str, Any]:
        """Return the withdrawal as `run --json` and the server's events write it. `source` wrote
        the first token, which was rejected."""
        return {
            "at": self.at,
            "tokens": [step.token for step in self.steps],
            "text": "".join(step.text for step in self.steps),
            "source": self.steps[0].source,
            "regret": self.regret,
        }


@dataclass(frozen=True, slots=True)
class Drafted:
    """A token that may be taken back. Drafts become steps in their order, or the last ones are
    undone."""

    step: Step


Event = Step | Drafted | Undone


@dataclass(slots=True)
class ExpertStats:
    """What one of several experts did in an answer: fields of `Stats`, without "expert_"."""

    n_deferred: int = 0
    calls: int = 0
    tokens: int | None = 0  # that it evaluated
    seconds: float = 0.0
    load_seconds: float = 0.0


@dataclass(slots=True)
class Stats:
    """The statistics of an answer. `base_tokens` and `expert_tokens` count every evaluated token,
    including the prompt and tokens that were rolled back; None where the expert's server does not
    tell. If the expert works in the background, its seconds overlap with the base's."""

    n_prompt: int = 0
    n_generated: int = 0
    n_deferred: int = 0
    n_reviewed: int = 0  # tokens of the base that the expert has looked at
    n_undone: int = 0  # tokens that were taken back, by review or doubt
    defer_rate: float = 0.0
    base_tokens: int = 0
    expert_calls: int = 0
    expert_tokens: int | None = 0
    expert_failures: int = 0  # deferrals that the base wrote because the expert was absent
    base_seconds: float = 0.0
    expert_seconds: float = 0.0
    expert_load_seconds: float = 0.0  # of expert_seconds: weights and context, at its first call
    first_token_seconds: float = 0.0  # of total_seconds, with the prompt's, without a load's
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0
    # Of several experts, by their sources; those above are their sums.
    experts: dict[str, ExpertStats] = field(default_factory=dict)

    def count_base(self, spent: Account) -> None:
        """Add what an evaluation of the base took."""
        self.base_tokens += spent.n_evaluated or 0
        self.base_seconds += spent.seconds

    def count(self, spent: Account, source: Source) -> None:
        """Add what a call of an expert took."""
        self.expert_calls += spent.n_calls
        self.expert_tokens = plus(self.expert_tokens, spent.n_evaluated)
        self.expert_seconds += spent.seconds
        self.expert_load_seconds += spent.load_seconds
        if (one := self.experts.get(source)) is not None:
            one.calls += spent.n_calls
            one.tokens = plus(one.tokens, spent.n_evaluated)
            one.seconds += spent.seconds
            one.load_seconds += spent.load_seconds

    def record(self) -> dict[str, Any]:
        """Return the statistics as `run --json` writes them; of one expert there are no others."""
        found = asdict(self)
        if not self.experts:
            del found["experts"]
        return found

    def finish(self) -> None:
        if self.n_generated:
            self.defer_rate = self.n_deferred / self.n_generated
        if self.total_seconds > 0:
            self.tokens_per_second = self.n_generated / self.total_seconds
