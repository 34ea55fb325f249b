# SPDX-License-Identifier: Apache-2.0
"""Vision-text encoder-decoder: the text model, whose encoder reads the features of images among its tokens.

Axes in shape comments: B batch, S source, D width of the text model, N tiles of all images, P patches of a tile.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .configuration_encdec_vlm import EncDecVLMConfig, grid_shape, shrunk_size, unpadded_bounds
from .modeling_encdec_slm import (
    EncDecSLMDecoder,
    EncDecSLMEncoder,
    EncDecSLMForConditionalGeneration,
    EncDecSLMModel,
    EncDecSLMPreTrainedModel,
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
    """Features of the vision tower as vectors of the text model's width."""

    def __init__(self, config):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features):
        return self.linear_2(self.act(self.linear_1(features)))


class EncDecVLMPreTrainedModel(EncDecSLMPreTrainedModel):
    """What transformers needs to know of the vision-text models beside what holds for the text models."""

    config: EncDecVLMConfig
    config_class = EncDecVLMConfig
    input_modalities = ("image", "text")
    _folder_entries = {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EncDecVLMEncoder) and module.image_newline is not None:
            init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class EncDecVLMEncoder(EncDecVLMPreTrainedModel):
    """Reads images and text: features of the images take the places of their tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.text_model = EncDecSLMEncoder(config.text_config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = EncDecVLMProjector(config)
        self.image_newline = (
            nn.Parameter(torch.empty(config.text_config.hidden_size)) if config.image_newline else None
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.text_model.embed_tokens

    def set_input_embeddings(self, value):
        self.text_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_sizes: torch.LongTensor
    ) -> tuple[torch.FloatTensor, ...]:
        """Features of each image, of shape `(num_tokens, hidden_size)`: of its downscaled tile, then of its grid.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, num_channels, image_size, image_size)`): Tiles of
                all images, one image after the other, each beginning with the whole image as one tile.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): Height and width in pixels, as they were
                before the images were cut.

        Raises:
            ValueError: Tiles are of another size, `image_sizes` are no sizes, or ask for another number of tiles than
                there are.
        """
        config = self.config
        sizes = [tuple(size) for size in image_sizes.tolist()]
        tile_size = config.tile_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[2:]) != (tile_size, tile_size):
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, but must have (num_tiles, num_channels, "
                f"{tile_size}, {tile_size}). Take it from the image processor of this checkpoint."
            )
        if any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(
                f"`image_sizes` is {sizes}, but must have the height and the width of each image, in pixels. Take it "
                "from the image processor."
            )
        grids = [grid_shape(size, config.image_grid_pinpoints, tile_size) for size in sizes]
        num_tiles = [1 + rows * columns for rows, columns in grids]
        if sum(num_tiles) != pixel_values.shape[0]:
            raise ValueError(
                f"`pixel_values` has {pixel_values.shape[0]} tiles, but {len(sizes)} images of `image_sizes` {sizes} "
                f"(height, width) are cut into {sum(num_tiles)} with these `image_grid_pinpoints`. Take both from "
                "the image processor of this checkpoint."
            )
        tiles = self.multi_modal_projector(self._tower_features(pixel_values)).split(num_tiles)
        return tuple(self._joined(*image) for image in zip(tiles, sizes, grids, strict=True))

    def _tower_features(self, pixel_values):
        pixel_values = pixel_values.to(self.multi_modal_projector.linear_1.weight.dtype)
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        features = outputs.hidden_states[self.config.vision_feature_layer]
        num_patches = self.config.patches_per_side**2
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, -num_patches:]  # class tokens and registers stand in front
        if features.ndim != 3 or features.shape[1] != num_patches:
            raise ValueError(
                f"The vision tower ({self.config.vision_config.model_type}) gives features of shape "
                f"{tuple(features.shape)}, but {num_patches} are needed for each of {len(pixel_values)} tiles. Use a "
                'tower with one for each patch; with `vision_feature_select_strategy="default"` others may stand in '
                "front."
            )
        return features  # (N, P, width of the tower)

    def _joined(self, tiles, size, grid):
        """One image's tiles as one row of features: without padding, not too many, each row of them ended."""
        side, (rows, columns) = self.config.patches_per_side, grid
        whole = tiles[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns))
        whole = whole.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # (D, rows * side, columns * side)
        top, bottom, left, right = unpadded_bounds(size, whole.shape[1:])
        whole = whole[:, top:bottom, left:right]
        shape = shrunk_size(*whole.shape[1:], side, self.config.max_num_tiles)
        if shape != whole.shape[1:]:
            whole = F.interpolate(whole[None], shape, mode="bilinear")[0]
        if self.image_newline is not None:
            newlines = self.image_newline[:, None, None].expand(-1, whole.shape[1], 1)
            whole = torch.cat((whole, newlines.to(whole.dtype)), dim=2)
        return torch.cat((tiles[0], whole.flatten(1).T))

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
        """One vector per source token, of shape `(batch_size, source_length, hidden_size)`.

        Args: as in [`EncDecVLMForConditionalGeneration.forward`].
        """
        if pixel_values is not None:
            inputs_embeds = self._with_images(input_ids, inputs_embeds, pixel_values, image_sizes)
            input_ids = None
        elif input_ids is not None and not torch.compiler.is_compiling() and input_ids.device.type != "meta":
            self._refuse_image_tokens(input_ids)
        return self.text_model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)

    def _refuse_image_tokens(self, input_ids):
        if num_tokens := int((input_ids == self.config.image_token_id).sum()):
            raise ValueError(
                f"`input_ids` has {num_tokens} image tokens (id {self.config.image_token_id}), but 0 images are "
                "given. Pass `pixel_values` and `image_sizes` as the processor returns them."
            )

    def _with_images(self, input_ids, inputs_embeds, pixel_values, image_sizes):
        if input_ids is None or inputs_embeds is not None or image_sizes is None:
            raise ValueError(
                "`pixel_values` is given with "
                + ("no `image_sizes`" if image_sizes is None else "`inputs_embeds`")
                + ", but images need `image_sizes`, and `input_ids` in which `image_token_id` marks their places. "
                "Pass what the processor returns."
            )
        features = torch.cat(self.get_image_features(pixel_values, image_sizes))
        is_image = input_ids == self.config.image_token_id  # (B, S)
        num_tokens = int(is_image.sum())
        if num_tokens != len(features):
            raise ValueError(
                f"`input_ids` has {num_tokens} image tokens (id {self.config.image_token_id}), but the "
                f"{len(image_sizes)} images have {len(features)} features, and each needs one. Pass what the "
                "processor of this checkpoint returns, uncut."
            )
        embeds = self.get_input_embeddings()(input_ids)
        return embeds.masked_scatter(is_image[..., None], features.to(embeds))


class EncDecVLMModel(EncDecVLMPreTrainedModel, EncDecSLMModel):
    """Encoder and decoder without an output head.

    Args:
        config ([`EncDecVLMConfig`]): Sizes; it is not changed.
    """

    def __init__(self, config):
        super(EncDecSLMModel, self).__init__(config)
        self.encoder = EncDecVLMEncoder(config)
        self.decoder = EncDecSLMDecoder(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.encoder.set_input_embeddings(value)

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
        """The decoder's hidden states for a source with images and a target.

        Args: those of [`EncDecSLMModel.forward`], and `pixel_values` and `image_sizes` as in
            [`EncDecVLMForConditionalGeneration.forward`].
        """
        if encoder_outputs is None:
            images = {"pixel_values": pixel_values, "image_sizes": image_sizes}
            encoder_outputs = self._encode(input_ids, attention_mask, position_ids, inputs_embeds, **images, **kwargs)
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

    def __init__(self, config):
        super(EncDecSLMForConditionalGeneration, self).__init__(config)
        text_config = config.text_config
        self.model = EncDecVLMModel(config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=text_config.lm_head_bias)
        self.loss_type = "ForMaskedLM"
        self._set_default_length()
        self.post_init()

    def get_image_features(self, pixel_values, image_sizes):
        return self.model.encoder.get_image_features(pixel_values, image_sizes)

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
        """Next-token logits of shape `(batch_size, target_length, vocab_size)` and, with `labels`, the loss.

        Args: those of [`EncDecSLMForConditionalGeneration.forward`], and
            pixel_values (`torch.FloatTensor`, *optional*): Tiles of all images of the batch, in the order of their
                tokens, of shape `(num_tiles, num_channels, image_size, image_size)`; see
                [`EncDecVLMEncoder.get_image_features`]. Rows may have no image, or several.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): Height and width of each image in
                pixels.

        Raises:
            ValueError: As in [`EncDecSLMModel.forward`]; or images, their sizes and their tokens do not fit together.
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
            # Encoded by now: no beam needs a copy. An assistant, which takes one row, still encodes them by itself.
            model_kwargs = {**model_kwargs, "pixel_values": None, "image_sizes": None}
        return super()._expand_inputs_for_generation(expand_size=expand_size, **model_kwargs)


__all__ = ["EncDecVLMEncoder", "EncDecVLMForConditionalGeneration", "EncDecVLMModel", "EncDecVLMPreTrainedModel"]
