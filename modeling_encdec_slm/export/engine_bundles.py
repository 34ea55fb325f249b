# SPDX-License-Identifier: Apache-2.0
"""What the exports to engines with a generation loop of their own share: checks of the model, tokenizer and engine."""

import contextlib
import copy
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import has_vision
from ..errors import format_list
from .bundles import Bundle, import_engine, write_bundle
from .onnx_export import check_rope
from .onnx_graphs import set_plain_attention
from .onnx_tracing import OPSET


logger = logging.getLogger(__name__)
SAMPLE = 'def area(width, height):\n    return width * height  # in m², "ok"? 12.5'
QUANTIZATIONS = ("float16", "int8", "int4")


@contextlib.contextmanager
def write_engine_bundle(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    format: str,
    *,
    quantization: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
) -> Iterator[Bundle]:
    """Yield a [`Bundle`] whose text model is ready to be traced, and whose tokenizer is a fast one, if it has one.

    Args: as in [`~encdec_slm.export.bundles.write_bundle`], and
        quantization (`str`, *optional*): `"float16"`, `"int8"`, `"int4"` or `None`; added to the manifest.

    Raises:
        ValueError: The model reads images, its positions depend on the length, the tokenizer is a slow one, or
            `quantization` is unknown.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(
            f"`quantization` is {quantization!r}, but must be left out (float32) or be one of "
            f"{', '.join(map(repr, QUANTIZATIONS))}."
        )
    for name in ("onnx", "onnxscript"):
        import_engine(name)
    with write_bundle(model_or_path, output_dir, format, tokenizer=tokenizer, overwrite=overwrite) as bundle:
        if has_vision(bundle.model):
            raise ValueError(f"The model reads images, but {format} is for text models. Export it to onnx.")
        if bundle.tokenizer is not None:
            if not bundle.tokenizer.is_fast:
                raise ValueError(
                    f"The tokenizer is a {type(bundle.tokenizer).__name__}, but {format} needs a fast one, which "
                    "is saved as tokenizer.json. Convert it, or export to onnx."
                )
            bundle.tokenizer = tokenizer = copy.deepcopy(bundle.tokenizer)
            # transformers.js cuts sources there.
            tokenizer.model_max_length = min(tokenizer.model_max_length, bundle.model.config.max_position_embeddings)
        check_rope(bundle.model.config)
        set_plain_attention(bundle.model)
        bundle.manifest.update(opset=OPSET, quantization=quantization)
        yield bundle


def check_tokenizer_parts(tokenizer: PreTrainedTokenizerBase, format: str, known: frozenset[str]) -> None:
    """Check that an engine knows all parts of a tokenizer.

    Raises:
        ValueError: It does not.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    names = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    if unknown := sorted(set(_find_types([parts.get(name) for name in names])) - known):
        raise ValueError(
            f"The tokenizer has parts that {format} does not have: {format_list(unknown)}. Use another tokenizer, or "
            "export to onnx."
        )


def _find_types(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        part = [value for name, value in part.items() if name not in ("vocab", "merges", "special_tokens")]
    if isinstance(part, list):
        for each in part:
            yield from _find_types(each)


def check_encoding(engine: str, tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], list[int]]) -> None:
    """Check that an engine reads a text as the tokenizer does; warn if it only leaves out the end token.

    Raises:
        ValueError: The engine gives other ids.
    """
    found, expected = encode(SAMPLE), tokenizer(SAMPLE)["input_ids"]
    if found == expected[: len(found)] != expected:
        ending = tokenizer.decode(expected[len(found) :])
        logger.warning(f"{engine} does not end a source with {ending!r}: append it to each text.")
    elif found != expected:
        raise ValueError(
            f"{engine} reads {SAMPLE!r} as {found[:8]}..., but the tokenizer as {expected[:8]}.... Use another "
            "tokenizer, or export to onnx."
        )


def list_eos_token_ids(model: PreTrainedModel) -> list[int]:
    """Return the ids of all end tokens of `generate`."""
    eos_token_id = model.generation_config.eos_token_id
    return eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]


def check_engine_version(package: str, tested: str) -> str:
    """Return the installed version of an engine; warn if it is not the tested one.

    Raises:
        ImportError: The package is not installed.
    """
    import_engine(package)
    version = importlib.metadata.version(package)
    if version.split(".")[:2] != tested.split(".")[:2]:
        logger.warning(
            f"{package} {version} is installed, but exports were tested with {tested}. Compare the answers with those "
            "of the model."
        )
    return version
