# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from onnx_bundles import padded_source, target_ids, tiny_text_model
from static_bundles import SOURCE_LENGTHS, TARGET_LENGTH, export_static_bundle, tiny_static_bundle
from transformers import AutoTokenizer

from encdec_slm import EncDecVLMForConditionalGeneration, Text2TextGenerationPipeline
from encdec_slm.configuration import load_preset
from encdec_slm.export import OrtEncDecSLM
from encdec_slm.export.bundles import read_manifest, required
from encdec_slm.export.onnx_static import FORM, parse_static_lengths
from encdec_slm.export.onnx_static_runtime import StaticEngine
from encdec_slm.export.operators import ACCEPTED, not_accepted


onnx, onnxruntime = required("onnx"), required("onnxruntime")


def opened(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def engine_of(folder):
    return StaticEngine(folder, read_manifest(folder, FORM), opened)


def static_logits(engine, source, target, num_first=1):
    """Logits of a target that is given in two calls, the first of so many tokens."""
    encoding, cache = engine.encode(**source), engine.new_cache(len(target))
    parts = target[:, :num_first], target[:, num_first:]
    return torch.cat([engine.decode(part, encoding, source["attention_mask"], cache) for part in parts], dim=1)


def assert_equals_eager(engine, model, source, **kwargs):
    target = target_ids(len(source["input_ids"]), TARGET_LENGTH)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=target).logits
        states = model.model.encoder(**source).last_hidden_state
    torch.testing.assert_close(static_logits(engine, source, target, **kwargs), expected, rtol=0, atol=1e-4)
    kept = source["attention_mask"].bool()
    torch.testing.assert_close(engine.encode(**source).last_hidden_state[kept], states[kept], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    return tiny_static_bundle()[0]


@pytest.fixture(scope="module")
def bundle():
    return tiny_static_bundle()[1]


@pytest.fixture(scope="module")
def engine(bundle):
    return engine_of(bundle)


@pytest.mark.parametrize("lengths", [(1,), (3,), (4,), (5,), (9,), (12,), (1, 4), (9, 2, 5), (12, 1), (3, 10)])
def test_logits_equal_eager_at_every_bucket_whatever_the_padding(engine, model, lengths):
    for side in ("right", "left"):
        assert_equals_eager(engine, model, padded_source(*lengths, side=side), num_first=2)


def test_a_mask_with_holes_hides_what_it_hides_in_eager(engine, model):
    source = padded_source(9)
    source["attention_mask"][:, [2, 5, 6]] = 0
    assert_equals_eager(engine, model, source)


def test_each_bucket_runs_the_smallest_graphs_that_hold_the_source(bundle):
    names = []
    engine = StaticEngine(bundle, read_manifest(bundle, FORM), lambda path: names.append(path.name) or opened(path))
    for length in (1, 4, 5, 9, 10, 12):
        source = padded_source(length)
        engine.decode(target_ids(1, 1), engine.encode(**source), None, engine.new_cache(1))
    expected = [
        f"{stem}_{length}.onnx" for length in SOURCE_LENGTHS for stem in ("encoder_model", "decoder_with_past_model")
    ]
    assert names == expected


def test_a_source_longer_than_the_largest_bucket_says_what_to_do(engine):
    with pytest.raises(ValueError, match=r"has 13 tokens, but the largest .* has 12\. Shorten it .*max_length=12"):
        engine.encode(**padded_source(13))


def test_more_tokens_than_the_cache_holds_say_what_to_do(engine):
    with pytest.raises(ValueError, match=r"^11 new tokens .* room for 10\. .*max_new_tokens=10`.*\"target\": 11}"):
        static_logits(engine, padded_source(4), target_ids(1, 11))
    with pytest.raises(ValueError, match=r"^11 new tokens"):
        engine.new_cache(1, max_length=12)
    assert engine.new_cache(1, max_length=11).get_seq_length() == 0


def test_every_tensor_of_the_manifest_is_that_of_the_graph(bundle):
    manifest = read_manifest(bundle, FORM)
    assert (manifest["source_lengths"], manifest["target_length"]) == (SOURCE_LENGTHS, TARGET_LENGTH)
    assert set(manifest["graphs"]) == {path.name for path in bundle.glob("*.onnx")}
    for name, graph in manifest["graphs"].items():
        session = onnxruntime.InferenceSession(str(bundle / name))
        for kind, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            of_graph = [(node.name, node.shape, np.dtype(ORT_TYPES[node.type]).name) for node in nodes]
            assert of_graph == [(tensor["name"], tensor["shape"], tensor["dtype"]) for tensor in graph[kind]]


ORT_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}


