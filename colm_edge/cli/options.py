"""Options that several commands share: the models, how answers are written, and output formats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource

from colm_edge.files import locked
from colm_edge.options import EXPERT_TIMEOUT, INT_MAX, MAX_TIMEOUT, OPTIONS, Option

Command = TypeVar("Command", bound=Callable[..., Any])


class Whole(click.IntRange):
    name = "integer"  # as messages and help say it


class Number(click.FloatRange):
    """A number in a range, or a word that stands for one; never NaN, which passes every check of a
    range. meaning: told where one is refused."""

    name = "number"

    def __init__(
        self,
        low: float | None = None,
        high: float | None = None,
        words: Mapping[str, float] = {},
        meaning: str = "",
        *,
        min_open: bool = False,
    ) -> None:
        super().__init__(low, None if high == math.inf else high, min_open)
        self._words, self._meaning = words, meaning

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self._words:
            return self._words[value]
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter as e:
            why = e.message.removesuffix(".")
        else:
            if not math.isnan(number):
                return number
            why = f"{value!r} is not a number"
        meant = self._meaning or " or ".join(["a number", *self._words])
        expected = f"; expected {meant}" if meant != "a number" else ""
        return self.fail(why + expected, param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes, with a unit: K, M, G or T, each a thousand times the one before."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", str(value).strip().lower())
        size = float(found[1]) * 1000 ** " kmgt".index(found[2] or " ") if found else 0.0
        if not 1 <= size < 1e18:
            self.fail(f"{value!r} is not a size; expected a number with a unit, such as 6G or 800M")
        return int(size)


def listed(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Split a list at its commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def only(ctx: click.Context, param: click.Parameter, files: tuple[str, ...]) -> str | None:
    """Return the one file that is given, if one is; click alone would take the last of several."""
    if len(files) > 1:
        raise click.UsageError(f"{param.opts[0]} takes one file; put the lines of several into one")
    return files[0] if files else None


def jsonl_option(flag: str, help: str, *, required: bool = False) -> Callable[[Command], Command]:
    """Return an option that names a file of lines."""
    return click.option(
        flag, metavar="FILE.jsonl", multiple=True, callback=only, required=required, help=help
    )


DATA = jsonl_option("--data", "Prompts with completions.", required=True)
RAW = click.option("--raw", is_flag=True, help=OPTIONS["raw"].help)
PARALLEL = click.option(
    "-np",
    "--parallel",
    "n_slots",
    type=Whole(1, 64),
    default=8,
    show_default=True,
    help="Answers written at once; each takes the memory of a context (-c).",
)
LIMIT = click.option("--limit", type=Whole(1), help="Use only the first lines of the data.")
ALLOW_EXEC = click.option(
    "--allow-exec",
    is_flag=True,
    help="Let the metric python run the code that the models write, in a child process with limits "
    "on time, memory, files and network. Read docs/cli.md first.",
)


def claim(ctx: click.Context, param: click.Parameter | None, folder: str | None) -> str | None:
    """Keep other runs out of a folder while the command runs; return the folder."""
    if folder is not None:
        ctx.with_resource(locked(folder))
    return folder


WORK_DIR = click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(file_okay=False),
    callback=claim,
    help="Save results here as they are computed; an interrupted run resumes from them. Only one "
    "run at a time may use the folder.",
)
BASE = click.option(
    "-m",
    "--model",
    metavar="REF",
    help="Base model: a GGUF file, a name in models.txt, or user/repo:file.gguf or "
    "user/repo:Q4_K_M on the Hugging Face Hub; with @TYPE after it in another quantisation.",
)


def one_or_several(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> Any:
    """Return one value as it is."""
    return value[0] if len(value) == 1 else value


EXPERT = click.option(
    "-me",
    "--model-expert",
    "expert",
    metavar="[NAME=]REF|URL",
    multiple=True,
    callback=one_or_several,
    help="Expert model: as -m, or a server that runs it (llama.cpp, vLLM or colm-edge), "
    "http://HOST:PORT or, if it has several models, http://HOST:PORT#MODEL. Give it again for "
    "each of several experts, NAME=REF, with a switch that train fitted for them.",
)
SWITCH = click.option(
    "-sw",
    "--switch",
    metavar="FILE|entropy|margin|defer-row",
    help="Switch: a trained one (.gguf or .onnx), an untrained rule (margin is the default with -m "
    "and -me), or the <|defer|> row of a Co-LLM base.",
)
THREADS = click.option(
    "-t",
    "--threads",
    "n_threads",
    type=Whole(0, 512),  # GGML_MAX_N_THREADS
    default=0,
    help="CPU threads; 0: every core that other programs leave, or one for a very small model.",
)
PAIR = click.option("--pair", metavar="NAME", help="Name of a pair in models.txt.")
LORA = click.option("--lora", metavar="GGUF", help="LoRA adapter for the base.")
RPC = click.option(
    "--rpc",
    metavar="HOST:PORT,…",
    default="",
    callback=listed,
    help="llama.cpp RPC servers that hold the expert.",
)
OVERLAP = click.option(
    "--overlap/--no-overlap",
    default=None,
    help="Let the base go on while the expert evaluates, of one answer at a time.  [default: if "
    "they are on different machines, devices or cores]",
)
BRIDGE = click.option(
    "--bridge",
    is_flag=True,
    help="Let experts take part whose vocabulary is not the base's.",
)
MAX_MEMORY = click.option(
    "--max-memory",
    metavar="SIZE",
    type=Size(),
    help="Memory that several experts may take together, as 6G or 800M; the least recently "
    "used one is unloaded for the next.  [default: no limit]",
)
REQUIRED = click.option(
    "--expert-required",
    is_flag=True,
    help="Stop with an error when a remote expert fails, instead of going on with the base alone.",
)
TIMEOUT = click.option(
    "--expert-timeout",
    metavar="SECONDS",
    type=Number(0, MAX_TIMEOUT, min_open=True),
    default=EXPERT_TIMEOUT,
    show_default=True,
    help="Seconds that a request to a remote expert may take.",
)
# How both models are evaluated.
EVALUATION = (
    click.option("--offline", is_flag=True, help="Do not download anything."),
    click.option(
        "-c",
        "--ctx-size",
        "n_ctx",
        type=Whole(0, INT_MAX),
        default=0,
        help="Context size in tokens; 0: what the models were trained for, at most 4096.",
    ),
    THREADS,
    click.option(
        "--threads-auto",
        is_flag=True,
        help="With -t: use fewer threads while other programs use the cores, as without -t.",
    ),
    click.option(
        "-ub",
        "--ubatch-size",
        "n_ubatch",
        type=Whole(0, 512),
        default=0,
        help="Prompt tokens evaluated at a time; 0: 512, or 128 on a CPU.",
    ),
    click.option(
        "-ngl",
        "--n-gpu-layers",
        type=int,
        default=0,
        show_default=True,
        help="Layers of the base on the GPU; 99: all.",
    ),
    click.option(
        "-ngle",
        "--n-gpu-layers-expert",
        type=int,
        help="Layers of the expert on the GPU.  [default: as -ngl]",
    ),
    click.option(
        "-fa",
        "--flash-attn",
        type=click.Choice(["auto", "on", "off"]),
        help="Flash attention; auto: on a GPU, for very small models and for 8 or more answers "
        "at once.  "
        "[default: auto]",
    ),
    click.option(
        "-ctk",
        "--cache-type-k",
        metavar="TYPE",
        help="KV cache data type for K: f32, f16, bf16, q8_0, q5_1 …  [default: f16]",
    ),
    click.option(
        "-ctv",
        "--cache-type-v",
        metavar="TYPE",
        help="KV cache data type for V.  [default: f16]",
    ),
)


def check_exec(metric: str | None, allow_exec: bool, flag: str = "--metric") -> None:
    """Refuse to run what models write unless that was allowed. flag: what chose the metric."""
    if metric == "python" and not allow_exec:
        raise click.UsageError(
            f"{flag} python runs code that the models write; say --allow-exec if that is allowed"
        )


def model_options(*more: Any) -> Callable[[Command], Command]:
    """Add the options that name and load two models, and more of them, gathered as `models`.

    more: those of the constants above that can mean something to the command.
    """
    return gathered("models", BASE, EXPERT, PAIR, *EVALUATION, *more)


def check_goes_with(what: str, *names: str) -> None:
    """Refuse options, by their parameters' names, that mean something only with another one.

    what: that other one, which is not given.
    """
    for flag in _typed(names):
        raise click.UsageError(f"{flag} goes with {what}; give both, or neither")


def check_goes_without(what: str, *names: str) -> None:
    """Refuse options, by their parameters' names, that mean nothing beside another one."""
    for flag in _typed(names):
        raise click.UsageError(f"{flag} means nothing with {what}; leave one of them out")


