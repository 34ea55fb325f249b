# SPDX-License-Identifier: Apache-2.0
"""Configuration of the text encoder-decoder family."""

import dataclasses
import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Keys that transformers reads from keyword arguments or writes into config.json, besides declared fields.
COMMON_KEYS = frozenset(
    {
        *("model_type", "name_or_path", "auto_map", "custom_pipelines", "quantization_config", "per_layer_config"),
        *("attn_implementation", "experts_implementation", "output_attentions", "torch_dtype", "num_labels"),
        *("rope_theta", "rope_scaling", "tie_last_hidden_states", "gradient_checkpointing"),
        *("tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "sep_token_id", "use_bfloat16"),
        *("is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "torchscript"),
        *("pruned_heads", "distributed_config"),
    }
)


class EncDecPreTrainedConfig(PreTrainedConfig):
    """Base of both configs: a misspelled argument raises an error, an unknown key of a file logs a warning."""

    def __post_init__(self, **kwargs):
        if unknown := self._unknown_keys(kwargs):
            raise TypeError(_unknown_field_message(type(self), unknown[0]))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "EncDecPreTrainedConfig":
        """Build the config that a `config.json` describes.

        Args:
            config_dict (`dict[str, Any]`): Contents of the file. Unknown keys, which a newer version may have written,
                are kept as plain attributes, with a warning.
            kwargs: As in [`~transformers.PreTrainedConfig.from_dict`].
        """
        unknown = cls._unknown_keys(config_dict)
        if unknown:
            logger.warning(
                f"config.json has {', '.join(map(repr, unknown))}, which {cls.__name__} does not use. A newer version "
                "of encdec_slm may have written it: update if the model behaves unexpectedly."
            )
        known = {key: value for key, value in config_dict.items() if key not in unknown}
        config = super().from_dict(known, **kwargs)
        for key in unknown:
            setattr(config[0] if isinstance(config, tuple) else config, key, config_dict[key])
        return config

    @classmethod
    def from_json_file(cls, json_file) -> "EncDecPreTrainedConfig":
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def _unknown_keys(cls, keys) -> list[str]:
        known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map) | COMMON_KEYS
        known |= GenerationConfig._get_default_generation_params().keys()
        return [key for key in keys if key not in known and not key.startswith("_")]

    @property
    def custom_pipelines(self):
        if "custom_pipelines" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute `custom_pipelines`: it was never saved.")
        return _CustomPipelines(self.__dict__["custom_pipelines"])

    @custom_pipelines.setter
    def custom_pipelines(self, value):
        self.__dict__["custom_pipelines"] = value


class _CustomPipelines(dict):
    """Pipelines of a checkpoint folder, as `transformers.pipeline` may read them.

    It changes the entry that it reads, so entries are copies. It requires trust in the folder's code for every task
    that it finds here, so a task whose class is registered in this process, and needs no such code, is not found.
    """

    def __getitem__(self, task):
        return dict(super().__getitem__(task))

    def __contains__(self, task):
        from transformers.pipelines import PIPELINE_REGISTRY

        registered = PIPELINE_REGISTRY.supported_tasks.get(task, {}).get("impl")
        name = getattr(registered, "__name__", registered)
        return super().__contains__(task) and self[task]["impl"].rpartition(".")[2] != name


@strict
class EncDecSLMConfig(EncDecPreTrainedConfig):
    r"""Configuration of a text encoder-decoder small language model.

    The encoder reads the source once; the decoder runs once per generated token. Fields without `encoder_` or
    `decoder_` apply to both. The switches exist because existing checkpoints differ in them:
    microsoft/encoder-decoder-slm (MLP with tanh-GELU and no gate, biases, attention narrower than the model), Llama
    and SmolLM (gated SiLU, no biases; SmolLM3 has layers without rotary embeddings), Qwen (biases on q, k and v only;
    query and key norms).

    Args:
        vocab_size (`int`, *optional*, defaults to 32128): Number of tokens in the embedding table.
        hidden_size (`int`, *optional*, defaults to 512): Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 1408): Width inside the MLP.
        num_attention_heads (`int`, *optional*, defaults to 8): Query heads of every attention.
        num_key_value_heads (`int`, *optional*): Key/value heads; each serves
            `num_attention_heads // num_key_value_heads` query heads. `None` means one per query head.
        head_dim (`int`, *optional*): Width of one head; even. `num_attention_heads * head_dim` may differ from
            `hidden_size`. `None` means `hidden_size // num_attention_heads`.
        encoder_num_hidden_layers (`int`, *optional*, defaults to 8): Number of encoder layers.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 4): Number of decoder layers.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the MLP, a key of transformers' `ACT2FN`.
        gated_mlp (`bool`, *optional*, defaults to `True`): `down(act(gate(x)) * up(x))` instead of
            `down(act(up(x)))`.
        attention_bias (`bool`, *optional*, defaults to `False`): Biases on the q, k and v projections.
        attention_out_bias (`bool`, *optional*): A bias on the o projections. `None` means `attention_bias`.
        mlp_bias (`bool`, *optional*, defaults to `False`): Biases on the MLP projections.
        lm_head_bias (`bool`, *optional*, defaults to `False`): A bias on the output head.
        qk_norm (`bool`, *optional*, defaults to `False`): RMSNorm over each query and key head before rotation.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6): Added to the mean square in every RMSNorm.
        rope_parameters (`dict`, *optional*): `rope_type`, `rope_theta` and what the type requires. `None` means
            `"default"` and 10000.
        encoder_no_rope_layers (`list[int]`, *optional*): One entry per encoder layer, as in SmolLM3: 1 if its
            self-attention has rotary embeddings, 0 if not. `None` means 1 for all layers.
        decoder_no_rope_layers (`list[int]`, *optional*): The same for the decoder. Cross-attention has no rotary
            embeddings.
        max_position_embeddings (`int`, *optional*, defaults to 2048): Longest source and target in tokens that the
            model is made for. No table depends on it.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of attention probabilities.
        mlp_dropout (`float`, *optional*, defaults to 0.0): Dropout of the output of the MLP.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new weights.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): The output head shares the embedding table.
        use_cache (`bool`, *optional*, defaults to `True`): Return key/value caches, except in training.
        pad_token_id (`int`, *optional*, defaults to 0): Padding.
        bos_token_id (`int`, *optional*, defaults to 1): Start of text.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 2): End of text.
        decoder_start_token_id (`int`, *optional*, defaults to 1): First token of every target.

    Raises:
        TypeError: A keyword argument is neither a field of this class nor one that transformers uses.
        StrictDataclassClassValidationError: Two fields contradict each other.
    """

    model_type = "encdec_slm"
    keys_to_ignore_at_inference = ["past_key_values"]
    # PEFT and caches read `num_hidden_layers` and mean the stack that generates.
    attribute_map = {"num_hidden_layers": "decoder_num_hidden_layers"}

    vocab_size: int = 32128
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    encoder_num_hidden_layers: int = 8
    decoder_num_hidden_layers: int = 4
    hidden_act: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters | dict | None = None
    encoder_no_rope_layers: list[int] | None = None
    decoder_no_rope_layers: list[int] | None = None
    max_position_embeddings: int = 2048
    attention_dropout: float | int = 0.0
    mlp_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check the fields against each other. Called by `@strict` whenever a config is built."""
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "max_position_embeddings"),
        ):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads}), since each key/value head serves a group of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` ({self.head_dim}) must be even, since rotary embeddings rotate pairs of dimensions. Its "
                f"default is `hidden_size // num_attention_heads` ({self.hidden_size} // {self.num_attention_heads}). "
                "Set it to an even number."
            )
        for stack in ("encoder", "decoder"):
            layers, depth = getattr(self, f"{stack}_no_rope_layers"), getattr(self, f"{stack}_num_hidden_layers")
            if layers is not None and (len(layers) != depth or not set(layers) <= {0, 1}):
                raise ValueError(
                    f"`{stack}_no_rope_layers` is {layers}, but must have a 1 (rotary embeddings) or 0 (none) for "
                    f"each of the {depth} {stack} layers. Leave it out for rotary embeddings in all layers."
                )
        for name in ("attention_dropout", "mlp_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 0 and less than 1.")
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` is False, but must be True. Leave it out.")
        self._validate_token_ids_fit()

    def _validate_token_ids_fit(self):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"`{name}` ({token_id}) must be at least 0 and less than `vocab_size` ({self.vocab_size})."
                    )


def _unknown_field_message(config_class, key):
    # Model families mostly differ in the order of words: `num_encoder_layers`, `encoder_num_hidden_layers`.
    fields = {_sorted_words(field.name): field.name for field in dataclasses.fields(config_class)}
    nearest = fields[difflib.get_close_matches(_sorted_words(key), fields, n=1, cutoff=0.0)[0]]
    return f"{config_class.__name__} has no field `{key}`. Use `{nearest}`, the nearest field, or leave `{key}` out."


def _sorted_words(name):
    return "_".join(sorted(name.split("_")))


__all__ = ["EncDecSLMConfig"]
