# SPDX-License-Identifier: Apache-2.0
"""The command line `encdec-slm`.

This package is installed as `encdec_slm_cli`, beside `encdec_slm`: importing the latter imports torch, which `--help`
and shell completion must not wait for.
"""

if __name__ != "encdec_slm_cli":
    raise ImportError("Import the command line as `encdec_slm_cli`.")

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from .adapting import adapt, convert
from .benchmarking import bench, presets
from .exporting import export
from .generating import generate
from .publishing import demo, evaluate, publish
from .shared import Command, CommandError, missing_extra, one_line, set_up_output, tell
from .training import TrainingCommand, distill, finetune


PROGRAM = "encdec-slm"
# Of a shell for a process that Ctrl-C ended.
INTERRUPTED = 130

app = typer.Typer(
    help="Small encoder-decoder language models: train, distil, adapt, evaluate, export, publish and use them.",
    epilog="`encdec-slm COMMAND --help` shows examples. Exit codes: 0 done, 1 failed, 2 wrong usage.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-"), "max_content_width": 110},
)
for function, kind in (
    *((finetune, TrainingCommand), (distill, TrainingCommand), (adapt, Command), (convert, Command)),
    *((evaluate, Command), (export, Command), (bench, Command), (generate, Command), (publish, Command)),
    *((demo, Command), (presets, Command)),
):
    takes_other_keys = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(
        cls=kind,
        epilog=function.examples,
        context_settings=takes_other_keys if function in (finetune, distill, adapt) else None,
    )(function)


def _show_version(is_asked: bool):
    if is_asked:
        print(f"{PROGRAM} {version('encdec-slm')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options_of_all_commands(
    ctx: typer.Context,
    shows_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
):
    if ctx.invoked_subcommand is None:
        tell(ctx.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line: 0, 1 for what failed, 2 for wrong usage, 130 for what Ctrl-C ended.

    Args:
        arguments (`Sequence[str]`, *optional*): Such as `["generate", "outputs/model", "a text"]`. `None` means those
            of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        set_up_output(shows_everything=debug)
        run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        tell(f"{PROGRAM}: Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has gone, as `head` does; what is still buffered has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return _code_of(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        tell(f"{PROGRAM}: {one_line(error)}")
        return 1
    return 0


def _code_of(error):
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    tell(f"{PROGRAM}: {error.code}")
    return 1


def run(arguments: Sequence[str]) -> None:
    """Runs a command line; errors of the command leave it as they are.

    Raises:
        SystemExit: With code 2, after a line that says so, for wrong usage.
    """
    _call(_command(), list(arguments), PROGRAM)


def run_command(name: str, *options: str) -> None:
    """Runs one of the commands as a script of its own, on this process's arguments; as [`run`] does.

    Args:
        name (`str`): Such as `"export"`.
        options (`str`): Options that the script adds, such as `"--format", "onnx"`.
    """
    _call(_command().commands[name], [*options, *sys.argv[1:]], os.path.basename(sys.argv[0]))


def _command():
    return typer.main.get_command(app)


def _call(command, arguments, program):
    try:
        code = command.main(arguments, prog_name=program, standalone_mode=False)
    except CommandError as error:
        cause = error.__cause__
        if advice := missing_extra(cause, error.command):
            raise SystemExit(advice) from cause
        raise cause from None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        path = error.ctx.command_path if getattr(error, "ctx", None) else program
        message = " ".join(error.format_message().split())
        tell(f"{path}: {message}{'' if message.endswith(('.', '?')) else '.'} See `{path} --help`.")
        raise SystemExit(2) from error
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)


__all__ = ["app", "main", "run", "run_command"]
