# SPDX-License-Identifier: Apache-2.0
"""Models, engines and precisions that the benchmark times."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec

import torch
from transformers import PreTrainedConfig, PreTrainedModel, T5Config, T5Gemma2Config

from ..configuration import decoder_only_twin, load_preset
from ..configuration.sizes import build_model, num_cached_values, num_weights_per_token
from ..export.onnx_quantization import BLOCK_SIZES
from .machine import has_bfloat16_units


OURS, BASELINE, T5GEMMA2, FLAN_T5 = "encoder-decoder", "decoder-only", "t5gemma2-270m", "flan-t5-large"
TORCH_ENGINES = ("transformers", "transformers-compiled")
# Engine -> models, and precisions by device. Peers are timed in int8 where the engine has a converter for them.
ENGINES = {
    "transformers": (
        (OURS, BASELINE, T5GEMMA2),
        {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)},
    ),
    "transformers-compiled": ((OURS, BASELINE), {"cpu": ("float32",), "cuda": ("bfloat16",)}),
    "ctranslate2": (
        (OURS, BASELINE, T5GEMMA2, FLAN_T5),
        {"cpu": ("float32", "int8"), "cuda": ("float16", "int8_float16")},
    ),
    "onnxruntime": ((OURS, BASELINE), {"cpu": ("float32", "int8")}),
    "onnxruntime_genai": ((OURS, BASELINE), {"cpu": ("int8", "int4")}),
    "openvino": ((OURS, BASELINE), {"cpu": ("float32", "bfloat16", "int8")}),
}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int8_float16": 1, "int4": 0.5}
# No engine quantizes its caches.
CACHE_ITEM_BYTES = {**ITEM_BYTES, "int8": 4, "int8_float16": 2, "int4": 4}


@dataclass(frozen=True)
class Contender:
    """A model in an engine, in a precision, on a device.

    Args:
        model (`str`): `"encoder-decoder"`, `"decoder-only"`, `"t5gemma2-270m"` or `"flan-t5-large"`.
        engine (`str`): A key of `ENGINES`.
        precision (`str`): Of the weights.
        device (`str`): `"cpu"` or `"cuda"`.
        preset (`str`): Size of the encoder-decoder and of its decoder-only baseline.
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
        return load_config(self.model, self.preset)

    def build_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Build the model with random weights, in evaluation mode; it never ends a text by itself."""
        torch.manual_seed(0)
        model = build_model(self.config, self.device, dtype=dtype).eval()
        model.generation_config.eos_token_id = model.generation_config.max_length = None
        if model.config.model_type == "qwen3" and not load_preset(self.preset).qk_norm:
            # Qwen3 is used for shapes that Llama refuses; norms that our side lacks would cost the baseline about 3 %.
            for layer in model.model.layers:
                layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
        return model

    def step_bytes(self, length: int) -> int:
        """Return the bytes that one generated token reads with `length` tokens of source and target cached."""
        num_weights, num_bytes = num_weights_per_token(self.config), ITEM_BYTES[self.precision]
        weights = num_bytes * num_weights
        if self.engine == "onnxruntime_genai":  # with a scale per block; the output head has 8 bits
            num_head_weights = self.config.vocab_size * self.config.hidden_size
            num_bytes += 4 / BLOCK_SIZES[int(8 * num_bytes)]
            weights = num_bytes * (num_weights - num_head_weights) + (1 + 4 / BLOCK_SIZES[8]) * num_head_weights
        return int(weights) + CACHE_ITEM_BYTES[self.precision] * length * num_cached_values(self.config)


def list_contenders(preset: str, devices: Sequence[str], patterns: Sequence[str] = ("*",)) -> list[Contender]:
    """List the contenders that this machine can run, by device and engine.

    Args:
        preset (`str`): A text preset, see [`~encdec_slm.configuration.list_presets`].
        devices (`Sequence[str]`): `"cpu"`, `"cuda"` or both.
        patterns (`Sequence[str]`): Patterns of names, such as `"*/ctranslate2/*"`.

    Raises:
        ValueError: No contender matches the patterns.
    """
    contenders = [
        Contender(model, engine, precision, device, preset)
        for device in devices
        for engine, (models, precisions) in ENGINES.items()
        if engine in TORCH_ENGINES or find_spec(engine)
        for precision in precisions.get(device, ())
        if device != "cpu" or precision != "bfloat16" or has_bfloat16_units()
        for model in models
        if model in (OURS, BASELINE) or engine == "transformers" or precision.startswith("int8")
    ]
    chosen = [one for one in contenders if any(fnmatch(one.name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(
            f"No contender matches {', '.join(patterns)}. Names are model/engine/precision/device; on this machine: "
            f"{', '.join(one.name for one in contenders)}."
        )
    return chosen


def load_config(model: str, preset: str) -> PreTrainedConfig:
    """Load the config of a preset, of its decoder-only baseline, or of a peer in its published size."""
    if model == OURS:
        return load_preset(preset)
    if model == BASELINE:
        return decoder_only_twin(load_preset(preset))
    if model == FLAN_T5:
        sizes = {"vocab_size": 32_128, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
        options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
        return T5Config(**sizes, **options)
    sizes = {
        **{"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
        "layer_types": ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(18)],
    }
    # The vision tower is not used.
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    tower |= {"image_size": 32, "patch_size": 16}
    return T5Gemma2Config(encoder={"text_config": dict(sizes), "vision_config": tower}, decoder=dict(sizes))


__all__ = ["BASELINE", "FLAN_T5", "OURS", "T5GEMMA2", "TORCH_ENGINES", "Contender", "list_contenders", "load_config"]
