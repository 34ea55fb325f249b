# SPDX-License-Identifier: Apache-2.0
"""The graphs as other ONNX runtimes read them: names, shapes, operators, weights, and the numbers they compute."""

import json
import os
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from export_fixtures import STATIC_LENGTHS, build_ascii_tokenizer

from conftest import build_model, build_source, build_target_ids, build_vision_model
from encdec_slm.export import OrtEncDecSLM, export_onnx
from encdec_slm.export.onnx_export import parse_static_lengths
from encdec_slm.export.onnx_graphs import cache_names
from encdec_slm.export.operators import ACCEPTED, find_unsupported
from encdec_slm.export_manifest import MANIFEST, read_manifest


GRAPHS = ["decoder_model.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx"]
CROSS_NAMES, SELF_NAMES = (cache_names(2, "present", stack) for stack in ("encoder", "decoder"))


@pytest.fixture(scope="module")
def run(onnx_folder):
    """Runs a graph by file name: arrays by input name in, tensors by output name out."""
    sessions = {name: onnxruntime.InferenceSession(str(onnx_folder / name)) for name in GRAPHS}

    def run_graph(name, **inputs):
        arrays = {key: value.numpy() for key, value in inputs.items()}
        names = [output.name for output in sessions[name].get_outputs()]
        return dict(zip(names, map(torch.from_numpy, sessions[name].run(None, arrays)), strict=True))

    return run_graph


def run_first_step(run, source, decoder_ids):
    states = run("encoder_model.onnx", **source)["last_hidden_state"]
    inputs = {"input_ids": decoder_ids, "encoder_hidden_states": states}
    return run("decoder_model.onnx", **inputs, encoder_attention_mask=source["attention_mask"])


def as_past(outputs):
    return {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(9, 5, 7), (1,), (30, 2, 3, 4, 31)])
