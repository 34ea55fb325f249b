# SPDX-License-Identifier: Apache-2.0
"""Time a model and its decoder-only baseline on the same input, for the page."""

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


# The models take turns, so that a busy moment of the machine affects both.
NUM_ROUNDS = 3
NAMES = ("this model", "decoder-only baseline")


def build_baseline(model: PreTrainedModel) -> PreTrainedModel:
    """Build a decoder-only model with the size, dtype and device of `model` and random weights, in evaluation mode."""
    has_vision = hasattr(model.config, "vision_config")
    # The code of a checkpoint has its own config class.
    config = (EncDecVLMConfig if has_vision else EncDecSLMConfig).from_dict(model.config.to_dict())
    auto_class = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    with torch.device(model.device):
        baseline = auto_class.from_config(decoder_only_twin(config), dtype=model.dtype).eval()
    if not config.get_text_config().qk_norm:
        _remove_qk_norms(baseline)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(baseline.generation_config, name, getattr(model.generation_config, name))
    baseline.generation_config.max_length = None
    return baseline


def _remove_qk_norms(baseline):
    """Remove the norms of Qwen3, used where Llama refuses the sizes; they cost about 3 % and the model has none."""
    for module in baseline.modules():
        if hasattr(module, "q_norm"):
            module.q_norm = module.k_norm = torch.nn.Identity()


def adapt_inputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the inputs of `model` to those of its baseline, with as many image tokens as LLaVA-NeXT requires.

    Args:
        model ([`~transformers.PreTrainedModel`]): The encoder-decoder.
        inputs (`dict[str, torch.Tensor]`): One text with at most one image.
    """
    if "pixel_values" not in inputs:
        return inputs
    config, ids = model.config, inputs["input_ids"][0]
    # LLaVA-NeXT has no limit for the number of tiles.
    geometry = (config.image_grid_pinpoints, config.tile_size, config.patches_per_side, sys.maxsize)
    count = num_image_tokens(tuple(inputs["image_sizes"][0].tolist()), *geometry)
    is_image = ids == config.image_token_id
    first = is_image.nonzero()[0, 0]
    ids = torch.cat([ids[:first], ids.new_full((count,), config.image_token_id), ids[first:][~is_image[first:]]])[None]
    tiles = inputs["pixel_values"][None].to(model.dtype)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiles}


def measure_speeds(
    models: Sequence[PreTrainedModel],
    inputs: Sequence[dict[str, torch.Tensor]],
    num_new_tokens: int,
    stop: threading.Event,
) -> Iterator[str]:
    """Yield the table of [`format_speeds`] after each round.

    Args:
        models (`Sequence`): The model and its baseline, both warmed up.
        inputs (`Sequence`): Inputs of each.
        num_new_tokens (`int`): Tokens that both generate, at least 2; end-of-text tokens do not stop them.
        stop (`threading.Event`): Ends the measurement before the next run.
    """
    runs = [], []
    for _ in range(NUM_ROUNDS):
        for model, given, seconds in zip(models, inputs, runs, strict=True):
            if stop.is_set():
                return
            others = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}
            seconds.append(token_seconds(model, given["input_ids"], num_new_tokens, num_beams=1, **others))
        yield format_speeds(models, runs, inputs[0]["input_ids"].shape[1])


def format_speeds(models: Sequence[PreTrainedModel], runs: Sequence[list[list[float]]], source_length: int) -> str:
    """Format the medians of both models and their ratios as Markdown.

    Args:
        models (`Sequence`): The model and its baseline.
        runs (`Sequence`): Runs of each, equally many: seconds until each new token.
        source_length (`int`): Tokens of the model's source.
    """
    first = [median(run[0] for run in own) for own in runs]
    rates = [median(map(decode_rate, own)) for own in runs]
    lines = ["| | parameters | first token | tokens/s |", "| --- | ---: | ---: | ---: |"]
    for name, model, seconds, rate in zip(NAMES, models, first, rates, strict=True):
        lines.append(f"| {name} | {model.num_parameters() / 1e6:.3g}M | {1000 * seconds:,.1f} ms | {rate:,.1f} |")
    dtype = str(models[0].dtype).removeprefix("torch.")
    conditions = (
        f"{source_length:,} source tokens, {len(runs[0][0])} new tokens, {models[0].device.type}, {dtype}, median of "
        f"{len(runs[0])} runs in turn"
    )
    ratios = (
        f"Time to the first token: {first[0] / first[1]:.2f} x the baseline's; decoding: {rates[0] / rates[1]:.2f} x "
        f"as fast ({conditions}). The baseline has random weights: only its speed is meaningful, not its text."
    )
    return "\n".join([*lines, "", ratios])
