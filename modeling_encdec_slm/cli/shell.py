# SPDX-License-Identifier: Apache-2.0
"""`shell`: a request in English, a shell command out. No command is ever run."""

import math
import sys
import unicodedata
from typing import Annotated

import typer

from . import options
from .console import UsageError, print_status
from .destructive import find_dangers
from .generation import decode_text


MAX_ANSWERS = 20


def shell(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="REQUEST", help="In English; quotation marks are optional. Without it: standard input."
        ),
    ] = None,
    num_answers: Annotated[
        int, typer.Option("--num-answers", "-n", metavar="N", min=1, max=MAX_ANSWERS, help="Number of alternatives.")
    ] = 1,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No confidence; only the command and warnings.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Folder or name on the Hub.  [default: the model of this package]"),
    ] = None,
    config: options.Config = None,
):
    """Print the shell command for a request. The command is never run.

    Commands go to standard output, one a line; confidence and warnings go to standard error. A warning comes before a
    command that would destroy data or run code from the network; docs/shell.md lists which. The first call with a
    model converts it, which takes some seconds.

    \b
    Examples:
      encdec-slm shell "compress the logs directory into a tarball"
      encdec-slm shell find files larger than 100 MB -n 3
      encdec-slm shell -- what does -x do in tar
      encdec-slm shell -q "show free disk space" > command.sh
    """
    request = _read_request(words)
    from .shell_model import load_shell_model

    shell_model = load_shell_model(model)
    num_tokens, limit = shell_model.encode(request)[1], shell_model.max_request_tokens
    if num_tokens > limit:
        print_status(f"The request has {num_tokens:,} tokens; only the first {limit:,} are read.")
    answers = shell_model.answer(request, num_answers)
    if not answers:
        raise ValueError("The model has no answer to this request. Say it in other words.")
    for number, answer in enumerate(answers):
        if dangers := find_dangers(answer.command):
            print_status(f"Warning: the next command {'; '.join(dangers)}.")
        print(answer.command)
        _print_confidence(answer.confidence, shell_model.calibration, is_best=number == 0, quiet=quiet)


def _print_confidence(confidence, calibration, is_best, quiet):
    if confidence is None:
        return
    percent = math.floor(100 * confidence)  # rounded, it could equal the threshold that it is below
    if is_best and confidence < calibration.threshold:
        print_status(f"  not sure: confidence {percent}%, below {math.ceil(100 * calibration.threshold)}%")
    elif not quiet:
        print_status(f"  confidence {percent}%")


def _read_request(words):
    """Return the request as one line of printable characters."""
    if words:
        # Bytes of the command line that are not UTF-8 arrive as surrogates.
        origin, content = "REQUEST", " ".join(words).encode("utf-8", "surrogateescape")
    elif sys.stdin is None or sys.stdin.isatty():
        raise UsageError("There is no request: give REQUEST, or pipe it in.")
    else:
        origin, content = "standard input", sys.stdin.buffer.read()
    text = decode_text(origin, content)
    text = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
    text = " ".join(text.split())
    if not text:
        raise ValueError(f"The request ({origin}) is empty. Say in English what the command should do.")
    return text


__all__ = ["shell"]
