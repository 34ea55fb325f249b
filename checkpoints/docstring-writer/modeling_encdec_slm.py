# SPDX-License-Identifier: Apache-2.0
"""Text encoder-decoder: a deep bidirectional encoder and a shallow causal decoder that reads it by cross-attention.

Axes in shape comments: B batch, S source, T target, D width, H query heads, K key/value heads, d width of a head,
V vocabulary.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_encdec_slm import EncDecSLMConfig
from .generation_encdec_slm import EncDecSLMGenerationMixin


if TYPE_CHECKING:
    # Nothing here calls the pipeline; naming it makes `save_pretrained` copy its file beside this one.
    from .pipeline_encdec_slm import Text2TextGenerationPipeline  # noqa: F401


class EncDecSLMRMSNorm(nn.Module):
    """`x / rms(x)` computed in fp32 and rounded to the input's dtype before the gain."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        normed = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        return self.weight * normed.to(hidden_states.dtype)


class EncDecSLMRotaryEmbedding(nn.Module):
    """Cosines and sines that turn queries and keys; computed in fp32 from positions, without a table."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_fn(config)
        # transformers rebuilds both buffers under these names after a load from the meta device.
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs):
        """Inverse frequencies of shape `(head_dim // 2,)`, in radians per position, and a scaling of 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn, recurse=True):
        """A cast of the model leaves the frequencies in fp32: rounded, cosines at position 1000 are off by 0.15."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32 and not self.inv_freq.is_meta:
            init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
            self.inv_freq = init_fn(self.config)[0].to(self.inv_freq.device)
            self.original_inv_freq = self.inv_freq.clone()
            self.max_seq_len_cached = self.original_max_seq_len
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * inv_freq  # (B, T, d / 2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # (B, 1, T, d)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def _rotate(states, cos, sin):
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, `(B, T, H, d)` and its probabilities `(B, H, T, S)`; the only backend that shows them."""
    batch_size, num_heads, length, head_dim = query.shape
    grouped = query.reshape(batch_size, key.shape[1], -1, head_dim)  # (B, K, H / K * T, d)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).view(batch_size, num_heads, length, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    output = torch.matmul(probabilities.view(batch_size, key.shape[1], -1, key.shape[2]), value)
    return output.view(batch_size, num_heads, length, head_dim).transpose(1, 2).contiguous(), probabilities


class EncDecSLMAttention(nn.Module):
    """Grouped-query attention: over the hidden states themselves, or over the encoder's when these are given."""

    def __init__(self, config, layer_idx, is_causal=False, use_rope=True):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.use_rope = use_rope
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = EncDecSLMRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = EncDecSLMRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def _split_heads(self, states):
        return states.view(*states.shape[:-1], -1, self.head_dim)  # (B, T, H or K, d)

    def _keys_and_values(self, states):
        key = self.k_norm(self._split_heads(self.k_proj(states))).transpose(1, 2)
        return key, self._split_heads(self.v_proj(states)).transpose(1, 2)  # (B, K, S, d) each

    def _self_keys_and_values(self, hidden_states, position_embeddings, past_key_values):
        key, value = self._keys_and_values(hidden_states)
        if self.use_rope:
            key = _rotate(key, *position_embeddings)
        if past_key_values is None:
            return key, value
        return past_key_values.self_attention_cache.update(key, value, self.layer_idx)

    def _cross_keys_and_values(self, encoder_hidden_states, past_key_values):
        if past_key_values is None:
            return self._keys_and_values(encoder_hidden_states)
        if past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self._keys_and_values(encoder_hidden_states)
        past_key_values.is_updated[self.layer_idx] = True
        return past_key_values.cross_attention_cache.update(key, value, self.layer_idx)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        encoder_hidden_states=None,
        **kwargs,
    ):
        query = self.q_norm(self._split_heads(self.q_proj(hidden_states))).transpose(1, 2)  # (B, H, T, d)
        if self.use_rope:
            query = _rotate(query, *position_embeddings)
        if encoder_hidden_states is None:
            key, value = self._self_keys_and_values(hidden_states, position_embeddings, past_key_values)
        else:
            key, value = self._cross_keys_and_values(encoder_hidden_states, past_key_values)
        # Of one token, query heads that share a key become rows of one query: CPU kernels then read keys once. With a
        # mask transformers does so itself.
        backend = self.config._attn_implementation
        is_folded = backend == "sdpa" and attention_mask is None and query.shape[2] == 1
        if is_folded:
            query = query.reshape(-1, key.shape[1], self.num_key_value_groups, self.head_dim)  # (B, K, H / K, d)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        output, probabilities = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal and not is_folded,
            **kwargs,
        )
        if is_folded:
            output = output.transpose(1, 2).flatten(1, 2)[:, None]  # (B, 1, H, d)
        return self.o_proj(output.flatten(-2)), probabilities


