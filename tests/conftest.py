# SPDX-License-Identifier: Apache-2.0
"""Builders and fixtures of tiny models, tokenizers and checkpoint folders, for all test modules and worker scripts."""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from encdec_slm import (
    EncDecSLMConfig,
    EncDecSLMForConditionalGeneration,
    EncDecVLMConfig,
    EncDecVLMForConditionalGeneration,
    EncDecVLMImageProcessor,
    EncDecVLMProcessor,
)
from encdec_slm.configuration_encdec_vlm import grid_shape, num_image_tokens


pytest_plugins = ("export_fixtures", "hub_server", "reference_files")
# Matrices this small gain nothing from a second thread and lose much when cores are busy; nor do those of scripts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What `save_pretrained` copies beside a checkpoint.
TEXT_CODE_FILES = {f"{name}_encdec_slm.py" for name in ("configuration", "generation", "modeling", "pipeline")}
VISION_CODE_FILES = TEXT_CODE_FILES | {f"{name}_encdec_vlm.py" for name in ("configuration", "modeling")}
PROCESSOR_CODE_FILES = {
    *("configuration_encdec_slm.py", "configuration_encdec_vlm.py"),
    *("image_processing_encdec_vlm.py", "processing_encdec_vlm.py"),
}
# Ids 0 to 3, the defaults of the configs.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
# Under 1M parameters, two layers per stack; sizes that differ in meaning differ in number.
TINY_SIZES = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "head_dim": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
    **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
    **{"max_position_embeddings": 64, "initializer_range": 0.2},
}
TINY_CLIP = {
    **{"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
}
TINY_SIGLIP = {**TINY_CLIP, "model_type": "siglip_vision_model"}


# Builders


def randomize(model, seed=0, std=0.2):
    """Draw every tensor of `model` anew, norms and biases too, so that none of them is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(name.endswith("norm.weight")), std=std, generator=generator)
    return model


randomised = randomize


def build_config(**fields):
    return EncDecSLMConfig(**{**TINY_SIZES, **fields})


def build_model(model_class=EncDecSLMForConditionalGeneration, seed=0, **fields):
    """A text model of the family in eval mode, with weights of a fixed seed."""
    return randomize(model_class(build_config(**fields)), seed).eval()


def build_vision_config(text_config=None, vision_config=TINY_CLIP, **fields):
    """Tiles of 8 x 8 pixels in 2 x 2 patches; the image token is the last of 97."""
    text_config = build_config() if text_config is None else copy.deepcopy(text_config)
    fields = {"image_token_id": 96, "image_grid_pinpoints": [[8, 8], [16, 16], [16, 24]], **fields}
    return EncDecVLMConfig(text_config=text_config, vision_config=dict(vision_config), **fields)


def build_vision_model(config=None, seed=0):
    """A vision-text model in eval mode, with weights of a fixed seed."""
    config = build_vision_config() if config is None else config
    return randomize(EncDecVLMForConditionalGeneration(config), seed).eval()


def build_tokenizer(vocab_size=97, ends_sources=True, words=None, **options):
    """A tokenizer of whole words: the special tokens, then `words` or w4, w5, ..., each of which has its number as id.

    Args:
        ends_sources (`bool`): Append `</s>` to each source.
        options: Of `PreTrainedTokenizerFast`, such as `model_max_length`.
    """
    words = [f"w{token_id}" for token_id in range(4, vocab_size)] if words is None else words
    vocabulary = {token: token_id for token_id, token in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finish_tokenizer(backend, ends_sources, options)


def build_byte_tokenizer(ends_sources=True, image_token=None, words=(), alphabet=None, **options):
    """A tokenizer of bytes, for any text: 260 tokens, and with `image_token` one more.

    `words` (with "Ġ" for a space) become tokens as well, with all their beginnings, from which they are merged.
    """
    merges = {word[:end]: (word[: end - 1], word[end - 1]) for word in words for end in range(2, len(word) + 1)}
    tokens = [*SPECIAL_TOKENS, *sorted(alphabet or pre_tokenizers.ByteLevel.alphabet()), *merges]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, list(merges.values())))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = token_decoders.ByteLevel()
    tokenizer = _finish_tokenizer(backend, ends_sources, {"model_max_length": 512, **options})
    if image_token is not None:
        tokenizer.add_special_tokens({"extra_special_tokens": [image_token]})
    return tokenizer


def _finish_tokenizer(backend, ends_sources, options):
    if ends_sources:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    special = dict(zip(names, SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **options})


def build_processor(config, tokenizer):
    """The processor of a vision-text model."""
    return EncDecVLMProcessor(EncDecVLMImageProcessor.from_config(config), tokenizer)


def build_source(*lengths, padding_side="right", vocab_size=97, seed=1):
    """Ids and mask of shape (rows, longest), with so many real tokens in each row."""
    longest = max(lengths)
    ids = torch.randint(3, vocab_size, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if padding_side == "left" else mask
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def build_target_ids(num_rows, length, vocab_size=97, seed=2):
    """Decoder input of shape (num_rows, length) that begins with the start token."""
    ids = torch.randint(3, vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def build_vision_inputs(config, rows, seed=0, padding_side="right"):
    """Ids, mask, tiles and sizes for rows of images.

    Args:
        rows (`list[list[tuple[int, int]]]`): Height and width of the images of each row; text stands between them.
    """
    generator = torch.Generator().manual_seed(seed)
    tile = config.tile_size
    geometry = (config.image_grid_pinpoints, tile, config.patches_per_side, config.max_num_tiles)
    ids, tiles = [], []
    for sizes in rows:
        row = torch.randint(3, 90, (4,), generator=generator).tolist()
        for size in sizes:
            row += [config.image_token_id] * num_image_tokens(size, *geometry, config.image_newline)
            row += torch.randint(3, 90, (2,), generator=generator).tolist()
            grid_rows, columns = grid_shape(size, config.image_grid_pinpoints, tile)
            tiles.append(torch.randn(1 + grid_rows * columns, 3, tile, tile, generator=generator))
        ids.append(row)
    length = max(map(len, ids))
    gaps = [[0] * (length - len(row)) for row in ids]
    left = padding_side == "left"
    input_ids = torch.tensor([gap + row if left else row + gap for row, gap in zip(ids, gaps, strict=True)])
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
    if tiles:
        sizes = torch.tensor([size for row in rows for size in row])
        inputs |= {"pixel_values": torch.cat(tiles), "image_sizes": sizes}
    return inputs


def save_text_folder(folder, seed=0, **fields):
    """Save a text model with a tokenizer of bytes; returns the model."""
    tokenizer = build_byte_tokenizer()
    model = build_model(seed=seed, **{"vocab_size": len(tokenizer), "max_position_embeddings": 512, **fields})
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model


def save_vision_folder(folder, seed=0, **fields):
    """Save a vision-text model with its processor, whose tokenizer is one of bytes; returns the model."""
    tokenizer = build_byte_tokenizer(image_token="<image>")
    text_config = build_config(vocab_size=len(tokenizer), max_position_embeddings=512)
    fields = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), **fields}
    model = build_vision_model(build_vision_config(text_config, **fields), seed)
    for part in (model, build_processor(model.config, tokenizer)):
        part.save_pretrained(folder)
    return model


# Fixtures


@pytest.fixture
def tiny_config():
    return build_config()


@pytest.fixture
def tiny_model():
    return build_model()


@pytest.fixture
def tiny_vision_model():
    return build_vision_model()


@pytest.fixture
def tiny_tokenizer():
    """Words w4 to w96 of `tiny_model`."""
    return build_tokenizer()


@pytest.fixture
def source():
    """Ids of shape (3, 9) and their mask: rows of 9, 5 and 7 real tokens, padded on the right."""
    return build_source(9, 5, 7)


@pytest.fixture
def target_ids():
    """Decoder input of shape (3, 6) that begins with the start token."""
    return build_target_ids(3, 6)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A folder of a text model with a tokenizer of bytes; not to be changed."""
    folder = tmp_path_factory.mktemp("text_folder") / "text"
    save_text_folder(folder)
    return folder


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory) -> Path:
    """A folder of a vision-text model with its processor; not to be changed."""
    folder = tmp_path_factory.mktemp("vision_folder") / "vision"
    save_vision_folder(folder)
    return folder


def pytest_collection_finish():
    """Leave all modules that are imported so far out of garbage collections, which the Trainer runs several times."""
    gc.collect()
    gc.freeze()
