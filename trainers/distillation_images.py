# SPDX-License-Identifier: Apache-2.0
"""Rows with images for distillation: each model reads them through its own processor, when a batch is made.

A data set keeps its images as they are, undecoded; what is known of a row without them is looked at beforehand.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..image_processing_encdec_vlm import load_images
from .distillation_data import COLUMNS, RowEncoder


# What a row with images keeps until a batch is made of it, beside what `ImageRowEncoder` makes of it.
ROW_COLUMNS = ("prompt", "source", "teacher_prompt", "images", "image", "num_images")
# Lists in a batch, with the image inputs of each row: TRL shuffles and splits them like tensors.
BATCH_NAMES = ("student_images", "teacher_images")


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """A processor's tokenizer, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def image_tokens_of(*processing_classes: PreTrainedTokenizerBase | ProcessorMixin) -> tuple[str, ...]:
    """The tokens that stand for images to those that are processors."""
    return tuple(one.image_token for one in processing_classes if isinstance(one, ProcessorMixin))


def image_token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Those of the tokens that a tokenizer knows, as ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted({vocabulary[token] for token in tokens if token in vocabulary})


def row_encoder(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    max_source_length: int | None,
    max_target_length: int,
    chat_template_kwargs: dict[str, Any],
) -> RowEncoder:
    """What turns rows into token ids: an [`ImageRowEncoder`] where the student has a processor.

    Args: as in [`RowEncoder`], where a processor may stand for each tokenizer.
    """
    tokenizers = (tokenizer_of(processing_class), tokenizer_of(teacher_processing_class))
    bounds = (max_source_length, max_target_length, chat_template_kwargs)
    if not isinstance(processing_class, ProcessorMixin):
        return RowEncoder(*tokenizers, *bounds)
    teacher_processor = teacher_processing_class if isinstance(teacher_processing_class, ProcessorMixin) else None
    return ImageRowEncoder(*tokenizers, *bounds, processor=processing_class, teacher_processor=teacher_processor)


