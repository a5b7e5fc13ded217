"""The text API: load a base, an expert and a switch; ask; read who wrote what."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

from colm_edge.decode.background import Background
from colm_edge.decode.fast import FastDecoder
from colm_edge.decode.loop import Decoder, Timeline
from colm_edge.decode.planner import Planner
from colm_edge.errors import ColmError, ContextError, ModelError, PromptError
from colm_edge.llama.backend import supports_gpu
from colm_edge.llama.context import SMALL_MODEL_BYTES, ContextOptions, n_cores
from colm_edge.llama.costs import CostTable
from colm_edge.llama.measure import cost_table
from colm_edge.llama.model import Model, shared_vocab
from colm_edge.llama.prompt_cache import load_prompts, save_prompts
from colm_edge.llama.sampling import ChainSampler
from colm_edge.llama.session import Session
from colm_edge.options import Options
from colm_edge.references import LOCAL_HOSTS, choose_pair, is_url
from colm_edge.remote.client import RemoteExpert
from colm_edge.stream import Answer, AsyncStream, Stream
from colm_edge.switch.load import load_switch
from colm_edge.switch.reading import AnySwitch
from colm_edge.switch.rules import DEFER_TOKEN, DeferRow

log = logging.getLogger("colm_edge")
# Contexts cost memory: unless asked for more, no more than this.
DEFAULT_N_CTX = 4096
Message = Mapping[str, str]
Progress = Callable[[str, float], None]


class Pair:
    """A base, an expert and a switch that answer together. See `load`.

    Any thread may use it. `generate` and `chat` are written one after the other, a second caller
    waits; streams take turns token by token and stay right, since a session evaluates whatever
    prefix it is handed, but two at once evaluate each other's prompts anew at every turn: better
    finish one before the next.
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

        overlap, note: as for `load`; progress: likewise, of prompts alone.

        Raises MismatchError naming what differs, ModelError for files that cannot take part.
        """
        self.base, self.switch, self.is_demo = base, switch, is_demo
        self.defaults = defaults or Options()
        self.remote = expert if isinstance(expert, RemoteExpert) else None
        self._remote_session = self.remote.session() if self.remote else None
        self._expert = None if isinstance(expert, RemoteExpert) else expert
        if isinstance(expert, RemoteExpert):
            self.n_shared, longest = expert.n_shared, expert.n_ctx
        else:
            self.n_shared, longest = shared_vocab(base, expert), expert.n_ctx_train
        # Checks the width of the switch before the first token.
        switch.reader(base, self.n_shared)
        context = context or ContextOptions()
        trained = [n for n in (base.n_ctx_train, longest) if n > 0]
        n_ctx = context.n_ctx or min([DEFAULT_N_CTX, *trained])
        self.n_ctx = n_ctx
        context = replace(context, n_ctx=n_ctx)
        self.base_session = Session(base, context, hidden=switch.needs_hidden)
        self._expert_session = Session(self._expert, context) if self._expert else None
        if progress is not None:
            self.base_session.progress = partial(progress, "base prompt")
            if self._expert_session is not None:
                self._expert_session.progress = partial(progress, "expert prompt")
        self.base_session.open()
        self._lock = threading.RLock()
        self._template: Any = None
        self._note = note or log.info
        self.planner = Planner(self.cost_tables)
        # The expert on a thread of its own, where the two are not in each other's way.
        self.background: Background | None = None
        if self.remote is None and (self._overlaps() if overlap is None else overlap):
            self.background = Background(self.expert_session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free both models and their contexts, after the token that is being written."""
        with self._lock:
            if self.background is not None:
                self.background.close()
            for session in (self.base_session, self._expert_session):
                if session is not None:
                    session.close()
            for model in (self.base, self._expert, self.remote):
                if model is not None:
                    model.close()

    @property
    def expert(self) -> Model:
        """The expert's model. Raises ColmError where it is on a server."""
        if self._expert is None:
            raise ColmError(self._not_here())
        return self._expert

    def _sessions(self) -> tuple[Session, ...]:
        """Return the timelines that are here."""
        both = (self.base_session, self._expert_session)
        return tuple(session for session in both if session is not None)

    @property
    def expert_session(self) -> Session:
        """The expert's own timeline. Raises ColmError where it is on a server."""
        if self._expert_session is None:
            raise ColmError(self._not_here())
        return self._expert_session

    @property
    def expert_name(self) -> str:
        """The expert's file, or its server's address."""
        return str(self.expert.path) if self.remote is None else self.remote.url

    @property
    def expert_fingerprint(self) -> str:
        """What tells the expert from others."""
        return (self.remote or self.expert).fingerprint

    def _not_here(self) -> str:
        return (
            f"this needs the expert's weights here, and they are at {self.expert_name}; "
            "give a GGUF file (-me)"
        )

    def _overlaps(self) -> bool:
        """Say whether both models can work at once without being in each other's way."""
        base, expert = self.base_session, self.expert_session
        if expert.model.rpc:
            return True
        on_gpu = [s.model.n_gpu_layers != 0 and supports_gpu() for s in (base, expert)]
        if on_gpu[0] != on_gpu[1]:
            return True
        # A decode of a small model takes no longer than handing it to another thread.
        small = expert.model.path.stat().st_size < SMALL_MODEL_BYTES
        return not any(on_gpu) and not small and base.n_threads + expert.n_threads <= n_cores()

    def cost_tables(self, *, fresh: bool = False) -> tuple[CostTable, CostTable]:
        """Return what decodes cost base and expert here: measured once, then kept on disk.

        From then on the expert catches up in the batches that cost least.
        """
        with self._lock:
            session = self.expert_session
            base = cost_table(self.base_session, fresh=fresh, note=self._note)
            expert = cost_table(session, fresh=fresh, note=self._note)
            session.costs = None if base.is_quick else expert
            return base, expert

    def save_prompts(self, path: str | os.PathLike[str]) -> None:
        """Keep what both models have evaluated in a file, for `load_prompts` of such a pair.

        Raises ColmError when it cannot be written.
        """
        with self._idle():
            save_prompts(path, self.base_session, self.expert_session)

    def load_prompts(self, path: str | os.PathLike[str]) -> None:
        """Take up what `save_prompts` kept: an answer evaluates only what differs from it.

        Raises ColmError when the file is broken or of other models or settings.
        """
        with self._idle():
            load_prompts(path, self.base_session, self.expert_session)

    @contextmanager
    def _idle(self) -> Iterator[None]:
        with self._lock:
            if self.background is not None:
                self.background.wait()
            yield

    def generate(self, prompt: str, **options: Any) -> Answer:
        """Answer a prompt (one user turn, where the base has a chat template).

        options: fields of `Options`, or `system`, a system prompt.
        """
        return self._exhaust(self.stream(prompt, **options))

    def stream(self, prompt: str, *, system: str | None = None, **options: Any) -> Stream:
        """Answer a prompt step by step; options as for `generate`."""
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if isinstance(prompt, str) and not prompt.strip():
            raise PromptError("the prompt is empty; write at least one word")
        return self.stream_chat(messages, **options)

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

    def prompt_tokens(self, messages: Sequence[Message], *, raw: bool = False) -> list[int]:
        """Return a conversation as token ids, as the base's chat template writes it.

        Without a template (or raw), the contents follow each other, a blank line between.
        """
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise PromptError(f"a conversation is {messages!r}; expected a list of messages")
        for message in messages:
            given = message if isinstance(message, Mapping) else {}
            if not all(isinstance(given.get(key), str) for key in ("role", "content")):
                raise PromptError(f"a message is {message!r}; expected role and content, as texts")
        if not messages:
            raise PromptError("the conversation is empty; give at least one message")
        if raw or not self.base.chat_template:
            text = "\n\n".join(m["content"] for m in messages)
        else:
            text = self.render(messages)
        bos = self.base.bos_text
        return self.base.tokenize(text, bos=not (bos and text.startswith(bos)))

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation as the chat template in the base's GGUF writes it."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            if self._template is None:
                self._template = Jinja2ChatFormatter(
                    self.base.chat_template or "", self.base.eos_text, self.base.bos_text
                )
            text: str = self._template(messages=[dict(m) for m in messages]).prompt
        except Exception as e:  # a template raises what it likes, for example on roles
            raise PromptError(f"the base's chat template refuses this conversation: {e}") from e
        return text

    def check_prompt(self, tokens: Sequence[int], threshold: float) -> None:
        """Raise PromptError when tokens are none, not in the vocabulary, or too many."""
        if not tokens:
            raise PromptError("the prompt is empty; write at least one word")
        if len(tokens) > self.n_ctx:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx}; "
                "shorten it or raise -c"
            )
        # The base alone reads whatever it has.
        n = self.n_shared if threshold < 1 else self.base.n_vocab
        out_of_range = next((t for t in tokens if not 0 <= t < n), None)
        if out_of_range is not None:
            raise PromptError(
                f"token {out_of_range} of the prompt is not in the vocabulary of both models "
                f"({n} shared tokens)"
            )

    def stream_tokens(
        self,
        tokens: Sequence[int],
        options: Options,
        timelines: tuple[Timeline, Timeline] | None = None,
    ) -> Stream:
        """Continue token ids.

        timelines: of base and expert, where they are not the pair's own sessions; one thread at a
            time may use them, and they may run beside others.

        Raises PromptError when the tokens are none or do not fit the context.
        """
        threshold = self.threshold(options)
        self.check_prompt(tokens, threshold)
        # The base alone may write whatever it has.
        n_choose = self.n_shared if threshold < 1 else self.base.n_vocab
        row = self.base.token_id(DEFER_TOKEN) if isinstance(self.switch, DeferRow) else None
        sample = None
        if options.temperature > 0 or options.penalises:
            sample = ChainSampler(options, n_choose, tokens, [] if row is None else [row])
        make: Callable[..., Decoder] = Decoder
        # A bet is weighed by what decodes cost, of which a server tells nothing.
        if options.schedule == "fast" and self.remote is None:
            make = partial(FastDecoder, planner=self.planner)
        background = self.background if timelines is None else None
        base, expert = timelines or (
            self.base_session, self._remote_session or background or self.expert_session
        )  # fmt: skip
        expert_model = self.remote or self.expert
        decoder = make(
            base,
            expert,
            self.switch.reader(self.base, n_choose),
            tokens,
            threshold=threshold,
            n_choose=n_choose,
            end_tokens=self.base.end_tokens | expert_model.end_tokens,
            max_tokens=options.max_tokens,
            compose=options.strategy == "compose",
            n_probs=options.n_probs,
            defer_row=-1 if row is None else row,
            sample=sample,
            follow=background.follow if background is not None and threshold < 1 else None,
            lock=self._lock if timelines is None else None,
            sessions=() if timelines else self._sessions(),
        )
        unreadable = self._not_here() if self.remote is not None and threshold < 1 else ""
        return Stream(decoder, self.base, options.stop, threshold, unreadable)

    def _exhaust(self, stream: Stream) -> Answer:
        with self._lock:
            for _ in stream:
                pass
        return stream.answer()

    @contextmanager
    def switched(self, switch: AnySwitch) -> Iterator[None]:
        """Answer with another switch for a while, whatever it reads of the base."""
        own, self.switch = self.switch, switch
        hidden = self.base_session.want_hidden(switch.needs_hidden)
        try:
            yield
        finally:
            self.switch = own
            self.base_session.want_hidden(hidden)

    def threshold(self, options: Options) -> float:
        """Return the threshold that the options ask for."""
        if options.threshold is not None:
            return options.threshold
        if options.defer_rate is not None:
            return self.switch.threshold_for(options.defer_rate)
        return self.switch.threshold


