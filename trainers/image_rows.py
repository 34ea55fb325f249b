# SPDX-License-Identifier: Apache-2.0
"""Encode rows of text or chat messages with images; images are decoded and processed when a batch is made."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Image, IterableDataset, List
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..image_processing_encdec_vlm import load_images
from .row_encoding import COLUMNS, EncodedSource, Messages, RowEncoder, find_columns


IMAGE_COLUMNS = ("images", "image")


@dataclass
class ImageRowEncoder(RowEncoder):
    """Encode sources with images and targets as token ids, for vision-text models.

    Text is encoded as it is, messages by the processor's chat template. An image token in text is the place of an
    image, and so is a part of type `image` in a message; a source without places has its images in front. In a
    message with `image` parts, an image token in the text is plain text.

    Args:
        processor ([`~transformers.ProcessorMixin`]): Of the model.
        image_tokens (`Sequence[str]`, *optional*): Tokens that are places of images, beside the processor's own.
    """

    processor: ProcessorMixin | None = None
    image_tokens: Sequence[str] = field(default=())

    kept_columns = (*IMAGE_COLUMNS, *(source for source, _ in COLUMNS))

    def __post_init__(self):
        super().__post_init__()
        self.image_tokens = tuple(dict.fromkeys((self.processor.image_token, *self.image_tokens)))
        self._image_ids = find_token_ids(self.tokenizer, self.image_tokens)

    # Sources

    def encode_source(self, source: str | Messages, images: Any = None, *, where: str = "source") -> EncodedSource:
        """Encode one source and its images.

        Args:
            source (`str` or `list[dict]`): Text or messages. If it is too long, text at its end is removed.
            images (*optional*): One image, or several in a list, decoded or not.
            where (`str`, *optional*): Name of the source in error messages.

        Raises:
            TypeError: `source` is neither text nor a list of messages, or an image is of an unknown kind.
            ValueError: An image cannot be read, images and places differ in number, or images alone are too long.
        """
        images = read_images(images, where)
        messages = self.as_messages(source, len(images), where)
        ids, image_inputs = self._process(*self._render(source, messages), images)
        num_tokens = len(ids)
        if self._is_too_long(ids):
            source = self._shorten_messages(source, messages, images, where)
            messages = self.as_messages(source, len(images), where)
            ids, image_inputs = self._process(*self._render(source, messages), images)
        return EncodedSource(ids or [self._eos_token_id], num_tokens, source, image_inputs)

    def as_messages(self, source: str | Messages, num_images: int, where: str) -> Messages:
        """Return messages with a place for each image; text becomes a message of the user.

        Raises: as in [`~ImageRowEncoder.encode_source`].
        """
        return place_images(as_messages(source, self.image_tokens, where), num_images, where)

    def _render(self, source, messages):
        """Return the text that the processor reads, and whether a chat template made it."""
        if not isinstance(source, str) and self.processor.chat_template is not None:
            # The decoder starts the answer, so the prompt of the encoder does not.
            return self.processor.apply_chat_template(messages, tokenize=False), True
        return join_text(messages, self.processor.image_token), False

    def _shorten_messages(self, source, messages, images, where):
        content = messages[-1]["content"]
        has_text = content and content[-1]["type"] == "text"
        kept, text = (content[:-1], content[-1]["text"]) if has_text else (content, "")

        def build(text):
            shorter = [*messages[:-1], {**messages[-1], "content": [*kept, {"type": "text", "text": text}]}]
            return join_text(shorter, self.processor.image_token) if isinstance(source, str) else shorter

        def count_tokens(text):
            shorter = build(text)
            rendered = self._render(shorter, self.as_messages(shorter, len(images), where))
            return len(self._process(*rendered, images)[0])

        return build(self._shorten(text, count_tokens, where))

    def encode_prompt(
        self,
        prompt: str | Messages,
        images: Any = None,
        *,
        is_rendered: bool = False,
        where: str = "prompt",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> EncodedSource:
        """Encode a prompt that a decoder-only model continues, by the processor's chat template if it has one.

        Args:
            prompt (`str` or `list[dict]`): Text is a message of the user.
            images (*optional*): As in [`~ImageRowEncoder.encode_source`].
            is_rendered (`bool`, *optional*, defaults to `False`): Encode text as it is, without the template.
            where (`str`, *optional*): Name of the prompt in error messages.
            chat_template_kwargs (`dict`, *optional*): Variables of the chat template.

        Raises: as in [`~ImageRowEncoder.encode_source`]; also for a dialogue without a chat template.
        """
        images = read_images(images, where)
        rendered = self.render_prompt(prompt, len(images), is_rendered, where, chat_template_kwargs)
        ids, image_inputs = self._process(*rendered, images)
        return self._open_end(ids, prompt, image_inputs)

    def render_prompt(self, prompt, num_images, is_rendered, where, chat_template_kwargs=None) -> tuple[str, bool]:
        """Return the text of a prompt, and whether a chat template made it; see [`~ImageRowEncoder.encode_prompt`]."""
        messages = self.as_messages(prompt, num_images, where)
        is_text = isinstance(prompt, str)
        if self.processor.chat_template is not None and not (is_text and is_rendered):
            options = {**(chat_template_kwargs or {}), "add_generation_prompt": True, "tokenize": False}
            return self.processor.apply_chat_template(messages, **options), True
        if len(messages) > 1:
            raise ValueError(
                f"The {where} is a dialogue, but the processor has no chat template. Set its `chat_template`, or give "
                "plain text."
            )
        return join_text(messages, self.processor.image_token), False

    def _process(self, text, is_rendered, images):
        """Return the token ids of a text, and the inputs that its images are to the model."""
        options = {}
        bos_token = self.tokenizer.bos_token
        if is_rendered and bos_token is not None and text.startswith(bos_token):
            options["add_special_tokens"] = False  # the template has added them
        inputs = dict(self.processor(images=images or None, text=[text], return_tensors="pt", **options))
        ids = inputs.pop("input_ids")[0].tolist()
        del inputs["attention_mask"]
        for name in [name for name in inputs if name.endswith("token_type_ids")]:
            if inputs.pop(name).any():
                raise ValueError(
                    f"{type(self.processor).__name__} returns `{name}`, which is not supported. Use a model that "
                    "reads images without token types, such as LLaVA."
                )
        return ids, inputs

    # Targets

    def encode_target(self, target: str | Messages, *, as_continuation: bool = False, where: str = "target"):
        """As [`RowEncoder.encode_target`]; a target must not contain an image token."""
        if not isinstance(target, str):
            target = remove_images(place_images(as_messages(target, (), where), 0, where))
        ids, num_tokens = super().encode_target(target, as_continuation=as_continuation, where=where)
        if found := set(self._image_ids) & set(ids):
            tokens = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(found))))
            raise ValueError(f"The {where} contains the image token {tokens}, but targets are text. Remove it.")
        return ids, num_tokens

    # Rows and batches

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Keep the images of a dataset undecoded, so that errors can name the row of a damaged one."""
        return keep_images_encoded(dataset)

    def is_encoded(self, row: Mapping[str, Any]) -> bool:
        """Whether a row comes from [`~ImageRowEncoder.encode_batch`]."""
        return "num_images" in row

    def encode_batch(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Check sources and encode targets; sources are encoded by [`~RowEncoder.collate`], with their images.

        Returns:
            `dict`: The columns `num_images` and, if the rows have targets, `labels` and `num_target_tokens`.

        Raises:
            TypeError: A source or target is neither text nor a list of messages.
            ValueError: Images and their places differ in number, or a target contains an image token.
        """
        num_images = count_images(batch, len(indices))
        column, _ = find_columns(batch)
        for index, source, count in zip(indices, batch[column], num_images, strict=True):
            self.as_messages(self._as_source(column, source, count), count, f"`{column}` of row {index}")
        return {"num_images": num_images, **self.encode_targets(batch, indices)}

    def collate_sources(self, sources: Sequence[EncodedSource]) -> dict[str, torch.Tensor]:
        """As [`RowEncoder.collate_sources`], with the inputs of the images, such as `pixel_values`."""
        return super().collate_sources(sources) | concatenate_inputs([source.image_inputs for source in sources])

    def _encode_row(self, row, index):
        column, _ = find_columns({name: value for name, value in row.items() if value is not None})
        images = find_images(row)
        source = self._as_source(column, row[column], len(images))
        return self.encode_source(source, images, where=f"`{column}` of row {index} of the batch")

    def _as_source(self, column, source, num_images):
        return self.ask(source, num_images) if column == "question" and isinstance(source, str) else source

    def ask(self, question: str, num_images: int) -> Messages:
        """Return a question as a message of the user, as evaluation and serving do.

        Image tokens in the question are the places of its images if there are as many; otherwise images are in front.
        """
        token = self.processor.image_token
        if question.count(token) == num_images:
            return [{"role": "user", "content": question}]
        content = [*[{"type": "image"}] * num_images, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]


# Images of rows


def find_images(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row with the column `images` or `image`; empty if it has none."""
    return as_image_list(next((row[name] for name in IMAGE_COLUMNS if name in row), None))


def as_image_list(value: Any) -> list[Any]:
    """Return the images of a cell as `load_images` reads them.

    Args:
        value: One image, several in a list, or `None`; an undecoded one is a `dict` of `bytes` and `path`.
    """
    cells = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return [(cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell for cell in cells]


def read_images(images: Any, where: str) -> list[Any]:
    """Decode images into RGB.

    Raises:
        TypeError: One is of an unknown kind.
        ValueError: One is damaged, empty or too large.
    """
    try:
        return load_images(as_image_list(images))
    except (TypeError, ValueError) as error:
        raise type(error)(f"An image of {where} cannot be used. {error}") from error


def count_images(batch: Mapping[str, Any], num_rows: int) -> list[int]:
    """Count the images of each row without decoding them."""
    name = next((name for name in IMAGE_COLUMNS if name in batch), None)
    if name is None:
        return [0] * num_rows
    if hasattr(batch, "pa_table"):
        column = batch.pa_table[name].combine_chunks()
        if hasattr(column, "value_lengths"):
            return [count or 0 for count in column.value_lengths().to_pylist()]
        return column.is_valid().cast("int64").to_pylist()
    return [len(as_image_list(value)) for value in batch[name]]


def keep_images_encoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return a dataset whose images are files or bytes instead of decoded images."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def concatenate_inputs(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate the image inputs of several rows; empty if no row has images.

    Smaller images, or images in fewer tiles, are padded with zeros at the end, which models ignore.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _concatenate([row[name] for row in rows if name in row]) for name in names}


def _concatenate(tensors):
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def pad(tensor):
        missing = [size - own for size, own in zip(shape, tensor.shape[1:], strict=True)]
        return F.pad(tensor, [width for size in reversed(missing) for width in (0, size)])

    return torch.cat([pad(tensor) for tensor in tensors])


def find_token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Return the ids of those tokens that a tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return sorted({vocabulary[token] for token in tokens if token in vocabulary})


# Messages with images


def as_messages(prompt: str | Messages, image_tokens: Sequence[str], where: str) -> Messages:
    """Convert text or messages to messages whose contents are lists of parts of type `text` or `image`.

    Args:
        prompt (`str` or `list[dict]`): Text becomes a message of the user.
        image_tokens (`Sequence[str]`): Each of them is the place of an image, in text without `image` parts.
        where (`str`): Name of the prompt in error messages.

    Raises:
        TypeError: It is neither text nor a list of messages, or a part is neither text nor the place of an image.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    is_conversation = isinstance(prompt, Sequence) and prompt and all(isinstance(message, dict) for message in prompt)
    if not is_conversation or not all(isinstance(message.get("content"), (str, list)) for message in prompt):
        raise TypeError(
            f"The {where} must be text or a list of messages with `role` and, as `content`, text or a list of parts, "
            f"got {type(prompt).__name__} {prompt!r:.80}. Convert it, or leave the row out."
        )
    if any(
        part.get("type") == "image" for one in prompt if isinstance(one["content"], list) for part in one["content"]
    ):
        image_tokens = ()
    return [{"role": one["role"], "content": _as_parts(one["content"], image_tokens, where)} for one in prompt]


def _as_parts(content, image_tokens, where):
    parts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type")
        if kind == "image" and all(value is None for name, value in part.items() if name != "type"):
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts += _split_text(part["text"], image_tokens)
        else:
            raise TypeError(
                f"The {where} has the part {part!r:.80}, but a part must be `{{'type': 'text', 'text': ...}}` or "
                "`{'type': 'image'}`. Give images in the column `images`."
            )
    return parts


def _split_text(text, image_tokens):
    if not image_tokens:
        return [{"type": "text", "text": text}]
    pieces = re.split("|".join(re.escape(token) for token in image_tokens), text)
    parts = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]


def place_images(messages: Messages, num_images: int, where: str) -> Messages:
    """Put a place for each image in front of the first message of the user, unless the messages have places.

    Raises:
        ValueError: There are places, but not as many as images.
    """
    num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_places == num_images:
        return messages
    if num_places:
        raise ValueError(
            f"The {where} has places for {num_places} image(s), but the row has {num_images}. Give each image one "
            "place, or remove the places to have the images in front."
        )
    messages = copy.deepcopy(messages)
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    first["content"] = [{"type": "image"}] * num_images + first["content"]
    return messages


def join_text(messages: Messages, image_token: str) -> str:
    """Join messages as text, with a token for each image; several messages are prefixed with their roles."""
    contents = [
        "".join(image_token if part["type"] == "image" else part["text"] for part in message["content"])
        for message in messages
    ]
    if len(messages) == 1:
        return contents[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, contents, strict=True))


def remove_images(messages: Messages) -> Messages:
    """Return messages whose contents are text, as the chat templates of tokenizers read them."""
    return [{"role": message["role"], "content": join_text([message], "")} for message in messages]


__all__ = ["ImageRowEncoder", "keep_images_encoded"]
