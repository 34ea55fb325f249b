# SPDX-License-Identifier: Apache-2.0
"""Generate answers to the rows of a task in batches, without sampling."""

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from ...checkpoints import (
    MODEL_TYPES,
    check_hub_name,
    has_vision,
    load_checkpoint,
    load_processing_class,
    move_to_device,
)
from ..causal_models import is_causal_model, load_causal_model
from ..row_encoding import build_row_encoder
from .prompts import PromptEncoder
from .tasks import EvaluationTask, Example


logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
# The `model_max_length` of a tokenizer without a limit is 1e30.
NO_LIMIT = 1e20
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Sampling, several answers per source, other types of output, and prompt lookup, which needs batches of one.
REPLACED_SETTINGS = {
    **{"do_sample": False, "return_dict_in_generate": False},
    **{"prompt_lookup_num_tokens": None, **dict.fromkeys(SAMPLING_SETTINGS)},
}
# Fields of configs that do not change what is generated, or that are recorded by themselves.
IGNORED_FIELDS = ("_name_or_path", "transformers_version", "_commit_hash", "max_new_tokens", "num_beams")


def load_model(
    model_or_path: Any,
    processing_class: Any = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer or processor; a loaded model is only moved to its dtype and device.

    Args: as in [`~encdec_slm.trainers.evaluation.evaluate_checkpoint`].

    Raises:
        ValueError: It cannot be loaded, or has no tokenizer or processor.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"`dtype` is {dtype!r}, but must be one of {', '.join(DTYPES)}. Leave it out to keep the weights' own."
        )
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if not isinstance(model_or_path, (str, Path)):
        model = move_to_device(model_or_path.eval(), device)
        model = model if dtype is None else model.to(getattr(torch, dtype))
    else:
        location = {"revision": revision or "main"}
        if not Path(model_or_path).is_dir():
            location["local_files_only"] = not check_hub_name(model_or_path, revision)
        if is_causal_model(str(model_or_path), **location):
            model = load_causal_model(str(model_or_path), dtype=dtype or "auto", **location).eval()
            model, found = move_to_device(model, device), None
            if processing_class is None:
                found = load_processing_class(model_or_path, model, **location)
        else:
            model, found = load_checkpoint(model_or_path, revision=revision, dtype=dtype or "auto", device=device)
        processing_class = found if processing_class is None else processing_class
    if processing_class is None:
        raise ValueError(
            f"{'The model' if model is model_or_path else repr(str(model_or_path))} has no tokenizer or processor. "
            "Save it in the folder of the model, or pass `processing_class`."
        )
    return model, processing_class


def check_model_fits_task(model: PreTrainedModel, task_name: str, task: EvaluationTask) -> None:
    """Check that vision tasks are given vision-text models of this family, and text tasks text models.

    Raises:
        ValueError: They are not.
    """
    if task.needs_images and not (has_vision(model) and model.config.model_type in MODEL_TYPES):
        raise ValueError(
            f"`task` {task_name!r} needs images, but the model is a {type(model).__name__}. Use a vision-text model "
            "of this family, or a task for text."
        )
    if has_vision(model) and not task.needs_images:
        raise ValueError(
            f"`task` {task_name!r} has no images, but the model is a vision-text model. Use a text model, or a task "
            "with images."
        )