@dataclass
class ImageRowEncoder(RowEncoder):
    """A [`RowEncoder`] for rows with `images` (a list) or `image`, and rows without any.

    In text an image token of either model is an image's place; in messages it is that, or a part of type `image`. A
    prompt without places has its images in front. `teacher_prompt` is what the teacher reads instead of the prompt.

    Args:
        processor ([`~transformers.ProcessorMixin`]): Of the student. Its chat template, if it has one, renders
            messages.
        teacher_processor ([`~transformers.ProcessorMixin`], *optional*): Of a teacher that reads images. Its chat
            template, if it has one, renders messages, and a prompt of text as a message of the user; a
            `teacher_prompt` of text is read as it is. `None` means that the teacher reads text alone: rows with
            images then need a `teacher_prompt`, a caption say.
    """

    processor: ProcessorMixin | None = None
    teacher_processor: ProcessorMixin | None = None

    kept_columns = ROW_COLUMNS

    def __post_init__(self):
        self.image_tokens = image_tokens_of(self.processor, self.teacher_processor)
        self.image_ids = image_token_ids(self.tokenizer, self.image_tokens)

    def is_encoded(self, row: dict[str, Any]) -> bool:
        """Whether a row comes from this class."""
        return {"row", "num_images"} <= row.keys()

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """The columns `row`, `num_images` and, with targets, `target_ids` and `num_target_tokens`.

        Raises:
            TypeError: As in [`RowEncoder`].
            ValueError: As in [`RowEncoder`]; or images and their places differ in number, a target has an image's
                token, or a teacher that reads text alone has nothing to read of an image.
        """
        source_column, target_column = next(names for names in COLUMNS if names[0] in batch)
        encoded = {"row": list(indices), "num_images": _image_counts(batch, len(indices))}
        teacher_prompts = batch["teacher_prompt"] if "teacher_prompt" in batch else [None] * len(indices)
        rows = zip(indices, batch[source_column], teacher_prompts, encoded["num_images"], strict=True)
        for index, prompt, teacher_prompt, num_images in rows:
            source = self._source(prompt, num_images, f"`{source_column}` of {index=}")
            self._teacher_text(*source, teacher_prompt, num_images, index)
        if target_column in batch:
            targets = [
                self._target(target, f"`{target_column}` of {index=}")
                for index, target in zip(indices, batch[target_column], strict=True)
            ]
            encoded["target_ids"] = [ids[: self.max_target_length] for ids in targets]
            encoded["num_target_tokens"] = [len(ids) for ids in targets]
        return encoded

    def finished(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of `__call__` with `source_ids`, `teacher_source_ids`, `num_source_tokens` and the inputs that the
        images are to each model: `student_images` and, of a teacher that reads them, `teacher_images`.

        Raises:
            ValueError: A source has no tokens, or images alone are longer than `max_source_length`.
        """
        return [self._finished(row) for row in rows]

    def _finished(self, row):
        index = row["row"]
        try:
            images = load_images(images_of(row))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Row {index}: {error}") from error
        source_column = next(name for name, _ in COLUMNS if row.get(name) is not None)
        where = f"`{source_column}` of {index=}"
        source, is_chat = self._source(row[source_column], len(images), where)
        source_ids, inputs = _read(self.processor, *self._student_text(source, is_chat), images)
        finished = {"row": index, "num_source_tokens": len(source_ids), "student_images": inputs}
        if self.max_source_length is not None and len(source_ids) > self.max_source_length:
            source, source_ids = self._cut(source, is_chat, source_ids, images, where)
        finished["source_ids"] = source_ids
        teacher_text = self._teacher_text(source, is_chat, row.get("teacher_prompt"), len(images), index)
        finished |= self._teacher_inputs(teacher_text, images, where)
        for name in ("source_ids", "teacher_source_ids"):
            if not finished[name]:
                raise ValueError(f"The {where} has no tokens, but both models need one to read. Leave the row out.")
        return finished | {name: row[name] for name in ("target_ids", "num_target_tokens") if name in row}

    def _source(self, prompt, num_images, where):
        """Messages with a place for each image, and whether they were messages before."""
        messages = as_messages(prompt, self.image_tokens, where)
        return with_images(messages, num_images, where), not isinstance(prompt, str)

    def _student_text(self, messages, is_chat):
        """What the student reads, and whether a chat template made it."""
        if is_chat and self.processor.chat_template is not None:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), True
        return plain_text(messages, self.processor.image_token), False

    def _teacher_text(self, messages, is_chat, teacher_prompt, num_images, index):
        """What the teacher reads: text and whether a template made it, or for a teacher of text a text or messages."""
        reads_images, is_own = self.teacher_processor is not None, teacher_prompt is not None
        where = f"`{'teacher_prompt' if is_own else 'prompt'}` of {index=}"
        if is_own:
            messages, is_chat = self._source(teacher_prompt, num_images if reads_images else 0, where)
        elif num_images and not reads_images:
            raise ValueError(
                f"Row {index} has {num_images} image(s), but the teacher reads text alone and the row has no "
                "`teacher_prompt`. Give it one with what the teacher is to know of them, a caption or OCR, or use a "
                "teacher that reads images and its processor as `teacher_processing_class`."
            )
        if not reads_images:
            return _with_text_contents(messages) if is_chat else plain_text(messages, "")
        if self.teacher_processor.chat_template is not None and (is_chat or not is_own):
            options = {**self.chat_template_kwargs, "add_generation_prompt": True, "tokenize": False}
            return self.teacher_processor.apply_chat_template(messages, **options), True
        if len(messages) > 1:
            raise ValueError(
                f"The {where} is a dialogue, but the teacher's processor has no chat template to render it with. Set "
                "its `chat_template`, or give plain text."
            )
        return plain_text(messages, self.teacher_processor.image_token), False

    def _teacher_inputs(self, text, images, where):
        if self.teacher_processor is None:
            return {"teacher_source_ids": self._teacher_source(text, where)}
        ids, inputs = _read(self.teacher_processor, *text, images)
        # Some tokenizers end every text; the teacher is to read on into the target.
        ends = len(ids) > 1 and ids[-1] == self.teacher_tokenizer.eos_token_id
        return {"teacher_source_ids": ids[:-1] if ends else ids, "teacher_images": inputs}

    def _cut(self, source, is_chat, source_ids, images, where):
        """Messages with less text at their end, and the ids of the student that fit `max_source_length`."""
        source = copy.deepcopy(source)
        last = source[-1]["content"][-1] if source[-1]["content"] else {"type": "none"}
        text_ids = (
            self.tokenizer(last["text"], add_special_tokens=False)["input_ids"] if last["type"] == "text" else []
        )
        num_kept = len(text_ids)
        # Text that was cut may have another token at its end than before.
        while len(source_ids) > self.max_source_length:
            excess = len(source_ids) - self.max_source_length
            if num_kept < excess:
                raise ValueError(
                    f"The {where} has {len(source_ids)} tokens, {len(text_ids)} of them text at its end, but "
                    f"`max_source_length` is {self.max_source_length}, and images are not cut. Raise it."
                )
            num_kept -= excess
            last["text"] = self.tokenizer.decode(text_ids[:num_kept])
            source_ids, _ = _read(self.processor, *self._student_text(source, is_chat), images)
        return source, source_ids

    def _target(self, target, where):
        if not isinstance(target, str):
            target = _with_text_contents(with_images(as_messages(target, (), where), 0, where))
        ids = super()._target(target, where)
        if found := set(self.image_ids) & set(ids):
            shown = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(found))))
            raise ValueError(
                f"The {where} has the token {shown}, which stands for an image, but targets are text. Take it out."
            )
        return ids


def image_lists(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, torch.Tensor]]]:
    """`student_images` and `teacher_images` of finished rows, as a batch has them; those that the rows have."""
    return {name: [row[name] for row in rows] for name in BATCH_NAMES if name in rows[0]}


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images of a row with the column `images` or `image`; none where it is empty or missing."""
    return image_list(row.get("images") if "images" in row else row.get("image"))


def image_list(value: Any) -> list[Any]:
    """The images of a row's cell, as [`~encdec_slm.image_processing_encdec_vlm.load_images`] takes them.

    Args:
        value: One image, several in a list, or `None`; an undecoded one of a data set is a `dict` of `bytes` and
            `path`.
    """
    cells = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return [(cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell for cell in cells]


def _image_counts(batch, num_rows):
    """How many images each row has; those of a data set are counted without decoding them."""
    name = "images" if "images" in batch else "image" if "image" in batch else None
    if name is None:
        return [0] * num_rows
    if hasattr(batch, "pa_table"):
        column = batch.pa_table[name].combine_chunks()
        if hasattr(column, "value_lengths"):
            return [count or 0 for count in column.value_lengths().to_pylist()]
        return column.is_valid().cast("int64").to_pylist()
    return [len(images_of({name: value})) for value in batch[name]]


def as_messages(prompt: str | list[dict[str, Any]], image_tokens: Sequence[str], where: str) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts: `{"type": "text", "text": ...}` and `{"type": "image"}`.

    Args:
        prompt (`str` or `list[dict]`): A text is a message of the user.
        image_tokens (`Sequence[str]`): Each of them in a text is an image's place.
        where (`str`): How messages call the prompt.

    Raises:
        TypeError: It is neither text nor a list of messages, or a part is neither text nor an image's place.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    is_conversation = isinstance(prompt, Sequence) and prompt and all(isinstance(message, dict) for message in prompt)
    if not is_conversation or not all(isinstance(message.get("content"), (str, list)) for message in prompt):
        raise TypeError(
            f"The {where} is {prompt!r:.80}, but it must be text or a list of messages with `role` and, as `content`, "
            "text or a list of parts. Convert it or leave the row out."
        )
    return [{"role": one["role"], "content": _parts(one["content"], image_tokens, where)} for one in prompt]


def _parts(content, image_tokens, where):
    parts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type")
        if kind == "image" and all(value is None for name, value in part.items() if name != "type"):
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts += _split(part["text"], image_tokens)
        else:
            raise TypeError(
                f"The {where} has the part {part!r:.80}, but a part must be `{{'type': 'text', 'text': ...}}`, or "
                "`{'type': 'image'}` with the image itself in the column `images`. Convert it."
            )
    return parts


def _split(text, image_tokens):
    if not image_tokens:
        return [{"type": "text", "text": text}]
    pieces = re.split("|".join(re.escape(token) for token in image_tokens), text)
    parts = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]


def with_images(messages: list[dict[str, Any]], num_images: int, where: str) -> list[dict[str, Any]]:
    """Messages with a place for each image: where there is none, in front of the first message of the user.

    Raises:
        ValueError: There are places, but not as many as images.
    """
    num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_places == num_images:
        return messages
    if num_places:
        raise ValueError(
            f"The {where} has places for {num_places} image(s), but the row has {num_images}. Give each image one "
            "place, or leave the places out to have the images in front."
        )
    messages = copy.deepcopy(messages)
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    first["content"] = [{"type": "image"}] * num_images + first["content"]
    return messages


def plain_text(messages: list[dict[str, Any]], image_token: str) -> str:
    """Messages as text, an image as its token; roles are named where there are several messages."""
    contents = [
        "".join(image_token if part["type"] == "image" else part["text"] for part in message["content"])
        for message in messages
    ]
    if len(messages) == 1:
        return contents[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, contents, strict=True))


