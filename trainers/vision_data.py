# SPDX-License-Identifier: Apache-2.0
"""Rows of images, questions and answers: built-in tasks, or a dataset of the Hub."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, concatenate_datasets

from .data_files import check_columns, check_text
from .image_rows import keep_images_encoded
from .seq2seq_data import hold_out_missing, limit_rows, load_named_splits
from .tasks.visual import TASKS, build_visual_tasks


if TYPE_CHECKING:
    from .vision_job import VisionArguments


def load_vision_splits(args: "VisionArguments", seed: int = 0) -> DatasetDict:
    """Load the splits `train`, `validation` and `test` with the columns `image`, `question`, `answer` and `task`.

    Args:
        args ([`~encdec_slm.trainers.vision_job.VisionArguments`]): Names the data. Held-out splits that are missing
            or have no answers are taken off the training rows.
        seed (`int`, *optional*, defaults to 0): Draws built-in rows, or the held-out rows of a dataset.

    Returns:
        [`~datasets.DatasetDict`]: Images of a dataset are not decoded.

    Raises:
        ValueError: The data cannot be found, lacks a column or has too few rows.
        TypeError: A question or an answer is not text.
    """
    if args.dataset_name is None:
        num_held_out = max(1, args.max_eval_samples // len(args.tasks or TASKS))
        num_train = args.num_train_rows[0] if len(args.num_train_rows) == 1 else args.num_train_rows
        return build_visual_tasks(num_train, num_held_out, seed, args.tasks)
    splits = {
        split: _select_columns(rows, args, split)
        for split, rows in load_named_splits(args).items()
        if split == "train" or _has_answers(rows, args.answer_column)
    }
    splits = hold_out_missing(splits, seed)
    for split in ("validation", "test"):
        splits[split] = limit_rows(splits[split], args.max_eval_samples, seed)
    return DatasetDict(splits)


def _has_answers(rows, column):
    """Return whether a held-out split has answers; competitions withhold them."""
    return column not in rows.column_names or rows[0][column] not in (None, "", [])


def _select_columns(rows, args, split):
    columns = {name: getattr(args, f"{name}_column") for name in ("image", "question", "answer")}
    check_columns(rows.column_names, columns, f"The {split} split of {args.dataset_name}")
    values = {
        "question": list(rows[columns["question"]]),
        "answer": [most_frequent_answer(answer) for answer in rows[columns["answer"]]],
    }
    for name, texts in values.items():
        for number, text in enumerate(texts, start=1):
            check_text(text, columns[name], f"Row {number} of the {split} split")
    rows = keep_images_encoded(rows.select_columns([columns["image"]]))
    if columns["image"] != "image":
        rows = rows.rename_column(columns["image"], "image")
    values["task"] = [Path(args.dataset_name).name] * len(rows)
    for name, column in values.items():
        rows = rows.add_column(name, column)
    return rows


def most_frequent_answer(answer: Any) -> Any:
    """Return the most frequent of several answers, or the first of these; one answer is returned unchanged.

    Args:
        answer (`str` or `list`): A list has texts or, as in VQAv2, `dict`s with the text as `answer`.
    """
    if not isinstance(answer, list):
        return answer
    texts = [each["answer"] if isinstance(each, dict) and "answer" in each else each for each in answer]
    if not texts or not all(isinstance(text, str) for text in texts):
        return answer  # refused where the row is checked
    return Counter(texts).most_common(1)[0][0]


def shuffle_images(rows: Dataset) -> Dataset:
    """Return rows with the images of other rows of the same task, half of the task's rows away."""
    indices = {}
    for index, task in enumerate(rows["task"]):
        indices.setdefault(task, []).append(index)
    others = [0] * len(rows)
    for task_indices in indices.values():
        half = len(task_indices) // 2
        for index, other in zip(task_indices, task_indices[half:] + task_indices[:half], strict=True):
            others[index] = other
    return concatenate_datasets([rows.select_columns("image").select(others), rows.remove_columns("image")], axis=1)