class AnswerGenerator:
    """Generate answers by greedy or beam search, as the checkpoint's generation config and the caller say.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode, on its device.
        processing_class: Its tokenizer or, for a vision-text model, its processor.
        default_max_new_tokens (`int`): Longest answer if neither the caller nor the generation config has a limit.
        max_new_tokens (`int`, *optional*): Longest answer. `None` takes the limit of the generation config.
        num_beams (`int`, *optional*): 1 is greedy. `None` takes the number of the generation config.
        max_source_length (`int`, *optional*): Longest source, in tokens. `None` takes the limit of tokenizer and
            config.
        num_answers (`int`, *optional*, defaults to 1): Answers per source, joined by line ends. There are at least as
            many beams, unless the caller sets `num_beams`: then there are at most as many answers.
        parse_answer (`Callable`, *optional*): Extracts an answer from a generated text.
        prompt_template (`str` or `Path`, *optional*): Jinja template of the prompt of a decoder-only model.

    Raises:
        ValueError: `max_new_tokens` exceeds the positions of the decoder, or an encoder-decoder is given
            `prompt_template`.
    """

    def __init__(
        self,
        model,
        processing_class,
        default_max_new_tokens=128,
        max_new_tokens=None,
        num_beams=None,
        max_source_length=None,
        num_answers=1,
        parse_answer=str.strip,
        prompt_template=None,
    ):
        self.model, self.processing_class = model, processing_class
        self.num_answers = min(num_answers, num_beams or num_answers)
        self.parse_answer, self.prompt_template = parse_answer, prompt_template
        is_processor = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = processing_class.tokenizer if is_processor else processing_class
        self.max_source_length = max_source_length or self._declared_source_length()
        if model.config.is_encoder_decoder:
            if prompt_template is not None:
                raise ValueError("`prompt_template` is for decoder-only models, but the model is an encoder-decoder.")
            self.encoder = build_row_encoder(processing_class, max_source_length=self.max_source_length)
        else:
            self.encoder = PromptEncoder(processing_class, self.max_source_length, prompt_template=prompt_template)
        given = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        self.generation_config = self._build_generation_config(given, default_max_new_tokens)
        self.overridden = self._find_overridden_settings()
        self._generate_arguments = {"tokenizer": self.tokenizer} if self.generation_config.stop_strings else {}

    def generate(self, examples: Sequence[Example]) -> tuple[list[str], list[bool]]:
        """Generate the answers to a batch of examples; returns them, and which of the sources were truncated."""
        sources = [self._encode(example) for example in examples]
        inputs = self.encoder.collate_sources(sources)
        # Pixels are float32; a model in bfloat16 requires bfloat16.
        dtypes = {name: self.model.dtype if value.is_floating_point() else None for name, value in inputs.items()}
        inputs = {name: value.to(self.model.device, dtypes[name]) for name, value in inputs.items()}
        with torch.inference_mode(), self._replace_generation_config():
            ids = self.model.generate(**inputs, **self._generate_arguments)
        if not self.model.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        answers = [self.parse_answer(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        starts = range(0, len(answers), self.num_answers)
        texts = ["\n".join(dict.fromkeys(answers[start : start + self.num_answers])) for start in starts]
        return texts, [source.is_cut for source in sources]

    def settings(self) -> dict[str, Any]:
        """Return what decides the answers besides the weights."""
        return {
            "max_new_tokens": self.generation_config.max_new_tokens,
            "num_beams": self.generation_config.num_beams,
            "max_source_length": self.max_source_length,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **({} if self.prompt_template is None else {"prompt_template": self.prompt_template}),
        }

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model."""
        return self.model.num_parameters()

    @property
    def device_name(self) -> str:
        """Type of the model's device, and its name if it is a GPU."""
        device = self.model.device
        return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type

    def compute_digest(self) -> str:
        """Return a digest of weights, config, vocabulary, chat template and generation settings."""
        digest = hashlib.blake2b(digest_size=16)
        template = getattr(self.processing_class, "chat_template", None)
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        configs = (self.model.config.to_dict(), self.generation_config.to_dict())
        configs = [{key: value for key, value in config.items() if key not in IGNORED_FIELDS} for config in configs]
        digest.update(json.dumps([configs, vocabulary, template], sort_keys=True, default=str).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @contextlib.contextmanager
    def _replace_generation_config(self):
        """Replace the model's generation config, from which `generate` takes what is not set in a given one."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        own, model.generation_config = model.generation_config, copy.deepcopy(self.generation_config)
        try:
            yield
        finally:
            model.generation_config = own

    def _encode(self, example):
        where = f"row that begins with {example.source[:40]!r}"
        if not has_vision(self.model):
            return self.encoder.encode_source(example.text, before=example.before, after=example.after, where=where)
        images = example.images()
        return self.encoder.encode_source(self.encoder.ask(example.text, len(images)), images, where=where)

    def _declared_source_length(self):
        limits = [max_length(self.model.config, "encoder")]
        if not has_vision(self.model):  # the tokenizer's limit is for text, and images have more tokens
            limits.append(self.tokenizer.model_max_length)
        return min((limit for limit in limits if limit is not None and limit < NO_LIMIT), default=None)

    def _build_generation_config(self, given, default_max_new_tokens):
        """Copy the model's generation config without sampling, with one limit for the length of answers."""
        config = copy.deepcopy(self.model.generation_config)
        positions = max_length(self.model.config, "decoder")
        limit = given["max_new_tokens"]
        if limit is None:
            limit = min(self._own_limit() or default_max_new_tokens, (positions or NO_LIMIT) - 1)
        elif positions is not None and limit >= positions:
            raise ValueError(
                f"`max_new_tokens` is {limit}, but the decoder has {positions} positions, one of them for the start "
                f"token. Set it to at most {positions - 1}."
            )
        settings = {"max_length": None, "max_new_tokens": max(1, limit), **REPLACED_SETTINGS}
        settings["num_beams"] = max(given["num_beams"] or config.num_beams or 1, self.num_answers)
        settings["num_return_sequences"] = self.num_answers
        known = vars(GenerationConfig())
        config.update(**{name: value for name, value in settings.items() if name in known})
        if config.pad_token_id is None:
            ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
            config.pad_token_id = next((token_id for token_id in ids if token_id is not None), None)
        return config

    def _own_limit(self):
        """Return the most new tokens that the checkpoint generates, if its generation config has a limit."""
        config = self.model.generation_config
        if not self.model.config.is_encoder_decoder:  # the prompt counts in `max_length`
            return config.max_new_tokens
        # The start token counts in `max_length`.
        return config.max_new_tokens or (config.max_length and config.max_length - 1)

    def _find_overridden_settings(self):
        """Return the settings of the checkpoint that this run replaces, with their values in the checkpoint."""
        own, used = self.model.generation_config, self.generation_config
        overridden = {"do_sample": True} if own.do_sample else {}
        if own.num_return_sequences not in (None, 1):
            overridden["num_return_sequences"] = own.num_return_sequences
        if (own.num_beams or 1) != used.num_beams:
            overridden["num_beams"] = own.num_beams or 1
        if self._own_limit() not in (None, used.max_new_tokens):
            overridden["max_new_tokens"] = self._own_limit()
        if overridden:
            values = ", ".join(f"{name}={value}" for name, value in overridden.items())
            logger.warning(f"The evaluation replaces settings of the checkpoint's generation config: {values}.")
        return overridden


def max_length(config: Any, stack: str) -> int | None:
    """Return the most tokens that a config allows in its `"encoder"` or `"decoder"`; `None` if it has no limit."""
    for part in (stack, "text_config"):
        config = getattr(config, part, None) or config
    limits = (getattr(config, name, None) for name in (f"max_{stack}_position_embeddings", "max_position_embeddings"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


class FunctionGenerator:
    """Answers of a function, for [`~encdec_slm.trainers.evaluation.evaluate_checkpoint`].

    Args:
        function (`Callable`): Returns the answers to a list of sources: a text for each, or a list of texts, the best
            first.
    """

    num_parameters, overridden, device_name = None, {}, None

    def __init__(self, function: Callable[[list[str]], Sequence[str | Sequence[str]]]):
        self.function = function

    def generate(self, examples: Sequence[Example]) -> tuple[list[str], list[bool]]:
        """Return the answers to a batch of examples, several joined by line ends; none of the sources is truncated."""
        answers = self.function([example.source for example in examples])
        if len(answers) != len(examples):
            raise ValueError(
                f"The function returned {len(answers)} answers to {len(examples)} sources. Return a text, or a list "
                "of texts, for each source."
            )
        texts = [answer if isinstance(answer, str) else "\n".join(answer) for answer in answers]
        return texts, [False] * len(texts)

    def settings(self) -> dict[str, Any]:
        """Return nothing, because the settings of a function are unknown."""
        return {}

    def compute_digest(self) -> str:
        """Return the name of the function, which cannot be told from another one of this name."""
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)
