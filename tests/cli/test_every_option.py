"""Every option of every command changes what it says, or what it writes.

A new option needs a line in OWN, or, if several commands share it, in test_shared_options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_servers import free_port
from lib.rows import write_rows
from test_shared_options import shared_options
from watching import Seen, options_of, watched

from colm_edge.cli import main
from colm_edge.serve.answers import Server
from colm_edge.serve.errors import RefusalError
from colm_edge.switch.file import Switch

Look = Callable[[Seen, Path], Any]


@dataclass(frozen=True)
class Own:
    """An option: a command, with what stands between brackets only when the option is given, and
    where one looks for what it changes. instead: stands there when it is not given."""

    command: str
    look: Look
    instead: str = ""
    typed: str | None = None
    use: Any = None
    terminal: bool = False

    def args(self, names: dict[str, Any], *, given: bool) -> list[str]:
        """Return the command's words, with the option or without."""
        text = re.sub(r"\[(.*?)\]", r"\1" if given else self.instead, self.command)
        return text.format_map(names).split()


def out(seen: Seen, _: Path) -> Any:
    return seen.out


def told(seen: Seen, _: Path) -> Any:
    return seen.result.exit_code, seen.err


def files(_: Seen, folder: Path) -> set[str]:
    """Return what the command left; `in` holds what it was given."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def report(name: str) -> Look:
    return lambda seen, _: json.loads(seen.out.splitlines()[-1]).get(name)


def switch(name: str) -> Look:
    return lambda _, folder: getattr(Switch.load(folder / "s.gguf"), name)


def scored(_: Seen, folder: Path) -> dict[str, Any]:
    with np.load(folder / "s.npz") as file:
        return {name: file[name].tolist() for name in file.files}


def column(name: str) -> Look:
    return lambda seen, _: [row.get(name, "absent") for row in json.loads(seen.out)]


def params(name: str) -> Look:
    return lambda seen, _: seen.params(name)


def prompts(seen: Seen, _: Path) -> Any:
    return seen.prompts


def status(**how: Any) -> Any:
    """Return what asks a server for its name, with such headers."""

    def ask(server: Server, client: Any) -> Any:
        response = client.get("/v1/models", headers=how)
        return response.status_code, response.headers.get("access-control-allow-origin")

    return ask


def waits(server: Server, _: Any) -> bool:
    """Return whether another request may wait while every slot is taken."""
    server._running["somebody"] = server.settings.n_slots
    try:
        server.check_queue("somebody else")
    except RefusalError:
        return False
    finally:
        server._running.clear()
    return True


def idles(server: Server, _: Any) -> float:
    return server.settings.expert_idle_unload


def keeps(seen: Seen, _: Path) -> list[bool]:
    return seen.kept


def served(seen: Seen, _: Path) -> Any:
    return seen.served[1]


def address(at: int) -> Look:
    return lambda seen, _: seen.served[0][at]


def spent(seen: Seen, _: Path) -> int:
    return int(seen.served[1]["usage"]["completion_tokens"])


M = "-m {base} -me {expert} -t 1"
TRAIN = f"train --data {{data}} --outfile {{here}}/s.gguf {M}"
ASKED = f"train --prompts {{data}} --outfile {{here}}/s.gguf {M}"
SCORE = f"score --data {{data}} --outfile {{here}}/s.npz {M}"
EVAL = f"eval --data {{data}} -o json {M}"
JUDGED = f"{EVAL} --metric exact -n 4 --limit 3 --methods colm"
BENCH = f"bench -o json --rounds 1 -n 8 --no-memory --methods base {M}"
BENCH_PROMPTS = f"bench --prompts {{data}} --limit 1 -o json --rounds 1 -n 8 --methods base {M}"
SERVE = f"serve --port 0 -np 1 --temp 0 {M}"

OWN: dict[str, dict[str, Own]] = {
    "colm-edge": {
        "version": Own("[--version]", out, "-h"),
        "verbose": Own("[-v] info {base}", lambda s, _: s.levels),
    },
    "run": {
        "as_json": Own(f"run hello -n 2 {M} [--json]", lambda s, _: s.out[:1] == "{"),
        "prompt": Own(f"run -n 2 {M} [-p other]", prompts, typed="hello"),
        "system": Own(f"run hello -n 2 {M} [-sys other]", prompts),
        "no_history": Own(f"run -n 2 {M} [--no-history]", keeps, typed="/bye\n", terminal=True),
        "prompt_cache": Own(f"run hello -n 2 {M} [--prompt-cache {{here}}/c]", files),
    },
    "chat": {
        "prompt": Own(f"chat -n 2 {M} [-p other]", prompts, typed="hello\n"),
        "system": Own(f"chat -n 2 {M} [-sys other]", prompts, typed="hello\n"),
        "no_history": Own(f"chat -n 2 {M} [--no-history]", keeps, typed="/bye\n", terminal=True),
        "prompt_cache": Own(f"chat -n 2 {M} [--prompt-cache {{here}}/c]", files, typed="a\n"),
    },
    "train": {
        "data": Own(TRAIN.replace("--data {data}", "[--data {more}]"), out, "--data {data}"),
        "prompts": Own(ASKED.replace("--prompts {data}", "[--prompts {data} -n 4]"),
                       report("n_answers"), "--data {data}"),
        "max_tokens": Own(f"{ASKED} [-n 3]", lambda s, _: "cut at 3 tokens" in s.err, "-n 9"),
        "n_slots": Own(f"{ASKED} -n 9 [-np 3]", params("n_seq_max")),
        "outfile": Own(TRAIN.replace("s.gguf", "[t].gguf"), files, "s"),
        "features": Own(f"{TRAIN} [--features logits]", switch("features")),
        "objective": Own(f"{TRAIN} [--objective weak]", report("objective")),
        "seed": Own(f"{TRAIN} [-s 7]", report("nll_base")),
        "metric": Own(f"{TRAIN} -c 64 [--threshold-by exact]", report("threshold_by")),
        "n_lines": Own(f"{TRAIN} -c 64 --threshold-by exact [--threshold-lines 1]",
                       report("threshold_by")),
        "allow_exec": Own(f"{TRAIN} -c 64 --threshold-by python [--allow-exec]", told),
        "carried": Own(f"{TRAIN} [--review 2]", switch("review")),
        "update": Own(f"{TRAIN} [--update {{trained}}]", out),
        "report_dir": Own(f"{TRAIN} [--report-dir {{here}}/r]", files),
        "work_dir": Own(f"{TRAIN} [--work-dir {{here}}/w]", files),
        "expert_scores": Own(TRAIN.replace("-me {expert}", "[--expert-scores {scores}]"), told),
        "raw": Own(f"{TRAIN.replace('base', 'template')} [--raw]", report("nll_base")),
    },
    "score": {
        "data": Own(SCORE.replace("{data}", "[{more}]"), scored, "{data}"),
        "outfile": Own(SCORE.replace("s.npz", "[t].npz"), files, "s"),
        "shard": Own(f"{SCORE} [--shard 1/9]", told),
        "work_dir": Own(f"{SCORE} [--work-dir {{here}}/w]", files),
        "raw": Own(f"{SCORE.replace('base', 'template')} [--raw]", scored),
    },
    "eval": {
        "data": Own(EVAL.replace("{data}", "[{more}]"), out, "{data}"),
        "metric": Own(f"{EVAL} [--metric exact -n 4]", column("accuracy")),
        "limit": Own(f"{EVAL} [--limit 2]", out),
        "methods": Own(f"{EVAL} [--methods base,colm]", column("method")),
        "defer_rates": Own(f"{EVAL} [--defer-rates 0.1,0.5]", column("threshold")),
        "thresholds": Own(f"{EVAL} [--thresholds 0.1,0.5]", column("threshold")),
        "reviews": Own(f"{EVAL} --metric exact -n 4 --limit 2 [--reviews 1]", column("review")),
        "score_on": Own(f"{EVAL} [--score-on expert -n 5]", column("nll")),
        "n_slots": Own(f"{JUDGED} [-np 3]", params("n_seq_max")),
        "allow_exec": Own(f"{JUDGED.replace('exact', 'python')} [--allow-exec]", told),
        "weak": Own(f"{EVAL} [--weak {{trained}}]", column("method")),
        "anti_expert": Own(f"{EVAL} [--anti-expert {{base}}]", column("method")),
        "alpha": Own(f"{EVAL} --methods proxy --anti-expert {{base}} [--alpha 2]", column("nll")),
        "work_dir": Own(f"{JUDGED} [--work-dir {{here}}/w]", files),
        "plot": Own(f"{EVAL} [--plot {{here}}/p.png]", files),
        "output": Own(EVAL.replace("-o json", "[-o csv]"), out, "-o json"),
    },
    "bench": {
        "replays": Own(f"{BENCH} [--replay f=0 --replay f=1]", column("replay")),
        "prompts": Own(BENCH_PROMPTS.replace("--prompts {data} --limit 1", "[--prompts {data}]"),
                       column("tokens_per_answer")),
        "limit": Own(BENCH_PROMPTS.replace("--limit 1", "[--limit 2]"),
                     lambda s, _: "prompt 2 of 2" in s.err, "--limit 1"),
        "metric": Own(f"{BENCH_PROMPTS} [--metric exact]", column("accuracy")),
        "allow_exec": Own(f"{BENCH_PROMPTS} --metric python [--allow-exec]", told),
        "methods": Own(BENCH.replace("--methods base", "--methods [base,colm]"),
                       column("method"), "base"),
        "n": Own(BENCH_PROMPTS.replace("-n 8", "[-n 5]"), column("tokens_per_answer"), "-n 8"),
        "rounds": Own(BENCH.replace("--rounds 1", "[--rounds 2]"),
                      lambda s, _: "round 2 of 2" in s.err, "--rounds 1"),
        "tools": Own(f"{BENCH} [--llama-cpp {{here}}]", told),
        "n_busy": Own(f"{BENCH} [--load 1]", column("load")),
        "memory": Own(BENCH.replace("--no-memory", "[--no-memory]"),
                      column("peak_memory_mb")),
        "tuning": Own(f"bench -o json {M} [--tune]", column("kept"), "--rounds 1 -n 8 --no-memory"),
        "output": Own(BENCH.replace("-o json", "[-o md]"), lambda s, _: s.out[:1], "-o json"),
    },
    "models": {"output": Own("models [-o json]", lambda s, _: s.out[:1])},
    "pull": {"offline": Own("pull a/b:c.gguf [--offline]", lambda s, _: s.fetched)},
    "info": {
        "costs": Own("info {endless} [--costs]", out),
        "n_threads": Own("info {base} --costs [-t 2]", params("n_threads")),
        "output": Own("info {base} [-o json]", lambda s, _: s.out[:1]),
    },
    "quantize": {
        "allow_requantize": Own("quantize {quantised} {here}/q.gguf Q4_0 [--allow-requantize]",
                                told),
        "output_type": Own("quantize {base} {here}/q.gguf Q8_0 [--output-type F16]",
                           lambda s, f: (f / "q.gguf").stat().st_size),
        "n_threads": Own("quantize {base} {here}/q.gguf Q8_0 [-t 1]", lambda s, _: s.quantised),
    },
    "serve": {
        "host": Own(f"{SERVE} [--host ::1]", address(0)),
        "port": Own(SERVE.replace("--port 0", "[--port {port}]"), address(1), "--port 0"),
        "n_slots": Own(SERVE.replace("-np 1", "[-np 3]"), params("n_seq_max"), "-np 1"),
        "queue": Own(f"{SERVE} [--queue 0]", served, use=waits),
        "api_key": Own(f"{SERVE} [--api-key k]", served, use=status()),
        "cors": Own(f"{SERVE} [--cors-origin http://a.b]", served, use=status(origin="http://a.b")),
        "allowed_hosts": Own(f"{SERVE} [--allowed-host a.b]", served, use=status(host="a.b")),
        "most_tokens": Own(f"{SERVE} [--max-tokens 3]", spent),
        "expert_idle_unload": Own(f"{SERVE} [--expert-idle-unload 9]", served, use=idles),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def names(tiny, tmp_path_factory) -> dict[str, Any]:
    """The files that the commands above name."""
    folder = tmp_path_factory.mktemp("named")
    names = {**tiny, "port": free_port()}
    for name, n in (("data", 24), ("more", 25)):
        names[name] = folder / f"{name}.jsonl"
        rows = [{"prompt": f"p{i}", "completion": f"c{i} and", "tests": ""} for i in range(n)]
        write_rows(names[name], rows)
    for name, command in (
        ("scores", SCORE.replace("{here}/s.npz", "{made}")),
        ("trained", f"{TRAIN.replace('{here}/s.gguf', '{made}')} --objective weak"),
        ("quantised", "quantize {base} {made} Q8_0"),
    ):
        made = folder / f"{name}.{'npz' if name == 'scores' else 'gguf'}"
        seen = watched(command.format(**names, made=made).split())
        assert seen.result.exit_code == 0, seen.err
        names[name] = made
    return names


def test_every_option_has_a_line():
    for command in ("colm-edge", *main.commands):
        assert options_of(command).keys() == OWN[command].keys() | shared_options(command), command


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in OWN for name in OWN[command]]
)
def test_an_option_changes_what_its_command_says(names, tmp_path, command, name):
    own = OWN[command][name]
    found = []
    for given in (False, True):
        folder = tmp_path / str(given)
        folder.mkdir()
        args = own.args({**names, "here": folder}, given=given)
        seen = watched(args, own.typed, own.use, terminal=own.terminal)
        found.append(repr(own.look(seen, folder)).replace(str(folder), ""))
    assert found[0] != found[1], found
