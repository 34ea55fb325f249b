# SPDX-License-Identifier: Apache-2.0
"""Rows of images, questions and answers, and the collator that makes batches of them for the vision-text models."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import ProcessorMixin

from ..image_processing_encdec_vlm import load_images
from .data_files import check_text
from .distillation_data import undecoded
from .distillation_images import image_list
from .seq2seq_data import bounded, hold_out_missing, load_named_splits, target_ids
from .tasks.visual import TASKS, build_visual_tasks


class VisionTextCollator:
    """Model inputs and `labels` from rows of images, a question and an answer; pass it as `data_collator`.

    Rows keep their images until they are batched, so the Trainer must hand on columns that the model does not know:
    set `remove_unused_columns=False`.

    Args:
        processor ([`EncDecVLMProcessor`]): Of the model; its tokenizer needs an end-of-text token.
        max_target_length (`int`, *optional*, defaults to 64): Longest `labels`, in tokens with the end-of-text token,
            which each of them ends in; what is longer is cut.
        image_column (`str`, *optional*, defaults to `"image"`): A row's PIL image, list of images, or `None`. Rows
            may lack it.
        question_column (`str`, *optional*, defaults to `"question"`): Text that the encoder reads. `<image>` in it
            marks the place of an image; without any, images come first.
        answer_column (`str`, *optional*, defaults to `"answer"`): Text that the decoder learns to write. Rows may
            lack it, and then the batch has no `labels`.
        decoder_start_token_id (`int`, *optional*): Of the model. Labels leave it out where the tokenizer begins its
            texts with it: the decoder is given this token, and has not to write it.

    Raises:
        ValueError: The processor has no tokenizer with an end-of-text token, or `max_target_length` is less than 2.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_target_length: int = 64,
        image_column: str = "image",
        question_column: str = "question",
        answer_column: str = "answer",
        decoder_start_token_id: int | None = None,
    ):
        tokenizer = getattr(processor, "tokenizer", None)
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(
                f"`processor` is a {type(processor).__name__} without an end-of-text token, but answers must end for "
                "the model to learn to stop. Give a processor whose tokenizer has an `eos_token`."
            )
        if max_target_length < 2:
            raise ValueError(
                f"`max_target_length` is {max_target_length}, but an answer needs a token beside the end-of-text "
                "token. Set it to at least 2."
            )
        self.processor = processor
        self.max_target_length = max_target_length
        self.image_column, self.question_column, self.answer_column = image_column, question_column, answer_column
        self.decoder_start_token_id = decoder_start_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask`, `labels` (-100 = not supervised), and what the images need.

        Raises:
            ValueError: Rows lack a question, or some of them an answer, or an image cannot be used.
            TypeError: A question or an answer is no text.
        """
        self._check(rows)
        images = [row_images(row, self.image_column, self.question_column) for row in rows]
        texts = [row[self.question_column] for row in rows]
        # A list per row tells the processor whose images they are; rows without any have an empty one.
        batch = dict(self.processor(images if any(images) else None, texts, padding=True, return_tensors="pt"))
        if self.answer_column in rows[0]:
            batch["labels"] = self._labels([row[self.answer_column] for row in rows])
        return batch

    def _check(self, rows):
        num_answered = sum(self.answer_column in row for row in rows)
        if num_answered not in (0, len(rows)):
            raise ValueError(
                f"{num_answered} of {len(rows)} rows have `{self.answer_column}`, but a batch has labels for all of "
                "its rows or for none. Give every row an answer, or leave all of them out."
            )
        columns = (self.question_column, self.answer_column) if num_answered else (self.question_column,)
        for number, row in enumerate(rows):
            if self.question_column not in row:
                raise ValueError(
                    f"Row {number} of the batch has {', '.join(row) or 'nothing'}, but `{self.question_column}` is "
                    "needed. Name yours by `question_column`, and set `remove_unused_columns=False`: else the Trainer "
                    "drops columns that the model does not know."
                )
            for column in columns:
                check_text(row[column], column, f"Row {number} of the batch")

    def _labels(self, answers):
        """Ids of each answer, of which the last is the end-of-text token, padded on the right with -100."""
        tokenizer, length = self.processor.tokenizer, self.max_target_length
        encoded = tokenizer(answers, truncation=True, max_length=length)["input_ids"]
        labels = [target_ids(ids, tokenizer.eos_token_id, length, self.decoder_start_token_id) for ids in encoded]
        length = max(map(len, labels))
        return torch.tensor([ids + [-100] * (length - len(ids)) for ids in labels])


def row_images(row: Mapping[str, Any], image_column: str = "image", question_column: str = "question") -> list[Any]:
    """RGB images of a row, decoded.

    Args:
        row (`Mapping[str, Any]`): With a question, and one image, several in a list, or none.
        image_column (`str`, *optional*, defaults to `"image"`): As in [`VisionTextCollator`].
        question_column (`str`, *optional*, defaults to `"question"`): Likewise.

    Raises:
        ValueError: An image is damaged, empty or too large.
        TypeError: It is none.
    """
    try:
        return load_images(image_list(row.get(image_column)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"The row with the `{question_column}` {row[question_column]!r:.80}: {error}") from error


def load_vqa_splits(args, seed: int = 0) -> DatasetDict:
    """The splits `train`, `validation` and `test` with columns `image`, `question`, `answer` and `task`.

    Images of a named dataset are undecoded: see [`row_images`].

    Args:
        args ([`~encdec_slm.trainers.vqa.VqaArguments`]): Names the data. Held-out splits that a dataset lacks are
            taken off its training rows.
        seed (`int`, *optional*, defaults to 0): Decides what is drawn, or which rows are held out.

    Raises:
        ValueError: The data cannot be found, lacks a column or has too few rows.
        TypeError: A question or an answer is no text.
    """
    if args.dataset_name is None:
        num_held_out = max(1, args.max_eval_samples // len(args.tasks or TASKS))
        num_train = args.num_train_rows[0] if len(args.num_train_rows) == 1 else args.num_train_rows
        return build_visual_tasks(num_train, num_held_out, seed, args.tasks)
    found = load_named_splits(args)
    splits = {
        split: _with_columns(rows, args, split)
        for split, rows in found.items()
        if split == "train" or _has_answers(rows, args.answer_column)
    }
    splits = hold_out_missing(splits, seed)
    for split in ("validation", "test"):
        splits[split] = bounded(splits[split], args.max_eval_samples, seed)
    return DatasetDict(splits)


def _has_answers(rows, column):
    """Whether a held-out split can be measured: competitions withhold the answers of theirs."""
    return column not in rows.column_names or rows[0][column] not in (None, "", [])


def _with_columns(rows, args, split):
    columns = {"image": args.image_column, "question": args.question_column, "answer": args.answer_column}
    for name, column in columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"The {split} split of {args.dataset_name} has the columns {', '.join(rows.column_names)}, but not "
                f"`{column}`. Set `{name}_column` to one of them."
            )
    questions = list(rows[args.question_column])
    answers = [most_frequent_answer(answer) for answer in rows[args.answer_column]]
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        check_text(question, args.question_column, f"Row {index} (from 0) of the {split} split")
        check_text(answer, args.answer_column, f"Row {index} (from 0) of the {split} split")
    rows = undecoded(rows.select_columns([args.image_column]))
    if args.image_column != "image":
        rows = rows.rename_column(args.image_column, "image")
    task = Path(args.dataset_name).name
    for name, values in (("question", questions), ("answer", answers), ("task", [task] * len(answers))):
        rows = rows.add_column(name, values)
    return rows


def most_frequent_answer(answer: Any) -> Any:
    """The one answer that counts: of a list the most frequent, or the first of several.

    Args:
        answer (`str` or `list`): A list holds texts, or as in VQAv2 a `dict` with the text as `answer`.
    """
    if not isinstance(answer, list):
        return answer
    texts = [each["answer"] if isinstance(each, dict) and "answer" in each else each for each in answer]
    if not texts or not all(isinstance(text, str) for text in texts):
        return answer  # no text: what reads it says so
    return Counter(texts).most_common(1)[0][0]


def with_other_images(rows: Dataset) -> Dataset:
    """`rows` with their questions asked about images of other rows: of the same task, half of its rows away."""
    others = [0] * len(rows)
    places = {}
    for index, task in enumerate(rows["task"]):
        places.setdefault(task, []).append(index)
    for of_task in places.values():
        half = len(of_task) // 2
        for index, other in zip(of_task, of_task[half:] + of_task[:half], strict=True):
            others[index] = other
    return concatenate_datasets([rows.select_columns("image").select(others), rows.remove_columns("image")], axis=1)
