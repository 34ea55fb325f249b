# SPDX-License-Identifier: Apache-2.0
"""Run an ONNX export in onnxruntime with the interface of a model: `generate` of transformers and pipelines."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..export_manifest import find_export
from ..generation_encdec_slm import EncDecSLMGenerationMixin
from .exported_model import ExportedModel, check_attention_mask, check_token_ids
from .onnx_export import FORMAT, STATIC_FORMAT
from .onnx_runtime import DynamicEngine, OpenGraph, check_providers, open_onnxruntime_graph
from .onnx_static_runtime import StaticCache, StaticEngine


FORMATS = (FORMAT, STATIC_FORMAT)


class OrtEncDecSLM(ExportedModel, EncDecSLMGenerationMixin):
    """A model of this family that onnxruntime runs; load it with [`OrtEncDecSLM.from_pretrained`].

    It has the `config`, `generation_config` and `generate` of the exported model (greedy search, beams, sampling,
    streamers, stop strings), and works in pipelines. Inputs and outputs are torch tensors on the CPU. Several threads
    may call `generate` at the same time.

    Args:
        engine ([`DynamicEngine`] or [`StaticEngine`]): Runs the graphs.
        config ([`~transformers.PreTrainedConfig`]): Config of the exported model.
        generation_config ([`~transformers.GenerationConfig`]): Defaults of `generate`.
        manifest (`dict`): Manifest of the export.
    """

    base_model_prefix = "model"
    _is_stateful = False
    # Read by transformers before it warns about code from the Hub.
    _auto_class = None

    def __init__(self, engine: Any, config: Any, generation_config: GenerationConfig, manifest: dict[str, Any]):
        super().__init__(config, generation_config, manifest)
        self._engine = engine

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        providers: Sequence[str] | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> "OrtEncDecSLM":
        """Load an ONNX export, with free lengths or of fixed shape; it uses as many threads as torch.

        Args:
            name_or_path (`str` or `Path`): Folder of the export, or a repository on the Hub that has it at its top or
                in `onnx/`.
            providers (`Sequence[str]`, *optional*): Execution providers of onnxruntime, the preferred one first.
                `None` means the CPU.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            subfolder (`str`, *optional*): Folder of the export within the repository or folder.

        Raises:
            ValueError: There is no such export, a file is missing or damaged, or a provider is not available.
            ImportError: A package of the `export` extra is not installed.
        """
        open_graph = partial(open_onnxruntime_graph, providers=check_providers(providers))
        folder, manifest = find_export(name_or_path, FORMATS, revision=revision, subfolder=subfolder)
        return cls._from_graphs(folder, manifest, open_graph)

    @classmethod
    def _from_graphs(cls, folder: Path, manifest: dict[str, Any], open_graph: OpenGraph):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if manifest["format"] == STATIC_FORMAT:
            engine = StaticEngine(folder, manifest, open_graph)
        else:
            engine = DynamicEngine(folder, config, open_graph)
        return cls(engine, config, GenerationConfig.from_pretrained(folder), manifest)

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    def generate(self, inputs: torch.Tensor | None = None, **kwargs) -> Any:
        """Generate on the CPU; see [`~transformers.GenerationMixin.generate`]. Tensors are moved there."""
        return super().generate(self._move(inputs), **{name: self._move(value) for name, value in kwargs.items()})

    def get_encoder(self, modality: str | None = None) -> "OrtEncoder":
        """Return what `generate` calls once per source."""
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
        """Compute next-token logits of shape `(batch_size, target_length, vocab_size)`, and the cache.

        Args: as in [`~encdec_slm.EncDecSLMForConditionalGeneration.forward`]; `pixel_values` and `image_sizes` are for
            vision-text models.

        Raises:
            ValueError: There is no source or no target, they do not fit together or are not on the CPU, an id is not
                in the vocabulary, or attentions or hidden states are requested, which no graph returns.
            TypeError: `past_key_values` is a cache for decoder-only models, or ids are not integers.
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

    def prepare_inputs_for_generation(self, *args, tokenizer=None, assistant_tokenizer=None, **kwargs):
        # transformers passes the tokenizers of stop strings on to the model.
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _optimize_model_for_decode(self):
        return contextlib.nullcontext()  # transformers would look for experts among modules

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        # An export has its own cache; the one that transformers would use changes no result.
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            num_rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs["past_key_values"] = self._engine.new_cache(num_rows, generation_config.max_length)


class OrtEncoder:
    """The encoder of an exported model, for `generate`.

    Args:
        engine ([`DynamicEngine`] or [`StaticEngine`]): Runs the graphs.
        config ([`~transformers.PreTrainedConfig`]): Config of the exported model.
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
        """Encode sources into states of shape `(batch_size, source_length, hidden_size)`.

        Args and Raises: as in [`OrtEncDecSLM.forward`].
        """
        _check_outputs(output_attentions, output_hidden_states)
        if input_ids is None or input_ids.numel() == 0:
            raise ValueError("`input_ids` has no tokens, but the encoder needs some. Pass what the tokenizer returns.")
        check_token_ids(input_ids, "input_ids", self._config)
        check_attention_mask(attention_mask, input_ids.shape)
        if pixel_values is None and image_sizes is None:
            return self._engine.encode(input_ids, attention_mask)
        if self._config.model_type != "encdec_vlm":
            raise ValueError(
                "`pixel_values` or `image_sizes` is given, but this is the export of a text model. Leave them out, or "
                "load the export of a vision-text model."
            )
        if pixel_values is None or image_sizes is None:
            raise ValueError("Only one of `pixel_values` and `image_sizes` is given. Pass what the processor returns.")
        return self._engine.encode(input_ids, attention_mask, pixel_values=pixel_values, image_sizes=image_sizes)

    __call__ = forward


def _check_outputs(output_attentions, output_hidden_states):
    requested = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    if names := [name for name, value in requested.items() if value]:
        raise ValueError(
            f"`{names[0]}` is True, but the graphs of an export return logits and caches only. Use the model in "
            "transformers."
        )


def _check_cache(cache):
    if not isinstance(cache, (EncoderDecoderCache, StaticCache)):
        raise TypeError(
            f"`past_key_values` is a {type(cache).__name__}, but an encoder-decoder has two caches. Pass what an "
            "earlier call returned, or `EncoderDecoderCache(DynamicCache(), DynamicCache())`."
        )


def _check_target(decoder_input_ids, states, attention_mask, config):
    if decoder_input_ids is None or decoder_input_ids.numel() == 0:
        raise ValueError(
            "`decoder_input_ids` has no tokens, but the decoder needs at least one, such as `decoder_start_token_id`. "
            "For text call `generate`."
        )
    check_token_ids(decoder_input_ids, "decoder_input_ids", config)
    if len(decoder_input_ids) != len(states):
        raise ValueError(
            f"There are {len(states)} sources and {len(decoder_input_ids)} targets, but each target has one source. "
            "Give equally many."
        )
    check_attention_mask(attention_mask, states.shape[:2])
