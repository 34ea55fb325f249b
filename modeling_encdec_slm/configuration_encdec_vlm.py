# SPDX-License-Identifier: Apache-2.0
"""Configuration of the vision-text models, and the geometry of images: tiles, and tokens per image."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_encdec_slm import EncDecPreTrainedConfig, EncDecSLMConfig


# CLIP ViT-L/14-336, the tower of microsoft/encoder-decoder-slm.
DEFAULT_VISION_CONFIG = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14, "projection_dim": 768},
}
DEFAULT_PINPOINTS = ((336, 336), (672, 672), (672, 1008), (1008, 672))


@strict
class EncDecVLMConfig(EncDecPreTrainedConfig):
    r"""Configuration of a vision-text encoder-decoder: a text model, a vision tower, and what connects them.

    An image becomes one downscaled tile and a grid of tiles, of the resolution in `image_grid_pinpoints` that fits it
    best (LLaVA-NeXT). Their features take the places of its tokens in the encoder.

    Args:
        text_config ([`EncDecSLMConfig`] or `dict`, *optional*): Config of the text model. `None` means its defaults.
        vision_config ([`~transformers.PreTrainedConfig`] or `dict`, *optional*): Config of a vision tower that
            transformers' `AutoModel` supports, with square tiles and patches, such as CLIP, SigLIP, DINOv2 or ViT.
            `None` means CLIP ViT-L/14-336.
        image_token_id (`int`, *optional*, defaults to 32011): Token that stands for one image feature in `input_ids`.
        vision_feature_layer (`int`, *optional*, defaults to -2): Hidden state of the tower that is read, as an index
            into `hidden_states`: 0 is the embeddings, -1 the last layer.
        vision_feature_select_strategy (`str`, *optional*): `"default"` drops what precedes the patches (CLIP's class
            token, registers); `"full"` keeps everything, for towers that have patches only. `None` chooses by the
            tower.
        image_grid_pinpoints (`list[list[int]]`, *optional*): Resolutions `(height, width)` in pixels, multiples of
            the tower's `image_size`. `None` means 1 x 1, 2 x 2, 2 x 3 and 3 x 2 tiles.
        max_num_tiles (`int`, *optional*, defaults to 3): The features of a grid are resized if they exceed those of
            this number of tiles by more than a fifth.
        image_newline (`bool`, *optional*, defaults to `True`): A learned vector ends each row of grid features.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation between the projector's two layers.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new projector weights.
        tie_word_embeddings (`bool`, *optional*): As in `text_config`, which is also the default.

    Raises:
        ValueError: `text_config` or `vision_config` is of an unsuitable type.
        TypeError: A keyword argument is neither a field of this class nor one that transformers uses.
        StrictDataclassClassValidationError: Two fields contradict each other.
    """

    model_type = "encdec_vlm"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs = {"text_config": EncDecSLMConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32011
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    image_grid_pinpoints: list[list[int]] | None = None
    max_num_tiles: int = 3
    image_newline: bool = True
    projector_hidden_act: str = "gelu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        self.text_config = _text_config(self.text_config)
        self.vision_config = _vision_config(self.vision_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "full" if "siglip" in self.vision_config.model_type else "default"
        if self.image_grid_pinpoints is None:
            tile = self.tile_size
            self.image_grid_pinpoints = [[tile * side // 336 for side in pinpoint] for pinpoint in DEFAULT_PINPOINTS]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "EncDecVLMConfig":
        """Build the config that a `config.json` describes. Args: as in [`EncDecPreTrainedConfig.from_dict`]."""
        text_config = config_dict.get("text_config")
        if isinstance(text_config, dict):
            _check_text_type(text_config.get("model_type", EncDecSLMConfig.model_type))
            config_dict = {**config_dict, "text_config": EncDecSLMConfig.from_dict(text_config)}
        return super().from_dict(config_dict, **kwargs)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return _side(self.vision_config, "image_size")

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return _side(self.vision_config, "patch_size")

    @property
    def patches_per_side(self) -> int:
        """Number of whole patches along one side of a tile."""
        return self.tile_size // self.patch_size

    def validate_architecture(self):
        """Check the fields against each other. Called by `@strict` whenever a config is built."""
        tile, num_channels = self.tile_size, getattr(self.vision_config, "num_channels", 3)
        if self.patches_per_side < 1 or num_channels != 3:
            raise ValueError(
                f"`vision_config` has `image_size` {tile}, `patch_size` {self.patch_size} and "
                f"`num_channels` {num_channels}, but must have at least one patch per tile, and three channels."
            )
        pinpoints = self.image_grid_pinpoints
        if not pinpoints or any(
            len(pair) != 2 or min(pair) < tile or any(side % tile for side in pair) for pair in pinpoints
        ):
            raise ValueError(
                f"`image_grid_pinpoints` is {pinpoints}, but must have at least one (height, width) in pixels, both "
                f"multiples of the tower's `image_size` ({tile})."
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` ({self.image_token_id}) must be at least 0 and less than `vocab_size` of "
                f"`text_config` ({self.text_config.vocab_size})."
            )
        depth = self.vision_config.num_hidden_layers
        if not -depth - 1 <= self.vision_feature_layer <= depth:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}, but the tower has hidden states 0 to {depth} "
                f"(or -1 to {-depth - 1})."
            )
        if self.max_num_tiles < 1:
            raise ValueError(f"`max_num_tiles` is {self.max_num_tiles}, but must be at least 1.")
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` is False, but must be True. Leave it out.")


def _text_config(config: Any) -> PreTrainedConfig:
    if config is None:
        return EncDecSLMConfig()
    if not isinstance(config, dict):
        _check_text_type(config.model_type)
        return config
    fields = copy.deepcopy(config)
    _check_text_type(fields.pop("model_type", EncDecSLMConfig.model_type))
    return EncDecSLMConfig(**fields)


def _check_text_type(model_type: str):
    if model_type != EncDecSLMConfig.model_type:
        raise ValueError(
            f"`text_config` is of the type {model_type!r}, but must be of {EncDecSLMConfig.model_type!r}. Convert a "
            "decoder-only model with `from_decoder_only`."
        )


def _vision_config(config: Any) -> PreTrainedConfig:
    if config is None:
        return CLIPVisionConfig(**DEFAULT_VISION_CONFIG)
    if not isinstance(config, dict):
        return config
    kind = config.get("model_type", CLIPVisionConfig.model_type)
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"`vision_config` is of the type {kind!r}, which transformers does not have. Use a type such as "
            "'clip_vision_model' or 'siglip_vision_model'."
        )
    return CONFIG_MAPPING[kind](**copy.deepcopy(config))


def _side(config: PreTrainedConfig, name: str) -> int:
    """Return the side of a square in pixels, which some towers store as a pair."""
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int) or value < 1 or not hasattr(config, "hidden_size"):
        raise ValueError(
            f"`vision_config` is of the type {config.model_type!r} with `{name}` {value}, but the tower must read "
            "square tiles in square patches, as CLIP and SigLIP do. For a model of text and vision, pass its "
            "`vision_config`."
        )
    return value


def grid_shape(image_size: tuple[int, int], pinpoints: Sequence[Sequence[int]], tile_size: int) -> tuple[int, int]:
    """Return the rows and columns of the grid of tiles that an image is cut into.

    Args:
        image_size (`tuple[int, int]`): Height and width of the image, in pixels.
        pinpoints (`Sequence`): Resolutions (height, width) to choose from.
        tile_size (`int`): Side of a tile, in pixels.
    """
    height, width = select_best_resolution(image_size, pinpoints)
    return height // tile_size, width // tile_size


def unpadded_bounds(image_size: tuple[int, int], grid_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return where the image is in the features of its padded grid: top, bottom, left and right, in features.

    If the padding is odd, one row or column of it remains, as in microsoft/encoder-decoder-slm.

    Args:
        image_size (`tuple[int, int]`): Height and width of the image, in pixels.
        grid_size (`tuple[int, int]`): Height and width of the grid, in features.
    """
    (height, width), (grid_height, grid_width) = image_size, grid_size
    if width / height > grid_width / grid_height:
        padding = (grid_height - int(height * (grid_width / width))) // 2
        return padding, grid_height - padding, 0, grid_width
    padding = (grid_width - int(width * (grid_height / height))) // 2
    return 0, grid_height, padding, grid_width - padding