def _typed(names: Sequence[str]) -> list[str]:
    """Return the flags of those parameters that the user gave."""
    ctx = click.get_current_context()
    return [
        parameter.opts[-1]
        for parameter in ctx.command.params
        if parameter.name in names
        and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def output_option(*formats: str) -> Callable[[Command], Command]:
    """Add -o, whose default is the first format."""
    return click.option(
        "-o", "--output", type=click.Choice(formats), default=formats[0], show_default=True
    )


def decoding_options(
    *names: str, without: Sequence[str] = (), **other_defaults: Any
) -> Callable[[Command], Command]:
    """Add the options of `Options` that have flags, gathered as `decoding`.

    names: only these; none means all, except for those in `without`.
    other_defaults: the command's own, where they differ from those of `Options`.
    """
    options = [
        _click_option(option, other_defaults.get(name, option.default))
        for name, option in OPTIONS.items()
        if option.flags and (not names or name in names) and name not in without
    ]
    if names:
        return gathered("decoding", *options, defaults=other_defaults)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_grammar(*, grammars: dict[str, str], **values: Any) -> Any:
            if (grammar := _grammar_of(grammars | values["decoding"])) is not None:
                values["decoding"]["grammar"] = grammar
            return command(**values)

        given = gathered("grammars", *GRAMMARS)(cast(Command, with_grammar))
        return gathered("decoding", *options, defaults=other_defaults)(given)

    return decorate


# Other ways to give a grammar, as llama.cpp has them.
_OTHER_GRAMMARS = ("grammar_file", "json_schema")
GRAMMARS = (
    click.option("--grammar-file", metavar="FILE", help="--grammar from a file."),
    click.option(
        "-j", "--json-schema", metavar="JSON|FILE",
        help="Let the answer be JSON of this schema; {} allows any object.",
    ),
)  # fmt: skip


def _grammar_of(given: Mapping[str, Any]) -> str | None:
    """Return the grammar that one of the options gives, or None."""
    found = {name: given[name] for name in ("grammar", *_OTHER_GRAMMARS) if name in given}
    if len(found) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in found)
        raise click.UsageError(f"{flags} both say what is allowed; give one")
    for name, value in found.items():
        is_file = name == "grammar_file" or value.lstrip()[:1] not in ("{", "[")
        text = _read(value) if name != "grammar" and is_file else str(value)
        if name != "json_schema":
            return text
        from colm_edge.llama.grammar import grammar_of

        return grammar_of(text)
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as e:
        why = getattr(e, "strerror", None) or e
        raise click.UsageError(f"{path or 'no name'}: {why}; expected a text in UTF-8") from e


