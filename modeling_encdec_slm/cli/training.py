# SPDX-License-Identifier: Apache-2.0
"""`finetune` and `distill`: recipes, keys that override them, and the report at the end."""

import ast
import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from .shared import Command, Debug, UsageError, examples, tell


DEFAULT_RECIPES = {"finetune": "finetune_docstrings", "distill": "distill_docstrings"}
# Where the keys of a command are declared; read as text, for a help that does not wait for torch.
OWN_KEYS = {
    "finetune": (("trainers/seq2seq_data.py", "DataArguments"), ("trainers/finetuning.py", "FinetuneArguments")),
    "distill": (
        ("trainers/seq2seq_data.py", "DataArguments"),
        ("trainers/distilling.py", "DistillArguments"),
        ("trainers/distillation_config.py", "Seq2SeqDistillationConfig"),
    ),
}
OTHER_KEYS = {
    "finetune": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("transformers", "training_args_seq2seq.py", "Seq2SeqTrainingArguments"),
        ("trl", "trainer/model_config.py", "ModelConfig"),
    ),
    "distill": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/distillation_config.py", "DistillationConfig"),
    ),
}
VISION = (("trainers/vqa.py", "VqaArguments"),)
# Only a run on images has these.
VISION_KEYS = {"tasks", "num_train_rows", "image_column", "question_column", "answer_column", "frozen_parts"}

Recipe = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="RECIPE", help="A recipe of this package, or the path of a YAML file of the keys below."
    ),
]


class TrainingCommand(Command):
    """A command that takes every key of its recipes as an option; its help lists them."""

    def format_options(self, ctx, formatter):
        super().format_options(ctx, formatter)
        with formatter.section("Keys, in a recipe or as --key VALUE"):
            formatter.write_dl(own := list(_own_keys(OWN_KEYS[self.name])))
        if self.name == "finetune":
            with formatter.section("Keys of runs on images, which have no files of rows"):
                formatter.write_dl([key for key in _own_keys(VISION) if key[0] not in dict(own)])
        for package, path, kind in OTHER_KEYS[self.name]:
            names = [
                field.target.id for field in _fields(_folder_of(package) / path, kind) if field.target.id != "debug"
            ]
            if names:
                with formatter.section(f"Keys of {package}.{kind}"):
                    formatter.write_text(", ".join(names))


def _own_keys(places) -> Iterator[tuple[str, str]]:
    root = Path(__file__).parents[1]
    for path, kind in places:
        # An installed package has its folders within one; a checkout, side by side.
        file = next((folder / path for folder in (root, root.parent) if (folder / path).is_file()), root / path)
        for field in _fields(file, kind):
            texts = [value.value for value in ast.walk(field.value) if isinstance(value, ast.Constant)]
            help_text = texts[texts.index("help") + 1] if "help" in texts else ""
            yield f"--{field.target.id}", help_text


def _fields(path, kind):
    """The annotated fields of a dataclass in a file; none where there is no such file."""
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind]
    return [node for one in classes for node in one.body if isinstance(node, ast.AnnAssign) and node.value]


def _folder_of(package):
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found is not None and found.origin else Path("missing")


def finetune(ctx: typer.Context, config: Recipe = None, debug: Debug = False):
    """Fine-tune an encoder-decoder on rows of source and target text, or on images with questions.

    Measures held-out rows before and after, and saves the model, its card, results.json, predictions.jsonl and
    loss.png to `output_dir`. Without --config it goes by the recipe finetune_docstrings: a new model of a million
    parameters learns to write docstrings from Python's standard library, in a few minutes on two CPU cores. With keys
    of images (`tasks`, `image_column`, ...) or a preset that sees it trains a vision-text model.
    """
    arguments = _with_recipe("finetune", config, ctx.args)
    (run_vqa if _is_vision(arguments) else run_finetune)(arguments)


finetune.examples = examples(
    "encdec-slm finetune",
    "encdec-slm finetune --train_file rows.jsonl --output_dir outputs/mine",
    "encdec-slm finetune --config finetune_lora --model_name_or_path outputs/mine",
    "encdec-slm finetune --config finetune_xsum --bf16 false",
    "encdec-slm finetune --config vqa_synthetic",
)


