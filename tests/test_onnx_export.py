# SPDX-License-Identifier: Apache-2.0
"""The graphs as any ONNX runtime reads them: names, shapes, operators, and the numbers that come out."""

import json
import os
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from onnx_bundles import SWITCHES, padded_source, target_ids, tiny_onnx_bundle, tiny_text_model, word_tokenizer

from encdec_slm.export import onnx_export
from encdec_slm.export.bundles import MANIFEST
from encdec_slm.export.onnx_export import export_onnx
from encdec_slm.export.onnx_graphs import cache_names


GRAPHS = ["decoder_model.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx"]
CROSS, OWN = (cache_names(2, "present", stack) for stack in ("encoder", "decoder"))


@pytest.fixture(scope="module")
def bundle():
    return tiny_onnx_bundle()


@pytest.fixture(scope="module")
def run(bundle):
    """Runs a graph by file name: arrays by input name in, arrays by output name out."""
    sessions = {name: onnxruntime.InferenceSession(str(bundle[1] / name)) for name in GRAPHS}

    def outputs_of(name, **inputs):
        inputs = {
            key: tensor.numpy() if isinstance(tensor, torch.Tensor) else tensor for key, tensor in inputs.items()
        }
        names = [output.name for output in sessions[name].get_outputs()]
        return dict(zip(names, sessions[name].run(None, inputs), strict=True))

    return outputs_of


def first_step(run, source, decoder_ids):
    states = run("encoder_model.onnx", **source)["last_hidden_state"]
    inputs = {"input_ids": decoder_ids, "encoder_hidden_states": states}
    return run("decoder_model.onnx", **inputs, encoder_attention_mask=source["attention_mask"])


def as_past(outputs):
    return {name.replace("present", "past_key_values"): array for name, array in outputs.items() if name != "logits"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(9, 5, 7), (1,), (30, 2, 3, 4, 31)])
def test_logits_are_those_of_eager_on_padded_rows_of_any_number_and_length(bundle, run, lengths, side):
    source, decoder_ids = padded_source(*lengths, side=side), target_ids(len(lengths), len(lengths) + 1)
    with torch.no_grad():
        expected = bundle[0](**source, decoder_input_ids=decoder_ids).logits
    logits = first_step(run, source, decoder_ids)["logits"]
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_target_in_two_steps_gets_the_logits_and_the_cache_of_one_step(run, cut):
    source, decoder_ids = padded_source(9, 5, 7), target_ids(3, 6)
    whole = first_step(run, source, decoder_ids)
    first = first_step(run, source, decoder_ids[:, :cut])
    second = run(
        "decoder_with_past_model.onnx",
        input_ids=decoder_ids[:, cut:],
        encoder_attention_mask=source["attention_mask"],
        **as_past(first),
    )
    for name in ("logits", *OWN):
        expected = whole[name][:, cut:] if name == "logits" else whole[name]
        torch.testing.assert_close(torch.from_numpy(second[name]), torch.from_numpy(expected), msg=name)


def test_padding_changes_nothing_that_is_read(run):
    alone, padded = padded_source(5), padded_source(5)
    for name, filler in (("input_ids", 96), ("attention_mask", 0)):
        padded[name] = torch.nn.functional.pad(padded[name], (4, 2), value=filler)
    logits = [first_step(run, source, target_ids(1, 4))["logits"] for source in (alone, padded)]
    torch.testing.assert_close(*map(torch.from_numpy, logits))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_that_attends_reads_its_mask(run, name):
    """Without this, upstream's usual fault would pass: a graph that has the input and does not use it."""
    source, decoder_ids = padded_source(6, 6), target_ids(2, 3)
    first = first_step(run, source, decoder_ids)
    states = run("encoder_model.onnx", **source)["last_hidden_state"]
    inputs = {
        "encoder_model.onnx": {"input_ids": source["input_ids"]},
        "decoder_model.onnx": {"input_ids": decoder_ids, "encoder_hidden_states": states},
        "decoder_with_past_model.onnx": {"input_ids": decoder_ids, **as_past(first)},
    }[name]
    key = "attention_mask" if name == "encoder_model.onnx" else "encoder_attention_mask"
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    part, whole = (next(iter(run(name, **inputs, **{key: value}).values())) for value in (mask, torch.ones_like(mask)))
    assert not torch.allclose(torch.from_numpy(part[0]), torch.from_numpy(whole[0]), atol=1e-2)
    torch.testing.assert_close(torch.from_numpy(part[1]), torch.from_numpy(whole[1]))


