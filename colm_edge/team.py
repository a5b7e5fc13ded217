"""The experts of a pair. Each is loaded, catches up and is freed by itself."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial

from colm_edge.cancel import Cancel
from colm_edge.decode.background import Background, can_overlap
from colm_edge.decode.bridge import Bridge
from colm_edge.decode.bridge_away import BridgeAway
from colm_edge.decode.planner import Planner
from colm_edge.decode.spelling import Crossing, Spelling
from colm_edge.decode.timeline import Around, Expert, Timeline
from colm_edge.errors import ColmError, ModelError
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.costs import CostTable
from colm_edge.llama.measure import cost_table
from colm_edge.llama.model import Model
from colm_edge.llama.owners import close_each
from colm_edge.llama.session import Session
from colm_edge.llama.vocabulary import Vocabulary, shared_vocab
from colm_edge.options import Options
from colm_edge.remote.client import RemoteExpert, RemoteSession
from colm_edge.remote.rows import RowsSession

Progress = Callable[[str, float], None]
NOT_HERE = "this needs the expert's weights here, and they are at"


class Member:
    """One expert: where it runs, and what the loop needs of it.

    name: the user's; empty where there is one expert. source: as steps name it. here: its session,
    if it runs in this process. overlaps: whether the base may go on while it evaluates.
    """

    def __init__(
        self,
        name: str,
        model: Model | RemoteExpert,
        base: Session,
        context: ContextOptions,
        *,
        bridge: bool,
        overlap: bool | None,
        progress: Progress | None,
        note: Callable[[str], None],
        weighed: Callable[[CostTable, CostTable], None],
    ) -> None:
        """bridge: let its vocabulary be another. weighed: called when the cost tables of base and
        expert are there.

        Raises MismatchError when its vocabulary is not the base's and need be.
        """
        self.name = name
        self._base, self._note, self._weighed = base, note, weighed
        self.source = f"expert:{name}" if name else "expert"
        self.model, self._context = model, context
        self.here: Session | None = None
        self.costs: CostTable | None = None  # once the fast schedule needs them
        self.n_contexts = 1  # as many answers at once
        # Called before its weights are read, where several experts share a room.
        self.make_room: Callable[[], None] = lambda: None
        self.crossing: Crossing | None = None  # of both vocabularies, where there is a bridge
        self._text: Spelling | None = None  # the base's text in its tokens, to follow it
        self.timeline: Expert
        if isinstance(model, RemoteExpert):
            if model.words is not None:
                self.crossing = Crossing(Vocabulary(base.model), model.words)
            self._n_shared = model.n_shared
            self.timeline = model.session() if self.crossing is None else RowsSession(model)
            # A server on this machine may use the same cores.
            beside = not model.is_local
        else:
            if bridge:
                self.crossing = Crossing(Vocabulary(base.model), Vocabulary(model))
                self._n_shared = base.model.n_vocab
            else:
                self._n_shared = shared_vocab(base.model, model)
            self.timeline = self.here = Session(model, context)
            if progress is not None:
                self.here.progress = partial(progress, f"{self._called} prompt")
            beside = can_overlap(base, self.here)
        self.overlaps = beside if overlap is None else overlap
        if self.here is not None and self.overlaps:
            self.timeline = Background(self.here)
        self.planner = Planner(self._weigh, steady=bridge)

    @property
    def stem(self) -> str:
        """Its file's name without the suffix; "remote" on a server."""
        return "remote" if self.here is None else self.here.model.path.stem

    @property
    def _called(self) -> str:
        return f"expert {self.name}" if self.name else "expert"

    def another(self) -> Timeline:
        """Return another timeline of an expert on a server, by the base's tokens."""
        assert isinstance(self.model, RemoteExpert)
        return self.model.session() if self.crossing is None else self.across(self.timeline)

    def across(self, timeline: Timeline) -> Timeline:
        """Return a timeline of this expert by the base's tokens."""
        if self.crossing is None:
            return timeline
        if isinstance(timeline, RowsSession):  # each answer asks on its own
            return BridgeAway(RowsSession(timeline.expert), self.crossing, self._note)
        return Bridge(timeline, self.crossing, self._note)

    def own(self, tokens: array[int]) -> array[int]:
        """Return the base's tokens as this expert holds them."""
        if self.crossing is None:
            return tokens
        spelling = Spelling(self.crossing)
        spelling.turn_to(tokens)
        return spelling.ids

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens of the base's vocabulary that end a generation for it."""
        return self.timeline.end_tokens if self.crossing is None else frozenset()

    def follow(self, tokens: array[int]) -> None:
        """Let it catch up with the base's tokens in the background, if it can."""
        if self.crossing is None:
            self.timeline.follow(tokens)
        elif self.is_loaded and isinstance(self.timeline, Background):
            # What stands before the place that the next deferral asks at.
            self._text = self._text or Spelling(self.crossing)
            self._text.turn_to(tokens)
            row = self._text.place(len(tokens) - 1).row
            if 0 < row <= self.timeline.n_ctx:
                self.timeline.follow(self._text.ids[:row])

    @property
    def n_shared(self) -> int:
        """Token ids below this are in the vocabulary of base and expert."""
        # A server that was down when the pair was loaded tells it later.
        if isinstance(self.timeline, RemoteSession):
            return self.timeline.n_shared
        return self._n_shared

    @property
    def session(self) -> Session:
        """Its session in this process, once no catch-up is running on it.

        Raises ColmError where it is on a server.
        """
        if self.here is None:
            raise ColmError(why_unread([self]))
        if isinstance(self.timeline, Background):
            self.timeline.wait()
        return self.here

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory in this process."""
        return self.here is not None and self.here.model.loaded

    @property
    def n_bytes(self) -> int:
        """The size of its weights and its KV caches in this process, once it is loaded."""
        return self.bytes_for(self.n_contexts)

    def bytes_for(self, n_contexts: int) -> int:
        """Return what `n_bytes` is with so many contexts."""
        if self.here is None:
            return 0
        model = self.here.model
        cache = self._context.cache_bytes(model, self._context.n_ctx * n_contexts)
        return sum(file.stat().st_size for file in model.files) + cache

    def unload(self) -> None:
        """Free its memory in this process; its next token loads it again. Raises what a catch-up
        raised that nobody waited for; its memory is freed then too."""
        close_each(lambda: self.session, self._free)

    def _free(self) -> None:
        if self.here is not None:
            self.here.close()
            self.here.model.unload()

    def cost_tables(
        self, *, hasty: bool, cancel: Cancel | None = None
    ) -> tuple[CostTable, CostTable]:
        """Return the cost tables of base and expert: measured once, in half a second each if it is
        hasty, then cached on disk."""
        measured = partial(cost_table, hasty=hasty, note=self._note, cancel=cancel)
        return measured(self._base), measured(self.session)

    def _weigh(self, cancel: Cancel | None) -> tuple[CostTable, CostTable] | None:
        """Return the cost tables, and cut the batches of this and later answers of the fast
        schedule by the expert's; return None where they cannot be measured."""
        self.make_room()
        try:
            base, expert = self.cost_tables(hasty=True, cancel=cancel)
        except ModelError as e:  # for example, no memory for another context
            self._note(f"the fast schedule works without bets: {e}")
            return None
        self._weighed(base, expert)
        self.costs = None if base.is_quick else expert
        self.session.costs = self.costs
        return base, expert

    def close(self) -> None:
        self.timeline.close()
        if self.here is not None:
            self.here.model.close()


