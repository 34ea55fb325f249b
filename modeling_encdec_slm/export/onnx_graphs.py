# SPDX-License-Identifier: Apache-2.0
"""The graphs of an ONNX export. They run the layers of the model; masks and caches become inputs and outputs.

Axes in shape comments: B batch, S source, T target, N tiles, P patches of a tile, D width, K key/value heads, d width
of a head.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .onnx_tracing import Graph


ATTENTION = "encdec_slm_onnx"
SOURCE, TARGET = ("batch_size", "source_length"), ("batch_size", "target_length")
# Subtracted from the scores of masked positions in graphs of fixed shape: finite in float16, and large enough for a
# probability of 0.
MASKED = 1e4


def grouped_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention as one operator of torch, which [`~encdec_slm.export.onnx_tracing.trace`] translates."""
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None  # (B, T, H, d)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, grouped_attention)


def set_plain_attention(model: PreTrainedModel) -> None:
    """Use [`grouped_attention`] in the text stacks and written-out attention in a vision tower."""
    model.set_attn_implementation("eager")
    text_config = model.config.get_text_config()
    for module in model.modules():
        if getattr(module, "config", None) is text_config:
            module.config._attn_implementation = ATTENTION


def additive_mask(allowed: torch.Tensor) -> torch.Tensor:
    """Return 0 where `allowed`, else the lowest float32, to be added to scores."""
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def source_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the additive mask `(B, 1, 1, S)` of a source mask `(B, S)`."""
    return additive_mask((attention_mask != 0)[:, None, None])


def causal_mask(num_new: int, num_cached: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions `(1, T)` of new tokens, and their additive mask `(1, 1, T, cached + T)`."""
    positions = torch.arange(num_new) + num_cached
    return positions[None], additive_mask(torch.arange(num_cached + num_new) <= positions[:, None])[None, None]


def fill_cache(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], layer_class=DynamicLayer) -> Cache:
    """Build a cache from keys and values, one pair per layer."""
    cache = Cache(layers=[layer_class() for _ in pairs])
    for layer, (layer.keys, layer.values) in zip(cache.layers, pairs, strict=True):
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    return cache


def empty_caches(num_layers: int) -> EncoderDecoderCache:
    """Build the caches of a decoder before its first step."""
    return EncoderDecoderCache(*(Cache(layers=[DynamicLayer() for _ in range(num_layers)]) for _ in range(2)))


