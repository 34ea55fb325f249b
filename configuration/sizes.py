# SPDX-License-Identifier: Apache-2.0
"""The family's sizes: configs from `presets/*.json`, their decoder-only opponents, and what a size costs to run."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from ..adaptation import SPLITS
from ..configuration_encdec_slm import EncDecSLMConfig
from ..configuration_encdec_vlm import EncDecVLMConfig


PRESETS = Path(__file__).parent / "presets"
TWIN_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_parameters", "max_position_embeddings"),
    *("attention_dropout", "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def list_presets() -> list[str]:
    """Names of all sizes, in alphabetical order: the stems of `presets/*.json`."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_preset(name: str, split: str | None = None) -> EncDecSLMConfig | EncDecVLMConfig:
    """The config of one size, of text or of vision and text, read from `presets/<name>.json`.

    Args:
        name (`str`): One of [`list_presets`].
        split (`str`, *optional*): Shares of encoder and decoder in the same number of layers: `"2/3-1/3"`,
            `"1/2-1/2"` or `"1/3-2/3"`. `intermediate_size` makes up for the cross-attentions that come or go, so that
            the parameter count stays within 2 %. `None` takes the layers of the file: 2/3 and 1/3, but equal halves
            in `625m-vlm`, as the predecessor has them.

    Raises:
        ValueError: There is no such preset or split.
    """
    path = PRESETS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"Unknown preset {name!r}. Available presets: {', '.join(list_presets())}.")
    if split is not None and split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Available splits: {', '.join(SPLITS)}.")
    fields = json.loads(path.read_text(encoding="utf-8"))
    if "vision_config" not in fields:
        config = EncDecSLMConfig(**fields)
        return config if split is None else _with_split(config, fields, SPLITS[split])
    if split is not None:
        text_config = EncDecSLMConfig(**fields["text_config"])
        fields["text_config"] = _with_split(text_config, fields["text_config"], SPLITS[split])
    return EncDecVLMConfig(**fields)


def _with_split(config, fields, encoder_share):
    num_layers = config.encoder_num_hidden_layers + config.decoder_num_hidden_layers
    num_encoder_layers = round(num_layers * encoder_share)
    layers = {
        "encoder_num_hidden_layers": num_encoder_layers,
        "decoder_num_hidden_layers": num_layers - num_encoder_layers,
    }
    return _with_num_parameters(EncDecSLMConfig, {**fields, **layers}, num_parameters(config), tolerance=0.02)


def decoder_only_twin(config: EncDecSLMConfig | EncDecVLMConfig) -> PreTrainedConfig:
    """The decoder-only config of the same size: the fair opponent of `config` in every benchmark.

    It has as many layers as both stacks together and the same width, heads, vocabulary, activation and token ids.
    Llama's and Qwen's MLPs always have a gate and their layers no cross-attention, so `intermediate_size` is solved
    for: it brings the parameter count within 1 % of that of `config`.

    Args:
        config ([`EncDecSLMConfig`] or [`EncDecVLMConfig`]): Any size of this family.

    Returns:
        For vision and text, [`~transformers.LlavaNextConfig`] with the same tower, tiles and image token, and the
        twin of the text model. For text, [`~transformers.LlamaConfig`], or [`~transformers.Qwen3Config`] where
        `config` has query and key norms or a width that is no multiple of its heads, which Llama refuses. Qwen's query
        and key norms come with its class.
    """
    if config.model_type == EncDecVLMConfig.model_type:
        return _vision_twin(config)
    fields = {name: getattr(config, name) for name in TWIN_FIELDS}
    fields["num_hidden_layers"] = config.encoder_num_hidden_layers + config.decoder_num_hidden_layers
    config_class = LlamaConfig
    if config.qk_norm or config.hidden_size % config.num_attention_heads:
        config_class = Qwen3Config
        del fields["mlp_bias"]  # Qwen's MLP has none to switch on
    return _with_num_parameters(config_class, fields, num_parameters(config), tolerance=0.01)


def _vision_twin(config):
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


def _with_num_parameters(config_class, fields, wanted, tolerance):
    """A config whose `intermediate_size` brings the parameter count nearest to `wanted`, in steps of 8 if they do."""
    size = fields["intermediate_size"]
    count = num_parameters(config_class(**fields))
    per_unit = num_parameters(config_class(**{**fields, "intermediate_size": size + 1})) - count
    step = 8 if 4 * per_unit <= tolerance * wanted else 1
    solved = step * round((size + (wanted - count) / per_unit) / step)
    return config_class(**{**fields, "intermediate_size": solved})


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model with a language modelling head that `config` describes; a tied table counts once."""
    return sum(parameter.numel() for parameter in _empty_model(config).parameters())


def num_weights_per_token(config: PreTrainedConfig) -> int:
    """Parameters that one generated token needs read, with all keys and values cached.

    An encoder-decoder runs its decoder, without the keys and values of the cross-attention, and the output head; a
    decoder-only model runs everything. One row of the embedding table is not counted, nor what sees images.
    """
    model = _empty_model(config)
    unread = {"encoder.", "cross_attn.k_proj.", "cross_attn.v_proj.", "embed_tokens."}
    unread |= {"vision_tower.", "multi_modal_projector.", "image_newline"}
    unread |= {"shared.", "EncDecAttention.k.", "EncDecAttention.v."}  # as T5 calls them
    read = [
        parameter
        # A tied table is listed under both of its names, of which only the head's is read as a whole.
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not any(part in name for part in unread)
    ]
    return sum(parameter.numel() for parameter in read)


def num_cached_values(config: PreTrainedConfig) -> int:
    """Numbers that one token adds to a cache of keys and values.

    For an encoder-decoder: those of a source token to the cross-attention's cache, and, equally many, those of a
    generated token to the self-attention's. For a decoder-only model: those of any token.
    """
    config = config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return 2 * config.num_hidden_layers * num_heads * config.head_dim


def _empty_model(config):
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto_class = AutoModelForImageTextToText
    with torch.device("meta"):
        return auto_class.from_config(config)


def preset_table() -> str:
    """All presets by size, as a Markdown table: parameters, shape, and the bytes in bfloat16 that one token moves."""
    header = (
        *("preset", "parameters", "encoder + decoder layers", "width", "heads (query / kv x size)"),
        *("weight bytes read per generated token", "KV bytes per source token", "KV bytes per generated token"),
    )
    configs = {name: load_preset(name) for name in list_presets()}
    counts = {name: num_parameters(config) for name, config in configs.items()}
    rows = [_preset_row(name, configs[name], counts[name]) for name in sorted(configs, key=counts.get)]
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _preset_row(name, config, count):
    weight_bytes, cached_bytes = 2 * num_weights_per_token(config), 2 * num_cached_values(config)
    config = config.get_text_config()
    layers = f"{config.encoder_num_hidden_layers} + {config.decoder_num_hidden_layers}"
    heads = f"{config.num_attention_heads} / {config.num_key_value_heads} x {config.head_dim}"
    numbers = (f"{weight_bytes:,}", f"{cached_bytes:,}", f"{cached_bytes:,}")
    return (f"`{name}`", f"{count:,}", layers, str(config.hidden_size), heads, *numbers)


__all__ = [
    "decoder_only_twin",
    "list_presets",
    "load_preset",
    "num_cached_values",
    "num_parameters",
    "num_weights_per_token",
    "preset_table",
]
