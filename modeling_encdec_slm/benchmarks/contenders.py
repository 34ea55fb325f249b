# SPDX-License-Identifier: Apache-2.0
"""What is timed: shapes of models, the engines that run them, and what each needs by arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5Gemma2Config,
)

from ..configuration import decoder_only_twin, load_preset
from ..configuration.sizes import num_cached_values, num_weights_per_token


OURS, TWIN, T5GEMMA2, FLAN_T5 = "encoder-decoder", "twin", "t5gemma2-270m", "flan-t5-large"
# Engine -> precisions that are timed on a CPU. The first model in `transformers` is what one would use otherwise.
CPU_PRECISIONS = {
    "transformers": ("float32", "bfloat16"),
    "transformers-compiled": ("float32",),
    "ctranslate2": ("float32", "int8"),
    "onnxruntime": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}
CUDA_PRECISIONS = {
    "transformers": ("bfloat16",),
    "transformers-compiled": ("bfloat16",),
    "ctranslate2": ("float16", "int8_float16"),
}
MODULES = {"ctranslate2": "ctranslate2", "onnxruntime": "onnxruntime", "openvino": "openvino"}
# Which models an engine runs; peers that it is not known for are left out.
MODELS = {
    "transformers": (OURS, TWIN, T5GEMMA2),
    "transformers-compiled": (OURS, TWIN),
    "ctranslate2": (OURS, TWIN, T5GEMMA2, FLAN_T5),
    "onnxruntime": (OURS, TWIN),
    "openvino": (OURS, TWIN),
}
# Peers come once per engine, in the precision in which they are at their best.
PEER_PRECISIONS = ("int8", "int8_float16")
# Parts that multiply every source token, by their names in this family, in T5 and in T5Gemma 2; and what sees images.
SOURCE_PARTS = (
    *("encoder.layers.", "encoder.block.", "encoder.text_model.layers."),
    *("cross_attn.k_proj.", "cross_attn.v_proj.", "EncDecAttention.k.", "EncDecAttention.v."),
)
UNUSED = ("vision_tower.", "multi_modal_projector.", "eoi_embedding")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int8_float16": 1}
# Caches are not quantized by any of the engines.
CACHE_ITEM_BYTES = {"int8": 4, "int8_float16": 2}


@dataclass(frozen=True)
class Contender:
    """A model in an engine, in a precision, on a device.

    Args:
        model (`str`): `"encoder-decoder"`, `"twin"`, `"t5gemma2-270m"` or `"flan-t5-large"`.
        engine (`str`): A key of `CPU_PRECISIONS`.
        precision (`str`): Of the weights.
        device (`str`): `"cpu"` or `"cuda"`.
        preset (`str`): Size of the encoder-decoder, and of its twin.
    """

    model: str
    engine: str
    precision: str
    device: str
    preset: str

    @property
    def name(self) -> str:
        return f"{self.model}/{self.engine}/{self.precision}/{self.device}"

    @property
    def config(self) -> PreTrainedConfig:
        return config_of(self.model, self.preset)

    @property
    def item_bytes(self) -> int:
        """Of a weight."""
        return ITEM_BYTES[self.precision]

    @property
    def cache_item_bytes(self) -> int:
        """Of a cached number."""
        return CACHE_ITEM_BYTES.get(self.precision, self.item_bytes)


def list_contenders(preset: str, devices: Sequence[str], patterns: Sequence[str] = ("*",)) -> list[Contender]:
    """All contenders that this machine can run, engine by engine.

    Args:
        preset (`str`): A text model; see [`~encdec_slm.configuration.list_presets`].
        devices (`Sequence[str]`): Of `"cpu"` and `"cuda"`.
        patterns (`Sequence[str]`): Of names, such as `"*/ctranslate2/*"`.

    Raises:
        ValueError: No contender fits the patterns.
    """
    contenders = [
        Contender(model, engine, precision, device, preset)
        for device in devices
        for engine, precisions in (CPU_PRECISIONS if device == "cpu" else CUDA_PRECISIONS).items()
        if find_spec(MODULES.get(engine, "torch"))
        for precision in precisions
        for model in MODELS[engine]
        if _is_timed(model, engine, precision, device)
    ]
    chosen = [one for one in contenders if any(fnmatch(one.name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(
            f"No contender fits {', '.join(patterns)}. Names are model/engine/precision/device; on this machine: "
            f"{', '.join(one.name for one in contenders)}."
        )
    return chosen


def _is_timed(model, engine, precision, device):
    if device == "cpu" and precision == "bfloat16" and not has_bfloat16_units():
        return False
    if model in (T5GEMMA2, FLAN_T5) and engine == "ctranslate2":
        return precision in PEER_PRECISIONS
    return True


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16; without, matrix products in it are far slower than in float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and "avx512_bf16" in _cpu_flags()


def _cpu_flags():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as opened:
            return next((line for line in opened if line.startswith("flags")), "").split()
    except OSError:
        return []


def config_of(model: str, preset: str) -> PreTrainedConfig:
    """The config of a shape: the preset, its decoder-only twin, or a peer in the sizes that it was published in."""
    if model == OURS:
        return load_preset(preset)
    if model == TWIN:
        return decoder_only_twin(load_preset(preset))
    return _t5gemma2_270m() if model == T5GEMMA2 else _flan_t5_large()


def _t5gemma2_270m():
    """Two of Gemma 3 270M, without the tower that sees images."""
    sizes = {
        **{"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
        "layer_types": ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(18)],
    }
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    tower = {**small, "image_size": 32, "patch_size": 16}
    return T5Gemma2Config(encoder={"text_config": dict(sizes), "vision_config": tower}, decoder=dict(sizes))


def _flan_t5_large():
    return T5Config(
        vocab_size=32_128,
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


def random_model(contender: Contender, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The model of a contender in eval mode, with weights of a normal distribution; it never ends a text by itself."""
    config = contender.config
    model = random_weights(config, dtype, device)
    if config.model_type == "qwen3" and not load_preset(contender.preset).qk_norm:
        # Qwen stands in where Llama refuses the shape; norms that our side lacks would cost the twin about 3 %.
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    return model