class EncDecSLMMLP(nn.Module):
    """Two matrices around an activation, or three with a gate."""

    def __init__(self, config):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.mlp_dropout)
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gated = config.gated_mlp

    def forward(self, hidden_states):
        up = self.up_proj(hidden_states)
        inner = self.act_fn(self.gate_proj(hidden_states)) * up if self.gated else self.act_fn(up)
        return self.dropout(self.down_proj(inner))


def _uses_rope(config, stack, layer_idx):
    layers = getattr(config, f"{stack}_no_rope_layers")
    return layers is None or bool(layers[layer_idx])


class EncDecSLMEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = EncDecSLMAttention(config, layer_idx, use_rope=_uses_rope(config, "encoder", layer_idx))
        self.post_attention_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = EncDecSLMMLP(config)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, attention_mask, position_embeddings, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class EncDecSLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        use_rope = _uses_rope(config, "decoder", layer_idx)
        self.self_attn = EncDecSLMAttention(config, layer_idx, is_causal=True, use_rope=use_rope)
        self.pre_cross_attn_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = EncDecSLMAttention(config, layer_idx, use_rope=False)
        self.post_attention_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = EncDecSLMMLP(config)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,  # positional, so that gradient checkpointing keeps its gradient
        attention_mask=None,
        encoder_attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        **kwargs,
    ):
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, attention_mask, position_embeddings, past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        normed = self.pre_cross_attn_layernorm(hidden_states)
        attended, _ = self.cross_attn(
            normed, encoder_attention_mask, None, past_key_values, encoder_hidden_states, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


AUTO_MAP = {
    "AutoConfig": "configuration_encdec_slm.EncDecSLMConfig",
    "AutoModel": "modeling_encdec_slm.EncDecSLMModel",
    "AutoModelForSeq2SeqLM": "modeling_encdec_slm.EncDecSLMForConditionalGeneration",
    "AutoModelForTextEncoding": "modeling_encdec_slm.EncDecSLMEncoderModel",
}
CUSTOM_PIPELINES = {
    "text2text-generation": {
        "impl": "pipeline_encdec_slm.Text2TextGenerationPipeline",
        "pt": ["AutoModelForSeq2SeqLM"],
        "type": "text",
    }
}


class EncDecSLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every model of this family: backends, devices, how it is saved."""

    config: EncDecSLMConfig
    config_class = EncDecSLMConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncDecSLMEncoderLayer", "EncDecSLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # What config.json says of the code in a folder: the Auto classes and the pipelines that find it.
    _folder_entries = {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The model of a folder or Hub repository.

        Args: as in [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            OSError: A weight file is missing or damaged.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            # Known by name, since a file that ships with checkpoints imports nothing beyond transformers' own needs.
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(
                f"A *.safetensors file of {str(pretrained_model_name_or_path)!r} is damaged ({error}): it was cut off "
                "while it was downloaded or copied, or it is a Git LFS pointer. Fetch it again; from the Hub with "
                "`force_download=True`."
            ) from error

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves weights, config, generation config and the code files that load them, as one Hub folder.

        Args: as in [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            TypeError: This is a part of a model, which no Auto class could load.
            ValueError: torchao's `quantize_` has replaced weights.
        """
        if self._auto_class is None:
            raise TypeError(
                f"{type(self).__name__} is a part of a model and cannot be loaded by itself. Save the whole model; "
                "`EncDecSLMEncoderModel.from_pretrained` reads the encoder from it."
            )
        in_place = getattr(self, "hf_quantizer", None) is None
        if in_place and any(type(parameter).__module__.startswith("torchao.") for parameter in self.parameters()):
            raise ValueError(
                "`quantize_` has replaced weights by torchao's tensors, but only a model that was quantized on "
                "loading can be saved. Save it before, then load that folder with "
                "`quantization_config=TorchAoConfig(...)` and save the result."
            )
        # The folder answers to every Auto class and to the pipeline, whatever this model itself was loaded from.
        for name, entries in self._folder_entries.items():
            setattr(self.config, name, copy.deepcopy(entries))
        super().save_pretrained(save_directory, *args, **kwargs)


class EncDecSLMEncoder(EncDecSLMPreTrainedModel):
    """Reads the source. Holds the family's one embedding table, since it alone is used without a decoder."""

    _can_record_outputs = {"attentions": EncDecSLMAttention, "hidden_states": EncDecSLMEncoderLayer}
    _tp_plan = {
        **{f"layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")},
        **{f"layers.*.mlp.{name}": "colwise" for name in ("gate_proj", "up_proj")},
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            EncDecSLMEncoderLayer(config, layer_idx) for layer_idx in range(config.encoder_num_hidden_layers)
        )
        self.norm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = EncDecSLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        if not config.gated_mlp:
            self._tp_plan.pop("layers.*.mlp.gate_proj")

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "The encoder needs exactly one of `input_ids` and `inputs_embeds`, but got "
                f"{'neither' if input_ids is None else 'both'}. A decoder that is to reuse an earlier encoding takes "
                "`encoder_outputs` instead."
            )
        if inputs_embeds is None:
            _check_token_ids(input_ids, self.config.vocab_size, "input_ids")
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds  # (B, S, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, position_embeddings=position_embeddings, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class EncDecSLMDecoder(EncDecSLMPreTrainedModel):
    """Continues the target from embeddings: the embedding table is the encoder's."""

    _can_record_outputs = {
        "attentions": OutputRecorder(EncDecSLMAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(EncDecSLMAttention, index=1, layer_name="cross_attn"),
        "hidden_states": EncDecSLMDecoderLayer,
    }
    _tp_plan = {
        **EncDecSLMEncoder._tp_plan,
        **{f"layers.*.cross_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")},
        "layers.*.cross_attn.o_proj": "rowwise",
    }

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(
            EncDecSLMDecoderLayer(config, layer_idx) for layer_idx in range(config.decoder_num_hidden_layers)
        )
        self.norm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = EncDecSLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        if not config.gated_mlp:
            self._tp_plan.pop("layers.*.mlp.gate_proj")

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=None,
        **kwargs,
    ):
        if use_cache and past_key_values is None and not self.training:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if position_ids is None:
            seen_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen_length
        mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values=past_key_values, position_ids=position_ids
        )
        cross_mask = create_bidirectional_mask(
            self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds  # (B, T, D)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=mask,
                encoder_attention_mask=cross_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class EncDecSLMModel(EncDecSLMPreTrainedModel):
    """Encoder and decoder without an output head.

    Args:
        config ([`EncDecSLMConfig`]): Sizes; it is not changed.
    """

    _auto_class = "AutoModel"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = EncDecSLMEncoder(config)
        self.decoder = EncDecSLMDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """The decoder's hidden states for a source and a target.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`, *optional*): Source tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for source tokens
                that are read, 0 for padding, on either side; masks the cross-attention too. `None` reads all.
            position_ids (`torch.LongTensor` of shape `(batch_size, source_length)`, *optional*): Source positions;
                only their differences matter. `None` counts from 0.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): Target tokens,
                beginning with `decoder_start_token_id`; with a cache only those that it does not hold.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, cached_length + target_length)`,
                *optional*): 1 for target tokens that later ones may read.
            decoder_position_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): Target
                positions. `None` counts on from the cache.
            encoder_outputs (`BaseModelOutput`, *optional*): An earlier encoding, read instead of a source.
            past_key_values ([`~transformers.EncoderDecoderCache`], *optional*): Keys and values so far; extended in
                place. Cross keys and values are computed once and kept.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, source_length, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, hidden_size)`,
                *optional*): Embeddings in place of `decoder_input_ids`.
            use_cache (`bool`, *optional*): Make a cache when none is given, outside of training. `None` reads the
                config.

        Raises:
            ValueError: There is no source, no target, both forms of one, or more of the one than of the other; an id
                lies outside of the vocabulary.
            TypeError: `past_key_values` is a cache for decoder-only models.
        """
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise TypeError(
                f"`past_key_values` is a {type(past_key_values).__name__}, but an encoder-decoder keeps two caches. "
                "Pass `EncoderDecoderCache(self_attention_cache, cross_attention_cache)`."
            )
        if encoder_outputs is None:
            encoder_outputs = self._encode(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        target_embeds = self._embed_target(decoder_input_ids, decoder_inputs_embeds, past_key_values)
        num_sources, num_targets = encoder_outputs.last_hidden_state.shape[0], target_embeds.shape[0]
        if num_sources != num_targets:
            raise ValueError(
                f"There are {num_sources} sources and {num_targets} targets, but row by row each target belongs to a "
                "source. Give equally many."
            )
        decoder_outputs = self.decoder(
            inputs_embeds=target_embeds,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _encode(self, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs):
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                "Neither `input_ids`, `inputs_embeds` nor `encoder_outputs` is given, but the decoder needs a source "
                "to read. Pass source tokens, or the `encoder_outputs` of an earlier call."
            )
        return self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)

    def _embed_target(self, decoder_input_ids, decoder_inputs_embeds, past_key_values):
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError(
                "The decoder needs exactly one of `decoder_input_ids` and `decoder_inputs_embeds`, but got "
                f"{'neither' if decoder_input_ids is None else 'both'}. For training pass `labels`; with "
                "label smoothing use `DataCollatorForSeq2Seq(tokenizer, model=model)`; for text call `generate`."
            )
        if decoder_inputs_embeds is not None:
            return decoder_inputs_embeds
        # Generated ids are the model's own; on an accelerator, checking them would wait for it at every token.
        if past_key_values is None or decoder_input_ids.device.type == "cpu":
            _check_token_ids(decoder_input_ids, self.config.get_text_config().vocab_size, "decoder_input_ids")
        return self.get_input_embeddings()(decoder_input_ids)


class EncDecSLMEncoderModel(EncDecSLMPreTrainedModel):
    """The encoder alone, for embeddings and retrieval; loads from any checkpoint of this family.

    Args:
        config ([`EncDecSLMConfig`]): Sizes; it is not changed.
    """

    _auto_class = "AutoModelForTextEncoding"
    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config):
        super().__init__(config)
        self.encoder = EncDecSLMEncoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """One vector per source token: `last_hidden_state` of shape `(batch_size, source_length, hidden_size)`.

        Args: as in [`EncDecSLMModel.forward`]. Rows of padding are to be left out by whoever pools.
        """
        return self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)


