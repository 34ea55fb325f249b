# SPDX-License-Identifier: Apache-2.0
"""The predecessor's vision-language weights (microsoft/encoder-decoder-slm, `mu_vision`) in this family's names."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig

from .configuration_encdec_slm import EncDecSLMConfig
from .configuration_encdec_vlm import EncDecVLMConfig


TEXT_FIELDS = (
    *("n_encoder_layer", "n_decoder_layer", "n_embd", "hidden_dim", "n_head", "n_kv_head", "vocab_size"),
    *("pad_token_id", "block_size", "rope_theta", "rope_factor", "dropout"),
)
# What the released model has, of settings that others of its code have other values for.
ONLY_VALUES = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_resampler_type": None,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "use_vision_cross_attn": False,
    "cross_image_pos_embed": False,
    "use_pos_skipping": False,
    "rope_factor": 1.0,
}
TOWER = "vision_tower.vision_tower.vision_model."
RENAMINGS = (
    (re.escape(TOWER), "model.encoder.vision_tower."),
    (r"^mm_projector\.0\.", "model.encoder.multi_modal_projector.linear_1."),
    (r"^mm_projector\.2\.", "model.encoder.multi_modal_projector.linear_2."),
    (r"^image_newline$", "model.encoder.image_newline"),
)
CLIP_HEAD_DIM = 64


def read_vision_config(path: Path) -> dict[str, Any]:
    """The fields of the `config.json` beside a vision checkpoint.

    Raises:
        ValueError: There is none, it is no JSON object, or it asks for what the released model has not.
    """
    file = path.parent / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is the checkpoint of a vision-language model, but beside it is no `config.json` that can "
            f"be read ({type(error).__name__}). Put the predecessor's there: shapes cannot tell all of it."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{str(file)!r} holds a {type(fields).__name__}, but must be a JSON object. Fetch it again.")
    others = [f"{name} {fields[name]!r}" for name, only in ONLY_VALUES.items() if fields.get(name, only) != only]
    ratio = fields.get("image_aspect_ratio", "anyres_max_3")
    if not isinstance(ratio, str) or not re.fullmatch(r"anyres_max_[1-9][0-9]*", ratio):
        others.append(f"image_aspect_ratio {ratio!r}")
    pinpoints, layer = fields.get("image_grid_pinpoints", []), fields.get("mm_vision_select_layer", -2)
    if not isinstance(pinpoints, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pinpoints):
        others.append(f"image_grid_pinpoints {pinpoints!r}")
    if not isinstance(layer, int):
        others.append(f"mm_vision_select_layer {layer!r}")
    if others:
        raise ValueError(
            f"{str(file)!r} asks for {', '.join(others)}, which the predecessor's released model has not and this "
            "converter cannot represent. Only its released form is imported."
        )
    return fields


def vision_reference_config(
    text_config: EncDecSLMConfig,
    weights: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any],
    image_token_id: int,
    vision_config: Mapping[str, Any] | None = None,
) -> EncDecVLMConfig:
    """The config of this family that computes what the predecessor's vision-language model computes.

    Args:
        text_config ([`EncDecSLMConfig`]): Of its text model.
        weights (`Mapping[str, torch.Tensor]`): Its state dict; the tower's sizes are read from shapes.
        fields (`Mapping[str, Any]`): From [`read_vision_config`].
        image_token_id (`int`): Where the predecessor has -200.
        vision_config (`Mapping[str, Any]`, *optional*): Fields of [`~transformers.CLIPVisionConfig`] that shapes do
            not tell. `None` means heads that are 64 wide, as in all of OpenAI's.

    Raises:
        ValueError: Weights of the tower are missing, or its number of heads is not known.
    """
    pinpoints = fields.get("image_grid_pinpoints")
    return EncDecVLMConfig(
        text_config=text_config,
        vision_config=_tower_config(weights, vision_config or {}),
        image_token_id=image_token_id,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        # Theirs are (width, height).
        image_grid_pinpoints=None if pinpoints is None else [[height, width] for width, height in pinpoints],
        max_num_tiles=int(fields.get("image_aspect_ratio", "anyres_max_3").rpartition("_")[2]),
    )


def _tower_config(weights, given):
    try:
        width = weights[f"{TOWER}embeddings.class_embedding"].shape[0]
        patch_size = weights[f"{TOWER}embeddings.patch_embedding.weight"].shape[-1]
        num_positions = weights[f"{TOWER}embeddings.position_embedding.weight"].shape[0]
        inner = weights[f"{TOWER}encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"The checkpoint has no whole vision tower ({error} is missing or misshaped). Give one that was saved as "
            "a whole, not a projector alone."
        ) from error
    if "num_attention_heads" not in given and width % CLIP_HEAD_DIM:
        raise ValueError(
            f"The vision tower is {width} wide, and shapes cannot tell its number of heads. Pass "
            '`model_config={"vision_config": {"num_attention_heads": ...}}`.'
        )
    layers = {key.split(".")[5] for key in weights if key.startswith(f"{TOWER}encoder.layers.")}
    told = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // CLIP_HEAD_DIM,
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(num_positions - 1),
    }
    return CLIPVisionConfig(**{**told, **given})


def convert_vision_tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of tower, projector and newline, and whatever else is none of the text model's.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The predecessor's state dict.
    """
    converted = {}
    for key, tensor in weights.items():
        if key.startswith(("transformer.", "lm_head.")):
            continue
        for pattern, replacement in RENAMINGS:
            key = re.sub(pattern, replacement, key)
        converted[key] = tensor
    return converted