def pair_layers(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Group flat keys and values into pairs."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def flatten_caches(*caches: Cache) -> list[torch.Tensor]:
    """Return keys and values of caches in the order of [`cache_names`]."""
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return [tensor for group in layers for layer in group for tensor in (layer.keys, layer.values)]


def cache_names(num_layers: int, prefix: str, *stacks: str) -> list[str]:
    """Return the names of a decoder's keys and values, layer by layer, as in optimum and transformers.js.

    Args:
        num_layers (`int`): Number of decoder layers.
        prefix (`str`): `"present"` for outputs, `"past_key_values"` for inputs.
        stacks (`str`): `"decoder"` (self-attention), `"encoder"` (cross-attention), or both.
    """
    return [
        f"{prefix}.{layer_idx}.{stack}.{kind}"
        for layer_idx in range(num_layers)
        for stack in stacks
        for kind in ("key", "value")
    ]


def cache_shapes(config, prefix, **lengths) -> dict[str, tuple]:
    """Return the shape of each cached tensor, from the batch size and the length of each stack."""
    batch_size = lengths.pop("batch_size", "batch_size")
    shapes = {
        stack: (batch_size, config.num_key_value_heads, length, config.head_dim) for stack, length in lengths.items()
    }
    names = cache_names(config.decoder_num_hidden_layers, prefix, *lengths)
    return {name: shapes[name.split(".")[2]] for name in names}


# Graphs with free lengths


class EncoderGraph(Graph):
    """Token ids or, with `reads_embeddings`, their embeddings -> the encoder's states."""

    def __init__(self, model, reads_embeddings=False):
        states = {"inputs_embeds": (*SOURCE, model.config.get_text_config().hidden_size)}
        inputs = states if reads_embeddings else {"input_ids": SOURCE}
        super().__init__({**inputs, "attention_mask": SOURCE}, {"last_hidden_state": states["inputs_embeds"]})
        self.encoder = getattr(model.model.encoder, "text_model", model.model.encoder)
        self.reads_embeddings = reads_embeddings

    def forward(self, inputs, attention_mask):
        embeds = inputs if self.reads_embeddings else self.encoder.embed_tokens(inputs)
        return self.encoder(inputs_embeds=embeds, attention_mask=source_mask(attention_mask)).last_hidden_state


class EmbeddingGraph(Graph):
    """Token ids -> their embeddings, for sources with images."""

    def __init__(self, model):
        super().__init__(
            {"input_ids": SOURCE}, {"inputs_embeds": (*SOURCE, model.config.get_text_config().hidden_size)}
        )
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


class VisionGraph(Graph):
    """Tiles -> the features of each, `(N, P, D)`, and the vector that ends rows of features, if there is one."""

    def __init__(self, model):
        config, width = model.config, model.config.text_config.hidden_size
        tiles = ("num_tiles", config.vision_config.num_channels, config.tile_size, config.tile_size)
        newline = {"image_newline": (width,)} if config.image_newline else {}
        features = {"image_features": ("num_tiles", config.patches_per_side**2, width)}
        super().__init__({"pixel_values": tiles}, features | newline)
        self.encoder = model.model.encoder

    def forward(self, pixel_values):
        features = self.encoder.encode_tiles(pixel_values).pooler_output
        newline = self.encoder.image_newline
        return features if newline is None else (features, newline.clone())


class _AnyDecoderGraph(Graph):
    def __init__(self, model, inputs, caches):
        config = model.config.get_text_config()
        super().__init__(inputs, {"logits": (*inputs["input_ids"], config.vocab_size), **caches})
        self.embed_tokens = model.get_input_embeddings()
        self.decoder = model.model.decoder
        self.lm_head = model.lm_head
        self.num_layers = config.decoder_num_hidden_layers

    def decode(self, input_ids, positions, mask, cross_mask, caches, encoder_hidden_states=None):
        embeds = self.embed_tokens(input_ids)
        hidden_states = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=caches,
            # With cached cross keys and values only its presence counts.
            encoder_hidden_states=embeds if encoder_hidden_states is None else encoder_hidden_states,
            encoder_attention_mask=cross_mask,
        ).last_hidden_state
        # As one matrix: its product with the embedding table is then a Gemm, which reads the table without a copy.
        return self.lm_head(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2])


class DecoderGraph(_AnyDecoderGraph):
    """The first step: reads the encoder's states -> logits, and keys and values of target and source."""

    def __init__(self, model):
        config = model.config.get_text_config()
        inputs = {"input_ids": TARGET, "encoder_hidden_states": (*SOURCE, config.hidden_size)}
        caches = cache_shapes(config, "present", decoder="target_length", encoder="source_length")
        super().__init__(model, {**inputs, "encoder_attention_mask": SOURCE}, caches)

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask):
        caches = empty_caches(self.num_layers)
        positions, mask = causal_mask(input_ids.shape[1])
        cross_mask = source_mask(encoder_attention_mask)
        logits = self.decode(input_ids, positions, mask, cross_mask, caches, encoder_hidden_states)
        return logits, *flatten_caches(caches.self_attention_cache, caches.cross_attention_cache)


class DecoderWithPastGraph(_AnyDecoderGraph):
    """Later steps: reads cached keys and values -> logits, and the grown keys and values of the target."""

    def __init__(self, model):
        config = model.config.get_text_config()
        past = cache_shapes(config, "past_key_values", decoder="past_length", encoder="source_length")
        present = cache_shapes(config, "present", decoder="past_length + target_length")
        super().__init__(model, {"input_ids": TARGET, "encoder_attention_mask": SOURCE, **past}, present)

    def forward(self, input_ids, encoder_attention_mask, past_key_values):
        pairs = pair_layers(past_key_values)
        caches = EncoderDecoderCache(fill_cache(pairs[::2]), fill_cache(pairs[1::2]))
        positions, mask = causal_mask(input_ids.shape[1], past_key_values[0].shape[2])
        logits = self.decode(input_ids, positions, mask, source_mask(encoder_attention_mask), caches)
        return logits, *flatten_caches(caches.self_attention_cache)


