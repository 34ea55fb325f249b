# SPDX-License-Identifier: Apache-2.0
"""A saved folder is a whole Hub repository, and loading one changes nothing."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_worker import JOBS
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
)

import encdec_slm
from conftest import TEXT_CODE_FILES, build_model, build_tokenizer
from encdec_slm import EncDecSLMConfig, EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel


MODEL_FILES = sorted({"config.json", "generation_config.json", "model.safetensors"} | TEXT_CODE_FILES)
SWITCHES = [
    {},
    {"tie_word_embeddings": False},
    {"lm_head_bias": True},
    {"tie_word_embeddings": False, "lm_head_bias": True},
    {"attention_bias": True, "mlp_bias": True, "qk_norm": True, "gated_mlp": False, "head_dim": 6},
    {
        "attention_bias": True,
        "attention_out_bias": False,
        "encoder_no_rope_layers": [1, 0],
        "decoder_no_rope_layers": [0, 1],
    },
]
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 1024}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
ROPES = [
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, **LLAMA3},
    {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, **LONGROPE},
]


def build(model_class=EncDecSLMForConditionalGeneration, **switches):
    return build_model(model_class, **{"head_dim": 8, "max_position_embeddings": 2048, **switches})


def make_inputs(vocab_size=97):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (2, 12), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids[:, :7], "attention_mask": mask, "decoder_input_ids": ids[:, 7:]}


@torch.no_grad()
def logits_of(model, inputs=None):
    return model(**(inputs or make_inputs())).logits


def load(auto_class, folder, **kwargs):
    """The model of a folder, after a look at the report that nothing was missing, left over or of another shape."""
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """`model/`, as `save_pretrained` and a tokenizer left it, beside `expected.pt`, what this process computes."""
    root = tmp_path_factory.mktemp("repository")
    model = build()
    model.save_pretrained(root / "model")
    inputs = make_inputs()
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        outputs = model.model(**inputs)
    expected = {
        "inputs": inputs,
        "files": sorted(path.name for path in (root / "model").iterdir()),
        "logits": logits_of(model),
        "decoder_states": outputs.last_hidden_state,
        "encoder_states": outputs.encoder_last_hidden_state,
        "generated": {
            "greedy": model.generate(**source, do_sample=False, max_new_tokens=12),
            "beams": model.generate(**source, do_sample=False, max_new_tokens=12, num_beams=3),
        },
    }
    torch.save(expected, root / "expected.pt")
    build_tokenizer(ends_sources=False).save_pretrained(root / "model")
    return root


def use_in_a_fresh_process(folder, expected, workspace):
    """What the worker's jobs report; the process has its own caches, an empty working folder and no network."""
    (workspace / "empty").mkdir(parents=True)
    own = {"HF_HOME": str(workspace / "hf"), "HF_MODULES_CACHE": str(workspace / "hf" / "modules")}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("hub_worker.py"), folder, expected, workspace]
    done = subprocess.run(command, cwd=workspace / "empty", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((workspace / "report.json").read_text())


@pytest.fixture(scope="module")
def workspace(repository, tmp_path_factory):
    """What a process without the package reports of `repository`, and the folders that it saved."""
    workspace = tmp_path_factory.mktemp("fresh")
    use_in_a_fresh_process(repository / "model", repository / "expected.pt", workspace)
    return workspace


@pytest.mark.parametrize("job", JOBS)
def test_the_folder_alone_works_where_the_package_is_not_installed(workspace, job):
    failure = json.loads((workspace / "report.json").read_text())[job]
    assert failure is None, failure


@pytest.mark.slow
def test_a_folder_saved_by_a_fresh_process_works_in_the_next_one(repository, workspace, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(workspace / "second", second)
    for path in (repository / "model").glob("*token*"):
        shutil.copy(path, second)
    report = use_in_a_fresh_process(second, repository / "expected.pt", tmp_path / "workspace")
    assert report.keys() == JOBS.keys()
    assert not any(report.values()), report


@pytest.mark.parametrize("name", ["second", "second_body", "training/checkpoint-2", "merged"])
def test_folders_saved_by_a_fresh_process_load_with_the_package(workspace, name):
    model = load(AutoModelForSeq2SeqLM, workspace / name).eval()
    assert type(model) is EncDecSLMForConditionalGeneration
    if name.startswith("second"):
        torch.testing.assert_close(logits_of(model), logits_of(build()))


def test_the_saved_folder_holds_weights_configs_and_every_code_file(tmp_path):
    build().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == MODEL_FILES
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"].keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForSeq2SeqLM",
        "AutoModelForTextEncoding",
    }
    pipelines = config["custom_pipelines"]
    assert pipelines["text2text-generation"]["pt"] == ["AutoModelForSeq2SeqLM"]
    for reference in [*config["auto_map"].values(), *(entry["impl"] for entry in pipelines.values())]:
        module, name = reference.split(".")
        tree = ast.parse((tmp_path / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}, reference
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    token_ids = {name: value for name, value in generation.items() if name.endswith("token_id")}
    assert token_ids == {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@pytest.mark.parametrize("model_class", [EncDecSLMModel, EncDecSLMEncoderModel])
def test_models_without_a_head_save_their_code_too(model_class, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*MODEL_FILES} - {"generation_config.json"})


def test_the_package_needs_no_trust_to_load_a_folder(repository):
    config = AutoConfig.from_pretrained(repository / "model")
    assert type(config) is EncDecSLMConfig
    classes = {
        AutoModel: EncDecSLMModel,
        AutoModelForSeq2SeqLM: EncDecSLMForConditionalGeneration,
        AutoModelForTextEncoding: EncDecSLMEncoderModel,
    }
    for auto_class, model_class in classes.items():
        assert type(load(auto_class, repository / "model")) is model_class
        assert type(load(auto_class, repository / "model", trust_remote_code=True)) is model_class


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_a_saved_model_loads_with_every_tensor_and_every_field_as_it_was(switches, tmp_path):
    model = build(**switches)
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForSeq2SeqLM, tmp_path).eval()
    assert_same_weights(loaded, model)
    torch.testing.assert_close(logits_of(loaded), logits_of(model))
    fields = model.config.to_diff_dict()
    fields.pop("auto_map"), fields.pop("custom_pipelines")
    assert {name: value for name, value in loaded.config.to_dict().items() if name in fields} == fields
    tied = switches.get("tie_word_embeddings", True)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_bodies_and_encoders_save_and_load_on_their_own(switches, tmp_path):
    for model_class, auto_class in ((EncDecSLMModel, AutoModel), (EncDecSLMEncoderModel, AutoModelForTextEncoding)):
        model = build(model_class, **switches)
        model.save_pretrained(tmp_path / model_class.__name__)
        assert_same_weights(load(auto_class, tmp_path / model_class.__name__), model)


def test_a_sharded_checkpoint_loads_in_every_class(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(load(AutoModelForSeq2SeqLM, tmp_path), model)
    assert_same_weights(load(AutoModel, tmp_path), model.model)
    assert_same_weights(load(AutoModelForTextEncoding, tmp_path).encoder, model.model.encoder)


def test_a_head_on_a_headless_checkpoint_is_fresh_and_everything_else_is_loaded(tmp_path):
    body = build(EncDecSLMModel, tie_word_embeddings=False)
    body.save_pretrained(tmp_path)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_weights(model.model, body)
    torch.testing.assert_close(model.lm_head.weight.std().item(), model.config.initializer_range, rtol=0.1, atol=0.0)


def test_a_tied_head_on_a_headless_checkpoint_is_the_embedding_and_nothing_is_missing(tmp_path):
    body = build(EncDecSLMModel)
    body.save_pretrained(tmp_path)
    model = load(AutoModelForSeq2SeqLM, tmp_path)
    assert_same_weights(model.model, body)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_a_load_rebuilds_the_rotary_buffers(rope, tmp_path):
    model = build(rope_parameters=rope)
    model.save_pretrained(tmp_path)
    assert not [name for name in model.state_dict() if "inv_freq" in name]
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load(AutoModelForSeq2SeqLM, tmp_path, dtype=dtype).eval()
        for stack in ("encoder", "decoder"):
            rebuilt, original = (getattr(m.model, stack).rotary_emb for m in (loaded, model))
            for name in ("inv_freq", "original_inv_freq"):
                torch.testing.assert_close(getattr(rebuilt, name), getattr(original, name), rtol=0, atol=0)
            assert rebuilt.attention_scaling == original.attention_scaling
        tensors = [*loaded.parameters(), *loaded.buffers()]
        assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in tensors)
        if dtype == torch.float32:
            torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_a_model_loads_in_bfloat16_and_keeps_that_dtype(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "full")
    half = load(AutoModelForSeq2SeqLM, tmp_path / "full", dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.lm_head.weight is half.get_input_embeddings().weight
    reference = build().to(torch.bfloat16)
    assert_same_weights(half, reference)
    assert logits_of(half).isfinite().all()
    half.save_pretrained(tmp_path / "half")
    again = load(AutoModelForSeq2SeqLM, tmp_path / "half")
    assert again.dtype == again.config.dtype == torch.bfloat16
    assert_same_weights(again, half)


def test_parts_of_a_model_may_stay_on_disk(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    placement = {"model.encoder": "cpu", "model.decoder": "disk", "lm_head": "cpu"}
    loaded = load(
        AutoModelForSeq2SeqLM, tmp_path / "model", device_map=placement, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert next(loaded.model.decoder.parameters()).device.type == "meta"
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("size", [90, 113])
@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[3]], ids=str)
def test_resized_embeddings_keep_their_rows_their_tie_and_survive_a_save(switches, size, tmp_path):
    model = build(**switches)
    inputs, kept = make_inputs(90), min(size, 97)
    before = logits_of(model, inputs)
    model.resize_token_embeddings(size)
    model.eval()
    after = logits_of(model, inputs)
    assert after.shape[-1] == model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    labels = torch.tensor([[size - 1, 2], [5, 2]])
    assert model(inputs["input_ids"], labels=labels).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForSeq2SeqLM, tmp_path).eval()
    assert_same_weights(loaded, model)
    torch.testing.assert_close(logits_of(loaded, inputs), after)
    tied = switches.get("tie_word_embeddings", True)
    for resized in (model, loaded):
        assert (resized.lm_head.weight is resized.get_input_embeddings().weight) is tied
        assert (resized.lm_head.bias is not None) is switches.get("lm_head_bias", False)


@pytest.mark.parametrize("model_class", [EncDecSLMModel, EncDecSLMEncoderModel])
def test_models_without_a_head_resize_too(model_class, tmp_path):
    model = build(model_class)
    rows = model.get_input_embeddings().weight[:90].clone()
    model.resize_token_embeddings(90)
    assert torch.equal(model.get_input_embeddings().weight, rows)
    model.save_pretrained(tmp_path)
    assert_same_weights(load(type(model), tmp_path), model)


@pytest.mark.parametrize("kept_bytes", [0, 100, -100], ids=["empty", "cut in the header", "cut in the tensors"])
def test_a_damaged_weight_file_is_reported_with_its_folder(repository, kept_bytes, tmp_path):
    folder = shutil.copytree(repository / "model", tmp_path / "model")
    weights = folder / "model.safetensors"
    os.truncate(weights, kept_bytes % weights.stat().st_size)
    with pytest.raises(OSError, match=r"\.safetensors") as caught:
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_without_code_files_loads_with_the_package(repository, tmp_path):
    folder = shutil.copytree(repository / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.py"))
    model = load(AutoModelForSeq2SeqLM, folder)
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == MODEL_FILES
    assert type(model).__module__.partition(".")[0] == encdec_slm.__name__
