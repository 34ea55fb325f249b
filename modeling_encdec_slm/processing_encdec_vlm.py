# SPDX-License-Identifier: Apache-2.0
"""Texts and images for the vision-text family: each image stands in its text as so many tokens as it has features."""

from itertools import chain
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .image_processing_encdec_vlm import EncDecVLMImageProcessor, flatten_images


IMAGE_TOKEN = "<image>"
# The predecessor's prompt: the question, then its context, of OCR tokens (where the question brings some) and images.
DEFAULT_CHAT_TEMPLATE = """\
{%- set ns = namespace(turns='', ocr='', images='') -%}
{%- set ns.system = 'Answer the following question based only on the context.' -%}
{%- for message in messages -%}
    {%- set part = namespace(text='', images='') -%}
    {%- if message['content'] is string -%}
        {%- set part.text = message['content'] -%}
    {%- else -%}
        {%- for block in message['content'] -%}
            {%- if block['type'] == 'image' -%}
                {%- set part.images = part.images + '<image>' -%}
            {%- else -%}
                {%- set part.text = part.text + block['text'] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set ns.images = ns.images + part.images -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.system = part.text -%}
    {%- elif message['role'] == 'user' -%}
        {%- set pieces = part.text.split('Reference OCR token:', 1) -%}
        {%- set ns.turns = ns.turns + '\\n###Question: ' + ('\\n' if part.images else '') + pieces[0] -%}
        {%- if pieces | length > 1 -%}
            {%- set ns.ocr = ns.ocr + '\\nReference OCR token: ' + pieces[1] -%}
        {%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- set ns.turns = ns.turns + '\\n###Answer: ' + part.text -%}
    {%- else -%}
        {{- raise_exception('A role is ' ~ message['role'] ~ ', but must be system, user or assistant.') -}}
    {%- endif -%}
{%- endfor -%}
{{- ns.system + ns.turns -}}
{%- if ns.ocr or ns.images -%}
    {{- '\\n###Context: ' + ns.ocr + (' ' if ns.ocr and ns.images else '') + ns.images -}}
{%- endif -%}"""
# Between the first character of an image token and the rest: what a user typed. Invisible, and never tokenized.
TYPED = "\u2060"
TOKENIZER_OPTIONS = ("sanitize_control_tokens", "split_special_tokens")
PADDING_OPTIONS = ("padding", "pad_to_multiple_of", "padding_side", "return_attention_mask")
REFUSED_OPTIONS = (
    *("text_pair", "text_target", "text_pair_target", "is_split_into_words", "stride", "return_offsets_mapping"),
    *("return_overflowing_tokens", "return_special_tokens_mask", "return_length"),
)


