# SPDX-License-Identifier: Apache-2.0
"""The text model in vLLM: the encoder of transformers, and a decoder of vLLM's layers with paged caches.

Axes in shape comments: N tokens of all requests in a step, S source, D width, H query heads, K key/value heads, d
width of a head.
"""

import itertools

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.attention import Attention, CrossAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from encdec_slm.modeling_encdec_slm import EncDecSLMEncoder, EncDecSLMRotaryEmbedding, apply_rotary_pos_emb

from .sources import DummySources, SourceInfo, SourceProcessor, encode_in_batch_order


# Types of rotary embeddings whose frequencies depend on the length of the sequence.
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")
# Projections of the decoder that vLLM computes as one, and the part of each.
JOINT_PROJECTIONS = {
    **{f".self_attn.{part}_proj": (".self_attn.qkv_proj", part) for part in "qkv"},
    **{f".cross_attn.{part}_proj": (".cross_attn.kv_proj", part) for part in "kv"},
}
JOINT_GATE = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}


class DecoderMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(self, config):
        super().__init__()
        sizes, options = (config.hidden_size, config.intermediate_size), {"bias": config.mlp_bias}
        self.gated = config.gated_mlp
        if self.gated:
            self.gate_up_proj = MergedColumnParallelLinear(sizes[0], [sizes[1]] * 2, **options)
        else:
            self.up_proj = ColumnParallelLinear(*sizes, **options)
        self.down_proj = RowParallelLinear(*reversed(sizes), **options)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        if self.gated:
            gate_states, up_states = self.gate_up_proj(hidden_states)[0].chunk(2, dim=-1)
            return self.down_proj(self.act_fn(gate_states) * up_states)[0]
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)[0]))[0]


class DecoderAttention(nn.Module):
    """What self-attention and cross-attention share."""

    def __init__(self, config, attention_class, cache_config, prefix):
        super().__init__()
        self.head_dim = config.head_dim
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.attention_out_bias
        )
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.build_projections(config)
        self.attn = attention_class(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
        )

    def split_heads(self, states):
        return states.unflatten(-1, (-1, self.head_dim))  # (N, H or K, d)


class DecoderSelfAttention(DecoderAttention):
    def __init__(self, config, layer_idx, cache_config, prefix):
        super().__init__(config, Attention, cache_config, prefix)
        self.use_rope = config.decoder_no_rope_layers is None or bool(config.decoder_no_rope_layers[layer_idx])

    def build_projections(self, config):
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self.qkv_proj = QKVParallelLinear(config.hidden_size, self.head_dim, *heads, bias=config.attention_bias)
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads

    def forward(self, hidden_states, cos, sin):
        sizes = [count * self.head_dim for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        query_states, key_states, value_states = self.qkv_proj(hidden_states)[0].split(sizes, dim=-1)
        query_states = self.q_norm(self.split_heads(query_states))
        key_states = self.k_norm(self.split_heads(key_states))
        if self.use_rope:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        return self.o_proj(self.attn(query_states.flatten(1), key_states.flatten(1), value_states))[0]


class DecoderCrossAttention(DecoderAttention):
    def __init__(self, config, cache_config, prefix):
        super().__init__(config, CrossAttention, cache_config, prefix)

    def build_projections(self, config):
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = ColumnParallelLinear(size, config.num_attention_heads * self.head_dim, bias=bias)
        self.kv_proj = QKVParallelLinear(size, self.head_dim, 0, config.num_key_value_heads, bias=bias)
        self.num_heads = self.q_proj.output_size_per_partition // self.head_dim
        self.num_kv_heads = self.kv_proj.num_kv_heads

    def forward(self, hidden_states, encoder_hidden_states):
        query_states = self.q_norm(self.split_heads(self.q_proj(hidden_states)[0])).flatten(1)
        key_states = value_states = None  # of sources in the cache
        if encoder_hidden_states is not None:
            key_states, value_states = self.kv_proj(encoder_hidden_states)[0].chunk(2, dim=-1)
            key_states = self.k_norm(self.split_heads(key_states)).flatten(1)
        return self.o_proj(self.attn(query_states, key_states, value_states))[0]


class DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx, cache_config, prefix):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderSelfAttention(config, layer_idx, cache_config, f"{prefix}.self_attn")
        self.pre_cross_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = DecoderCrossAttention(config, cache_config, f"{prefix}.cross_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DecoderMLP(config)

    def forward(self, hidden_states, residual, encoder_hidden_states, cos, sin):
        if residual is None:
            hidden_states, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, cos, sin)
        hidden_states, residual = self.pre_cross_attn_layernorm(hidden_states, residual)
        hidden_states = self.cross_attn(hidden_states, encoder_hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(dynamic_arg_dims={"inputs_embeds": 0, "positions": 0})
class Decoder(nn.Module):
    """Continue the targets of all requests by one step. vLLM compiles steps in which no source is new."""

    def __init__(self, *, vllm_config, prefix):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_idx, vllm_config.cache_config, f"{prefix}.layers.{layer_idx}")
            for layer_idx in range(config.decoder_num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = _build_rotary_table(config, vllm_config.model_config.max_model_len)
        self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states, residual = inputs_embeds, None  # (N, D)
        cos, sin = self.cos[positions], self.sin[positions]
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, encoder_hidden_states, cos, sin)
        return self.norm(hidden_states, residual)[0]


