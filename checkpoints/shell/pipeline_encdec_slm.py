# SPDX-License-Identifier: Apache-2.0
"""Pipelines: `text2text-generation`, `summarization` and `translation`, which transformers 5 removed, and
`image-text-to-text` with the prompts and images of the family's processor."""

import copy
import re
from collections.abc import Sequence

import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, ImageTextToTextPipeline, Pipeline, pipelines
from transformers import __version__ as transformers_version
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import ModelOutput

from .generation_encdec_slm import generated_lengths


RESTORED_TASKS = ("text2text-generation", "summarization", "translation")
# `model_max_length` of a tokenizer that declares no length is 1e30.
NO_LENGTH_DECLARED = 1e20
DEFAULT_NEW_TOKENS = 256


class Text2TextGenerationPipeline(Pipeline):
    """Generate text from text with any encoder-decoder.

    Results are named after the task: `generated_text`, `summary_text` or `translation_text`, and `..._token_ids`.
    Generation stops at the length of the model's generation config, or after 256 tokens if it has none (less if the
    config allows less). Settings that the config recommends for the task (`task_specific_params`, `prefix`) are
    defaults for those of the caller.

    Args:
        model ([`~transformers.PreTrainedModel`]): An encoder-decoder with a language modeling head.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the model.
        task (`str`, *optional*, defaults to `"text2text-generation"`): Also `"summarization"`, `"translation"` or
            `"translation_xx_to_yy"`.
        kwargs: As in [`~transformers.Pipeline`] (`device`, `batch_size`, ...), and any argument of `__call__`, as a
            default for all calls.

    Raises:
        ValueError: The model has no encoder or cannot generate, there is no tokenizer, or an exported model (one with
            a `check_tokenizer`) was exported with another tokenizer.
    """

    # Loading is different in other releases of transformers 5, so none of it is used.
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model, tokenizer=None, task="text2text-generation", **kwargs):
        if not (model.can_generate() and model.config.is_encoder_decoder):
            raise ValueError(
                f"`model` is a {type(model).__name__}, but must be an encoder-decoder that generates. Load it with "
                '`AutoModelForSeq2SeqLM`; for a decoder-only model use the "text-generation" pipeline.'
            )
        super().__init__(model, tokenizer, task=task, **_with_device(model, kwargs))
        if self.tokenizer is None:
            raise ValueError("`tokenizer` is None, but a tokenizer is required. Pass the one of the model.")
        if hasattr(self.model, "check_tokenizer"):
            # An exported model is checked against the tokenizer that it was exported with.
            self.model.check_tokenizer(self.tokenizer)
        # A table of positions must not be exceeded by default.
        longest = min(_declared_lengths(model.config, "decoder").values(), default=NO_LENGTH_DECLARED)
        self._default_new_tokens = min(DEFAULT_NEW_TOKENS, longest - 1)
        recommended = (getattr(model.config, "task_specific_params", None) or {}).get(task, {})
        self.prefix = recommended.get("prefix", getattr(model.config, "prefix", None)) or ""
        known = vars(GenerationConfig())
        self._task_params = {key: value for key, value in recommended.items() if key in known}

    def _sanitize_parameters(
        self,
        return_text=None,
        return_tensors=None,
        clean_up_tokenization_spaces=None,
        truncation=None,
        src_lang=None,
        tgt_lang=None,
        stop_sequence=None,
        **generate_kwargs,
    ):
        preprocess_params = {"truncation": truncation, "src_lang": src_lang, "tgt_lang": tgt_lang}
        if stop_sequence is not None:
            generate_kwargs["stop_strings"] = stop_sequence
        postprocess_params = {
            "return_text": return_text,
            "return_tensors": return_tensors,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        # Arguments of a call override those of the pipeline; a whole `generation_config` replaces them.
        defaults = {} if "generation_config" in generate_kwargs else getattr(self, "_forward_params", {})
        forward_params = {"generate_kwargs": {**defaults.get("generate_kwargs", {}), **generate_kwargs}}
        return _without_none(preprocess_params), forward_params, _without_none(postprocess_params)

    def __call__(self, inputs, **kwargs):
        """Generate text from one or several sources.

        Args:
            inputs (`str`, `list[str]`, generator or dataset of `str`): Sources. A column of a dataset is
                `dataset["text"]` or, read lazily, `KeyDataset(dataset, "text")`.
            return_text (`bool`, *optional*): Return the text. `None` returns it unless `return_tensors` is set.
            return_tensors (`bool`, *optional*, defaults to `False`): Return the token ids, from the start token to
                the first end token.
            clean_up_tokenization_spaces (`bool`, *optional*): Remove spaces before punctuation. `None` leaves it to
                the tokenizer.
            truncation (`bool` or `str`, *optional*, defaults to `False`): Cut a source that is longer than the
                tokenizer or the model allows, the task's prefix included.
            src_lang (`str`, *optional*): Language of the source, for tokenizers that mark it (mBART, NLLB, M2M100).
                `None` reads it from the task, as in `"translation_en_to_fr"`.
            tgt_lang (`str`, *optional*): Language of the target, likewise.
            stop_sequence (`str` or `list[str]`, *optional*): Strings that end the generation.
            kwargs: `batch_size` (sources per step, defaults to 1), `num_workers`, and arguments of `generate`, such
                as `num_beams`, `num_return_sequences`, `max_new_tokens` or `streamer`.

        Returns:
            - For a `str`: a list of one `dict` per returned sequence.
            - For a list: one `dict` per source; with `num_return_sequences` above 1, one list of them per source.
            - For a generator or dataset: an iterator over the results of each source alone, computed as it is read.

        Raises:
            TypeError: A source is not a `str`.
            ValueError: A source is too long and `truncation` is not set; a token id is outside of the vocabulary of
                the model; `batch_size` requires padding, but there is no padding token; nothing is to be returned.
        """
        if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes, bytearray)):
            inputs = [_check_is_text(text, f"`inputs[{position}]`") for position, text in enumerate(inputs)]
        if isinstance(inputs, (list, KeyDataset)) and len(inputs) == 0:
            return []
        results = super().__call__(inputs, **kwargs)
        if isinstance(inputs, list):
            return [result[0] if len(result) == 1 else result for result in results]
        return results

    def preprocess(self, text, truncation=False, src_lang=None, tgt_lang=None):
        text = self.prefix + _check_is_text(text, "`inputs`")
        limit, declared_by = self._source_limit()
        options = {"truncation": False, "verbose": False}
        if limit is not None and truncation not in (False, "do_not_truncate"):
            options.update(truncation=truncation, max_length=limit)
        if self.task.startswith("translation") and hasattr(self.tokenizer, "_build_translation_inputs"):
            encoding = self._encode_for_translation(text, src_lang, tgt_lang, options)
        else:
            encoding = self.tokenizer(text, **options)
        token_ids = encoding["input_ids"] or [self._empty_source_id()]
        if limit is not None and len(token_ids) > limit:
            raise ValueError(
                f"The source that begins with {text[:40]!r} has {len(token_ids)} tokens, but {declared_by} allows "
                f"{limit}. Pass `truncation=True` to read only its beginning, or shorten it."
            )
        # Not all tokenizers return a mask, and batches need one.
        input_ids = torch.tensor([token_ids])  # (1, S)
        model_inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if "forced_bos_token_id" in encoding:
            model_inputs["forced_bos_token_id"] = torch.tensor([encoding["forced_bos_token_id"]])
        return model_inputs

    def _source_limit(self):
        """Return the longest source in tokens and what declares it; `None` twice if nothing does."""
        limits = {"`tokenizer.model_max_length`": self.tokenizer.model_max_length}
        limits |= _declared_lengths(self.model.config, "encoder")
        return min(((limit, by) for by, limit in limits.items() if limit < NO_LENGTH_DECLARED), default=(None, None))

    def _encode_for_translation(self, text, src_lang, tgt_lang, options):
        named = re.fullmatch("translation_(.+)_to_(.+)", self.task)
        return self.tokenizer._build_translation_inputs(
            text,
            return_tensors=None,
            src_lang=src_lang or (named and named[1]),
            tgt_lang=tgt_lang or (named and named[2]),
            **options,
        )

    def _empty_source_id(self):
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "The source has no tokens, but at least one is required, and the tokenizer has no end token to use "
                "instead. Leave empty sources out, or set `tokenizer.eos_token`."
            )
        return self.tokenizer.eos_token_id

    def _forward(self, model_inputs, generate_kwargs):
        input_ids = model_inputs["input_ids"]  # (B, S)
        self._check_token_ids(input_ids)
        if "forced_bos_token_id" in model_inputs:
            forced_id = model_inputs.pop("forced_bos_token_id")[0].item()
            generate_kwargs = {"forced_bos_token_id": forced_id, **generate_kwargs}
        settings = self._with_defaults(generate_kwargs)
        output = self.model.generate(**model_inputs, **settings)
        sequences = output.sequences if isinstance(output, ModelOutput) else output
        eos_token_id, pad_token_id = (self._setting(name, settings) for name in ("eos_token_id", "pad_token_id"))
        lengths = generated_lengths(sequences, eos_token_id, pad_token_id)
        rows = input_ids.shape[0]
        return {"output_ids": sequences.reshape(rows, -1, sequences.shape[-1]), "lengths": lengths.view(rows, -1)}

    def _check_token_ids(self, input_ids):
        highest, vocab_size = input_ids.max().item(), _stack_config(self.model.config, "encoder").vocab_size
        if highest >= vocab_size:
            raise ValueError(
                f"The tokenizer returned token id {highest}, but the model has ids 0 to {vocab_size - 1}. Use the "
                "tokenizer of this checkpoint, or `model.resize_token_embeddings` after adding tokens to it."
            )

    def _with_defaults(self, generate_kwargs):
        """Return the caller's generation arguments with those that the config recommends, and with defaults."""
        config = generate_kwargs.get("generation_config")
        settings = (
            dict(generate_kwargs) if config is not None else {**self._recommended(generate_kwargs), **generate_kwargs}
        )
        defaults = {}
        if self._setting("max_length", settings) is None and self._setting("max_new_tokens", settings) is None:
            defaults["max_new_tokens"] = self._default_new_tokens
        if self._setting("pad_token_id", settings) is None and self.tokenizer.pad_token_id is not None:
            defaults["pad_token_id"] = self.tokenizer.pad_token_id
        if config is not None:
            settings["generation_config"] = copy.deepcopy(config)
            settings["generation_config"].update(**defaults)
            defaults = {}
        if self._setting("stop_strings", settings) or "assistant_tokenizer" in settings:
            defaults["tokenizer"] = self.tokenizer
        return {**defaults, **settings}

    def _recommended(self, generate_kwargs):
        lengths = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        replaced = {length for length, new_tokens in lengths if new_tokens in generate_kwargs}
        return {key: value for key, value in self._task_params.items() if key not in replaced}

    def _setting(self, name, settings):
        """Return the value that `generate` will use for a setting, `None` if nothing sets it."""
        if name in settings:
            return settings[name]
        configs = (settings.get("generation_config"), self.model.generation_config)
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    def postprocess(self, model_outputs, return_text=None, return_tensors=False, clean_up_tokenization_spaces=None):
        if return_text is None:
            return_text = not return_tensors
        if not (return_text or return_tensors):
            raise ValueError(
                "`return_text` and `return_tensors` are both False, so nothing would be returned. Set one of them."
            )
        name = {"summarization": "summary", "translation": "translation"}.get(self.task.split("_")[0], "generated")
        records = []
        for token_ids, length in zip(model_outputs["output_ids"][0], model_outputs["lengths"][0], strict=True):
            record = {f"{name}_token_ids": token_ids[:length]} if return_tensors else {}
            if return_text:
                record[f"{name}_text"] = self.tokenizer.decode(
                    token_ids[:length],
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                )
            records.append(record)
        return records


