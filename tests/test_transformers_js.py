# SPDX-License-Identifier: Apache-2.0
"""Exports to transformers.js: graphs in onnxruntime, and generation by transformers.js itself under Node."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from export_fixtures import SHAPE, SWITCHES, add_end_token, build_batches, generate_rows, trim
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from conftest import build_byte_tokenizer, build_model, build_vision_model
from encdec_slm.export import export_transformers_js, load_export
from encdec_slm.export.onnx_quantization import _round_to_blocks, compress_weights
from encdec_slm.export.onnx_tracing import SharedWeights
from encdec_slm.export_manifest import read_manifest


pytest.importorskip("onnxscript")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

# torch 2.13's exporter warns about its own calls.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
PACKAGE = "@huggingface/transformers@4.3.2"
SCRIPT = Path(__file__).with_name("transformers_js.mjs")


def open_graphs(folder):
    (encoder,), (decoder,) = (sorted((folder / "onnx").glob(f"{kind}*.onnx")) for kind in ("encoder", "decoder"))
    return [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (encoder, decoder)]


def compute_logits(folder, batch, target_ids):
    """Logits of both branches of the decoder, as transformers.js calls them: the first token, then one more."""
    encoder, decoder = open_graphs(folder)
    (states,) = encoder.run(None, {"input_ids": batch["input_ids"].numpy()})
    names = {value.name: value.shape for value in decoder.get_inputs() if value.name.startswith("past_key_values")}
    past = {
        name: np.zeros([len(states), *[size if isinstance(size, int) else 0 for size in shape[1:]]], np.float32)
        for name, shape in names.items()
    }
    feeds = {"encoder_hidden_states": states, "encoder_attention_mask": batch["attention_mask"].numpy()}
    logits = []
    for step, ids in enumerate(target_ids.T):
        feeds |= {"input_ids": ids[:, None].numpy(), "use_cache_branch": np.array([step > 0]), **past}
        outputs = dict(zip([value.name for value in decoder.get_outputs()], decoder.run(None, feeds), strict=True))
        logits.append(torch.from_numpy(outputs["logits"]))
        kept = [name for name in names if step == 0 or ".decoder." in name]
        past |= {name: outputs[name.replace("past_key_values", "present")] for name in kept}
    return torch.cat(logits, 1)


@pytest.fixture(scope="module")
def model():
    return build_model(**SHAPE, **SWITCHES["gated"])


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("js") / "float32"
    return export_transformers_js(model, folder, tokenizer=build_byte_tokenizer(model_max_length=10**6))


def test_both_branches_give_the_logits_of_the_model(model, exported):
    batch, target_ids = build_batches()[-1], torch.tensor([[1, 9, 30]] * 4)
    expected = model(**batch, decoder_input_ids=target_ids).logits
    torch.testing.assert_close(compute_logits(exported, batch, target_ids), expected, rtol=1e-4, atol=1e-4)


def test_each_weight_is_stored_once(model, exported):
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert size < (exported / "onnx" / "decoder_model_merged.onnx_data").stat().st_size < size * 1.6
    assert read_manifest(exported, "transformers-js")["quantization"] is None


def round_weights(model, quantization):
    """A copy of the model with the weights that an export in `quantization` stores."""
    model = copy.deepcopy(model)
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if quantization == "float16" and hasattr(module, "weight") and module.weight.ndim == 2:
            module.weight.data = module.weight.half().float()
        elif module is embedding or (isinstance(module, torch.nn.Linear) and module.weight is not embedding.weight):
            bits = 4 if quantization == "int4" and module is not embedding else 8
            blocks, scales = _round_to_blocks(module.weight.detach().numpy(), bits)
            if bits == 4:
                blocks = np.stack((blocks & 15, blocks >> 4), -1).reshape(*blocks.shape[:2], -1)
            rows = (blocks.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
            module.weight.data = torch.from_numpy(rows.reshape(len(rows), -1)[:, : module.weight.shape[1]])
    return model


@pytest.mark.parametrize(("quantization", "error"), [("float16", 1e-5), ("int8", 0.1), ("int4", 0.15)])
def test_fewer_bits_give_the_logits_of_rounded_weights(model, exported, tmp_path, quantization, error):
    batch, target_ids = build_batches()[-1], torch.tensor([[1, 9, 30]] * 4)
    (folder := tmp_path / "onnx").mkdir()
    graph = ir.load(exported / "onnx" / "decoder_model_merged.onnx")
    compress_weights(graph, quantization)
    weights = SharedWeights(folder, "weights")
    weights.write_graph(graph, "decoder.onnx")
    shutil.copy(exported / "onnx" / "encoder_model.onnx", folder)
    with torch.no_grad():
        rounded = round_weights(model, quantization)
        expected = rounded(**batch, decoder_input_ids=target_ids).logits
    # Activations of products with integers have 8 bits.
    assert (compute_logits(tmp_path, batch, target_ids) - expected).norm() < error * expected.norm()
    assert weights.path.stat().st_size < (exported / "onnx" / "decoder_model_merged.onnx_data").stat().st_size


def test_sources_are_cut_at_the_positions_of_the_model(exported):
    assert AutoTokenizer.from_pretrained(exported).model_max_length == SHAPE["max_position_embeddings"]


def test_after_an_end_token_there_are_end_tokens_only(exported):
    batch, target_ids = build_batches()[3], torch.tensor([[1, 2]])
    assert compute_logits(exported, batch, target_ids)[0, 1].argmax() == 2


def test_what_transformers_js_cannot_take_is_refused_and_nothing_is_written(model, exported, tmp_path):
    tokenizer = build_byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.UnicodeScripts()
    for given, options, pattern in (
        (model, {"quantization": "int3"}, "int3"),
        (model, {"tokenizer": tokenizer}, "UnicodeScripts"),
        (build_vision_model(), {}, "images"),
        (build_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), {}, "dynamic"),
    ):
        with pytest.raises(ValueError, match=pattern):
            export_transformers_js(given, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="transformers-js"):
        load_export(exported)
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_and_other_files_are_not(exported, model, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "out")
    (folder / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"onnx/notes\.txt"):
        export_transformers_js(model, folder, overwrite=True)


# Under Node


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory):
    """A folder with the npm package."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed (Debian: apt-get install npm)")
    folder = tmp_path_factory.mktemp("node")
    # The scripts of onnxruntime-node only download files for CUDA.
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm cannot install {PACKAGE}: {installed.stderr[:300]}")
    shutil.copy(SCRIPT, folder)
    return folder


