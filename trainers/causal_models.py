# SPDX-License-Identifier: Apache-2.0
"""Load decoder-only models: teachers, and models that an evaluation compares with."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_peft_available

from ..checkpoints import check_shapes


# Arguments of `from_pretrained` that also say where the config and the tokenizer of a model are.
LOCATION_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")


def load_causal_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model, which may be the name of a LoRA adapter.

    Args:
        name (`str`): Folder or name on the Hub.
        kwargs: Of `from_pretrained`.

    Raises:
        ValueError: It is not a causal language model, or its weights do not fit its config.
    """
    config = load_base_config(name, **{key: kwargs[key] for key in LOCATION_ARGUMENTS if key in kwargs})
    if config.is_encoder_decoder:
        raise ValueError(not_causal_message(name))
    has_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if has_images and not _is_causal(config) else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    check_shapes(name, model, info)
    if info["missing_keys"]:  # a backbone without its head, which would be initialized randomly
        raise ValueError(not_causal_message(name))
    return model


def is_causal_model(name: str, **location: Any) -> bool:
    """Return whether a folder or a name on the Hub is a decoder-only text model, or an adapter of one.

    Args:
        name (`str`): Folder or name on the Hub.
        location: `LOCATION_ARGUMENTS` of `from_pretrained`.
    """
    try:
        config = load_base_config(name, **location)
    except (OSError, ValueError):
        return False
    return not config.is_encoder_decoder and _is_causal(config)


def load_base_config(name: str, **location: Any) -> PreTrainedConfig:
    """Load the config of a model, or of the base model of an adapter."""
    if is_peft_available():
        from transformers.utils.peft_utils import find_adapter_config_file

        options = {key: value for key, value in location.items() if key != "trust_remote_code"}
        if find_adapter_config_file(name, **options) is not None:
            from peft import PeftConfig

            adapter = PeftConfig.from_pretrained(name, **options)
            if not adapter.base_model_name_or_path:
                raise ValueError(f"The adapter {name!r} does not name its base model. Set `base_model_name_or_path`.")
            name = adapter.base_model_name_or_path
            location = {key: value for key, value in location.items() if key not in ("revision", "subfolder")}
    return AutoConfig.from_pretrained(name, **location)


def not_causal_message(name: str) -> str:
    """Return the error message for a model of another kind."""
    return (
        f"The teacher {name!r} must be a causal language model, because it reads source and target in one row. Use a "
        "decoder-only model that `AutoModelForCausalLM` loads."
    )


def _is_causal(config):
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
