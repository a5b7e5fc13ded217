"""The text API: load a base, an expert and a switch; ask; read who wrote what."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, Self

from colm_edge.cancel import Cancel
from colm_edge.decode.background import prepare
from colm_edge.decode.loop import Decoder
from colm_edge.decode.parts import picker_of, policy_of, schedule_of, timelines_of
from colm_edge.decode.policy import expected_rate, review_floor, review_of, threshold_of
from colm_edge.decode.timeline import Expert, Timeline
from colm_edge.errors import ColmError, ContextError, ModelError, PromptError
from colm_edge.llama import chat_template
from colm_edge.llama.chat_template import ChatTemplate, Message
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.costs import CostTable, slowness_note
from colm_edge.llama.grammar import Grammars
from colm_edge.llama.measure import kept_table, refine
from colm_edge.llama.model import Model
from colm_edge.llama.owners import HomeLock, close_each
from colm_edge.llama.prompt_cache import load_prompts, save_prompts
from colm_edge.llama.session import Session
from colm_edge.options import EXPERT_TIMEOUT, Options, check_whole
from colm_edge.references import Experts, check_offline, choose_pair, is_url, named, resolve
from colm_edge.remote.client import RemoteExpert
from colm_edge.stream import Answer, AsyncStream, Stream
from colm_edge.switch.load import check_rule, in_order, load_switch, warnings_of
from colm_edge.switch.reading import AnySwitch
from colm_edge.switch.rules import DEFER_TOKEN, DeferRow, Only
from colm_edge.team import Member, Progress, Room, ends_of, plan_bets, trained_context, why_unread

log = logging.getLogger("colm_edge")

# Contexts cost memory: unless asked for more, no more than this.
DEFAULT_N_CTX = 4096


class Pair:
    """A base, an expert and a switch that answer together. See `load`.

    Any thread may use it, but no child of fork. `generate` and `chat` run one after the other; a
    second caller waits. Two streams at once take turns token by token and stay correct, but each
    turn evaluates the other's prompt again, so it is better to finish one first.
    """

    def __init__(
        self,
        base: Model,
        expert: Model | RemoteExpert | Mapping[str, Model | RemoteExpert],
        switch: AnySwitch,
        context: ContextOptions | None = None,
        defaults: Options | None = None,
        *,
        is_demo: bool = False,
        bridge: bool = False,
        overlap: bool | None = None,
        max_memory: int = 0,
        note: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Check that these fit each other and open the base; nothing is evaluated yet.

        expert: several by their names, in the order of the switch's rows. bridge, overlap,
        max_memory, note: as for `load`. progress: as for `load`, but of prompts only.

        Raises MismatchError naming what differs, ModelError for files that cannot take part.
        """
        self.base, self.switch, self.is_demo = base, switch, is_demo
        self.defaults = defaults or Options()
        self._note = note or log.info
        self._note_once = cache(self._note)
        self._lock, self._closing = HomeLock(), False
        text = base.chat_template
        self.template = ChatTemplate(text, base.bos_text, base.eos_text) if text else None
        self._grammars = Grammars(base)
        experts = expert if isinstance(expert, Mapping) else {"": expert}
        context = context or ContextOptions()
        trained = [n for n in (base.n_ctx_train, *map(trained_context, experts.values())) if n > 0]
        self.n_ctx = context.n_ctx or min([DEFAULT_N_CTX, *trained])
        if self.n_ctx > (known := min(trained, default=self.n_ctx)):
            (note or log.warning)(
                f"-c {self.n_ctx} is more than the {known} tokens the models are made for."
            )
        context = replace(context, n_ctx=self.n_ctx)
        self.base_session = Session(base, context, hidden=switch.needs_hidden)
        self.base_session.progress = _share(progress, "base prompt")
        self.most_shared = base.n_vocab  # of token ids; fewer in a team that is not all open
        self.members = [
            Member(
                name, model, self.base_session, context, bridge=bridge, overlap=overlap,
                progress=progress, note=self._note, weighed=self._weighed,
            )
            for name, model in in_order(switch, experts).items()
        ]  # fmt: skip
        # Checks the width of the switch before the first token.
        switch.reader(base, self.n_shared)
        # Experts work in turns; of one there is nothing to say.
        self.room = Room(self.members, max_memory, self._note) if len(experts) > 1 else None
        self.base_session.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the models and their contexts, after the token that is being written."""
        if not self._lock.home.is_here:
            return  # they are the parent's
        self._closing = True
        with self._lock.held():
            experts = (member.close for member in self.members)
            close_each(*experts, self.base_session.close, self.base.close)

    @property
    def n_shared(self) -> int:
        """Token ids below this are in the vocabulary of all models."""
        return min(self.most_shared, *(member.n_shared for member in self.members))

    @property
    def expert(self) -> Expert:
        """The expert's timeline; of several, the first one's."""
        return self.members[0].timeline

    @property
    def expert_session(self) -> Session:
        """The expert's session in this process, once no catch-up is running on it; of several
        experts, the first one's.

        Raises ColmError where the expert is on a server.
        """
        return self.members[0].session

    @property
    def expert_is_here(self) -> bool:
        """Whether every expert runs in this process."""
        return all(member.here is not None for member in self.members)

    @property
    def expert_is_loaded(self) -> bool:
        """Whether an expert takes memory in this process."""
        return any(member.is_loaded for member in self.members)

    def unload_expert(self) -> None:
        """Free the memory of the experts in this process; the next token of each loads it again."""
        with self._lock.held():
            here = [member for member in self.members if member.here is not None]
            close_each(*(member.unload for member in here or self.members))

    def check_one_expert(self, what: str) -> None:
        """Raise ColmError for what works with one expert, where there are several."""
        if len(self.members) > 1:
            raise ColmError(f"{what} works with one expert; give -me once")

    def cost_tables(self) -> tuple[CostTable, CostTable]:
        """Return the cost tables of the base and the first expert: measured once, then cached on
        disk."""
        with self._lock.held():
            return self.members[0].cost_tables(hasty=False)

    def measure_at_length(self, cancel: Cancel) -> None:
        """Measure again what was measured in a hurry, while nobody waits. Raises CancelledError."""
        with self._lock.held():
            if refine((self.base_session, *(member.here for member in self.members)), cancel):
                for member in self.members:
                    member.planner.forget_costs()

    def note_speed(self) -> None:
        """Say where the pair is slower than its expert alone, if what decodes cost is known."""
        self._weighed(kept_table(self.base_session), kept_table(self.expert_session))

    def _weighed(self, base: CostTable | None, expert: CostTable | None) -> None:
        rate = expected_rate(self.switch, self.defaults)
        # No expert alone does what several do.
        if len(self.members) == 1 and (slow := slowness_note(base, expert, rate)):
            self._note(slow)

    def save_prompts(self, path: str | os.PathLike[str]) -> None:
        """Save what both models have evaluated to a file, for `load_prompts`. Raises ColmError when
        it cannot be written."""
        self.check_one_expert("a prompt cache")
        with self._lock.held():
            save_prompts(path, self.base_session, self.expert_session)

    def load_prompts(self, path: str | os.PathLike[str]) -> None:
        """Load what `save_prompts` saved: the next answer evaluates only what differs from it.

        Raises ColmError when the file is broken, or belongs to other models or settings.
        """
        self.check_one_expert("a prompt cache")
        with self._lock.held():
            load_prompts(path, self.base_session, self.expert_session)

    def generate(self, prompt: str, **options: Any) -> Answer:
        """Answer a prompt (one user turn, where the base has a chat template).

        options: fields of `Options`, or `system`, a system prompt.
        """
        return self._exhaust(self.stream(prompt, **options))

    def stream(self, prompt: str, *, system: str | None = None, **options: Any) -> Stream:
        """Answer a prompt step by step; options as for `generate`."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        if isinstance(prompt, str) and not prompt.strip():
            raise PromptError("the prompt is empty; write at least one word")
        return self.stream_chat([*messages, {"role": "user", "content": prompt}], **options)

    def chat(self, messages: Sequence[Message], **options: Any) -> Answer:
        """Answer a conversation, a list of {"role", "content"}."""
        return self._exhaust(self.stream_chat(messages, **options))

    def stream_chat(self, messages: Sequence[Message], **options: Any) -> Stream:
        """Answer a conversation step by step; options as for `generate`."""
        chosen = self.defaults.with_changes(**options)
        return self.stream_tokens(self.prompt_tokens(messages, raw=chosen.raw), chosen)

    def astream(self, prompt: str, *, system: str | None = None, **options: Any) -> AsyncStream:
        """Answer a prompt for `async for`; options as for `generate`."""
        return AsyncStream(self.stream(prompt, system=system, **options))

    def astream_chat(self, messages: Sequence[Message], **options: Any) -> AsyncStream:
        """Answer a conversation for `async for`; options as for `generate`."""
        return AsyncStream(self.stream_chat(messages, **options))

    def prompt_tokens(
        self, messages: Sequence[Message], /, *, raw: bool = False, **variables: Any
    ) -> list[int]:
        """Return a conversation as token ids; as for `prompt_text`."""
        return self.tokens_of(self.prompt_text(messages, raw=raw, **variables))

    def prompt_text(
        self, messages: Sequence[Message], /, *, raw: bool = False, **variables: Any
    ) -> str:
        """Return a conversation as the base's chat template writes it.

        Without a template (or raw), the contents are joined with a blank line between them. Unless
        raw, names of control tokens in it that are the template's own stay so, and those in
        somebody's words are parted, so that nobody can forge a turn.
        variables: what the template may read besides, such as `enable_thinking`.

        Raises PromptError for what is not a conversation, and where the template refuses it.
        """
        chat_template.check(messages)
        if raw:
            return chat_template.joined(messages)
        messages, variables = chat_template.each_text([[*messages], variables], self.base.plain)
        if self.template is not None:
            return self.template.render(messages, **variables)
        if warning := chat_template.lost_roles(messages):
            self._note_once(f"{self.base.path.name} {warning}")
        return chat_template.joined(messages)

    def tokens_of(self, text: str) -> list[int]:
        """Return the token ids of a prompt, after one begin token where the vocabulary has it."""
        bos = self.base.bos_text
        return self.base.tokenize(text, bos=not (bos and text.startswith(bos)))

    def check_prompt(self, tokens: Sequence[int], threshold: float) -> None:
        """Raise PromptError for no tokens, too many, or some that are not in the vocabulary."""
        if not tokens:
            raise PromptError("the prompt is empty; write at least one word")
        if len(tokens) > self.n_ctx:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx}; "
                "shorten it or raise -c"
            )
        n = self.n_shared if threshold < 1 else self.base.n_vocab  # alone the base reads all
        outside = next((t for t in tokens if not 0 <= t < n), None)
        if outside is not None:
            whose = "all models" if threshold < 1 else "the base"
            expected = f"expected ids below {n}"
            raise PromptError(f"token {outside} is not in the vocabulary of {whose}; {expected}")

    def check_options(self, options: Options) -> None:
        """Raise ColmError for what this pair cannot do."""
        if (options.reviews or options.doubts) and not self.expert_is_here:
            what = "review" if options.reviews else "doubt"
            raise ColmError(f"{what}: {why_unread(self.members)}")
        self._grammars.parsed(options.grammar)

    def stream_tokens(
        self,
        tokens: Sequence[int],
        options: Options,
        timelines: Sequence[Timeline] | None = None,
        switch: AnySwitch | None = None,
    ) -> Stream:
        """Continue token ids.

        timelines: of the base and then of each expert, if not the pair's own sessions. One thread
            at a time may use them; other answers may run at the same time.
        switch: of this answer, if not the pair's own; it may read no more than that one does.

        Raises PromptError when there are no tokens or they do not fit the context.
        """
        self.check_options(options)
        options = options.with_changes(review=self.review(options, switch))
        switch = switch or self.switch
        threshold = threshold_of(switch, options)
        self.check_prompt(tokens, threshold)
        n_choose = self.n_shared if threshold < 1 else self.base.n_vocab  # alone it has all
        goes_back = (options.reviews or options.doubts) and 0 < threshold < 1
        cancel, own = Cancel(), timelines is None
        writer = switch.expert if isinstance(switch, Only) else None if self.room else 0
        row = self.base.token_id(DEFER_TOKEN) if isinstance(switch, DeferRow) else None
        base, *experts = timelines or self._timelines(
            options, threshold, n_choose=n_choose, defer_row=row, goes_back=goes_back
        )
        grammar = self._grammars.parsed(options.grammar)
        picker = picker_of(options, n_choose, tokens, grammar, row, goes_back=goes_back)
        decoder = Decoder(
            base,
            experts,
            policy_of(switch, self.base, options, threshold, n_choose),
            picker,
            tokens,
            end_tokens=ends_of(self.base, self.members),
            max_tokens=options.max_tokens,
            schedule=schedule_of(
                options,
                threshold,
                goes_back=goes_back,
                floor=review_floor(switch, options),
                follow=(self.room or self.members[0]).follow if own and threshold < 1 else None,
                # Bets are priced for an answer alone: slots share their batches.
                planners=plan_bets(self.members, options, threshold) if own else (),
                only=writer,
            ),
            cancel=cancel,
            lock=self._lock if own else None,
            near=self._prepare if threshold < 1 else None,
            sources=[member.source for member in self.members],
        )
        unreadable = "" if threshold >= 1 else why_unread(self.members)
        return Stream(decoder, self.base, options.stop, cancel, unreadable)

    def _timelines(self, options: Options, threshold: float, **more: Any) -> tuple[Timeline, ...]:
        """Return the pair's own timelines for an answer: of the base and of each expert."""
        overlaps = {member.timeline: member.overlaps for member in self.members}
        base, experts = timelines_of(
            self.base_session, overlaps, options, threshold, **more,
            across=[member.across for member in self.members],
        )  # fmt: skip
        if self.room is not None:
            experts = self.room.guests(experts)
        return base, *experts

    def _prepare(self, expert: int) -> None:
        """Begin to read an expert's weights, unless that would take the room of others."""
        here = self.members[expert].here
        if here is not None and not (self.room and self.room.limit):
            prepare(here, self.base_session)

    def _exhaust(self, stream: Stream) -> Answer:
        with self._lock.held():
            for _ in stream:
                if self._closing:
                    raise ModelError("the pair is closed; load it again")
        return stream.answer()

    @contextmanager
    def switched(self, switch: AnySwitch) -> Iterator[None]:
        """Answer with another switch inside the `with` block."""
        own, self.switch = self.switch, switch
        hidden = self.base_session.want_hidden(switch.needs_hidden)
        try:
            yield
        finally:
            self.switch = own
            self.base_session.want_hidden(hidden)

    def threshold(self, options: Options) -> float:
        """Return the threshold that the options ask for; where it follows a rate, its start."""
        return threshold_of(self.switch, options)

    def review(self, options: Options, switch: AnySwitch | None = None) -> float:
        """Return the tolerance of review that the options ask for, or else the switch's own."""
        return review_of(switch or self.switch, options, possible=self.expert_is_here)


