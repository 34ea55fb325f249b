# SPDX-License-Identifier: Apache-2.0
"""New models of a preset's size, with a tokenizer or processor that is made for the training rows."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ..configuration import load_preset
from ..configuration_encdec_slm import EncDecSLMConfig
from ..configuration_encdec_vlm import EncDecVLMConfig
from ..image_processing_encdec_vlm import EncDecVLMImageProcessor
from ..modeling_encdec_slm import EncDecSLMForConditionalGeneration
from ..modeling_encdec_vlm import EncDecVLMForConditionalGeneration
from ..processing_encdec_vlm import IMAGE_TOKEN, EncDecVLMProcessor
from .image_rows import find_images, read_images


ARCHITECTURES = ("encdec_slm", "t5")
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
TOKENIZER_ROWS = 20_000
STATISTICS_ROWS = 200
MAX_QUESTION_LENGTH = 512
# Images and text in the order of the message; in training, images come first.
CHAT_TEMPLATE = """\
{%- for message in messages if message['role'] == 'user' -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for block in message['content'] -%}
            {{- '<image>' if block['type'] == 'image' else block['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}"""


def build_text_model(
    preset: str,
    rows: Iterable[Mapping[str, Any]],
    vocab_size: int,
    max_source_length: int,
    architecture: str = "encdec_slm",
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Build a text model with random weights, and train its tokenizer on `source` and `target` of rows.

    Args:
        preset (`str`): See [`~encdec_slm.configuration.list_presets`].
        rows (`Iterable[Mapping]`): Training rows; the first 20,000 are used.
        vocab_size (`int`): Upper bound; see [`train_tokenizer`].
        max_source_length (`int`): In tokens.
        architecture (`str`, *optional*, defaults to `"encdec_slm"`): See [`build_model`].
    """
    tokenizer = train_tokenizer(first_texts(rows, ("source", "target")), vocab_size, max_source_length)
    return build_model(preset, tokenizer, architecture), tokenizer


def build_model(preset: str, tokenizer: PreTrainedTokenizerBase, architecture: str = "encdec_slm") -> PreTrainedModel:
    """Build a text model with random weights.

    Args:
        preset (`str`): See [`~encdec_slm.configuration.list_presets`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decides vocabulary size and special tokens.
        architecture (`str`, *optional*, defaults to `"encdec_slm"`): `"t5"` builds a T5 of the same sizes, which
            llama.cpp can run; all its query heads have keys and values of their own.

    Raises:
        ValueError: `architecture` is unknown.
    """
    config = preset_config(preset, tokenizer)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"The architecture is {architecture!r}, but must be one of {', '.join(ARCHITECTURES)}.")
    if architecture == "encdec_slm":
        return EncDecSLMForConditionalGeneration(config)
    t5_config = T5Config(
        **{"vocab_size": config.vocab_size, "d_model": config.hidden_size, "d_ff": config.intermediate_size},
        **{"num_heads": config.num_attention_heads, "d_kv": config.head_dim, "dropout_rate": config.mlp_dropout},
        **{"num_layers": config.encoder_num_hidden_layers, "num_decoder_layers": config.decoder_num_hidden_layers},
        **{"feed_forward_proj": "gated-gelu", **_token_ids(tokenizer)},
        tie_word_embeddings=False,  # Embeddings are tied anyway, but the output is not scaled, as in llama.cpp.
    )
    model = T5ForConditionalGeneration(t5_config)
    # Embeddings of T5's own size learn slowly by AdamW, and give large logits without that scaling.
    model.shared.weight.data.mul_(config.initializer_range)
    return model


def build_vision_model(
    preset: str, rows: Sequence[Mapping[str, Any]], vocab_size: int
) -> tuple[EncDecVLMForConditionalGeneration, EncDecVLMProcessor]:
    """Build a vision-text model with random weights, and its processor from `image`, `question` and `answer` of rows.

    Args:
        preset (`str`): A preset with vision.
        rows ([`~datasets.Dataset`]): Training rows. Pixels are normalized by the mean and deviation of their images,
            because drawings on white are far from photographs.
        vocab_size (`int`): Upper bound; see [`train_tokenizer`].

    Raises:
        ValueError: The preset is a text model.
    """
    config = load_preset(preset)
    if not isinstance(config, EncDecVLMConfig):
        raise ValueError(
            f"`preset` is {preset!r}, a text model, but rows have images. Use a preset with `vlm` in its name, such "
            "as 'tiny-vlm'."
        )
    texts = first_texts(rows.select_columns(["question", "answer"]), ("question", "answer"))
    tokenizer = train_tokenizer(texts, vocab_size, MAX_QUESTION_LENGTH)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    fields = config.to_dict()
    fields["text_config"] |= {**_token_ids(tokenizer), "vocab_size": len(tokenizer)}
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = EncDecVLMConfig.from_dict(fields)
    return EncDecVLMForConditionalGeneration(config), build_processor(config, tokenizer, **_pixel_statistics(rows))


def preset_config(preset: str, tokenizer: PreTrainedTokenizerBase) -> EncDecSLMConfig:
    """Return the config of a preset with a tokenizer's vocabulary size and special tokens."""
    fields = load_preset(preset).to_diff_dict()
    return EncDecSLMConfig(**{**fields, **_token_ids(tokenizer), "vocab_size": len(tokenizer)})


def _token_ids(tokenizer):
    start_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {**ids, "bos_token_id": start_id, "decoder_start_token_id": start_id}


def first_texts(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[str]:
    """Yield some columns of the first 20,000 rows, which is enough to train a tokenizer."""
    for row in itertools.islice(rows, TOKENIZER_ROWS):
        yield from (row[column] for column in columns)


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that appends `</s>` to every text.

    Args:
        texts (`Iterable[str]`): Texts to learn merges from; of training rows only.
        vocab_size (`int`): Upper bound of the vocabulary, including `<pad>` (0), `<s>` (1, which starts every target),
            `</s>` (2) and the 256 bytes. Few or short texts give a smaller vocabulary.
        model_max_length (`int`): Longest source that the model is trained for, in tokens with `</s>`.

    Raises:
        ValueError: `vocab_size` is too small for the special tokens and the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but {len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} bytes need "
            f"at least {smallest}. For a small corpus, 512 to 4096 is a good choice."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    # As in T5, sources and targets both end in </s>.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor(
    config: EncDecVLMConfig, tokenizer: PreTrainedTokenizerBase, **kwargs: list[float]
) -> EncDecVLMProcessor:
    """Build the processor of a vision-text model; questions are not wrapped in a prompt.

    Args:
        config ([`EncDecVLMConfig`]): Decides tiles and patches.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Has `<image>` as an added token.
        kwargs: `image_mean` and `image_std`, three numbers each; default to those of CLIP.
    """
    image_processor = EncDecVLMImageProcessor.from_config(config, **kwargs)
    return EncDecVLMProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def _pixel_statistics(rows):
    """Compute the mean and the deviation of each color in the first training images."""
    rows = rows.select_columns(["image"]).take(STATISTICS_ROWS)
    images = (image for index, row in enumerate(rows) for image in read_images(find_images(row), f"row {index}"))
    if not (pixels := [_sample_pixels(image) for image in images]):
        return {}
    mean = np.mean([image.mean(0) for image in pixels], axis=0)
    deviation = np.mean([((image - mean) ** 2).mean(0) for image in pixels], axis=0) ** 0.5
    return {"image_mean": mean.tolist(), "image_std": np.maximum(deviation, 0.01).tolist()}


def _sample_pixels(image):
    """Return colors from 0 to 1 of evenly spaced pixels, because photographs have millions."""
    step = max(1, min(image.size) // 64)
    return np.asarray(image)[::step, ::step].reshape(-1, 3) / 255


__all__ = [
    "build_model",
    "build_processor",
    "build_text_model",
    "build_vision_model",
    "preset_config",
    "train_tokenizer",
]
