# SPDX-License-Identifier: Apache-2.0
"""Standard streams, signals, log levels and error messages of the command line."""

import logging
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from typing import Any

import typer


# click's class, which typer does not export; newer versions of typer come with their own copy of click.
UsageError = typer.BadParameter.__base__
# Bars of steps that end sooner are not shown.
PROGRESS_DELAY_SECONDS = 3
# transformers imports torchao, which logs which of its kernels this machine does not have.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
# What library functions call the positional arguments of the commands.
POSITIONAL_ARGUMENTS = {"model_or_path": "MODEL", "model_or_dir": "MODEL", "output_dir": "OUTPUT"}


def print_status(text: str) -> None:
    """Print a status message to standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def prepare_streams() -> None:
    """Replace characters that a console cannot show, instead of failing.

    Raises:
        SystemExit: Standard output is closed.
    """
    is_closed = sys.stdout is None
    if is_closed:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if is_closed:
        raise SystemExit(
            "Standard output is closed, but results are printed there. Redirect it, as in `> result.txt`."
        )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def handle_signals() -> None:
    """End the process by an exception, so that files in progress are cleaned up, when it is asked to terminate."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number, frame):
    signal.signal(number, signal.SIG_IGN)  # once is enough: do not interrupt the cleanup
    sys.exit(128 + number)


def set_up_logging(debug: bool) -> None:
    """Show the log of this package; hide the notes of libraries unless `debug`. Call it before they are imported."""
    logger = logging.getLogger("encdec_slm")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)  # of a distributed run
    # Not the root logger: libraries with handlers of their own would print each line twice.
    logger.handlers = [logging.StreamHandler()]
    if debug:
        return
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TQDM_DELAY", str(PROGRESS_DELAY_SECONDS))
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def describe_error(error: BaseException, command: Any) -> str:
    """Return an error as one line.

    Messages of this package are kept and name the options of the command. Others are summarized after the name of
    their class.

    Args:
        error (`BaseException`): What ended the command.
        command: The typer command, or `None`.
    """
    text = " ".join(str(error).split())
    is_ours = bool(text) and _is_raised_by_this_package(error)
    if is_ours and error.__cause__ is None and not isinstance(error, ModuleNotFoundError):
        return name_options(text, command)
    from encdec_slm.errors import missing_package_message, summarize_error  # imports torch, which takes seconds

    cause = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and (message := missing_package_message(cause)):
            return message
        cause = cause.__cause__
    if is_ours:
        return name_options(text, command)
    summary = summarize_error(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{summary}."
    name = type(error).__name__
    return f"{name if summary == name else f'{name}: {summary}'} (`--debug` shows the stack trace)."


def _is_raised_by_this_package(error):
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("encdec_slm", "encdec_slm_cli")


def name_options(message: str, command: Any) -> str:
    """Replace the arguments of library functions in a message by the options of a command.

    Code in backticks, such as `overwrite=True` or `num_beams`, becomes `--overwrite` or `--num-beams`. Commands that
    take keys of a recipe keep other names: `lmbda=1` becomes `--lmbda 1`. Advice at the end of a sentence to set an
    argument that the command does not have, as in ", or pass `processing_class=...`.", is left out.
    """
    if command is None:
        return message
    options = {param.name: param.opts[0] for param in command.params if param.param_type_name == "option"}
    takes_keys = command.context_settings.get("allow_extra_args", False)

    def rename(code):
        name, equals, value = code.partition("=")
        if name not in options and not takes_keys and name in POSITIONAL_ARGUMENTS:
            return POSITIONAL_ARGUMENTS[name]
        if name not in options and not (takes_keys and equals):
            return None
        option = options.get(name, f"--{name}")
        if not equals or (name in options and value in ("True", "False")):
            return option if value != "False" else f"no {option}"
        value = value.lower() if value in ("True", "False") else shlex.quote(value.strip("\"'"))
        return f"{option} {value}"

    def replace(match):
        words = [rename(code) for code in re.split(r", (?=\w+=)", match[1])]
        return match[0] if None in words else f"`{' '.join(words)}`"

    def drop(match):
        return match[0] if takes_keys or match[1] in options else ""

    message = re.sub(r",? or (?:set|pass|export with) `(\w+)(?:=[^`]*)?`[^.]*", drop, message)
    return re.sub(r"`(\w+(?:=[^`]+)?)`", replace, message)


__all__ = [
    *("UsageError", "describe_error", "handle_signals", "name_options", "prepare_streams", "print_status"),
    "set_up_logging",
]
