# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint on a task: rows, predictions, and metrics with confidence intervals."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ...checkpoints import lock_folder
from ...run_results import DataSource, ModelResults, RunResults, package_versions
from ..prompt_templates import read_prompt_template
from .generation import AnswerGenerator, FunctionGenerator, check_model_fits_task, load_model
from .predictions import RESULT_NAME, Predictions
from .results import build_command, mean_with_interval, public_path
from .task_rows import compute_data_digest, load_examples
from .tasks import find_task


CONFIDENCE = 0.95
# Arguments that are for a model, and not for a function.
MODEL_OPTIONS = (
    *("processing_class", "model_revision", "max_source_length", "max_new_tokens", "num_beams", "prompt_template"),
    *("device", "dtype"),
)
COUNTS = ("batch_size", "num_bootstrap", "num_beams", "max_samples", "max_new_tokens", "max_source_length")


def evaluate_checkpoint(
    model_or_path: str | Path | PreTrainedModel | Callable[[list[str]], Sequence[str | Sequence[str]]],
    task: str,
    *,
    output_dir: str | Path | None = None,
    dataset_name: str | Path | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    dataset_split: str | None = None,
    source_column: str = "source",
    target_column: str = "target",
    max_samples: int | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    model_revision: str | None = None,
    max_source_length: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    prompt_template: str | Path | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> RunResults:
    """Compute the metrics of a checkpoint on a task, with confidence intervals.

    Answers are generated with the settings of the checkpoint's generation config, but never sampled. Settings that are
    replaced are logged and listed under `settings["overridden"]`.

    With `output_dir`, each batch is appended to `predictions.jsonl` there, and the same call resumes an interrupted
    run; the results are saved as `evaluation.json`.

    Args:
        model_or_path (`str`, `Path`, [`~transformers.PreTrainedModel`] or `Callable`): A folder, a model on the Hub,
            or a loaded model, with a LoRA adapter or without: any encoder-decoder or decoder-only model for text, or a
            vision-text model of this family. Or a function that returns the answers to a list of sources: a text for
            each, or a list of texts, the best first.
        task (`str`): One of [`list_tasks`]. `"text"` is for other rows of text.
        output_dir (`str` or `Path`, *optional*): Folder of this model and task. `None` saves nothing.
        dataset_name (`str` or `Path`, *optional*): A data file, a folder of data files, or a data set on the Hub, with
            the columns of the task. `None` takes the rows of the task.
        dataset_config (`str`, *optional*): Configuration of the data set; for CodeXGLUE the programming language.
        dataset_revision (`str`, *optional*): Branch, tag or commit of the data set on the Hub.
        dataset_split (`str`, *optional*): Split of the data set. `None` takes the split that the task is measured on.
        source_column (`str`, *optional*, defaults to `"source"`): For the tasks `text` and `docstrings`.
        target_column (`str`, *optional*, defaults to `"target"`): Likewise.
        max_samples (`int`, *optional*): At most so many rows, drawn by `seed`. `None` takes all rows, or 200 rows of
            tasks with generated images.
        processing_class (*optional*): Tokenizer or processor of a loaded model.
        model_revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.
        max_source_length (`int`, *optional*): Longest source, in tokens. Longer ones are truncated and counted. `None`
            takes the limit of tokenizer and config.
        max_new_tokens (`int`, *optional*): Longest answer, in tokens. `None` takes the limit of the generation config,
            or that of the task if it has none.
        num_beams (`int`, *optional*): Beams of the search; 1 is greedy. `None` takes the number of the generation
            config, or the number of answers of a task with several, such as `"shell"`, if that is larger. With fewer
            beams such a task has as many answers as beams.
        prompt_template (`str` or `Path`, *optional*): Jinja template of the prompt of a decoder-only model, with the
            field `source`: the text itself, or its file. Without it, the prompt is the source. The tokenizer's chat
            template is applied to the prompt.
        batch_size (`int`, *optional*, defaults to 8): Rows per batch.
        device (`str`, *optional*): Such as `"cpu"`. `None` takes an accelerator if there is one.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`. `None` takes that of the weights.
        num_bootstrap (`int`, *optional*, defaults to 1000): Resamples of the rows for the intervals.
        seed (`int`, *optional*, defaults to 0): Draws rows and resamples.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`~encdec_slm.run_results.RunResults`]: The metrics and how they were measured.

    Raises:
        ValueError: There is no such task, model or data, they do not fit together, a number is out of range, or
            `output_dir` holds predictions of another run.
        TypeError: A value of a row is not text.
    """
    arguments = dict(locals())
    found = find_task(task)
    for name in COUNTS:
        check_count(name, arguments[name])
    examples = load_examples(
        task,
        found,
        dataset_name=None if dataset_name is None else str(dataset_name),
        dataset_config=dataset_config,
        dataset_revision=dataset_revision,
        dataset_split=dataset_split,
        columns=_named_columns(task, found, source_column, target_column),
        max_samples=max_samples,
        seed=seed,
    )
    generator = _build_generator(arguments, task, found)
    settings = generator.settings()
    run = {"task": task, "model": generator.compute_digest(), "data": compute_data_digest(examples), **settings}
    if output_dir is not None:
        _check_replaceable(Path(output_dir, RESULT_NAME))
    with contextlib.ExitStack() as stack:
        folder = None if output_dir is None else _create_folder(output_dir)
        if folder is not None:
            stack.enter_context(lock_folder(folder))
        predictions = Predictions(folder, run, len(examples))
        _generate_missing(generator, examples, predictions, batch_size, show_progress)
    pairs = zip(predictions.texts, examples, strict=True)
    scores = [found.score(text, example.references) for text, example in pairs]
    settings |= {"batch_size": batch_size, "num_bootstrap": num_bootstrap, "seed": seed}
    settings["overridden"] = generator.overridden
    origin = _find_origin(model_or_path)
    name = Path(origin).resolve().name if Path(origin).is_dir() else origin
    results = RunResults(
        kind="evaluation",
        task=task,
        models=[
            ModelResults(name, mean_with_interval(scores, num_bootstrap, CONFIDENCE, seed), generator.num_parameters)
        ],
        saved_model=name,
        dataset=_data_source(arguments, found),
        num_rows={"test": len(examples)},
        num_cut_rows={"test": predictions.num_cut},
        confidence=CONFIDENCE,
        settings=settings,
        command=None if isinstance(generator, FunctionGenerator) else _build_command(arguments),
        device=generator.device_name,
        seconds=round(predictions.seconds, 1),
        versions=package_versions("datasets", "rouge-score"),
    )
    if folder is not None:
        results.save(folder / RESULT_NAME)
    return results


def _build_generator(arguments, task_name, task):
    """Return the generator of a model or of a function."""
    model = arguments["model_or_path"]
    if callable(model) and not hasattr(model, "generate"):
        if given := [name for name in MODEL_OPTIONS if arguments[name] is not None]:
            raise ValueError(f"{', '.join(f'`{name}`' for name in given)} has no effect on a function. Leave it out.")
        return FunctionGenerator(model)
    options = (arguments[name] for name in ("processing_class", "model_revision", "dtype", "device"))
    model, processing_class = load_model(model, *options)
    check_model_fits_task(model, task_name, task)
    limits = {name: arguments[name] for name in ("max_new_tokens", "num_beams", "max_source_length")}
    return AnswerGenerator(
        model,
        processing_class,
        task.max_new_tokens,
        num_answers=task.num_answers,
        parse_answer=task.parse_answer,
        prompt_template=read_prompt_template(arguments["prompt_template"]),
        **limits,
    )


def _check_replaceable(path):
    if path.exists():
        try:
            RunResults.load(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is not from an earlier evaluation, and would be replaced. Give another `output_dir`."
            ) from error


def _create_folder(output_dir):
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` is {str(folder)!r}, which is a file. Give the path of a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_count(name: str, value: int | None) -> None:
    """Check that an argument is a whole number of at least 1, or `None`.

    Raises:
        ValueError: It is not.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1.")


def _named_columns(task_name, task, source_column, target_column):
    names = (source_column, target_column)
    if names == ("source", "target"):
        return None
    if not task.columns_can_be_named:
        raise ValueError(
            f"`source_column` and `target_column` are {names[0]!r} and {names[1]!r}, but the task {task_name!r} reads "
            f"the columns {', '.join(alternatives[0] for alternatives in task.columns)}. Leave them out, or use the "
            "task 'text'."
        )
    return names


def _generate_missing(generator, examples, predictions, batch_size, show_progress):
    first, seconds = len(predictions.texts), predictions.seconds
    started = time.perf_counter()
    with tqdm(total=len(examples), initial=first, desc="Generating", unit="row", disable=not show_progress) as bar:
        try:
            for start in range(first, len(examples), batch_size):
                batch = examples[start : start + batch_size]
                predictions.append(batch, *generator.generate(batch))
                bar.update(len(batch))
        finally:  # the time of an interrupted run counts
            predictions.seconds = seconds + time.perf_counter() - started
            predictions.save_state()


def _data_source(arguments, task):
    """Return where the rows come from, without local paths."""
    name = arguments["dataset_name"]
    options = {key: arguments[f"dataset_{key}"] for key in ("config", "split", "revision")}
    if name is not None:
        options["split"] = options["split"] or (None if Path(name).is_file() else task.dataset_split)
        return DataSource(public_path(name), **options)
    defaults = {key: getattr(task, f"dataset_{key}") for key in options}
    name = task.dataset_name or arguments["task"]
    return DataSource(name, **{key: value or defaults[key] for key, value in options.items()})


def _find_origin(model_or_path):
    """Return the path or name of a model, or the name of its class."""
    if isinstance(model_or_path, (str, Path)):
        return str(model_or_path)
    name = getattr(model_or_path, "name_or_path", None) or getattr(model_or_path, "__name__", None)
    return name or type(model_or_path).__name__


def _build_command(arguments):
    model = _find_origin(arguments["model_or_path"])
    skipped = ("model_or_path", "processing_class", "show_progress")
    options = {"model": public_path(model) or str(model)}
    options |= {name: value for name, value in arguments.items() if name not in skipped}
    for name in ("output_dir", "dataset_name"):
        options[name] = None if options[name] is None else public_path(options[name])
    return build_command(options, evaluate_checkpoint.__kwdefaults__)
