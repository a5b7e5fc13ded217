"""Options that commands share, and the values of those that take more than a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

import click

Command = TypeVar("Command", bound=Callable[..., Any])
SWITCH = click.option(
    "-sw",
    "--switch",
    metavar="FILE|entropy|margin|defer-row",
    help="The switch: a trained one, an untrained rule (margin is the default beside two "
    "models), or the <|defer|> row of a Co-LLM base.",
)
WORK_DIR = click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Keep the scores here, on disk as they come; a killed run goes on from them.",
)


def model_options(command: Command) -> Command:
    """Add the options that name the models, the same in every command, gathered as `models`."""
    return _gather(command, [*_pair_options()[:2], SWITCH, *_pair_options()[2:]], "models")


def pair_options(command: Command) -> Command:
    """Add the model options without a switch."""
    return _gather(command, _pair_options(), "models")


def _pair_options() -> list[Any]:
    return [
        click.option(
            "-m", "--model", metavar="REF",
            help="The base: a GGUF file, a name in models.txt, or user/repo:file.gguf.",
        ),
        click.option(
            "-me", "--model-expert", "expert", metavar="REF|URL",
            help="The expert, likewise; or a server that has it, http://HOST:PORT: llama.cpp's, "
            "vLLM's or colm-edge's.",
        ),
        click.option("--pair", metavar="NAME", help="A pair that models.txt names."),
        click.option("--lora", metavar="GGUF", help="A LoRA adapter for the base."),
        click.option("--offline", is_flag=True, help="Download nothing."),
        click.option(
            "-c", "--ctx-size", "n_ctx", type=click.IntRange(0, 2**31 - 1), default=0,
            help="Context in tokens; 0: what both models were trained for, at most 4096.",
        ),
        click.option(
            "-t", "--threads", "n_threads", type=click.IntRange(0), default=0,
            help="CPU threads; 0: every core, or one for a very small model.",
        ),
        click.option(
            "-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(0, 512), default=0,
            help="Tokens of a prompt evaluated at a time; 0: 512, or 128 without flash attention.",
        ),
        click.option(
            "-ngl", "--n-gpu-layers", type=int, default=0, help="Base layers put on the GPU."
        ),
        click.option(
            "-ngle", "--n-gpu-layers-expert", type=int, help="Expert layers on the GPU [as -ngl]."
        ),
        click.option(
            "--rpc", metavar="HOST:PORT,…", default="", callback=listed,
            help="Machines that hold the expert: llama.cpp's RPC servers.",
        ),
        click.option(
            "-fa", "--flash-attn", type=click.Choice(["auto", "on", "off"]),
            help="Flash attention; auto: on a GPU only.  [default: auto]",
        ),
        click.option(
            "-ctk", "--cache-type-k", metavar="TYPE",
            help="Type of the cached keys: f32, f16, bf16, q8_0, q5_1 …  [default: f16]",
        ),
        click.option(
            "-ctv", "--cache-type-v", metavar="TYPE",
            help="Type of the cached values.  [default: f16]",
        ),
        click.option(
            "--overlap/--no-overlap", default=None,
            help="Let the expert catch up beside the base, on a thread of its own.  [default: "
            "where they are on different devices or cores]",
        ),
        click.option(
            "--expert-required", is_flag=True,
            help="End with an error when a remote expert fails, rather than let the base go on "
            "alone.",
        ),
    ]  # fmt: skip


def decoding_options(**other_defaults: Any) -> Callable[[Command], Command]:
    """Add the fields of Options, gathered as `decoding`: what is given, and a command's own
    defaults where it has other ones."""
    from colm_edge.options import Options

    defaults = Options(**other_defaults)

    def option(field: str, *names: str, help: str, type: Any = None, **more: Any) -> Any:
        value = getattr(defaults, field)
        if _is_given(value):
            help += f"  [default: {value}]"
        return click.option(*names, field, type=type, default=None, help=help, **more)

    options = [
        option("max_tokens", "-n", "--n-predict", type=click.IntRange(-1, 2**31 - 1),
               help="Tokens to write at most; -1: until the end."),
        option("threshold", "--threshold", type=click.FloatRange(0, 1),
               help="Defer where p_defer is above it; 1: base alone, 0: expert alone."),
        option("defer_rate", "--defer-rate", type=click.FloatRange(0, 1),
               help="Share of tokens to defer, by the switch's calibration."),
        option("strategy", "--strategy", type=click.Choice(["defer", "compose"]),
               help="At a deferral: the expert's token, or that of the mixture."),
        option("schedule", "--schedule", type=click.Choice(["fast", "sequential"]),
               help="In which batches both models are evaluated; the text is the same."),
        option("temperature", "--temp", type=click.FloatRange(0), help="0: greedy."),
        option("top_k", "--top-k", type=click.IntRange(0, 2**31 - 1),
               help="Keep the k likeliest; 0: all."),
        option("top_p", "--top-p", type=click.FloatRange(0, 1), help="Keep this much probability."),
        option("min_p", "--min-p", type=click.FloatRange(0, 1),
               help="Drop what is less likely than this share of the likeliest."),
        option("repeat_penalty", "--repeat-penalty", type=float, help="1: none."),
        option("presence_penalty", "--presence-penalty", type=float, help="0: none."),
        option("frequency_penalty", "--frequency-penalty", type=float, help="0: none."),
        option("seed", "-s", "--seed", type=click.IntRange(-1, 2**32 - 2),
               help="-1: another one each time."),
        option("stop", "--stop", multiple=True, metavar="TEXT",
               help="End the answer before this text; repeatable."),
        option("raw", "--raw", is_flag=True, help="No chat template."),
    ]  # fmt: skip
    return lambda command: _gather(command, options, "decoding", other_defaults)


def _is_given(value: Any) -> bool:
    return value is not None and value != ()


def _gather(
    command: Command, options: list[Any], name: str, defaults: Mapping[str, Any] = {}
) -> Command:
    """Add click options and hand the values given, over the defaults, to the command as a dict."""
    keys: set[str] = set()

    @wraps(command)
    def gathering(**values: Any) -> Any:
        chosen = {key: values.pop(key) for key in keys}
        given = {key: value for key, value in chosen.items() if _is_given(value)}
        values[name] = {**defaults, **given}
        return command(**values)

    def parameters() -> set[str]:
        return {p.name for p in getattr(gathering, "__click_params__", [])}

    before = parameters()
    for option in reversed(options):
        option(gathering)
    keys.update(parameters() - before)
    return cast(Command, gathering)


def listed(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Split a list at its commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def finite(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse NaN, which is outside of no range."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


def shares(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Return numbers from 0 to 1: a list, 0.1,0.2, or a range, 0:1:0.1, both ends included."""
    numbers: list[float] = []
    try:
        for part in value.split(",") if value is not None else []:
            first, *rest = (float(x) for x in part.split(":"))
            last, step = rest or (first, 1.0)
            if not (0 <= first <= last <= 1 and step > 0):
                raise ValueError
            count = int((last - first) / step + 1e-9) + 1
            numbers += [round(first + i * step, 9) for i in range(count)]
    except ValueError as e:
        message = f"{value!r}: expected numbers from 0 to 1, as 0.1,0.2 or 0:1:0.1"
        raise click.BadParameter(message) from e
    return tuple(numbers)