def random_weights(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model in eval mode with weights of a normal distribution; it never ends a text by itself."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_class.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = model.generation_config.max_length = None
    return model


@dataclass(frozen=True)
class Needs:
    """What a contender needs by arithmetic.

    Args:
        num_parameters (`int`): A tied table counts once.
        step_weights (`int`): Parameters that one generated token needs read.
        cached_values (`int`): Numbers that one token of the source, or of what is written, adds to the caches.
        source_weights (`int`): Parameters that each source token is multiplied with.
        first_step_weights (`int`): Parameters that the first token is multiplied with after the source was read.
        attention_size (`int`): Widths of all attentions over the source, summed over layers; half of a causal one.
    """

    num_parameters: int
    step_weights: int
    cached_values: int
    source_weights: int
    first_step_weights: int
    attention_size: int

    def step_bytes(self, contender: Contender, length: int) -> int:
        """What one generated token reads with `length` tokens of source and target cached."""
        return contender.item_bytes * self.step_weights + contender.cache_item_bytes * length * self.cached_values

    def first_token_flops(self, length: int) -> int:
        """Floating point operations to read a source of `length` tokens and to write one."""
        return 2 * (length * self.source_weights + self.first_step_weights) + 4 * self.attention_size * length**2


def needs_of(config: PreTrainedConfig) -> Needs:
    """The [`Needs`] of the model that a config describes."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    parts = SOURCE_PARTS if config.is_encoder_decoder else (".layers.",)
    of_encoder = getattr(config, "encoder", config)
    depth = getattr(config, "encoder_num_hidden_layers", None) or of_encoder.get_text_config().num_hidden_layers
    width = head_width(of_encoder.get_text_config())
    sizes = {name: value.numel() for name, value in model.named_parameters() if not any(p in name for p in UNUSED)}
    step_weights = num_weights_per_token(config)
    source_weights = sum(size for name, size in sizes.items() if any(part in name for part in parts))
    return Needs(
        num_parameters=sum(sizes.values()),
        step_weights=step_weights,
        first_step_weights=step_weights if config.is_encoder_decoder else step_weights - source_weights,
        cached_values=num_cached_values(config),
        source_weights=source_weights,
        attention_size=depth * width if config.is_encoder_decoder else depth * width // 2,
    )


def head_width(config: PreTrainedConfig) -> int:
    """Width of all query heads together."""
    return config.num_attention_heads * config.head_dim