def distill(ctx: typer.Context, config: Recipe = None, debug: Debug = False):
    """Teach an encoder-decoder student by a decoder-only teacher, and compare both on held-out rows.

    Saves the student, its card, results.json, predictions.jsonl and loss.png to `output_dir`. Without --config it
    goes by the recipe distill_docstrings: a teacher is trained first, on Python's standard library, and a student
    without it for comparison; twelve minutes on one CPU core.
    """
    run_distill(_with_recipe("distill", config, ctx.args))


distill.examples = examples(
    "encdec-slm distill",
    "encdec-slm distill --teacher_model_name_or_path NAME --train_file rows.jsonl",
    "encdec-slm distill --config distill_predecessor --train_file rows.jsonl",
    "encdec-slm distill --config distill_docstrings --kd_ratio 0.5 --resume_from_checkpoint true",
)


def _with_recipe(command, config, keys):
    if config is None:
        config = DEFAULT_RECIPES[command]
        tell(f"No --config: going by the recipe {config}, with what the command line changes in it.")
    return ["--config", config, *keys]


def _is_vision(arguments):
    """Whether the keys of a run, from its recipe and the command line, are about images."""
    from encdec_slm.configuration.recipe_files import load_recipe

    with usage_errors():
        recipe = load_recipe(arguments[1])
    words = [word.removeprefix("--").partition("=") for word in arguments if word.startswith("--")]
    keys = {str(key) for key in recipe} | {key.replace("-", "_") for key, *_ in words}
    preset = str(recipe.get("preset"))
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        preset = following if word == "--preset" else word.removeprefix("--preset=") if "--preset=" in word else preset
    return bool(keys & VISION_KEYS) or preset.endswith("-vlm")


def run_finetune(arguments: Sequence[str] | None = None) -> None:
    """Fine-tunes a text model as a command line says, and prints the report.

    Args:
        arguments (`Sequence[str]`, *optional*): As [`~encdec_slm.configuration.recipe_files.parse_recipe`] takes them.
    """
    from transformers import Seq2SeqTrainingArguments
    from trl import ModelConfig

    from encdec_slm.trainers.finetuning import FinetuneArguments, finetune, report

    kinds = (FinetuneArguments, Seq2SeqTrainingArguments, ModelConfig)
    args, training_args, model_args = parse(kinds, arguments)
    results = finetune(args, training_args, model_args)
    if training_args.process_index == 0:
        print(report(results, training_args.output_dir))


def run_distill(arguments: Sequence[str] | None = None) -> None:
    """Distils as a command line says, and prints the report; `arguments` as in [`run_finetune`]."""
    from encdec_slm.trainers import Seq2SeqDistillationConfig
    from encdec_slm.trainers.distilling import DistillArguments, distill, report

    args, training_args = parse((DistillArguments, Seq2SeqDistillationConfig), arguments)
    results = distill(args, training_args)
    if training_args.process_index == 0:
        print(report(results, training_args.output_dir))


def run_vqa(arguments: Sequence[str] | None = None) -> None:
    """Trains a vision-text model as a command line says, and prints the report; `arguments` as in [`run_finetune`]."""
    from transformers import Seq2SeqTrainingArguments

    from encdec_slm.trainers.vqa import VqaArguments, train_vqa
    from encdec_slm.trainers.vqa_reports import report

    args, training_args = parse((VqaArguments, Seq2SeqTrainingArguments), arguments)
    results = train_vqa(args, training_args)
    if training_args.process_index == 0:
        print(report(results, training_args.output_dir))


def parse(kinds: Sequence[type], arguments: Sequence[str] | None) -> tuple:
    """Dataclasses from a command line; for the command line, what does not fit them is wrong usage."""
    from encdec_slm.configuration.recipe_files import parse_recipe

    if arguments is None:  # of a script, which speaks for itself
        return parse_recipe(kinds)
    with usage_errors():
        return parse_recipe(kinds, arguments)


@contextlib.contextmanager
def usage_errors():
    """Turns what is wrong with keys and values into one sentence of wrong usage."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        # argparse prints how to call it, and in its last line what is wrong.
        lines = said.getvalue().strip().splitlines() or ["The arguments cannot be read."]
        raise UsageError(lines[-1].partition("error: ")[2] or lines[-1]) from error
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


__all__ = ["TrainingCommand", "distill", "finetune", "parse", "run_distill", "run_finetune", "run_vqa"]