def run_node(node_folder, folder, **request):
    batches = [{key: value.tolist() for key, value in batch.items()} for batch in request.pop("batches", [])]
    request |= {"root": f"{folder.parent}/", "name": folder.name, "batches": batches}
    done = subprocess.run(
        ["node", SCRIPT.name],
        **{"cwd": node_folder, "input": json.dumps(request), "capture_output": True, "text": True, "timeout": 500},
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_transformers_js_generates_what_the_model_generates(node_folder, switches, tmp_path):
    model = build_model(**SHAPE, **switches)
    batches, options = build_batches(), {"max_new_tokens": 24}
    add_end_token(model, batches[-1])
    export_transformers_js(model, tmp_path / "out", tokenizer=build_byte_tokenizer())
    found = run_node(node_folder, tmp_path / "out", batches=batches, options=options)["ids"]
    expected = [generate_rows(model, batch, **options) for batch in batches]
    assert [[trim(row, model) for row in rows] for rows in found] == expected
    lengths = [len(row) for rows in expected for row in rows]
    assert min(lengths) < 25  # some targets end before the maximum


@pytest.mark.slow
def test_texts_are_streamed_and_long_ones_are_cut(node_folder, exported, model):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokenizer.padding_side = "right"
    texts = ["find . -name '*.py' , now", "a", "long " * 400]
    # transformers.js cuts the end token off, too.
    inputs = {name: rows[:, :512] for name, rows in tokenizer(texts, padding=True, return_tensors="pt").items()}
    expected = tokenizer.batch_decode(generate_rows(model, inputs, max_new_tokens=12), skip_special_tokens=True)
    found = run_node(node_folder, exported, texts=texts, options={"max_new_tokens": 12})
    assert found["texts"] == expected
    assert found["streamed"] == expected[0]