def _share(progress: Progress | None, what: str) -> Callable[[float], None] | None:
    return None if progress is None else partial(progress, what)


def load(
    model: str | os.PathLike[str] | None = None,
    expert: Experts | None = None,
    switch: str | os.PathLike[str] | None = None,
    *,
    pair: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    bridge: bool = False,
    n_ctx: int = 0,
    n_threads: int = 0,
    threads_auto: bool = False,
    n_ubatch: int = 0,
    n_gpu_layers: int = 0,
    n_gpu_layers_expert: int | None = None,
    rpc: str | Sequence[str] = (),
    flash_attn: Literal["auto", "on", "off"] = "auto",
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    overlap: bool | None = None,
    offline: bool = False,
    max_memory: int = 0,
    expert_required: bool = False,
    expert_timeout: float = EXPERT_TIMEOUT,
    defaults: Options | None = None,
    note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Load a pair: a base, an expert or several, and a switch; or the pair that ships here.

    model, expert, switch, lora (an adapter for the base): GGUF files, names in models.txt, or
        user/repo:file.gguf on the Hugging Face Hub.
    expert: may be the address of a llama.cpp, vLLM or colm-edge server, http://host:port or
        http://host:port#MODEL. Several, as a mapping of names or a list in which NAME=REF gives
        a name, need a switch that was trained for them.
    switch: may be "margin" (the default beside two models), "entropy" or "defer-row".
    pair: a name in models.txt instead; beside models, it stands for its switch.
    bridge: let the experts' vocabularies be others than the base's.
    n_ctx: tokens the contexts hold; 0 takes what both models were trained for, at most 4096.
    n_threads: 0 takes every core that other programs leave, or one for a very small model.
    threads_auto: use fewer than n_threads too while other programs use the cores.
    n_ubatch: tokens of a prompt evaluated at a time; 0: 512, or 128 on a CPU.
    n_gpu_layers: as in llama.cpp, each model its own.
    rpc: machines that hold the expert, HOST:PORT of llama.cpp's RPC servers; all its layers unless
        n_gpu_layers_expert says how many.
    flash_attn, cache_type_k, cache_type_v: as in llama.cpp, of both models' contexts; on a CPU,
        "auto" is on for very small models and for eight or more answers at once only.
    overlap: whether the base goes on while a loaded expert evaluates, which catches up with long
        gaps then; None: where they are on different machines or devices, or there are cores enough.
    max_memory: bytes that the weights and contexts of several experts may take together; the one
        that was not used for longest is unloaded for the next. 0: no limit. It is for several.
    offline: download nothing; what is not in the Hub's cache is an error.
    expert_required: a remote expert that fails is a ModelError; else the base goes on alone.
    expert_timeout: seconds that a request to a remote expert may take.
    note: called with a line about anything that takes a while; by default that line is logged.
    progress: told what is under way and the share of it that is done, 0 to 1: "base" and "expert",
        whose weights are read (the expert's at its first token), "base prompt" and "expert prompt",
        evaluations longer than one batch; of several experts "expert NAME". Called on the thread
        that does it; what it raises ends it, and reaches the caller.

    Raises ModelError, SwitchError or MismatchError, each saying what to do.
    """
    context = ContextOptions(
        n_ctx=n_ctx, n_threads=n_threads, n_ubatch=n_ubatch, flash_attn=flash_attn,
        cache_type_k=cache_type_k, cache_type_v=cache_type_v, threads_auto=threads_auto,
    )  # fmt: skip
    check_whole("max_memory", max_memory, 0, sys.maxsize)
    rpc = (rpc,) if isinstance(rpc, str) else rpc
    refs = [None if ref is None else os.fspath(ref) for ref in (model, switch, lora)]
    say = note or log.info
    check_offline(rpc if offline else ())
    experts_given = named(expert)
    if pair is None:
        check_rule(refs[1], experts_given)
    files = choose_pair(refs[0], experts_given, refs[1], pair, offline=offline, note=say)
    adapter = None if refs[2] is None else resolve(refs[2], "lora", offline=offline, note=say)
    if max_memory and len(files.experts) == 1:
        raise ColmError("--max-memory is shared by several experts, and one is given; leave it out")
    head = load_switch(files.switch)
    in_order(head, files.experts)  # refused now, not after seconds of reading
    with ExitStack() as opened:  # closed again if something does not fit
        base = Model(files.base, n_gpu_layers, adapter, _share(progress, "base"))
        opened.callback(base.close)
        more = -1 if rpc else n_gpu_layers
        layers = more if n_gpu_layers_expert is None else n_gpu_layers_expert
        experts: dict[str, Model | RemoteExpert] = {}
        for name, file in files.experts.items():
            if is_url(file) and rpc:
                raise ColmError("an expert on a server cannot be spread over RPC servers as well")
            what = f"expert {name}" if name else "expert"
            if is_url(file):
                experts[name] = RemoteExpert(
                    file, base, required=expert_required, timeout=expert_timeout, note=note,
                    bridge=bridge,
                )  # fmt: skip
            else:
                experts[name] = Model(file, layers, progress=_share(progress, what), rpc=rpc)
            opened.callback(experts[name].close)
        loaded = Pair(
            base, experts, head, context, defaults, is_demo=files.is_demo, bridge=bridge,
            overlap=overlap, max_memory=max_memory, note=note, progress=progress,
        )  # fmt: skip
        opened.pop_all()
    for warning in warnings_of(head, base, experts):
        (note or log.warning)(warning)
    return loaded
