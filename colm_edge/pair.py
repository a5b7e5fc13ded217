"""The text API: load a base, an expert and a switch; ask; read who wrote what."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, Self

from colm_edge.cancel import Cancel
from colm_edge.decode.background import Background, can_overlap, prepare
from colm_edge.decode.loop import Decoder
from colm_edge.decode.parts import picker_of, policy_of, schedule_of, timelines_of
from colm_edge.decode.planner import Planner
from colm_edge.decode.policy import expected_rate, review_of, threshold_of
from colm_edge.decode.timeline import Expert, Timeline
from colm_edge.errors import ColmError, ContextError, ModelError, PromptError
from colm_edge.llama import chat_template
from colm_edge.llama.chat_template import ChatTemplate, Message
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.costs import CostTable, slower
from colm_edge.llama.grammar import Grammars
from colm_edge.llama.measure import cost_table, kept_table, refine
from colm_edge.llama.model import Model, shared_vocab
from colm_edge.llama.owners import HomeLock
from colm_edge.llama.prompt_cache import load_prompts, save_prompts
from colm_edge.llama.session import Session
from colm_edge.options import EXPERT_TIMEOUT, Options
from colm_edge.references import choose_pair, is_this_machine, is_url
from colm_edge.remote.client import RemoteExpert, RemoteSession
from colm_edge.stream import Answer, AsyncStream, Stream
from colm_edge.switch.load import load_switch, warnings_of
from colm_edge.switch.reading import AnySwitch
from colm_edge.switch.rules import DEFER_TOKEN, DeferRow

log = logging.getLogger("colm_edge")

# Contexts cost memory: unless asked for more, no more than this.
DEFAULT_N_CTX = 4096

Progress = Callable[[str, float], None]


class Pair:
    """A base, an expert and a switch that answer together. See `load`.

    Any thread may use it, but no child of fork. `generate` and `chat` run one after the other; a
    second caller waits. Two streams at once take turns token by token and stay correct, but each
    turn evaluates the other's prompt again, so it is better to finish one first.
    """

    def __init__(
        self,
        base: Model,
        expert: Model | RemoteExpert,
        switch: AnySwitch,
        context: ContextOptions | None = None,
        defaults: Options | None = None,
        *,
        is_demo: bool = False,
        overlap: bool | None = None,
        note: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Check that the three fit each other and open the base; nothing is evaluated yet.

        overlap, note: as for `load`. progress: as for `load`, but of prompts only.

        Raises MismatchError naming what differs, ModelError for files that cannot take part.
        """
        self.base, self.switch, self.is_demo = base, switch, is_demo
        self.defaults = defaults or Options()
        self._note = note or log.info
        self._note_once = cache(self._note)
        self._lock = HomeLock()
        text = base.chat_template
        self.template = ChatTemplate(text, base.bos_text, base.eos_text) if text else None
        self._grammars = Grammars(base)
        if isinstance(expert, RemoteExpert):
            n_shared, longest = expert.n_shared, expert.n_ctx
        else:
            n_shared, longest = shared_vocab(base, expert), expert.n_ctx_train
        self._n_shared = n_shared
        # Checks the width of the switch before the first token.
        switch.reader(base, n_shared)
        context = context or ContextOptions()
        trained = [n for n in (base.n_ctx_train, longest) if n > 0]
        self.n_ctx = context.n_ctx or min([DEFAULT_N_CTX, *trained])
        if self.n_ctx > (known := min(trained, default=self.n_ctx)):
            self._note(f"-c {self.n_ctx} is more than the {known} tokens the models are made for.")
        context = replace(context, n_ctx=self.n_ctx)
        self.base_session = Session(base, context, hidden=switch.needs_hidden)
        self.base_session.progress = _share(progress, "base prompt")
        self._here: Session | None = None  # the expert's session, where it is in this process
        self._owned: list[Model] = [base]
        self.expert: Expert
        if isinstance(expert, RemoteExpert):
            self.expert = expert.session()
            # A server on this machine may use the same cores.
            beside = not expert.is_local
        else:
            self._owned.append(expert)
            self._here = self.expert = Session(expert, context)
            self._here.progress = _share(progress, "expert prompt")
            beside = can_overlap(self.base_session, self._here)
        self._overlap = beside if overlap is None else overlap
        if self._here is not None and self._overlap:
            self.expert = Background(self._here)
        self._costs: CostTable | None = None  # of the expert, once the fast schedule needs them
        self.planner = Planner(self._weigh)
        self.base_session.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free both models and their contexts, after the token that is being written."""
        if not self._lock.home.is_here:
            return  # they are the parent's
        with self._lock:
            self.expert.close()
            self.base_session.close()
            for model in self._owned:
                model.close()

    @property
    def n_shared(self) -> int:
        """Token ids below this are in the vocabulary of both models."""
        # A server that was down when the pair was loaded tells it later.
        if isinstance(self.expert, RemoteSession):
            return self.expert.n_shared
        return self._n_shared

    @property
    def expert_session(self) -> Session:
        """The expert's session in this process, once no catch-up is running on it.

        Raises ColmError where the expert is on a server.
        """
        if self._here is None:
            raise ColmError(self._not_here())
        if isinstance(self.expert, Background):
            self.expert.wait()
        return self._here

    @property
    def expert_is_here(self) -> bool:
        """Whether the expert runs in this process."""
        return self._here is not None

    @property
    def expert_is_loaded(self) -> bool:
        """Whether the expert takes memory in this process."""
        return self._here is not None and self._here.model.loaded

    def unload_expert(self) -> None:
        """Free the memory of an expert in this process; its next token loads it again."""
        with self._lock:
            session = self.expert_session
            session.close()
            session.model.unload()

    def _not_here(self) -> str:
        return (
            f"this needs the expert's weights here, and they are at {self.expert.name}; "
            "give a GGUF file (-me)"
        )

    def cost_tables(
        self, *, hasty: bool = False, cancel: Cancel | None = None
    ) -> tuple[CostTable, CostTable]:
        """Return the cost tables of base and expert: measured once, in half a second each if it is
        hasty, then cached on disk."""
        measured = partial(cost_table, hasty=hasty, note=self._note, cancel=cancel)
        with self._lock:
            return measured(self.base_session), measured(self.expert_session)

    def measure_at_length(self, cancel: Cancel) -> None:
        """Measure again what was measured in a hurry, while nobody waits. Raises CancelledError."""
        with self._lock:
            if refine((self.base_session, self._here), cancel):
                self.planner.forget_costs()

    def _weigh(self, cancel: Cancel | None) -> tuple[CostTable, CostTable] | None:
        """Return the cost tables, and cut the batches of this and later answers of the fast
        schedule by the expert's; return None where they cannot be measured."""
        try:
            base, expert = self.cost_tables(hasty=True, cancel=cancel)
        except ModelError as e:  # for example, no memory for another context
            self._note(f"the fast schedule works without bets: {e}")
            return None
        self.note_speed((base, expert))
        self._costs = None if base.is_quick else expert
        self.expert_session.costs = self._costs
        return base, expert

    def note_speed(self, tables: tuple[CostTable, CostTable] | None = None) -> None:
        """Say where the pair is slower than its expert alone, if what decodes cost is known."""
        kept = tables or (kept_table(self.base_session), kept_table(self.expert_session))
        if slow := slower(*kept, expected_rate(self.switch, self.defaults)):
            self._note(slow)

    def save_prompts(self, path: str | os.PathLike[str]) -> None:
        """Save what both models have evaluated to a file, for `load_prompts`.

        Raises ColmError when it cannot be written.
        """
        with self._lock:
            save_prompts(path, self.base_session, self.expert_session)

    def load_prompts(self, path: str | os.PathLike[str]) -> None:
        """Load what `save_prompts` saved: the next answer evaluates only what differs from it.

        Raises ColmError when the file is broken, or belongs to other models or settings.
        """
        with self._lock:
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
        self, messages: Sequence[Message], *, raw: bool = False, **variables: Any
    ) -> list[int]:
        """Return a conversation as token ids; as for `prompt_text`."""
        return self.tokens_of(self.prompt_text(messages, raw=raw, **variables))

    def prompt_text(
        self, messages: Sequence[Message], *, raw: bool = False, **variables: Any
    ) -> str:
        """Return a conversation as the base's chat template writes it.

        Without a template (or raw), the contents are joined with a blank line between them. Unless
        raw, names of control tokens in it that are the template's own stay so, and those in
        somebody's words are parted, so that nobody can forge a turn.
        variables: what the template may read besides, such as `enable_thinking`.

        Raises PromptError for what is no conversation, and where the template refuses it.
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
        """Return the token ids of a prompt, behind one begin token where the vocabulary has it."""
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
        out_of_range = next((t for t in tokens if not 0 <= t < n), None)
        if out_of_range is not None:
            raise PromptError(
                f"token {out_of_range} of the prompt is not in the vocabulary of both models "
                f"({n} shared tokens)"
            )

    def check_options(self, options: Options) -> None:
        """Raise ColmError for what this pair cannot do."""
        if (options.reviews or options.doubts) and not self.expert_is_here:
            what = "review" if options.reviews else "doubt"
            raise ColmError(f"{what} needs the expert in this process: {self._not_here()}")
        self._grammars.parsed(options.grammar)

    def stream_tokens(
        self,
        tokens: Sequence[int],
        options: Options,
        timelines: tuple[Timeline, Timeline] | None = None,
        switch: AnySwitch | None = None,
    ) -> Stream:
        """Continue token ids.

        timelines: of base and expert, if not the pair's own sessions. One thread at a time may use
            them; other answers may run at the same time.
        switch: of this answer, if not the pair's own; it may read no more than that one does.

        Raises PromptError when there are no tokens or they do not fit the context.
        """
        self.check_options(options)
        options = options.with_changes(review=self.review(options, switch))
        threshold = self.threshold(options)
        self.check_prompt(tokens, threshold)
        n_choose = self.n_shared if threshold < 1 else self.base.n_vocab  # alone it has all
        goes_back = (options.reviews or options.doubts) and 0 < threshold < 1
        cancel, alone, here = Cancel(), timelines is None, self._here
        base, expert = timelines or timelines_of(
            self.base_session,
            self.expert,
            options,
            threshold,
            goes_back=goes_back,
            overlaps=self._overlap,
        )
        row = self.base.token_id(DEFER_TOKEN) if isinstance(self.switch, DeferRow) else None
        grammar = self._grammars.parsed(options.grammar)
        picker = picker_of(options, n_choose, tokens, grammar, row, goes_back=goes_back)
        decoder = Decoder(
            base,
            [expert],
            policy_of(switch or self.switch, self.base, options, threshold, n_choose),
            picker,
            tokens,
            end_tokens=self.base.end_tokens | self.expert.end_tokens,
            max_tokens=options.max_tokens,
            schedule=schedule_of(
                options,
                threshold,
                goes_back=goes_back,
                follow=self.expert.follow if alone and threshold < 1 else None,
                # Bets are priced for an answer alone: slots share their batches.
                planner=self._planner_for(options, threshold) if alone else None,
            ),
            cancel=cancel,
            lock=self._lock if alone else None,
            near=partial(prepare, here, self.base_session) if here and threshold < 1 else None,
        )
        unreadable = "" if threshold >= 1 or self.expert_is_here else self._not_here()
        return Stream(decoder, self.base, options.stop, cancel, unreadable)

    def _planner_for(self, options: Options, threshold: float) -> Planner | None:
        """Return what places the fast schedule's bets, or None where there are none: a bet needs
        the costs of decodes, which a server does not report."""
        bets = options.schedule == "fast" and self.expert_is_here and 0 < threshold < 1
        if self._here is not None:
            self._here.costs = self._costs if bets else None
        return self.planner if bets else None

    def _exhaust(self, stream: Stream) -> Answer:
        with self._lock:
            for _ in stream:
                pass
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
    expert: str | os.PathLike[str] | None = None,
    switch: str | os.PathLike[str] | None = None,
    *,
    pair: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    n_ctx: int = 0,
    n_threads: int = 0,
    threads_auto: bool = False,
    n_ubatch: int = 0,
    n_gpu_layers: int = 0,
    n_gpu_layers_expert: int | None = None,
    rpc: Sequence[str] = (),
    flash_attn: Literal["auto", "on", "off"] = "auto",
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    overlap: bool | None = None,
    offline: bool = False,
    expert_required: bool = False,
    expert_timeout: float = EXPERT_TIMEOUT,
    defaults: Options | None = None,
    note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Load a pair: a base, an expert and a switch, or the pair that ships here.

    model, expert: GGUF files, names in models.txt, or user/repo:file.gguf on the Hugging Face Hub.
    expert: may be the address of a llama.cpp, vLLM or colm-edge server, http://host:port or
        http://host:port#MODEL.
    switch: a file, "margin" (the default beside two models), "entropy", or "defer-row".
    pair: a name in models.txt instead.
    lora: a LoRA adapter for the base, a GGUF file.
    n_ctx: tokens the contexts hold; 0 takes what both models were trained for, at most 4096.
    n_threads: 0 takes every core that other programs leave, or one for a very small model.
    threads_auto: use fewer than n_threads too while other programs use the cores.
    n_ubatch: tokens of a prompt evaluated at a time; 0: 512, or 128 on a CPU.
    n_gpu_layers: as in llama.cpp, each model its own.
    rpc: machines that hold the expert, HOST:PORT of llama.cpp's RPC servers; all its layers unless
        n_gpu_layers_expert says how many.
    flash_attn, cache_type_k, cache_type_v: as in llama.cpp, of both models' contexts; flash
        attention that is "auto" is on with a GPU only.
    overlap: whether the base goes on while a loaded expert evaluates, which catches up with long
        gaps then; None: where they are on different machines or devices, or there are cores enough.
    offline: download nothing; what is not in the Hub's cache is an error.
    expert_required: a remote expert that fails is a ModelError; else the base goes on alone.
    expert_timeout: seconds that a request to a remote expert may take.
    note: called with a line about anything that takes a while; by default that line is logged.
    progress: told what is under way and the share of it that is done, 0 to 1: "base" and "expert",
        whose weights are read (the expert's at its first token), "base prompt" and "expert prompt",
        evaluations longer than one batch. Called on the thread that does it; what it raises ends
        it, and reaches the caller.

    Raises ModelError, SwitchError or MismatchError, each saying what to do.
    """
    if min(n_ctx, n_threads, n_ubatch) < 0:
        raise ColmError("n_ctx, n_threads, n_ubatch must not be negative; 0 lets colm-edge choose")
    refs = [None if ref is None else os.fspath(ref) for ref in (model, expert, switch)]
    told = note or log.info
    for server in rpc if offline else ():
        if not is_this_machine(server.rpartition(":")[0]):
            raise ModelError(
                f"{server}: not asked with --offline; leave that out, or leave out rpc"
            )
    files = choose_pair(refs[0], refs[1], refs[2], pair, offline=offline, note=told)
    head = load_switch(files.switch)
    with ExitStack() as opened:  # closed again if something does not fit
        base = Model(files.base, n_gpu_layers, lora, _share(progress, "base"))
        opened.callback(base.close)
        other: Model | RemoteExpert
        if is_url(files.expert):
            if rpc:
                raise ColmError("an expert on a server cannot be spread over RPC servers as well")
            other = RemoteExpert(
                files.expert, base, required=expert_required, timeout=expert_timeout, note=note
            )
        else:
            layers = -1 if rpc else n_gpu_layers
            if n_gpu_layers_expert is not None:
                layers = n_gpu_layers_expert
            other = Model(files.expert, layers, progress=_share(progress, "expert"), rpc=rpc)
        opened.callback(other.close)
        context = ContextOptions(
            n_ctx=n_ctx, n_threads=n_threads, n_ubatch=n_ubatch, flash_attn=flash_attn,
            cache_type_k=cache_type_k, cache_type_v=cache_type_v, threads_auto=threads_auto,
        )  # fmt: skip
        loaded = Pair(
            base, other, head, context, defaults,
            is_demo=files.is_demo, overlap=overlap, note=note, progress=progress,
        )  # fmt: skip
        opened.pop_all()
    for warning in warnings_of(head, {"base": base, "expert": other}):
        told(warning)
    return loaded
