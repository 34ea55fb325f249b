# SPDX-License-Identifier: Apache-2.0
"""The decoder-only twin in the engines that ours runs in, with a cache and as lean: the opponent of a benchmark."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..export.bundles import required
from ..export.ctranslate2_converter import ACTIVATIONS
from ..export.onnx_graphs import ATTENTION, TensorCache, additive_mask, cache_names, flat
from ..export.onnx_static import quiet_export


def decoder_only_spec(model: PreTrainedModel) -> Any:
    """The `ctranslate2.specs.TransformerDecoderModelSpec` of a Llama, or of a Qwen3 whose norms may be left out."""
    specs = required("ctranslate2.specs.transformer_spec")
    config = model.config
    spec = specs.TransformerDecoderModelSpec.from_config(
        config.num_hidden_layers,
        config.num_attention_heads,
        activation=required("ctranslate2.specs.common_spec").Activation[ACTIVATIONS[config.hidden_act]],
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=config.head_dim,
        rotary_interleave=False,
        rotary_base=config.rope_parameters["rope_theta"],
        num_heads_kv=config.num_key_value_heads if config.num_key_value_heads < config.num_attention_heads else None,
        head_dim=config.head_dim,
        qk_norm=hasattr(_q_norm(model.model.layers[0]), "weight"),
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = model.model.embed_tokens.weight
    decoder.layer_norm.gamma = model.model.norm.weight
    for layer_spec, layer in zip(decoder.layer, model.model.layers, strict=True):
        _set_layer(layer_spec, layer)
    _set_linear(decoder.projection, model.lm_head)
    spec.register_vocabulary([f"<id_{token_id}>" for token_id in range(config.vocab_size)])
    spec.config.bos_token, spec.config.unk_token, spec.config.eos_token = "<id_1>", "<id_0>", "<nothing ends a text>"
    spec.config.layer_norm_epsilon = config.rms_norm_eps
    return spec


def _q_norm(layer):
    return getattr(layer.self_attn, "q_norm", None)


def _set_layer(spec, layer):
    attention = layer.self_attn
    spec.self_attention.layer_norm.gamma = layer.input_layernorm.weight
    _set_linear(spec.self_attention.linear[0], attention.q_proj, attention.k_proj, attention.v_proj)
    _set_linear(spec.self_attention.linear[1], attention.o_proj)
    if hasattr(_q_norm(layer), "weight"):
        spec.self_attention.q_norm.gamma = attention.q_norm.weight
        spec.self_attention.k_norm.gamma = attention.k_norm.weight
    spec.ffn.layer_norm.gamma = layer.post_attention_layernorm.weight
    _set_linear(spec.ffn.linear_0, layer.mlp.gate_proj)
    _set_linear(spec.ffn.linear_0_noact, layer.mlp.up_proj)
    _set_linear(spec.ffn.linear_1, layer.mlp.down_proj)


def _set_linear(spec, *modules):
    spec.weight = torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight
    if modules[0].bias is not None:
        spec.bias = torch.cat([module.bias for module in modules])


class DecoderOnlyGraph(nn.Module):
    """New ids and what is cached in, logits of the last of them and the grown cache out.

    Keys and values of an empty cache have length 0: one graph reads the prompt and writes every token.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids, past_key_values):
        pairs = zip(past_key_values[::2], past_key_values[1::2], strict=True)
        cache = TensorCache(len(self.model.layers), list(pairs))
        num_cached, num_new = past_key_values[0].shape[2], input_ids.shape[1]
        positions = torch.arange(num_new) + num_cached
        mask = additive_mask(torch.arange(num_cached + num_new) <= positions[:, None])[None, None]
        hidden_states = self.model.embed_tokens(input_ids)
        rotations = self.model.rotary_emb(hidden_states, positions[None])
        for layer in self.model.layers:
            hidden_states = layer(
                hidden_states, attention_mask=mask, past_key_values=cache, position_embeddings=rotations
            )
        return self.lm_head(self.model.norm(hidden_states[:, -1])), *flat(cache)


def export_decoder_only(model: PreTrainedModel, path: Path) -> None:
    """Writes a Llama or Qwen3 as one ONNX file with inputs `input_ids` and `past_key_values.*`, for batches of 1."""
    graph, config = DecoderOnlyGraph(model).eval(), model.config
    backend, config._attn_implementation = config._attn_implementation, ATTENTION
    shape = (1, config.num_key_value_heads, 3, config.head_dim)
    past = [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]
    names = ["input_ids", *cache_names(config.num_hidden_layers, "past_key_values", "decoder")]
    with quiet_export():
        program = torch.onnx.export(
            graph,
            (torch.ones(1, 2, dtype=torch.int64), past),
            dynamo=True,
            dynamic_shapes=({1: torch.export.Dim.DYNAMIC}, [{2: torch.export.Dim.DYNAMIC}] * len(past)),
            input_names=names,
            output_names=["logits", *cache_names(config.num_hidden_layers, "present", "decoder")],
            verbose=False,
        )
    config._attn_implementation = backend
    program.save(str(path), external_data=True)


def decoder_only_token_seconds(
    graph: Callable[..., dict[str, torch.Tensor]],
    config: PreTrainedConfig,
    source_ids: Sequence[int],
    num_new_tokens: int,
) -> tuple[list[float], list[int]]:
    """Seconds from the call until each of the new tokens is known, by greedy search; and these tokens.

    Args:
        graph ([`~encdec_slm.export.onnx_runtime.Graph`]): What `export_decoder_only` wrote, in an engine.
        config ([`~transformers.PreTrainedConfig`]): Of the model.
        source_ids (`Sequence[int]`): The prompt.
        num_new_tokens (`int`): It writes as many.
    """
    start, seconds, written = time.perf_counter(), [], []
    names = cache_names(config.num_hidden_layers, "present", "decoder")
    shape = [1, config.num_key_value_heads, 0, config.head_dim]
    cache, ids = [torch.zeros(shape)] * len(names), torch.tensor([source_ids])
    for _ in range(num_new_tokens):
        past = {name.replace("present", "past_key_values"): tensor for name, tensor in zip(names, cache, strict=True)}
        shape[2] += ids.shape[1]
        shapes = {"logits": (1, config.vocab_size), **dict.fromkeys(names, tuple(shape))}
        outputs = graph({"input_ids": ids, **past}, shapes)
        ids, cache = outputs["logits"].argmax(-1, keepdim=True), [outputs[name] for name in names]
        seconds.append(time.perf_counter() - start)
        written.append(ids.item())
    return seconds, written
