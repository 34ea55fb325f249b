# SPDX-License-Identifier: Apache-2.0
"""What all commands share: options that a YAML file may give, options with several values, and quiet libraries."""

import difflib
import logging
import re
import sys
import warnings
from typing import Annotated

import typer
from typer.core import TyperCommand


NOT_IN_A_FILE = ("config", "debug", "help", "model_option")
# Which extra has a package.
EXTRAS = {
    **dict.fromkeys(("trl", "datasets", "peft", "accelerate", "rouge_score", "matplotlib", "sklearn"), "train"),
    **dict.fromkeys(("ctranslate2", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "torchao"), "export"),
    **dict.fromkeys(("evaluate", "sacrebleu"), "evaluation"),
    "gradio": "demo",
}


class CommandError(Exception):
    """Carries, as its cause, what ended a command: typer would end the process at some kinds of errors.

    Args:
        command (`str`): The name of the command.
    """

    def __init__(self, command: str):
        super().__init__(command)
        self.command = command


class UsageError(Exception):
    """A command line or a recipe that asks for what there is not; ends the process with code 2."""

    exit_code = 2

    def __init__(self, message: str, ctx: typer.Context | None = None):
        super().__init__(message)
        self.ctx = ctx

    def format_message(self) -> str:
        return str(self)


class Command(TyperCommand):
    """A command that loads this package's models before it runs, and takes `--option A B` for lists."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, self._one_value_per_option(args))

    def _one_value_per_option(self, args):
        """`--option A B` as `--option A --option B`, which is how typer reads lists."""
        lists = {name: param for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        expanded, option, has_value = [], None, False
        for position, word in enumerate(args):
            if word == "--":
                return expanded + args[position:]
            if word.startswith("--"):
                option, has_value = word.replace("_", "-"), False
            elif option in lists and has_value and _is_value_of(lists[option], word):
                expanded.append(option)
            else:
                option, has_value = (option, True) if not has_value else (None, True)
            expanded.append(word)
        return expanded

    def invoke(self, ctx):
        from encdec_slm import auto_classes  # noqa: F401  registers the models, which importing the package does elsewhere

        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "exit_code"):
                raise
            raise CommandError(self.name) from error


def _is_value_of(param, word):
    """Whether a further word belongs to a list: of numbers only numbers do, else the next argument would."""
    return re.fullmatch(r"\d+", word) is not None if param.metavar == "N" else True


def read_config(ctx: typer.Context, name_or_path: str | None) -> str | None:
    """Makes the values of a YAML file the defaults of a command's options; the command line wins."""
    if name_or_path is not None and not ctx.resilient_parsing:
        from encdec_slm.configuration.recipe_files import load_recipe

        try:
            ctx.default_map = _defaults(ctx.command, load_recipe(name_or_path), name_or_path)
        except (OSError, ValueError) as error:
            raise UsageError(str(error), ctx) from error
    return name_or_path


def _defaults(command, values, origin):
    options = {param.name: param for param in command.params if param.name not in NOT_IN_A_FILE}
    defaults = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if not options:
            raise ValueError(f"`{key}` in {origin} is a key, but `{command.name}` has none. Leave --config out.")
        if name not in options:
            nearest = difflib.get_close_matches(name, sorted(options), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"Unknown key `{key}` in {origin}. The nearest valid key is `{nearest}`: use it or leave `{key}` out."
            )
        if value is not None:
            defaults[name] = _as_given(options[name], key, value, origin)
    return defaults


def _as_given(option, key, value, origin):
    """A value as the command line would give it: text, for flags a truth value, for lists a list of texts."""
    is_list = getattr(option, "multiple", False)
    values = value if isinstance(value, list) and is_list else [value]
    wanted = bool if getattr(option, "is_flag", False) else (str, int, float)
    if not all(isinstance(one, wanted) for one in values):
        kind = "true or false" if wanted is bool else "a list of texts or numbers" if is_list else "a text or a number"
        raise ValueError(f"`{key}` in {origin} is {value!r}, but it is {kind}. Write it so.")
    if wanted is bool:
        return value
    return [str(one) for one in values] if is_list else str(value)


Config = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        is_eager=True,
        callback=read_config,
        help="A YAML file whose keys are these options and arguments; the command line wins.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")]


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def tell(text: str) -> None:
    """A line for whoever watches: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def set_up_output(shows_everything: bool) -> None:
    """Shows what this package logs; hides what libraries say to programmers, unless `shows_everything`."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("encdec_slm").setLevel(logging.INFO)
    if shows_everything:
        return
    # torchao, where it is installed, tells at each import of kernels that it has not for this machine.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def one_line(error: BaseException) -> str:
    """What an error says, as one line; what is none of this package's sentences is named by its kind too."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 700 else f"{text[:700]}..."
    if _is_ours(error) and text:
        return text
    return f"{type(error).__name__}{f': {text}' if text else ''} (`--debug` shows where it comes from)"


def _is_ours(error: BaseException) -> bool:
    frame, trace = None, error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
    return frame is not None and frame.f_globals.get("__name__", "").startswith("encdec_slm.")


def missing_extra(error: BaseException | None, command: str) -> str | None:
    """How to install the package that an error of a command comes from; `None` if it comes from something else."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    package = "" if error is None else (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    extra = "evaluation" if command == "evaluate" else EXTRAS[package]
    return f"The package `{package}` is needed, but is not installed. Run `pip install encdec-slm[{extra}]`."


__all__ = [
    *("Command", "CommandError", "Config", "Debug", "UsageError"),
    *("examples", "missing_extra", "one_line", "set_up_output", "tell"),
]
