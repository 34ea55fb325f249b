# SPDX-License-Identifier: Apache-2.0
"""Manifests of exports: find an export, check its files, and compare it with a model and a tokenizer."""

import json

import pytest
import torch
from huggingface_hub import HfApi, constants

from conftest import build_model, build_tokenizer, build_vision_model
from encdec_slm.export_manifest import (
    MANIFEST,
    check_bundle_matches,
    check_tokenizer,
    find_export,
    find_foreign_files,
    fingerprint_model,
    hash_tokenizer,
    is_export,
    read_manifest,
)


def write_export(folder, format="onnx", **entries):
    folder.mkdir(parents=True)
    (folder / "weights").write_text("12345")
    manifest = {"format": format, "files": {"weights": 5}, "tokenizer_sha256": None, **entries}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_a_manifest_is_read_and_missing_or_incomplete_files_are_named(tmp_path):
    folder = write_export(tmp_path / "out", answer=42)
    assert read_manifest(folder, "other", "onnx")["answer"] == 42
    (folder / "weights").write_text("123")
    with pytest.raises(ValueError, match=r"^weights of .* 3 bytes.* 5 bytes"):
        read_manifest(folder, "onnx")
    (folder / "weights").unlink()
    with pytest.raises(ValueError, match=r"^weights of .* is missing"):
        read_manifest(folder, "onnx")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"format": "onnx", "files": 3}'])
def test_folders_without_a_readable_manifest_are_refused(text, tmp_path):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    for read in (read_manifest, lambda folder, name: find_export(folder, [name])):
        with pytest.raises(ValueError, match=MANIFEST):
            read(tmp_path, "onnx")


def test_an_export_to_another_format_is_refused(tmp_path):
    folder = write_export(tmp_path / "out")
    with pytest.raises(ValueError, match="onnx, but ctranslate2 or onnx-static"):
        read_manifest(folder, "ctranslate2", "onnx-static")


def test_an_export_is_found_at_the_top_in_the_published_folders_and_in_a_subfolder(tmp_path):
    repository = tmp_path / "repository"
    for name, format in (("onnx", "onnx-static"), ("ctranslate2", "ctranslate2"), ("mine", "onnx")):
        write_export(repository / name, format)
    assert find_export(repository)[0] == repository / "ctranslate2"
    assert find_export(repository, ["onnx", "onnx-static"])[0] == repository / "onnx"
    assert find_export(repository, ["onnx"], subfolder="mine")[0] == repository / "mine"
    assert find_export(str(repository / "onnx"), ["onnx-static"])[1]["format"] == "onnx-static"
    with pytest.raises(ValueError, match="is an export to ctranslate2"):
        find_export(repository, ["onnx"], subfolder="ctranslate2")
    with pytest.raises(ValueError, match=r"'.*other' has no readable"):
        find_export(repository, ["onnx"], subfolder="other")


@pytest.mark.parametrize("subfolder", [None, "onnx"])
def test_an_export_in_a_repository_is_found_by_its_name(subfolder, tmp_path, monkeypatch):
    repository = tmp_path / "models--me--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    write_export(snapshot / "onnx")
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder, manifest = find_export("me/model", ["onnx"], subfolder=subfolder)
    assert folder == snapshot / "onnx" and manifest["format"] == "onnx"
    with pytest.raises(ValueError, match=MANIFEST):
        find_export("me/model", ["ctranslate2"])
    with pytest.raises(ValueError, match="me/other"):
        find_export("me/other")


def test_an_export_is_downloaded_from_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    api = HfApi(endpoint=hub.endpoint, token="hf_me")
    write_export(tmp_path / "model" / "onnx")
    (tmp_path / "model" / "config.json").write_text("{}")
    for name, folder in (("me/export", tmp_path / "model" / "onnx"), ("me/model", tmp_path / "model")):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder)
    assert is_export("me/export") and not is_export("me/model") and is_export("me/model", subfolder="onnx")
    for name, options in (("me/export", {}), ("me/model", {}), ("me/model", {"subfolder": "onnx"})):
        folder, manifest = find_export(name, ["onnx"], **options)
        assert (folder / "weights").read_text() == "12345" and manifest["format"] == "onnx"
    with pytest.raises(ValueError, match="me/none"):
        is_export("me/none")


def test_only_the_files_of_an_export_are_its_own(tmp_path):
    folder = write_export(tmp_path / "out")
    assert find_foreign_files(folder) == []
    (folder / "notes.txt").write_text("")
    assert find_foreign_files(folder) == ["notes.txt"]
    (folder / MANIFEST).write_text("{")
    assert find_foreign_files(folder) == [MANIFEST, "notes.txt", "weights"]


def manifest_of(model):
    return json.loads(json.dumps({"format": "onnx", "model": fingerprint_model(model)}))


@pytest.mark.parametrize("build", [build_model, build_vision_model])
def test_an_export_matches_its_model_in_any_precision(build, tmp_path):
    model = build()
    manifest = manifest_of(model)
    check_bundle_matches(manifest, model)
    check_bundle_matches(manifest, model.to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    check_bundle_matches(manifest, type(model).from_pretrained(tmp_path))


def test_an_export_of_another_model_is_refused(tmp_path):
    model = build_model()
    other_sizes = build_model(intermediate_size=48, decoder_num_hidden_layers=1)
    with pytest.raises(ValueError, match="`intermediate_size` is 56 in the export and 48"):
        check_bundle_matches(manifest_of(model), other_sizes)
    with pytest.raises(ValueError, match="`model_type` is 'encdec_vlm'"):
        check_bundle_matches(manifest_of(build_vision_model()), model)
    with pytest.raises(ValueError, match="`rope_parameters`"):
        check_bundle_matches(
            manifest_of(model), build_model(rope_parameters={"rope_type": "default", "rope_theta": 7.0})
        )
    manifest = manifest_of(model)
    with torch.no_grad():
        model.model.decoder.layers[1].mlp.down_proj.weight[3, 5] += 0.01
    with pytest.raises(ValueError, match="`weights_sha256`"):
        check_bundle_matches(manifest, model)
    with pytest.raises(ValueError, match="no fingerprint"):
        check_bundle_matches({"format": "onnx"}, model)


def test_another_tokenizer_is_refused_even_of_the_same_size(tmp_path):
    tokenizer = build_tokenizer()
    manifest = {"tokenizer_sha256": hash_tokenizer(tokenizer)}
    tokenizer.save_pretrained(tmp_path)
    check_tokenizer(manifest, type(tokenizer).from_pretrained(tmp_path))
    words = [f"w{token_id}" for token_id in range(96, 3, -1)]
    larger = build_tokenizer()
    larger.add_tokens(["more"])
    for other in (larger, build_tokenizer(words=words)):
        with pytest.raises(ValueError, match=r"`tokenizer` .* 9[78] tokens"):
            check_tokenizer(manifest, other)
        check_tokenizer({"tokenizer_sha256": None}, other)
