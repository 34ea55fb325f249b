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
# All splits of a size of each kind, and every size as it is.
SIZES_AND_SPLITS = [(name, split) for name in ("tiny", "330m", "tiny-vlm", "625m-vlm") for split in SPLITS]
SIZES_AND_SPLITS += [(name, None) for name in list_presets()]

count = functools.cache(lambda name, split=None: num_parameters(load_preset(name, split)))


def test_the_presets_hold_the_family():
    assert {"tiny", "26m", "110m", "330m", "500m", "1b"} <= set(TEXT)
    assert {"tiny-vlm", "625m-vlm", "800m-vlm"} <= set(VISION)
    assert (count("330m"), count("625m-vlm")) == (332_042_240, 624_874_624)  # the original models
    assert max(count("tiny"), count("tiny-vlm")) < 1e6 and count("1b") <= 1e9


@pytest.mark.parametrize("name", list_presets())
def test_preset_files_name_only_declared_fields(name):
    fields = json.loads((sizes.PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    config = load_preset(name)
    parts = [(fields.pop(part), getattr(config, part)) for part in ("text_config", "vision_config") if part in fields]
    for given, part in [*parts, (fields, config)]:
        # transformers 5.18 reads `vision_use_head` of SigLIP without declaring it.
        declared = {field.name for field in dataclasses.fields(part)} | {"model_type", "vision_use_head"}
        assert given.keys() <= declared
        assert {key: getattr(part, key) for key in given} == given


@pytest.mark.parametrize("name", [name for name in list_presets() if not name.startswith("tiny")])
def test_a_preset_has_as_many_parameters_as_its_name_says(name):
    size = name.removesuffix("-vlm")
    assert count(name) == pytest.approx(float(size[:-1]) * UNITS[size[-1]], rel=0.03)


def test_the_625m_preset_is_the_vision_model_of_the_original():
    config = load_preset("625m-vlm")
    assert (config.text_config.encoder_num_hidden_layers, config.text_config.decoder_num_hidden_layers) == (20, 20)
    assert (config.vision_config.image_size, config.patches_per_side) == (336, 24)


@pytest.mark.parametrize("name", [*TEXT, "800m-vlm"])
def test_a_preset_gives_two_thirds_of_its_layers_to_the_encoder(name):
    config = load_preset(name)
    assert config.get_text_config().encoder_num_hidden_layers == 2 * config.get_text_config().decoder_num_hidden_layers
    assert load_preset(name, "2/3-1/3").to_dict() == config.to_dict()


def test_the_330m_preset_reads_what_the_paper_predicts():
    config = load_preset("330m")
    assert num_weights_per_token(config) == pytest.approx(136.6e6, abs=0.05e6)
    assert 2 * num_cached_values(config) == 7680


@pytest.mark.parametrize(("name", "split"), SIZES_AND_SPLITS)
def test_a_split_and_the_baseline_keep_the_number_of_parameters(name, split):
    config, whole = load_preset(name, split), load_preset(name).get_text_config()
    text, baseline = config.get_text_config(), decoder_only_twin(config)
    num_layers = whole.encoder_num_hidden_layers + whole.decoder_num_hidden_layers
    assert text.encoder_num_hidden_layers + text.decoder_num_hidden_layers == num_layers
    if split is not None:
        assert text.encoder_num_hidden_layers == round(SPLITS[split] * num_layers)
        assert count(name, split) == pytest.approx(count(name), rel=0.02)
    assert num_parameters(baseline) == pytest.approx(count(name, split), rel=0.01)
    if name in VISION:
        assert isinstance(config, EncDecVLMConfig) and baseline.model_type == "llava_next"
        assert (baseline.vision_config, baseline.image_token_index) == (config.vision_config, config.image_token_id)
        assert baseline.image_grid_pinpoints == config.image_grid_pinpoints
        baseline = baseline.text_config
    assert baseline.model_type in ("llama", "qwen3") and baseline.num_hidden_layers == num_layers
    assert num_weights_per_token(baseline) == num_parameters(baseline)
    for field in set(sizes.BASELINE_FIELDS) - {"intermediate_size", "mlp_bias"}:
        assert getattr(baseline, field) == getattr(text, field), field


def test_the_baseline_has_query_and_key_norms_when_the_model_has():
    config = load_preset("tiny")
    before = config.to_dict()
    assert decoder_only_twin(config).model_type == "llama"
    assert config.to_dict() == before
    assert decoder_only_twin(EncDecSLMConfig(**{**config.to_diff_dict(), "qk_norm": True})).model_type == "qwen3"


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(ValueError, match=r"'7b'.*110m, 1b, .*5m, .*700k, 800m-vlm, tiny"):
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


def test_the_table_has_every_preset(capsys):
    runpy.run_module("encdec_slm.configuration", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| preset | parameters |")
    assert [line.split("`")[1] for line in lines[2:]] == sorted(list_presets(), key=count)
    assert "| `330m` | 332,042,240 | 20 + 10 | 1024 | 6 / 3 x 64 | 273,121,792 | 7,680 | 7,680 |" in lines
