# SPDX-License-Identifier: Apache-2.0
"""Weights rounded to int8 by torchao: on loading, through transformers, or in place."""

import copy

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, CompileConfig, TorchAoConfig

from conftest import build_model, build_vision_inputs, build_vision_model


pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig, quantize_


pytestmark = [
    # torchao asks tensors for their storage in a way that torch 2.13 has deprecated.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


def is_int8(parameter):
    return type(parameter).__name__ == "Int8Tensor"


def rounded(model):
    """The model in float, with the weights that the quantized one stands for."""
    state = {name: value.dequantize() if is_int8(value) else value for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = False  # `quantize_` gives the head a copy of its own
    plain = type(model)(config).eval()
    plain.load_state_dict(state)
    return plain


@torch.no_grad()
def logits_of(model, source, target_ids):
    return model(**source, decoder_input_ids=target_ids[: len(source["input_ids"])]).logits


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def load_int8(folder, **kwargs):
    return AutoModelForSeq2SeqLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), **kwargs)
    )


@pytest.mark.parametrize("settings", [{}, {"include_input_output_embeddings": True}], ids=str)
def test_quantized_on_loading_all_but_the_tied_table_is_int8(tiny_model, folder, source, target_ids, settings):
    model = load_int8(folder, **settings)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linear if is_int8(model.get_submodule(name).weight)} == linear - {"lm_head"}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight)
    logits = logits_of(model, source, target_ids)
    torch.testing.assert_close(logits, logits_of(rounded(model), source, target_ids), rtol=1e-4, atol=1e-4)
    # Rounding to 255 levels per output channel: an error of 0.7 % per product, ten products deep.
    assert relative_error(logits, logits_of(tiny_model, source, target_ids)) < 0.06


def test_a_model_quantized_on_loading_saves_and_loads_as_it_is(folder, source, target_ids, tmp_path):
    model = load_int8(folder)
    model.save_pretrained(tmp_path / "int8")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "int8")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "int8")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert is_int8(loaded.model.decoder.layers[0].cross_attn.v_proj.weight)
    assert torch.equal(logits_of(loaded, source, target_ids), logits_of(model, source, target_ids))
    assert torch.equal(loaded.generate(**source, max_length=12), model.generate(**source, max_length=12))


def test_quantized_in_place_the_head_gets_an_int8_copy_of_the_table(tiny_model, source, target_ids):
    expected = logits_of(tiny_model, source, target_ids)
    table = tiny_model.get_input_embeddings().weight.clone()
    quantize_(tiny_model, Int8WeightOnlyConfig())
    assert is_int8(tiny_model.lm_head.weight)
    assert torch.equal(tiny_model.get_input_embeddings().weight, table)
    scale = table.abs().amax(dim=1, keepdim=True) / 127
    assert ((tiny_model.lm_head.weight.dequantize() - table).abs() <= 0.6 * scale).all()
    logits = logits_of(tiny_model, source, target_ids)
    torch.testing.assert_close(logits, logits_of(rounded(tiny_model), source, target_ids), rtol=1e-4, atol=1e-4)
    assert relative_error(logits, expected) < 0.06
    tiny_model.tie_weights()  # as resizing the vocabulary does: the head is the table again, in float
    assert tiny_model.lm_head.weight is tiny_model.get_input_embeddings().weight
    assert relative_error(logits_of(tiny_model, source, target_ids), expected) < 0.06


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": False}, {"qk_norm": True, "gated_mlp": False}], ids=str)
def test_other_shapes_of_the_family_are_quantized_too(source, target_ids, fields, tmp_path):
    original = build_model(**fields)
    expected = logits_of(original, source, target_ids)
    original.save_pretrained(tmp_path)
    loaded = load_int8(tmp_path)
    quantize_(original, Int8WeightOnlyConfig())
    for model in (loaded, original):
        assert relative_error(logits_of(model, source, target_ids), expected) < 0.06


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_an_int8_model_generates_what_its_rounded_weights_do(tiny_model, source, settings):
    quantize_(tiny_model, Int8WeightOnlyConfig())
    expected = rounded(tiny_model).generate(**source, max_length=12, **settings)
    assert torch.equal(tiny_model.generate(**source, max_length=12, **settings), expected)


def test_every_part_of_a_vision_text_model_is_quantized(target_ids, tmp_path):
    original = build_vision_model()
    inputs = build_vision_inputs(original.config, [[(11, 16)], []])
    expected = logits_of(original, inputs, target_ids)
    original.save_pretrained(tmp_path)
    loaded = load_int8(tmp_path)
    quantize_(original, Int8WeightOnlyConfig())
    for model in (loaded, original):
        assert is_int8(model.model.encoder.multi_modal_projector.linear_1.weight)
        assert is_int8(model.model.decoder.layers[0].mlp.up_proj.weight)
        assert relative_error(logits_of(model, inputs, target_ids), expected) < 0.06
        assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (2, 4)


def test_a_model_quantized_in_place_is_not_saved(tiny_model, tmp_path):
    quantize_(tiny_model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"`quantize_`.*TorchAoConfig"):
        tiny_model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiled_step_of_an_int8_model_generates_what_an_eager_one_does(tiny_model, source):
    quantize_(tiny_model, Int8WeightOnlyConfig())
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    options = {"max_length": 12, "cache_implementation": "static"}
    expected = tiny_model.generate(**source, **options)
    assert torch.equal(tiny_model.generate(**source, **options, compile_config=compile_config), expected)
