# SPDX-License-Identifier: Apache-2.0
"""An ONNX bundle with the face of a model: transformers' `generate` and pipelines work on it."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedTokenizerBase
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..checkpoint_folders import TOKENIZER_FILES, local_folder
from . import bundles, onnx_export, onnx_static
from .onnx_runtime import DynamicEngine, Graph
from .onnx_static_runtime import StaticCache, StaticEngine


BUNDLE_FILES = ("*.onnx", "*.onnx_data", "*.json", *TOKENIZER_FILES)


class OrtEncDecSLM(GenerationMixin):
    """A model of this family that onnxruntime runs; made by [`OrtEncDecSLM.from_pretrained`].

    Like the model that it was exported from it has `config`, `generation_config` and `generate` (greedy, beams,
    sampling, streamers), and stands in pipelines. Inputs and outputs are torch tensors on the CPU.

    Args:
        engine ([`DynamicEngine`] or [`StaticEngine`]): Runs the graphs.
        config ([`~transformers.PreTrainedConfig`]): That of the exported model.
        generation_config ([`~transformers.GenerationConfig`]): Likewise.
        manifest (`dict`): Of the bundle.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    _is_stateful = False
    # transformers asks whether it may warn of code from the Hub.
    _auto_class = None
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, engine: Any, config: Any, generation_config: GenerationConfig, manifest: dict[str, Any]):
        self._engine = engine
        self.config = config
        self.generation_config = generation_config
        self.manifest = manifest
        self.input_modalities = ("text",) if config.model_type == "encdec_slm" else ("image", "text")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, providers: Sequence[str] | None = None) -> "OrtEncDecSLM":
        """The model of a folder that `export_onnx` wrote; it runs on as many threads as torch does.

        Args:
            name_or_path (`str` or `Path`): The bundle, of free or of fixed lengths; or its name on the Hub.
            providers (`Sequence[str]`, *optional*): Execution providers of onnxruntime, the preferred one first.
                `None` means the CPU.

        Raises:
            ValueError: The folder is no ONNX bundle, a file of it is missing or damaged, or this onnxruntime has no
                such provider.
            ImportError: The `export` extra is not installed.
        """
        folder = local_folder(name_or_path, BUNDLE_FILES)
        manifest = bundles.read_manifest(folder, onnx_export.FORM, onnx_static.FORM)
        open_session = functools.partial(_session, providers=_checked_providers(providers))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if manifest["format"] == onnx_static.FORM:
            engine = StaticEngine(folder, manifest, lambda path: functools.partial(open_session(path).run, None))
        else:
            engine = DynamicEngine(folder, config, lambda graph: Graph(open_session(graph)))
        return cls(engine, config, GenerationConfig.from_pretrained(folder), manifest)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer that is not the one that the model was exported with.

        Raises:
            ValueError: Its ids mean other tokens.
        """
        bundles.check_tokenizer(self.manifest, tokenizer)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    def get_encoder(self, modality: str | None = None) -> "OrtEncoder":
        """What `generate` calls once per source."""
        return OrtEncoder(self._engine, self.config)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Any | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """Next-token logits of shape `(batch_size, target_length, vocab_size)`, and the cache.

        Args: as in [`~encdec_slm.EncDecSLMForConditionalGeneration.forward`]; `pixel_values` and `image_sizes` are for
            models that see.

        Raises:
            ValueError: There is no source or no target, they do not fit together, lie on another device than the CPU,
                an id lies outside of the vocabulary, or attentions or hidden states are asked for, which no graph
                gives.
            TypeError: `past_key_values` is a cache for decoder-only models.
        """
        _check_outputs(output_attentions, output_hidden_states)
        if encoder_outputs is None:
            images = {"pixel_values": pixel_values, "image_sizes": image_sizes}
            encoder_outputs = self.get_encoder()(input_ids, attention_mask, **images)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        _check_target(decoder_input_ids, encoder_outputs.last_hidden_state, attention_mask, self.config)
        cache = self._engine.new_cache(len(decoder_input_ids)) if past_key_values is None else past_key_values
        _check_cache(cache)
        logits = self._engine.decode(decoder_input_ids, encoder_outputs, attention_mask, cache)
        return Seq2SeqLMOutput(
            logits=logits,
            past_key_values=None if use_cache is False else cache,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
        )

    __call__ = forward

    def _optimize_model_for_decode(self):
        return contextlib.nullcontext()  # transformers would look for experts among modules

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        # A caller's `max_new_tokens` replaces the bound of this family; that is no conflict to warn of.
        if generation_config.max_new_tokens and generation_config.max_length == self.generation_config.max_length:
            generation_config.max_length = None
        return super()._prepare_generated_length(generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f'`cache_implementation="{generation_config.cache_implementation}"` was given, but the graphs of an '
                "export bring their own cache. Leave it out."
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            num_rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs["past_key_values"] = self._engine.new_cache(num_rows, generation_config.max_length)


class OrtEncoder:
    """The encoder of an exported model, for `generate`.

    Args:
        engine ([`DynamicEngine`] or [`StaticEngine`]): Runs the graphs.
        config ([`~transformers.PreTrainedConfig`]): Of the model.
    """

    main_input_name = "input_ids"

    def __init__(self, engine, config):
        self._engine = engine
        self._config = config

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """The states of sources, of shape `(batch_size, source_length, hidden_size)`.

        Args and Raises: as in [`OrtEncDecSLM.forward`].
        """
        _check_outputs(output_attentions, output_hidden_states)
        _check_source(input_ids, attention_mask, self._config)
        if pixel_values is None and image_sizes is None:
            return self._engine.encode(input_ids, attention_mask)
        if self._config.model_type != "encdec_vlm":
            raise ValueError(
                "`pixel_values` or `image_sizes` is given, but this bundle is of a text model. Leave them out, or "
                "load the export of a vision-text model."
            )
        return self._engine.encode(input_ids, attention_mask, pixel_values=pixel_values, image_sizes=image_sizes)

    __call__ = forward


def _checked_providers(providers):
    available = bundles.required("onnxruntime").get_available_providers()
    providers = ["CPUExecutionProvider"] if providers is None else list(providers)
    if unknown := [name for name in providers if name not in available] or not providers:
        raise ValueError(
            f"`providers` is {providers}, but this onnxruntime has {', '.join(available)}. Choose among them, or "
            f"install the build of onnxruntime that has {unknown[0] if unknown is not True else 'yours'}."
        )
    return providers


def _session(graph, providers):
    """A session for a graph, given as a path or as bytes."""
    onnxruntime = bundles.required("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    name = "decoder_model.onnx" if isinstance(graph, bytes) else graph.name
    try:
        return onnxruntime.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options, providers)
    except Exception as error:  # its classes have no common base of their own
        raise ValueError(
            f"{name} cannot be loaded by onnxruntime ({' '.join(str(error).split())[:200]}): it is damaged, or "
            "made for a newer onnxruntime. Export again, or update onnxruntime."
        ) from error


def _check_outputs(output_attentions, output_hidden_states):
    asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    if names := [name for name, value in asked.items() if value]:
        raise ValueError(
            f"`{names[0]}` is True, but the graphs of an export give logits and caches only. Load the checkpoint with "
            "transformers for it."
        )


def _check_source(input_ids, attention_mask, config):
    if input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(
            f"`input_ids` is {'not given' if shape is None else f'of shape {shape}'}, but the encoder needs tokens to "
            "read, of shape (batch_size, source_length). Pass what the tokenizer returns."
        )
    _check_mask(attention_mask, input_ids.shape)
    _check_ids(input_ids, "input_ids", config)


def _check_mask(attention_mask, shape):
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but the source has {tuple(shape)} (rows, "
            "tokens), and each token needs a 1 or a 0. Pass what the tokenizer returns."
        )


def _check_ids(ids, name, config):
    vocab_size = config.get_text_config().vocab_size
    if ids.device.type != "cpu":
        raise ValueError(f'`{name}` lies on {ids.device}, but an export reads tensors on the CPU. Pass `.to("cpu")`.')
    lowest, highest = (bound.item() for bound in ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`{name}` has ids from {lowest} to {highest}, but the vocabulary has ids 0 to {vocab_size - 1}. Use the "
            "tokenizer that lies in the folder of the export."
        )


def _check_cache(cache):
    if not isinstance(cache, (EncoderDecoderCache, StaticCache)):
        raise TypeError(
            f"`past_key_values` is a {type(cache).__name__}, but an encoder-decoder keeps two caches. Pass what an "
            "earlier call returned, or `EncoderDecoderCache(DynamicCache(), DynamicCache())`."
        )


def _check_target(decoder_input_ids, states, attention_mask, config):
    if decoder_input_ids is None or 0 in decoder_input_ids.shape:
        raise ValueError(
            "`decoder_input_ids` has no tokens, but the decoder needs at least one, such as `decoder_start_token_id`. "
            "For text call `generate`."
        )
    if len(decoder_input_ids) != len(states):
        raise ValueError(
            f"There are {len(states)} sources and {len(decoder_input_ids)} targets, but row by row each target "
            "belongs to a source. Give equally many."
        )
    _check_mask(attention_mask, states.shape[:2])
    _check_ids(decoder_input_ids, "decoder_input_ids", config)