def test_graphs_have_no_free_dimension_no_branch_and_only_operators_that_npus_accept(bundle):
    manifest, used = read_manifest(bundle, FORM), set()
    for name in manifest["graphs"]:
        proto = onnx.load(bundle / name, load_external_data=False)
        values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
        assert {output for node in proto.graph.node for output in node.output} <= {value.name for value in values}
        for value in values:
            dims = value.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in dims) and len(dims) <= 5, value.name
        assert not any(attribute.HasField("g") for node in proto.graph.node for attribute in node.attribute)
        assert {node.domain for node in proto.graph.node} == {""}
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", manifest["opset"])]
        used |= {node.op_type for node in proto.graph.node}
    assert manifest["operators"]["used"] == sorted(used)
    assert manifest["operators"]["not_accepted"] == {"qnn": [], "openvino": [], "coreml": []}
    assert all(used <= accepted for accepted in ACCEPTED.values())


def test_weights_lie_on_disk_once(bundle, model):
    num_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    on_disk = (bundle / "model.onnx_data").stat().st_size
    small = 4096 * len(list(model.parameters()))
    assert num_bytes - 1024 * len(list(model.parameters())) < on_disk < num_bytes + small
    assert all(path.stat().st_size < 30_000 for path in bundle.glob("*.onnx"))


def test_graphs_tell_nothing_of_the_machine_they_were_made_on(bundle):
    assert not any(b"/encdec" in path.read_bytes() or b".py" in path.read_bytes() for path in bundle.glob("*.onnx"))


# What the bundle of the other tests has not; the depth of 1 keeps exports short.
VARIANTS = {
    "predecessor": {
        **{"gated_mlp": False, "hidden_act": "gelu_pytorch_tanh", "attention_bias": True, "mlp_bias": True},
        **{"lm_head_bias": True, "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1},
    },
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 6, "decoder_no_rope_layers": [0, 0]},
    "gelu": {"hidden_act": "gelu", "num_key_value_heads": 1, "gated_mlp": False},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}


@pytest.mark.parametrize(
    "variant", ["predecessor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("untied", "gelu", "linear"))]
)
def test_each_kind_of_checkpoint_of_the_family_exports(variant, tmp_path):
    model = tiny_text_model(**VARIANTS[variant])
    engine = engine_of(export_static_bundle(tmp_path / "bundle", model, source=[1, 7], target=TARGET_LENGTH))
    for lengths in ((1,), (7, 2)):
        assert_equals_eager(engine, model, padded_source(*lengths, side="left"))


def test_an_operator_that_an_npu_does_not_run_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"qnn does not accept Mish.*coreml does not accept Mish.*`hidden_act`"):
        export_static_bundle(
            tmp_path / "bundle", tiny_text_model(hidden_act="mish", encoder_num_hidden_layers=1), source=[4]
        )
    assert not any(tmp_path.iterdir())


def test_operators_of_other_domains_are_accepted_by_nobody():
    assert not_accepted(["Add", "com.microsoft:Gelu"]) == {name: ["com.microsoft:Gelu"] for name in ACCEPTED}


def test_lengths_are_read_in_both_forms():
    assert parse_static_lengths([64, 16, 64], 2048) == ([16, 64], 128)
    assert parse_static_lengths((8,), 32) == ([8], 32)
    assert parse_static_lengths({"source": [8], "target": 5}, 32) == ([8], 5)


@pytest.mark.parametrize(
    "lengths", [64, "64", [64.0], [True], {"sources": [64]}, {"source": [8], "target": "8"}, [[8]]]
)
def test_lengths_of_another_kind_are_refused(lengths):
    with pytest.raises(TypeError, match=r"`static_lengths` is .* but must be source lengths"):
        parse_static_lengths(lengths, 64)


