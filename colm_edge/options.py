"""How an answer is written and how it is served: each option is declared here, once.

A field of `Options` says its default, limits, help and flags, and whether requests can set it. The
checks below, the command line, the chat's /set and the server's requests are derived from these
fields, so a new option is one field here and the code that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import MappingProxyType, NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from colm_edge.errors import ColmError

T = TypeVar("T")
INT_MAX = 2**31 - 1
COLDEST = 1e-30  # a temperature; below it is greedy
EXPERT_TIMEOUT = 60.0  # seconds that a request to a remote expert may take
MAX_TIMEOUT = 86400.0


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Raise ColmError for what is no whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ColmError(f"{name} is {value!r}; expected a whole number from {low} to {high:,}")


@dataclass(frozen=True)
class Option:
    """What an option accepts, and where it can be set."""

    name: str
    type: Any  # as annotated: int, float, bool, tuple[str, ...] or a Literal, some with None
    default: Any
    flags: tuple[str, ...]
    help: str
    limits: tuple[float, float] | None
    shown_limits: tuple[float | None, float | None]
    request: Literal["body", "colm"] | None
    request_limits: Mapping[str, Any]
    words: Mapping[str, float]
    meaning: str

    def value_of(self, value: Any) -> Any:
        """Return what a word stands for; any other value as it is."""
        return self.words.get(value, value) if isinstance(value, str) else value

    def shown(self, value: Any) -> Any:
        """Return the word for a value, if there is one."""
        return next((word for word, stands in self.words.items() if stands == value), value)

    def parse(self, text: str) -> Any:
        """Return the value that a text gives. Raises ValueError."""
        return self.words[text] if text in self.words else self.kind(text)

    @property
    def kind(self) -> type:
        """The type of its values, other than None: int, float, bool, str or tuple."""
        if self.choices:
            return str
        if get_origin(self.type) is tuple:
            return tuple
        return next(t for t in get_args(self.type) or (self.type,) if t is not NoneType)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; empty for other types."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def check(self, value: Any) -> None:
        """Raise ColmError if the option does not accept this value."""
        if value is None and NoneType in get_args(self.type):
            return
        if self.choices and value not in self.choices:
            expected = " or ".join(map(repr, self.choices))
            raise ColmError(f"{self.name} is {value!r}; expected {expected}")
        if self.kind in (str, bool) and not self.choices and not isinstance(value, self.kind):
            expected = "a text" if self.kind is str else "True or False"
            raise ColmError(f"{self.name} is {value!r}; expected {expected}")
        if self.limits is None:
            return
        low, high = self.limits
        whole = self.kind is int
        is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            what = "a whole number" if whole else "a number"
            words = "".join(f", or {word!r}" for word in self.words)
            shown = [f"{x:,}" if whole else f"{x:g}" for x in self.limits if x < math.inf]
            expected = f"{what} from {' to '.join(shown)}" + words
            meaning = f", {self.meaning}" if self.meaning else ""
            raise ColmError(f"{self.name} is {value!r}; expected {expected}{meaning}")


def option(
    default: T,
    *flags: str,
    help: str = "",
    limits: tuple[float, float] | None = None,
    shown_limits: tuple[float | None, float | None] | None = None,
    request: Literal["body", "colm"] | None = None,
    request_limits: Mapping[str, Any] | None = None,
    words: Mapping[str, float] = {},
    meaning: str = "",
) -> T:
    """Declare a field of `Options`.

    flags: on the command line; without any, only the Python API sets the option. An option with
    flags and a single value is also a setting of the chat, under the field's name.
    limits: the smallest and the largest value.
    shown_limits: those that the command line checks and shows, if some of the limits only keep
    absurd numbers away from llama.cpp.
    request: where a request sets the option: beside OpenAI's own fields or in its `colm` object.
    Fields that a request gives in another form (max_tokens, seed, stop) are in serve/requests.py.
    request_limits: of requests, where they differ, by pydantic's names: ge, gt, le, lt.
    words: names for some values, which may be given instead.
    meaning: what its numbers are, told where one is refused.
    """
    if request_limits is None:
        request_limits = dict(zip(("ge", "le"), limits, strict=True)) if limits else {}
    declared = {
        "flags": flags,
        "help": help,
        "limits": limits,
        "shown_limits": shown_limits or limits or (None, None),
        "request": request,
        "request_limits": MappingProxyType(request_limits),
        "words": MappingProxyType(words),
        "meaning": meaning,
    }
    return field(default=default, metadata=declared)


@dataclass(frozen=True)
class Options:
    """Sampling follows llama.cpp: repeat penalty, top-k, top-p, min-p, temperature, in that order;
    a temperature of 0 is greedy.
    """

    max_tokens: int = option(
        -1,
        "-n",
        "--n-predict",
        limits=(-1, INT_MAX),
        help="Maximum number of tokens to generate; -1: until the answer or context ends.",
    )
    threshold: float | None = option(
        None,
        "--threshold",
        limits=(0, 1),
        request="colm",
        help="Use the expert if p_defer is above this; 1: base alone, 0: expert alone.  "
        "[default: the switch's own]",
    )
    defer_rate: float | None = option(
        None,
        "--defer-rate",
        limits=(0, 1),
        request="colm",
        help="Share of tokens to defer: by the switch's calibration; without one, a threshold "
        "that follows the rate.",
        meaning="a share of the tokens: 0.2 is 20 %",
    )
    strategy: Literal["defer", "compose"] = option(
        "defer",
        "--strategy",
        request="colm",
        help="Where the switch defers, write the expert's token (defer) or one from the mixture of "
        "both models (compose).",
    )
    review: float | None = option(
        None,
        "--review",
        limits=(0, math.inf),
        words={"off": math.inf},
        request="colm",
        help="Undo the base's first token that the expert, when called, finds less likely than its "
        "own by more than so many nats; 0: its own text.  [default: the switch's, or off]",
    )
    review_window: int = option(
        16,
        "--review-window",
        limits=(1, 256),
        request="colm",
        help="The most tokens that wait for the expert's review.",
    )
    review_floor: float | None = option(
        None,
        "--review-floor",
        limits=(0, 1),
        request="colm",
        help="Review only tokens whose p_defer is at least this; --review 0 reviews all.  "
        "[default: for 60 % of the base's tokens]",
    )
    doubt: float = option(
        math.inf,
        "--doubt",
        limits=(0, math.inf),
        words={"off": math.inf},
        request="colm",
        help="Undo an expert's token if within four tokens both models find even the likeliest "
        "continuation less likely than this many nats, and the base's token continues better.",
    )
    schedule: Literal["fast", "sequential"] = option(
        "fast",
        "--schedule",
        help="How the evaluations of one answer at a time are batched; it changes the text at "
        "near-ties only. Several answers at once are sequential.",
    )
    temperature: float = option(
        0.8,
        "--temp",
        limits=(0, 1e6),
        shown_limits=(0, None),
        help="Temperature; 0: greedy.",
        request="body",
        request_limits={"ge": 0, "le": 100},
    )
    top_k: int = option(
        40,
        "--top-k",
        limits=(0, INT_MAX),
        request="body",
        help="Sample from the k most likely tokens; 0: all.",
    )
    top_p: float = option(
        0.95,
        "--top-p",
        limits=(0, 1),
        request="body",
        help="Sample from the most likely tokens, up to this total probability; 1: all.",
    )
    min_p: float = option(
        0.05,
        "--min-p",
        limits=(0, 1),
        request="body",
        help="Drop tokens less likely than this share of the most likely one; 0: none.",
    )
    repeat_penalty: float = option(
        1.0,
        "--repeat-penalty",
        limits=(1e-6, 1e6),
        shown_limits=(None, None),
        help="Penalty on repeated tokens; 1: none.",
        request="body",
        request_limits={"gt": 1e-6, "le": 1e6},
    )
    presence_penalty: float = option(
        0.0,
        "--presence-penalty",
        limits=(-100, 100),
        shown_limits=(None, None),
        help="Penalty on tokens that have occurred; 0: none.",
        request="body",
        request_limits={"ge": -2, "le": 2},
    )
    frequency_penalty: float = option(
        0.0,
        "--frequency-penalty",
        limits=(-100, 100),
        shown_limits=(None, None),
        help="Penalty on each occurrence of a token; 0: none.",
        request="body",
        request_limits={"ge": -2, "le": 2},
    )
    # Tokens that the penalties look back; llama.cpp takes memory for all of them.
    repeat_last_n: int = option(64, limits=(0, 1 << 20))
    seed: int = option(  # llama.cpp takes 2^32 - 1 for "draw one"
        -1, "-s", "--seed", limits=(-1, 2**32 - 2), help="Random seed; -1: a new one each time."
    )
    stop: tuple[str, ...] = option((), "--stop", help="Stop before this text; repeatable.")
    grammar: str | None = option(
        None,
        "--grammar",
        help="Let the answer be what this grammar allows; GBNF, llama.cpp's notation.",
        request="body",
    )
    raw: bool = option(False, "--raw", help="Use the prompt as it is, without the chat template.")
    n_probs: int = option(0, limits=(0, 1000))  # most likely tokens to report in Step.top

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        stop = tuple(self.stop) if isinstance(self.stop, Iterable) else (self.stop,)
        if not all(isinstance(text, str) for text in stop):
            raise ColmError(f"stop is {self.stop!r}; expected a text, or several")
        object.__setattr__(self, "stop", stop)
        for name, declared in OPTIONS.items():
            object.__setattr__(self, name, declared.value_of(getattr(self, name)))
            declared.check(getattr(self, name))
        if self.threshold is not None and self.defer_rate is not None:
            raise ColmError("threshold and defer_rate are two ways to say one thing; give one")
        if self.reviews and self.doubts:
            raise ColmError("review and doubt cannot go together; give one")
        if self.review == 0 and self.strategy == "compose":
            raise ColmError("review 0 writes the expert's own text, compose a mixture; give one")
        if "" in self.stop:
            raise ColmError("a stop text is empty; give at least one character")

    @property
    def is_greedy(self) -> bool:
        """Whether tokens are not drawn. Logits divided by less than COLDEST overflow."""
        return self.temperature < COLDEST

    @property
    def is_likeliest(self) -> bool:
        """Whether each token is the writer's likeliest, whatever was written before."""
        return self.is_greedy and not self.penalises and self.grammar is None

    @property
    def penalises(self) -> bool:
        """Whether a token becomes less likely once it has been written."""
        return self.repeat_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def reviews(self) -> bool:
        """Whether the expert may undo tokens of the base, if not only the switch says so."""
        return self.review is not None and self.review < math.inf

    @property
    def doubts(self) -> bool:
        """Whether tokens of the expert may be undone."""
        return self.doubt < math.inf

    @property
    def is_plain(self) -> bool:
        """Whether each token is the likeliest one, to the model's own end of the answer."""
        return self.is_likeliest and not self.stop

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        values = ((name, getattr(self, name)) for name in OPTIONS)
        return {name: value for name, value in values if value != OPTIONS[name].default}

    def with_changes(self, **changes: Any) -> Options:
        """Return a copy with some options changed. Setting threshold clears defer_rate, and the
        other way round. Raises ColmError for an unknown name or a value out of range."""
        for name in changes:
            if name not in OPTIONS:
                raise ColmError(f"unknown option {name!r}; known: {', '.join(OPTIONS)}")
        for name, rival in (("threshold", "defer_rate"), ("defer_rate", "threshold")):
            if changes.get(name) is not None:
                changes.setdefault(rival, None)
        return replace(self, **changes)


_hints = get_type_hints(Options)
OPTIONS = {f.name: Option(f.name, _hints[f.name], f.default, **f.metadata) for f in fields(Options)}


@dataclass(frozen=True)
class ServerOptions:
    """Network, limits and access of the server."""

    host: str = "127.0.0.1"
    port: int = 8080
    n_slots: int = 4
    queue: int = 16  # requests that wait for a slot
    api_key: str | None = None
    cors: tuple[str, ...] = ()  # origins whose pages may send requests
    allowed_hosts: tuple[str, ...] = ()  # names besides the local ones that it answers to
    max_tokens: int = 2048  # of one answer
    expert_idle_unload: float = 0.0  # seconds; 0: never
