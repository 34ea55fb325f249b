# SPDX-License-Identifier: Apache-2.0
"""The parts of a model as functions of tensors alone, which `torch.onnx.export` turns into graphs.

Masks are inputs of every part that attends, and are written out with plain operators, so that they are in the graphs.

Axes in shape comments: B batch, S source, T target, D width, H query heads, K key/value heads, d width of a head.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


ATTENTION = "encdec_slm_onnx"


def grouped_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention as one operator of torch, `(B, T, H, d)`, which the export writes out in its own way."""
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, grouped_attention)


def use_plain_attention(model: PreTrainedModel) -> None:
    """Makes `model` attend with operators that every runtime has: our stacks by `grouped_attention`."""
    model.set_attn_implementation("eager")
    text_config = model.config.get_text_config()
    for module in model.modules():
        if getattr(module, "config", None) is text_config:
            module.config._attn_implementation = ATTENTION


def additive_mask(allowed: torch.Tensor) -> torch.Tensor:
    """0 where `allowed`, else the lowest float32, to be added to scores."""
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def source_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """What may be read of a source, `(B, 1, 1, S)`, to be added to scores, from a mask of shape `(B, S)`."""
    return additive_mask((attention_mask != 0)[:, None, None])


def encoder_states(encoder: nn.Module, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`last_hidden_state` of an `EncDecSLMEncoder`, `(B, S, D)`."""
    mask = source_mask(attention_mask)
    position_embeddings = encoder.rotary_emb(inputs_embeds, torch.arange(inputs_embeds.shape[1])[None])
    hidden_states = inputs_embeds
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, mask, position_embeddings=position_embeddings)
    return encoder.norm(hidden_states)


def decoder_states(
    decoder: nn.Module,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    self_mask: torch.Tensor,
    cross_mask: torch.Tensor,
    cache: "TensorCaches",
    encoder_hidden_states: torch.Tensor | None = None,
) -> torch.Tensor:
    """The hidden states of an `EncDecSLMDecoder`, `(B, T, D)`; `cache` is extended.

    Args:
        decoder (`EncDecSLMDecoder`): Whose layers run.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, target_length, hidden_size)`): Embedded target tokens.
        positions (`torch.Tensor` of shape `(1, target_length)`): Where they stand in the target.
        self_mask (`torch.Tensor`): Added to scores over the target; broadcasts to `(B, H, T, cached and new)`.
        cross_mask (`torch.Tensor` of shape `(batch_size, 1, 1, source_length)`): Added to scores over the source.
        cache ([`TensorCaches`]): Keys and values so far.
        encoder_hidden_states (`torch.Tensor`, *optional*): Needed where `cache` has no cross keys and values.
    """
    if encoder_hidden_states is None:
        encoder_hidden_states = inputs_embeds  # only says that there is a source: its keys and values are cached
    position_embeddings = decoder.rotary_emb(inputs_embeds, positions)
    hidden_states = inputs_embeds
    for layer in decoder.layers:
        hidden_states = layer(
            hidden_states,
            encoder_hidden_states,
            attention_mask=self_mask,
            encoder_attention_mask=cross_mask,
            position_embeddings=position_embeddings,
            past_key_values=cache,
        )
    return decoder.norm(hidden_states)


class TensorCache:
    """What an attention asks of a cache, over tensors that go into a graph and come out of it."""

    def __init__(self, num_layers, past=()):
        self.layers = [SimpleNamespace(keys=None, values=None) for _ in range(num_layers)]
        for layer, (keys, values) in zip(self.layers, past, strict=False):
            layer.keys, layer.values = keys, values

    def update(self, keys, values, layer_idx):
        layer = self.layers[layer_idx]
        if layer.keys is not None:
            keys, values = torch.cat((layer.keys, keys), dim=2), torch.cat((layer.values, values), dim=2)
        layer.keys, layer.values = keys, values
        return keys, values


class TensorCaches:
    """The two caches of a decoder.

    Args:
        self_attention_cache ([`TensorCache`]): Over the target.
        cross_attention_cache ([`TensorCache`]): Over the source; either whole, or empty and filled by the decoder.
    """

    def __init__(self, self_attention_cache, cross_attention_cache):
        self.self_attention_cache = self_attention_cache
        self.cross_attention_cache = cross_attention_cache
        layers = cross_attention_cache.layers
        self.is_updated = {layer_idx: layer.keys is not None for layer_idx, layer in enumerate(layers)}


def cache_names(num_layers: int, prefix: str, *stacks: str) -> list[str]:
    """Names of a decoder's keys and values, layer by layer, as optimum and transformers.js know them.

    Args:
        num_layers (`int`): Of the decoder.
        prefix (`str`): `"present"` for outputs, `"past_key_values"` for inputs.
        stacks (`str`): `"decoder"` (self-attention), `"encoder"` (cross-attention), or both.
    """
    return [
        f"{prefix}.{layer_idx}.{stack}.{kind}"
        for layer_idx in range(num_layers)
        for stack in stacks
        for kind in ("key", "value")
    ]


class EncoderGraph(nn.Module):
    """Token ids and their mask in, `last_hidden_state` out."""

    def __init__(self, model):
        super().__init__()
        self.encoder = text_encoder(model)

    def forward(self, input_ids, attention_mask):
        return encoder_states(self.encoder, self.encoder.embed_tokens(input_ids), attention_mask)


class EmbeddedEncoderGraph(EncoderGraph):
    """The encoder after its embedding, for sources with images."""

    def forward(self, inputs_embeds, attention_mask):
        return encoder_states(self.encoder, inputs_embeds, attention_mask)


class EmbeddingGraph(nn.Module):
    """Token ids in, their vectors out."""

    def __init__(self, model):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


class VisionGraph(nn.Module):
    """Tiles in, the features of each out, `(N, P, D)`; and the vector that ends rows of them, where there is one."""

    def __init__(self, model):
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, pixel_values):
        features = self.encoder.encode_tiles(pixel_values).pooler_output
        newline = self.encoder.image_newline
        return features if newline is None else (features, newline.clone())


class DecoderGraph(nn.Module):
    """The first step: reads an encoding, and gives logits and the keys and values of target and source."""

    def __init__(self, model):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()
        self.decoder = model.model.decoder
        self.lm_head = model.lm_head

    def logits(self, hidden_states):
        # As one matrix: its product with a table that is stored row by row for the embedding is then a plain Gemm.
        return self.lm_head(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2])

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask):
        positions = torch.arange(input_ids.shape[1])
        num_layers = len(self.decoder.layers)
        cache = TensorCaches(TensorCache(num_layers), TensorCache(num_layers))
        hidden_states = decoder_states(
            self.decoder,
            self.embed_tokens(input_ids),
            positions[None],
            additive_mask(positions <= positions[:, None])[None, None],
            source_mask(encoder_attention_mask),
            cache,
            encoder_hidden_states,
        )
        return self.logits(hidden_states), *flat(cache.self_attention_cache, cache.cross_attention_cache)


class DecoderWithPastGraph(DecoderGraph):
    """Later steps: reads cached keys and values, and gives logits and the target's keys and values, grown."""

    def forward(self, input_ids, encoder_attention_mask, past_key_values):
        num_layers = len(self.decoder.layers)
        pairs = list(zip(past_key_values[::2], past_key_values[1::2], strict=True))
        own, cross = TensorCache(num_layers, pairs[::2]), TensorCache(num_layers, pairs[1::2])
        all_positions = torch.arange(past_key_values[0].shape[2] + input_ids.shape[1])
        positions = torch.arange(input_ids.shape[1]) + past_key_values[0].shape[2]
        hidden_states = decoder_states(
            self.decoder,
            self.embed_tokens(input_ids),
            positions[None],
            additive_mask(all_positions <= positions[:, None])[None, None],
            source_mask(encoder_attention_mask),
            TensorCaches(own, cross),
        )
        return self.logits(hidden_states), *flat(own)


def flat(*caches: TensorCache) -> list[torch.Tensor]:
    """Keys and values of some caches in the order of `cache_names`."""
    by_layer = zip(*(cache.layers for cache in caches), strict=True)
    return [tensor for layers in by_layer for layer in layers for tensor in (layer.keys, layer.values)]


def text_encoder(model: PreTrainedModel) -> nn.Module:
    """The `EncDecSLMEncoder` of a text or vision-text model."""
    encoder = model.model.encoder
    return getattr(encoder, "text_model", encoder)
