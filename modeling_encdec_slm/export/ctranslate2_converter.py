# SPDX-License-Identifier: Apache-2.0
"""Export text models to CTranslate2, and register them with its own converter."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import check_complete_model
from .bundles import import_engine, write_bundle


FORMAT = "ctranslate2"
WEIGHTS_FILE = "model.bin"
VOCABULARY_FILE = "shared_vocabulary.json"
QUANTIZATIONS = (
    *("int8", "int8_float32", "int8_float16", "int8_bfloat16"),
    *("int16", "float32", "float16", "bfloat16"),
)
# Names of functions in transformers and in CTranslate2.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "GELU"),
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), "GELUTanh"),
    **dict.fromkeys(("silu", "swish"), "SWISH"),
    **{"quick_gelu": "GELUSigmoid", "relu": "RELU", "sigmoid": "Sigmoid", "tanh": "Tanh"},
}
ROPE_TYPES = ("default", "linear", "llama3")
# Stands for a special token that the model does not have.
NO_TOKEN = "<no token of this model>"


def export_ctranslate2(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    quantization: str = "int8",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a text model to CTranslate2. [`CT2EncDecSLM`] and `ctranslate2.Translator` load the folder.

    Args:
        model_or_path ([`~transformers.PreTrainedModel`], `str` or `Path`): A text model of this family, a folder, or a
            name on the Hub.
        output_dir (`str` or `Path`): Folder of the export.
        quantization (`str`, *optional*, defaults to `"int8"`): Type of the stored weights: `"int8"`, `"int8_float32"`,
            `"int8_float16"`, `"int8_bfloat16"`, `"int16"`, `"float32"`, `"float16"` or `"bfloat16"`. The second part
            is the type of all other computations, float32 by default. CTranslate2 converts types that a device lacks
            (most CPUs lack float16 and bfloat16) when it loads the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` uses the tokenizer in the folder of
            the model. Without any, the export takes ids only.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an earlier export in `output_dir`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ImportError: CTranslate2 is not installed.
        ValueError: `quantization` is unknown, the model cannot be exported to CTranslate2, the tokenizer has ids that
            the model lacks, or `output_dir` cannot be written.
        TypeError: `model_or_path` is neither a model nor a path.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"`quantization` is {quantization!r}, but must be one of {', '.join(QUANTIZATIONS)}.")
    import_engine("ctranslate2")
    with write_bundle(model_or_path, output_dir, FORMAT, tokenizer=tokenizer, overwrite=overwrite) as bundle:
        spec = build_spec(bundle.model, bundle.tokenizer)
        spec.validate()
        spec.optimize(quantization=quantization)
        spec.save(str(bundle.folder))
        # `config.json` is CTranslate2's own.
        config = {**bundle.model.config.to_dict(), "_name_or_path": ""}
        bundle.manifest.update(config=config, generation_config=bundle.model.generation_config.to_dict())
        bundle.manifest["quantization"] = quantization
    return Path(output_dir)


class EncDecSLMLoader:
    """Converts text models in CTranslate2's own converter, `ctranslate2.converters.TransformersConverter`."""

    architecture_name = "AutoModelForSeq2SeqLM"

    def get_model_class(self, config, model_class):
        """Return `model_class`; refuse models that CTranslate2 cannot run before their weights are loaded."""
        _check_representable(config)
        return model_class

    def __call__(self, model, tokenizer):
        check_complete_model(model, "model")
        return build_spec(model.eval(), tokenizer)

    def smooth_activation(self, spec, activation_scales):
        raise NotImplementedError("`--activation_scales` is not supported for this family. Leave it out.")


def register_loaders() -> None:
    """Register this family with CTranslate2's own converter.

    Raises:
        ImportError: CTranslate2 is not installed.
    """
    register_loader = import_engine("ctranslate2.converters.transformers").register_loader
    for name in ("EncDecSLMConfig", "EncDecVLMConfig"):
        register_loader(name)(EncDecSLMLoader)


with contextlib.suppress(ImportError):
    register_loaders()