class EncDecVLMPipeline(ImageTextToTextPipeline):
    """The `image-text-to-text` pipeline, with the prompts and images of [`EncDecVLMProcessor`].

    It differs from [`~transformers.ImageTextToTextPipeline`] in three points: a plain text is a question, to which
    the processor's chat template is applied; images are loaded by the processor (transparency is white, 16-bit images
    keep their brightness); an input that is longer than the model allows is refused, or cut with `truncation=True`.
    With processors of other families it is transformers' pipeline.

    Args: as in [`~transformers.ImageTextToTextPipeline`].
    """

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **_with_device(model, kwargs))

    def preprocess(self, inputs=None, timeout=None, continue_final_message=None, **processing_kwargs):
        is_chat = not isinstance(inputs, (str, list, tuple, dict))
        is_continued = is_chat and (continue_final_message or inputs.messages[-1]["role"] == "assistant")
        if is_continued or not hasattr(self.processor, "encode_questions"):
            return super().preprocess(inputs, timeout, continue_final_message, **processing_kwargs)
        options = {"return_tensors": "pt", **(processing_kwargs.pop("processor_kwargs", None) or processing_kwargs)}
        limit = min(_declared_lengths(self.model.config, "encoder").values(), default=None)
        options = {"max_length": limit, **options}
        if is_chat:
            text = inputs
            model_inputs = self.processor.encode_chats(inputs.messages, **options)
        else:
            images, text = (inputs["images"], inputs["text"]) if isinstance(inputs, dict) else (None, inputs)
            if images is not None:
                images = self.processor.image_processor.fetch_images(images, timeout=timeout)
            model_inputs = self.processor.encode_questions(text, images, **options)
        model_inputs = model_inputs.to(dtype=self.dtype)
        model_inputs["text"] = text
        return model_inputs


