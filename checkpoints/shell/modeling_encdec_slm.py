# SPDX-License-Identifier: Apache-2.0
"""Text encoder-decoder: a deep bidirectional encoder, and a shallow causal decoder that reads it by cross-attention.

Axes in shape comments: B batch, S source, T target, D width, H query heads, K key/value heads, d width of a head,
V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
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
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_encdec_slm import EncDecSLMConfig
from .generation_encdec_slm import EncDecSLMGenerationMixin


if TYPE_CHECKING:
    # Not used here. The import makes `save_pretrained` copy the file of the pipelines beside this one.
    from .pipeline_encdec_slm import Text2TextGenerationPipeline  # noqa: F401


class EncDecSLMRMSNorm(nn.Module):
    """`x / rms(x)` in fp32, cast back before the gain."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        return self.weight * normed.to(hidden_states.dtype)


class EncDecSLMRotaryEmbedding(nn.Module):
    """Cosines and sines for the rotation of queries and keys, computed in fp32 from positions."""

    def __init__(self, config: EncDecSLMConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        rope_init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init_fn(config)
        # transformers rebuilds both buffers by these names after loading on the meta device.
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: EncDecSLMConfig, device: torch.device | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies of shape `(head_dim // 2,)`, in radians per position, and a scaling of 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn, recurse=True):
        # Frequencies stay in fp32 when the model is cast: rounded to bf16, cosines at position 1000 are off by 0.15.
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32 and not self.inv_freq.is_meta:
            rope_init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
            self.inv_freq = rope_init_fn(self.config)[0].to(self.inv_freq.device)
            self.original_inv_freq = self.inv_freq.clone()
            self.max_seq_len_cached = self.original_max_seq_len
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat((freqs, freqs), dim=-1)  # (B, T, d)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    query_states: torch.Tensor, key_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries `(B, H, T, d)` and keys `(B, K, T, d)` by the angles of their positions, `(B, T, d)`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query_states = query_states * cos + rotate_half(query_states) * sin
    key_states = key_states * cos + rotate_half(key_states) * sin
    return query_states, key_states


class EncDecSLMMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(self, config: EncDecSLMConfig):
        super().__init__()
        self.gated = config.gated_mlp
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.mlp_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up_states = self.up_proj(hidden_states)
        if self.gated:
            return self.dropout(self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * up_states))
        return self.dropout(self.down_proj(self.act_fn(up_states)))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_packed: bool = False,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operators, the only backend that returns its weights.

    Queries without any key attend evenly to all, as in the predecessor; if `is_packed`, to none, as in other backends.

    Returns:
        The output `(B, T, H, d)` and the weights `(B, H, T, S)`.
    """
    batch_size, num_heads, length, head_dim = query.shape
    # Query heads that share a key become rows of one query instead of repeating the key.
    grouped = query.reshape(batch_size, key.shape[1], -1, head_dim)  # (B, K, H / K * T, d)
    attn_weights = torch.matmul(grouped, key.transpose(2, 3)).view(batch_size, num_heads, length, -1) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    if is_packed:
        attn_weights = attn_weights.masked_fill(attention_mask < 0, 0.0)
    attn_weights = F.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights.view(batch_size, key.shape[1], -1, key.shape[2]), value)
    attn_output = attn_output.view(batch_size, num_heads, length, head_dim).transpose(1, 2).contiguous()
    return attn_output, attn_weights


class EncDecSLMAttention(nn.Module):
    """Grouped-query attention: self-attention, or cross-attention when `key_value_states` is given."""

    def __init__(self, config: EncDecSLMConfig, layer_idx: int, is_causal: bool = False, use_rope: bool = True):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.use_rope = use_rope
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = EncDecSLMRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = EncDecSLMRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        key_value_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query_states = self.q_norm(self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim)).transpose(1, 2)

        is_cross_attention = key_value_states is not None
        cache, is_cached = None, False
        if past_key_values is not None and is_cross_attention:
            cache, is_cached = past_key_values.cross_attention_cache, past_key_values.is_updated.get(self.layer_idx)
        elif past_key_values is not None:
            cache = past_key_values.self_attention_cache

        if is_cached:  # the source was projected for the first token
            key_states, value_states = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            current_states = key_value_states if is_cross_attention else hidden_states
            hidden_shape = (*current_states.shape[:-1], -1, self.head_dim)
            key_states = self.k_norm(self.k_proj(current_states).view(hidden_shape)).transpose(1, 2)  # (B, K, S, d)
            value_states = self.v_proj(current_states).view(hidden_shape).transpose(1, 2)

        if self.use_rope:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)

        if cache is not None and not is_cached:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
            if is_cross_attention:
                past_key_values.is_updated[self.layer_idx] = True

        # CPU kernels read each key once if the query heads that share it are rows of one query. With a mask,
        # transformers' own sdpa arranges them in this way.
        attn_implementation = self.config._attn_implementation
        is_folded = attn_implementation == "sdpa" and attention_mask is None and query_states.shape[2] == 1
        if is_folded:
            query_states = query_states.reshape(-1, key_states.shape[1], self.num_key_value_groups, self.head_dim)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal and not is_folded,
            **kwargs,
        )
        if is_folded:
            attn_output = attn_output.transpose(1, 2)  # (B, K, H / K, d)

        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1))
        return attn_output, attn_weights


class EncDecSLMEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EncDecSLMConfig, layer_idx: int):
        super().__init__()
        use_rope = config.encoder_no_rope_layers is None or bool(config.encoder_no_rope_layers[layer_idx])
        self.input_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = EncDecSLMAttention(config, layer_idx, use_rope=use_rope)
        self.post_attention_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = EncDecSLMMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, attention_mask, position_embeddings, **kwargs)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        return residual + self.mlp(hidden_states)


class EncDecSLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EncDecSLMConfig, layer_idx: int):
        super().__init__()
        use_rope = config.decoder_no_rope_layers is None or bool(config.decoder_no_rope_layers[layer_idx])
        self.input_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = EncDecSLMAttention(config, layer_idx, is_causal=True, use_rope=use_rope)
        self.pre_cross_attn_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = EncDecSLMAttention(config, layer_idx, use_rope=False)
        self.post_attention_layernorm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = EncDecSLMMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,  # positional, so that gradient checkpointing keeps its gradient
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,  # instead of those of self-attention
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states, attention_mask, position_embeddings, past_key_values, **kwargs
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.pre_cross_attn_layernorm(hidden_states)
        hidden_states, _ = self.cross_attn(
            hidden_states,
            encoder_attention_mask,
            past_key_values=past_key_values,
            key_value_states=encoder_hidden_states,
            **(kwargs | (cross_attention_kwargs or {})),
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        return residual + self.mlp(hidden_states)


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
ATTENTION_TP_PLAN = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise"),
    **dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce"),  # each process norms its own heads
    "o_proj": "rowwise",
}
LAYER_TP_PLAN = {
    **{f"layers.*.self_attn.{name}": style for name, style in ATTENTION_TP_PLAN.items()},
    **{f"layers.*.mlp.{name}": "colwise" for name in ("gate_proj", "up_proj")},
    "layers.*.mlp.down_proj": "rowwise",
}


class EncDecSLMPreTrainedModel(PreTrainedModel):
    """Capabilities of the models of this family, and how they are loaded and saved."""

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
    # Entries of config.json that point to the code in the folder.
    _folder_entries = {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}

    def post_init(self):
        super().post_init()
        config = self.config.get_text_config()
        missing = () if config.gated_mlp else ("gate_proj",)
        missing += () if config.qk_norm else ("q_norm", "k_norm")
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if not name.endswith(missing)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model from a folder or from the Hub.

        Args: as in [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            OSError: A weight file is missing or damaged.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # of a package that this file does not import
                raise
            raise OSError(
                f"A *.safetensors file of {str(pretrained_model_name_or_path)!r} is damaged ({error}). It was cut off "
                "during a download or copy, or it is a Git LFS pointer. Fetch it again; from the Hub with "
                "`force_download=True`."
            ) from error

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, config, generation config and the code files that load them, as one Hub folder.

        Args: as in [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            TypeError: This is a part of a model, which no Auto class could load.
            ValueError: Weights were quantized in place, for example by torchao's `quantize_`.
        """
        if self._auto_class is None:
            raise TypeError(
                f"{type(self).__name__} is a part of a model and cannot be loaded by itself. Save the whole model; "
                "`EncDecSLMEncoderModel.from_pretrained` reads the encoder from it."
            )
        if getattr(self, "hf_quantizer", None) is None and any(map(_is_quantized_in_place, self.parameters())):
            raise ValueError(
                "Weights were quantized in place, for example by torchao's `quantize_`, but only a model that was "
                "quantized on loading can be saved. Save it before, then load that folder with "
                "`quantization_config=TorchAoConfig(...)` and save the result."
            )
        # The folder serves every Auto class and the pipeline, whatever this model was loaded from.
        for name, entries in self._folder_entries.items():
            setattr(self.config, name, copy.deepcopy(entries))
        super().save_pretrained(save_directory, *args, **kwargs)


