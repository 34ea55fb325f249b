# SPDX-License-Identifier: Apache-2.0
"""Generation of the text and vision-text models: options, lengths, static caches, prompt lookup."""

import torch
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator
from transformers.modeling_outputs import BaseModelOutput


# Target tokens, the start token included, when neither the checkpoint nor the caller sets a length.
DEFAULT_MAX_LENGTH = 256


class EncDecSLMGenerationMixin(GenerationMixin):
    """`generate` for the encoder-decoders of this family.

    It differs from [`~transformers.GenerationMixin`] in four points: options that only decoder-only models support
    are refused, generation stops at 256 tokens instead of 20 by default, static caches have few different shapes, and
    prompt lookup also searches the source.
    """

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        self._set_default_length()

    def _set_default_length(self):
        config, text_config = self.generation_config, self.config.get_text_config()
        if config.max_length is None and config.max_new_tokens is None:
            # transformers' default is 20. `Seq2SeqTrainer` pads every prediction to this length.
            config.max_length = min(DEFAULT_MAX_LENGTH, text_config.max_position_embeddings)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        _check_options(generation_config, generation_mode_kwargs.get("assistant_model"))
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            'Continuous batching (`generate_batch`, or `cache_implementation="paged"`) is for decoder-only models. '
            "Call `generate` with a batch of sources instead."
        )

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        # The caller's `max_new_tokens` replaces the length of the checkpoint; that is no conflict to warn about.
        if generation_config.max_new_tokens and generation_config.max_length == self.generation_config.max_length:
            generation_config.max_length = None
        return super()._prepare_generated_length(generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        if "static" in (generation_config.cache_implementation or ""):
            _pad_source_to_bucket(model_kwargs)
            max_cache_length = _bucket_length(max_cache_length)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)

    def _get_candidate_generator(self, *, inputs_tensor, model_kwargs, **kwargs):
        generator = super()._get_candidate_generator(inputs_tensor=inputs_tensor, model_kwargs=model_kwargs, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator) and not inputs_tensor.is_floating_point():
            mask = model_kwargs.get("attention_mask")
            source_ids = inputs_tensor if mask is None else inputs_tensor[mask.bool()][None]
            generator = EncDecSLMSourceLookup(generator, source_ids.to(kwargs["input_ids"].device))
        return generator


class EncDecSLMSourceLookup(CandidateGenerator):
    """Prompt lookup in the source followed by the generated tokens; transformers searches only the latter."""

    def __init__(self, lookup, source_ids):
        self.lookup, self.source_ids = lookup, source_ids
        lookup.max_length += source_ids.shape[1]
        # Processors would count source tokens as generated ones. The model's own choice obeys them in any case.
        lookup.logits_processor = None

    def get_candidates(self, input_ids, **kwargs):
        candidates, _ = self.lookup.get_candidates(torch.cat((self.source_ids, input_ids), dim=1))
        return candidates[:, self.source_ids.shape[1] :], None


def _check_options(generation_config, assistant_model):
    """Refuse what cannot work with an encoder-decoder before any state of the model is changed."""
    refused = {
        "assistant_early_exit": generation_config.assistant_early_exit is not None,
        "guidance_scale": generation_config.guidance_scale not in (None, 1),
        "token_healing": bool(generation_config.token_healing),
        "cache_implementation": generation_config.cache_implementation == "quantized",
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ValueError(
                f"`{name}` is {getattr(generation_config, name)!r}, but transformers supports this for decoder-only "
                "models only. Leave it out."
            )
    if assistant_model is not None and not assistant_model.config.is_encoder_decoder:
        raise ValueError(
            f"`assistant_model` is a {type(assistant_model).__name__}, which is decoder-only, but it has to read the "
            "source of an encoder-decoder. Use an encoder-decoder with the same tokenizer, or "
            "`prompt_lookup_num_tokens`."
        )


def _bucket_length(length):
    """Round up to a power of two, at least 64: few enough shapes to stay below torch's limit of 8 recompilations."""
    return max(64, 1 << (length - 1).bit_length())


def _pad_source_to_bucket(model_kwargs):
    """Pad the encoded source to a bucket's length, so that static caches have one shape per bucket."""
    encoder_outputs = model_kwargs["encoder_outputs"]
    if not isinstance(encoder_outputs, BaseModelOutput):
        encoder_outputs = BaseModelOutput(*encoder_outputs)
    hidden_states = encoder_outputs.last_hidden_state  # (B, S, D)
    batch_size, length = hidden_states.shape[:2]
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        mask = hidden_states.new_ones((batch_size, length), dtype=torch.long)
    missing = _bucket_length(length) - length
    # A mask is made even when nothing is missing. The caller's encoding is copied, not changed.
    model_kwargs["attention_mask"] = F.pad(mask, (0, missing))
    model_kwargs["encoder_outputs"] = BaseModelOutput(
        **{**encoder_outputs, "last_hidden_state": F.pad(hidden_states, (0, 0, 0, missing))}
    )


def generated_lengths(
    sequences: torch.LongTensor,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None = None,
    num_prompt_tokens: int = 1,
) -> torch.LongTensor:
    """Count the tokens of each generated row, up to and including its first end token.

    The one rule for the pipeline and for exported models: `generate` fills rows that end early with padding, and beam
    search fills them with the end token. A row without an end token (stopped by a length or a stop string) counts
    up to its last token that is not padding.

    Args:
        sequences (`torch.LongTensor` of shape `(num_rows, length)`): Decoder tokens as returned by `generate`.
        eos_token_id (`int` or `list[int]`, *optional*): End tokens. `None` means that no token ends a row.
        pad_token_id (`int`, *optional*): Padding. `None` means that rows are not padded.
        num_prompt_tokens (`int`, *optional*, defaults to 1): Leading tokens that were given to the decoder, which may
            equal an end token.

    Returns:
        `torch.LongTensor` of shape `(num_rows,)`: At least `num_prompt_tokens`.
    """
    positions = torch.arange(1, sequences.shape[1] + 1, device=sequences.device)
    is_generated = positions > num_prompt_tokens
    is_text = is_generated if pad_token_id is None else is_generated & (sequences != pad_token_id)
    lengths = (positions * is_text).amax(-1).clamp(min=num_prompt_tokens).expand(sequences.shape[0])
    if eos_token_id is None:
        return lengths
    is_end = is_generated & torch.isin(sequences, torch.as_tensor(eos_token_id, device=sequences.device))
    return torch.where(is_end.any(-1), is_end.int().argmax(-1) + 1, lengths)


__all__ = ["EncDecSLMGenerationMixin", "generated_lengths"]