class Room:
    """Says which expert works, and keeps those in this process within a limit of memory: the one
    that was not used for longest is freed for the next.

    limit: in bytes; 0 is none.
    """

    def __init__(self, members: Sequence[Member], limit: int, note: Callable[[str], None]) -> None:
        """Raises ColmError as `share` does."""
        self.limit, self._note, self._members = limit, note, members
        self._told = False
        self.last: Member | None = None  # who worked last
        self._free: dict[Member, Callable[[], None]] = {}  # in the order of their last use
        for member in members:
            member.make_room = partial(self.enter, member, member.unload)
        self.share(1)

    def share(self, n_answers: int) -> None:
        """Let each expert have a context for so many answers at once.

        Raises ColmError where an expert alone takes more than the limit.
        """
        for member in self._members:
            if 0 < self.limit < (n_bytes := member.bytes_for(n_answers)):
                raise ColmError(
                    f"--max-memory allows {self.limit / 1e6:,.1f} MB, and the expert {member.name} "
                    f"alone takes {n_bytes / 1e6:,.1f} MB with {n_answers} answer(s) at once; "
                    "allow more, or use a smaller one"
                )
        for member in self._members:
            member.n_contexts = n_answers

    def enter(self, member: Member, free: Callable[[], None]) -> None:
        """Make room for an expert that is about to evaluate. free: gives its memory back."""
        self.last = member
        if not self.limit or member.here is None:
            return
        self._free.pop(member, None)
        for other in list(self._free):
            held = sum(one.n_bytes for one in self._free if one.is_loaded)
            if held + member.n_bytes <= self.limit:
                break
            if other.is_loaded:
                self._say(other, member)
                self._free[other]()
            del self._free[other]
        self._free[member] = free

    def _say(self, other: Member, member: Member) -> None:
        if not self._told:
            self._note(
                f"the expert {other.name} is unloaded for {member.name}, and loaded again when it "
                "is called (--max-memory)"
            )
            self._told = True

    def guests(self, timelines: Sequence[Timeline]) -> list[Timeline]:
        """Return the timelines of the experts, in their order, with room made before they work."""
        return list(map(Guest, timelines, self._members))

    def follow(self, tokens: array[int]) -> None:
        """Let the expert that worked last catch up in the background, if it can."""
        if self.last is not None:
            self.last.follow(tokens)


class Guest(Around):
    """An expert's timeline that asks for room before it works."""

    def __init__(self, inner: Timeline, member: Member) -> None:
        super().__init__(inner)
        self._member = member

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        self._member.make_room()
        return self._inner.sync(tokens, outputs, cancel)


def trained_context(model: Model | RemoteExpert) -> int:
    """Return the tokens of the longest context that an expert takes, 0 if it does not tell."""
    return model.n_ctx if isinstance(model, RemoteExpert) else model.n_ctx_train


def ends_of(base: Model, members: Sequence[Member]) -> frozenset[int]:
    """Return every token with which the base or an expert ends an answer."""
    return base.end_tokens.union(*(member.end_tokens for member in members))


def plan_bets(
    members: Sequence[Member], options: Options, threshold: float
) -> list[Planner | None]:
    """Return what places the fast schedule's bets on each expert, nothing where there are none: a
    bet needs the costs of decodes, which a server does not report. With bets an expert's batches
    are cut by these costs as well, without them no longer."""
    bets = options.schedule == "fast" and 0 < threshold < 1
    planners: list[Planner | None] = []
    for member in members:
        if member.here is not None:
            member.here.costs = member.costs if bets else None
        planners.append(None if member.here is None else member.planner)
    return planners if bets and any(planners) else []


def why_unread(members: Sequence[Member]) -> str:
    """Return why not every expert's state can be read after each token, "" where it can."""
    where = next((member.timeline.name for member in members if member.here is None), "")
    return where and f"{NOT_HERE} {where}; give a GGUF file (-me)"
