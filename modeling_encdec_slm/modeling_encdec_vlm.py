# SPDX-License-Identifier: Apache-2.0
"""Vision-text encoder-decoder: the text model, in whose encoder the features of images replace their tokens.

Axes in shape comments: B batch, S source, D width of the text model, N tiles of all images, P patches of a tile.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils import can_return_tuple

from .configuration_encdec_vlm import EncDecVLMConfig, grid_shape, shrunk_size, unpadded_bounds
from .modeling_encdec_slm import (
    EncDecSLMEncoder,
    EncDecSLMForConditionalGeneration,
    EncDecSLMModel,
    EncDecSLMPreTrainedModel,
    check_token_ids,
)


AUTO_MAP = {
    "AutoConfig": "configuration_encdec_vlm.EncDecVLMConfig",
    "AutoModel": "modeling_encdec_vlm.EncDecVLMModel",
    "AutoModelForSeq2SeqLM": "modeling_encdec_vlm.EncDecVLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_encdec_vlm.EncDecVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_encdec_vlm.EncDecVLMForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "image-text-to-text": {
        "impl": "pipeline_encdec_slm.EncDecVLMPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


class EncDecVLMProjector(nn.Module):
    """Map features of the vision tower to the width of the text model."""

    def __init__(self, config: EncDecVLMConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


class EncDecVLMPreTrainedModel(EncDecSLMPreTrainedModel):
    """Capabilities of the vision-text models, beside those of the text models."""

    config: EncDecVLMConfig
    config_class = EncDecVLMConfig
    input_modalities = ("image", "text")
    _folder_entries = {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EncDecVLMEncoder) and module.image_newline is not None:
            init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class EncDecVLMEncoder(EncDecVLMPreTrainedModel):
    """Encode text and images: the features of the images replace the embeddings of their tokens."""

    def __init__(self, config: EncDecVLMConfig):
        super().__init__(config)
        self.text_model = EncDecSLMEncoder(config.text_config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = EncDecVLMProjector(config)
        self.image_newline = (
            nn.Parameter(torch.empty(config.text_config.hidden_size)) if config.image_newline else None
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    def encode_tiles(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """Run the vision tower and the projector.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, num_channels, image_size, image_size)`): Tiles.
            kwargs: Passed to the vision tower.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The output of the vision tower, with the
            projected features of shape `(num_tiles, num_patches, hidden_size)` as `pooler_output`.

        Raises:
            ValueError: The vision tower does not have one feature for each patch.
        """
        pixel_values = pixel_values.to(self.multi_modal_projector.linear_1.weight.dtype)
        returns_hidden_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        vision_outputs = self.vision_tower(pixel_values, **kwargs)
        features = vision_outputs.hidden_states[self.config.vision_feature_layer]
        num_patches = self.config.patches_per_side**2
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, -num_patches:]  # class tokens and registers come first
        if features.ndim != 3 or features.shape[1] != num_patches:
            raise ValueError(
                f"The vision tower ({self.config.vision_config.model_type}) returns features of shape "
                f"{tuple(features.shape)}, but {num_patches} are required for each of {len(pixel_values)} tiles. Use "
                'a tower with one feature per patch; with `vision_feature_select_strategy="default"` others may come '
                "first."
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_outputs.last_hidden_state,
            pooler_output=self.multi_modal_projector(features),  # (N, P, D)
            hidden_states=vision_outputs.hidden_states if returns_hidden_states else None,
            attentions=vision_outputs.attentions,
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_sizes: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Compute the features that replace the tokens of images, as LLaVA-NeXT does (transformers, `llava_next`).

        The features of an image are those of its downscaled tile, row by row, then those of its grid of tiles: without
        padding, resized if they are more than those of `max_num_tiles` tiles, each row followed by `image_newline`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, num_channels, image_size, image_size)`): Tiles of
                all images in order; the first tile of an image is the downscaled image. Any float dtype.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): Height and width of each image in pixels,
                before it was cut.
            kwargs: Passed to the vision tower, such as `output_attentions`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The output of the vision tower for all
            tiles. Its `pooler_output` is a tuple with the features of each image, of shape
            `(num_image_tokens, hidden_size)`.

        Raises:
            ValueError: Tiles have another size, or their number does not fit `image_sizes`.
        """
        check_images(self.config, pixel_values, image_sizes)
        outputs = self.encode_tiles(pixel_values, **kwargs)
        outputs.pooler_output = pack_image_features(
            self.config, outputs.pooler_output, image_sizes, self.image_newline
        )
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode the source: `last_hidden_state` of shape `(batch_size, source_length, hidden_size)`.

        Args: as in [`EncDecVLMForConditionalGeneration.forward`].
        """
        if pixel_values is not None:
            if input_ids is None or inputs_embeds is not None or image_sizes is None:
                given = "without `image_sizes`" if image_sizes is None else "with `inputs_embeds`"
                raise ValueError(
                    f"`pixel_values` is given {given}, but images need `image_sizes`, and `input_ids` in which "
                    "`image_token_id` marks their places. Pass what the processor returns."
                )
            check_token_ids(input_ids, self.config.text_config.vocab_size, "input_ids")
            image_features = self.get_image_features(pixel_values, image_sizes, return_dict=True).pooler_output
            inputs_embeds = merge_image_features(
                self.config, input_ids, self.get_input_embeddings()(input_ids), image_features
            )
            input_ids = None
        elif input_ids is not None and not torch.compiler.is_compiling() and input_ids.device.type != "meta":
            _check_num_image_tokens(self.config, input_ids, num_images=0, num_features=0)
        return self.text_model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)


