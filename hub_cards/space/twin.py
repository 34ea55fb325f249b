# SPDX-License-Identifier: Apache-2.0
"""The page's side by side: a model and a decoder-only one of the same size, timed on what a visitor has typed."""

import sys
import threading
from collections.abc import Iterator, Sequence
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from encdec_slm import EncDecSLMConfig, EncDecVLMConfig
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.configuration_encdec_vlm import num_image_tokens
from encdec_slm.generation_speed import decode_rate, token_seconds


# Each times both models, in turn: a busy moment of the machine hits both.
ROUNDS = 3
NAMES = ("this model", "decoder-only twin")


def build_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder-only model of the size, number type and device of `model`, with random weights, in eval mode."""
    sees = hasattr(model.config, "vision_config")
    # A checkpoint's own code has its own copy of the class.
    config = (EncDecVLMConfig if sees else EncDecSLMConfig).from_dict(model.config.to_dict())
    auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device(model.device):
        twin = auto_class.from_config(decoder_only_twin(config), dtype=model.dtype).eval()
    if not config.get_text_config().qk_norm:
        _remove_head_norms(twin)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(twin.generation_config, name, getattr(model.generation_config, name))
    twin.generation_config.max_length = None
    return twin


def _remove_head_norms(twin):
    """Qwen stands in where Llama refuses the shape; norms that the other side lacks would cost it about 3 %."""
    for module in twin.modules():
        if hasattr(module, "q_norm"):
            module.q_norm = module.k_norm = torch.nn.Identity()


def twin_inputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `model` reads, as its twin reads it: an image has as many tokens as LLaVA-NeXT makes of it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The encoder-decoder.
        inputs (`dict[str, torch.Tensor]`): One text, with at most one image.
    """
    if "pixel_values" not in inputs:
        return inputs
    config, ids = model.config, inputs["input_ids"][0]
    # LLaVA-NeXT shrinks no grid.
    geometry = (config.image_grid_pinpoints, config.tile_size, config.patches_per_side, sys.maxsize)
    count = num_image_tokens(tuple(inputs["image_sizes"][0].tolist()), *geometry)
    is_image = ids == config.image_token_id
    first = is_image.nonzero()[0, 0]
    ids = torch.cat([ids[:first], ids.new_full((count,), config.image_token_id), ids[first:][~is_image[first:]]])[None]
    tiles = inputs["pixel_values"][None].to(model.dtype)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiles}


def measure(
    models: Sequence[PreTrainedModel],
    inputs: Sequence[dict[str, torch.Tensor]],
    num_new_tokens: int,
    stop: threading.Event,
) -> Iterator[str]:
    """The [`speed_table`] after each round in which both models have had their turn.

    Args:
        models (`Sequence`): The page's and its twin, both warm.
        inputs (`Sequence`): What each reads.
        num_new_tokens (`int`): Both write as many, at least 2, whether or not their texts end before.
        stop (`threading.Event`): No further turn begins.
    """
    runs = [], []
    for _ in range(ROUNDS):
        for model, given, seconds in zip(models, inputs, runs, strict=True):
            if stop.is_set():
                return
            seconds.append(_token_seconds(model, given, num_new_tokens))
        yield speed_table(models, runs, inputs[0]["input_ids"].shape[1])


def _token_seconds(model, inputs, num_new_tokens):
    given = {name: tensor for name, tensor in inputs.items() if name not in ("input_ids", "attention_mask")}
    return token_seconds(model, inputs["input_ids"], num_new_tokens, num_beams=1, **given)


def speed_table(models: Sequence[PreTrainedModel], runs: Sequence[list[list[float]]], source_length: int) -> str:
    """Medians of both models as Markdown, and how they compare.

    Args:
        models (`Sequence`): The page's and its twin.
        runs (`Sequence`): Of each its runs, equally many: seconds until each of the new tokens was known.
        source_length (`int`): Of what the page's reads, in tokens.
    """
    first = [median(run[0] for run in own) for own in runs]
    rates = [median(map(decode_rate, own)) for own in runs]
    lines = ["| | parameters | first token | tokens/s |", "| --- | ---: | ---: | ---: |"]
    for name, model, seconds, rate in zip(NAMES, models, first, rates, strict=True):
        lines.append(f"| {name} | {model.num_parameters() / 1e6:.3g}M | {1000 * seconds:,.1f} ms | {rate:,.1f} |")
    dtype = str(models[0].dtype).removeprefix("torch.")
    how = (
        f"The first token took {first[0] / first[1]:.2f} of the twin's time, and the others came at "
        f"{rates[0] / rates[1]:.2f} times its rate ({source_length:,} tokens read, {len(runs[0][0])} written by both, "
        f"{models[0].device.type}, {dtype}, median of {len(runs[0])}, in turn). The twin's weights are random: its "
        "text is noise, and only its speed counts."
    )
    return "\n".join([*lines, "", how])