class EncDecSLMForConditionalGeneration(EncDecSLMPreTrainedModel, EncDecSLMGenerationMixin):
    """Encoder and decoder with an output head over the vocabulary; trains on `labels` and generates.

    Args:
        config ([`EncDecSLMConfig`]): Sizes; it is not changed.
    """

    _auto_class = "AutoModelForSeq2SeqLM"
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config):
        super().__init__(config)
        self.model = EncDecSLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        # The base class guesses a loss from the class name, one that would shift the labels a second time.
        self.loss_type = "ForMaskedLM"
        self._set_default_length()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Next-token logits of shape `(batch_size, target_length, vocab_size)` and, with `labels`, the loss.

        Args: those of [`EncDecSLMModel.forward`], and
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): The tokens to predict, from
                the first target token to the end-of-text token; -100 is not supervised. The decoder's input is made
                from them by one shift to the right, unless it is given.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Score only the last so many positions,
                or those of an index; 0 scores all.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): Supervised tokens of the accumulated batch, by
                which the summed loss is divided. `None` counts `labels`.

        Returns:
            [`~transformers.modeling_outputs.Seq2SeqLMOutput`]: `loss` in nats per supervised token; 0 when none is.

        Raises:
            ValueError: As in [`EncDecSLMModel.forward`]; or `labels` and the decoder's input differ in length.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            _check_target_lengths(labels, decoder_input_ids, decoder_inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self._loss(logits, labels[:, kept], num_items_in_batch, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def _loss(self, logits, labels, num_items_in_batch, **kwargs):
        vocab_size = self.config.get_text_config().vocab_size
        _check_token_ids(labels.clamp(min=0), vocab_size, "labels")
        if num_items_in_batch is None:
            num_items_in_batch = (labels != -100).sum()
        # A batch without supervision has loss 0 instead of 0 / 0.
        num_items_in_batch = torch.as_tensor(num_items_in_batch, device=logits.device).clamp(min=1)
        return self.loss_function(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Shift labels to the right: the start token, then all labels but the last; -100 becomes padding.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`): Unshifted; -100 is not supervised.

        Raises:
            ValueError: The config has no `decoder_start_token_id`, or no `pad_token_id` although it is needed.
        """
        config = self.config.get_text_config()
        if config.decoder_start_token_id is None:
            raise ValueError(_missing_token_message(config, "decoder_start_token_id", "starts every target"))
        if config.pad_token_id is None and (labels[:, :-1] == -100).any():
            raise ValueError(_missing_token_message(config, "pad_token_id", "replaces labels of -100"))
        start_ids = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
        previous = labels[:, :-1]
        if config.pad_token_id is not None:
            previous = previous.masked_fill(previous == -100, config.pad_token_id)
        return torch.cat((start_ids, previous), dim=1)


def _missing_token_message(config, name, use):
    return (
        f"`{name}` of the {type(config).__name__} is None, but it {use} when the decoder's input is made from "
        f"`labels`. Set it to a token id, or pass `decoder_input_ids` beside `labels`."
    )


def _check_token_ids(token_ids, vocab_size, name):
    if torch.compiler.is_compiling() or token_ids.device.type == "meta" or token_ids.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in token_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`{name}` has ids from {lowest} to {highest}, but the vocabulary has ids 0 to {vocab_size - 1}. Use the "
            "tokenizer of this checkpoint, or `resize_token_embeddings` after adding tokens to it."
        )


def _check_target_lengths(labels, decoder_input_ids, decoder_inputs_embeds):
    given = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
    if given.shape[:2] != labels.shape:
        name = "decoder_input_ids" if decoder_input_ids is not None else "decoder_inputs_embeds"
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, `{name}` {tuple(given.shape[:2])} (rows, tokens), but one "
            f"predicts the other position by position. Leave `{name}` out to have it made from `labels`."
        )


__all__ = ["EncDecSLMEncoderModel", "EncDecSLMForConditionalGeneration", "EncDecSLMModel", "EncDecSLMPreTrainedModel"]
