"""Options that commands share, and the values of those that take more than a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

import click

from colm_edge.options import OPTIONS, Option

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
    """Add the options of `Options` that have flags, gathered as `decoding`: those that are given,
    over the command's own defaults."""
    options = [
        _click_option(option, other_defaults.get(name, option.default))
        for name, option in OPTIONS.items()
        if option.flags
    ]
    return lambda command: _gather(command, options, "decoding", other_defaults)


def _click_option(option: Option, default: Any) -> Any:
    low: Any
    high: Any
    low, high = option.shown_limits
    type: Any = None
    if option.choices:
        type = click.Choice(option.choices)
    elif option.kind is int:
        type = click.IntRange(low, high)
    elif option.kind is float:
        type = float if low is high is None else click.FloatRange(low, high)
    return click.option(
        *option.flags,
        option.name,
        type=type,
        default=None,  # an option that isn't given leaves Options' own default
        is_flag=option.kind is bool,
        multiple=option.kind is tuple,
        help=option.help + (f"  [default: {default}]" if _is_given(default) else ""),
    )


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
