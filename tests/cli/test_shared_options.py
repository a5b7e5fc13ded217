"""The options that commands share: each arrives, in every command that has it, where it acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from watching import Seen, options_of, watched

from colm_edge.options import OPTIONS

LONG = '{"prompt": "p", "completion": "%s", "answer": "x"}\n' % ("word " * 120)
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def basic(tiny, tmp_path_factory) -> dict[str, list[Any]]:
    """What each command is given in any case; the models come on top."""
    folder = tmp_path_factory.mktemp("basic")
    data, prompts = folder / "d.jsonl", folder / "p.jsonl"
    lines = [f'{{"prompt": "p{i}", "completion": "c{i} and", "answer": "x"}}\n' for i in range(6)]
    data.write_text("".join(lines) + LONG)
    prompts.write_text('{"prompt": "hello"}\n')
    return {
        "run": ["run", "hello", "--temp", "0", "-n", "6"],
        "chat": ["chat", "--temp", "0", "-n", "6"],
        "serve": ["serve", "--port", "0", "-np", "1", "--max-tokens", "6", "--temp", "0"],
        "train": ["train", "--data", data, "--outfile", folder / "s.gguf"],
        "score": ["score", "--data", data, "--outfile", folder / "s.npz"],
        "eval": ["eval", "--data", data, "--metric", "exact", "--methods", "colm", "--limit", "2",
                 "-n", "4", "-np", "1"],
        "bench": ["bench", "--prompts", prompts, "--methods", "colm-fast", "--rounds", "1", "-n",
                  "6"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def ask(basic, tiny) -> Callable[..., Seen]:
    """Run a command with more options; what was seen is kept for the next test."""
    known: dict[tuple[str, ...], Seen] = {}

    def run(command: str, *more: Any, models: bool = True) -> Seen:
        args = [*basic[command], *more]
        if models:
            args += ["-m", tiny["template"], "-me", tiny["expert"]]
        key = tuple(map(str, args))
        if key not in known:
            known[key] = watched(args, typed="hello\n" if command == "chat" else None)
        return known[key]

    return run


@dataclass(frozen=True)
class Acts:
    """An option as it is given, and what is found then where one looks; if that is not said,
    anything but what is found without it."""

    given: tuple[str, ...]
    look: Callable[[Seen], Any]
    found: Any = None


# Of how both models are evaluated: all are given at once.
EVALUATED = {
    "n_ctx": Acts(("-c", "96"), lambda s: holds(s, 96), True),
    "n_threads": Acts(("-t", "2"), lambda s: s.params("n_threads"), {2}),
    "threads_auto": Acts(
        ("--threads-auto",), lambda s: {adapts for *_, adapts in s.contexts}, {True}
    ),
    "n_ubatch": Acts(("-ub", "32"), lambda s: s.params("n_ubatch"), {32}),
    "n_gpu_layers": Acts(("-ngl", "3"), lambda s: s.layers.get("template.gguf"), 3),
    "n_gpu_layers_expert": Acts(("-ngle", "2"), lambda s: s.layers.get("expert.gguf"), 2),
    "flash_attn": Acts(("-fa", "on"), lambda s: s.params("flash_attn_type"), {1}),
    "cache_type_k": Acts(("-ctk", "f32"), lambda s: s.params("type_k"), {0}),
    "cache_type_v": Acts(("-ctv", "bf16"), lambda s: s.params("type_v"), {30}),
}


def holds(seen: Seen, n: int) -> bool:
    """Return whether contexts hold so many tokens, or documents were cut there."""
    return n in seen.params("n_ctx") or f"the context of {n} tokens" in seen.err


COMMANDS = ("run", "chat", "serve", "train", "score", "eval", "bench")


@pytest.mark.parametrize("command", COMMANDS)
def test_how_models_are_evaluated_arrives_in_llama_cpp(ask, command):
    every = [part for one in EVALUATED.values() for part in one.given]
    changed, before = ask(command, *every), ask(command, "-t", "1")
    assert before.result.exit_code == changed.result.exit_code == 0, changed.err
    for name, one in EVALUATED.items():
        assert one.look(changed) == one.found, name
        assert one.look(before) != one.found, name


TEAM = ("-m", "{base}", "-me", "a={expert}", "-me", "b={base}", "-sw", "{team}")
# Of which models there are: each is given alone, if need be instead of the usual ones.
LOADED = {
    "model": Acts(
        ("-m", "a/b:c.gguf", "-me", NOBODY), lambda s: s.fetched, [("a/b:c.gguf", False)]
    ),
    "expert": Acts(
        ("-m", "{base}", "-me", "a/b:c.gguf"), lambda s: s.fetched, [("a/b:c.gguf", False)]
    ),
    "offline": Acts(
        ("-m", "a/b:c.gguf", "-me", NOBODY, "--offline"),
        lambda s: s.fetched,
        [("a/b:c.gguf", True)],
    ),
    "pair": Acts(
        ("--pair", "smollm2"),
        lambda s: [name.split("/")[0] for name, _ in s.fetched],
        ["bartowski"],
    ),
    "lora": Acts(
        ("-m", "{base}", "-me", "{expert}", "--lora", "{foreign}"),
        lambda s: [Path(a).stem for a in s.adapters],
        ["foreign"],
    ),
    "bridge": Acts(
        ("-m", "{base}", "-me", "{foreign}", "--bridge"), lambda s: s.result.exit_code, 0
    ),
    "max_memory": Acts(
        (*TEAM, "--max-memory", "1k"),
        lambda s: "alone takes" in s.err,
        True,
    ),
    "switch": Acts(
        ("-m", "{base}", "-me", "{expert}", "-sw", "margin"),
        lambda s: "using margin" in s.err,
        False,
    ),
    "rpc": Acts(
        ("-m", "{base}", "-me", "{expert}", "--rpc", "h:1,i:2"), lambda s: s.rpc, [("h:1", "i:2")]
    ),
    "expert_required": Acts(
        ("-m", "{base}", "-me", NOBODY, "--expert-required"), lambda s: s.result.exit_code, 1
    ),
    "expert_timeout": Acts(
        ("-m", "{base}", "-me", NOBODY, "--expert-timeout", "7"),
        lambda s: s.servers,
        [(NOBODY, 7.0)],
    ),
}
WITHOUT = {  # what is left where the option is not given
    "offline": 1,
    "expert_required": 1,
    "expert_timeout": 2,
    "bridge": 1,
    "lora": 2,
    "max_memory": 2,
    "switch": 2,
    "rpc": 2,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_loaded_is_what_was_named(ask, tiny, models, command):
    names = {**tiny, "team": models[1]}
    for name in LOADED.keys() & options_of(command).keys():
        one = LOADED[name]
        given = [part.format_map(names) for part in one.given]
        assert one.look(ask(command, *given, models=False)) == one.found, name
        if name in WITHOUT:
            before = ask(command, *given[: -WITHOUT[name]], models=False)
            assert one.look(before) != one.found, name


def values_of(name: str) -> Callable[[Seen], Any]:
    return lambda seen: set(seen.chosen(name))


def answered(*given: str, name: str, found: Any) -> Acts:
    return Acts(given, values_of(name), {found})


# Of answers, in groups that can be given together.
DECODED: tuple[dict[str, Acts], ...] = (
    {
        "max_tokens": answered("-n", "5", name="max_tokens", found=5),
        "strategy": answered("--strategy", "compose", name="strategy", found="compose"),
        "temperature": answered("--temp", "0.7", name="temperature", found=0.7),
        "top_k": answered("--top-k", "7", name="top_k", found=7),
        "top_p": answered("--top-p", "0.9", name="top_p", found=0.9),
        "min_p": answered("--min-p", "0.1", name="min_p", found=0.1),
        "repeat_penalty": answered("--repeat-penalty", "1.1", name="repeat_penalty", found=1.1),
        "presence_penalty": answered(
            "--presence-penalty", "0.2", name="presence_penalty", found=0.2
        ),
        "frequency_penalty": answered(
            "--frequency-penalty", "0.3", name="frequency_penalty", found=0.3
        ),
        "seed": answered("-s", "5", name="seed", found=5),
        "stop": answered("--stop", "zz", name="stop", found=("zz",)),
        "grammar": answered(
            "--grammar", "root ::= [a-z ]*", name="grammar", found="root ::= [a-z ]*"
        ),
        "raw": Acts(("--raw",), lambda s: s.prompts),
    },
    {
        "threshold": answered("--threshold", "0.4", name="threshold", found=0.4),
        "review": answered("--review", "2", name="review", found=2.0),
        "review_window": answered("--review-window", "5", name="review_window", found=5),
        "review_floor": answered("--review-floor", "0.1", name="review_floor", found=0.1),
    },
    {
        "defer_rate": Acts(
            ("--defer-rate", "0.3"), lambda s: (s.chosen("defer_rate"), s.chosen("threshold"))
        ),
        "doubt": answered("--doubt", "3", name="doubt", found=3.0),
    },
    {"grammar_file": Acts(("--grammar-file", "{grammar}"), values_of("grammar"), {'root ::= "a"'})},
    {
        "json_schema": Acts(
            ("--json-schema", "{{}}"), lambda s: "root ::=" in str(s.chosen("grammar")[0]), True
        )
    },
    {
        "schedule": Acts(
            ("--schedule", "fast"), lambda s: {kind for _, kind, _ in s.answers}, {"Fast"}
        )
    },
    {
        "schedule": Acts(
            ("--schedule", "sequential"),
            lambda s: {kind for _, kind, _ in s.answers},
            {"Sequential"},
        )
    },
    {"overlap": Acts(("--overlap",), lambda s: {overlap for *_, overlap in s.answers}, {True})},
    {"overlap": Acts(("--no-overlap",), lambda s: {overlap for *_, overlap in s.answers}, {False})},
)
ANSWERING = ("run", "chat", "serve", "eval", "bench")


def shared_options(command: str) -> set[str]:
    """Return the options of a command that are tested here."""
    tested = set[str]()
    if command in COMMANDS:
        tested |= EVALUATED.keys() | LOADED.keys()
    if command in ANSWERING:
        tested |= set().union(*DECODED)
    return tested & options_of(command).keys()


@pytest.mark.parametrize("command", ANSWERING)
def test_how_is_answered_arrives_in_the_loop(ask, command, tmp_path):
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "a"')
    before = ask(command, "-t", "1")
    for group in DECODED:
        acts = {name: one for name, one in group.items() if name in options_of(command)}
        given = [part for one in acts.values() for part in one.given]
        changed = ask(command, "-t", "1", *(part.format(grammar=grammar) for part in given))
        assert changed.result.exit_code == 0, changed.err
        for name, one in acts.items():
            if one.found is not None:
                assert one.look(changed) == one.found, name
            if name not in ("schedule", "overlap"):  # given either way here
                assert one.look(changed) != one.look(before), name


# What each field of `Options` changes in an answer, beside the options that it needs.
GREEDY = {"temperature": 0.0, "max_tokens": 12, "threshold": 0.4}
DRAWN = {"temperature": 2.0, "max_tokens": 12, "seed": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "max_tokens": (GREEDY, 3),
    "threshold": (GREEDY, 1.0),
    "defer_rate": ({**GREEDY, "threshold": None}, 0.9),
    "strategy": (GREEDY, "compose"),
    "review": (GREEDY, 0.1),
    "review_window": ({**GREEDY, "threshold": 0.97, "review": 1.0}, 1),
    "review_floor": ({**GREEDY, "threshold": 0.97, "review": 0.1}, 1.0),
    "doubt": (GREEDY, 0.0),
    "temperature": (DRAWN, 0.0),
    "top_k": (DRAWN, 1),
    "top_p": (DRAWN, 0.0),
    "min_p": (DRAWN, 1.0),
    "repeat_penalty": (GREEDY, 1e6),
    "presence_penalty": (GREEDY, 100.0),
    "frequency_penalty": (GREEDY, 100.0),
    "seed": (DRAWN, 2),
    "grammar": (GREEDY, 'root ::= "yes"'),
    "raw": (GREEDY, True),
}
ELSEWHERE = {
    "schedule": "tests/decode/test_fast.py",
    "stop": "tests/test_pair.py",
}


def test_every_option_of_an_answer_is_shown_to_act():
    assert CHANGES.keys() | ELSEWHERE.keys() == {n for n, o in OPTIONS.items() if o.flags}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_the_answer(pair, name):
    given, value = CHANGES[name]

    def says(**more: Any) -> Any:
        answer = pair.generate("hello you", **given | more)
        stats = answer.stats
        return answer.text, stats.n_prompt, stats.n_deferred, stats.expert_calls, stats.n_undone

    if name == "defer_rate":
        assert says(defer_rate=0.1) != says(defer_rate=value)
    else:
        assert says() == says() != says(**{name: value})
