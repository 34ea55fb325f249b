# SPDX-License-Identifier: Apache-2.0
"""The family's catalog: sizes and training recipes as data."""

from ..configuration_encdec_slm import EncDecSLMConfig
from ..configuration_encdec_vlm import EncDecVLMConfig
from .recipe_files import list_recipes, load_recipe
from .sizes import decoder_only_twin, list_presets, load_preset


__all__ = [
    "EncDecSLMConfig",
    "EncDecVLMConfig",
    "decoder_only_twin",
    "list_presets",
    "list_recipes",
    "load_preset",
    "load_recipe",
]