def check_images(config: EncDecVLMConfig, pixel_values: torch.FloatTensor, image_sizes: torch.LongTensor):
    """Check that tiles have the size of the config and are as many as `image_sizes` require."""
    tile_size, sizes = config.tile_size, image_sizes.tolist()
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[2:]) != (tile_size, tile_size):
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}, but must have (num_tiles, num_channels, "
            f"{tile_size}, {tile_size}). Use the image processor of this checkpoint."
        )
    if any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(
            f"`image_sizes` is {sizes}, but must have the height and the width of each image, in pixels. Use the "
            "image processor of this checkpoint."
        )
    num_tiles = sum(1 + rows * columns for rows, columns in _grids(config, sizes))
    if num_tiles != pixel_values.shape[0]:
        raise ValueError(
            f"`pixel_values` has {pixel_values.shape[0]} tiles, but {len(sizes)} images of `image_sizes` {sizes} "
            f"(height, width) have {num_tiles} with these `image_grid_pinpoints`. Use the image processor of this "
            "checkpoint for both."
        )


def pack_image_features(
    config: EncDecVLMConfig,
    tile_features: torch.Tensor,
    image_sizes: torch.LongTensor,
    image_newline: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Turn the features of tiles into the features of images.

    Args:
        config ([`EncDecVLMConfig`]): Config of the model.
        tile_features (`torch.Tensor` of shape `(num_tiles, num_patches, hidden_size)`): Projected features of all
            tiles.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): Height and width of each image in pixels.
        image_newline (`torch.Tensor` of shape `(hidden_size,)`, *optional*): Ends each row of a grid. `None` if the
            config has no `image_newline`.

    Returns:
        `tuple[torch.Tensor]`: Features of each image, of shape `(num_image_tokens, hidden_size)`.
    """
    sizes, side = image_sizes.tolist(), config.patches_per_side
    grids = _grids(config, sizes)
    packed = []
    tiles_per_image = tile_features.split([1 + rows * columns for rows, columns in grids])
    for tiles, size, (rows, columns) in zip(tiles_per_image, sizes, grids, strict=True):
        grid = tiles[1:].view(rows, columns, side, side, -1)
        grid = grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # (D, rows * side, columns * side)
        top, bottom, left, right = unpadded_bounds(size, grid.shape[1:])
        grid = grid[:, top:bottom, left:right]
        shape = shrunk_size(*grid.shape[1:], side, config.max_num_tiles)
        if shape != grid.shape[1:]:
            grid = F.interpolate(grid[None], shape, mode="bilinear")[0]
        if image_newline is not None:
            newlines = image_newline[:, None, None].expand(-1, grid.shape[1], 1)
            grid = torch.cat((grid, newlines.to(grid.dtype)), dim=2)
        packed.append(torch.cat((tiles[0], grid.flatten(1).T)))
    return tuple(packed)


def merge_image_features(
    config: EncDecVLMConfig,
    input_ids: torch.LongTensor,
    inputs_embeds: torch.Tensor,
    image_features: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Replace the embeddings of image tokens by the features of the images.

    Args:
        config ([`EncDecVLMConfig`]): Config of the model.
        input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): Source tokens.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, source_length, hidden_size)`): Their embeddings.
        image_features (`Sequence[torch.Tensor]`): As from [`pack_image_features`].

    Returns:
        `torch.Tensor` of the shape of `inputs_embeds`.

    Raises:
        ValueError: There are more or fewer features than image tokens.
    """
    features = torch.cat(tuple(image_features))
    _check_num_image_tokens(config, input_ids, len(image_features), len(features))
    is_image = input_ids == config.image_token_id  # (B, S)
    return inputs_embeds.masked_scatter(is_image[..., None], features.to(inputs_embeds))