def build_spec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """Build the `ctranslate2.specs.TransformerSpec` of a text model, with weights and vocabulary.

    Raises:
        ValueError: CTranslate2 cannot compute the model, or the tokenizer has ids that the model lacks.
    """
    _check_representable(model.config)
    specs = import_engine("ctranslate2.specs.transformer_spec")
    from .ctranslate2_spec import NarrowInt8Spec  # a subclass of CTranslate2's

    config = model.config
    options = _stack_options(config)
    encoder = specs.TransformerEncoderSpec(config.encoder_num_hidden_layers, **options)
    decoder = specs.TransformerDecoderSpec(config.decoder_num_hidden_layers, **options)
    spec = NarrowInt8Spec(encoder, decoder)
    _set_encoder(spec.encoder, model.model.encoder)
    _set_decoder(spec.decoder, model)
    _set_vocabulary(spec, model, tokenizer)
    return spec


def _check_representable(config):
    if config.model_type != "encdec_slm":
        raise ValueError(
            f"The model has `model_type` {config.model_type!r}, but CTranslate2 runs text models only. Use "
            "`export_onnx`."
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"`hidden_act` is {config.hidden_act!r}, but CTranslate2 has only {', '.join(sorted(ACTIVATIONS))}. Use "
            "`export_onnx`."
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"`rope_type` is {rope_type!r}, but only {', '.join(ROPE_TYPES)} can be exported to CTranslate2. Use "
            "`export_onnx`."
        )
    if config.qk_norm and config.num_attention_heads > 1:
        raise ValueError(
            f"`qk_norm` is True with {config.num_attention_heads} heads, but CTranslate2 normalizes the queries of a "
            "cross-attention over all heads together instead of each head by itself. Use `export_onnx`."
        )


def _stack_options(config):
    activation = import_engine("ctranslate2.specs.common_spec").Activation[ACTIVATIONS[config.hidden_act]]
    return {
        "num_heads": config.num_attention_heads,
        "activation": activation,
        "ffn_glu": config.gated_mlp,
        "rms_norm": True,
        **_attention_options(config),
    }


def _attention_options(config):
    is_grouped = config.num_key_value_heads < config.num_attention_heads
    return {
        "num_heads_kv": config.num_key_value_heads if is_grouped else None,
        "head_dim": config.head_dim,
        "qk_norm": config.qk_norm,
        "rotary_dim": config.head_dim,
        "rotary_interleave": False,
        "rotary_base": config.rope_parameters["rope_theta"],
    }


def _set_encoder(spec, module):
    spec.scale_embeddings = False
    spec.embeddings[0].weight = module.embed_tokens.weight
    spec.layer_norm.gamma = module.norm.weight
    for layer_spec, layer in zip(spec.layer, module.layers, strict=True):
        layer_spec.self_attention = _self_attention(layer, module.rotary_emb)
        set_mlp(layer_spec.ffn, layer)


def _set_decoder(spec, model):
    module = model.model.decoder
    spec.scale_embeddings = False
    spec.embeddings.weight = model.get_input_embeddings().weight
    spec.layer_norm.gamma = module.norm.weight
    for layer_spec, layer in zip(spec.layer, module.layers, strict=True):
        layer_spec.self_attention = _self_attention(layer, module.rotary_emb)
        set_linear(layer_spec.attention.linear[0], layer.cross_attn.q_proj)
        set_linear(layer_spec.attention.linear[1], layer.cross_attn.k_proj, layer.cross_attn.v_proj)
        set_attention(layer_spec.attention, layer.cross_attn, layer.pre_cross_attn_layernorm)
        set_mlp(layer_spec.ffn, layer)
    set_linear(spec.projection, model.lm_head)


def _self_attention(layer, rotary_emb):
    attention_spec = import_engine("ctranslate2.specs.attention_spec")
    module, config = layer.self_attn, layer.self_attn.config
    options = _attention_options(config)
    rope_type = config.rope_parameters["rope_type"] if module.use_rope else None
    if rope_type == "linear":
        options["rotary_scaling_type"] = attention_spec.RotaryScalingType.Linear
        options["rotary_scaling_factor"] = config.rope_parameters["factor"]
    elif rope_type != "default":
        # CTranslate2 then divides each frequency by a factor, from one list for short inputs and one for long inputs.
        options["rotary_scaling_type"] = attention_spec.RotaryScalingType.Su
        lengths = ("original_max_position_embeddings", "max_position_embeddings")
        options |= dict.fromkeys(lengths, config.max_position_embeddings)
    spec = attention_spec.MultiHeadAttentionSpec(self_attention=True, rms_norm=True, **options)
    if hasattr(spec, "rotary_scaling_long_factor"):
        divisors = _frequency_divisors(rotary_emb, module.use_rope)
        spec.rotary_scaling_long_factor = spec.rotary_scaling_short_factor = divisors
    set_self_attention(spec, layer)
    return spec


