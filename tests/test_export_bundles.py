# SPDX-License-Identifier: Apache-2.0
"""What every export refuses, and folders that are whole or not there."""

import json
import shutil
import sys

import peft
import pytest
import torch
from test_pipeline_encdec_slm import build_tokenizer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from conftest import randomised
from encdec_slm import EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel
from encdec_slm.export import bundles
from encdec_slm.export.bundles import (
    MANIFEST,
    bundle_written_whole,
    check_tokenizer,
    exportable,
    read_manifest,
    required,
    tokenizer_hash,
)


LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_2_SEQ_LM"}
# peft asks the model by a name that transformers is about to drop.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_bundle(folder, tokenizer=None, overwrite=False, **files):
    with bundle_written_whole(folder, "toy", tokenizer, overwrite) as (temporary, manifest):
        manifest["answer"] = 42
        for name, text in files.items():
            (temporary / name).write_text(text)
    return folder


# Which models


def test_a_module_of_the_extra_is_given_and_a_missing_one_named(monkeypatch):
    assert required("json.decoder") is json.decoder
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in ("onnx", "no_such_engine.converters"):
        package = name.partition(".")[0]
        with pytest.raises(ImportError) as caught:
            required(name)
        expected = f"The package `{package}` is needed, but is not installed. Run `pip install encdec-slm[export]`."
        assert str(caught.value) == expected


def test_what_a_module_itself_lacks_is_not_put_down_to_the_extra(tmp_path, monkeypatch):
    (tmp_path / "half_an_engine.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'what_it_needs'"):
        required("half_an_engine")


def test_a_given_model_is_copied_in_float32_and_eval_mode(tiny_model):
    tiny_model.to(torch.bfloat16).train()
    model, tokenizer = exportable(tiny_model)
    assert model is not tiny_model
    assert not model.training
    assert tiny_model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.dtype for value in tiny_model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tokenizer is None


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_a_folder_gives_its_model_and_its_tokenizer(as_type, checkpoint, tiny_model):
    model, tokenizer = exportable(as_type(checkpoint))
    assert all(torch.equal(value, tiny_model.state_dict()[name]) for name, value in model.state_dict().items())
    assert tokenizer_hash(tokenizer) == tokenizer_hash(build_tokenizer())
    loaded = EncDecSLMForConditionalGeneration.from_pretrained(checkpoint)
    assert tokenizer_hash(exportable(loaded)[1]) == tokenizer_hash(tokenizer)
    other = build_tokenizer()
    assert exportable(checkpoint, other)[1] is other


def test_no_code_of_a_checkpoint_is_run(checkpoint):
    (checkpoint / "modeling_encdec_slm.py").write_text("raise SystemExit('run')")
    assert isinstance(exportable(checkpoint)[0], EncDecSLMForConditionalGeneration)