def _is_quantized_in_place(parameter):
    # Sharded tensors (DTensor) are wrappers too, and can be saved.
    return is_traceable_wrapper_subclass(parameter) and not hasattr(parameter, "device_mesh")


def segment_positions(segment_ids: torch.LongTensor) -> torch.LongTensor:
    """Count the positions of each segment from 0."""
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = positions.masked_fill(~starts_segment(segment_ids), 0).cummax(dim=1).values
    return positions - starts  # (B, T)


def starts_segment(segment_ids: torch.LongTensor) -> torch.BoolTensor:
    """Mark the first token of each segment."""
    return segment_ids.diff(prepend=segment_ids[:, :1] - 1) != 0  # (B, T)


def segment_mask_function(query_segment_ids: torch.LongTensor, key_segment_ids: torch.LongTensor) -> Callable:
    """Let queries attend to keys of the same segment, as an `and_mask_function` of transformers' masks."""

    def is_same_segment(batch_idx, head_idx, q_idx, kv_idx):
        return query_segment_ids[batch_idx, q_idx] == key_segment_ids[batch_idx, kv_idx]

    return is_same_segment


def segment_kwargs(config, query_segment_ids, key_segment_ids) -> dict[str, Any]:
    """Return what attention needs beside a mask: flash attention takes the boundaries of segments instead of one."""
    if config._attn_implementation == "eager":
        return {"is_packed": True}
    if not is_flash_attention_requested(config):
        return {}
    kwargs, num_segments = {}, 1 + max(int(query_segment_ids.max()), int(key_segment_ids.max()))
    for name, segment_ids in (("q", query_segment_ids), ("k", key_segment_ids)):
        lengths = segment_ids.new_zeros(len(segment_ids), num_segments)
        lengths = lengths.scatter_add(1, segment_ids, torch.ones_like(segment_ids)).flatten()
        # Segments of the flattened batch, row after row; those that a row does not have are empty.
        kwargs[f"cu_seq_lens_{name}"] = F.pad(lengths.cumsum(0), (1, 0)).int()
        kwargs[f"max_length_{name}"] = int(lengths.max())
    return kwargs


