# SPDX-License-Identifier: Apache-2.0
"""The command line `encdec-slm`.

This package is installed as `encdec_slm_cli`, beside `encdec_slm`: importing the latter imports torch, which `--help`
and shell completion must not wait for.
"""

if __name__ != "encdec_slm_cli":
    raise ImportError("Import the command line as `encdec_slm_cli`.")

import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from .console import (
    UsageError,
    describe_error,
    handle_signals,
    name_options,
    prepare_streams,
    print_status,
    set_up_logging,
)
from .generation import generate
from .labeling import label
from .measurement import bench, evaluate, presets
from .models import adapt, convert, export
from .publication import demo, publish
from .shell import shell
from .training import distill, finetune, pretrain


if multiprocessing.current_process().name != "MainProcess":  # in a worker of a command
    set_up_logging(debug=False)

PROGRAM = "encdec-slm"
# Exit codes that shells use: SIGNALED plus the number of the signal; Ctrl-C sends SIGINT, number 2.
SIGNALED = 128
INTERRUPTED = 130

app = typer.Typer(
    help="Small encoder-decoder language models: train, distill, adapt, evaluate, export, publish and use them.",
    epilog="`encdec-slm COMMAND --help` shows examples. `--debug` anywhere shows the stack trace of an error. "
    "Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda word: word.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
for function in (finetune, distill, pretrain, adapt):  # their keys of a recipe are parsed by TRL
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(function)
for function in (label, convert, evaluate, export, bench, generate, shell, publish, demo, presets):
    app.command()(function)


def _show_version(is_requested: bool):
    if is_requested:
        print(f"{PROGRAM} {version('encdec-slm')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _without_command(
    ctx: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
):
    if ctx.invoked_subcommand is None:
        print_status(ctx.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1 for failure, 2 for wrong usage, 130 after Ctrl-C.

    Args:
        arguments (`Sequence[str]`, *optional*): Such as `["generate", "outputs/model", "a text"]`. `None` means those
            of this process, which then ends itself on SIGTERM (exit code 143).
    """
    if arguments is None:
        arguments = sys.argv[1:]
        handle_signals()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [word for word in arguments[:end] if word != "--debug"] + list(arguments[end:])
    try:
        try:
            prepare_streams()
            set_up_logging(debug)
            return _run(arguments, debug)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print_status(f"{PROGRAM}: Interrupted.")
        return INTERRUPTED
    except OSError as error:  # of standard output; Python flushes it again when it exits, which must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print_status(f"{PROGRAM}: Standard output could not be written ({error.strerror}).")
        return 1
    except SystemExit as error:
        if isinstance(error.code, str):
            print_status(f"{PROGRAM}: {error.code}")
            return 1
        if (error.code or 0) > SIGNALED:
            print_status(f"{PROGRAM}: Terminated.")
        return error.code or 0


def _run(arguments, debug):
    group = typer.main.get_command(app)
    if "_ENCDEC_SLM_COMPLETE" in os.environ:  # a shell asks for completions
        group.main(arguments, prog_name=PROGRAM)
    name = None
    try:
        with group.make_context(PROGRAM, arguments) as ctx:
            try:
                group.invoke(ctx)
            finally:
                name = ctx.invoked_subcommand
        return 0
    except typer.Exit as error:
        return error.exit_code
    except UsageError as error:
        _print_usage_error(
            error, error.ctx.command_path if error.ctx else f"{PROGRAM} {name}", group.commands.get(name)
        )
        return 2
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_status(f"{PROGRAM}: {describe_error(error, group.commands.get(name))}")
        return 1


def _print_usage_error(error, command_path, command):
    message = name_options(" ".join(error.format_message().split()), command)
    message += "" if message.endswith((".", "?")) else "."
    if hasattr(error, "possibilities"):  # an unknown option, or a text that looks like one
        message += " Put `--` before a value that begins with a dash."
    print_status(f"{command_path}: {message} See `{command_path} --help`.")


__all__ = ["app", "main"]
