# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig
from transformers.utils import logging

from encdec_slm import EncDecSLMConfig


@pytest.fixture
def warnings_of_the_library(caplog):
    """What the configuration logs; transformers' root logger does not propagate by itself."""
    logger = logging.get_logger("encdec_slm.configuration_encdec_slm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("hiden_size", "hidden_size"),
        ("num_encoder_layers", "encoder_num_hidden_layers"),
        ("num_kv_heads", "num_key_value_heads"),
        ("tie_embeddings", "tie_word_embeddings"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest_one(given, nearest):
    with pytest.raises(TypeError, match=rf"EncDecSLMConfig has no field `{given}`\. The nearest field is `{nearest}`"):
        EncDecSLMConfig(**{given: 4})


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


def test_unknown_keys_of_a_loaded_file_warn_and_are_kept(tmp_path, warnings_of_the_library):
    written = {**EncDecSLMConfig(hidden_size=64).to_dict(), "field_of_the_future": 7}
    (tmp_path / "config.json").write_text(json.dumps(written))
    for load in (EncDecSLMConfig.from_pretrained, AutoConfig.from_pretrained):
        warnings_of_the_library.clear()
        config = load(tmp_path)
        assert config.hidden_size == 64
        assert config.field_of_the_future == 7
        assert "'field_of_the_future'" in warnings_of_the_library.text
    assert config.to_dict()["field_of_the_future"] == 7


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
        ({"head_dim": 13}, r"`head_dim` \(13\) must be even"),
        ({"hidden_size": 36, "num_attention_heads": 4}, r"`head_dim` \(9\) must be even.*\(36 // 4\)"),
        ({"decoder_num_hidden_layers": 0}, r"`decoder_num_hidden_layers` is 0, but must be at least 1"),
        ({"num_attention_heads": 0}, r"`num_attention_heads` is 0"),
        ({"pad_token_id": 40000}, r"`pad_token_id` \(40000\).*`vocab_size` \(32128\)"),
        ({"eos_token_id": [2, 32128]}, r"`eos_token_id` \(32128\).*`vocab_size` \(32128\)"),
        ({"mlp_dropout": 1.5}, r"`mlp_dropout` is 1\.5"),
        ({"is_encoder_decoder": False}, r"`is_encoder_decoder` is False"),
        (
            {"decoder_no_rope_layers": [1, 1, 1]},
            r"`decoder_no_rope_layers` is \[1, 1, 1\].* of the 4 decoder",
        ),
        ({"encoder_no_rope_layers": [2] * 8}, r"`encoder_no_rope_layers` .* must have a 1 \(rotated\) or 0"),
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
def test_the_output_projection_follows_the_others_unless_told_otherwise(attention_bias, given, expected):
    config = EncDecSLMConfig(attention_bias=attention_bias, attention_out_bias=given)
    assert config.attention_out_bias is expected