def _with_text_contents(messages):
    """Messages whose contents are texts, as chat templates of tokenizers take them."""
    return [{"role": message["role"], "content": plain_text([message], "")} for message in messages]


def _read(processor, text, is_rendered, images):
    """Token ids of a text, and what its images are to the model beside these."""
    tokenizer = processor.tokenizer
    options = {}
    if is_rendered and tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):
        options["add_special_tokens"] = False  # as transformers does behind a chat template
    inputs = dict(processor(images=images or None, text=[text], return_tensors="pt", **options))
    ids = inputs.pop("input_ids")[0].tolist()
    del inputs["attention_mask"]
    for name in [name for name in inputs if name.endswith("token_type_ids")]:
        if inputs.pop(name).any():
            raise ValueError(
                f"{type(processor).__name__} returns `{name}`, which say for each token what it is, but only models "
                "that read images without them are supported (LLaVA and the like). Use another teacher."
            )
    return ids, inputs


def joined(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs of the images of several rows, one row after the other; nothing where no row has images.

    Images of a row that are smaller, or cut into fewer tiles, are filled with zeros behind, which models leave out.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _concatenated([row[name] for row in rows if name in row]) for name in names}


def _concatenated(tensors):
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def filled(tensor):
        missing = [size - own for size, own in zip(shape, tensor.shape[1:], strict=True)]
        return F.pad(tensor, [width for size in reversed(missing) for width in (0, size)])

    return torch.cat([filled(tensor) for tensor in tensors])


__all__ = ["ImageRowEncoder", "row_encoder"]
