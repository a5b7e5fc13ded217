"""How an answer is written, and how it is served: every default of the CLI and the Python API."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from colm_edge.errors import ColmError


@dataclass(frozen=True)
class Options:
    """Sampling follows llama.cpp: repeat penalty, top-k, top-p, min-p, temperature, in that order;
    a temperature of 0 is greedy.
    """

    max_tokens: int = -1  # -1: until an end token or the end of the context
    threshold: float | None = None  # None: the switch's own
    defer_rate: float | None = None  # turned into a threshold by the switch's calibration
    strategy: Literal["defer", "compose"] = "defer"
    schedule: Literal["fast", "sequential"] = "fast"  # the same text, in other batches
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    seed: int = -1  # -1: another one each time
    stop: tuple[str, ...] = ()
    raw: bool = False  # no chat template
    n_probs: int = 0  # likeliest tokens that each step tells of, in Step.top

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        stop = tuple(self.stop) if isinstance(self.stop, Iterable) else (self.stop,)
        if not all(isinstance(text, str) for text in stop):
            raise ColmError(f"stop is {self.stop!r}; expected a text, or several")
        object.__setattr__(self, "stop", stop)
        limits: tuple[tuple[str, float | None, float, float], ...] = (
            ("max_tokens", self.max_tokens, -1, 2**31 - 1),
            ("threshold", self.threshold, 0, 1),
            ("defer_rate", self.defer_rate, 0, 1),
            ("temperature", self.temperature, 0, 1e6),
            ("top_k", self.top_k, 0, 2**31 - 1),
            ("top_p", self.top_p, 0, 1),
            ("min_p", self.min_p, 0, 1),
            ("repeat_penalty", self.repeat_penalty, 1e-6, 1e6),
            ("presence_penalty", self.presence_penalty, -100, 100),
            ("frequency_penalty", self.frequency_penalty, -100, 100),
            ("repeat_last_n", self.repeat_last_n, 0, 2**31 - 1),
            ("n_probs", self.n_probs, 0, 1000),
            ("seed", self.seed, -1, 2**32 - 2),  # llama.cpp takes 2^32 - 1 for "draw one"
        )
        for name, value, low, high in limits:
            if value is None and name in ("threshold", "defer_rate"):
                continue
            whole = isinstance(getattr(Options, name), int)
            kind: Any = int if whole else (int, float)
            if not isinstance(value, kind) or not low <= value <= high:
                what = "a whole number" if whole else "a number"
                raise ColmError(f"{name} is {value!r}; expected {what} from {low:g} to {high:g}")
        if self.strategy not in ("defer", "compose"):
            raise ColmError(f"strategy is {self.strategy!r}; expected 'defer' or 'compose'")
        if self.schedule not in ("fast", "sequential"):
            raise ColmError(f"schedule is {self.schedule!r}; expected 'fast' or 'sequential'")
        if self.threshold is not None and self.defer_rate is not None:
            raise ColmError("threshold and defer_rate are two ways to say one thing; give one")
        if "" in self.stop:
            raise ColmError("a stop text is empty; give at least one character")

    @property
    def penalises(self) -> bool:
        """Whether what was written makes the same token less likely."""
        return self.repeat_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    def with_changes(self, **changes: Any) -> Options:
        """Return these options with others in their place; of threshold and defer_rate the one
        that is changed counts. Raises ColmError for an unknown name or a value out of range."""
        known = self.__dataclass_fields__
        for name in changes:
            if name not in known:
                raise ColmError(f"unknown option {name!r}; known: {', '.join(known)}")
        for name, rival in (("threshold", "defer_rate"), ("defer_rate", "threshold")):
            if changes.get(name) is not None:
                changes.setdefault(rival, None)
        return replace(self, **changes)


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves towards the outside."""

    host: str = "127.0.0.1"
    port: int = 8080
    n_slots: int = 4
    queue: int = 16  # requests that wait for a slot
    api_key: str | None = None
    cors: tuple[str, ...] = ()  # origins whose pages may ask
    max_tokens: int = 2048  # of one answer
    expert_idle_unload: float = 0.0  # seconds; 0: never