def _with_device(model, kwargs):
    """Arguments of a pipeline that leave an exported model (one with a `check_tokenizer`) where it was loaded."""
    return {**kwargs, "device": model.device} if hasattr(model, "check_tokenizer") else kwargs


def _without_none(params):
    return {key: value for key, value in params.items() if value is not None}


def _stack_config(config, stack):
    """Return the config of the encoder's or decoder's text model; `config` itself if it is flat."""
    for part in (stack, "text_config"):
        config = getattr(config, part, None) or config
    return config


def _declared_lengths(config, stack):
    """Return the lengths in tokens that a config declares for the encoder or decoder, by field."""
    config = _stack_config(config, stack)
    fields = (f"max_{stack}_position_embeddings", "max_position_embeddings")
    return {f"`{field}` of the config": value for field in fields if (value := getattr(config, field, None) or 0) > 0}


def _check_is_text(text, name):
    if not isinstance(text, str):
        raise TypeError(
            f"{name} is of type {type(text).__name__}, but must be a `str`, or a list, generator or dataset of `str`. "
            'For a column of a dataset pass `KeyDataset(dataset, "column")`.'
        )
    return text


class _TaskAliases(dict):
    """Aliases of the registry, with every `translation_xx_to_yy` for `translation`."""

    def __contains__(self, task):
        return super().__contains__(task) or re.fullmatch("translation_.+_to_.+", task) is not None

    def __missing__(self, task):
        return "translation"


