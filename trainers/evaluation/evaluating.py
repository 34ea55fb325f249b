# SPDX-License-Identifier: Apache-2.0
"""Scores a checkpoint on a task: from rows to predictions to metrics with confidence intervals."""

import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ...run_results import DataSource, ModelResults, RunResults, package_versions
from .generation import Writer, check_is_count, check_kind, checkpoint_digest, declared_length, load_checkpoint
from .predictions import Predictions
from .results import mean_with_interval, public_path, reproducing_command
from .task_rows import data_digest, load_examples
from .tasks import find_task


CONFIDENCE = 0.95
RESULT_NAME = "evaluation.json"


def evaluate_checkpoint(
    model_or_path: str | Path | PreTrainedModel,
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
    num_beams: int = 1,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> RunResults:
    """The metrics of a checkpoint on a task, each with a confidence interval.

    With `output_dir`, every batch is written to `predictions.jsonl` there when it is done, and the same call goes on
    with an interrupted run; the result is written to `evaluation.json`. Answers are the most probable ones: greedy, or
    of a beam search.

    Args:
        model_or_path (`str`, `Path` or [`~transformers.PreTrainedModel`]): A folder, a model on the Hub, or a loaded
            model. An encoder-decoder of any family for text, of this family for images.
        task (`str`): One of [`list_tasks`]. `"text"` is for rows of your own.
        output_dir (`str` or `Path`, *optional*): One folder for each model and task. `None` writes nothing.
        dataset_name (`str` or `Path`, *optional*): A JSON, JSONL or parquet file, a folder of data files, or a data
            set on the Hub, with the columns of the task. `None` takes the task's own.
        dataset_config (`str`, *optional*): Its configuration; of CodeXGLUE the programming language.
        dataset_revision (`str`, *optional*): Its branch, tag or commit on the Hub.
        dataset_split (`str`, *optional*): Its split. `None` takes the one that the task is measured on.
        source_column (`str`, *optional*, defaults to `"source"`): For the tasks `text` and `docstrings`.
        target_column (`str`, *optional*, defaults to `"target"`): Likewise.
        max_samples (`int`, *optional*): At most so many rows, drawn by `seed`. `None` takes all; of tasks that are
            drawn on the spot, 200.
        processing_class (*optional*): Tokenizer or processor of a loaded model.
        model_revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.
        max_source_length (`int`, *optional*): Longest source, in tokens; the rest is cut and the rows are counted.
            `None` takes what tokenizer and config allow.
        max_new_tokens (`int`, *optional*): Longest answer. `None` takes the task's.
        num_beams (`int`, *optional*, defaults to 1): Of the beam search; 1 is greedy.
        batch_size (`int`, *optional*, defaults to 8): Rows at once.
        device (`str`, *optional*): As torch names it. `None` takes an accelerator where there is one.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`. `None` leaves weights as they are.
        num_bootstrap (`int`, *optional*, defaults to 1000): How often rows are drawn anew for the intervals.
        seed (`int`, *optional*, defaults to 0): Decides which rows are drawn, and the intervals.
        show_progress (`bool`, *optional*, defaults to `True`): Whether there is a progress bar.

    Returns:
        [`~encdec_slm.run_results.RunResults`]: The metrics of the model with their intervals.

    Raises:
        ValueError: There is no such task, model or data; they do not fit together; a number is out of range; or
            `output_dir` holds predictions of another run.
        TypeError: A row holds something else than the text that is needed.
    """
    given = dict(locals())
    chosen = find_task(task)
    _check_numbers(given)
    examples = load_examples(
        task,
        chosen,
        columns=_columns(given, chosen),
        **{
            name: given[name]
            for name in ("dataset_config", "dataset_revision", "dataset_split", "max_samples", "seed")
        },
        dataset_name=None if dataset_name is None else str(dataset_name),
    )
    model, processing_class = load_checkpoint(model_or_path, processing_class, model_revision, dtype, device)
    check_kind(model, task, chosen)
    writer = Writer(model, processing_class, _new_tokens(max_new_tokens, chosen, model), num_beams, max_source_length)
    settings = _settings(writer, num_beams)
    run = {"task": task, "model": checkpoint_digest(writer), "data": data_digest(examples), **settings}
    predictions = Predictions(None if output_dir is None else Path(output_dir), run, len(examples))
    _write_all(writer, examples, predictions, batch_size, show_progress)
    pairs = zip(predictions.texts, examples, strict=True)
    scores = [chosen.score(text, example.references) for text, example in pairs]
    results = _build_results(given, chosen, model, predictions, scores, settings)
    if output_dir is not None:
        results.save(Path(output_dir) / RESULT_NAME)
    return results


def _build_results(given, task, model, predictions, scores, settings):
    num_bootstrap, seed = given["num_bootstrap"], given["seed"]
    name = _model_name(given["model_or_path"])
    metrics = mean_with_interval(scores, num_bootstrap, CONFIDENCE, seed)
    return RunResults(
        kind="evaluation",
        task=given["task"],
        models=[ModelResults(name, metrics, model.num_parameters())],
        saved_model=name,
        dataset=_data_source(given, task),
        num_rows={"test": len(scores)},
        num_cut_rows={"test": predictions.num_cut},
        confidence=CONFIDENCE,
        settings={**settings, "batch_size": given["batch_size"], "num_bootstrap": num_bootstrap, "seed": seed},
        command=_command(given),
        device=_device_name(model),
        seconds=round(predictions.seconds, 1),
        versions=package_versions("datasets", "rouge-score"),
    )


def _check_numbers(given):
    for name in ("batch_size", "num_bootstrap", "num_beams", "max_samples", "max_new_tokens", "max_source_length"):
        if given[name] is not None:
            check_is_count(name, given[name])


def _columns(given, task):
    names = (given["source_column"], given["target_column"])
    if names == ("source", "target"):
        return None
    if not task.columns_can_be_named:
        columns = ", ".join(alternatives[0] for alternatives in task.columns)
        raise ValueError(
            f"`source_column` and `target_column` are {names[0]!r} and {names[1]!r}, but the task {given['task']!r} "
            f"reads {columns}. Leave them out, or take the task 'text'."
        )
    return names


def _new_tokens(asked, task, model):
    """What was asked for, or the task's number, which a short decoder lowers."""
    if asked is not None:
        return asked
    longest = declared_length(model.config, "decoder")
    return task.max_new_tokens if longest is None else max(1, min(task.max_new_tokens, longest - 1))


def _settings(writer, num_beams):
    return {
        "max_new_tokens": writer.generation_config.max_new_tokens,
        "num_beams": num_beams,
        "max_source_length": writer.limit,
        "dtype": str(writer.model.dtype).removeprefix("torch."),
    }


def _write_all(writer, examples, predictions, batch_size, show_progress):
    first, seconds = len(predictions.texts), predictions.seconds
    started = time.perf_counter()
    bar = tqdm(total=len(examples), initial=first, desc="Writing", unit="row", disable=not show_progress)
    with bar:
        try:
            for start in range(first, len(examples), batch_size):
                batch = examples[start : start + batch_size]
                predictions.append(batch, *writer.write(batch))
                bar.update(len(batch))
        finally:  # an interrupted run counts its time too
            predictions.seconds = seconds + time.perf_counter() - started
            predictions.save_state()


def _data_source(given, task):
    """Return where the rows come from, without local paths."""
    own = given["dataset_name"] is None
    name = (task.dataset_name or given["task"]) if own else public_path(given["dataset_name"])
    is_file = not own and Path(given["dataset_name"]).is_file()
    return DataSource(
        name,
        config=given["dataset_config"] or (task.dataset_config if own else None),
        split=given["dataset_split"] or (None if is_file else task.dataset_split),
        revision=given["dataset_revision"] or (task.dataset_revision if own else None),
    )


def _model_name(model_or_path):
    if isinstance(model_or_path, PreTrainedModel):
        path = model_or_path.name_or_path or type(model_or_path).__name__
    else:
        path = str(model_or_path)
    return Path(path).resolve().name if Path(path).is_dir() else path


def _command(given):
    model = given["model_or_path"]
    path = (
        getattr(model, "name_or_path", None) or type(model).__name__ if isinstance(model, PreTrainedModel) else model
    )
    arguments = {"model": public_path(path) or str(path)}
    skipped = ("model_or_path", "processing_class", "show_progress")
    arguments |= {name: value for name, value in given.items() if name not in skipped}
    for name in ("output_dir", "dataset_name"):
        if arguments[name] is not None:
            arguments[name] = public_path(arguments[name])
    return reproducing_command(arguments, evaluate_checkpoint.__kwdefaults__)


def _device_name(model):
    device = model.device
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
