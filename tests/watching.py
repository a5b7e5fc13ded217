"""A command of the command line, run in this process and watched where its options act."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import uvicorn
from click.testing import CliRunner, Result
from starlette.testclient import TestClient

from colm_edge import pair, references
from colm_edge.cli import main
from colm_edge.cli.keyboard import read_lines
from colm_edge.errors import ModelError
from colm_edge.llama import measure, model
from colm_edge.llama.context import Context
from colm_edge.options import Options
from colm_edge.remote import client
from colm_edge.serve.answers import Server

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Seen:
    """What a command said, and what it asked of llama.cpp and of others.

    contexts: (model's file, llama.cpp's parameters, whether threads adapt), one each. layers: of
    each model whose weights were read, by file. answers: (options, schedule, overlaps).
    """

    result: Result
    contexts: list[tuple[str, Any, bool]] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    answers: list[tuple[Options, str, bool | None]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)  # of the answers, as token ids
    fetched: list[tuple[str, bool]] = field(default_factory=list)  # references, and if offline
    rpc: list[Any] = field(default_factory=list)
    servers: list[tuple[str, float]] = field(default_factory=list)  # addresses, and time-outs
    served: list[Any] = field(default_factory=list)  # an address, and what was answered
    kept: list[bool] = field(default_factory=list)  # whether messages of a chat are
    quantised: list[int] = field(default_factory=list)  # by so many threads
    levels: list[int] = field(default_factory=list)  # of the log

    @property
    def out(self) -> str:
        return self.result.stdout

    @property
    def err(self) -> str:
        return self.result.stderr

    def params(self, name: str) -> set[Any]:
        """Return the values that a parameter of llama.cpp had in the contexts."""
        return {getattr(params, name) for _, params, _ in self.contexts}

    def chosen(self, name: str) -> list[Any]:
        """Return the values that an option had in the answers."""
        return [getattr(options, name) for options, _, _ in self.answers]


def ask(server: Server, client: TestClient) -> Any:
    """Return what a served pair answers to a greeting."""
    return client.post("/v1/chat/completions", json=CHAT).json()


def watched(
    args: list[Any], typed: str | None = None, use: Any = None, *, terminal: bool = False
) -> Seen:
    """Run a command. typed: at its standard input, which may seem to be a terminal. use: what is
    asked of a server, which then ends."""
    seen = Seen(Result(CliRunner(), b"", b"", b"", None, 0, None))
    with pytest.MonkeyPatch.context() as patch:
        _watch_models(patch, seen)
        _watch_answers(patch, seen)
        _watch_surroundings(patch, seen, terminal=terminal)

        def run(self: uvicorn.Server, sockets: Any) -> None:
            app = self.config.app
            with TestClient(app, base_url="http://localhost") as asking:  # type: ignore[arg-type]
                address = sockets[0].getsockname()
                seen.served += [address, (use or ask)(app.state.server, asking)]  # type: ignore[union-attr]
            sockets[0].close()

        patch.setattr(uvicorn.Server, "run", run)
        # What decodes cost is measured, but in a moment.
        patch.setattr(measure, "HASTY", 0.01)
        patch.setattr(measure, "SECONDS", 0.01)
        seen.result = CliRunner().invoke(main, [str(arg) for arg in args], input=typed)
    return seen


def _watch_models(patch: pytest.MonkeyPatch, seen: Seen) -> None:
    params, load = Context._params, llama_cpp.llama_model_load_from_file
    adapter = llama_cpp.llama_adapter_lora_init

    def made(self: Context) -> Any:
        found = params(self)
        seen.contexts.append((self.model.path.name, found, self.options.adapts_threads))
        return found

    def loaded(path: bytes, given: Any) -> Any:
        if not given.vocab_only:
            seen.layers[Path(path.decode()).name] = given.n_gpu_layers
        return load(path, given)

    def adapted(handle: Any, path: bytes) -> Any:
        seen.adapters.append(path.decode())
        return adapter(handle, path)

    def spread(servers: Any) -> Any:
        seen.rpc.append(tuple(servers))
        raise ModelError("no server")

    patch.setattr(Context, "_params", made)
    patch.setattr(llama_cpp, "llama_model_load_from_file", loaded)
    patch.setattr(llama_cpp, "llama_adapter_lora_init", adapted)
    patch.setattr(model, "check_servers", spread)


def _watch_answers(patch: pytest.MonkeyPatch, seen: Seen) -> None:
    schedule_of, timelines_of, picker_of = pair.schedule_of, pair.timelines_of, pair.picker_of
    overlaps: list[bool] = []

    def timelines(*args: Any, **more: Any) -> Any:
        overlaps[:] = [any(args[1].values())]
        return timelines_of(*args, **more)

    def picker(options: Options, *args: Any, **more: Any) -> Any:
        seen.answers.append((options, "", overlaps[0] if overlaps else None))
        seen.prompts.append(list(args[1]))
        return picker_of(options, *args, **more)

    def schedule(*args: Any, **more: Any) -> Any:
        found = schedule_of(*args, **more)
        options, _, overlap = seen.answers[-1]
        seen.answers[-1] = (options, type(found).__name__, overlap)
        return found

    def fetch(reference: str, *, offline: bool, note: Any) -> Any:
        seen.fetched.append((reference, offline))
        raise ModelError("not fetched")

    server = client.Server

    def reached(url: str, timeout: float) -> Any:
        seen.servers.append((url, timeout))
        return server(url, timeout)

    patch.setattr(pair, "timelines_of", timelines)
    patch.setattr(pair, "picker_of", picker)
    patch.setattr(pair, "schedule_of", schedule)
    patch.setattr(references, "fetch", fetch)
    patch.setattr(client, "Server", reached)
    patch.setattr(client, "BACK_OFF", 0.0)


def _watch_surroundings(patch: pytest.MonkeyPatch, seen: Seen, *, terminal: bool) -> None:
    quantise = llama_cpp.llama_model_quantize

    def reader(*, keep: bool) -> Any:
        seen.kept.append(keep)
        return read_lines

    def quantised(source: bytes, target: bytes, params: Any) -> int:
        seen.quantised.append(params._obj.nthread)
        return int(quantise(source, target, params))

    patch.setattr(sys.modules["colm_edge.cli.run"], "reader", reader)
    patch.setattr(llama_cpp, "llama_model_quantize", quantised)
    patch.setattr(logging, "basicConfig", lambda level, **_: seen.levels.append(level))
    if terminal:
        patch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True)


def options_of(command: str) -> dict[str, str]:
    """Return a command's options: parameter -> longest flag."""
    commands = {"colm-edge": main, **main.commands}
    return {
        parameter.name: max(parameter.opts, key=len)
        for parameter in commands[command].params
        if parameter.name and parameter.param_type_name == "option"
    }