@PEFT_WARNS
def test_adapters_are_refused_until_they_are_merged(tiny_model, checkpoint, tmp_path):
    config = peft.LoraConfig(**LORA, init_lora_weights=False)
    wrapped = peft.get_peft_model(EncDecSLMForConditionalGeneration.from_pretrained(checkpoint), config)
    with pytest.raises(ValueError, match=r"is a PeftModel\w* with adapters.* Merge them first: .*merge_and_unload"):
        exportable(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds adapters \(`adapter_config\.json`\).* Merge them first"):
        exportable(tmp_path / "adapter")
    tiny_model.add_adapter(config)
    with pytest.raises(ValueError, match="is a EncDecSLMForConditionalGeneration with adapters"):
        exportable(tiny_model)
    merged = peft.PeftModel.from_pretrained(
        EncDecSLMForConditionalGeneration.from_pretrained(checkpoint), tmp_path / "adapter"
    ).merge_and_unload()
    weight = exportable(merged)[0].model.encoder.layers[0].self_attn.q_proj.weight
    assert not torch.equal(weight, tiny_model.model.encoder.layers[0].self_attn.q_proj.weight)


def test_quantized_folders_are_refused_by_their_config(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantized \(bitsandbytes\)\. Export the model that it was made from"):
        exportable(checkpoint)


class PackedTensor(torch.Tensor):
    """A tensor of another class, as quantizers put in place of weights."""


@pytest.mark.parametrize("weight", [torch.zeros(48, 32).as_subclass(PackedTensor), torch.zeros(48, 32).to(torch.int8)])
def test_quantized_weights_are_refused(weight, tiny_model):
    projection = tiny_model.model.decoder.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(
        ValueError, match=r"has quantized weights \(model\.decoder\.layers\.0\.self_attn\.q_proj\.weig"
    ):
        exportable(tiny_model)


def test_weights_of_torchao_are_refused(tiny_model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(tiny_model.model.decoder, quantization.Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"has quantized weights \(model\.decoder\.layers\.0\.self_attn\.q_proj\.weig"
    ):
        exportable(tiny_model)


def test_models_that_a_quantizer_loaded_are_refused(tiny_model):
    tiny_model.hf_quantizer = object()
    with pytest.raises(ValueError, match="has quantized weights"):
        exportable(tiny_model)


@pytest.mark.parametrize("model_class", [EncDecSLMModel, EncDecSLMEncoderModel])
def test_models_without_a_head_are_refused(model_class, tiny_config):
    with pytest.raises(ValueError, match=f"is a {model_class.__name__}, which has no output head"):
        exportable(model_class(tiny_config))


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_without_a_head_is_exported_only_if_the_table_is_the_head(tied, tiny_config, tmp_path):
    tiny_config.tie_word_embeddings = tied
    whole = randomised(EncDecSLMForConditionalGeneration(tiny_config))
    whole.model.save_pretrained(tmp_path)
    if tied:
        assert torch.equal(exportable(tmp_path)[0].lm_head.weight, whole.lm_head.weight)
        return
    with pytest.raises(ValueError, match=r"has no weights for lm_head\.weight, which would be random"):
        exportable(tmp_path)


def test_other_families_are_refused(tmp_path):
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(ValueError, match="is of `model_type` 't5', but this exports encdec_slm and encdec_vlm"):
        exportable(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of `model_type` 't5'"):
        exportable(tmp_path)


def test_weights_without_data_are_refused(tiny_config):
    with torch.device("meta"):
        model = EncDecSLMForConditionalGeneration(tiny_config)
    with pytest.raises(ValueError, match="weights without data"):
        exportable(model)


@pytest.mark.parametrize("given", [None, 7, nn.Linear(2, 2), {"model": 1}])
def test_what_is_no_model_is_refused(given):
    with pytest.raises(TypeError, match=f"`model_or_path` is a {type(given).__name__}, but must be a model"):
        exportable(given)


def test_folders_that_are_no_checkpoints_are_refused(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json that can be read \(FileNotFoundError\)"):
        exportable(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file, but a folder is needed"):
        exportable(checkpoint / "config.json")
    for text, message in (("{", "JSONDecodeError"), ("[]", "`model_type` None")):
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            exportable(checkpoint)


def test_damaged_weights_are_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"\.safetensors file of .* is damaged"):
        exportable(checkpoint)


# Folders


def test_a_bundle_lists_its_files_and_holds_its_tokenizer(tmp_path):
    folder = write_bundle(tmp_path / "new" / "out", build_tokenizer(), weights="12345", graph="")
    manifest = read_manifest(folder, "other", "toy")
    assert manifest["answer"] == 42
    assert manifest["format"] == "toy"
    assert manifest["files"].keys() | {MANIFEST} == {path.name for path in folder.iterdir()}
    assert manifest["files"]["weights"] == 5
    check_tokenizer(manifest, PreTrainedTokenizerFast.from_pretrained(folder))


def test_a_bundle_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), bundle_written_whole(tmp_path / "out", "toy", None) as (folder, _):
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_overwritten_only_if_asked(tmp_path):
    folder = write_bundle(tmp_path / "out", build_tokenizer(), weights="old", graph="old", left="old")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty, .* set `overwrite=True`"):
        write_bundle(folder, weights="new")
    assert (folder / "weights").read_text() == "old"
    write_bundle(folder, overwrite=True, weights="new", graph="new")
    # What the earlier export left is gone, what was never its is not.
    assert {path.name for path in folder.iterdir()} == {"weights", "graph", MANIFEST, "notes.txt"}
    assert read_manifest(folder, "toy")["tokenizer_sha256"] is None
    (folder / MANIFEST).write_text("{")
    assert read_manifest(write_bundle(folder, overwrite=True, weights="newer"), "toy")["files"] == {"weights": 5}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write_bundle(tmp_path / "file", overwrite=True)


def test_missing_and_cut_files_are_named(tmp_path):
    folder = write_bundle(tmp_path / "out", weights="12345", graph="123")
    (folder / "weights").write_text("123")
    with pytest.raises(
        ValueError, match=r"^weights of .* has 3 bytes, but was written with 5: it was cut off or exch"
    ):
        read_manifest(folder, "toy")
    (folder / "weights").unlink()
    with pytest.raises(ValueError, match=r"weights of .* is missing, but was written with 5"):
        read_manifest(folder, "toy")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"format": "toy", "files": 3}'])
def test_folders_without_a_manifest_are_refused(text, tmp_path):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=f"has no {MANIFEST} that can be read .* `export_ctranslate2` or"):
        read_manifest(tmp_path, "toy")


def test_an_export_of_another_kind_is_refused(tmp_path):
    folder = write_bundle(tmp_path / "out", weights="")
    with pytest.raises(ValueError, match="is an export to toy, but onnx or static is needed here"):
        read_manifest(folder, "onnx", "static")


def test_another_tokenizer_is_refused_whatever_its_size(tmp_path):
    tokenizer = build_tokenizer()
    folder = write_bundle(tmp_path / "out", tokenizer)
    manifest = read_manifest(folder, "toy")
    check_tokenizer(manifest, build_tokenizer())
    larger = build_tokenizer()
    larger.add_tokens(["more"])
    shutil.copytree(folder, tmp_path / "copy")
    swapped_file = tmp_path / "copy" / "tokenizer.json"
    swapped = json.loads(swapped_file.read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    swapped_file.write_text(json.dumps(swapped))
    for other in (larger, PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")):
        with pytest.raises(ValueError, match=r"The tokenizer \(sha256 \w{12}, 9[45] tokens\) .* its ids mean other"):
            check_tokenizer(manifest, other)
    # A bundle without one cannot tell.
    check_tokenizer(read_manifest(write_bundle(tmp_path / "none"), "toy"), larger)


def test_the_names_that_an_export_uses_are_all_there():
    from encdec_slm import export

    assert {"export_ctranslate2", "CT2EncDecSLM"} <= set(export.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'export_tflite'"):
        _ = export.export_tflite
    assert bundles.FAMILY == ("encdec_slm", "encdec_vlm")
