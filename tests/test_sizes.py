# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import json
import runpy

import pytest

from encdec_slm import EncDecSLMConfig, EncDecVLMConfig
from encdec_slm.configuration import decoder_only_twin, list_presets, load_preset, sizes
from encdec_slm.configuration.sizes import num_cached_values, num_parameters, num_weights_per_token


SPLITS = {"2/3-1/3": 2 / 3, "1/2-1/2": 1 / 2, "1/3-2/3": 1 / 3}
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}

VISION = [name for name in list_presets() if name.endswith("-vlm")]
TEXT = [name for name in list_presets() if name not in VISION]

load = functools.cache(load_preset)
count = functools.cache(lambda name, split=None: num_parameters(load(name, split)))


def test_the_presets_hold_the_family():
    assert {"tiny", "26m", "110m", "330m", "500m", "1b"} <= set(TEXT)
    assert {"tiny-vlm", "625m-vlm", "800m-vlm"} <= set(VISION)


def assert_names_declared_fields(fields, config):
    assert fields.keys() - {"model_type"} <= {field.name for field in dataclasses.fields(config)}
    assert {key: getattr(config, key) for key in fields} == fields


@pytest.mark.parametrize("name", TEXT)
def test_preset_files_name_only_declared_fields(name):
    fields = json.loads((sizes.PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    assert_names_declared_fields(fields, load(name))


@pytest.mark.parametrize("name", VISION)
def test_vision_presets_name_only_declared_fields(name):
    fields = json.loads((sizes.PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    config = load(name)
    for part in ("text_config", "vision_config"):
        assert_names_declared_fields(fields.pop(part), getattr(config, part))
    assert_names_declared_fields(fields, config)


@pytest.mark.parametrize("name", [name for name in list_presets() if not name.startswith("tiny")])
def test_a_preset_has_the_parameters_that_its_name_says(name):
    size = name.removesuffix("-vlm")
    assert count(name) == pytest.approx(float(size[:-1]) * UNITS[size[-1]], rel=0.03)


def test_the_625m_preset_is_the_predecessors_vision_model():
    assert count("625m-vlm") == 624_874_624
    config = load("625m-vlm")
    assert (config.text_config.encoder_num_hidden_layers, config.text_config.decoder_num_hidden_layers) == (20, 20)
    assert (config.vision_config.image_size, config.patches_per_side) == (336, 24)


def test_the_800m_preset_reads_with_two_thirds_of_its_layers():
    assert load("800m-vlm").to_dict() == load("800m-vlm", "2/3-1/3").to_dict()
    assert count("tiny-vlm") < 1_000_000


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", VISION)
def test_the_twin_of_a_vision_size_sees_with_the_same_tower(name, split):
    config = load(name, split)
    twin = decoder_only_twin(config)
    assert isinstance(config, EncDecVLMConfig) and twin.model_type == "llava_next"
    assert num_parameters(twin) == pytest.approx(count(name, split), rel=0.01)
    assert count(name, split) == pytest.approx(count(name), rel=0.02)
    assert twin.vision_config == config.vision_config
    assert (twin.image_token_index, twin.image_grid_pinpoints) == (config.image_token_id, config.image_grid_pinpoints)
    assert num_weights_per_token(twin) == num_parameters(twin.text_config)


def test_the_330m_preset_has_exactly_the_parameters_of_the_predecessor():
    assert count("330m") == 332_042_240


def test_the_smallest_and_the_largest_preset_keep_their_bounds():
    assert count("tiny") < 1_000_000
    assert count("1b") <= 1_000_000_000


@pytest.mark.parametrize("name", TEXT)
def test_a_preset_gives_two_thirds_of_its_layers_to_the_encoder(name):
    config = load(name)
    assert config.encoder_num_hidden_layers == 2 * config.decoder_num_hidden_layers
    assert load(name, "2/3-1/3").to_dict() == config.to_dict()


def test_the_330m_preset_reads_what_the_paper_predicts():
    config = load("330m")
    assert num_weights_per_token(config) == pytest.approx(136.6e6, abs=0.05e6)
    assert 2 * num_cached_values(config) == 7680


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TEXT)
def test_a_split_moves_layers_and_keeps_the_parameters(name, split):
    whole, config = load(name), load(name, split)
    num_layers = whole.encoder_num_hidden_layers + whole.decoder_num_hidden_layers
    assert config.encoder_num_hidden_layers == round(SPLITS[split] * num_layers)
    assert config.encoder_num_hidden_layers + config.decoder_num_hidden_layers == num_layers
    assert config.intermediate_size % 8 == 0
    assert count(name, split) == pytest.approx(count(name), rel=0.02)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TEXT)
def test_a_twin_is_as_large_and_as_wide(name, split):
    config = load(name, split)
    twin = decoder_only_twin(config)
    assert not twin.is_encoder_decoder and twin.model_type in ("llama", "qwen3")
    assert num_parameters(twin) == pytest.approx(count(name, split), rel=0.01)
    assert twin.num_hidden_layers == config.encoder_num_hidden_layers + config.decoder_num_hidden_layers
    for field in set(sizes.TWIN_FIELDS) - {"intermediate_size", "mlp_bias"}:
        assert getattr(twin, field) == getattr(config, field), field


def test_a_twin_has_query_and_key_norms_when_the_model_has():
    config = EncDecSLMConfig(**{**load("tiny").to_diff_dict(), "qk_norm": True})
    assert decoder_only_twin(config).model_type == "qwen3"
    assert decoder_only_twin(load("tiny")).model_type == "llama"


def test_a_twin_reads_all_of_its_weights_for_a_token():
    twin = decoder_only_twin(load("330m"))
    assert num_weights_per_token(twin) == num_parameters(twin)


def test_making_a_twin_leaves_the_config_unchanged():
    config = load_preset("tiny")
    before = config.to_dict()
    decoder_only_twin(config)
    assert config.to_dict() == before


def test_unknown_names_are_answered_with_what_exists():
    with pytest.raises(ValueError, match=r"'7b'.*110m, 1b, .*700k, 800m-vlm, tiny"):
        load_preset("7b")
    with pytest.raises(ValueError, match=r"'1/4-3/4'.*2/3-1/3, 1/2-1/2, 1/3-2/3"):
        load_preset("tiny", split="1/4-3/4")


def test_a_new_file_is_a_new_preset(tmp_path, monkeypatch):
    fields = json.loads((sizes.PRESETS / "tiny.json").read_text(encoding="utf-8"))
    (tmp_path / "smaller.json").write_text(json.dumps({**fields, "hidden_size": 32}), encoding="utf-8")
    monkeypatch.setattr(sizes, "PRESETS", tmp_path)
    assert list_presets() == ["smaller"]
    assert load_preset("smaller").hidden_size == 32
    assert "`smaller`" in sizes.preset_table()


def test_the_table_command_prints_every_preset(capsys):
    runpy.run_module("encdec_slm.configuration", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| preset | parameters |")
    assert [line.split("`")[1] for line in lines[2:]] == sorted(list_presets(), key=count)
    assert "| `330m` | 332,042,240 | 20 + 10 | 1024 | 6 / 3 x 64 | 273,121,792 | 7,680 | 7,680 |" in lines