@pytest.mark.parametrize("lengths", [[], [0], [65], {"source": [8], "target": 0}, {"source": [8], "target": 65}])
def test_lengths_that_the_model_does_not_have_are_refused(lengths):
    with pytest.raises(ValueError, match=r"all between 1 and `max_position_embeddings` \(64\)"):
        parse_static_lengths(lengths, 64)


def test_a_rotation_that_depends_on_the_length_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"`rope_type` 'dynamic', whose frequencies change with the length"):
        export_static_bundle(tmp_path / "bundle", tiny_text_model(rope_parameters=rope), source=[4])


def test_a_model_that_sees_is_refused(tmp_path):
    model = EncDecVLMForConditionalGeneration(load_preset("tiny-vlm"))
    with pytest.raises(ValueError, match=r"`model_type` 'encdec_vlm', but graphs of fixed shape are made of text"):
        export_static_bundle(tmp_path / "bundle", model)


def test_the_manifest_is_json_that_names_its_lists(bundle):
    manifest = json.loads((bundle / "export_manifest.json").read_text())
    assert manifest["format"] == FORM and set(manifest["operators"]["lists"]) == set(ACCEPTED)


@pytest.fixture(scope="module")
def runtime(bundle):
    return OrtEncDecSLM.from_pretrained(bundle)


SEARCHES = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5},
]


@pytest.mark.parametrize("options", SEARCHES, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_generated_ids_equal_eager(runtime, model, options, side):
    source = padded_source(9, 2, 12, side=side)
    outputs = []
    for writer in (model, runtime):
        torch.manual_seed(0)
        outputs.append(writer.generate(**source, max_new_tokens=TARGET_LENGTH, **options).tolist())
    assert outputs[0] == outputs[1]


def test_generation_without_a_length_ends_where_the_cache_does(runtime, model):
    source, never = padded_source(7), {"eos_token_id": None}
    expected = model.generate(**source, max_length=TARGET_LENGTH + 1, **never)
    assert runtime.generate(**source, **never).tolist() == expected.tolist()
    assert expected.shape == (1, TARGET_LENGTH + 1)


def test_too_many_new_tokens_are_refused_before_the_first(runtime):
    with pytest.raises(ValueError, match=r"^11 new tokens were asked for, but the cache .* has room for 10"):
        runtime.generate(**padded_source(7), max_new_tokens=TARGET_LENGTH + 1)


def test_the_tokenizer_of_the_bundle_cuts_sources_to_the_largest_bucket(bundle, runtime):
    tokenizer, text = AutoTokenizer.from_pretrained(bundle), " ".join(["w7"] * 20)
    pipeline = Text2TextGenerationPipeline(runtime, tokenizer)
    assert pipeline([text, "w3"], truncation=True, batch_size=2) == pipeline([" ".join(["w7"] * 11), "w3"])
    with pytest.raises(ValueError, match=r"has 21 tokens, but .*model_max_length` allows 12"):
        pipeline(text)


def test_drafts_are_refused_because_they_save_nothing(runtime):
    with pytest.raises(ValueError, match=r"run one token per call, so that a draft saves nothing\. Leave it out"):
        runtime.generate(**padded_source(7), max_new_tokens=5, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers_are_refused(runtime, dtype):
    source, target = padded_source(7), target_ids(1, 2)
    with pytest.raises(TypeError, match=r"^`input_ids` has dtype"):
        runtime(input_ids=source["input_ids"].to(dtype), decoder_input_ids=target)
    with pytest.raises(TypeError, match=r"^`decoder_input_ids` has dtype"):
        runtime(**source, decoder_input_ids=target.to(dtype))


def test_an_encoding_of_another_model_is_refused(runtime, model):
    source = padded_source(5)
    encoding = model.model.encoder(**source)
    with pytest.raises(ValueError, match=r"`encoder_outputs` has no `cross_key_values`.*get_encoder"):
        runtime(encoder_outputs=encoding, decoder_input_ids=target_ids(1, 2))