def test_the_manifest_names_every_tensor_as_onnxruntime_finds_it(bundle):
    folder = bundle[1]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == "onnx" and sorted(manifest["graphs"]) == GRAPHS
    for name, graph in manifest["graphs"].items():
        session = onnxruntime.InferenceSession(str(folder / name))
        for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            types = {"int64": "tensor(int64)", "float32": "tensor(float)"}
            listed = [(tensor["name"], tensor["shape"], types[tensor["dtype"]]) for tensor in graph[kind]]
            assert listed == [(tensor.name, tensor.shape, tensor.type) for tensor in found]


def test_the_names_are_those_that_optimum_and_transformers_js_use(bundle):
    graphs = json.loads((bundle[1] / MANIFEST).read_text())["graphs"]
    names = {
        name: {kind: [tensor["name"] for tensor in graph[kind]] for kind in ("inputs", "outputs")}
        for name, graph in graphs.items()
    }
    assert names["encoder_model.onnx"] == {
        "inputs": ["input_ids", "attention_mask"],
        "outputs": ["last_hidden_state"],
    }
    assert names["decoder_model.onnx"]["inputs"] == ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    assert names["decoder_model.onnx"]["outputs"][:5] == [
        *("logits", "present.0.decoder.key", "present.0.decoder.value"),
        *("present.0.encoder.key", "present.0.encoder.value"),
    ]
    assert names["decoder_with_past_model.onnx"]["inputs"] == [
        *("input_ids", "encoder_attention_mask"),
        *cache_names(2, "past_key_values", "decoder", "encoder"),
    ]
    assert names["decoder_with_past_model.onnx"]["outputs"] == ["logits", *OWN]


def test_graphs_are_of_plain_operators_and_repeat_no_keys(bundle):
    for name in GRAPHS:
        graph = onnx.load(bundle[1] / name, load_external_data=False)
        onnx.checker.check_model(str(bundle[1] / name), full_check=True)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 20)]
        assert not {node.op_type for node in graph.graph.node} & {"Expand", "Tile", "If", "Loop", "Attention"}
        assert not any("/" in prop.value for node in graph.graph.node for prop in node.metadata_props)


def test_every_weight_lies_in_the_folder_once(bundle):
    """Two decoders and the tied head read the same bytes; only the pages that weights begin on are lost."""
    model, folder = bundle
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    graph_bytes = sum((folder / name).stat().st_size for name in GRAPHS)
    data = folder / "model.onnx_data"
    stored = {
        (entry["offset"], entry["length"])
        for name in GRAPHS
        for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer
        if (entry := {item.key: int(item.value) for item in tensor.external_data if item.key != "location"})
    }
    large = [parameter for parameter in model.parameters() if 4 * parameter.numel() >= 1024]
    assert sum(length for _, length in stored) == 4 * sum(parameter.numel() for parameter in large)
    assert data.stat().st_size <= num_bytes + 4096 * len(stored) and graph_bytes < num_bytes


def test_the_weights_have_names_of_the_checkpoint(bundle):
    graph = onnx.load(bundle[1] / "decoder_model.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert {"lm_head.weight", "decoder.layers.1.cross_attn.q_proj.weight_transposed", "decoder.norm.weight"} <= names


def test_the_folder_has_all_that_a_user_needs(bundle):
    model, folder = bundle
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST} <= files
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == model.config.vocab_size and "auto_map" not in config


def test_exporting_leaves_the_model_as_it_was(bundle):
    model = bundle[0]
    assert model.config._attn_implementation == "sdpa" and model.dtype == torch.float32
    source = padded_source(5, 3)
    fresh = tiny_text_model(**SWITCHES)
    with torch.no_grad():
        logits = [each(**source, decoder_input_ids=target_ids(2, 3)).logits for each in (model, fresh)]
    torch.testing.assert_close(*logits, atol=0, rtol=0)


