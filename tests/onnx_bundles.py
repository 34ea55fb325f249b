# SPDX-License-Identifier: Apache-2.0
"""An ONNX bundle of a tiny model with free lengths, exported once for all test modules that read one."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import randomised
from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.export.bundles import MANIFEST
from encdec_slm.export.onnx_export import export_onnx


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
# All switches that a gated model can have, and every size differs from every other.
SWITCHES = {
    **{"qk_norm": True, "attention_bias": True, "attention_out_bias": False, "decoder_no_rope_layers": [1, 0]},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
}


def tiny_text_model(**changes):
    """Fresh weights of a fixed seed; norms and biases too, so that none of them is without effect."""
    sizes = {
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "head_dim": 14},
        **{"num_attention_heads": 6, "num_key_value_heads": 2},
        **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "max_position_embeddings": 64},
    }
    return randomised(EncDecSLMForConditionalGeneration(EncDecSLMConfig(**{**sizes, **changes}))).eval()


def word_tokenizer(words=93):
    """Words w0, w1, ... as tokens."""
    tokens = [*SPECIAL, *(f"w{number}" for number in range(words))]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@functools.cache
def tiny_onnx_bundle():
    """A model and its float32 bundle with a tokenizer; neither is to be changed."""
    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    model = tiny_text_model(**SWITCHES)
    return model, export_onnx(model, Path(temporary.name, "onnx"), tokenizer=word_tokenizer())


def write_graphs_of_bundle(model, folder, manifest):
    """Takes the place of `onnx_export._write_graphs` for the model of the bundle: its graphs are there already."""
    bundle = tiny_onnx_bundle()[1]
    for path in bundle.glob("*.onnx*"):
        shutil.copy(path, folder)
    manifest.update(graphs=json.loads((bundle / MANIFEST).read_text())["graphs"])


def copy_of_bundle(folder):
    """The bundle in another folder, where it may be changed."""
    return shutil.copytree(tiny_onnx_bundle()[1], folder)


def padded_source(*lengths, side="right", seed=3):
    """Ids and mask, each of shape `(rows, longest)`, with so many real tokens in each row."""
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def target_ids(rows, length, seed=4):
    """Decoder input that begins with the start token."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids
