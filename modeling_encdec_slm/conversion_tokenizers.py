# SPDX-License-Identifier: Apache-2.0
"""Load tokenizers of microsoft/encoder-decoder-slm checkpoints so that they give the ids used in training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from .checkpoints import TOKENIZER_FILES, find_checkpoint_folder
from .errors import summarize_error
from .processing_encdec_vlm import IMAGE_TOKEN


logger = logging.get_logger(__name__)

# Those that the tokenizer has; the padding token is the one whose id the model pads with.
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
FILE_NAME = "tokenizer.json"


def load_reference_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, checkpoint_folder: Path, model_config: Mapping[str, Any]
) -> PreTrainedTokenizerFast | None:
    """Load a `tokenizer.json` as it is.

    transformers 5 rebuilds tokenizers of Llama's class from other files, and the rebuilt ones give other ids around
    spaces and special tokens. The loaded tokenizer therefore has no class of its own.

    Args:
        tokenizer (`str`, `Path` or [`~transformers.PreTrainedTokenizerBase`], *optional*): A folder, a repository on
            the Hub, or a tokenizer in memory. `None` takes the one in `checkpoint_folder`.
        checkpoint_folder (`Path`): Folder of the checkpoint.
        model_config (`Mapping[str, Any]`): The original `MuConfig`, with `vocab_size` and `pad_token_id`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: Or `None` if there is no tokenizer.

    Raises:
        ValueError: There is no `tokenizer.json`, it is damaged, or it has more tokens than the model.
        TypeError: `tokenizer` is something else.
    """
    if tokenizer is None and not (checkpoint_folder / FILE_NAME).is_file():
        logger.warning(
            f"There is no {FILE_NAME} in {str(checkpoint_folder)!r}, so the converted model has no tokenizer. Pass "
            "`tokenizer`; that of the released model is microsoft/Phi-3.5-mini-instruct."
        )
        return None
    name = checkpoint_folder if tokenizer is None else getattr(tokenizer, "name_or_path", tokenizer)
    try:
        backend, max_length = _read(checkpoint_folder if tokenizer is None else tokenizer)
    except Exception as error:
        if type(error) in (TypeError, ValueError):  # of this module; `tokenizers` raises bare exceptions
            raise
        raise ValueError(
            f"{FILE_NAME} or tokenizer_config.json of {str(name)!r} cannot be read ({summarize_error(error)}). "
            "Download it again, or give another tokenizer."
        ) from error
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > model_config["vocab_size"]:
        raise ValueError(
            f"The tokenizer {str(name)!r} has {size:,} tokens, but the model has embeddings for "
            f"{model_config['vocab_size']:,}. Give the tokenizer that the model was trained with."
        )
    special = {role: token for role, token in SPECIAL_TOKENS.items() if backend.token_to_id(token) is not None}
    special["pad_token"] = backend.id_to_token(model_config["pad_token_id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="right", model_max_length=max_length, **special
    )


def _read(tokenizer) -> tuple[Tokenizer, int | None]:
    """Return the tokenizer of `tokenizers`, without padding and truncation, and the longest text."""
    max_length = None
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        max_length, file = tokenizer.model_max_length, Path(tokenizer.name_or_path, FILE_NAME)
        is_rebuilt = type(tokenizer) is not PreTrainedTokenizerFast
        if is_rebuilt and not file.is_file():
            logger.warning(
                f"`tokenizer` is a {type(tokenizer).__name__}, which transformers 5 rebuilds and which can give other "
                f"ids than its {FILE_NAME}. Pass its folder or name on the Hub."
            )
        backend = Tokenizer.from_file(str(file)) if is_rebuilt and file.is_file() else tokenizer.backend_tokenizer
        backend = Tokenizer.from_str(backend.to_str())  # a copy, which is changed
    elif isinstance(tokenizer, str | Path):
        folder = find_checkpoint_folder(tokenizer, TOKENIZER_FILES)
        if not (folder / FILE_NAME).is_file():
            raise ValueError(
                f"{str(tokenizer)!r} has no {FILE_NAME}, but one is required: transformers 5 builds other tokenizers "
                "than the original tokenizer from other files. Give a tokenizer that has one."
            )
        backend, config = Tokenizer.from_file(str(folder / FILE_NAME)), folder / "tokenizer_config.json"
        if config.is_file():
            max_length = json.loads(config.read_text(encoding="utf-8")).get("model_max_length")
    else:
        raise TypeError(
            f"`tokenizer` is a {type(tokenizer).__name__}, but must be a folder, the name of a repository on the Hub, "
            "or a tokenizer of transformers."
        )
    backend.no_padding()
    backend.no_truncation()
    return backend, max_length


def add_image_token(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> int:
    """Add a token for images to a tokenizer that has none, and return its id; the last id if there is no tokenizer.

    Raises:
        ValueError: The model has no embedding for it.
    """
    if tokenizer is None:
        return vocab_size - 1
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        if len(tokenizer) >= vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer):,} tokens and the model {vocab_size:,} embeddings, but images "
                f"need one more ({IMAGE_TOKEN!r}). Give the tokenizer that the model was trained with."
            )
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


__all__ = ["add_image_token", "load_reference_tokenizer"]
