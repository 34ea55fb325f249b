# SPDX-License-Identifier: Apache-2.0
"""Run graphs with free lengths: encode sources, and decode with a growing cache.

Axes in shape comments: B batch, S source, T target, D width, N tiles, P patches of a tile.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..errors import summarize_error
from ..modeling_encdec_vlm import check_images, merge_image_features, pack_image_features
from .bundles import import_engine
from .onnx_graphs import cache_names
from .onnx_tracing import WEIGHTS_FILE


# A graph of any runtime: tensors by input name and shapes by output name -> float32 tensors by output name.
RunGraph = Callable[[Mapping[str, torch.Tensor], Mapping[str, tuple[int, ...]]], dict[str, torch.Tensor]]
# Opens the graph in a file; given names of outputs, only the part that computes them.
OpenGraph = Callable[[Path, Sequence[str] | None], RunGraph]
NUMPY_TYPES = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}
WEIGHTS_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
# A tensor without elements has no address, but onnxruntime requires one.
_PLACEHOLDER = torch.zeros(1)


def check_providers(providers: Sequence[str] | None) -> list[str]:
    """Return execution providers of onnxruntime; the CPU for `None`.

    Raises:
        ValueError: This onnxruntime does not have one of them.
    """
    available = import_engine("onnxruntime").get_available_providers()
    providers = ["CPUExecutionProvider"] if providers is None else list(providers)
    if not providers or any(name not in available for name in providers):
        raise ValueError(
            f"`providers` is {providers}, but this onnxruntime has {', '.join(available)}. Choose one of them, or "
            "install another build of onnxruntime."
        )
    return providers


def open_onnxruntime_graph(path: Path, outputs: Sequence[str] | None = None, *, providers: Sequence[str]) -> RunGraph:
    """Open a graph in onnxruntime, on as many threads as torch uses.

    Args:
        path (`Path`): ONNX file.
        outputs (`Sequence[str]`, *optional*): Load only the part of the graph that computes these outputs.
        providers (`Sequence[str]`): Execution providers.

    Raises:
        ValueError: The file is damaged, or made for a newer onnxruntime.
    """
    onnxruntime = import_engine("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    graph, weights = str(path), path.parent / WEIGHTS_FILE
    try:
        if outputs is not None or has_links(path.parent):
            # onnxruntime refuses weights outside of the folder of the graph.
            weights = weights.resolve()
            graph = _load_graph(path, outputs, weights.name)
            options.add_session_config_entry(WEIGHTS_FOLDER_OPTION, str(weights.parent))
        return partial(_run_session, onnxruntime.InferenceSession(graph, options, providers))
    except Exception as error:  # the errors of onnxruntime and protobuf have no common base
        raise ValueError(
            f"{path.name} cannot be loaded by onnxruntime ({summarize_error(error)}). The file is damaged, or made "
            "for a newer onnxruntime: export again, or update onnxruntime."
        ) from error


def has_links(folder: Path) -> bool:
    """Return whether files of an export are links, as in the Hub's cache."""
    return any(path.is_symlink() for path in folder.glob("*.onnx*"))


def _load_graph(path, outputs, weights_name):
    """Return a graph, or its part that computes some outputs, as bytes that refer to another file of weights."""
    onnx = import_engine("onnx")
    model = onnx.load(path, load_external_data=False)
    if outputs is not None:
        inputs = [value.name for value in model.graph.input]
        model = onnx.utils.Extractor(model).extract_model(inputs, list(outputs))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights_name
    return model.SerializeToString()


def _run_session(session, inputs, shapes):
    """Run a session on the memory of torch tensors, without copies."""
    binding = session.io_binding()
    inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
    outputs = {name: torch.empty(shape) for name, shape in shapes.items()}
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            address = tensor.data_ptr() or _PLACEHOLDER.data_ptr()
            bind(name, "cpu", 0, NUMPY_TYPES[tensor.dtype], tuple(tensor.shape), address)
    session.run_with_iobinding(binding)
    return outputs


class BeamCache(EncoderDecoderCache):
    """Caches of a decoder of which beam search reorders only that of the target: beams share their source."""

    def reorder_cache(self, beam_idx: torch.LongTensor):
        self.self_attention_cache.reorder_cache(beam_idx)