def _grids(config, sizes):
    return [grid_shape(tuple(size), config.image_grid_pinpoints, config.tile_size) for size in sizes]


def _check_num_image_tokens(config, input_ids, num_images, num_features):
    num_tokens = int((input_ids == config.image_token_id).sum())
    if num_tokens != num_features:
        raise ValueError(
            f"`input_ids` has {num_tokens} image tokens (id {config.image_token_id}), but the {num_images} images "
            f"have {num_features} features, one for each token. Pass what the processor of this checkpoint returns."
        )


class EncDecVLMModel(EncDecVLMPreTrainedModel, EncDecSLMModel):
    """Encoder and decoder without an output head.

    Args:
        config ([`EncDecVLMConfig`]): Sizes; it is not changed.
    """

    def __init__(self, config: EncDecVLMConfig):
        super().__init__(config, encoder=EncDecVLMEncoder(config))

    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_sizes: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Compute the features of images. Args: as in [`EncDecVLMEncoder.get_image_features`]."""
        return self.encoder.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """Compute the decoder's hidden states for a source with images and a target.

        Args: those of [`EncDecSLMModel.forward`], and `pixel_values` and `image_sizes` as in
            [`EncDecVLMForConditionalGeneration.forward`].
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, position_ids, inputs_embeds, pixel_values, image_sizes, **kwargs
            )
        return super().forward(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class EncDecVLMForConditionalGeneration(EncDecVLMPreTrainedModel, EncDecSLMForConditionalGeneration):
    """Encoder and decoder with an output head over the vocabulary; trains on `labels` and generates.

    Args:
        config ([`EncDecVLMConfig`]): Sizes; it is not changed.
    """

    _tied_weights_keys = {"lm_head.weight": "model.encoder.text_model.embed_tokens.weight"}

    def __init__(self, config: EncDecVLMConfig):
        super().__init__(config, model=EncDecVLMModel(config))

    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_sizes: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Compute the features of images. Args: as in [`EncDecVLMEncoder.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Compute logits and, with `labels`, the loss.

        Args: those of [`EncDecSLMForConditionalGeneration.forward`], and
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, num_channels, image_size, image_size)`,
                *optional*): Tiles of all images of the batch, in the order of their tokens; see
                [`EncDecVLMEncoder.get_image_features`]. A row may have no image, or several.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): Height and width of each image in
                pixels.

        Raises:
            ValueError: As in [`EncDecSLMModel.forward`], or images, their sizes and their tokens do not fit together.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            **kwargs,
        )

    def _expand_inputs_for_generation(self, expand_size=1, **model_kwargs):
        if expand_size > 1:
            # Images are encoded by now, so beams need no copies. An assistant model still encodes them by itself.
            model_kwargs = {**model_kwargs, "pixel_values": None, "image_sizes": None}
        return super()._expand_inputs_for_generation(expand_size=expand_size, **model_kwargs)


__all__ = ["EncDecVLMEncoder", "EncDecVLMForConditionalGeneration", "EncDecVLMModel", "EncDecVLMPreTrainedModel"]
