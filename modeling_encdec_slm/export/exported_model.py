# SPDX-License-Identifier: Apache-2.0
"""Base class of the models that run exports: what transformers' `generate` and pipelines expect of a model."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .. import export_manifest
from ..modeling_encdec_slm import CUSTOM_PIPELINES


class ExportedModel:
    """A model that another runtime computes. Inputs and outputs are torch tensors on the CPU.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Config of the exported model.
        generation_config ([`~transformers.GenerationConfig`]): Defaults of `generate`.
        manifest (`dict`): Manifest of the export.
    """

    main_input_name = "input_ids"
    output_modalities = ("text",)
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, config: PreTrainedConfig, generation_config: GenerationConfig, manifest: dict[str, Any]):
        self.config = config
        if config.model_type == "encdec_slm":
            self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        self.generation_config = generation_config
        self.manifest = manifest
        self.input_modalities = ("text",) if config.model_type == "encdec_slm" else ("image", "text")

    @property
    def name_or_path(self) -> str:
        return self.config.name_or_path

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def to(self, *args, **kwargs) -> "ExportedModel":
        """Return the model itself if its device and dtype are requested.

        Raises:
            ValueError: Another device or dtype is requested.
        """
        for value in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(value, str):
                value = torch.device(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                value = torch.device("cuda", value)
            if isinstance(value, (torch.device, torch.dtype)) and value not in (self.device, self.dtype):
                raise ValueError(
                    f"`to` got {value}, but an export stays where it was loaded. Give the options of "
                    f"`{type(self).__name__}.from_pretrained` instead, and no `device` to a pipeline."
                )
        return self

    def _move(self, value: Any) -> Any:
        """Move a tensor to the device of the export."""
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a tokenizer is that of the exported model.

        Raises:
            ValueError: Its vocabulary differs.
        """
        export_manifest.check_tokenizer(self.manifest, tokenizer)


def check_token_ids(token_ids: Any, name: str, config: PreTrainedConfig) -> None:
    """Check ids of shape `(batch_size, length)`, of any integer type, on the CPU.

    Raises:
        ValueError: The shape does not fit, the tensor is on another device, or an id is not in the vocabulary.
        TypeError: They are not a tensor of integers.
    """
    if not isinstance(token_ids, torch.Tensor) or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        kind = getattr(token_ids, "dtype", type(token_ids).__name__)
        raise TypeError(
            f"`{name}` is of type {kind}, but must be a tensor of integers. Pass what the tokenizer returns."
        )
    if token_ids.ndim != 2:
        raise ValueError(
            f"`{name}` has shape {tuple(token_ids.shape)}, but must have (batch_size, length). Pass what the "
            "tokenizer returns."
        )
    if token_ids.device.type != "cpu":
        raise ValueError(
            f'`{name}` is on {token_ids.device}, but an export reads tensors on the CPU. Use `.to("cpu")`.'
        )
    vocab_size = config.get_text_config().vocab_size
    if token_ids.numel() and not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        raise ValueError(
            f"`{name}` has ids from {token_ids.min()} to {token_ids.max()}, but the vocabulary has ids 0 to "
            f"{vocab_size - 1}. Use the tokenizer in the folder of the export."
        )


def check_attention_mask(attention_mask: torch.Tensor | None, shape: tuple[int, int]) -> None:
    """Check that a mask has the shape of the source.

    Raises:
        ValueError: It does not.
    """
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but the source has {tuple(shape)} (rows, "
            "tokens). Pass what the tokenizer returns."
        )
