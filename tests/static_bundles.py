# SPDX-License-Identifier: Apache-2.0
"""A static bundle of a tiny model, exported once for all test modules that read one."""

import atexit
import functools
import tempfile
from pathlib import Path

import torch

from conftest import randomised
from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.export.bundles import bundle_written_whole
from encdec_slm.export.onnx_static import export_static


SOURCE_LENGTHS = [4, 9, 12]
TARGET_LENGTH = 10


def tiny_text_model(**changes):
    """Fresh weights of a fixed seed; every width differs from every length of the bundles."""
    sizes = {
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "head_dim": 14},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "qk_norm": True, "encoder_no_rope_layers": None},
        **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "max_position_embeddings": 64},
    }
    return randomised(EncDecSLMForConditionalGeneration(EncDecSLMConfig(**{**sizes, **changes}))).eval()


def exported(folder, model, source=SOURCE_LENGTHS, target=TARGET_LENGTH):
    with bundle_written_whole(folder, "onnx-static", None) as (temporary, manifest):
        export_static(model, temporary, manifest, {"source": source, "target": target})
    return Path(folder)


@functools.cache
def tiny_static_bundle():
    """The model and its bundle; neither is to be changed."""
    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    model = tiny_text_model()
    return model, exported(Path(temporary.name, "static"), model)


def source_of(*lengths, width=None, side="right", seed=3):
    """Ids and mask, each of shape `(rows, width)`, with so many real tokens in each row."""
    width = width or max(lengths)
    ids = torch.randint(3, 97, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