def _build_rotary_table(config, length):
    """Compute cosines and sines of shape `(length, head_dim)`, those of each position as in step-by-step decoding."""
    rotary_emb = EncDecSLMRotaryEmbedding(config)
    positions = torch.arange(length)[None]
    is_length_dependent = rotary_emb.rope_type in LENGTH_DEPENDENT_ROPE_TYPES
    chunks = positions.split(1, dim=1) if is_length_dependent else [positions]
    rows = [rotary_emb(torch.empty(0), chunk) for chunk in chunks]
    return [torch.cat(tensors, dim=1)[0] for tensors in zip(*rows, strict=True)]


@MULTIMODAL_REGISTRY.register_processor(SourceProcessor, info=SourceInfo, dummy_inputs=DummySources)
class EncDecSLMForConditionalGeneration(nn.Module, SupportsMultiModal):
    """Encoder-decoder for vLLM. The encoder runs once per request, in every process of a tensor-parallel group."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        if not vllm_config.use_v2_model_runner:
            encode_in_batch_order()
        with no_init_weights():
            self.encoder = EncDecSLMEncoder(config)
        embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.encoder.set_input_embeddings(embed_tokens)
        self.decoder = Decoder(vllm_config=vllm_config, prefix=f"{prefix}decoder")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @classmethod
    def get_placeholder_str(cls, modality, i):
        return None

    def get_language_model(self):
        return self.decoder

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        return self.encoder.get_input_embeddings()(input_ids)

    def embed_multimodal(self, source_ids, **kwargs):
        """Encode the new sources of a step, each of shape `(source_length,)`, in batches of similar lengths."""
        encodings = [None] * len(source_ids)
        lengths = [len(ids) for ids in source_ids]
        is_length_dependent = self.config.rope_parameters["rope_type"] in LENGTH_DEPENDENT_ROPE_TYPES

        def group(index):  # at most half of a batch is padding
            return lengths[index] if is_length_dependent else lengths[index].bit_length()

        for _, indices in itertools.groupby(sorted(range(len(lengths)), key=group), group):
            indices = list(indices)
            batch = pad_sequence([source_ids[index] for index in indices], batch_first=True)
            batch_lengths = torch.tensor([lengths[index] for index in indices], device=batch.device)
            mask = torch.arange(batch.shape[1], device=batch.device) < batch_lengths[:, None]
            hidden_states = self.encoder(
                inputs_embeds=self.embed_input_ids(batch), attention_mask=mask.long()
            ).last_hidden_state  # (B, S, D)
            for index, states in zip(indices, hidden_states, strict=True):
                encodings[index] = states[: lengths[index]]
        return encodings

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, encoder_outputs=None, **kwargs
    ):
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.decoder(inputs_embeds, positions, torch.cat(encoder_outputs) if encoder_outputs else None)

    def compute_logits(self, hidden_states):
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def load_weights(self, weights):
        joint = JOINT_PROJECTIONS | (JOINT_GATE if self.config.gated_mlp else {})
        mapper = WeightsMapper(orig_to_new_stacked=joint)
        by_part = ((name.removeprefix("model."), weight) for name, weight in weights)
        mapped = (
            pair
            for name, weight in by_part
            for pair in (mapper.apply([(name, weight)]) if name.startswith("decoder.") else [(name, weight)])
        )
        return AutoWeightsLoader(self).load_weights(mapped)
