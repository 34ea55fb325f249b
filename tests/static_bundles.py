# SPDX-License-Identifier: Apache-2.0
"""A static bundle of a tiny model, exported once for all test modules that read one."""

import atexit
import functools
import tempfile
from pathlib import Path

from onnx_bundles import tiny_text_model, word_tokenizer

from encdec_slm.export.onnx_export import export_onnx


SOURCE_LENGTHS = [4, 9, 12]
TARGET_LENGTH = 10


def export_static_bundle(folder, model, source=SOURCE_LENGTHS, target=TARGET_LENGTH):
    lengths = {"source": source, "target": target}
    return export_onnx(model, folder, static_lengths=lengths, tokenizer=word_tokenizer())


@functools.cache
def tiny_static_bundle():
    """The model and its bundle; neither is to be changed."""
    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    model = tiny_text_model(qk_norm=True, encoder_no_rope_layers=[0, 1])
    return model, export_static_bundle(Path(temporary.name, "static"), model)
