# SPDX-License-Identifier: Apache-2.0
"""The decoder-only baseline (Llama or Qwen3) in CTranslate2 and ONNX, with a cache and as few operators as ours."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..export.bundles import import_engine
from ..export.ctranslate2_converter import ACTIVATIONS, has_qk_norm, set_linear, set_mlp, set_self_attention
from ..export.onnx_graphs import (
    cache_names,
    causal_mask,
    fill_cache,
    flatten_caches,
    pair_layers,
    set_plain_attention,
)
from ..export.onnx_quantization import compress_weights
from ..export.onnx_runtime import RunGraph
from ..export.onnx_tracing import Graph, SharedWeights, trace
from ..export.ort_genai import GRAPH, build_config


def build_decoder_only_spec(model: PreTrainedModel) -> Any:
    """Build the `ctranslate2.specs.TransformerDecoderModelSpec` of a Llama, or of a Qwen3 with or without norms."""
    config = model.config
    spec = import_engine("ctranslate2.specs.transformer_spec").TransformerDecoderModelSpec.from_config(
        config.num_hidden_layers,
        config.num_attention_heads,
        activation=import_engine("ctranslate2.specs.common_spec").Activation[ACTIVATIONS[config.hidden_act]],
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=config.head_dim,
        rotary_interleave=False,
        rotary_base=config.rope_parameters["rope_theta"],
        num_heads_kv=config.num_key_value_heads if config.num_key_value_heads < config.num_attention_heads else None,
        head_dim=config.head_dim,
        qk_norm=has_qk_norm(model.model.layers[0].self_attn),
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = model.model.embed_tokens.weight
    decoder.layer_norm.gamma = model.model.norm.weight
    for layer_spec, layer in zip(decoder.layer, model.model.layers, strict=True):
        set_self_attention(layer_spec.self_attention, layer)
        set_mlp(layer_spec.ffn, layer)
    set_linear(decoder.projection, model.lm_head)
    spec.register_vocabulary([f"<id_{token_id}>" for token_id in range(config.vocab_size)])
    spec.config.bos_token, spec.config.unk_token, spec.config.eos_token = "<id_1>", "<id_0>", "<no end token>"
    spec.config.layer_norm_epsilon = config.rms_norm_eps
    return spec


class DecoderOnlyGraph(Graph):
    """New ids and cached keys and values -> logits of the last id, and the grown cache.

    With a cache of length 0 the same graph reads the prompt.
    """

    def __init__(self, model):
        config = model.config
        past, present = (
            dict.fromkeys(
                cache_names(config.num_hidden_layers, prefix, "decoder"),
                (1, config.num_key_value_heads, length, config.head_dim),
            )
            for prefix, length in (("past_key_values", "past_length"), ("present", "past_length + target_length"))
        )
        super().__init__({"input_ids": (1, "target_length"), **past}, {"logits": (1, 1, config.vocab_size), **present})
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids, past_key_values):
        cache = fill_cache(pair_layers(past_key_values))
        positions, mask = causal_mask(input_ids.shape[1], past_key_values[0].shape[2])
        hidden_states = self.model(
            input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return self.lm_head(hidden_states[:, -1])[:, None], *flatten_caches(cache)


def export_decoder_only(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Export a Llama or Qwen3 to an ONNX file with inputs `input_ids` and `past_key_values.*`, for batches of 1.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU; its attention implementation is changed.
        folder (`Path`): Gets the graph and its weights.
        name (`str`): File name of the graph.
    """
    set_plain_attention(model)
    SharedWeights(folder).write_graph(trace(DecoderOnlyGraph(model)), name)


def export_decoder_only_genai(model: PreTrainedModel, folder: Path, quantization: str) -> None:
    """Export a Llama or Qwen3 to a folder that onnxruntime-genai loads, for batches of 1.

    Args: as in [`export_decoder_only`], and
        quantization (`str`): As in [`~encdec_slm.export.export_ort_genai`].
    """
    set_plain_attention(model)
    graph = trace(DecoderOnlyGraph(model))
    compress_weights(graph, quantization)
    SharedWeights(folder).write_graph(graph, GRAPH)
    config = build_config(model, model.config.num_hidden_layers, "%d.decoder")
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")


def time_decoder_only_tokens(
    graph: RunGraph,
    config: PreTrainedConfig,
    source_ids: Sequence[int],
    num_new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[int]]:
    """Generate greedily; return the seconds from the call to each new token, and the tokens.

    Args:
        graph ([`~encdec_slm.export.onnx_runtime.RunGraph`]): A graph of [`export_decoder_only`] in an engine.
        config ([`~transformers.PreTrainedConfig`]): Config of the model.
        source_ids (`Sequence[int]`): The prompt.
        num_new_tokens (`int`): Number of tokens to generate.
        clock (`Callable`, *optional*, defaults to `time.perf_counter`): Returns the seconds.
    """
    start, seconds, token_ids = clock(), [], []
    names = cache_names(config.num_hidden_layers, "present", "decoder")
    shape = [1, config.num_key_value_heads, 0, config.head_dim]
    cache, ids = [torch.zeros(shape)] * len(names), torch.tensor([source_ids])
    for _ in range(num_new_tokens):
        past = {name.replace("present", "past_key_values"): tensor for name, tensor in zip(names, cache, strict=True)}
        shape[2] += ids.shape[1]
        shapes = {"logits": (1, 1, config.vocab_size), **dict.fromkeys(names, tuple(shape))}
        outputs = graph({"input_ids": ids, **past}, shapes)
        ids, cache = outputs["logits"].argmax(-1), [outputs[name] for name in names]
        seconds.append(clock() - start)
        token_ids.append(ids.item())
    return seconds, token_ids
