# SPDX-License-Identifier: Apache-2.0
"""ONNX exports of a tiny model, made once per test run: tracing a graph takes seconds."""

import json
import os
import shutil

import pytest
import torch
from filelock import FileLock

from conftest import SPECIAL_TOKENS, build_byte_tokenizer, build_model
from encdec_slm.export import export_onnx, onnx_export
from encdec_slm.export.engine_bundles import list_eos_token_ids
from encdec_slm.export_manifest import MANIFEST


# All fields that a gated model can have, and sizes that all differ.
FIELDS = {
    **{"num_attention_heads": 6, "head_dim": 14, "qk_norm": True, "attention_bias": True, "attention_out_bias": False},
    **{"encoder_no_rope_layers": [0, 1], "decoder_no_rope_layers": [1, 0]},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
}
STATIC_LENGTHS = {"source": [4, 9, 12], "target": 10}
CALIBRATION = [
    torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (20, 12, 31, 7, 25, 16)
]


def build_ascii_tokenizer():
    """A tokenizer of 93 ASCII characters, so that it has as many tokens as the model; "Ġ" stands for a space."""
    return build_byte_tokenizer(alphabet=["Ġ", *map(chr, range(ord("!"), ord("}")))])


@pytest.fixture(scope="session")
def export_model():
    """The exported model; not to be changed."""
    return build_model(**FIELDS)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """Builds a folder once for all processes of a test run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def build(name, write):
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                write(root / name)
        return root / name

    return build


@pytest.fixture(scope="session")
def onnx_folder(build_once, export_model):
    """An export with free lengths; not to be changed."""
    return build_once("onnx", lambda folder: export_onnx(export_model, folder, tokenizer=build_ascii_tokenizer()))


@pytest.fixture(scope="session")
def static_folder(build_once, export_model):
    """An export of fixed shape; not to be changed."""
    options = {"static_lengths": STATIC_LENGTHS, "tokenizer": build_ascii_tokenizer()}
    return build_once("onnx_static", lambda folder: export_onnx(export_model, folder, **options))


@pytest.fixture(scope="session", params=["int8", "int8_static"])
def int8_folder(request, build_once, export_model, onnx_folder):
    """An int8 export, from the graphs of `onnx_folder`; not to be changed."""

    def copy_graphs(model, folder, manifest):
        for path in onnx_folder.glob("*.onnx*"):
            shutil.copy(path, folder)
        manifest["graphs"] = json.loads((onnx_folder / MANIFEST).read_text())["graphs"]

    options = {
        "calibration": CALIBRATION if request.param == "int8_static" else None,
        "tokenizer": build_ascii_tokenizer(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_export_dynamic", copy_graphs)
        return build_once(
            f"onnx_{request.param}",
            lambda folder: export_onnx(export_model, folder, quantization=request.param, **options),
        )


# Models and sources for engines that generate by themselves
# Sizes that all differ, and every switch of the family at least once.
SHAPE = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
SWITCHES = {
    "gated": {"attention_bias": True, "attention_out_bias": False, "encoder_num_hidden_layers": 3},
    "plain": {
        **{"gated_mlp": False, "hidden_act": "gelu_pytorch_tanh", "attention_bias": True, "mlp_bias": True},
        **{"lm_head_bias": True, "tie_word_embeddings": False, "num_attention_heads": 6, "head_dim": 14},
    },
    "q/k norm, layers without RoPE": {
        **{"qk_norm": True, "encoder_no_rope_layers": [0, 1], "decoder_no_rope_layers": [1, 0]},
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
    "llama3": {
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        }
    },
    "yarn": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0},
            "original_max_position_embeddings": 128,
        }
    },
}
LENGTHS = (1, 2, 3, 5, 8, 13, 31, 32, 33, 64, 127, 128, 200, 255, 256)


def draw_ids(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(len(SPECIAL_TOKENS), SHAPE["vocab_size"], (1, length), generator=generator)


def build_batches():
    """Single rows of many lengths, and batches of unequal lengths, padded on either side."""
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in map(draw_ids, LENGTHS)]
    tokenizer = build_byte_tokenizer()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        rows = {"input_ids": [draw_ids(length, seed=1)[0].tolist() for length in (7, 1, 40, 256)]}
        batches.append(dict(tokenizer.pad(rows, return_tensors="pt")))
    return batches


def add_end_token(model, batch):
    """Make a token that the model generates an end token, besides the usual one."""
    token_id = generate_rows(model, batch, max_new_tokens=8)[0][-1]
    model.generation_config.eos_token_id = [2, token_id]


def generate_rows(model, batch, **options):
    ids = model.generate(**batch, **{"do_sample": False, "num_beams": 1, **options})
    return [trim(row, model) for row in ids.tolist()]


def trim(row, model):
    """Cut a target after its first end token."""
    ends = [index for index, token_id in enumerate(row) if index and token_id in list_eos_token_ids(model)]
    return row[: ends[0] + 1] if ends else row
