# SPDX-License-Identifier: Apache-2.0
"""Processor of the vision-text models: prompts in which each image takes as many tokens as it has features."""

from itertools import chain, islice
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .image_processing_encdec_vlm import EncDecVLMImageProcessor, flatten_images


IMAGE_TOKEN = "<image>"
# As in microsoft/encoder-decoder-slm: the question, then its context, which is OCR tokens (if any) and images.
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
# Renders what the user says and nothing else; used when a processor has no chat template.
PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages if message['role'] == 'user' -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for block in message['content'] -%}
            {{- '<image>' if block['type'] == 'image' else block['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}"""
# Word joiner, put behind the first character of an image token that a user typed. Never tokenized.
TYPED = "\u2060"
TOKENIZER_OPTIONS = ("sanitize_control_tokens", "split_special_tokens")
PADDING_OPTIONS = ("padding", "pad_to_multiple_of", "padding_side", "return_attention_mask")
REFUSED_OPTIONS = (
    *("text_pair", "text_target", "text_pair_target", "is_split_into_words", "stride", "return_offsets_mapping"),
    *("return_overflowing_tokens", "return_special_tokens_mask", "return_length"),
)


class EncDecVLMProcessor(ProcessorMixin):
    r"""Turn questions, chats and prompts with images into model inputs.

    - [`~EncDecVLMProcessor.encode_questions`]: questions about images, rendered by the checkpoint's chat template.
    - [`~EncDecVLMProcessor.apply_chat_template`]: chat messages.
    - `processor(images, text)`: prompts as they are, without a template.

    Each `image_token` in a prompt stands for one image and becomes as many tokens as the image has features. The text
    between images is tokenized piece by piece, as in microsoft/encoder-decoder-slm. An image token that a user types
    in a chat stays text: until the prompt is tokenized, a word joiner (U+2060) marks it.

    Args:
        image_processor ([`EncDecVLMImageProcessor`]): Cuts images into tiles and counts their tokens.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Has `image_token` as an added token.
        chat_template (`str`, *optional*): A Jinja template. `None` means the prompt of microsoft/encoder-decoder-slm.
        image_token (`str`, *optional*, defaults to `"<image>"`): Used if the tokenizer has no `image_token`.

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
                f"The tokenizer has no added token {self.image_token!r}, which stands for images. Call "
                f"`tokenizer.add_special_tokens({{'extra_special_tokens': [{self.image_token!r}]}})`, or set "
                "`image_token` to the one that it has, and set `image_token_id` of the model's config to its id."
            )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    @property
    def pad_token_id(self) -> int | None:
        """Padding of the tokenizer, which `Seq2SeqTrainer` asks its `processing_class` for."""
        return self.tokenizer.pad_token_id

    def __call__(self, images: Any = None, text: str | list[str] | None = None, videos=None, audio=None, **kwargs):
        """Encode prompts and their images. A chat template is not applied.

        Args:
            images (*optional*): Images of the types that [`load_images`] accepts: one, a list in the order of their
                tokens, or a list for each prompt.
            text (`str` or `list[str]`, *optional*): One or several prompts.
            **kwargs: Passed to the image processor (`input_data_format`) or used like those of a tokenizer: `padding`
                (by default if several prompts become tensors), `max_length`, `pad_to_multiple_of`, `padding_side`,
                `add_special_tokens`, `return_tensors`, `truncation` (cuts text, never image tokens).

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` of shape `(num_prompts, source_length)`
            if there is text; `pixel_values` and `image_sizes` as from the image processor if there are images.

        Raises:
            ValueError: Images and image tokens differ in number, truncation would cut an image, or an image cannot be
                used.
            TypeError: `text` is neither a string nor a list of strings, or an image is of an unknown type.
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
        """Check the types of the arguments of [`~EncDecVLMProcessor.__call__`]."""
        if videos is not None or audio is not None:
            raise ValueError("`videos` or `audio` was given, but these models read text and images. Leave it out.")
        if images is None and text is None:
            raise ValueError("Neither `images` nor `text` was given, but at least one is required.")
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
                f"{', '.join(refused)} was given, but a prompt with images is tokenized piece by piece. Leave it out, "
                "or call `processor.tokenizer`, for example for targets."
            )

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Load images into one flat list, and put missing image tokens in front of their prompts."""
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
                    "Give one image per token, or a text without image tokens: its images then come first."
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
            f"image tokens (`{self.image_token}`) were given. Give a list of images for each text, an image for each "
            "image token, or one image for each text."
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
                ids = self._truncate(ids, len(before) + len(after), options.get("max_length"))
            rows.append(before + ids + after)
        padding = {name: options[name] for name in PADDING_OPTIONS if name in options}
        padding.setdefault("padding", len(rows) > 1 and options.get("return_tensors") is not None)
        if padding["padding"] == "max_length":
            padding["max_length"] = options.get("max_length")
        return dict(self.tokenizer.pad({"input_ids": rows}, **padding))

    def _piece_ids(self, piece: str, options: dict) -> list[int]:
        """Tokenize the text between two images; an image token that a user typed becomes the tokens of its letters."""
        if not piece:
            return []
        passed = {name: options[name] for name in TOKENIZER_OPTIONS if name in options}
        typed = self.image_token[0] + TYPED + self.image_token[1:]
        ids = self.tokenizer(piece.replace(typed, self.image_token), add_special_tokens=False, **passed)["input_ids"]
        if self.image_token_id not in ids:
            return ids
        spelled = self._spell(self.image_token[0]) + self._spell(self.image_token[1:])
        return list(chain.from_iterable(spelled if token == self.image_token_id else [token] for token in ids))

    def _spell(self, text: str) -> list[int]:
        """Tokenize `text` as in the middle of a line, without the space that SentencePiece puts in front."""
        line_break = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = self.tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
        if ids[: len(line_break)] == line_break:
            return ids[len(line_break) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        start = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]

    def _truncate(self, ids: list[int], num_special: int, max_length: int | None) -> list[int]:
        room = max(0, (self.tokenizer.model_max_length if max_length is None else max_length) - num_special)
        if len(ids) <= room:
            return ids
        cuts_end = self.tokenizer.truncation_side == "right"
        kept, dropped = (ids[:room], ids[room:]) if cuts_end else (ids[len(ids) - room :], ids[: len(ids) - room])
        if self.image_token_id in dropped:
            raise ValueError(
                f"A prompt with images has {len(ids) + num_special} tokens, but truncation to {room + num_special} "
                "would cut an image. Raise `max_length`, or give fewer or smaller images."
            )
        return kept

    def encode_questions(
        self,
        questions: str | list[str],
        images: Any = None,
        truncation: bool = False,
        max_length: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Encode questions about images, each rendered by the chat template as one message of the user.

        The one way from a question to model inputs: pipelines, evaluation, the command line and the demo page use it.

        Args:
            questions (`str` or `list[str]`): One or several questions. As many image tokens as a question has images
                mark the places of these; otherwise its images come first and a typed image token stays text.
            images (*optional*): Images of the types that [`load_images`] accepts: one, a list with one for each
                question (or all of a single question), or a list for each question.
            truncation (`bool`, *optional*, defaults to `False`): Cut a question that is too long at its end. Images
                and the template are never cut.
            max_length (`int`, *optional*): Most tokens of an input, images included; for the model that is
                `max_position_embeddings` of its `text_config`. `None` means no limit.
            **kwargs: Passed to [`~EncDecVLMProcessor.__call__`], such as `padding` and `return_tensors`.

        Returns:
            [`~transformers.BatchFeature`]: As from [`~EncDecVLMProcessor.__call__`].

        Raises:
            ValueError: An input is longer than `max_length` and `truncation` is not set, or is longer even without
                its question; the number of images does not fit; an image cannot be used.
            TypeError: A question is not a string, or an image is of an unknown type.
        """
        self.validate_inputs(images=images, text=questions, **kwargs)
        questions = [questions] if isinstance(questions, str) else list(questions)
        loaded = [] if images is None else self.image_processor.fetch_images(images, kwargs.get("input_data_format"))
        loaded = loaded if isinstance(loaded, list) else [loaded]
        counts = self._images_per_text(loaded, [question.count(self.image_token) for question in questions])
        remaining = flatten_images(loaded)
        conversations = [
            self._as_conversation(question, list(islice(remaining, count)))
            for question, count in zip(questions, counts, strict=True)
        ]
        return self.encode_chats(conversations, truncation, max_length, **kwargs)

    def encode_chats(
        self, conversations: list, truncation: bool = False, max_length: int | None = None, **kwargs
    ) -> BatchFeature:
        """Encode chats as [`~EncDecVLMProcessor.encode_questions`] does questions.

        Args:
            conversations (`list[dict]` or `list[list[dict]]`): As in [`~EncDecVLMProcessor.apply_chat_template`].
            truncation (`bool`, *optional*, defaults to `False`): Cut the last text of a chat that is too long.
            max_length (`int`, *optional*): Most tokens of an input, images included. `None` means no limit.
            **kwargs: Passed to [`~EncDecVLMProcessor.__call__`].

        Raises:
            ValueError: An input is longer than `max_length` and `truncation` is not set, or is longer even without
                its last text.
        """
        _check_conversation(conversations)
        conversations = [conversations] if isinstance(conversations[0], dict) else list(conversations)
        encoded = self._encode_chats(conversations, kwargs)
        too_long = [
            (index, list(ids))
            for index, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["attention_mask"], strict=True))
            if max_length is not None and sum(mask) > max_length
        ]
        for index, ids in too_long:
            num_image_tokens = sum(int(token) == self.image_token_id for token in ids)
            conversations[index] = self._shorten(conversations[index], num_image_tokens, max_length, truncation)
        return self._encode_chats(conversations, kwargs) if too_long else encoded

    def _encode_chats(self, conversations, kwargs):
        options = {"tokenize": True, "return_dict": True, "processor_kwargs": dict(kwargs)}
        return self.apply_chat_template(conversations, self._plain_template(), **options)

    def _plain_template(self) -> str | None:
        return None if self.chat_template else PLAIN_CHAT_TEMPLATE.replace(IMAGE_TOKEN, self.image_token)

    def _as_conversation(self, question: str, images: list) -> list[dict]:
        pieces = question.split(self.image_token)
        if len(pieces) != len(images) + 1:
            pieces = [""] * len(images) + [question]
        blocks = [{"type": "text", "text": pieces[0]}]
        for image, piece in zip(images, pieces[1:], strict=True):
            blocks += [{"type": "image", "image": image}, {"type": "text", "text": piece}]
        return [{"role": "user", "content": [block for block in blocks if block.get("text") != ""] or ""}]

    def _shorten(self, messages: list[dict], num_image_tokens: int, max_length: int, truncation: bool) -> list[dict]:
        """Cut the last text of a chat until its prompt, with its image tokens, has `max_length` tokens."""
        num_tokens = num_image_tokens + self._num_text_tokens(messages)
        if not truncation:
            raise ValueError(
                f"The prompt has {num_tokens} tokens, {num_image_tokens} of them for images, but the limit is "
                f"{max_length}. Pass `truncation=True` to read only the beginning of the question, or shorten it."
            )
        total = num_tokens
        while num_tokens > max_length:
            text, put_back = _last_text(messages)
            if not text:
                raise ValueError(
                    f"The prompt has {total} tokens, {num_image_tokens} of them for images, but the limit is "
                    f"{max_length}, and only the last text is cut. Give fewer or smaller images."
                )
            messages = put_back(self._drop_tokens(text, num_tokens - max_length))
            num_tokens = num_image_tokens + self._num_text_tokens(messages)
        return messages

    def _num_text_tokens(self, messages: list[dict]) -> int:
        prompt = self.apply_chat_template(messages, self._plain_template())
        bos_token = self.tokenizer.bos_token
        # As in transformers' `apply_chat_template`.
        options = {"add_special_tokens": bos_token is None or not prompt.startswith(bos_token)}
        return len(self._tokenize([prompt], [0] * prompt.count(self.image_token), options)["input_ids"][0])

    def _drop_tokens(self, text: str, num_tokens: int) -> str:
        """Cut tokens at the end of a text, at least one character."""
        options = {"return_offsets_mapping": True} if self.tokenizer.is_fast else {}
        encoded = self.tokenizer(text, add_special_tokens=False, **options)
        kept = max(0, len(encoded["input_ids"]) - num_tokens)
        if "offset_mapping" in encoded:
            shorter = text[: encoded["offset_mapping"][kept - 1][1]] if kept else ""
        else:
            shorter = self.tokenizer.decode(encoded["input_ids"][:kept])
        return shorter if len(shorter) < len(text) else text[:-1]

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs):
        """Render the prompt of a conversation, or encode it with `tokenize=True`.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): Messages. Their content is a string, or blocks
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, whose last key may also be
                `"url"`, `"path"` or `"base64"`.
            chat_template (`str`, *optional*): Used instead of the processor's own.
            **kwargs: As in [`~transformers.ProcessorMixin.apply_chat_template`]. `add_generation_prompt` has no
                effect, since the decoder starts the answer.

        Raises:
            ValueError: There is no message, the last one is to be continued, or the template cannot render them.
            TypeError: Messages or their contents are of other types.
        """
        _check_conversation(conversation)
        if kwargs.get("continue_final_message"):
            raise ValueError(
                "`continue_final_message` was given (or the last message is the assistant's), but the encoder reads "
                "no answer to continue. End with a message of the user, and pass the beginning of the answer as "
                "`decoder_input_ids`."
            )
        try:
            return super().apply_chat_template(self._typed_as_text(conversation), chat_template, **kwargs)
        except Exception as error:
            if "jinja2" not in type(error).__module__:  # an optional package, which this file does not import
                raise
            raise ValueError(
                f"The chat template cannot render these messages: {str(error).rstrip('.')}. Correct them, or give "
                "another `chat_template`."
            ) from error

    def _typed_as_text(self, messages: Any) -> Any:
        """Mark the image tokens in the texts of messages as typed."""
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
        """Return tokens and tiles of images of given sizes (height, width), for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_processor.num_image_tokens(*size) for size in image_sizes],
            num_image_patches=[self.image_processor.get_number_of_image_patches(*size) for size in image_sizes],
        )


def _check_conversation(conversation: Any):
    """Check the types in a conversation or in a batch of them."""
    is_batch = isinstance(conversation, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in conversation)
    for messages in conversation if is_batch else [conversation]:
        if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
            raise TypeError(
                f"A conversation is {messages!r:.80}, but must be a list of messages "
                "{'role': ..., 'content': ...}. Convert it."
            )
        if not messages:
            raise ValueError("A conversation has no messages, but needs at least one. Leave it out.")
        for message in messages:
            _check_content(message.get("content"))


def _last_text(messages):
    """Return the last text of the last message, and a function that returns the messages with another text there."""
    *others, last = messages
    content = last["content"]
    if isinstance(content, str):
        return content, lambda text: [*others, {**last, "content": text}]
    places = [place for place, block in enumerate(content) if block.get("type") == "text"]
    if not places:
        return "", None
    place = places[-1]

    def put_back(text):
        blocks = [*content[:place], {**content[place], "text": text}, *content[place + 1 :]]
        return [*others, {**last, "content": blocks}]

    return content[place]["text"], put_back


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
