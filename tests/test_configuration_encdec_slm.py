# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from PIL import Image
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor
from transformers.utils import logging

from conftest import build_model, build_source, build_vision_config, build_vision_model
from encdec_slm import EncDecSLMConfig, EncDecVLMConfig


@pytest.fixture
def warnings_of_the_library(caplog):
    """What the configuration logs; transformers' root logger does not propagate by itself."""
    logger = logging.get_logger("encdec_slm.configuration_encdec_slm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("config_class", [EncDecSLMConfig, EncDecVLMConfig])
@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("initialiser_range", "initializer_range"),
        ("tie_embeddings", "tie_word_embeddings"),
    ],
)
def test_a_misspelled_field_is_refused_with_the_nearest_one(config_class, given, nearest):
    with pytest.raises(TypeError, match=rf"{config_class.__name__} .*`{given}`.*`{nearest}`"):
        config_class(**{given: 4})


def test_words_of_a_field_in_another_order_are_found():
    with pytest.raises(TypeError, match=r"EncDecSLMConfig .*`num_encoder_layers`.*`encoder_num_hidden_layers`"):
        EncDecVLMConfig(text_config={"num_encoder_layers": 4})


def test_fields_that_transformers_shares_between_models_pass():
    config = EncDecSLMConfig(
        dtype="bfloat16",
        num_labels=3,
        output_attentions=False,
        attn_implementation="eager",
        name_or_path="here",
        architectures=["EncDecSLMModel"],
        max_length=12,
        num_hidden_layers=3,
        rope_theta=500.0,
    )
    assert config.decoder_num_hidden_layers == 3
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


def from_the_future(config):
    """The config.json of `config`, with keys that this version does not know, at every level."""
    fields = {**config.to_dict(), "field_of_the_future": 7, "transformers_version": "99.0.0"}
    for name in ("text_config", "vision_config"):
        if name in fields:
            fields[name] = {**fields[name], "nested_field": [1], "transformers_version": "99.0.0"}
    return fields


@pytest.mark.parametrize("config", [EncDecSLMConfig(hidden_size=64), build_vision_config()], ids=["text", "vision"])
def test_unknown_keys_of_a_newer_file_warn_and_are_kept(config, tmp_path, warnings_of_the_library):
    (tmp_path / "config.json").write_text(json.dumps(from_the_future(config)))
    for load in (type(config).from_pretrained, AutoConfig.from_pretrained):
        warnings_of_the_library.clear()
        loaded = load(tmp_path)
        assert loaded.get_text_config().hidden_size == config.get_text_config().hidden_size
        assert loaded.field_of_the_future == 7
        assert "'field_of_the_future'" in warnings_of_the_library.text
        if loaded is not loaded.get_text_config():
            assert loaded.text_config.nested_field == loaded.vision_config.nested_field == [1]
            assert "'nested_field'" in warnings_of_the_library.text
    assert loaded.to_dict()["field_of_the_future"] == 7


@pytest.mark.parametrize("build", [build_model, build_vision_model])
def test_a_folder_of_a_newer_version_loads(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(from_the_future(model.config)))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**generation, "field_of_the_future": 7}))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    ids = build_source(5)["input_ids"]
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_a_processor_of_a_newer_version_loads(vision_folder, tmp_path):
    folder = shutil.copytree(vision_folder, tmp_path / "model")
    path = folder / "processor_config.json"
    fields = json.loads(path.read_text())
    fields = {**fields, "field_of_the_future": 7, "image_processor": {**fields["image_processor"], "another": 8}}
    path.write_text(json.dumps(fields))
    loaded = AutoProcessor.from_pretrained(folder)
    expected = AutoProcessor.from_pretrained(vision_folder)
    picture = Image.new("RGB", (9, 5), "red")
    inputs, others = (one.encode_questions("What?", picture) for one in (loaded, expected))
    assert inputs["input_ids"] == others["input_ids"]
    assert (inputs["pixel_values"] == others["pixel_values"]).all()


def test_a_file_of_this_version_loads_without_a_warning(tmp_path, warnings_of_the_library):
    EncDecSLMConfig(hidden_size=64, rope_parameters={"rope_type": "linear", "factor": 2.0}).save_pretrained(tmp_path)
    config = EncDecSLMConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["factor"] == 2.0
    assert warnings_of_the_library.text == ""
    assert EncDecSLMConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, r"`num_attention_heads` \(6\).*\(4\)"),
        ({"head_dim": 13}, r"`head_dim` \(13\)"),
        ({"hidden_size": 36, "num_attention_heads": 4}, r"`head_dim` \(9\).*\(36 // 4\)"),
        ({"decoder_num_hidden_layers": 0}, "`decoder_num_hidden_layers` is 0"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0"),
        ({"pad_token_id": 40000}, r"`pad_token_id` \(40000\).*\(32128\)"),
        ({"eos_token_id": [2, 32128]}, r"`eos_token_id` \(32128\)"),
        ({"mlp_dropout": 1.5}, r"`mlp_dropout` is 1\.5"),
        ({"is_encoder_decoder": False}, "`is_encoder_decoder`"),
        ({"decoder_no_rope_layers": [1, 1, 1]}, r"`decoder_no_rope_layers` is \[1, 1, 1\].* 4 "),
        ({"encoder_no_rope_layers": [2] * 8}, "`encoder_no_rope_layers`"),
    ],
)
def test_contradicting_fields_are_refused_with_both_numbers(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        EncDecSLMConfig(**fields)


def test_a_field_of_another_type_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        EncDecSLMConfig(hidden_size="wide")


def test_left_out_sizes_follow_from_the_others():
    config = EncDecSLMConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)


@pytest.mark.parametrize(("attention_bias", "given", "expected"), [(True, None, True), (True, False, False)])
def test_the_output_projection_follows_the_others_unless_set_otherwise(attention_bias, given, expected):
    config = EncDecSLMConfig(attention_bias=attention_bias, attention_out_bias=given)
    assert config.attention_out_bias is expected
