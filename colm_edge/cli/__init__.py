"""The command line, a module for each group of commands: parse, call, print."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import Any

import click

from colm_edge.cli.bench import bench_command
from colm_edge.cli.evaluate import eval_command
from colm_edge.cli.models import info_command, models_command, pull_command, quantize_command
from colm_edge.cli.run import chat, run
from colm_edge.cli.score import score_command
from colm_edge.cli.serve import serve_command
from colm_edge.cli.train import train
from colm_edge.errors import ColmError

INTERRUPTED = 130  # the exit code after Ctrl-C


class OneLineErrors(click.Command):
    """A command whose ColmErrors, and files that cannot be used, are one line on stderr and exit
    code 1; Ctrl-C is 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ColmError as e:
            raise click.ClickException(str(e)) from e
        except OSError as e:
            if e.filename is None:  # a standard file's, which the group reports
                raise
            raise click.ClickException(f"{e.filename}: {e.strerror or e}") from e
        except KeyboardInterrupt:
            click.echo(err=True)  # the line that shows ^C ends
            raise click.exceptions.Exit(INTERRUPTED) from None


class Group(OneLineErrors, click.Group):
    """A group whose commands report errors that way, those of standard output included."""

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Run as a program of its own, which Ctrl-C ends at once: llama.cpp may work on, on a
        thread that the ordinary end of a process would wait for, or crash."""
        try:
            return self.main(*args, **more)
        except SystemExit as e:
            if e.code == INTERRUPTED:
                for file in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        file.flush()
                os._exit(INTERRUPTED)
            raise

    def main(self, *args: Any, **more: Any) -> Any:
        open_standard_files()
        try:
            return super().main(*args, **more)
        except OSError as e:
            what = "standard output" if e.filename is None else e.filename
            forget_output()
            click.echo(f"Error: {what}: {e.strerror or e}", err=True)
            sys.exit(1)


def open_standard_files() -> None:
    """Put /dev/null in the place of standard files that the process was started without: else the
    first file that it opens would be one of them, with what is printed in it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):  # it is free, and the lowest of those
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def forget_output() -> None:
    """Let what standard output could not take not be tried again when Python ends."""
    with suppress(OSError, ValueError):  # in a test it has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, given: say_version(ctx) if given else None,
    help="Show the versions of colm-edge and llama.cpp, and the devices.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def main(verbose: bool) -> None:
    """A small language model that calls an expert only for the tokens it needs."""
    if verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    else:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        # It warns at every retry; our one line about the error says enough. Its logger has the
        # level that this says once it is imported.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def say_version(ctx: click.Context) -> None:
    """Print the versions of colm-edge and llama.cpp, llama.cpp's build and the devices."""
    from importlib.metadata import version

    from colm_edge.llama.backend import build_info, devices

    try:
        from colm_edge.readout import implementation
    except ColmError as e:  # before a command runs, which would tell it
        raise click.ClickException(str(e)) from e
    click.echo(f"colm-edge {version('colm-edge')}, the switch read by {implementation}")
    click.echo(f"llama-cpp-python {version('llama-cpp-python')}; {build_info()}")
    for device in devices():
        click.echo(f"device {device}")
    ctx.exit()


for command in (
    run,
    chat,
    train,
    score_command,
    eval_command,
    bench_command,
    models_command,
    pull_command,
    info_command,
    quantize_command,
    serve_command,
):
    main.add_command(command)
