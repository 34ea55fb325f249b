# SPDX-License-Identifier: Apache-2.0
"""Runs graphs with free lengths in onnxruntime, on tensors that it reads and writes where they lie.

Axes in shape comments: B batch, S source, T target, D width, N tiles, P patches of a tile.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..modeling_encdec_vlm import check_images, merge_image_features, pack_image_features
from .bundles import required
from .onnx_graphs import cache_names


NUMPY_TYPES = {torch.float32: np.float32, torch.int64: np.int64}


class Graph:
    """A graph in onnxruntime: tensors by name in, tensors by name out, none of them copied.

    Args:
        session (`onnxruntime.InferenceSession`): Runs it.
    """

    def __init__(self, session: Any):
        self._session = session

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """The outputs of the graph, float32.

        Args:
            inputs (`Mapping[str, torch.Tensor]`): float32 or int64, on the CPU.
            shapes (`Mapping[str, tuple]`): Of all outputs.
        """
        binding = self._session.io_binding()
        inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
        outputs = {name: torch.empty(shape) for name, shape in shapes.items()}
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                # A tensor without elements has no address, but one is asked for.
                address = tensor.data_ptr() or _SOMEWHERE.data_ptr()
                bind(name, "cpu", 0, NUMPY_TYPES[tensor.dtype], tuple(tensor.shape), address)
        self._session.run_with_iobinding(binding)
        return outputs


_SOMEWHERE = torch.zeros(1)


class BeamCache(EncoderDecoderCache):
    """The two caches of a decoder, of which beam search moves only that of the target.

    All beams of a source read the same keys and values of it.
    """

    def reorder_cache(self, beam_idx: torch.LongTensor):
        self.self_attention_cache.reorder_cache(beam_idx)


class DynamicEngine:
    """Encodes and decodes with the graphs of a bundle whose lengths are free.

    The first step of decoding is a step with an empty cache, so that only one session holds the decoder's weights.

    Args:
        folder (`Path`): Where the bundle lies.
        config ([`~transformers.PreTrainedConfig`]): Of the model.
        open_graph (`Callable[[Path | bytes], Graph]`): Opens a graph, given as a path or as the bytes of it.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig, open_graph: Callable[[Path | bytes], "Graph"]):
        self._config = config.get_text_config()
        depth = self._config.decoder_num_hidden_layers
        self._own, self._cross = (cache_names(depth, "present", stack) for stack in ("decoder", "encoder"))
        self._reader = (ImageReader if config.model_type == "encdec_vlm" else TextReader)(folder, config, open_graph)
        self._cross_graph = open_graph(part_of_graph(folder / "decoder_model.onnx", self._cross))
        self._step = open_graph(folder / "decoder_with_past_model.onnx")

    def encode(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **images: Any
    ) -> BaseModelOutput:
        """The encoder's states.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for tokens that are
                read, 0 for padding. `None` reads all.
            images: `pixel_values` and `image_sizes`, for models that see.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        return BaseModelOutput(last_hidden_state=self._reader(input_ids.long(), mask, **images))

    def new_cache(self, batch_size: int, max_length: int | None = None) -> BeamCache:
        """A cache that holds no token; it takes any number of rows, and of tokens."""
        return BeamCache(DynamicCache(config=self._config), DynamicCache(config=self._config))

    def decode(
        self,
        decoder_input_ids: torch.LongTensor,
        encoding: BaseModelOutput,
        attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache,
    ) -> torch.FloatTensor:
        """Logits of shape `(batch_size, target_length, vocab_size)`; `cache` gets the tokens.

        Args:
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`): What follows the tokens that
                `cache` holds.
            encoding (`BaseModelOutput`): Of the sources, row by row.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): That of the sources.
            cache ([`~transformers.EncoderDecoderCache`]): Is changed.
        """
        states, decoder_input_ids = encoding.last_hidden_state.float(), decoder_input_ids.long()
        mask = torch.ones(states.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask.long()
        for part in (cache.self_attention_cache, cache.cross_attention_cache):
            # A cache that was made without a config gets its layers when they are needed.
            part.layers.extend(
                DynamicLayer() for _ in range(self._config.decoder_num_hidden_layers - len(part.layers))
            )
        if not all(cache.is_updated.get(layer_idx) for layer_idx in range(self._config.decoder_num_hidden_layers)):
            # Sizes of the source are read from all inputs, whichever the exporter took.
            first = {"input_ids": decoder_input_ids, "encoder_attention_mask": mask, "encoder_hidden_states": states}
            self._fill_cross_cache(first, cache)
        batch_size, length = decoder_input_ids.shape
        total = cache.get_seq_length() + length
        own_shape = (batch_size, self._config.num_key_value_heads, total, self._config.head_dim)
        past = self._tensors(self._own, cache.self_attention_cache, (*own_shape[:2], 0, own_shape[3]))
        past |= self._tensors(self._cross, cache.cross_attention_cache)
        outputs = self._step(
            {"input_ids": decoder_input_ids, "encoder_attention_mask": mask, **past},
            {"logits": (batch_size, length, self._config.vocab_size), **dict.fromkeys(self._own, own_shape)},
        )
        _store(cache.self_attention_cache, [outputs[name] for name in self._own])
        return outputs["logits"]

    def _fill_cross_cache(self, inputs, cache):
        batch_size, source_length = inputs["encoder_attention_mask"].shape
        shape = (batch_size, self._config.num_key_value_heads, source_length, self._config.head_dim)
        outputs = self._cross_graph(inputs, dict.fromkeys(self._cross, shape))
        _store(cache.cross_attention_cache, [outputs[name] for name in self._cross])
        cache.is_updated = dict.fromkeys(range(self._config.decoder_num_hidden_layers), True)

    def _tensors(self, names, cache, empty_shape=None):
        tensors = {}
        for layer, key_name, value_name in zip(cache.layers, names[::2], names[1::2], strict=True):
            pair = (layer.keys, layer.values) if layer.get_seq_length() else (torch.empty(empty_shape),) * 2
            tensors |= zip((_past(key_name), _past(value_name)), pair, strict=True)
        return tensors


def _past(name):
    return name.replace("present", "past_key_values")


def _store(cache, tensors):
    for layer, keys, values in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


def part_of_graph(path: Path, names: Sequence[str]) -> bytes:
    """The part of a graph that makes some of its outputs, with its weights.

    Args:
        path (`Path`): Of the graph.
        names (`Sequence[str]`): Of the outputs.

    Raises:
        ValueError: The file is damaged.
    """
    onnx = required("onnx")
    try:
        whole = onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf, which is no package that we name
        raise ValueError(
            f"{path.name} cannot be read ({type(error).__name__}): it is damaged. Copy {str(path.parent)!r} again, or "
            "export again."
        ) from error
    part = onnx.utils.Extractor(whole).extract_model([value.name for value in whole.graph.input], names)
    onnx.load_external_data_for_model(part, str(path.parent))
    return part.SerializeToString()


class TextReader:
    """The encoder of a text model.

    Args: as in [`DynamicEngine`].
    """

    def __init__(self, folder, config, open_graph):
        self.config = config
        self._encoder = open_graph(folder / "encoder_model.onnx")

    def __call__(self, input_ids, attention_mask):
        """States of shape `(B, S, D)`."""
        return self._states({"input_ids": input_ids, "attention_mask": attention_mask})

    def _states(self, inputs):
        shape = (*inputs["attention_mask"].shape, self.config.get_text_config().hidden_size)
        return self._encoder(inputs, {"last_hidden_state": shape})["last_hidden_state"]


class ImageReader(TextReader):
    """The encoder of a vision-text model, which reads embeddings; and how images come to stand among them.

    The geometry of tiles is the model's own code, on features that the graphs give.
    """

    def __init__(self, folder, config, open_graph):
        super().__init__(folder, config, open_graph)
        self._embedding = open_graph(folder / "embed_tokens.onnx")
        self._vision = open_graph(folder / "vision_encoder.onnx")

    def __call__(self, input_ids, attention_mask, pixel_values=None, image_sizes=None):
        """States of shape `(B, S, D)`."""
        embeds = self._embed(input_ids)
        if pixel_values is not None:
            check_images(self.config, pixel_values, image_sizes)
            tile_features, image_newline = self._tile_features(pixel_values)
            features = pack_image_features(self.config, tile_features, image_sizes, image_newline)
            embeds = merge_image_features(self.config, input_ids, embeds, features)
        return self._states({"inputs_embeds": embeds, "attention_mask": attention_mask})

    def _embed(self, input_ids):
        shape = (*input_ids.shape, self.config.text_config.hidden_size)
        return self._embedding({"input_ids": input_ids}, {"inputs_embeds": shape})["inputs_embeds"]

    def _tile_features(self, pixel_values):
        config = self.config
        shapes = {
            "image_features": (len(pixel_values), config.patches_per_side**2, config.text_config.hidden_size),
            **({"image_newline": (config.text_config.hidden_size,)} if config.image_newline else {}),
        }
        outputs = self._vision({"pixel_values": pixel_values.float()}, shapes)
        return outputs["image_features"], outputs.get("image_newline")
