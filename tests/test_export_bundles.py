# SPDX-License-Identifier: Apache-2.0
"""What all exporters share: which models they load and refuse, and folders that are complete or not there."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, T5Config, T5ForConditionalGeneration

from conftest import build_config, build_model, build_tokenizer, save_text_folder, save_vision_folder
from encdec_slm import EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel, export
from encdec_slm.export import export_ctranslate2, export_onnx, onnx_export, onnx_tracing
from encdec_slm.export.bundles import TELEMETRY_PACKAGE, import_engine, write_bundle
from encdec_slm.export_manifest import MANIFEST, check_bundle_matches, check_tokenizer, read_manifest


LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_2_SEQ_LM"}
# peft asks the model by a name that transformers is about to drop.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_export(model, folder, files=("weights",), **options):
    with write_bundle(model, folder, "onnx", **options) as bundle:
        for name in files:
            (bundle.folder / name).write_text("12345")
    return bundle


def test_the_public_names_are_all_there():
    expected = {
        "CT2EncDecSLM",
        "OpenVINOEncDecSLM",
        "OrtEncDecSLM",
        "export_ctranslate2",
        "export_onnx",
        "export_openvino_genai",
        "export_ort_genai",
        "export_transformers_js",
        "load_export",
    }
    assert set(export.__all__) == expected and all(hasattr(export, name) for name in expected)
    with pytest.raises(AttributeError, match="export_tflite"):
        _ = export.export_tflite


def test_engines_are_imported_without_their_telemetry(tmp_path, monkeypatch):
    for name, code in {TELEMETRY_PACKAGE: "", "reporting": f"import {TELEMETRY_PACKAGE}"}.items():
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=TELEMETRY_PACKAGE):
        import_engine("reporting")
    assert TELEMETRY_PACKAGE not in sys.modules and os.environ["ORT_DISABLE_TELEMETRY"]


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"`{name}`.*encdec-slm\[export\]"):
        export_onnx(build_model(), tmp_path / "out")


# Models


def test_a_given_model_is_copied_in_float32_and_evaluation_mode(tiny_model, tmp_path):
    tiny_model.to(torch.bfloat16).train()
    bundle = write_export(tiny_model, tmp_path / "out")
    assert bundle.model is not tiny_model and not bundle.model.training and tiny_model.training
    assert {value.dtype for value in bundle.model.parameters()} == {torch.float32}
    assert {value.dtype for value in tiny_model.parameters()} == {torch.bfloat16}
    assert bundle.model.lm_head.weight is bundle.model.get_input_embeddings().weight
    assert bundle.tokenizer is None


def test_a_folder_gives_its_model_and_tokenizer(checkpoint, tiny_model, tmp_path):
    (checkpoint / "modeling_encdec_slm.py").write_text("raise SystemExit('run')")
    loaded = EncDecSLMForConditionalGeneration.from_pretrained(checkpoint)
    for number, given in enumerate((checkpoint, str(checkpoint), loaded)):
        bundle = write_export(given, tmp_path / str(number))
        manifest = read_manifest(tmp_path / str(number), "onnx")
        check_bundle_matches(manifest, tiny_model)
        check_tokenizer(manifest, build_tokenizer())
        assert (tmp_path / str(number) / "tokenizer.json").is_file()
        assert manifest["files"].keys() | {MANIFEST} == {path.name for path in (tmp_path / str(number)).iterdir()}
    other = build_tokenizer()
    assert write_export(checkpoint, tmp_path / "other", tokenizer=other).tokenizer is other
    assert isinstance(bundle.model, EncDecSLMForConditionalGeneration)


def test_a_folder_of_a_vision_model_gives_its_processor(tmp_path):
    save_vision_folder(tmp_path / "model")
    write_export(tmp_path / "model", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"processor_config.json", "tokenizer.json"} <= names and not any(name.endswith(".py") for name in names)


def test_a_folder_without_a_tokenizer_is_exported_with_a_warning(tiny_model, tmp_path, caplog):
    tiny_model.save_pretrained(tmp_path / "model")
    export_ctranslate2(tmp_path / "model", tmp_path / "out")
    assert "no tokenizer" in caplog.text and str(tmp_path / "model") in caplog.text
    assert read_manifest(tmp_path / "out", "ctranslate2")["tokenizer_sha256"] is None


def test_a_config_and_weights_of_different_sizes_are_refused_by_the_name_of_a_weight(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 60}))
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight .*56.*60"):
        export_ctranslate2(checkpoint, tmp_path / "out")


@PEFT_WARNS
def test_adapters_are_refused_until_they_are_merged(tiny_model, checkpoint, tmp_path):
    config = peft.LoraConfig(**LORA, init_lora_weights=False)
    wrapped = peft.get_peft_model(EncDecSLMForConditionalGeneration.from_pretrained(checkpoint), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    tiny_model.add_adapter(config)
    for given in (wrapped, tmp_path / "adapter", tiny_model):
        with pytest.raises(ValueError, match="merge_and_unload"):
            write_export(given, tmp_path / "out")
    base = EncDecSLMForConditionalGeneration.from_pretrained(checkpoint)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    weight = write_export(merged, tmp_path / "out").model.model.encoder.layers[0].self_attn.q_proj.weight
    assert not torch.equal(weight, tiny_model.model.encoder.layers[0].self_attn.q_proj.weight)


def test_quantized_models_are_refused(tiny_model, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"(?i)quantiz|bitsandbytes"):
        write_export(checkpoint, tmp_path / "out")
    projection = tiny_model.model.decoder.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantized weights \(model\.decoder\.layers\.0\.self_attn\.q_proj\.weight"):
        write_export(tiny_model, tmp_path / "out")


@pytest.mark.parametrize("model_class", [EncDecSLMModel, EncDecSLMEncoderModel])
def test_models_without_a_head_are_refused(model_class, tmp_path):
    with pytest.raises(ValueError, match=f"{model_class.__name__} without an output head"):
        write_export(model_class(build_config()), tmp_path / "out")
    build_model(tie_word_embeddings=False).model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        write_export(tmp_path / "model", tmp_path / "out")


def test_other_families_are_refused(tmp_path):
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    model.save_pretrained(tmp_path / "t5")
    for given in (model, tmp_path / "t5"):
        with pytest.raises(ValueError, match="'t5'"):
            write_export(given, tmp_path / "out")


@pytest.mark.parametrize("given", [None, 7, nn.Linear(2, 2), {"model": 1}])
def test_what_is_not_a_model_is_refused(given, tmp_path):
    with pytest.raises(TypeError, match=f"`model_or_path` is a {type(given).__name__}"):
        write_export(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Folders


def export_to_onnx_files(model, folder, monkeypatch, **options):
    """Run `export_onnx` without tracing."""
    monkeypatch.setattr(onnx_export, "_export_dynamic", lambda model, folder, manifest: None)
    return export_onnx(model, folder, **options)


EXPORTERS = {
    "ctranslate2": lambda model, folder, monkeypatch, **options: export_ctranslate2(model, folder, **options),
    "onnx": export_to_onnx_files,
}


@pytest.fixture(params=EXPORTERS)
def run_export(request, monkeypatch):
    return lambda model, folder, **options: EXPORTERS[request.param](model, folder, monkeypatch, **options)


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_an_earlier_export_is_overwritten(run_export, tiny_model, tmp_path):
    folder = tmp_path / "out"
    run_export(tiny_model, folder, tokenizer=build_tokenizer())
    before = read_all(folder)
    with pytest.raises(ValueError, match="not empty"):
        run_export(tiny_model, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        run_export(tiny_model, folder, overwrite=True)
    (folder / "notes.txt").unlink()
    assert read_all(folder) == before
    run_export(tiny_model, folder, overwrite=True)
    # Files that only the earlier export has are removed.
    assert "tokenizer.json" not in read_all(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run_export(tiny_model, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("relation", ["same", "inside", "around", "link"])
def test_a_model_is_never_overwritten_by_its_export(run_export, relation, tmp_path):
    model = tmp_path / "around" / "model"
    save_text_folder(model)
    os.symlink(model, tmp_path / "link")
    before = read_all(model)
    output = {"same": model, "inside": model / "onnx", "around": model.parent, "link": tmp_path / "link"}[relation]
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"source|not empty"):
            run_export(model, output, **options)
    assert read_all(model) == before


def test_a_link_to_another_folder_is_written_and_keeps_its_content_on_failure(run_export, tiny_model, tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "out")
    run_export(tiny_model, tmp_path / "out")
    before = read_all(tmp_path / "disk")
    with pytest.raises(ValueError, match="96"):
        run_export(tiny_model, tmp_path / "out", overwrite=True, tokenizer=fail_to_save())
    assert read_all(tmp_path / "disk") == before and (tmp_path / "out").is_symlink()
    run_export(tiny_model, tmp_path / "out", overwrite=True)
    assert read_all(tmp_path / "disk").keys() == before.keys()


def fail_to_save():
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained = lambda folder: (_ for _ in ()).throw(ValueError("96"))
    return tokenizer


def test_two_exports_into_one_folder_at_once_are_refused(run_export, tiny_model, tmp_path):
    with write_bundle(tiny_model, tmp_path / "out", "onnx") as bundle:
        with pytest.raises(ValueError, match="out"):
            run_export(tiny_model, tmp_path / "out")
        (bundle.folder / "weights").write_text("12345")
    assert read_manifest(tmp_path / "out", "onnx")["files"]["weights"] == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(errno.ENOSPC, "No space left on device")])
def test_an_export_that_is_interrupted_leaves_nothing(error, tiny_model, tmp_path, monkeypatch):
    def fail(graph):
        raise error

    monkeypatch.setattr(onnx_export, "trace", fail)
    for options in ({}, {"static_lengths": [4]}, {"quantization": "int8"}):
        with pytest.raises(error if isinstance(error, type) else OSError):
            export_onnx(tiny_model, tmp_path / "new" / "out", **options)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path):
    weights = onnx_tracing.SharedWeights(tmp_path)
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "model.onnx_data").unlink()
    os.symlink("/dev/full", tmp_path / "model.onnx_data")
    with pytest.raises(OSError, match="No space left"):
        weights._store(torch.ones(5000).numpy())


def test_exports_need_no_package_of_another_extra(text_folder, tmp_path):
    script = """if True:
        import sys
        sys.modules |= dict.fromkeys(["matplotlib", "datasets", "peft", "trl", "accelerate", "sklearn", "gradio"])
        from encdec_slm.export import OrtEncDecSLM, OpenVINOEncDecSLM, export_onnx
        from encdec_slm_cli import main
        sys.exit(main(["export", *sys.argv[1:]]) or main(["generate", sys.argv[2], "text"]))
    """
    command = [sys.executable, "-c", script, str(text_folder), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