def _click_option(option: Option, default: Any) -> Any:
    low: Any
    high: Any
    low, high = option.shown_limits
    type: Any = None
    if option.choices:
        type = click.Choice(option.choices)
    elif option.kind is int:
        type = Whole(low, high)
    elif option.kind is float:
        is_any = low is high is None  # of which `Options` refuses NaN
        type = float if is_any else Number(low, high, option.words, option.meaning)
    return click.option(
        *option.flags,
        option.name,
        type=type,
        default=None,  # so that an option that is not given leaves the default of `Options`
        is_flag=option.kind is bool,
        multiple=option.kind is tuple,
        metavar="|".join(["NUMBER", *option.words]) if option.words else None,
        help=option.help + (f"  [default: {option.shown(default)}]" if _is_given(default) else ""),
    )


def _is_given(value: Any) -> bool:
    return value is not None and value != ()


def gathered(
    name: str, *options: Any, defaults: Mapping[str, Any] = {}
) -> Callable[[Command], Command]:
    """Add click options and pass those that are given, over the defaults, as one dict."""

    def decorate(command: Command) -> Command:
        keys: set[str] = set()

        @wraps(command)
        def gathering(**values: Any) -> Any:
            chosen = {key: values.pop(key) for key in keys}
            given = {key: value for key, value in chosen.items() if _is_given(value)}
            return command(**values, **{name: {**defaults, **given}})

        before = _parameters(gathering)
        for option in reversed(options):
            option(gathering)
        keys.update(_parameters(gathering) - before)
        return cast(Command, gathering)

    return decorate


def _parameters(command: Callable[..., Any]) -> set[str]:
    parameters: Sequence[click.Parameter] = getattr(command, "__click_params__", ())
    return {parameter.name for parameter in parameters if parameter.name}
