# SPDX-License-Identifier: Apache-2.0
"""The CTranslate2 spec computes what the model computes for every config field, and other models are refused."""

import json
import subprocess
import sys

import ctranslate2
import pytest
import torch
from ctranslate2.converters import transformers as converters
from transformers import dynamic_module_utils

from conftest import build_model, build_tokenizer, build_vision_model
from encdec_slm.export import ctranslate2_converter, export_ctranslate2
from encdec_slm.export.ctranslate2_converter import EncDecSLMLoader, build_spec, name_tokens


LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
ORIGINAL = {
    **{"hidden_act": "gelu_pytorch_tanh", "gated_mlp": False, "attention_bias": True, "mlp_bias": True},
    **{"lm_head_bias": True, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}
CONFIGS = {
    "llama": {},
    "original": ORIGINAL,
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "untied": {"tie_word_embeddings": False, "lm_head_bias": True},
    "one head per key": {"num_key_value_heads": 4},
    "one key for all heads": {"num_key_value_heads": 1},
    "query and key norms of one head": {"qk_norm": True, "num_attention_heads": 1, "num_key_value_heads": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.3, "rope_theta": 1000.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "smollm3": {"encoder_no_rope_layers": [0, 1], "decoder_no_rope_layers": [1, 0], "rms_norm_eps": 1e-3},
    "no rotation": {"encoder_no_rope_layers": [0, 0], "decoder_no_rope_layers": [0, 0]},
}


def random_ids(shape, seed=0):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def score(model, source_ids, target_ids):
    """Log-probability of each target token, by the model."""
    with torch.no_grad():
        logits = model(source_ids, labels=target_ids).logits
    return logits.log_softmax(-1).gather(-1, target_ids[..., None])[..., 0]


def score_export(folder, source_ids, target_ids):
    """Log-probability of each target token, by CTranslate2."""
    translator = ctranslate2.Translator(str(folder), intra_threads=1)
    tokens = ([[f"<id_{token_id}>" for token_id in row] for row in ids.tolist()] for ids in (source_ids, target_ids))
    # The last one is that of the end token.
    results = translator.score_batch(*tokens, max_input_length=0)
    return torch.tensor([result.log_probs[:-1] for result in results])


def assert_export_equals(model, folder, source_length=9, target_length=20):
    source_ids, target_ids = random_ids((3, source_length)), random_ids((3, target_length), seed=1)
    found, expected = score_export(folder, source_ids, target_ids), score(model, source_ids, target_ids)
    # Sums of a few hundred products in another order.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_every_config_gives_the_probabilities_of_the_model(fields, tmp_path):
    model = build_model(**fields)
    export_ctranslate2(model, tmp_path / "out", "float32")
    assert_export_equals(model, tmp_path / "out")


@pytest.mark.parametrize("name", ctranslate2_converter.ACTIVATIONS)
def test_every_activation_gives_the_probabilities_of_the_model(name, tmp_path):
    for gated in (True, False):
        model = build_model(hidden_act=name, gated_mlp=gated)
        export_ctranslate2(model, tmp_path / str(gated), "float32")
        assert_export_equals(model, tmp_path / str(gated))


@pytest.mark.parametrize("rope_parameters", [None, LLAMA3])
def test_positions_beyond_those_of_the_config_are_rotated_as_in_the_model(rope_parameters, tmp_path):
    model = build_model(rope_parameters=rope_parameters)
    export_ctranslate2(model, tmp_path / "out", "float32")
    assert_export_equals(model, tmp_path / "out", source_length=150, target_length=100)


@pytest.mark.parametrize("name", ctranslate2_converter.QUANTIZATIONS)
def test_every_quantization_is_stored_and_stays_near_the_model(name, tmp_path):
    model = build_model()
    export_ctranslate2(model, tmp_path / "out", name)
    source_ids, target_ids = random_ids((3, 9)), random_ids((3, 20), seed=1)
    values = torch.stack(
        [score_export(tmp_path / "out", source_ids, target_ids), score(model, source_ids, target_ids)]
    )
    # CPUs have no int16: CTranslate2 converts it to int8 with its own, coarser rounding.
    limit = {"int8": 0.98, "int1": 0.75}.get(name[:4], 0.999)
    assert torch.corrcoef(values.flatten(1))[0, 1] > limit
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    bytes_per_weight = {"int8": 1, "floa": 2, "bflo": 2, "int1": 2}[name[:4]] if name != "float32" else 4
    # Scales, norms and names are added.
    assert 0 < (tmp_path / "out" / "model.bin").stat().st_size - bytes_per_weight * num_weights < 20_000


def test_a_tied_table_is_stored_once(tmp_path):
    sizes = []
    for tied in (True, False):
        export_ctranslate2(build_model(tie_word_embeddings=tied), tmp_path / str(tied), "float32")
        sizes.append((tmp_path / str(tied) / "model.bin").stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx(97 * 32 * 4, abs=200)


def test_exporting_does_not_change_the_model(tmp_path):
    model = build_model().to(torch.bfloat16).train()
    config, weights = model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    export_ctranslate2(model, tmp_path / "out")
    assert model.config.to_dict() == config and model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ({"decoder_start_token_id": None, "bos_token_id": None}, "decoder_start_token_id"),
    ],
)
def test_what_ctranslate2_cannot_run_is_refused_by_name(fields, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        export_ctranslate2(build_model(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'encdec_vlm'.*`export_onnx`"):
        export_ctranslate2(build_vision_model(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"`quantization` is 'int4'.*int8_float32"):
        export_ctranslate2(build_model(), tmp_path / "out", "int4")
    with pytest.raises(ValueError, match=r"96.* 79"):
        export_ctranslate2(build_model(vocab_size=80), tmp_path / "out", tokenizer=build_tokenizer())
    assert not (tmp_path / "out").exists()


def test_ctranslate2_still_normalizes_the_queries_of_all_heads_together(tmp_path, monkeypatch):
    # If this fails, a release of CTranslate2 normalizes each head, and `qk_norm` need not be refused.
    monkeypatch.setattr(ctranslate2_converter, "_check_representable", lambda config: None)
    model = build_model(qk_norm=True)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.cross_attn.q_norm.weight.fill_(1.0)
    spec = build_spec(model, None)
    for layer in spec.decoder.layer:
        # A gain as wide as all heads: CTranslate2 reads beyond the end of a shorter one.
        layer.attention.q_norm.gamma = torch.ones(4 * 12)
    spec.validate()
    spec.optimize()
    spec.save(str(tmp_path))
    with pytest.raises(AssertionError):
        assert_export_equals(model, tmp_path)
    for layer in model.model.decoder.layers:
        layer.cross_attn.q_norm.register_forward_hook(lambda _, inputs, __: normalize_together(inputs[0]))
    assert_export_equals(model, tmp_path)


def normalize_together(query):
    """Divide queries (B, T, H, d) by the root mean square of all their heads."""
    return torch.nn.functional.rms_norm(query.flatten(2), (query.shape[2] * query.shape[3],), eps=1e-6).view_as(query)


def test_every_id_has_a_unique_name():
    tokens = {"<s>": 1, "a": 3, "<id_5>": 4, "<0x0A>": 6, "twice": 7, "again": 7, "": 8, b"bytes": 9, "\ud800": 10}

    class Tokenizer:
        def get_vocab(self):
            return tokens

        def convert_ids_to_tokens(self, token_id):
            return "again" if token_id == 7 else None

    found = name_tokens(13, Tokenizer())
    assert [found[i] for i in (1, 3, 4, 6, 7)] == ["<s>", "a", "<id_5>", "<0x0A>", "again"]
    assert found[5] == "<<id_5>>" and len(set(found)) == 13
    assert [found[i] for i in (0, 2, 8, 9, 10, 11, 12)] == [f"<id_{i}>" for i in (0, 2, 8, 9, 10, 11, 12)]
    assert name_tokens(3, None) == ["<id_0>", "<id_1>", "<id_2>"]


@pytest.mark.parametrize("options", [[], ["--trust_remote_code", "--quantization", "float32"]])
def test_the_converter_of_ctranslate2_converts_a_saved_checkpoint(options, tmp_path, monkeypatch):
    # A table with more rows than the tokenizer has tokens.
    model, tokenizer = build_model(eos_token_id=[2, 7], lm_head_bias=True), build_tokenizer(93)
    with torch.no_grad():
        model.lm_head.bias[93:] = -100.0
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", ["ct2-transformers-converter", *arguments])
    converters.main()
    source_ids = random_ids((3, 8)).clamp(max=92)
    expected = model.generate(source_ids, max_new_tokens=12, eos_token_id=2, pad_token_id=2)[:, 1:].tolist()
    translator = ctranslate2.Translator(str(tmp_path / "out"), intra_threads=1)
    sources = [tokenizer.convert_ids_to_tokens(row) for row in source_ids]
    results = translator.translate_batch(sources, beam_size=1, max_decoding_length=12, min_decoding_length=0)
    found = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    assert found == [[token_id for token_id in row if token_id != 2] for row in expected]


def test_the_converter_of_ctranslate2_refuses_what_the_loader_cannot_convert():
    for name in ("EncDecSLMConfig", "EncDecVLMConfig"):
        assert isinstance(converters._MODEL_LOADERS[name], EncDecSLMLoader)
    with pytest.raises(ValueError, match="'encdec_vlm'"):
        EncDecSLMLoader().get_model_class(build_vision_model().config, object)
    with pytest.raises(NotImplementedError, match="--activation_scales"):
        EncDecSLMLoader().smooth_activation(None, None)


def test_ctranslate2_adds_no_tokens_to_a_source(tmp_path):
    export_ctranslate2(build_model(eos_token_id=5), tmp_path / "out", tokenizer=build_tokenizer())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["add_source_bos"] and not config["add_source_eos"]
    names = (config["decoder_start_token"], config["eos_token"], config["unk_token"])
    assert names == ("<s>", "w5", "<unk>")


def test_without_ctranslate2_everything_imports_and_its_use_names_the_extra(tmp_path):
    script = (
        "import sys; import encdec_slm\n"
        "optional = {'ctranslate2', 'onnxruntime', 'openvino', 'onnx', 'matplotlib', 'datasets'}\n"
        "assert not optional & sys.modules.keys()\n"
        "sys.modules['ctranslate2'] = None\n"
        "from encdec_slm.export import CT2EncDecSLM, export_ctranslate2\n"
        "for call in (lambda: export_ctranslate2('x', 'y'), lambda: CT2EncDecSLM.from_pretrained('.')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all("`ctranslate2`" in line and "encdec-slm[export]" in line for line in lines)
