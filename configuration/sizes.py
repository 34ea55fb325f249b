# SPDX-License-Identifier: Apache-2.0
"""Sizes of the family: configs from `presets/*.json`, their decoder-only baselines, and what a size costs to run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from ..adaptation import SPLITS
from ..configuration_encdec_slm import EncDecSLMConfig
from ..configuration_encdec_vlm import EncDecVLMConfig


PRESETS = Path(__file__).parent / "presets"
BASELINE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_parameters", "max_position_embeddings"),
    *("attention_dropout", "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# Parts of names of weights that are not read for a generated token, also in T5: encoder, keys and values of the
# cross-attention, embeddings, vision tower.
UNREAD_WEIGHTS = (
    *("encoder.", "cross_attn.k_proj.", "cross_attn.v_proj.", "embed_tokens.", "vision_tower.", "image_newline"),
    *("multi_modal_projector.", "shared.", "EncDecAttention.k.", "EncDecAttention.v."),
)


def list_presets() -> list[str]:
    """List the names of all sizes, the stems of `presets/*.json`, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_preset(name: str, split: str | None = None) -> EncDecSLMConfig | EncDecVLMConfig:
    """Load the config of a size, for text or for vision and text, from `presets/<name>.json`.

    Args:
        name (`str`): One of [`list_presets`].
        split (`str`, *optional*): Shares of encoder and decoder in the same number of layers: `"2/3-1/3"`,
            `"1/2-1/2"` or `"1/3-2/3"`. `intermediate_size` makes up for cross-attentions that are added or removed, so
            that the parameter count stays within 2 %. `None` keeps the layers of the file: 2/3 and 1/3, except in
            `625m-vlm`, whose stacks are equally deep, as in microsoft/encoder-decoder-slm.

    Raises:
        ValueError: There is no such preset or split.
    """
    path = PRESETS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"`name` is {name!r}, but must be one of the presets {', '.join(list_presets())}.")
    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, but must be one of {', '.join(SPLITS)}.")
    fields = json.loads(path.read_text(encoding="utf-8"))
    if "vision_config" not in fields:
        return EncDecSLMConfig(**fields) if split is None else _split_layers(fields, SPLITS[split])
    if split is not None:
        fields["text_config"] = _split_layers(fields["text_config"], SPLITS[split])
    return EncDecVLMConfig(**fields)


def _split_layers(fields, encoder_share):
    num_layers = fields["encoder_num_hidden_layers"] + fields["decoder_num_hidden_layers"]
    num_encoder_layers = round(num_layers * encoder_share)
    layers = {
        "encoder_num_hidden_layers": num_encoder_layers,
        "decoder_num_hidden_layers": num_layers - num_encoder_layers,
    }
    target = num_parameters(EncDecSLMConfig(**fields))
    return fit_num_parameters(EncDecSLMConfig, {**fields, **layers}, target, tolerance=0.02)


