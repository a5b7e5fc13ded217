"""Answers under way: one thread and one slot each, read by the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from colm_edge.options import Options, ServerOptions
from colm_edge.serve.protocol import (
    RefusalError,
    Written,
)
from colm_edge.serve.slots import Slots

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.stream import Stream


class Metrics:
    """What /metrics tells, in Prometheus' own format."""

    def __init__(self, server: Server) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "colm_requests", "Requests by path and status.", ["path", "status"], **made
        )
        self.tokens = Counter("colm_tokens", "Tokens written, by their writer.", ["source"], **made)
        self.expert_calls = Counter("colm_expert_calls", "Decodes of the expert.", **made)
        self.first = Histogram("colm_first_token_seconds", "Until an answer's first token.", **made)
        busy = Gauge("colm_busy_slots", "Answers under way.", **made)
        busy.set_function(lambda: server.n_busy)
        waiting = Gauge("colm_waiting_requests", "Requests that wait for a slot.", **made)
        waiting.set_function(lambda: server.n_waiting)
        loaded = Gauge("colm_expert_loaded", "Whether the expert is in memory.", **made)
        loaded.set_function(lambda: server.slots.expert_loaded)


class Server:
    """A pair behind HTTP. `app` is the ASGI application; `close` ends the worker."""

    def __init__(self, pair: Pair, settings: ServerOptions, name: str) -> None:
        self.pair, self.settings, self.name = pair, settings, name
        self.slots = Slots(pair, settings.n_slots)
        # A bet is weighed for an answer alone; several share their batches.
        schedule = "fast" if settings.n_slots == 1 else "sequential"
        self.defaults = pair.defaults.with_changes(schedule=schedule)
        self.created = int(time.time())
        self.n_busy = self.n_waiting = 0
        self._free = asyncio.Semaphore(settings.n_slots)
        self._last_use = time.monotonic()
        self.metrics = Metrics(self)

    # Answers

    def tokens_of(self, prompt: str | list[Any], options: Options) -> list[int]:
        """Return a prompt's tokens, once it is sure that it can be answered."""
        if isinstance(prompt, str):
            tokens = self.pair.base.tokenize(prompt)
        elif prompt and isinstance(prompt[0], dict):
            tokens = self.pair.prompt_tokens(prompt)
        else:
            tokens = list(prompt)
        self.pair.check_prompt(tokens, self.pair.threshold(options))
        return tokens

    def text_of(self, tokens: list[int]) -> str:
        return b"".join(map(self.pair.base.piece, tokens)).decode("utf-8", "replace")

    def admit(self) -> None:
        """Refuse what would wait in a queue that is full already."""
        if self._free.locked() and self.n_waiting >= self.settings.queue:
            raise RefusalError(
                503, f"{self.n_waiting} requests are waiting already; try again later",
                "server_error", "overloaded", headers={"Retry-After": "1"},
            )  # fmt: skip

    async def write(
        self, tokens: list[int], options: Options, tells_prompt: bool
    ) -> AsyncIterator[Written]:
        """Write an answer; yield it at the start and after each step. Leaving this early frees the
        slot."""
        self.n_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.n_waiting -= 1
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        gone = threading.Event()
        streams: list[Stream] = []

        def work() -> None:
            put: Callable[[Any], Any] = lambda item: loop.call_soon_threadsafe(  # noqa: E731
                queue.put_nowait, item
            )
            try:
                with self.slots.take(tokens) as timelines:
                    stream = self.pair.stream_tokens(tokens, options, timelines)
                    streams.append(stream)
                    if gone.is_set():
                        stream.cancel()
                    since = time.monotonic()
                    prompt = stream.read_prompt() if tells_prompt else []
                    put(Written(stream, since, prompt))
                    for step in stream:
                        put(step)
                put(None)
            except BaseException as e:
                put(e)
            finally:
                loop.call_soon_threadsafe(self._release)

        self.n_busy += 1
        begun = time.monotonic()
        try:
            threading.Thread(target=work, name="colm-edge-answer", daemon=True).start()
        except RuntimeError:  # no more threads: else the slot would stay taken
            self._release()
            raise
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Written):
                    written = item
                else:
                    if not written.steps:
                        self.metrics.first.observe(time.monotonic() - begun)
                    written.steps.append(item)
                    self.metrics.tokens.labels(item.source).inc()
                yield written
            self.metrics.expert_calls.inc(written.stats()["expert_calls"])
        finally:
            gone.set()
            for stream in streams:
                stream.cancel()

    def _release(self) -> None:
        self.n_busy -= 1
        self._last_use = time.monotonic()
        self._free.release()

    async def unload_when_idle(self) -> None:
        """Free the expert's memory whenever nothing was asked for long enough."""
        limit = self.settings.expert_idle_unload
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            idle = time.monotonic() - self._last_use
            if not self.n_busy and idle >= limit and self.slots.expert_loaded:
                await asyncio.to_thread(self.slots.unload_expert)

    def close(self) -> None:
        self.slots.close()
