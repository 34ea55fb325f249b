# SPDX-License-Identifier: Apache-2.0
"""The CTranslate2 spec computes what the model computes, for every switch; what it cannot is refused."""

import json
import subprocess
import sys

import ctranslate2
import pytest
import torch
from ctranslate2.converters import transformers as converters
from test_pipeline_encdec_slm import build_tokenizer
from transformers import dynamic_module_utils

import encdec_slm
from conftest import randomised
from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.configuration import load_preset
from encdec_slm.export import ctranslate2_converter, export_ctranslate2
from encdec_slm.export.ctranslate2_converter import EncDecSLMLoader, model_spec, vocabulary


SIZES = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "max_position_embeddings": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
PREDECESSOR = {
    **{"hidden_act": "gelu_pytorch_tanh", "gated_mlp": False, "attention_bias": True, "mlp_bias": True},
    **{"lm_head_bias": True, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}
SWITCHES = {
    "llama": {},
    "predecessor": PREDECESSOR,
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


def build_model(seed=0, **switches):
    return randomised(EncDecSLMForConditionalGeneration(EncDecSLMConfig(**{**SIZES, **switches})), seed).eval()


def token_ids(shape, seed=0):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def names(ids):
    return [[f"<id_{token_id}>" for token_id in row] for row in ids.tolist()]


def log_probabilities(model, source_ids, target_ids):
    with torch.no_grad():
        logits = model(source_ids, labels=target_ids).logits
    return logits.log_softmax(-1).gather(-1, target_ids[..., None])[..., 0]


def scored(folder, source_ids, target_ids):
    translator = ctranslate2.Translator(str(folder), intra_threads=1)
    results = translator.score_batch(names(source_ids), names(target_ids), max_input_length=0)
    # The last is that of the end of the text.
    return torch.tensor([result.log_probs[:-1] for result in results])


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_gives_the_probabilities_of_the_model(switches, tmp_path):
    model = build_model(**switches)
    export_ctranslate2(model, tmp_path / "out", "float32")
    source_ids, target_ids = token_ids((3, 9)), token_ids((3, 20), seed=1)
    expected = log_probabilities(model, source_ids, target_ids)
    # Sums of a few hundred products in another order.
    torch.testing.assert_close(scored(tmp_path / "out", source_ids, target_ids), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ctranslate2_converter.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation_gives_the_probabilities_of_the_model(name, gated, tmp_path):
    model = build_model(hidden_act=name, gated_mlp=gated)
    export_ctranslate2(model, tmp_path / "out", "float32")
    source_ids, target_ids = token_ids((2, 5)), token_ids((2, 4), seed=1)
    expected = log_probabilities(model, source_ids, target_ids)
    torch.testing.assert_close(scored(tmp_path / "out", source_ids, target_ids), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_parameters", [None, LLAMA3])
def test_positions_beyond_those_of_the_config_are_rotated_as_in_the_model(rope_parameters, tmp_path):
    model = build_model(rope_parameters=rope_parameters)
    export_ctranslate2(model, tmp_path / "out", "float32")
    source_ids, target_ids = token_ids((1, 150)), token_ids((1, 100), seed=1)
    expected = log_probabilities(model, source_ids, target_ids)
    torch.testing.assert_close(scored(tmp_path / "out", source_ids, target_ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ctranslate2_converter.QUANTIZATIONS)
def test_every_quantization_is_stored_and_stays_near_the_model(name, tmp_path):
    model = build_model()
    export_ctranslate2(model, tmp_path / "out", name)
    # On a processor without the type CTranslate2 warns, on the standard error stream, and converts the weights.
    source_ids, target_ids = token_ids((3, 9)), token_ids((3, 20), seed=1)
    found = scored(tmp_path / "out", source_ids, target_ids)
    expected = log_probabilities(model, source_ids, target_ids)
    agreement = torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1]
    # CPUs have no int16: it becomes int8 at load, by the rounding of CTranslate2 (see ctranslate2_spec.py).
    assert agreement > {"int8": 0.98, "int1": 0.75}.get(name[:4], 0.999)
    weights = sum(parameter.numel() for parameter in model.parameters())
    bytes_per_weight = {"int8": 1, "floa": 2, "bflo": 2, "int1": 2}[name[:4]] if name != "float32" else 4
    size = (tmp_path / "out" / "model.bin").stat().st_size
    # Scales, norms and names come on top.
    assert bytes_per_weight * weights < size < bytes_per_weight * weights + 20_000


def test_a_tied_table_is_stored_once(tmp_path):
    sizes = []
    for tied in (True, False):
        export_ctranslate2(build_model(tie_word_embeddings=tied), tmp_path / str(tied), "float32")
        sizes.append((tmp_path / str(tied) / "model.bin").stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx(97 * 32 * 4, abs=200)


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = build_model().to(torch.bfloat16).train()
    config, weights = model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    export_ctranslate2(model, tmp_path / "out")
    assert model.config.to_dict() == config
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_query_and_key_norms_of_several_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`qk_norm` is True and there are 4 heads"):
        export_ctranslate2(build_model(qk_norm=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctranslate2_still_norms_the_queries_of_all_heads_together(tmp_path, monkeypatch):
    # When this fails, a release of CTranslate2 does it right, and the refusal can go.
    monkeypatch.setattr(ctranslate2_converter, "_check_representable", lambda config: None)
    model = build_model(qk_norm=True)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.cross_attn.q_norm.weight.fill_(1.0)
    spec = model_spec(model, None)
    for layer in spec.decoder.layer:
        # A gain as wide as all heads: with the shorter one, CTranslate2 reads beyond its end.
        layer.attention.q_norm.gamma = torch.ones(4 * 12)
    spec.validate()
    spec.optimize()
    spec.save(str(tmp_path))
    source_ids, target_ids = token_ids((3, 9)), token_ids((3, 5), seed=1)
    found = scored(tmp_path, source_ids, target_ids)
    assert (found - log_probabilities(model, source_ids, target_ids)).abs().max() > 0.01
    for layer in model.model.decoder.layers:
        layer.cross_attn.q_norm.register_forward_hook(lambda _, inputs, __: normed_together(inputs[0]))
    torch.testing.assert_close(found, log_probabilities(model, source_ids, target_ids), atol=2e-5, rtol=1e-5)


def normed_together(query):
    """Queries (B, T, H, d) over the root mean square of all their heads."""
    return torch.nn.functional.rms_norm(query.flatten(2), (query.shape[2] * query.shape[3],), eps=1e-6).view_as(query)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"hidden_act": "relu2"}, "`hidden_act` is 'relu2', which CTranslate2 does not have"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "of type 'yarn'"),
    ],
)
def test_what_ctranslate2_lacks_is_refused(switches, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_ctranslate2(build_model(**switches), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vision_models_are_sent_to_onnx(tmp_path):
    model = encdec_slm.EncDecVLMForConditionalGeneration(load_preset("tiny-vlm"))
    with pytest.raises(ValueError, match=r"'encdec_vlm', but CTranslate2 runs the text family only: .*`export_onnx`"):
        export_ctranslate2(model, tmp_path / "out")


def test_an_unknown_quantization_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown `quantization` 'int4'\. Available: int8, int8_float32"):
        export_ctranslate2(build_model(), tmp_path / "out", "int4")
    assert set(ctranslate2_converter.QUANTIZATIONS) == set(converters.ACCEPTED_MODEL_TYPES)


def test_a_target_without_a_first_token_is_refused(tmp_path):
    model = build_model()
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="every target begins with a token"):
        export_ctranslate2(model, tmp_path / "out")


def test_every_id_has_a_name_of_its_own():
    tokens = {"<s>": 1, "a": 3, "<id_5>": 4, "<0x0A>": 6, "twice": 7, "again": 7, "": 8, b"bytes": 9, "\ud800": 10}

    class Tokenizer:
        def get_vocab(self):
            return tokens

        def convert_ids_to_tokens(self, token_id):
            return "again" if token_id == 7 else None

    found = vocabulary(13, Tokenizer())
    assert [found[i] for i in (1, 3, 4, 6, 7)] == ["<s>", "a", "<id_5>", "<0x0A>", "again"]
    assert found[5] == "<<id_5>>"
    assert len(set(found)) == 13
    assert [found[i] for i in (0, 2, 8, 9, 10, 11, 12)] == [f"<id_{i}>" for i in (0, 2, 8, 9, 10, 11, 12)]
    assert vocabulary(3, None) == ["<id_0>", "<id_1>", "<id_2>"]


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ids up to 93, but the model only 0 to 79"):
        export_ctranslate2(build_model(vocab_size=80), tmp_path / "out", tokenizer=build_tokenizer())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    # 93 tokens of the tokenizer, and a table that is padded beyond them.
    model = build_model(eos_token_id=[2, 7], lm_head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[93:] = -100.0
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("options", [[], ["--trust_remote_code", "--quantization", "float32"]])
def test_the_converter_command_converts_a_saved_checkpoint(options, checkpoint, tmp_path, monkeypatch):
    folder, model = checkpoint
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["ct2-transformers-converter", "--model", str(folder), "--output_dir", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", command)
    converters.main()
    source_ids = token_ids((3, 8)).clamp(max=92)
    expected = model.generate(source_ids, max_new_tokens=12, eos_token_id=2, pad_token_id=2)[:, 1:].tolist()
    tokenizer = build_tokenizer()
    translator = ctranslate2.Translator(str(tmp_path / "out"), intra_threads=1)
    sources = [tokenizer.convert_ids_to_tokens(row) for row in source_ids]
    results = translator.translate_batch(sources, beam_size=1, max_decoding_length=12, min_decoding_length=0)
    found = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    assert found == [[token_id for token_id in row if token_id != 2] for row in expected]


def test_the_loader_refuses_vision_models_before_their_weights_are_read():
    for name in ("EncDecSLMConfig", "EncDecVLMConfig"):
        assert isinstance(converters._MODEL_LOADERS[name], EncDecSLMLoader)
    with pytest.raises(ValueError, match="text family only"):
        EncDecSLMLoader().get_model_class(load_preset("tiny-vlm"), object)


def test_the_loader_refuses_activation_scales():
    with pytest.raises(NotImplementedError, match="`--activation_scales` was given"):
        EncDecSLMLoader().smooth_activation(None, None)


def test_the_folder_says_that_nothing_is_added_to_a_source(tmp_path):
    export_ctranslate2(build_model(eos_token_id=5), tmp_path / "out", tokenizer=build_tokenizer())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["add_source_bos"]
    assert not config["add_source_eos"]
    names = (config["decoder_start_token"], config["eos_token"], config["unk_token"])
    assert names == ("<s>", "w1", "<unk>")


def test_importing_works_without_ctranslate2_and_using_it_names_the_extra(tmp_path):
    script = (
        "import sys; sys.modules['ctranslate2'] = None; import encdec_slm\n"
        "from encdec_slm.export import CT2EncDecSLM, export_ctranslate2\n"
        "for call in (lambda: export_ctranslate2('x', 'y'), lambda: CT2EncDecSLM.from_pretrained('.')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == 2 * [
        "The package `ctranslate2` is needed, but is not installed. Run `pip install encdec-slm[export]`."
    ]
