# SPDX-License-Identifier: Apache-2.0
"""Weights in int8: what is rounded, how far, and what stays a float."""

import copy

import numpy as np
import pytest
import torch
from ctranslate2.specs.transformer_spec import TransformerSpec
from test_ctranslate2_converter import random_ids, score, score_export
from torch import nn

from conftest import build_model
from encdec_slm.export.ctranslate2_converter import build_spec
from encdec_slm.export.ctranslate2_spec import FLOAT_TYPES, LARGEST_INT8


def optimized_spec(model, quantization):
    spec = build_spec(model, None)
    spec.validate()
    spec.optimize(quantization)
    return spec


@pytest.mark.parametrize("quantization", FLOAT_TYPES)
def test_int8_weights_use_a_part_of_their_range_and_the_rest_is_float(quantization):
    model = build_model(lm_head_bias=True)
    with torch.no_grad():
        model.model.decoder.layers[0].mlp.up_proj.weight[3] = 0.0
    variables = optimized_spec(model, quantization).variables()
    weight, scale = (variables[f"encoder/layer_1/ffn/linear_1/{name}"].numpy() for name in ("weight", "weight_scale"))
    assert weight.dtype == np.int8
    assert (np.abs(weight).max(1) == LARGEST_INT8).all()
    expected = model.model.encoder.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_less(np.abs(weight / scale[:, None] - expected), 0.5001 / np.repeat(scale[:, None], 56, 1))
    assert variables["decoder/projection/bias"].dtype == FLOAT_TYPES[quantization]
    assert variables["decoder/layer_norm/gamma"].dtype == FLOAT_TYPES[quantization]
    # The tied table is stored once.
    tables = [variables[name] for name in ("decoder/projection/weight", "encoder/embeddings_0/weight")]
    assert tables == 2 * ["decoder/embeddings/weight"]
    # Rows of zeros stay zeros.
    assert not variables["decoder/layer_0/ffn/linear_0_noact/weight"].numpy()[3].any()
    assert np.isfinite(variables["decoder/layer_0/ffn/linear_0_noact/weight_scale"].numpy()).all()


@pytest.mark.parametrize("quantization", [None, "int16", "float16", "bfloat16", "float32"])
def test_all_other_types_are_stored_as_by_ctranslate2(quantization):
    # Two models, because CTranslate2 rounds some weights in place.
    ours, theirs = optimized_spec(build_model(), quantization), build_spec(build_model(), None)
    theirs.validate()
    TransformerSpec.optimize(theirs, quantization)
    assert ours.name == theirs.name == "TransformerSpec"
    expected = theirs.variables()
    assert ours.variables().keys() == expected.keys()
    for name, value in ours.variables().items():
        assert value == expected[name] if isinstance(value, str) else value.to_bytes() == expected[name].to_bytes()


def rounded(values, largest):
    scale = largest / values.abs().amax(-1, keepdim=True).clamp(min=1e-9)
    return (values * scale).round() / scale


def test_int8_products_do_not_overflow_on_any_cpu(tmp_path):
    model = build_model(hidden_size=64, num_attention_heads=8, intermediate_size=128)
    optimized_spec(model, "int8").save(str(tmp_path))
    source_ids, target_ids = random_ids((8, 12)), random_ids((8, 20), seed=1)
    exact = copy.deepcopy(model)
    exact.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for module in exact.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.copy_(rounded(module.weight, LARGEST_INT8))
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], 127),))
    reference = score(model, source_ids, target_ids)
    found = score_export(tmp_path, source_ids, target_ids)
    engine_error, rounding_error = (
        (values - reference).abs().mean() for values in (found, score(exact, source_ids, target_ids))
    )
    # With overflows it would be several times the error of rounding to 8 bits.
    assert engine_error < 1.5 * rounding_error