def test_logits_are_those_of_eager_for_any_number_and_length_of_rows(export_model, run, lengths, side):
    source = build_source(*lengths, padding_side=side)
    decoder_ids = build_target_ids(len(lengths), len(lengths) + 1)
    with torch.no_grad():
        expected = export_model(**source, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(run_first_step(run, source, decoder_ids)["logits"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_target_in_two_steps_gets_the_logits_and_the_cache_of_one_step(run, cut):
    source, decoder_ids = build_source(9, 5, 7), build_target_ids(3, 6)
    whole = run_first_step(run, source, decoder_ids)
    first = run_first_step(run, source, decoder_ids[:, :cut])
    second = run(
        "decoder_with_past_model.onnx",
        input_ids=decoder_ids[:, cut:],
        encoder_attention_mask=source["attention_mask"],
        **as_past(first),
    )
    for name in ("logits", *SELF_NAMES):
        expected = whole[name][:, cut:] if name == "logits" else whole[name]
        torch.testing.assert_close(second[name], expected, msg=name)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_with_attention_reads_its_mask(run, name):
    """A graph that has the input and ignores it is the usual fault of exporters."""
    source, decoder_ids = build_source(6, 6), build_target_ids(2, 3)
    first = run_first_step(run, source, decoder_ids)
    states = run("encoder_model.onnx", **source)["last_hidden_state"]
    inputs = {
        "encoder_model.onnx": {"input_ids": source["input_ids"]},
        "decoder_model.onnx": {"input_ids": decoder_ids, "encoder_hidden_states": states},
        "decoder_with_past_model.onnx": {"input_ids": decoder_ids, **as_past(first)},
    }[name]
    key = "attention_mask" if name == "encoder_model.onnx" else "encoder_attention_mask"
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    part, whole = (next(iter(run(name, **inputs, **{key: value}).values())) for value in (mask, torch.ones_like(mask)))
    assert not torch.allclose(part[0], whole[0], atol=1e-2)
    torch.testing.assert_close(part[1], whole[1])


def test_the_names_are_those_of_optimum_and_transformers_js(onnx_folder):
    graphs = read_manifest(onnx_folder, "onnx")["graphs"]
    names = {
        name: [[tensor["name"] for tensor in graph[kind]] for kind in ("inputs", "outputs")]
        for name, graph in graphs.items()
    }
    assert sorted(names) == GRAPHS
    assert names["encoder_model.onnx"] == [["input_ids", "attention_mask"], ["last_hidden_state"]]
    first_inputs, first_outputs = names["decoder_model.onnx"]
    assert first_inputs == ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    assert first_outputs == ["logits", *cache_names(2, "present", "decoder", "encoder")]
    past = cache_names(2, "past_key_values", "decoder", "encoder")
    assert names["decoder_with_past_model.onnx"] == [
        ["input_ids", "encoder_attention_mask", *past],
        ["logits", *SELF_NAMES],
    ]


@pytest.mark.parametrize("kind", ["onnx", "onnx_static"])
def test_the_manifest_describes_every_tensor_as_onnxruntime_does(kind, request):
    folder = request.getfixturevalue(f"{kind.removeprefix('onnx_')}_folder")
    types = {"int64": "tensor(int64)", "int32": "tensor(int32)", "float32": "tensor(float)"}
    manifest = read_manifest(folder, "onnx", "onnx-static")
    assert set(manifest["graphs"]) == {path.name for path in folder.glob("*.onnx")}
    for name, graph in manifest["graphs"].items():
        session = onnxruntime.InferenceSession(str(folder / name))
        for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            described = [(tensor["name"], tensor["shape"], types[tensor["dtype"]]) for tensor in graph[kind]]
            assert described == [(tensor.name, tensor.shape, tensor.type) for tensor in found]


def test_graphs_have_plain_operators_and_nothing_of_the_machine(onnx_folder):
    for name in GRAPHS:
        graph = onnx.load(onnx_folder / name, load_external_data=False)
        onnx.checker.check_model(str(onnx_folder / name), full_check=True)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 20)]
        # Keys and values are not repeated for their query heads.
        assert not {node.op_type for node in graph.graph.node} & {"Expand", "Tile", "If", "Loop", "Attention"}
        assert b".py" not in (onnx_folder / name).read_bytes()


def stored_weights(folder):
    """Offset and length of each weight in the shared file."""
    return {
        (entry["offset"], entry["length"])
        for path in folder.glob("*.onnx")
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if (entry := {item.key: int(item.value) for item in tensor.external_data if item.key != "location"})
    }


@pytest.mark.parametrize("kind", ["onnx", "static"])
def test_every_weight_is_stored_once(kind, export_model, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    stored = stored_weights(folder)
    large = [4 * value.numel() for value in export_model.parameters() if 4 * value.numel() >= 1024]
    tables = 2 * 4 * 14 * (sum(STATIC_LENGTHS["source"][-1:]) if kind == "static" else 0)
    assert sum(large) <= sum(length for _, length in stored) <= sum(large) + 2 * tables
    # Each weight begins on a page of its own.
    assert (folder / "model.onnx_data").stat().st_size <= sum(large) + 4096 * (len(stored) + 1)
    graph = onnx.load(next(folder.glob("decoder_with_past*")), load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert {"lm_head.weight", "decoder.layers.1.cross_attn.q_proj.weight_transposed", "decoder.norm.weight"} <= names


def test_the_folder_has_everything_but_code(export_model, onnx_folder):
    files = {path.name for path in onnx_folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST} <= files
    config = json.loads((onnx_folder / "config.json").read_text())
    assert config["vocab_size"] == export_model.config.vocab_size and "auto_map" not in config


def test_exporting_does_not_change_the_model(export_model, onnx_folder, static_folder):
    fresh = build_model(**{name: getattr(export_model.config, name) for name in ("num_attention_heads", "head_dim")})
    assert export_model.config._attn_implementation == fresh.config._attn_implementation
    assert type(export_model.model.encoder.rotary_emb) is type(fresh.model.encoder.rotary_emb)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"quantization": "int4"}, "quantization"),
        ({"quantization": ""}, "quantization"),
        ({"calibration": ["w5"]}, "calibration"),
        ({"calibration": ["w5"], "quantization": "int8"}, "calibration"),
        ({"quantization": "int8_static"}, "calibration"),
        ({"static_lengths": [8], "quantization": "int8"}, "static_lengths"),
        ({"static_lengths": [8], "quantization": "int8_static", "calibration": ["w5"]}, "static_lengths"),
        ({"quantization": "int8_static", "calibration": []}, "calibration"),
        ({"quantization": "int8_static", "calibration": "w5 w6"}, "calibration"),
        ({"quantization": "int8_static", "calibration": ["w5"]}, "tokenizer"),
        ({"quantization": "int8_static", "calibration": [[5, 97]]}, "calibration"),
        ({"quantization": "int8_static", "calibration": [[]]}, "calibration"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(tmp_path, arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        export_onnx(build_model(), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_row_of_another_type_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"`calibration` is a float"):
        export_onnx(build_model(), tmp_path / "out", quantization="int8_static", calibration=[0.5])


@pytest.mark.parametrize("options", [{}, {"static_lengths": [4]}], ids=str)
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_length_is_refused(tmp_path, rope_type, options):
    parameters = {"rope_type": rope_type, "rope_theta": 500.0, "factor": 2.0}
    if rope_type == "longrope":
        parameters |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 32}
    with pytest.raises(ValueError, match=f"`rope_type` is '{rope_type}'"):
        export_onnx(build_model(rope_parameters=parameters), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


CONFIGS = {
    "plain MLP with biases, one head per key": {
        **{"gated_mlp": False, "hidden_act": "gelu_pytorch_tanh", "mlp_bias": True, "attention_bias": True},
        **{"num_key_value_heads": 4, "encoder_no_rope_layers": [0, 1], "lm_head_bias": True},
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
@pytest.mark.parametrize("static_lengths", [None, {"source": [1, 40], "target": 30}], ids=["free", "fixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_exported(tmp_path, name, static_lengths):
    model = build_model(**CONFIGS[name])
    given = model.to(torch.bfloat16) if name == "yarn" else model
    exported = OrtEncDecSLM.from_pretrained(export_onnx(given, tmp_path / "out", static_lengths=static_lengths))
    model = model.float()
    source, decoder_ids = build_source(9, 40, 7, padding_side="left"), build_target_ids(3, 30)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(exported(**source, decoder_input_ids=decoder_ids).logits, expected, atol=1e-4, rtol=0)
    expected = model.generate(**source, max_new_tokens=20)
    torch.testing.assert_close(exported.generate(**source, max_new_tokens=20), expected)


@pytest.mark.slow
def test_two_exports_of_a_model_are_the_same_files(tmp_path, export_model, onnx_folder):
    folder = export_onnx(export_model, tmp_path / "again", tokenizer=build_ascii_tokenizer())
    for path in onnx_folder.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_an_export_runs_in_a_fresh_process(export_model, onnx_folder):
    code = """if True:
        import sys, torch
        from encdec_slm.export import OrtEncDecSLM
        model = OrtEncDecSLM.from_pretrained(sys.argv[1])
        print(model.generate(torch.tensor([[5, 6, 7, 2]]), max_new_tokens=8)[0].tolist())
    """
    command = [sys.executable, "-c", code, str(onnx_folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    expected = export_model.generate(torch.tensor([[5, 6, 7, 2]]), max_new_tokens=8)[0].tolist()
    assert json.loads(printed.splitlines()[-1]) == expected


# Fixed shapes


def test_static_graphs_have_no_free_dimension_and_only_operators_that_npus_accept(static_folder):
    manifest, used = read_manifest(static_folder, "onnx-static"), set()
    assert [manifest["source_lengths"], manifest["target_length"]] == [*STATIC_LENGTHS.values()]
    for name in manifest["graphs"]:
        proto = onnx.load(static_folder / name, load_external_data=False)
        values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
        assert {output for node in proto.graph.node for output in node.output} <= {value.name for value in values}
        for value in values:
            dims = value.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in dims) and len(dims) <= 5, value.name
        assert not any(attribute.HasField("g") for node in proto.graph.node for attribute in node.attribute)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", manifest["opset"])]
        assert {node.domain for node in proto.graph.node} == {""}
        used |= {node.op_type for node in proto.graph.node}
    assert manifest["operators"]["used"] == sorted(used)
    assert manifest["operators"]["not_accepted"] == {"qnn": [], "openvino": [], "coreml": []}
    assert all(used <= accepted for accepted in ACCEPTED.values())


def test_an_operator_that_an_npu_does_not_run_is_named(tmp_path):
    model = build_model(hidden_act="mish", encoder_num_hidden_layers=1, decoder_num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"qnn .*Mish.*coreml .*Mish.*`hidden_act`"):
        export_onnx(model, tmp_path / "out", static_lengths=[4])
    assert not any(tmp_path.iterdir())
    assert find_unsupported(["Add", "com.microsoft:Gelu"]) == {name: ["com.microsoft:Gelu"] for name in ACCEPTED}


def test_static_lengths_are_read_in_both_forms():
    assert parse_static_lengths([64, 16, 64], 2048) == ([16, 64], 128)
    assert parse_static_lengths((8,), 32) == ([8], 32)
    assert parse_static_lengths({"source": [8], "target": 5}, 32) == ([8], 5)


@pytest.mark.parametrize(
    "lengths", [64, "64", [64.0], [True], {"sources": [64]}, {"source": [8], "target": "8"}, [[8]]], ids=str
)
def test_static_lengths_of_another_type_are_refused(lengths):
    with pytest.raises(TypeError, match="`static_lengths`"):
        parse_static_lengths(lengths, 64)


@pytest.mark.parametrize(
    "lengths", [[], [0], [65], {"source": [8], "target": 0}, {"source": [8], "target": 65}], ids=str
)
def test_static_lengths_that_the_model_does_not_have_are_refused(lengths):
    with pytest.raises(ValueError, match=r"`static_lengths` .*\(64\)"):
        parse_static_lengths(lengths, 64)


def test_static_graphs_of_vision_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`static_lengths`.*'encdec_vlm'"):
        export_onnx(build_vision_model(), tmp_path / "out", static_lengths=[4])
