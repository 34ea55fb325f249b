# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that answers rows in batches: loaded, put on a device, and made to write without chance."""

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ...checkpoint_folders import first_line
from ...configuration_encdec_vlm import EncDecVLMConfig
from ..vision_data import row_images
from .tasks import EvaluationTask, Example


DTYPES = ("float32", "bfloat16", "float16")
# A tokenizer that declares no length says 1e30.
NO_LENGTH_DECLARED = 1e20
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# What configs say of where they came from, which changes nothing that a model writes, and what is no part of it.
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash", "max_new_tokens", "num_beams")


def load_checkpoint(
    model_or_path: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """An encoder-decoder in evaluation mode, and its tokenizer or (with vision) its processor.

    Args:
        model_or_path (`str` or [`~transformers.PreTrainedModel`]): A folder, a model on the Hub, or a loaded model.
        processing_class (*optional*): Of a loaded model its tokenizer or processor. `None` loads that of a checkpoint.
        revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`. `None` leaves weights as they were saved.
        device (`str`, *optional*): As torch names it. `None` takes an accelerator where there is one.

    Raises:
        ValueError: It cannot be loaded, or not onto this device.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}, but must be {', '.join(DTYPES)}, or None for that of the weights.")
    if isinstance(model_or_path, PreTrainedModel):
        if processing_class is None:
            raise ValueError(
                "`model_or_path` is a loaded model and `processing_class` is not set, but the model reads token ids. "
                "Set it to the model's tokenizer or processor."
            )
        model = model_or_path if dtype is None else model_or_path.to(getattr(torch, dtype))
    else:
        model, processing_class = _from_pretrained(str(model_or_path), processing_class, revision, dtype)
    if not model.config.is_encoder_decoder:
        raise ValueError(
            f"`model_or_path` is a {type(model).__name__}, but an encoder-decoder is needed. Decoder-only models are "
            "measured by other tools, such as lm-evaluation-harness."
        )
    return _on_device(model, device).eval(), processing_class


def _from_pretrained(path, processing_class, revision, dtype):
    # Checkpoints of this family run on the code of this package; code that comes with a checkpoint is not run.
    options = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=dtype or "auto", **options)
        if processing_class is None:
            loader = AutoProcessor if has_vision(model) else AutoTokenizer
            processing_class = loader.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{path!r} could not be loaded as an encoder-decoder with its tokenizer ({first_line(error)}). "
            "Give a folder that `save_pretrained` wrote, or the name of a model on the Hub."
        ) from error
    return model, processing_class


def _on_device(model, device):
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return model.to(torch.device(device))
    # torch raises an AssertionError where it was built without the device.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device` is {str(device)!r}, but the model could not be put there ({first_line(error)}). "
            "Set it to a device of this machine, such as 'cpu' or 'cuda'."
        ) from error


def has_vision(model: PreTrainedModel) -> bool:
    """Whether a model sees images."""
    return getattr(model.config, "vision_config", None) is not None


def check_kind(model: PreTrainedModel, task_name: str, task: EvaluationTask) -> None:
    """Refuses a model that the task is not made for.

    Raises:
        ValueError: A text model is to see, or a vision-text model is to read only.
    """
    if task.needs_images and model.config.model_type != EncDecVLMConfig.model_type:
        kind = f"is a {type(model).__name__}" if has_vision(model) else "reads text only"
        raise ValueError(
            f"`task` {task_name!r} asks about images, but the model {kind}. Take a vision-text model of this family "
            f"({EncDecVLMConfig.model_type}), or a task for text."
        )
    if has_vision(model) and not task.needs_images:
        raise ValueError(
            f"`task` {task_name!r} has no images, but the model is a vision-text model. Take a text model, or a task "
            "with images."
        )


class Writer:
    """Writes an answer to each of some rows, greedily or by beam search.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode, on its device.
        processing_class: Its tokenizer; of a vision-text model its processor.
        max_new_tokens (`int`): Longest answer.
        num_beams (`int`, *optional*, defaults to 1): Of the beam search; 1 is greedy.
        max_source_length (`int`, *optional*): Longest source, in tokens. `None` takes what tokenizer and config allow.

    Raises:
        ValueError: `max_new_tokens` is more than the model's decoder allows.
    """

    def __init__(self, model, processing_class, max_new_tokens, num_beams=1, max_source_length=None):
        self.model, self.processing_class = model, processing_class
        is_processor = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = processing_class.tokenizer if is_processor else processing_class
        self.sees = has_vision(model)
        longest = declared_length(model.config, "decoder")
        if longest is not None and max_new_tokens >= longest:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens}, but the decoder has {longest} positions and one is the start "
                f"token's. Set it to at most {longest - 1}."
            )
        self.limit = max_source_length or self._declared_source_length()
        numbers = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        self.generation_config = _without_chance(model.generation_config, numbers, self.tokenizer)

    def _declared_source_length(self):
        lengths = [declared_length(self.model.config, "encoder")]
        if not self.sees:  # the tokenizer's counts text, and images are more tokens
            lengths.append(self.tokenizer.model_max_length)
        return min((length for length in lengths if length is not None and length < NO_LENGTH_DECLARED), default=None)

    def write(self, examples: Sequence[Example]) -> tuple[list[str], list[bool]]:
        """The texts for one batch, in its order, and which of its rows were cut because the model reads less."""
        inputs, were_cut = self._vision_inputs(examples) if self.sees else self._text_inputs(examples)
        # Pixels come in float32, and a model in bfloat16 takes none.
        dtypes = {name: self.model.dtype if value.is_floating_point() else None for name, value in inputs.items()}
        inputs = {name: value.to(self.model.device, dtypes[name]) for name, value in inputs.items()}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, generation_config=copy.deepcopy(self.generation_config))
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts], were_cut

    def _text_inputs(self, examples):
        rows, were_cut = zip(*map(self._source_ids, examples), strict=True)
        length = max(map(len, rows))
        pad = self.generation_config.pad_token_id or 0
        # Made here: not all tokenizers give a mask, and fast ones warn when they are to pad what is already ids.
        inputs = {
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows]),
        }
        return inputs, list(were_cut)

    def _source_ids(self, example):
        ids = self._ids(example.source)
        is_cut = self.limit is not None and len(ids) > self.limit
        if is_cut and example.source == example.text:  # as in training
            ids = self.tokenizer(example.text, truncation=True, max_length=self.limit)["input_ids"]
        elif is_cut:
            text = self._shortened(example, lambda text: len(self._ids(example.before + text + example.after)))
            ids = self._ids(example.before + text + example.after)
        # The model has to read something.
        return ids or [self.tokenizer.eos_token_id or 0], is_cut

    def _ids(self, text, **options):
        return self.tokenizer(text, truncation=False, verbose=False, **options)["input_ids"]

    def _vision_inputs(self, examples):
        images = [row_images({"image": example.images(), "question": example.text}) for example in examples]
        pairs = [self._prompt(example, of_row) for example, of_row in zip(examples, images, strict=True)]
        prompts, were_cut = zip(*pairs, strict=True)
        # A list per row tells the processor whose images they are; rows without any have an empty one.
        images = images if any(images) else None
        return dict(self.processing_class(images, list(prompts), padding=True, return_tensors="pt")), list(were_cut)

    def _prompt(self, example, images):
        count = self.processing_class.image_processor.num_image_tokens
        num_image_tokens = sum(count(image.height, image.width) for image in images)

        def num_tokens(text):
            pieces = self._rendered(text, len(images)).split(self.processing_class.image_token)
            of_text = sum(len(self._ids(piece, add_special_tokens=False)) for piece in pieces)
            return num_image_tokens + of_text + self.tokenizer.num_special_tokens_to_add()

        is_cut = self.limit is not None and num_tokens(example.text) > self.limit
        text = self._shortened(example, num_tokens) if is_cut else example.text
        return self._rendered(text, len(images)), is_cut

    def _rendered(self, question, num_images):
        """The question as the checkpoint's chat template asks it, behind its images or around them."""
        pieces = question.split(self.processing_class.image_token)
        if len(pieces) != num_images + 1:  # the question does not say where its images stand
            pieces = [""] * num_images + [question]
        blocks = [block for piece in pieces for block in ({"type": "text", "text": piece}, {"type": "image"})][:-1]
        blocks = [block for block in blocks if block.get("text") != ""]
        return self.processing_class.apply_chat_template([{"role": "user", "content": blocks}])

    def _shortened(self, example, num_tokens):
        """The beginning of the example's text with which its source is no longer than the model reads."""
        text = example.text
        while text and (excess := num_tokens(text) - self.limit) > 0:
            kept = self._beginning(text, excess)
            # Several tokens of one letter end in the same place.
            text = kept if len(kept) < len(text) else text[:-1]
        if num_tokens(text) > self.limit:
            raise ValueError(
                f"The row that begins with {example.text[:40]!r} has {num_tokens(text)} tokens beside its text, but "
                f"the model reads {self.limit}. Leave the row out, or raise `max_source_length`."
            )
        return text

    def _beginning(self, text, num_dropped):
        if not self.tokenizer.is_fast:
            return self.tokenizer.decode(self._ids(text, add_special_tokens=False)[:-num_dropped])
        encoded = self.tokenizer(
            text, truncation=False, verbose=False, add_special_tokens=False, return_offsets_mapping=True
        )
        ends = [end for _, end in encoded["offset_mapping"]]
        return text[: ends[-num_dropped - 1]] if len(ends) > num_dropped else ""


def check_is_count(name: str, value: Any) -> None:
    """Refuses what is no whole number of at least 1.

    Raises:
        ValueError: `value` is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1. Correct it.")


def declared_length(config: Any, stack: str) -> int | None:
    """The most tokens that a config allows in its `"encoder"` or its `"decoder"`; `None` where it does not say."""
    for part in (stack, "text_config"):
        config = getattr(config, part, None) or config
    lengths = (getattr(config, name, None) for name in (f"max_{stack}_position_embeddings", "max_position_embeddings"))
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def _without_chance(generation_config, numbers, tokenizer):
    """A model's own settings, less what draws tokens at random and what bounds the length otherwise."""
    config = copy.deepcopy(generation_config)
    plain = {"do_sample": False, "max_length": None, "num_return_sequences": 1, **dict.fromkeys(SAMPLING_SETTINGS)}
    known = vars(GenerationConfig())
    config.update(**{name: value for name, value in plain.items() if name in known}, **numbers)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return config


def checkpoint_digest(writer: Writer) -> str:
    """A short text that changes with weights, config, vocabulary, chat template or what decides how texts are made."""
    digest = hashlib.blake2b(digest_size=16)
    config = writer.model.config.to_dict()
    template = getattr(writer.processing_class, "chat_template", None)
    vocabulary = sorted(writer.tokenizer.get_vocab().items())
    for part in (config, writer.generation_config.to_dict(), vocabulary, template):
        if isinstance(part, dict):
            part = {name: value for name, value in part.items() if name not in NOT_OF_THE_MODEL}
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for name, tensor in writer.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