# Graphs of fixed shape


class RotaryTable(nn.Module):
    """Cosines and sines of positions 0 to `length - 1` in a table, since NPUs would compute them in float16."""

    def __init__(self, rotary_emb, length):
        super().__init__()
        cos, sin = rotary_emb(torch.zeros(1), torch.arange(length)[None])
        self.cos = nn.Buffer(cos.clone(), persistent=False)
        self.sin = nn.Buffer(sin.clone(), persistent=False)

    def forward(self, x, position_ids):
        return tuple(table.index_select(-2, position_ids.flatten()) for table in (self.cos, self.sin))


class ShiftingLayer(DynamicLayer):
    """A cache of fixed size that drops its oldest token for each new one, so that no step needs an index."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys = torch.cat((self.keys[:, :, 1:], key_states), dim=2)
        self.values = torch.cat((self.values[:, :, 1:], value_states), dim=2)
        return self.keys, self.values


class StaticEncoderGraph(Graph):
    """Padded token ids and their mask -> the encoder's states, and cross keys and values of every decoder layer.

    The input `position_ids` is made constant when the source length is fixed.
    """

    id_dtype, mask_dtype = torch.int32, torch.float32

    def __init__(self, model, max_length):
        config = model.config
        ids = (1, "source_length")
        states = {"last_hidden_state": (*ids, config.hidden_size)}
        cross = cache_shapes(config, "present", batch_size=1, encoder="source_length")
        super().__init__(dict.fromkeys(("input_ids", "attention_mask", "position_ids"), ids), states | cross)
        self.encoder, self.decoder = model.model.encoder, model.model.decoder
        self.encoder.rotary_emb = RotaryTable(self.encoder.rotary_emb, max_length)

    def forward(self, input_ids, attention_mask, position_ids):
        mask = ((attention_mask - 1) * MASKED)[:, None, None]
        embeds = self.encoder.embed_tokens(input_ids)
        states = self.encoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids).last_hidden_state
        caches = empty_caches(len(self.decoder.layers))
        # Only the cross keys and values of this step are used; the rest is removed from the graph.
        self.decoder(
            inputs_embeds=states[:, :1],
            attention_mask=mask[..., :1],
            position_ids=torch.zeros(1, 1, dtype=torch.long),
            past_key_values=caches,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
        )
        return states, *flatten_caches(caches.cross_attention_cache)


class StaticDecoderGraph(_AnyDecoderGraph):
    """One target token, its position, masks and caches -> logits, and the cache with the token at its end."""

    id_dtype, mask_dtype = torch.int32, torch.float32

    def __init__(self, model, target_length):
        past = cache_shapes(
            model.config, "past_key_values", batch_size=1, decoder=target_length, encoder="source_length"
        )
        present = cache_shapes(model.config, "present", batch_size=1, decoder=target_length)
        masks = {"decoder_attention_mask": (1, target_length), "encoder_attention_mask": (1, "source_length")}
        super().__init__(model, {"input_ids": (1, 1), "position_ids": (1, 1), **masks, **past}, present)
        self.decoder.rotary_emb = RotaryTable(self.decoder.rotary_emb, target_length)

    def forward(self, input_ids, position_ids, decoder_attention_mask, encoder_attention_mask, past_key_values):
        pairs = pair_layers(past_key_values)
        caches = EncoderDecoderCache(fill_cache(pairs[::2], ShiftingLayer), fill_cache(pairs[1::2]))
        masks = decoder_attention_mask, encoder_attention_mask
        mask, cross_mask = (((mask - 1) * MASKED)[:, None, None] for mask in masks)
        logits = self.decode(input_ids, position_ids, mask, cross_mask, caches)
        return logits, *flatten_caches(caches.self_attention_cache)