def shrunk_size(height: int, width: int, patches_per_side: int, max_num_tiles: int) -> tuple[int, int]:
    """Return the height and width that grid features are resized to, or their own if they are not too many.

    Args:
        height (`int`): Height of the features without padding.
        width (`int`): Width of the features without padding.
        patches_per_side (`int`): Number of features along one side of a tile.
        max_num_tiles (`int`): See [`EncDecVLMConfig`].
    """
    ratio = math.sqrt(height * width / (max_num_tiles * patches_per_side**2))
    return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


def feature_shape(
    image_size: tuple[int, int],
    pinpoints: Sequence[Sequence[int]],
    tile_size: int,
    patches_per_side: int,
    max_num_tiles: int,
) -> tuple[int, int]:
    """Return the height and width of an image's final grid features, without the column of newlines.

    Args: as in [`grid_shape`] and [`shrunk_size`].
    """
    rows, columns = grid_shape(image_size, pinpoints, tile_size)
    top, bottom, left, right = unpadded_bounds(image_size, (rows * patches_per_side, columns * patches_per_side))
    return shrunk_size(bottom - top, right - left, patches_per_side, max_num_tiles)


def num_image_tokens(
    image_size: tuple[int, int],
    pinpoints: Sequence[Sequence[int]],
    tile_size: int,
    patches_per_side: int,
    max_num_tiles: int,
    image_newline: bool = True,
) -> int:
    """Return the number of tokens of an image: one per feature of its downscaled tile and its grid.

    Args: as in [`feature_shape`], and
        image_newline (`bool`, *optional*, defaults to `True`): See [`EncDecVLMConfig`].
    """
    height, width = feature_shape(image_size, pinpoints, tile_size, patches_per_side, max_num_tiles)
    return patches_per_side**2 + height * (width + image_newline)


__all__ = ["EncDecVLMConfig"]