@pytest.mark.parametrize("quantization", ["int4", "INT8", ""])
def test_an_unknown_quantization_is_refused_with_the_list(tmp_path, quantization):
    with pytest.raises(ValueError, match=r"must be None .*'int8', 'int8_static'"):
        export_onnx(tiny_text_model(), tmp_path / "out", quantization=quantization)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"calibration": ["w1"]}, "only 'int8_static' measures"),
        ({"calibration": ["w1"], "quantization": "int8"}, "only 'int8_static' measures"),
        ({"static_lengths": [8], "quantization": "int8"}, "NPUs do not measure activations when"),
        ({"quantization": "int8_static", "calibration": []}, "at least one source"),
        ({"quantization": "int8_static", "calibration": "w1 w2"}, "must be a list"),
        ({"quantization": "int8_static", "calibration": ["w1"]}, "no tokenizer"),
        ({"quantization": "int8_static", "calibration": [[5, 97]]}, "from 0 to 96"),
        ({"quantization": "int8_static", "calibration": [[]]}, "at least one"),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(tmp_path, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        export_onnx(tiny_text_model(), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_row_that_is_neither_text_nor_ids_is_refused(tmp_path):
    with pytest.raises(TypeError, match="row of `calibration` is a float"):
        export_onnx(tiny_text_model(), tmp_path / "out", quantization="int8_static", calibration=[0.5])


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rotation_that_changes_with_the_length_is_refused(tmp_path, rope):
    parameters = {"rope_type": rope, "rope_theta": 500.0, "factor": 2.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 7, "long_factor": [2.0] * 7, "original_max_position_embeddings": 32}
    with pytest.raises(ValueError, match=f'`rope_type` "{rope}", whose frequencies change'):
        export_onnx(tiny_text_model(rope_parameters=parameters), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install encdec-slm\[export\]"):
        export_onnx(tiny_text_model(), tmp_path / "out")


def test_a_folder_that_is_not_empty_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_onnx(tiny_text_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_exported", lambda part: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_onnx(tiny_text_model(), tmp_path / "out", tokenizer=word_tokenizer())
    assert list(tmp_path.iterdir()) == []


CONFIGS = {
    "plain MLP with biases, heads for all keys": {
        **{"gated_mlp": False, "hidden_act": "gelu_pytorch_tanh", "mlp_bias": True, "attention_bias": True},
        **{"num_key_value_heads": 6, "encoder_no_rope_layers": [0, 1]},
    },
    "an untied head with a bias": {"tie_word_embeddings": False, "lm_head_bias": True, "hidden_act": "gelu"},
    "a tied head with a bias": {"lm_head_bias": True, "num_attention_heads": 2, "num_key_value_heads": 1},
    "yarn": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
        }
    },
    "llama3": {
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        }
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_switch_is_exported(tmp_path, name):
    model = tiny_text_model(**CONFIGS[name])
    folder = export_onnx(model.to(torch.bfloat16) if name == "yarn" else model, tmp_path / "out")
    model = model.float()
    source, decoder_ids = padded_source(9, 40, 7, side="left"), target_ids(3, 30)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=decoder_ids).logits
    loaded = onnx_model().from_pretrained(folder)
    logits = loaded(**source, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    expected = model.generate(**source, max_new_tokens=20)
    torch.testing.assert_close(loaded.generate(**source, max_new_tokens=20), expected)


def onnx_model():
    from encdec_slm.export.onnx_model import OrtEncDecSLM

    return OrtEncDecSLM


@pytest.mark.slow
def test_two_exports_of_a_model_are_the_same_files(tmp_path, bundle):
    folder = export_onnx(bundle[0], tmp_path / "again", tokenizer=word_tokenizer())
    for path in bundle[1].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_an_exported_folder_runs_in_a_fresh_process(bundle):
    code = """if True:
        import sys, torch
        from encdec_slm.export import OrtEncDecSLM
        model = OrtEncDecSLM.from_pretrained(sys.argv[1])
        print(model.generate(torch.tensor([[5, 6, 7, 2]]), max_new_tokens=8)[0].tolist())
    """
    command = [sys.executable, "-c", code, str(bundle[1])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    expected = bundle[0].generate(torch.tensor([[5, 6, 7, 2]]), max_new_tokens=8)[0].tolist()
    assert json.loads(printed.splitlines()[-1]) == expected