class EncDecSLMEncoder(EncDecSLMPreTrainedModel):
    """Encode the source. Holds the one embedding table of the model, since it alone is used without a decoder."""

    _can_record_outputs = {"attentions": EncDecSLMAttention, "hidden_states": EncDecSLMEncoderLayer}
    # The table is sharded like the output head, which may be tied to it.
    _tp_plan = {"embed_tokens": "embedding_rowwise", **LAYER_TP_PLAN}
    _pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(self, config: EncDecSLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            EncDecSLMEncoderLayer(config, layer_idx) for layer_idx in range(config.encoder_num_hidden_layers)
        )
        self.norm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = EncDecSLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "The encoder needs exactly one of `input_ids` and `inputs_embeds`, but got "
                f"{'neither' if input_ids is None else 'both'}. To reuse an earlier encoding, pass `encoder_outputs` "
                "to the whole model."
            )
        if inputs_embeds is None:
            check_token_ids(input_ids, self.config.vocab_size, "input_ids")
            inputs_embeds = self.embed_tokens(input_ids)
        mask_function = None
        if segment_ids is not None:
            check_segment_ids(segment_ids, inputs_embeds, attention_mask, "segment_ids")
            position_ids = segment_positions(segment_ids) if position_ids is None else position_ids
            mask_function = segment_mask_function(segment_ids, segment_ids)
            kwargs |= segment_kwargs(self.config, segment_ids, segment_ids)
        elif position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask, and_mask_function=mask_function)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds  # (B, S, D)
        for encoder_layer in self.layers:
            hidden_states = encoder_layer(hidden_states, mask, position_embeddings=position_embeddings, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class EncDecSLMDecoder(EncDecSLMPreTrainedModel):
    """Continue the target, given as embeddings: the embedding table belongs to the encoder."""

    _can_record_outputs = {
        "attentions": OutputRecorder(EncDecSLMAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(EncDecSLMAttention, index=1, layer_name="cross_attn"),
        "hidden_states": EncDecSLMDecoderLayer,
    }
    _tp_plan = {
        **LAYER_TP_PLAN,
        **{f"layers.*.cross_attn.{name}": style for name, style in ATTENTION_TP_PLAN.items()},
    }
    _pp_plan = {
        "layers": (
            ["hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"],
            ["hidden_states"],
        ),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(self, config: EncDecSLMConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            EncDecSLMDecoderLayer(config, layer_idx) for layer_idx in range(config.decoder_num_hidden_layers)
        )
        self.norm = EncDecSLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = EncDecSLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.LongTensor | None = None,
        encoder_segment_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        mask_function = cross_mask_function = cross_attention_kwargs = None
        if segment_ids is not None:
            use_cache = False  # a packed row has no next token
            check_segment_ids(segment_ids, inputs_embeds, attention_mask, "decoder_segment_ids", past_key_values)
            check_segment_ids(encoder_segment_ids, encoder_hidden_states, encoder_attention_mask, "segment_ids")
            position_ids = segment_positions(segment_ids) if position_ids is None else position_ids
            mask_function = segment_mask_function(segment_ids, segment_ids)
            cross_mask_function = segment_mask_function(segment_ids, encoder_segment_ids)
            kwargs |= segment_kwargs(self.config, segment_ids, segment_ids)
            cross_attention_kwargs = segment_kwargs(self.config, segment_ids, encoder_segment_ids)
        if use_cache and past_key_values is None and not self.training:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
        mask = create_causal_mask(  # without positions, from which it would infer packing
            self.config, inputs_embeds, attention_mask, past_key_values, and_mask_function=mask_function
        )
        cross_mask = create_bidirectional_mask(
            self.config,
            inputs_embeds,
            encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            and_mask_function=cross_mask_function,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds  # (B, T, D)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=mask,
                encoder_attention_mask=cross_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                cross_attention_kwargs=cross_attention_kwargs,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class EncDecSLMModel(EncDecSLMPreTrainedModel):
    """Encoder and decoder without an output head.

    Args:
        config ([`EncDecSLMConfig`]): Sizes; it is not changed.
        encoder (`nn.Module`, *optional*): Used instead of an [`EncDecSLMEncoder`].
    """

    _auto_class = "AutoModel"

    def __init__(self, config: EncDecSLMConfig, encoder: nn.Module | None = None):
        super().__init__(config)
        self.encoder = EncDecSLMEncoder(config) if encoder is None else encoder
        self.decoder = EncDecSLMDecoder(config.get_text_config())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.set_input_embeddings(value)

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
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """Compute the decoder's hidden states for a source and a target.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`, *optional*): Source tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for source tokens
                that are read, 0 for padding, on either side; also masks the cross-attention. `None` reads all.
            position_ids (`torch.LongTensor` of shape `(batch_size, source_length)`, *optional*): Source positions;
                only their differences matter. `None` counts from 0.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): Target tokens,
                beginning with `decoder_start_token_id`; with a cache only those that it does not hold.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, cached_length + target_length)`,
                *optional*): 1 for target tokens that later ones may read.
            decoder_position_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): Target
                positions. `None` continues from the cache.
            encoder_outputs (`BaseModelOutput`, *optional*): An earlier encoding, used instead of a source.
            past_key_values ([`~transformers.EncoderDecoderCache`], *optional*): Keys and values so far; extended in
                place. Cross keys and values are computed once.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, source_length, hidden_size)`, *optional*):
                Embeddings instead of `input_ids`.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, hidden_size)`,
                *optional*): Embeddings instead of `decoder_input_ids`.
            use_cache (`bool`, *optional*): Create a cache when none is given, except in training. `None` reads the
                config.
            segment_ids (`torch.LongTensor` of shape `(batch_size, source_length)`, *optional*): For rows in which
                several sources are packed: the number of each token's segment, counted from 0 in order. Tokens attend
                to their own segment only, whose positions start at 0. Padding at the end of a row is a segment of its
                own, so there is no `attention_mask`. `None` means one source per row.
            decoder_segment_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): The same for
                the targets, in the order of their sources: the target with number `n` reads the source with number
                `n`, which may be empty.

        Raises:
            ValueError: There is no source or no target, a source or target is given in both forms, their numbers of
                rows differ, a token id is outside of the vocabulary, only one of both is packed, segments are not in
                order, or packed rows come with a mask, a cache or `cu_seq_lens_q`.
            TypeError: `past_key_values` is a cache for decoder-only models.
        """
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise TypeError(
                f"`past_key_values` is a {type(past_key_values).__name__}, but an encoder-decoder keeps two caches. "
                "Pass `EncoderDecoderCache(self_attention_cache, cross_attention_cache)`."
            )
        _check_packing(segment_ids, decoder_segment_ids, kwargs)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, position_ids, inputs_embeds, segment_ids=segment_ids, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError(
                "The decoder needs exactly one of `decoder_input_ids` and `decoder_inputs_embeds`, but got "
                f"{'neither' if decoder_input_ids is None else 'both'}. For training pass `labels`; with "
                "label smoothing use `DataCollatorForSeq2Seq(tokenizer, model=model)`; for text call `generate`."
            )
        if decoder_inputs_embeds is None:
            # Generated ids are the model's own. On an accelerator, checking them would synchronize at every token.
            if past_key_values is None or decoder_input_ids.device.type == "cpu":
                check_token_ids(decoder_input_ids, self.decoder.config.vocab_size, "decoder_input_ids")
            decoder_inputs_embeds = self.get_input_embeddings()(decoder_input_ids)
        num_sources, num_targets = encoder_outputs.last_hidden_state.shape[0], decoder_inputs_embeds.shape[0]
        if num_sources != num_targets:
            raise ValueError(
                f"There are {num_sources} sources and {num_targets} targets, but each target belongs to the source in "
                "the same row. Pass as many targets as sources."
            )
        decoder_outputs = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            segment_ids=decoder_segment_ids,
            encoder_segment_ids=segment_ids,
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


class EncDecSLMEncoderModel(EncDecSLMPreTrainedModel):
    """The encoder alone, for embeddings and retrieval. Loads from any text checkpoint of this family.

    Args:
        config ([`EncDecSLMConfig`]): Sizes; it is not changed.
    """

    _auto_class = "AutoModelForTextEncoding"
    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: EncDecSLMConfig):
        super().__init__(config)
        self.encoder = EncDecSLMEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encode the source: `last_hidden_state` of shape `(batch_size, source_length, hidden_size)`.

        Args: as in [`EncDecSLMModel.forward`]. Leave positions of padding out when pooling.
        """
        return self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, segment_ids, **kwargs)


class EncDecSLMForConditionalGeneration(EncDecSLMPreTrainedModel, EncDecSLMGenerationMixin):
    """Encoder and decoder with an output head over the vocabulary; trains on `labels` and generates.

    Args:
        config ([`EncDecSLMConfig`]): Sizes; it is not changed.
        model ([`EncDecSLMModel`], *optional*): Used instead of a new one.
    """

    _auto_class = "AutoModelForSeq2SeqLM"
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: EncDecSLMConfig, model: EncDecSLMModel | None = None):
        super().__init__(config)
        text_config = config.get_text_config()
        self.model = EncDecSLMModel(config) if model is None else model
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=text_config.lm_head_bias)
        # The base class derives a loss from the class name, which would shift the labels a second time.
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
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Compute logits and, with `labels`, the loss.

        Args: those of [`EncDecSLMModel.forward`], and
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): Tokens to predict, from the
                first target token to the end token; -100 is not supervised. Unless the decoder's input is given, it is
                made from them by one shift to the right, of each segment by itself in packed rows.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Number of last positions to score, or
                an index of positions; 0 scores all.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): Number of supervised tokens in the accumulated
                batch, by which the summed loss is divided. `None` counts those of `labels`.

        Returns:
            [`~transformers.modeling_outputs.Seq2SeqLMOutput`]: `logits` of shape `(batch_size, target_length,
            vocab_size)`; `loss` in nats per supervised token, 0 if no token is supervised.

        Raises:
            ValueError: As in [`EncDecSLMModel.forward`], or `labels` and the decoder's input differ in length.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels, decoder_segment_ids)
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
            segment_ids=segment_ids,
            decoder_segment_ids=decoder_segment_ids,
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
        labels = labels.contiguous()  # a slice has no flat view
        check_token_ids(labels.clamp(min=0), vocab_size, "labels")
        if num_items_in_batch is None:
            num_items_in_batch = (labels != -100).sum()
        # A batch without supervision has loss 0 instead of 0 / 0.
        num_items_in_batch = torch.as_tensor(num_items_in_batch, device=logits.device).clamp(min=1)
        return self.loss_function(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)

    def prepare_decoder_input_ids_from_labels(
        self, labels: torch.LongTensor, segment_ids: torch.LongTensor | None = None
    ) -> torch.LongTensor:
        """Shift labels to the right: the start token, then all labels but the last; -100 becomes padding.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`): Unshifted; -100 is not supervised.
            segment_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*): Segments of packed
                targets, each of which begins with the start token.

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
        shifted = torch.cat((start_ids, previous), dim=1)
        if segment_ids is None:
            return shifted
        return shifted.masked_fill(starts_segment(segment_ids), config.decoder_start_token_id)


def _missing_token_message(config, name, use):
    return (
        f"`{name}` of the {type(config).__name__} is None, but it {use} when the decoder's input is made from "
        f"`labels`. Set it to a token id, or pass `decoder_input_ids` beside `labels`."
    )


def check_token_ids(token_ids: torch.LongTensor, vocab_size: int, name: str):
    """Raise a `ValueError` that names the argument if it has no tokens, or an id outside of the vocabulary."""
    if torch.compiler.is_compiling() or token_ids.device.type == "meta":
        return
    if token_ids.numel() == 0:
        raise ValueError(
            f"`{name}` has shape {tuple(token_ids.shape)}, but at least one token is needed. Give a text that is not "
            "empty, or the end token alone."
        )
    lowest, highest = (bound.item() for bound in token_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`{name}` has ids from {lowest} to {highest}, but the vocabulary has ids 0 to {vocab_size - 1}. Use the "
            "tokenizer of this checkpoint, or `resize_token_embeddings` after adding tokens to it."
        )


def check_segment_ids(segment_ids, hidden_states, attention_mask, name, past_key_values=None):
    """Raise a `ValueError` that names the argument if ids do not divide rows into segments."""
    if attention_mask is not None or past_key_values is not None:
        given = "an attention mask" if attention_mask is not None else "a cache"
        raise ValueError(
            f"`{name}` is given with {given}, but packed rows have neither: padding at the end of a row is a segment "
            "of its own, and generation takes one row per source."
        )
    if segment_ids.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`{name}` has shape {tuple(segment_ids.shape)}, but each of {tuple(hidden_states.shape[:2])} (rows, "
            "tokens) needs the number of its segment."
        )
    if torch.compiler.is_compiling() or segment_ids.device.type == "meta" or segment_ids.numel() == 0:
        return
    if segment_ids.min() < 0 or (segment_ids.diff() < 0).any():
        raise ValueError(
            f"`{name}` must count the segments of a row from 0 in order, such as [0, 0, 1, 2, 2], but has negative or "
            "decreasing numbers. Give padding at the end of a row the next number."
        )


def _check_packing(segment_ids, decoder_segment_ids, kwargs):
    if (segment_ids is None) != (decoder_segment_ids is None):
        missing = "segment_ids" if segment_ids is None else "decoder_segment_ids"
        raise ValueError(
            f"`{missing}` is missing, but packing needs the segments of both source and target. Pass both, or neither."
        )
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError(
            "`cu_seq_lens_q` and `cu_seq_lens_k` cannot describe source, target and cross-attention at once. Pass "
            "`segment_ids` and `decoder_segment_ids` instead, for any attention backend."
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
