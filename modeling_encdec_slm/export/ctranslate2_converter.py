# SPDX-License-Identifier: Apache-2.0
"""Text models of this family for CTranslate2, by its own converter command or by [`export_ctranslate2`]."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_encdec_slm import CUSTOM_PIPELINES
from .bundles import bundle_written_whole, check_exportable, exportable, required


FORMAT = "ctranslate2"
WEIGHTS_FILE = "model.bin"
VOCABULARY_FILE = "shared_vocabulary.json"
QUANTIZATIONS = (
    *("int8", "int8_float32", "int8_float16", "int8_bfloat16"),
    *("int16", "float32", "float16", "bfloat16"),
)
# Names of `transformers` and what CTranslate2 calls the same function.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "GELU"),
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), "GELUTanh"),
    **dict.fromkeys(("silu", "swish"), "SWISH"),
    **{"quick_gelu": "GELUSigmoid", "relu": "RELU", "sigmoid": "Sigmoid", "tanh": "Tanh"},
}
ROPE_TYPES = ("default", "linear", "llama3")
# A name that no token has.
NO_TOKEN = "<no token of this model>"


def export_ctranslate2(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    quantization: str = "int8",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """The folder of a CTranslate2 model, for [`CT2EncDecSLM`] and for `ctranslate2.Translator`.

    Args:
        model_or_path ([`~transformers.PreTrainedModel`], `str` or `Path`): A text model of this family, a folder that
            `save_pretrained` wrote, or the name of a repository on the Hub.
        output_dir (`str` or `Path`): Where the export is to lie.
        quantization (`str`, *optional*, defaults to `"int8"`): How weights are stored: `"int8"`, `"int8_float32"`,
            `"int8_float16"`, `"int8_bfloat16"`, `"int16"`, `"float32"`, `"float16"` or `"bfloat16"`; the second part
            is what is computed in beside the int8 products, float32 where there is none. A folder of any of them loads
            everywhere: where a processor lacks a type, as most CPUs lack float16 and bfloat16,
            CTranslate2 converts the weights to the nearest one that it has while it loads them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` means the one beside the weights.
            Without any, the export speaks ids only.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an export that lies there.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ImportError: CTranslate2 is not installed.
        ValueError: `quantization` is unknown; the model has adapters, quantized weights or something that CTranslate2
            cannot compute; the tokenizer has ids beyond its table; `output_dir` is in use.
        TypeError: `model_or_path` is neither a model nor a path.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"Unknown `quantization` {quantization!r}. Available: {', '.join(QUANTIZATIONS)}.")
    required("ctranslate2")
    model, tokenizer = exportable(model_or_path, tokenizer)
    spec = model_spec(model, tokenizer)
    spec.validate()
    spec.optimize(quantization=quantization)
    with bundle_written_whole(output_dir, FORMAT, tokenizer, overwrite) as (folder, manifest):
        manifest["quantization"] = quantization
        # `config.json` is CTranslate2's own.
        model.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        manifest["config"] = model.config.to_dict()
        manifest["generation_config"] = model.generation_config.to_dict()
        spec.save(str(folder))
    return Path(output_dir)


class EncDecSLMLoader:
    """What `ct2-transformers-converter` needs to know of the text family; registered by `import encdec_slm`."""

    architecture_name = "AutoModelForSeq2SeqLM"

    def get_model_class(self, config, model_class):
        """`model_class`, before weights are read; refuses what could not be converted anyway."""
        _check_representable(config)
        return model_class

    def __call__(self, model, tokenizer):
        check_exportable(model)
        return model_spec(model.eval(), tokenizer)

    def smooth_activation(self, spec, activation_scales):
        raise NotImplementedError(
            "`--activation_scales` was given, but no smoothing is defined for this family. Leave it out."
        )


def register_loaders() -> None:
    """Makes CTranslate2's own converter, thus `ct2-transformers-converter`, know this family's configs.

    Raises:
        ImportError: CTranslate2 is not installed, or cannot be loaded.
    """
    register_loader = required("ctranslate2.converters.transformers").register_loader
    for name in ("EncDecSLMConfig", "EncDecVLMConfig"):
        register_loader(name)(EncDecSLMLoader)


def model_spec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The `ctranslate2.specs.TransformerSpec` of a text model, with weights and vocabulary.

    Raises:
        ValueError: CTranslate2 cannot compute the model, or the tokenizer has ids beyond its table.
    """
    _check_representable(model.config)
    specs = required("ctranslate2.specs.transformer_spec")
    from .ctranslate2_spec import NarrowInt8Spec  # derives from a class of CTranslate2

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
            f"The model is of `model_type` {config.model_type!r}, but CTranslate2 runs the text family only: its "
            "encoder takes token ids and no images. Use `export_onnx`."
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"`hidden_act` is {config.hidden_act!r}, which CTranslate2 does not have; it has "
            f"{', '.join(sorted(ACTIVATIONS))}. Use `export_onnx`."
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"`rope_parameters` are of type {rope_type!r}, but only {', '.join(ROPE_TYPES)} can be exported to "
            "CTranslate2. Use `export_onnx`."
        )
    if config.qk_norm and config.num_attention_heads > 1:
        raise ValueError(
            f"`qk_norm` is True and there are {config.num_attention_heads} heads, but CTranslate2 norms the queries "
            "of a cross-attention over all heads together, not each by itself, so it would write other text. Use "
            "`export_onnx`."
        )


def _stack_options(config):
    activation = required("ctranslate2.specs.common_spec").Activation[ACTIVATIONS[config.hidden_act]]
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
        _set_mlp(layer_spec.ffn, layer)


def _set_decoder(spec, model):
    module = model.model.decoder
    spec.scale_embeddings = False
    spec.embeddings.weight = model.get_input_embeddings().weight
    spec.layer_norm.gamma = module.norm.weight
    for layer_spec, layer in zip(spec.layer, module.layers, strict=True):
        layer_spec.self_attention = _self_attention(layer, module.rotary_emb)
        _set_linear(layer_spec.attention.linear[0], layer.cross_attn.q_proj)
        _set_linear(layer_spec.attention.linear[1], layer.cross_attn.k_proj, layer.cross_attn.v_proj)
        _set_attention(layer_spec.attention, layer.cross_attn, layer.pre_cross_attn_layernorm)
        _set_mlp(layer_spec.ffn, layer)
    _set_linear(spec.projection, model.lm_head)


def _self_attention(layer, rotary_emb):
    attention_spec = required("ctranslate2.specs.attention_spec")
    module, config = layer.self_attn, layer.self_attn.config
    options = _attention_options(config)
    rope_type = config.rope_parameters["rope_type"] if module.use_rope else None
    if rope_type == "linear":
        options["rotary_scaling_type"] = attention_spec.RotaryScalingType.Linear
        options["rotary_scaling_factor"] = config.rope_parameters["factor"]
    elif rope_type != "default":
        # CTranslate2 then divides each frequency by a number, of one list for short texts and another for long ones.
        options["rotary_scaling_type"] = attention_spec.RotaryScalingType.Su
        lengths = ("original_max_position_embeddings", "max_position_embeddings")
        options |= dict.fromkeys(lengths, config.max_position_embeddings)
    spec = attention_spec.MultiHeadAttentionSpec(self_attention=True, rms_norm=True, **options)
    if hasattr(spec, "rotary_scaling_long_factor"):
        divisors = _frequency_divisors(rotary_emb, module.use_rope)
        spec.rotary_scaling_long_factor = spec.rotary_scaling_short_factor = divisors
    _set_linear(spec.linear[0], module.q_proj, module.k_proj, module.v_proj)
    _set_attention(spec, module, layer.input_layernorm)
    return spec


def _frequency_divisors(rotary_emb, use_rope):
    """What turns the frequencies of the default rotation into those of a layer: infinity where it does not rotate."""
    plain, _ = rotary_emb.compute_default_rope_parameters(rotary_emb.config)
    return plain / rotary_emb.inv_freq.cpu() if use_rope else torch.full_like(plain, torch.inf)


def _set_attention(spec, module, norm):
    spec.layer_norm.gamma = norm.weight
    _set_linear(spec.linear[-1], module.o_proj)
    if module.config.qk_norm:
        spec.q_norm.gamma = module.q_norm.weight
        spec.k_norm.gamma = module.k_norm.weight


def _set_mlp(spec, layer):
    spec.layer_norm.gamma = layer.post_attention_layernorm.weight
    if layer.mlp.gated:
        _set_linear(spec.linear_0, layer.mlp.gate_proj)
        _set_linear(spec.linear_0_noact, layer.mlp.up_proj)
    else:
        _set_linear(spec.linear_0, layer.mlp.up_proj)
    _set_linear(spec.linear_1, layer.mlp.down_proj)


def _set_linear(spec, *modules):
    """One matrix of several that read the same input, row below row."""
    spec.weight = torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight
    if modules[0].bias is not None:
        spec.bias = torch.cat([module.bias for module in modules])


def _set_vocabulary(spec, model, tokenizer):
    tokens = vocabulary(model.config.vocab_size, tokenizer)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    ids = model.generation_config
    start_id = start_token_id(ids)
    eos_ids = listed_ids(ids.eos_token_id)
    unknown_id = next((i for i in (getattr(tokenizer, "unk_token_id", None), ids.pad_token_id) if i is not None), 0)
    spec.config.decoder_start_token = spec.config.bos_token = tokens[start_id]
    spec.config.eos_token = tokens[eos_ids[0]] if eos_ids else NO_TOKEN
    spec.config.unk_token = tokens[unknown_id]
    # What a tokenizer adds to a source it has added already.
    spec.config.add_source_bos = spec.config.add_source_eos = False
    spec.config.layer_norm_epsilon = model.config.rms_norm_eps


def start_token_id(generation_config: GenerationConfig) -> int:
    """The id that every target begins with.

    Raises:
        ValueError: The generation config names none.
    """
    for token_id in (generation_config.decoder_start_token_id, generation_config.bos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        "`decoder_start_token_id` and `bos_token_id` of the generation config are None, but every target begins with "
        "a token. Set one of them."
    )


def listed_ids(token_id: int | list[int] | None) -> list[int]:
    """One, several or no ids, as a list."""
    if token_id is None:
        return []
    return list(token_id) if isinstance(token_id, (list, tuple)) else [token_id]


def vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """A name for every id, each another one, by which CTranslate2 knows it: the token where there is one.

    Raises:
        ValueError: The tokenizer has ids beyond `vocab_size`.
    """
    known: dict[int, str] = {}
    for token, token_id in (tokenizer.get_vocab() if tokenizer is not None else {}).items():
        # Of two tokens with one id, that which the tokenizer itself makes of the id.
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
    """Whether a file in UTF-8 can hold it: some tokenizers have tokens of bytes."""
    return isinstance(token, str) and token != "" and token.encode(errors="ignore").decode() == token