def restore_text2text_pipelines():
    """Restore `pipeline("text2text-generation" | "summarization" | "translation_xx_to_yy", model=...)`.

    Afterwards the three tasks accept any encoder-decoder, including T5 and BART, in the whole process. This is opt-in
    because it changes transformers: the tasks are removed from `transformers.pipelines.REMOVED_TASKS` and added to
    `supported_tasks` and `task_aliases` of `PIPELINE_REGISTRY`. A second call changes nothing. `model` is required:
    there is no default model.

    Raises:
        RuntimeError: This release of transformers stores its tasks elsewhere.
    """
    registry = getattr(pipelines, "PIPELINE_REGISTRY", None)
    removed = getattr(pipelines, "REMOVED_TASKS", {})  # not in older releases of transformers 5
    parts = [removed, *(getattr(registry, name, None) for name in ("supported_tasks", "task_aliases"))]
    if not all(isinstance(part, dict) for part in parts) or not hasattr(registry, "register_pipeline"):
        raise RuntimeError(
            f"transformers {transformers_version} stores its pipeline tasks where this version of encdec_slm does not "
            "find them. Update encdec_slm, or build `Text2TextGenerationPipeline(model=..., tokenizer=...)`."
        )
    for task in RESTORED_TASKS:
        removed.pop(task, None)
        if registry.supported_tasks.get(task, {}).get("impl") is not Text2TextGenerationPipeline:
            registry.register_pipeline(task, Text2TextGenerationPipeline, AutoModelForSeq2SeqLM, type="text")
            if hasattr(Text2TextGenerationPipeline, "_registered_impl"):
                # It would make the folder of every model that a pipeline saves require this file.
                del Text2TextGenerationPipeline._registered_impl
    if "translation_xx_to_yy" not in registry.task_aliases:
        registry.task_aliases = _TaskAliases(registry.task_aliases)


__all__ = ["EncDecVLMPipeline", "Text2TextGenerationPipeline", "restore_text2text_pipelines"]
