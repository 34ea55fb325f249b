# SPDX-License-Identifier: Apache-2.0
"""The predecessor's weights (microsoft/encoder-decoder-slm) under this family's names and conventions."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .configuration_encdec_slm import EncDecSLMConfig


# Applied in order; the predecessor's blocks are `e` in the encoder and `h` in the decoder.
RENAMINGS = (
    (r"^transformer\.wte\.", "model.encoder.embed_tokens."),
    (r"^transformer\.e\.", "model.encoder.layers."),
    (r"^transformer\.h\.", "model.decoder.layers."),
    (r"^transformer\.ln_e\.", "model.encoder.norm."),
    (r"^transformer\.ln_f\.", "model.decoder.norm."),
    (r"(encoder\.layers\.\d+)\.ln2\.", r"\1.post_attention_layernorm."),
    (r"\.ln1\.", ".input_layernorm."),
    (r"\.ln2\.", ".pre_cross_attn_layernorm."),
    (r"\.ln3\.", ".post_attention_layernorm."),
    (r"\.(attn|causal_attn)\.", ".self_attn."),
    (r"\.out_linear\.", ".o_proj."),
    (r"\.([qkv])_linear\.", r".\1_proj."),
    (r"\.fc1\.", ".up_proj."),
    (r"\.fc2\.", ".down_proj."),
)


def reference_config(model_config: Mapping[str, Any], **kwargs) -> EncDecSLMConfig:
    """The config of this family that computes what the predecessor's text config computes.

    Args:
        model_config (`Mapping[str, Any]`): The predecessor's `MuConfig` as a mapping. Its `is_interleaved` concerns
            only the weights: see [`convert_reference_state_dict`].
        kwargs: Further fields of [`EncDecSLMConfig`], for instance `eos_token_id`.

    Raises:
        ValueError: `rope_factor` is greater than 1: scaling by the padded length of each call cannot be represented.
    """
    if model_config["rope_factor"] > 1:
        raise ValueError(
            f"`rope_factor` is {model_config['rope_factor']}, but only 1.0 is supported: beyond it the predecessor "
            "turns the same token differently depending on the padding of its batch."
        )
    return EncDecSLMConfig(
        vocab_size=model_config["vocab_size"],
        hidden_size=model_config["n_embd"],
        intermediate_size=model_config["hidden_dim"],
        num_attention_heads=model_config["n_head"],
        num_key_value_heads=model_config["n_kv_head"],
        head_dim=(model_config["qkv_embd"] or model_config["n_embd"]) // model_config["n_head"],
        encoder_num_hidden_layers=model_config["n_encoder_layer"],
        decoder_num_hidden_layers=model_config["n_decoder_layer"],
        hidden_act="gelu_pytorch_tanh",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": float(model_config["rope_theta"])},
        max_position_embeddings=model_config["block_size"],
        attention_dropout=model_config["dropout"],
        mlp_dropout=model_config["dropout"],
        pad_token_id=model_config["pad_token_id"],
        **kwargs,
    )


def convert_reference_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: EncDecSLMConfig, is_interleaved: bool = False
) -> dict[str, torch.Tensor]:
    """Weights for `EncDecSLMForConditionalGeneration(config)`, from the predecessor's text model.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The predecessor's weights under its own names.
        config ([`EncDecSLMConfig`]): From [`reference_config`].
        is_interleaved (`bool`, *optional*, defaults to `False`): Whether query head h reads key/value head
            `h // (num_attention_heads // num_key_value_heads)`, as here. Otherwise it reads `h % num_key_value_heads`,
            and the query heads are brought into the order in which this makes no difference.
    """
    converted = {}
    for key, tensor in state_dict.items():
        for pattern, replacement in RENAMINGS:
            key = re.sub(pattern, replacement, key)
        if not is_interleaved and (".q_proj." in key or key.endswith(".o_proj.weight")):
            tensor = _group_query_heads(tensor, config, dim=1 if ".o_proj." in key else 0)
        converted[key] = tensor
    return converted


def _group_query_heads(tensor, config, dim):
    """Query heads that share a key/value head, moved side by side along `dim`."""
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = tensor.unflatten(dim, (groups, config.num_key_value_heads, config.head_dim))
    return heads.transpose(dim, dim + 1).flatten(dim, dim + 2).contiguous()