def _frequency_divisors(rotary_emb, use_rope):
    """Return the factors between default frequencies and those of a layer; infinity for a layer without rotation."""
    plain, _ = rotary_emb.compute_default_rope_parameters(rotary_emb.config)
    return plain / rotary_emb.inv_freq.cpu() if use_rope else torch.full_like(plain, torch.inf)


def set_self_attention(spec, layer):
    module = layer.self_attn
    set_linear(spec.linear[0], module.q_proj, module.k_proj, module.v_proj)
    set_attention(spec, module, layer.input_layernorm)


def set_attention(spec, module, norm):
    """Set what self-attention and cross-attention have in common."""
    spec.layer_norm.gamma = norm.weight
    set_linear(spec.linear[-1], module.o_proj)
    if has_qk_norm(module):
        spec.q_norm.gamma = module.q_norm.weight
        spec.k_norm.gamma = module.k_norm.weight


def has_qk_norm(module) -> bool:
    """Return whether an attention module normalizes queries and keys."""
    return hasattr(getattr(module, "q_norm", None), "weight")


def set_mlp(spec, layer):
    spec.layer_norm.gamma = layer.post_attention_layernorm.weight
    if hasattr(layer.mlp, "gate_proj"):
        set_linear(spec.linear_0, layer.mlp.gate_proj)
        set_linear(spec.linear_0_noact, layer.mlp.up_proj)
    else:
        set_linear(spec.linear_0, layer.mlp.up_proj)
    set_linear(spec.linear_1, layer.mlp.down_proj)


def set_linear(spec, *modules):
    """Set the weights of a linear spec from one or several layers that read the same input."""
    spec.weight = torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight
    if modules[0].bias is not None:
        spec.bias = torch.cat([module.bias for module in modules])


def _set_vocabulary(spec, model, tokenizer):
    tokens = name_tokens(model.config.vocab_size, tokenizer)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    ids = model.generation_config
    start_id = start_token_id(ids)
    eos_ids = list_ids(ids.eos_token_id)
    unknown_id = next((i for i in (getattr(tokenizer, "unk_token_id", None), ids.pad_token_id) if i is not None), 0)
    spec.config.decoder_start_token = spec.config.bos_token = tokens[start_id]
    spec.config.eos_token = tokens[eos_ids[0]] if eos_ids else NO_TOKEN
    spec.config.unk_token = tokens[unknown_id]
    # The tokenizer adds special tokens to a source.
    spec.config.add_source_bos = spec.config.add_source_eos = False
    spec.config.layer_norm_epsilon = model.config.rms_norm_eps


def start_token_id(generation_config: GenerationConfig) -> int:
    """Return the id that every target begins with.

    Raises:
        ValueError: The generation config has none.
    """
    for token_id in (generation_config.decoder_start_token_id, generation_config.bos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        "`decoder_start_token_id` and `bos_token_id` of the generation config are None, but every target begins with "
        "one of them. Set one."
    )


def list_ids(token_id: int | list[int] | None) -> list[int]:
    """Return one, several or no ids as a list."""
    if token_id is None:
        return []
    return list(token_id) if isinstance(token_id, (list, tuple)) else [token_id]


def name_tokens(vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return a unique name for every id, as CTranslate2 requires: its token if it has one.

    Raises:
        ValueError: The tokenizer has ids beyond `vocab_size`.
    """
    known: dict[int, str] = {}
    for token, token_id in (tokenizer.get_vocab() if tokenizer is not None else {}).items():
        # If two tokens have the same id, the one that the tokenizer makes of the id counts.
        if token_id not in known or tokenizer.convert_ids_to_tokens(token_id) == token:
            known[token_id] = token
    if known and max(known) >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {max(known)}, but the model only 0 to {vocab_size - 1}. Use the tokenizer "
            "of this checkpoint, or `model.resize_token_embeddings` after adding tokens to it."
        )
    names = [known.get(token_id, "") for token_id in range(vocab_size)]
    taken = set(names)
    for token_id, name in enumerate(names):
        if not _is_text(name):
            name = f"<id_{token_id}>"
            while name in taken:
                name = f"<{name}>"
            names[token_id] = name
    return names


def _is_text(token):
    """Return whether UTF-8 can encode a token: some tokenizers have tokens of bytes."""
    return isinstance(token, str) and token != "" and token.encode(errors="ignore").decode() == token