def decoder_only_twin(config: EncDecSLMConfig | EncDecVLMConfig) -> PreTrainedConfig:
    """Return the config of the decoder-only baseline of the same size.

    It has as many layers as both stacks together and the same width, heads, vocabulary, activation and token ids.
    Since MLPs of Llama and Qwen3 are always gated and there is no cross-attention, `intermediate_size` is chosen so
    that the parameter count is within 1 % of that of `config`.

    Args:
        config ([`EncDecSLMConfig`] or [`EncDecVLMConfig`]): Any size of this family.

    Returns:
        [`~transformers.LlamaConfig`]; [`~transformers.Qwen3Config`] if `config` has query and key norms, or a width
        that is no multiple of its heads, which Llama refuses (query and key norms come with its class); or
        [`~transformers.LlavaNextConfig`] with the same vision tower, tiles and image token.
    """
    if config.model_type == EncDecVLMConfig.model_type:
        return LlavaNextConfig(
            text_config=decoder_only_twin(config.text_config),
            vision_config=config.vision_config,
            image_token_index=config.image_token_id,
            image_grid_pinpoints=config.image_grid_pinpoints,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            projector_hidden_act=config.projector_hidden_act,
            image_seq_length=config.patches_per_side**2,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    fields = {name: getattr(config, name) for name in BASELINE_FIELDS}
    fields["num_hidden_layers"] = config.encoder_num_hidden_layers + config.decoder_num_hidden_layers
    config_class = LlamaConfig
    if config.qk_norm or config.hidden_size % config.num_attention_heads:
        config_class = Qwen3Config
        del fields["mlp_bias"]  # Qwen3's MLP has no biases
    return fit_num_parameters(config_class, fields, num_parameters(config), tolerance=0.01)


def fit_num_parameters(
    config_class: type[PreTrainedConfig], fields: Mapping[str, Any], target: int, tolerance: float
) -> PreTrainedConfig:
    """Return the config whose `intermediate_size` gives about `target` parameters.

    Args:
        config_class (`type`): Class of the config.
        fields (`Mapping`): Its arguments.
        target (`int`): Number of parameters.
        tolerance (`float`): Relative error that is allowed; sizes are multiples of 8 if those are close enough.
    """
    size = fields["intermediate_size"]
    count = num_parameters(config_class(**fields))
    per_unit = num_parameters(config_class(**{**fields, "intermediate_size": size + 1})) - count
    step = 8 if 4 * per_unit <= tolerance * target else 1
    solved = step * round((size + (target - count) / per_unit) / step)
    return config_class(**{**fields, "intermediate_size": solved})


def build_model(config: PreTrainedConfig, device: str | torch.device = "cpu", **kwargs) -> PreTrainedModel:
    """Build the model with a language modeling head that `config` describes, with fresh weights.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of this family, of a decoder-only baseline or of a peer.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): `"meta"` allocates nothing.
        kwargs: Passed to `from_config`, such as `dtype`.
    """
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto_class = AutoModelForImageTextToText
    with torch.device(device):
        return auto_class.from_config(config, **kwargs)


def num_parameters(config: PreTrainedConfig) -> int:
    """Return the number of parameters of the model that `config` describes; a tied table counts once."""
    return sum(parameter.numel() for parameter in build_model(config, "meta").parameters())


def num_weights_per_token(config: PreTrainedConfig) -> int:
    """Return the number of parameters that are read for one generated token, with all keys and values cached.

    An encoder-decoder runs its decoder, without keys and values of the cross-attention, and the output head; a
    decoder-only model runs everything. The row of the embeddings and the vision tower are not counted.
    """
    # A tied table is listed under both of its names; the head reads all of it.
    parameters = build_model(config, "meta").named_parameters(remove_duplicate=False)
    return sum(weight.numel() for name, weight in parameters if not any(part in name for part in UNREAD_WEIGHTS))


def num_cached_values(config: PreTrainedConfig) -> int:
    """Return the number of keys and values that one token adds to a cache.

    In an encoder-decoder, a source token adds as many to the cross-attention's cache as a generated token to the
    self-attention's.
    """
    config = config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return 2 * config.num_hidden_layers * num_heads * config.head_dim


def preset_table() -> str:
    """Format all presets by size as a Markdown table: parameters, shape, and the bytes in bfloat16 per token."""
    header = (
        *("preset", "parameters", "encoder + decoder layers", "width", "heads (query / kv x size)"),
        *("weight bytes read per generated token", "KV bytes per source token", "KV bytes per generated token"),
    )
    configs = {name: load_preset(name) for name in list_presets()}
    counts = {name: num_parameters(config) for name, config in configs.items()}
    rows = [_format_row(name, configs[name], counts[name]) for name in sorted(configs, key=counts.get)]
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format_row(name, config, count):
    weight_bytes, cached_bytes = 2 * num_weights_per_token(config), 2 * num_cached_values(config)
    config = config.get_text_config()
    layers = f"{config.encoder_num_hidden_layers} + {config.decoder_num_hidden_layers}"
    heads = f"{config.num_attention_heads} / {config.num_key_value_heads} x {config.head_dim}"
    numbers = (f"{weight_bytes:,}", f"{cached_bytes:,}", f"{cached_bytes:,}")
    return (f"`{name}`", f"{count:,}", layers, str(config.hidden_size), heads, *numbers)


__all__ = [
    "build_model",
    "decoder_only_twin",
    "fit_num_parameters",
    "list_presets",
    "load_preset",
    "num_cached_values",
    "num_parameters",
    "num_weights_per_token",
    "preset_table",
]
