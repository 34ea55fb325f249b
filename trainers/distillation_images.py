# SPDX-License-Identifier: Apache-2.0
"""Rows with images for distillation: each model reads them through its own processor, when a batch is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .distillation_data import DistillationRowEncoder, check_not_empty
from .image_rows import ImageRowEncoder, count_images, find_images, remove_images
from .row_encoding import COLUMNS, RowEncoder


@dataclass
class ImageDistillationRowEncoder(DistillationRowEncoder):
    """Encode rows with `images` (a list) or `image` for both models.

    A teacher that reads text alone needs a `teacher_prompt`, such as a caption, for each row with images. A teacher
    with a processor reads text as a message of the user, and a `teacher_prompt` of text as it is.
    """

    kept_columns = (*ImageRowEncoder.kept_columns, "teacher_prompt")

    def is_encoded(self, row: Mapping[str, Any]) -> bool:
        """Whether a row comes from [`~ImageDistillationRowEncoder.encode_batch`]."""
        return {"row", "num_images"} <= row.keys()

    def encode_batch(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Check rows and encode their targets; sources are encoded by [`~ImageDistillationRowEncoder.read_images`].

        Returns:
            `dict`: The columns `row`, `num_images` and, if the rows have targets, `target_ids` and
            `num_target_tokens`.

        Raises:
            TypeError: A source or target is neither text nor a list of messages.
            ValueError: Images and their places differ in number, a target contains an image token, or a teacher that
                reads text alone has no text about the images.
        """
        num_images = count_images(batch, len(indices))
        column = next(name for name, _ in COLUMNS if name in batch)
        teacher_prompts = batch["teacher_prompt"] if "teacher_prompt" in batch else [None] * len(indices)
        for index, source, prompt, count in zip(indices, batch[column], teacher_prompts, num_images, strict=True):
            self.student.as_messages(source, count, f"`{column}` of row {index}")
            prompt, where = self._teacher_prompt(source, prompt, column, index, count)
            if isinstance(self.teacher, ImageRowEncoder):
                self.teacher.render_prompt(prompt, count, prompt is not source, where, self.chat_template_kwargs)
        return {"row": list(indices), "num_images": num_images, **self.encode_targets(batch, indices)}

    def read_images(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Encode the sources and images of rows from [`~ImageDistillationRowEncoder.encode_batch`].

        Returns:
            `list[dict]`: Rows with `source_ids`, `teacher_source_ids`, `num_source_tokens` and the inputs that the
            images are to each model: `student_images` and, if the teacher reads images, `teacher_images`.

        Raises:
            ValueError: An image cannot be read, a source is empty, or images alone are longer than
                `max_source_length`.
        """
        return [self._read_row(row) for row in rows]

    def _read_row(self, row):
        images = find_images(row)
        column = next(name for name, _ in COLUMNS if row.get(name) is not None)
        source = self.student.encode_source(row[column], images, where=f"`{column}` of row {row['row']}")
        prompt, where = self._teacher_prompt(source.source, row.get("teacher_prompt"), column, row["row"], len(images))
        if isinstance(self.teacher, ImageRowEncoder):
            is_rendered, options = prompt is not source.source, {"chat_template_kwargs": self.chat_template_kwargs}
            prompt = self.teacher.encode_prompt(prompt, images, is_rendered=is_rendered, where=where, **options)
            teacher_inputs = {"teacher_images": prompt.image_inputs}
        else:
            prompt = self.teacher.encode_prompt(prompt, where=where, chat_template_kwargs=self.chat_template_kwargs)
            teacher_inputs = {}
        check_not_empty(source.num_tokens, prompt.num_tokens, where)
        return {
            **{name: row[name] for name in ("row", "target_ids", "num_target_tokens") if name in row},
            "source_ids": source.input_ids,
            "num_source_tokens": source.num_tokens,
            "student_images": source.image_inputs,
            "teacher_source_ids": prompt.input_ids,
            **teacher_inputs,
        }

    def _teacher_prompt(self, source, prompt, column, index, num_images):
        """Return the prompt of the teacher, and its name in error messages."""
        where = f"`{column if prompt is None else 'teacher_prompt'}` of row {index}"
        if isinstance(self.teacher, ImageRowEncoder):
            return source if prompt is None else prompt, where
        if prompt is None and num_images:
            raise ValueError(
                f"Row {index} has {num_images} image(s), but the teacher reads text alone and the row has no "
                "`teacher_prompt`. Add a `teacher_prompt` that describes the images, such as a caption, or use a "
                "teacher that reads images and its processor as `teacher_processing_class`."
            )
        prompt = source if prompt is None else prompt
        messages = remove_images(self.student.as_messages(prompt, 0, where))
        return messages[0]["content"] if isinstance(prompt, str) else messages, where


def build_image_encoder(
    processor: ProcessorMixin,
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    chat_template_kwargs: Mapping[str, Any] | None,
    **lengths: int | None,
) -> ImageDistillationRowEncoder:
    """Build the encoder for the rows of a run whose student has a processor."""
    tokens = [each.image_token for each in (processor, teacher_processing_class) if isinstance(each, ProcessorMixin)]
    student = ImageRowEncoder(processor.tokenizer, processor=processor, image_tokens=tokens, **lengths)
    if isinstance(teacher_processing_class, ProcessorMixin):
        tokenizer = teacher_processing_class.tokenizer
        teacher = ImageRowEncoder(tokenizer, processor=teacher_processing_class, image_tokens=tokens)
    else:
        teacher = RowEncoder(teacher_processing_class)
    return ImageDistillationRowEncoder(student, teacher, chat_template_kwargs or {})


__all__ = ["ImageDistillationRowEncoder"]