class DynamicEngine:
    """Encodes and decodes with graphs whose lengths are free.

    The first decoding step is a later step with an empty cache, so that the weights of the decoder are loaded once.

    Args:
        folder (`Path`): Folder of the export.
        config ([`~transformers.PreTrainedConfig`]): Config of the exported model.
        open_graph (`OpenGraph`): Opens a graph in a runtime.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig, open_graph: OpenGraph):
        self._config = config.get_text_config()
        depth = self._config.decoder_num_hidden_layers
        self._self_names, self._cross_names = (
            cache_names(depth, "present", stack) for stack in ("decoder", "encoder")
        )
        reader_class = ImageReader if config.model_type == "encdec_vlm" else TextReader
        self._reader = reader_class(folder, config, open_graph)
        self._cross_graph = open_graph(folder / "decoder_model.onnx", self._cross_names)
        self._step_graph = open_graph(folder / "decoder_with_past_model.onnx", None)

    def encode(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **images: Any
    ) -> BaseModelOutput:
        """Return the encoder's states.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for tokens, 0 for
                padding. `None` reads all.
            images: `pixel_values` and `image_sizes` for vision-text models.
        """
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).long()
        return BaseModelOutput(last_hidden_state=self._reader(input_ids.long(), mask, **images))

    def new_cache(self, batch_size: int, max_length: int | None = None) -> BeamCache:
        """Return an empty cache, for any number of rows and tokens."""
        return BeamCache(DynamicCache(config=self._config), DynamicCache(config=self._config))

    def decode(
        self,
        decoder_input_ids: torch.LongTensor,
        encoding: BaseModelOutput,
        attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache,
    ) -> torch.FloatTensor:
        """Return logits of shape `(batch_size, target_length, vocab_size)`, and add the tokens to `cache`.

        Args:
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`): The tokens after those in
                `cache`.
            encoding (`BaseModelOutput`): Encoded sources, one per row.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): Mask of the sources.
            cache ([`~transformers.EncoderDecoderCache`]): Extended in place.
        """
        states, input_ids, config = encoding.last_hidden_state.float(), decoder_input_ids.long(), self._config
        mask = torch.ones(states.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask.long()
        for part in (cache.self_attention_cache, cache.cross_attention_cache):
            # A cache that was made without a config has no layers yet.
            part.layers.extend(DynamicLayer() for _ in range(config.decoder_num_hidden_layers - len(part.layers)))
        if not all(cache.is_updated.get(layer_idx) for layer_idx in range(config.decoder_num_hidden_layers)):
            self._fill_cross_cache(input_ids, mask, states, cache)
        batch_size, length = input_ids.shape
        shape = (batch_size, config.num_key_value_heads, cache.get_seq_length() + length, config.head_dim)
        past = _past_tensors(self._self_names, cache.self_attention_cache, (*shape[:2], 0, shape[3]))
        past |= _past_tensors(self._cross_names, cache.cross_attention_cache)
        outputs = self._step_graph(
            {"input_ids": input_ids, "encoder_attention_mask": mask, **past},
            {"logits": (batch_size, length, config.vocab_size), **dict.fromkeys(self._self_names, shape)},
        )
        _store(cache.self_attention_cache, [outputs[name] for name in self._self_names])
        return outputs["logits"]

    def _fill_cross_cache(self, input_ids, mask, states, cache):
        shape = (*mask.shape[:1], self._config.num_key_value_heads, mask.shape[1], self._config.head_dim)
        # All inputs of the whole graph: the part keeps those that it reads sizes from.
        inputs = {"input_ids": input_ids, "encoder_attention_mask": mask, "encoder_hidden_states": states}
        outputs = self._cross_graph(inputs, dict.fromkeys(self._cross_names, shape))
        _store(cache.cross_attention_cache, [outputs[name] for name in self._cross_names])
        cache.is_updated = dict.fromkeys(range(self._config.decoder_num_hidden_layers), True)


def _past_tensors(names, cache, empty_shape=None):
    names = [name.replace("present", "past_key_values") for name in names]
    tensors = {}
    for layer, key_name, value_name in zip(cache.layers, names[::2], names[1::2], strict=True):
        pair = (layer.keys, layer.values) if layer.get_seq_length() else (torch.empty(empty_shape),) * 2
        tensors |= zip((key_name, value_name), pair, strict=True)
    return tensors


def _store(cache, tensors):
    for layer, keys, values in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


class TextReader:
    """The encoder of a text model.

    Args: as in [`DynamicEngine`].
    """

    def __init__(self, folder, config, open_graph):
        self.config = config
        self._encoder = open_graph(folder / "encoder_model.onnx", None)

    def __call__(self, input_ids, attention_mask):
        """Return states of shape `(B, S, D)`."""
        return self._run_encoder({"input_ids": input_ids, "attention_mask": attention_mask})

    def _run_encoder(self, inputs):
        shape = (*inputs["attention_mask"].shape, self.config.get_text_config().hidden_size)
        return self._encoder(inputs, {"last_hidden_state": shape})["last_hidden_state"]


class ImageReader(TextReader):
    """The encoder of a vision-text model, which reads embeddings."""

    def __init__(self, folder, config, open_graph):
        super().__init__(folder, config, open_graph)
        self._embedding = open_graph(folder / "embed_tokens.onnx", None)
        self._vision = open_graph(folder / "vision_encoder.onnx", None)

    def __call__(self, input_ids, attention_mask, pixel_values=None, image_sizes=None):
        """Return states of shape `(B, S, D)`."""
        shape = (*input_ids.shape, self.config.text_config.hidden_size)
        embeds = self._embedding({"input_ids": input_ids}, {"inputs_embeds": shape})["inputs_embeds"]
        if pixel_values is not None:
            check_images(self.config, pixel_values, image_sizes)
            features = pack_image_features(self.config, *self._encode_tiles(pixel_values, image_sizes))
            embeds = merge_image_features(self.config, input_ids, embeds, features)
        return self._run_encoder({"inputs_embeds": embeds, "attention_mask": attention_mask})

    def _encode_tiles(self, pixel_values, image_sizes):
        config = self.config
        shapes = {"image_features": (len(pixel_values), config.patches_per_side**2, config.text_config.hidden_size)}
        if config.image_newline:
            shapes["image_newline"] = (config.text_config.hidden_size,)
        outputs = self._vision({"pixel_values": pixel_values.float()}, shapes)
        return outputs["image_features"], image_sizes, outputs.get("image_newline")
