# SPDX-License-Identifier: Apache-2.0
"""What examples/evidence.py counts and measures of any model: operations of training, and losses of rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from encdec_slm.configuration.sizes import build_model
from encdec_slm.trainers.row_encoding import LABELS_PADDING


def count_training_flops(config: Any, lengths: Sequence[tuple[int, int]]) -> int:
    """Count the floating-point operations of one training step on rows without padding.

    Counted are matrix products, a multiplication and an addition as two, as in `torch.utils.flop_counter`. Attention
    counts in full although half of a causal one is masked, and a backward pass as two forward passes, or as one where
    the input needs no gradient.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of an encoder-decoder or a decoder-only model. Models with images
            have one image per row, of one tile and the whole.
        lengths (`Sequence[tuple[int, int]]`): Tokens of source and target of each row. A decoder-only model reads as
            many, in one row: the end of the source is the token that separates them.
    """
    sources, targets = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    num_tokens = {"source": int(sources.sum()), "target": int(targets.sum()), "both": int((sources + targets).sum())}
    text, vision, total = config.get_text_config(), getattr(config, "vision_config", None), 0
    if vision is not None:
        num_patches, num_images = (vision.image_size // vision.patch_size) ** 2, 2 * len(lengths)
        num_tokens["image"] = num_images * num_patches
        total += 12 * vision.hidden_size * vision.num_hidden_layers * num_images * num_patches**2
    for name, module in build_model(config, "meta").named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            num_passes = 3 if isinstance(module, torch.nn.Linear) else 2  # the convolution reads pixels
            total += 2 * num_passes * module.weight.numel() * num_tokens[_find_input(name, config)]
    width = 12 * text.num_attention_heads * text.head_dim
    if config.is_encoder_decoder:
        total += width * text.encoder_num_hidden_layers * int((sources**2).sum())
        total += width * text.decoder_num_hidden_layers * int((targets**2 + sources * targets).sum())
    else:
        total += width * text.num_hidden_layers * int(((sources + targets) ** 2).sum())
    return total


def _find_input(name, config):
    if "vision_tower" in name or "multi_modal_projector" in name:
        return "image"
    if not config.is_encoder_decoder:
        return "both"
    is_source = "encoder." in name or name.endswith(("cross_attn.k_proj", "cross_attn.v_proj"))
    return "source" if is_source else "target"


@torch.no_grad()
def sum_losses(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[list[float], list[int]]:
    """Return the loss of each row, in nats, summed over the tokens of its target, and the number of these tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): An encoder-decoder, or a decoder-only model that reads source and
            target in one row.
        batches (`Iterable[Mapping]`): Inputs of the model, with `labels`.
    """
    shift = 0 if model.config.is_encoder_decoder else 1
    losses, num_tokens = [], []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch["labels"][:, shift:]
        logits = model(**batch).logits[:, : labels.shape[1]]
        loss = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        losses += loss.sum(1).tolist()
        num_tokens += (labels != LABELS_PADDING).sum(1).tolist()
    return losses, num_tokens