def load(
    model: str | os.PathLike[str] | None = None,
    expert: str | os.PathLike[str] | None = None,
    switch: str | os.PathLike[str] | None = None,
    *,
    pair: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    n_ctx: int = 0,
    n_threads: int = 0,
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
    defaults: Options | None = None,
    note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Load a pair: a base, an expert and a switch, or the pair that ships here.

    model, expert: GGUF files, names in models.txt, or user/repo:file.gguf on the Hugging Face Hub.

    expert: may be the address of a llama.cpp, vLLM or colm-edge server, http://host:port.
    switch: a file, "margin" (the default beside two models), "entropy", or "defer-row".
    pair: a name in models.txt instead.
    lora: a LoRA adapter for the base, a GGUF file.
    n_ctx: tokens the contexts hold; 0 takes what both models were trained for, at most 4096.
    n_threads: 0 takes every core, or one for a very small model.
    n_ubatch: tokens of a prompt evaluated at a time; 0: 512, or 128 without flash attention.
    n_gpu_layers: as in llama.cpp, each model its own.
    rpc: machines that hold the expert, HOST:PORT of llama.cpp's RPC servers; all its layers unless
        n_gpu_layers_expert says how many.
    flash_attn, cache_type_k, cache_type_v: as in llama.cpp, of both models' contexts; flash
        attention that is "auto" is on with a GPU only.
    overlap: whether a loaded expert catches up with long gaps on a thread of its own; None: where
        the models are on different devices, or there are cores enough for the threads of both.
    offline: download nothing; what is not in the Hub's cache is an error.
    expert_required: a remote expert that fails is a ModelError; else the base goes on alone.
    note: told, in a line, of what takes a while; by default the logger "colm_edge" is.
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
        if server.rpartition(":")[0] not in LOCAL_HOSTS:
            raise ModelError(
                f"{server}: not asked with --offline; leave that out, or leave out rpc"
            )
    files = choose_pair(refs[0], refs[1], refs[2], pair, offline=offline, note=told)
    head = load_switch(files.switch)
    roles = ("base", "expert")
    reports = [None if progress is None else partial(progress, role) for role in roles]
    base = Model(files.base, n_gpu_layers, lora, reports[0])
    try:
        other: Model | RemoteExpert
        if is_url(files.expert):
            if rpc:
                raise ColmError("an expert on a server cannot be spread over RPC servers as well")
            other = RemoteExpert(files.expert, base, required=expert_required, note=note)
        else:
            layers = -1 if rpc else n_gpu_layers
            if n_gpu_layers_expert is not None:
                layers = n_gpu_layers_expert
            other = Model(files.expert, layers, progress=reports[1], rpc=rpc)
        try:
            options = ContextOptions(
                n_ctx=n_ctx, n_threads=n_threads, n_ubatch=n_ubatch, flash_attn=flash_attn,
                cache_type_k=cache_type_k, cache_type_v=cache_type_v,
            )  # fmt: skip
            return Pair(
                base, other, head, options, defaults, is_demo=files.is_demo, overlap=overlap,
                note=note, progress=progress,
            )  # fmt: skip
        except BaseException:
            other.close()
            raise
    except BaseException:
        base.close()
        raise
