"""Guesses that cost no model: text that stands in the prompt or the answer is often repeated.

Where the last tokens stood before, what followed them there is the guess, and the model evaluates
it in one batch with the token that it would evaluate alone. For every position that the guess got
right its state is then known. The text does not change. This is prompt lookup decoding
(github.com/apoorvumang/prompt-lookup-decoding) for a pair: the switch is read at each position, and
it does not matter which model writes a guessed token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cached_property, partial

from colm_edge.cancel import Cancel
from colm_edge.decode.background import Background
from colm_edge.decode.planner import Rate
from colm_edge.decode.timeline import Around, Expert, Timeline
from colm_edge.llama.costs import CostTable
from colm_edge.llama.held import common_prefix
from colm_edge.llama.measure import kept_table
from colm_edge.llama.session import Session
from colm_edge.options import Options

LENGTHS = (3, 2)  # tokens that have to recur, longest first
MOST = 15  # guessed tokens
MARGIN = 0.05  # that a guess must promise to save
# A guess is the likelier right the more tokens before it have recurred: the least of each class,
# and the rate that is expected before anything is known. That is between the rates of answers to
# questions (0.5, 0.6, 0.65, 0.7, 0.85) and of edited text (0.64, 0.75, 0.85, 0.93, 0.98), priced by
# tools/studies/price_guesses.py: it gains most of what there is on both.
CLASSES = ((0, 0.6), (3, 0.7), (4, 0.75), (8, 0.85), (16, 0.92))
PRIOR_WEIGHT = 8.0
Seconds = Callable[[int], float]  # of a batch, by its tokens


class Lookup:
    """What followed the last tokens of a text where they stood before, and how often that recurs.

    It learns from every token whether the guess would have been right, also where none was made.
    """

    def __init__(self) -> None:
        self._text = array("i")
        self._behind: dict[tuple[int, ...], int] = {}  # tokens -> the place behind them, the latest
        self.source: int | None = None  # the place that the next token is expected to repeat
        self._n_same = 0  # tokens before it that are the same as those before the text's end
        self._rates = [Rate(prior, PRIOR_WEIGHT) for _, prior in CLASSES]

    def follow(self, tokens: array[int]) -> None:
        """Take in what was added to the text, or replace what was taken back."""
        keep = common_prefix(self._text, tokens)
        if keep < len(self._text):
            del self._text[keep:]
            self.source = None
        learns = keep > 0  # a prompt says little of its answer
        for token in tokens[keep:]:
            self._add(token, learns)

    def _add(self, token: int, learns: bool) -> None:
        text, source = self._text, self.source
        if source is not None:
            hit = text[source] == token
            if learns:
                self._rates[_class(self._n_same)].add(hit)
            self.source, self._n_same = (source + 1, self._n_same + 1) if hit else (None, 0)
        text.append(token)
        for n in LENGTHS:
            if len(text) < n:
                continue
            key = tuple(text[-n:])
            found = self._behind.get(key)
            # After a rollback a place may hold other tokens by now.
            if self.source is None and found is not None and _ends(text, found, key):
                self.source, self._n_same = found, n
            self._behind[key] = len(text)

    def guess(self, most: int, seconds: Seconds) -> array[int]:
        """Return the tokens that are expected next: as many as promise the most tokens per second,
        none where one token by itself does."""
        source = self.source
        if source is None:
            return array("i")
        most = min(most, MOST, len(self._text) - source)
        p, expected, best = 1.0, 1.0, (1 + MARGIN) / seconds(1)
        n = 0
        for k in range(1, most + 1):
            p *= self._rates[_class(self._n_same + k - 1)].cautious
            expected += p
            if expected / seconds(1 + k) > best:
                n, best = k, expected / seconds(1 + k)
        return self._text[source : source + n]


def _class(n_same: int) -> int:
    return sum(n_same >= least for least, _ in CLASSES[1:])


def _ends(text: array[int], at: int, key: tuple[int, ...]) -> bool:
    """Return whether these tokens stand before a place that is not the end of the text."""
    return at < len(text) and tuple(text[at - len(key) : at]) == key


def with_guesses(
    base: Session, experts: Sequence[Expert], options: Options, threshold: float
) -> tuple[Timeline, list[Timeline]]:
    """Return a pair's timelines for one answer. Under the fast schedule, the one that evaluates
    token by token does so with guesses: the base, or the one expert where it writes alone."""
    if options.schedule != "fast":
        return base, list(experts)
    if threshold > 0 or len(experts) > 1:
        return Guessing(base, partial(kept_table, base)), list(experts)
    (expert,) = experts
    if isinstance(expert, Background):
        inner = expert.session
        return base, [Guessing(inner, partial(kept_table, inner), expert)]
    if isinstance(expert, Session):
        return base, [Guessing(expert, partial(kept_table, expert))]
    return base, [expert]


class Guessing(Around):
    """A session's timeline that evaluates guesses along; for one answer.

    costs: returns what the session's decodes cost, or None where that is not known: then, and where
    decodes are so quick that guessing takes longer than it saves, there are no guesses. catches_up:
    uses the session on another thread.
    """

    def __init__(
        self,
        session: Session,
        costs: Callable[[], CostTable | None],
        catches_up: Background | None = None,
    ) -> None:
        super().__init__(session)
        self._session, self._table, self._catches_up = session, costs, catches_up
        self._lookup = Lookup()
        self._seen: dict[int, float] = {}  # seconds of batches with a guess, by their tokens
        self.n_guessed = 0

    def turn_to(self, prompt: array[int]) -> None:
        (self._catches_up or self._session).turn_to(prompt)

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        if self._catches_up is not None:
            self._catches_up.wait(cancel)
        session = self._session
        if outputs or not isinstance(tokens, array) or not self._pays:
            return session.sync(tokens, outputs, cancel)
        self._lookup.follow(tokens)
        if session.knows(tokens):
            return 0
        n = len(tokens)
        guess = self._lookup.guess(self.n_ctx - n, self._seconds)
        # A prompt is evaluated as it is without guesses: its states stay for later prompts.
        if not guess or session.n_known(tokens) < n - 1:
            return session.sync(tokens, (), cancel)
        self.n_guessed += len(guess)
        before = session.account.seconds
        n_done = session.sync(tokens + guess, range(n - 1, n + len(guess)), cancel)
        if n_done == 1 + len(guess):  # otherwise there was a prompt
            took, known = session.account.seconds - before, self._seen.get(n_done)
            self._seen[n_done] = took if known is None else (known + took) / 2
        return n_done

    @cached_property
    def _costs(self) -> CostTable | None:
        return self._table()  # at the first token: by then the schedule has measured it

    @property
    def _pays(self) -> bool:
        return self._costs is not None and not self._costs.is_quick

    def _seconds(self, n: int) -> float:
        """Return the seconds of a batch whose states are all read."""
        assert self._costs is not None
        known = self._seen.get(n)
        return self._costs.all_states(n) if known is None else known