class EncDecVLMProcessor(ProcessorMixin):
    r"""Turns texts with images, or chat messages, into what the model reads.

    Each `image_token` in a text stands for one image, and becomes as many tokens as the image has features. Images
    whose text has none are put in front of it. What stands between images is tokenized piece by piece, as by the
    predecessor. In a chat, an image token that a user has typed stays text, in the prompt too: a WORD JOINER
    (U+2060) behind its first character tells it from those of the template, and goes when it is tokenized.

    Args:
        image_processor ([`EncDecVLMImageProcessor`]): Cuts images into tiles and counts their tokens.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Has `image_token` as an added token.
        chat_template (`str`, *optional*): A Jinja template. `None` means the predecessor's prompt.
        image_token (`str`, *optional*, defaults to `"<image>"`): Used where the tokenizer names none.

    Raises:
        ValueError: The tokenizer lacks the token.
    """

    def __init__(
        self,
        image_processor: EncDecVLMImageProcessor | None = None,
        tokenizer=None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
    ):
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        chat_template = chat_template or DEFAULT_CHAT_TEMPLATE.replace(IMAGE_TOKEN, self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.added_tokens_encoder.get(self.image_token)
        if self.image_token_id is None or len(self.image_token) < 2:
            raise ValueError(
                f"The tokenizer has no added token {self.image_token!r}, but it must stand for images. Call "
                f"`tokenizer.add_special_tokens({{'extra_special_tokens': [{self.image_token!r}]}})`, or name the one "
                "it has as `image_token`; and give its id to the model's config."
            )

    @property
    def model_input_names(self) -> list[str]:
        """What the model's `forward` takes of the output."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's; `Seq2SeqTrainer` pads what is generated with that of its `processing_class`."""
        return self.tokenizer.pad_token_id

    def __call__(self, images: Any = None, text: str | list[str] | None = None, videos=None, audio=None, **kwargs):
        """What the model reads of texts and their images.

        Args:
            images (*optional*): One image or several of the kinds in [`EncDecVLMImageProcessor`]: in the order of
                their tokens, or a list for every text.
            text (`str` or `list[str]`, *optional*): One text or several.
            **kwargs: Of the image processor (`input_data_format`), and of the tokenizer: `padding` (by default
                where several texts become tensors), `max_length`, `pad_to_multiple_of`, `padding_side`,
                `add_special_tokens`, `return_tensors`, `truncation`. Only texts without images are truncated.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` of shape `(num_texts, source_length)`
            if there are texts, `pixel_values` and `image_sizes` as of the image processor if there are images.

        Raises:
            ValueError: Images and image tokens differ in number, a text with images is too long, or an image
                cannot be used.
            TypeError: `text` is neither a string nor a list of strings, or an image is of no kind known.
        """
        self.validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        options = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        image_options, text_options = options["images_kwargs"], options["text_kwargs"]
        images, text, _, _ = self.prepare_inputs_layout(images, text, **image_options)
        inputs = {}
        if text is not None:
            sizes = [(image.height, image.width) for image in images]
            inputs = self._tokenize(
                text, [self.image_processor.num_image_tokens(*size) for size in sizes], text_options
            )
        if options.get("return_mm_token_type_ids") and inputs:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
        if images:
            inputs.update(self.image_processor(images, **image_options))
        return BatchFeature(inputs, tensor_type=text_options.get("return_tensors"))

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Raises an error where the kinds of inputs are not those of [`~EncDecVLMProcessor.__call__`]."""
        if videos is not None or audio is not None:
            raise ValueError("`videos` or `audio` was given, but this family reads text and images. Leave it out.")
        if images is None and text is None:
            raise ValueError("Neither `images` nor `text` was given, but at least one is needed.")
        if text is not None and not isinstance(text, str):
            kinds = {type(row).__name__ for row in text} if isinstance(text, (list, tuple)) else {type(text).__name__}
            if kinds != {"str"}:
                raise TypeError(
                    f"`text` holds {', '.join(sorted(kinds)) or 'nothing'}, but must be a string or a list of them. "
                    "For chat messages call `apply_chat_template`."
                )
        options = {**kwargs, **kwargs.get("text_kwargs", {})}
        if refused := [name for name in REFUSED_OPTIONS if options.get(name)]:
            raise ValueError(
                f"{', '.join(refused)} was given, but texts with images are not tokenized in one go. Leave it out, or "
                "call `tokenizer` (for targets, say)."
            )

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """The images, loaded and in one list, and the texts with a token for each of them, in front if need be."""
        loaded = [] if images is None else self.image_processor.fetch_images(images, kwargs.get("input_data_format"))
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            text = self._place_images(loaded if isinstance(loaded, list) else [loaded], text)
        return list(flatten_images(loaded)), text, None, None

    def _place_images(self, images: list, texts: list[str]) -> list[str]:
        found = [text.count(self.image_token) for text in texts]
        wanted = self._images_per_text(images, found)
        for index, (tokens, count) in enumerate(zip(found, wanted, strict=True)):
            if tokens == 0:
                texts[index] = self.image_token * count + texts[index]
            elif tokens != count:
                raise ValueError(
                    f"Text {index} has {tokens} image tokens (`{self.image_token}`), but {count} images belong to it. "
                    "Give one image for each token; a text without any has its images in front."
                )
        return texts

    def _images_per_text(self, images: list, found: list[int]) -> list[int]:
        is_nested = any(isinstance(image, list) for image in images)
        if is_nested and len(images) == len(found):
            return [len(list(flatten_images(image))) for image in images]
        if not is_nested and len(found) == 1:
            return [len(images)]
        if not is_nested and sum(found) == len(images):
            return found
        if not is_nested and sum(found) == 0 and len(images) == len(found):
            return [1] * len(found)
        raise ValueError(
            f"{len(images)} {'lists of images' if is_nested else 'images'} and {len(found)} texts with {sum(found)} "
            f"image tokens (`{self.image_token}`) were given, but each text needs a list of its images, each image "
            "token an image, or each text one image. Correct the shorter."
        )

    def _tokenize(self, texts: list[str], num_tokens: list[int], options: dict) -> dict:
        counts = iter(num_tokens)
        before, after = self._special_ids() if options.get("add_special_tokens", True) else ([], [])
        rows = []
        for text in texts:
            pieces = [self._piece_ids(piece, options) for piece in text.split(self.image_token)]
            images = [[self.image_token_id] * next(counts) for _ in pieces[1:]]
            ids = list(chain(pieces[0], *chain.from_iterable(zip(images, pieces[1:], strict=True))))
            if options.get("truncation") not in (None, False, "do_not_truncate"):
                ids = self._truncated(ids, len(images), len(before) + len(after), options.get("max_length"))
            rows.append(before + ids + after)
        padding = {name: options[name] for name in PADDING_OPTIONS if name in options}
        padding.setdefault("padding", len(rows) > 1 and options.get("return_tensors") is not None)
        if padding["padding"] == "max_length":
            padding["max_length"] = options.get("max_length")
        return dict(self.tokenizer.pad({"input_ids": rows}, **padding))

    def _piece_ids(self, piece: str, options: dict) -> list[int]:
        """Ids of a text between images; an image token that a user has typed is spelled out in it."""
        if not piece:
            return []
        passed = {name: options[name] for name in TOKENIZER_OPTIONS if name in options}
        typed = self.image_token[0] + TYPED + self.image_token[1:]
        ids = self.tokenizer(piece.replace(typed, self.image_token), add_special_tokens=False, **passed)["input_ids"]
        if self.image_token_id not in ids:
            return ids
        spelled = self._spelled(self.image_token[0]) + self._spelled(self.image_token[1:])
        return list(chain.from_iterable(spelled if token == self.image_token_id else [token] for token in ids))

    def _spelled(self, text: str) -> list[int]:
        """Ids of `text` in the middle of a line: without the space that SentencePiece puts before a text."""
        line_break = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = self.tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
        if ids[: len(line_break)] == line_break:
            return ids[len(line_break) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before a text and after it."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        start = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]

    def _truncated(self, ids: list[int], num_images: int, num_special: int, max_length: int | None) -> list[int]:
        room = max(0, (self.tokenizer.model_max_length if max_length is None else max_length) - num_special)
        if len(ids) <= room:
            return ids
        if num_images:
            raise ValueError(
                f"A text with {num_images} images has {len(ids) + num_special} tokens, but truncation to "
                f"{room + num_special} would cut images apart. Raise `max_length`, or give fewer or smaller images."
            )
        return ids[:room] if self.tokenizer.truncation_side == "right" else ids[len(ids) - room :]

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs):
        """The prompt of a conversation, or with `tokenize=True` what the model reads of it.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): Messages, whose content is a string or blocks
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`; or, in place of the last
                `"image"`, `"url"`, `"path"` or `"base64"`.
            chat_template (`str`, *optional*): Instead of the processor's own.
            **kwargs: As in [`~transformers.ProcessorMixin.apply_chat_template`]; `add_generation_prompt` changes
                nothing, since the decoder starts every answer.

        Raises:
            ValueError: There is no message, the last is to be continued, or the template does not know of what they
                hold.
            TypeError: Messages or their contents are of other kinds.
        """
        _check_conversation(conversation)
        if kwargs.get("continue_final_message"):
            raise ValueError(
                "`continue_final_message` was given (or the last message is the assistant's), but the encoder reads "
                "no answers to continue. End with the user's message; begin the answer as `decoder_input_ids`."
            )
        try:
            return super().apply_chat_template(self._typed_as_text(conversation), chat_template, **kwargs)
        except Exception as error:
            # Known by name, since a file that ships with checkpoints imports nothing beyond transformers' own needs.
            if not type(error).__module__.startswith("jinja2"):
                raise
            raise ValueError(
                f"The chat template cannot render these messages: {str(error).rstrip('.')}. Correct them, or give "
                "another `chat_template`."
            ) from error

    def _typed_as_text(self, messages: Any) -> Any:
        """`messages` in which image tokens are marked as typed; what else they hold stays as it is."""
        if isinstance(messages, (list, tuple)):
            return [self._typed_as_text(message) for message in messages]
        if isinstance(messages, str):
            return messages.replace(self.image_token, self.image_token[0] + TYPED + self.image_token[1:])
        if isinstance(messages, dict):
            return {
                key: self._typed_as_text(value) if key in ("content", "text") else value
                for key, value in messages.items()
            }
        return messages

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Tokens and tiles of images of these sizes (height, width), as serving engines ask for them."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_processor.num_image_tokens(*size) for size in image_sizes],
            num_image_patches=[self.image_processor.get_number_of_image_patches(*size) for size in image_sizes],
        )


def _check_conversation(conversation: Any):
    """Raises an error where a conversation, or one of a batch of them, is not as templates read it."""
    is_batch = isinstance(conversation, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in conversation)
    for messages in conversation if is_batch else [conversation]:
        if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
            raise TypeError(
                f"A conversation is {messages!r:.80}, but must be a list of messages "
                "{'role': ..., 'content': ...}, or all of them must be such lists. Convert it."
            )
        if not messages:
            raise ValueError("A conversation without messages was given, but needs at least one. Leave it out.")
        for message in messages:
            _check_content(message.get("content"))


def _check_content(content: Any):
    if content is None or isinstance(content, str):
        return
    for block in content if isinstance(content, (list, tuple)) else [content]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in ("text", "image", "image_url") or (kind == "text" and not isinstance(block.get("text"), str)):
            raise TypeError(
                f"The content of a message has {block!r:.80}, but must be text, or a list of blocks "
                "{'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}. Convert it."
            )


EncDecVLMProcessor.register_for_auto_class()

__all__ = ["EncDecVLMProcessor"]
