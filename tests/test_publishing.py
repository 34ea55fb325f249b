# SPDX-License-Identifier: Apache-2.0
"""Repositories that are built, checked, refused, and uploaded to a Hub on localhost."""

import contextlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from export_fixtures import build_ascii_tokenizer
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

import encdec_slm
from conftest import build_byte_tokenizer, build_model, save_text_folder
from encdec_slm.export import export_ctranslate2, export_openvino_genai, export_ort_genai
from encdec_slm.hub_cards import fresh_process, publish
from encdec_slm.hub_cards.fresh_process import check_in_fresh_process
from encdec_slm.hub_cards.repository_checks import find_problem
from encdec_slm.vocabulary import old_token_ids, trim_tokenizer


# huggingface_hub hands file objects to its HTTP client in a way that the client no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

PACKAGE = Path(encdec_slm.__file__).parent
TEXT_FILES = {path.name for path in map(Path, get_relative_import_files(PACKAGE / "modeling_encdec_slm.py"))}
TEXT_FILES |= {"modeling_encdec_slm.py", "pipeline_encdec_slm.py", "config.json", "generation_config.json"}
TEXT_FILES |= {"model.safetensors", "README.md", "LICENSE", "tokenizer.json", "tokenizer_config.json"}
TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0hL3n"


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def contents_of(folder):
    return {name: Path(folder, name).read_bytes() for name in names_in(folder)}


@pytest.fixture
def source(text_folder, tmp_path):
    """A text model to change."""
    return shutil.copytree(text_folder, tmp_path / "source")


@pytest.fixture
def checked(monkeypatch):
    """Files of the folders that would have been checked in another process, which takes seconds."""
    folders = []
    monkeypatch.setattr(fresh_process, "check_in_fresh_process", lambda folder: folders.append(names_in(folder)))
    return folders


@pytest.fixture(scope="module")
def published(text_folder, tmp_path_factory):
    """A repository that was built and checked as every user's is."""
    return publish(text_folder, output_dir=tmp_path_factory.mktemp("published") / "tiny").folder


# The folder


def test_a_published_folder_has_all_files_of_the_source_and_the_code_of_the_package(text_folder, published):
    assert names_in(published) == TEXT_FILES
    for path in published.glob("*.py"):
        assert path.read_bytes() == (PACKAGE / path.name).read_bytes()
    config = json.loads((published / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "modeling_encdec_slm.EncDecSLMForConditionalGeneration"
    assert "text2text-generation" in config["custom_pipelines"]
    assert "Apache License" in (published / "LICENSE").read_text()
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(path).state_dict() for path in (text_folder, published))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (text_folder / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_folder_that_works_only_with_the_package_is_refused(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "broken")
    with (folder / "modeling_encdec_slm.py").open("a") as file:
        file.write("\nfrom encdec_slm.conversion import convert_reference_checkpoint\n")
    with pytest.raises(ValueError, match="encdec_slm"):
        check_in_fresh_process(folder)


def test_code_files_of_the_source_are_replaced(source, tmp_path, checked):
    (source / "pipeline_encdec_slm.py").unlink()
    (source / "modeling_encdec_slm.py").write_text("raise SystemExit")
    folder = publish(source, output_dir=tmp_path / "out").folder
    assert "raise SystemExit" not in (folder / "modeling_encdec_slm.py").read_text()
    assert names_in(folder) == TEXT_FILES
    assert checked == [TEXT_FILES]


def test_a_model_in_memory_is_published_with_the_tokenizer_of_its_folder_or_a_given_one(
    text_folder, tmp_path, checked
):
    model = AutoModelForSeq2SeqLM.from_pretrained(text_folder)
    assert names_in(publish(model, output_dir=tmp_path / "out")) == TEXT_FILES
    model = build_model()
    with pytest.raises(ValueError, match="processing_class"):
        publish(model, output_dir=tmp_path / "none")
    given = publish(model, output_dir=tmp_path / "given", processing_class=build_byte_tokenizer())
    assert names_in(given) == TEXT_FILES


def test_the_map_of_a_trimmed_tokenizer_is_published(source, tmp_path, checked):
    tokenizer, old_ids = trim_tokenizer(build_byte_tokenizer(), ["text"])
    model = build_model(vocab_size=len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(source)
    publish(source, output_dir=tmp_path / "folder")
    publish(model, output_dir=tmp_path / "memory", processing_class=tokenizer)
    for name in ("folder", "memory"):
        assert old_token_ids(AutoTokenizer.from_pretrained(tmp_path / name)) == old_ids


def test_a_vision_model_is_published_with_its_processor_and_all_code(vision_folder, tmp_path, checked):
    names = names_in(publish(vision_folder, output_dir=tmp_path / "out"))
    code = {"modeling_encdec_vlm.py", "image_processing_encdec_vlm.py", "processing_encdec_vlm.py"}
    imported = {Path(path).name for name in code for path in get_relative_import_files(PACKAGE / name)}
    assert names >= code | imported | {"pipeline_encdec_slm.py", "processor_config.json", "tokenizer.json", "LICENSE"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "AutoModelForImageTextToText" in config["auto_map"]


@pytest.mark.slow
def test_a_vision_model_works_without_the_package(vision_folder, tmp_path):
    assert publish(vision_folder, output_dir=tmp_path / "out").folder.is_dir()


@pytest.fixture(scope="module")
def ct2_folder(text_folder, tmp_path_factory):
    """A CTranslate2 export of the text model."""
    return export_ctranslate2(text_folder, tmp_path_factory.mktemp("ct2") / "ctranslate2")


@pytest.fixture(scope="module")
def export_source(export_model, tmp_path_factory):
    """The model of `onnx_folder` and `static_folder`, as a folder."""
    folder = tmp_path_factory.mktemp("export_source") / "source"
    for part in (export_model, build_ascii_tokenizer()):
        part.save_pretrained(folder)
    return folder


def test_calibration_and_plot_are_copied_and_the_card_shows_the_plot(source, tmp_path, checked):
    (source / "shell_calibration.json").write_text("{}")
    assert "results.png" not in (publish(source, output_dir=tmp_path / "plain").folder / "README.md").read_text()
    (source / "results.png").write_bytes(b"a plot")
    published = publish(source, output_dir=tmp_path / "out")
    assert {"shell_calibration.json", "results.png"} <= names_in(published) and not published.left_out
    assert "](results.png)" in (published.folder / "README.md").read_text()


def test_exports_are_copied_into_the_repository(source, ct2_folder, tmp_path, checked):
    names = names_in(publish(source, output_dir=tmp_path / "given", bundles=[ct2_folder]))
    assert {"ctranslate2/model.bin", "ctranslate2/export_manifest.json"} <= names
    shutil.copytree(ct2_folder, source / "ctranslate2")
    assert names_in(publish(source, output_dir=tmp_path / "found")) == names
    with pytest.raises(ValueError, match="second export"):
        publish(source, output_dir=tmp_path / "twice", bundles=[ct2_folder])
    (source / "ctranslate2" / "export_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"ctranslate2/model\.bin"):
        publish(source, output_dir=tmp_path / "unknown")


@pytest.mark.parametrize("place", ["given", "beside the model"])
@pytest.mark.parametrize("change", ["seed", "size", "vision", "tokenizer", "no fingerprint", "onnx", "onnx-static"])
def test_exports_of_another_model_are_refused(request, source, ct2_folder, tmp_path, checked, change, place):
    name = {"onnx": "onnx_folder", "onnx-static": "static_folder"}.get(change, "ct2_folder")
    bundle = shutil.copytree(request.getfixturevalue(name), tmp_path / "bundle")
    if change == "vision":
        shutil.rmtree(source)
        shutil.copytree(request.getfixturevalue("vision_folder"), source)
    elif change in ("seed", "size"):
        save_text_folder(source, **({"seed": 1} if change == "seed" else {"hidden_size": 64}))
    elif change == "tokenizer":
        build_ascii_tokenizer().save_pretrained(source)
    elif change == "no fingerprint":
        manifest = json.loads((bundle / "export_manifest.json").read_text())
        (bundle / "export_manifest.json").write_text(json.dumps({**manifest, "model": None}))
    if place == "beside the model":
        bundle = bundle.rename(source / ("onnx" if "onnx" in change else "ctranslate2"))
    with pytest.raises(ValueError, match=bundle.name):
        publish(source, output_dir=tmp_path / "out", bundles=[bundle] if place == "given" else [])
    assert not (tmp_path / "out").exists() and not checked


def test_exports_of_the_same_weights_in_another_dtype_are_accepted(source, ct2_folder, tmp_path, checked):
    AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    publish(source, output_dir=tmp_path / "out", bundles=[ct2_folder])


def test_a_license_of_the_weights_is_kept(source, tmp_path, checked):
    (source / "LICENSE").write_text("MIT License. Copyright of others.")
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# weights\n")
    folder = publish(source, output_dir=tmp_path / "out").folder
    assert (folder / "LICENSE-weights").read_text() == "MIT License. Copyright of others."
    assert "Apache License" in (folder / "LICENSE").read_text()
    again = publish(folder, output_dir=tmp_path / "again").folder
    assert "license: mit" in (again / "README.md").read_text() and (again / "LICENSE-weights").is_file()


# What is replaced


def test_only_the_unchanged_output_of_publish_is_replaced(source, tmp_path, checked):
    first = publish(source, "me/tiny", output_dir=tmp_path / "out").folder
    before = contents_of(first)
    publish(source, "me/tiny", output_dir=first)
    assert contents_of(first) == before
    publish(source, "me/tiny", output_dir=first, results={"task": "copy", "metrics": {"exact": 1.0}})
    assert (first / ".eval_results" / "copy.yaml").is_file()
    publish(source, "me/tiny", output_dir=first)
    assert contents_of(first) == before


@pytest.mark.parametrize("change", ["text", "file", "folder", "link", "missing"])
def test_an_output_that_was_changed_is_refused_and_kept(source, tmp_path, checked, change):
    folder = publish(source, output_dir=tmp_path / "out").folder
    if change == "text":
        (folder / "README.md").write_text((folder / "README.md").read_text() + "My own words.\n")
    elif change == "file":
        (folder / "thesis.tex").write_text("mine")
    elif change == "folder":
        (folder / "mine").mkdir()
    elif change == "link":
        (folder / "link").symlink_to(source)
    else:
        (folder / "LICENSE").unlink()
    before = contents_of(folder)
    with pytest.raises(ValueError, match="out"):
        publish(source, output_dir=folder)
    assert contents_of(folder) == before and source.is_dir()


@pytest.mark.parametrize("output", [".", "../out", "../link", "{absolute}"])
def test_publishing_twice_into_the_current_folder_replaces_it(source, tmp_path, checked, monkeypatch, output):
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for _ in range(2):
        publish("../source", output_dir=output.format(absolute=folder))
    assert names_in(folder) == TEXT_FILES and names_in(".") == TEXT_FILES


@pytest.mark.parametrize("output", [".", "inside", "..", "../link", "../link/inside", "../out/ct2/inside"])
def test_an_output_that_overlaps_a_source_is_refused(source, tmp_path, checked, monkeypatch, output):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "out" / "ct2").mkdir(parents=True)
    monkeypatch.chdir(source)
    before = contents_of(tmp_path)
    with pytest.raises(ValueError, match="source"):
        publish(".", output_dir=output, bundles=[tmp_path / "out" / "ct2"])
    assert contents_of(tmp_path) == before


def test_a_failed_check_changes_nothing(source, tmp_path, monkeypatch):
    def fail(folder):
        raise ValueError("does not work")

    monkeypatch.setattr(fresh_process, "check_in_fresh_process", lambda folder: None)
    before = contents_of(publish(source, output_dir=tmp_path / "earlier"))
    monkeypatch.setattr(fresh_process, "check_in_fresh_process", fail)
    for name in ("out", "earlier"):
        with pytest.raises(ValueError, match="does not work"):
            publish(source, output_dir=tmp_path / name)
    assert contents_of(tmp_path / "earlier") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "source"]


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (".env", b"A=1", "secrets"),
        ("token", TOKEN.encode(), "secrets"),
        ("id_rsa", b"x", "secrets"),
        ("notes.txt", f"my token is {TOKEN}".encode(), "token of the Hub"),
        ("notes.md", b"aws AKIAIOSFODNN7EXAMPLE", "AWS key"),
        ("setup.cfg", b"-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "private key"),
        ("settings.yaml", b"WANDB_API_KEY: 0123456789abcdef0123", "key or password"),
        ("optimizer.pt", b"x", "training"),
        ("scheduler.pt", b"x", "training"),
        ("rng_state.pth", b"x", "training"),
        ("trainer_state.json", b"{}", "training"),
        ("training_args.bin", b"x", "training"),
        ("pytorch_model.bin", b"x", "pickle"),
        ("model.pkl", b"x", "pickle"),
        ("innocent.dat", pickle.dumps({"a": 1}), "pickle"),
        ("extra.json", b'{"_name_or_path": "/home/me/model"}', "/home/me/model"),
        ("extra2.json", b'{"list": [{"file": "C:\\\\Users\\\\me\\\\a.txt"}]}', "Users"),
        ("extra3.json", b'{"/home/me/rows.jsonl": 5}', "/home/me/rows.jsonl"),
        ("README.md", b"# Model\n\nTrained from /root/data/rows.jsonl.\n", "line 3: '/root/data/rows.jsonl"),
        ("recipe.yaml", b"train_file: /mnt/disk/rows.jsonl", "/mnt/disk/rows.jsonl"),
    ],
)
def test_unsafe_files_are_refused_by_name(source, tmp_path, checked, name, content, problem):
    (source / name).write_bytes(content)
    with pytest.raises(ValueError, match="leave_out") as caught:
        publish(source, output_dir=tmp_path / "out")
    assert name in str(caught.value) and problem in str(caught.value) and TOKEN not in str(caught.value)
    assert not (tmp_path / "out").exists() and not checked


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_local_paths_in_the_files_of_a_model_are_refused(source, tmp_path, checked, name):
    content = json.loads((source / name).read_text())
    (source / name).write_text(json.dumps({**content, "name_or_path": "/data/models/mine"}))
    with pytest.raises(ValueError, match=rf"{name} .*/data/models/mine"):
        publish(source, output_dir=tmp_path / "out")
    if name == "tokenizer_config.json":
        with pytest.raises(ValueError, match=name):
            publish(AutoModelForSeq2SeqLM.from_pretrained(source), output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "Q:\\n{{ messages }} and/or </s> https://host/home/x ~ {{ a }}/b"),
        ("tokenizer.json", '{"model": {"vocab": {"/usr/bin/env": 1}, "merges": ["/home/x /y"]}}'),
        (
            "config.json",
            '{"hidden_act": "gelu", "a": "/", "b": "n/a", "base": "org/model", "url": "https://x.y/tmp/z"}',
        ),
        ("README.md", "See [x](https://x.y/home/a) or `user/model`, 1/2, w/o and hf_transfer, hf_hub_download."),
    ],
)
def test_text_that_only_looks_like_a_path_or_a_secret_is_accepted(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert find_problem(tmp_path / name) is None


def test_files_of_a_training_run_are_left_out(source, tmp_path, checked):
    (source / "results.json").write_text(json.dumps({"of": "another program"}))
    (source / "training_args.bin").write_bytes(pickle.dumps({}))
    (source / "predictions.jsonl").write_text(f'{{"source": "-----BEGIN PRIVATE KEY----- {TOKEN}"}}')
    for name in ("checkpoint-5", "runs"):
        (source / name).mkdir()
        (source / name / "optimizer.pt").write_bytes(b"x")
    done = publish(source, output_dir=tmp_path / "out")
    assert done.left_out == ("checkpoint-5/", "predictions.jsonl", "results.json", "runs/", "training_args.bin")
    assert names_in(done) == TEXT_FILES


def test_results_of_the_training_run_are_in_the_card(source, tmp_path, checked):
    from test_model_cards import build_training

    build_training(base_model=str(tmp_path / "base"), device="cuda:0").save(source / "results.json")
    card = (publish(source, output_dir=tmp_path / "out").folder / "README.md").read_text()
    assert "| starting point | base |" in card and "| loss (nats per token) | 9.9 | 3.21 |" in card


def test_a_checkpoint_of_a_run_is_published_if_its_states_are_left_out(source, tmp_path, checked):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        (source / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"optimizer\.pt.*rng_state\.pth.*training_args\.bin"):
        publish(source, output_dir=tmp_path / "out")
    states = ["*.pt", "*.pth", "train*"]
    assert names_in(publish(source, output_dir=tmp_path / "out", leave_out=states)) == TEXT_FILES
    assert (source / "optimizer.pt").is_file()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_or_dir": "no/such/folder"}, "model_or_dir"),
        ({"model_or_dir": __file__}, "model_or_dir"),
        ({"push": True}, "repo_id"),
        ({"repo_id": "a/b/c"}, "repo_id"),
        ({"repo_id": "tiny"}, "repo_id"),
        ({"repo_id": "me/tiny", "create_pr": True}, "push"),
        ({"repo_id": "me/tiny", "push": True, "create_pr": True, "revision": "x"}, "revision"),
        ({"output_dir": "{other}"}, "file"),
        ({"output_dir": "{other}/file"}, "file"),
        ({"results": {"rougeL": 1.0}}, "results"),
        ({"results": "no.json"}, r"no\.json"),
        ({"facts": {"price": "1"}}, "price"),
    ],
)
def test_wrong_arguments_are_named(source, tmp_path, checked, change, named):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    change = {
        key: value.format(other=tmp_path / "other") if isinstance(value, str) else value
        for key, value in change.items()
    }
    arguments = {"model_or_dir": source, "output_dir": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=named):
        publish(arguments.pop("model_or_dir"), arguments.pop("repo_id", None), **arguments)
    assert not (tmp_path / "out").exists() and names_in(tmp_path / "other") == {"file"}


# PEFT 0.21 reads a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_incomplete_models_and_models_of_other_families_are_refused(source, vision_folder, tmp_path, checked):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for model, error, named in (
        (adapted, ValueError, "merge_and_unload"),
        ({}, TypeError, "dict"),
        (build_model().model, ValueError, "head"),
    ):
        with pytest.raises(error, match=named):
            publish(model, output_dir=tmp_path / "out")
    for name, content, named in (
        ("adapter_config.json", "{}", "merge_and_unload"),
        ("config.json", '{"model_type": "t5"}', "t5"),
        ("config.json", None, "config"),
        ("model.safetensors", None, "safetensors"),
        ("tokenizer*", None, "tokenizer"),
    ):
        folder = shutil.copytree(source, tmp_path / "changed")
        for path in folder.glob(name):
            path.unlink()
        if content is not None:
            (folder / name).write_text(content)
        with pytest.raises(ValueError, match=named):
            publish(folder, output_dir=tmp_path / "out")
        shutil.rmtree(folder)
    folder = shutil.copytree(vision_folder, tmp_path / "vision")
    for path in folder.glob("*processor_config.json"):
        path.unlink()
    for options in ({}, {"processing_class": build_byte_tokenizer()}):
        with pytest.raises(ValueError, match="processor"):
            publish(folder, output_dir=tmp_path / "out", **options)


# The Hub


def test_nothing_is_uploaded_by_default(hub, text_folder, tmp_path, checked):
    done = publish(text_folder, "me/tiny", output_dir=tmp_path / "out")
    assert not hub.requests and not done.is_new_commit and done.commit is None


def test_an_upload_is_one_private_commit_and_none_if_nothing_has_changed(hub, text_folder, tmp_path, checked):
    done = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True)
    assert done.is_new_commit and done.commit == HfApi().model_info("me/tiny").sha
    assert hub.num_commits("me/tiny") == 2 and hub.repositories["me/tiny"].private
    folder = Path(snapshot_download("me/tiny", revision=done.commit, cache_dir=tmp_path / "cache"))
    assert names_in(folder) == TEXT_FILES | {".gitattributes"}
    for name in TEXT_FILES:
        assert (folder / name).read_bytes() == (done.folder / name).read_bytes()
    again = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True)
    assert not again.is_new_commit and again.commit == done.commit
    assert hub.num_commits("me/tiny") == 2 and hub.sent("PUT", "/lfs/") == 1


def test_an_interrupted_upload_is_resumed_by_the_same_call(hub, text_folder, ct2_folder, tmp_path, checked):
    arguments = {"output_dir": tmp_path / "out", "bundles": [ct2_folder], "push": True}
    hub.interrupted_after = 1
    with pytest.raises(ConnectionError, match="the line went dead") as caught:
        publish(text_folder, "me/tiny", **arguments)
    assert str(tmp_path / "out") in str(caught.value)
    assert hub.num_commits("me/tiny") == 1
    hub.interrupted_after, hub.requests = None, []
    assert publish(text_folder, "me/tiny", **arguments).is_new_commit
    assert hub.num_commits("me/tiny") == 2 and hub.sent("PUT", "/lfs/") == 1
    without = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True)
    assert set(HfApi().list_repo_files("me/tiny")) == names_in(without) | {".gitattributes"}
    assert hub.num_commits("me/tiny") == 3


def test_pull_requests_and_branches_leave_the_main_branch_unchanged(hub, text_folder, tmp_path, checked):
    HfApi().create_repo("me/tiny")
    done = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True, create_pr=True)
    assert done.pull_request_url.endswith("/me/tiny/discussions/1")
    assert hub.num_commits("me/tiny") == 1 and hub.num_commits("me/tiny", "refs/pr/1") == 2
    done = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True, revision="v1")
    assert hub.num_commits("me/tiny") == 1 and hub.repositories["me/tiny"].resolve("v1") == done.commit
    assert 'REVISION = "v1"' in (done.folder / "README.md").read_text()
    assert not publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True, revision="v1").is_new_commit


@pytest.mark.parametrize("token", ["hf_you", ""])
def test_an_upload_without_permission_names_the_login_command(hub, text_folder, tmp_path, checked, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConnectionError, match="hf auth login"):
        publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True)
    assert not hub.repositories


def test_a_repository_loads_by_its_name_and_then_from_the_cache(hub, text_folder, tmp_path, checked, monkeypatch):
    commit = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True).commit
    cached = {"cache_dir": tmp_path / "cache", "revision": commit}
    expected = AutoModelForSeq2SeqLM.from_pretrained(text_folder).state_dict()
    for options in (cached, {**cached, "local_files_only": True}):
        loaded = AutoModelForSeq2SeqLM.from_pretrained("me/tiny", **options).state_dict()
        torch.testing.assert_close(loaded, expected, rtol=0, atol=0)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("me/tiny")
    with pytest.raises(OSError, match="private repository"):
        AutoModelForSeq2SeqLM.from_pretrained("me/tiny", cache_dir=tmp_path / "empty", token=False)


@pytest.mark.parametrize(
    ("source_name", "bundle_name"),
    [("text_folder", "ct2_folder"), ("export_source", "onnx_folder"), ("export_source", "static_folder")],
)
def test_the_card_loads_exports_by_the_name_of_the_repository(
    hub, request, source_name, bundle_name, tmp_path, checked, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source, bundle = map(request.getfixturevalue, (source_name, bundle_name))
    facts = {"example": "a b"}
    done = publish(source, "me/tiny", output_dir=tmp_path / "out", bundles=[bundle], facts=facts, push=True)
    _, card = ModelCard.load(done.folder / "README.md").text.split("## Use")
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = "\n".join([*snippets[:2], next(snippet for snippet in snippets if "load_export" in snippet)])
    assert 'MODEL = "me/tiny"' in code and "subfolder=" in code
    code = code.replace('"main"', repr(done.commit)).replace("=32", "=8")
    exec(compile(code, "README.md", "exec"), {})
    generated, exported = capsys.readouterr().out.strip().splitlines()[-2:]
    assert exported == generated or (exported and source_name == "text_folder")  # which is in int8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("engine", ["onnxruntime_genai", "openvino_genai"])
def test_the_card_runs_exports_of_engines(hub, engine, tmp_path, checked, monkeypatch):
    pytest.importorskip(engine)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for part in (build_model(vocab_size=260), build_byte_tokenizer(ends_sources=False)):
        part.save_pretrained(tmp_path / "source")
    export = export_ort_genai if engine == "onnxruntime_genai" else export_openvino_genai
    bundle = export(tmp_path / "source", tmp_path / "bundle")
    options = {"bundles": [bundle], "facts": {"example": "a b"}, "push": True}
    done = publish(tmp_path / "source", "me/tiny", output_dir=tmp_path / "out", **options)
    snippets = re.findall(r"```python\n(.*?)```", (done.folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join([*snippets[:2], next(snippet for snippet in snippets if f"import {engine}" in snippet)])
    code, printed = code.replace("32", "8").replace('"main"', repr(done.commit)), []
    exec(compile(code, "README.md", "exec"), {"print": printed.append})
    assert printed[-2] == [printed[-1]]


DOWNLOADER = """\
import sys
sys.modules["encdec_slm"] = None
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
name, revision = sys.argv[1:]
options = {"revision": revision, "trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(name, **options)
model = AutoModelForSeq2SeqLM.from_pretrained(name, **options)
ids = model.generate(**tokenizer("w1 w2", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
answers = pipeline("text2text-generation", model=name, trust_remote_code=True)("w1 w2", max_new_tokens=4)
print(ascii(tokenizer.decode(ids[0], skip_special_tokens=True)), ascii(answers[0]["generated_text"]), sep="|")
"""


def download(hub, home, commit, **environment):
    own = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": ""}
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", DOWNLOADER, "me/tiny", commit]
    return subprocess.run(command, cwd=home, env={**os.environ, **own, **environment}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_download_needs_no_package_and_then_no_network(hub, text_folder, tmp_path, checked):
    commit = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True).commit
    online = download(hub, tmp_path / "home", commit)
    assert online.returncode == 0, online.stderr
    by_model, by_pipeline = online.stdout.strip().split("|")
    assert by_model == by_pipeline
    num_requests = len(hub.requests)
    offline = download(hub, tmp_path / "home", commit, HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout, offline.stderr
    assert len(hub.requests) == num_requests
    refused = download(hub, tmp_path / "stranger", commit, HF_TOKEN="")
    assert refused.returncode == 1 and "private repository" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("olah-cli") is None, reason="Olah is not installed (pip install olah, apart)")
def test_an_independent_server_serves_the_same_files(hub, text_folder, tmp_path, checked):
    folder = publish(text_folder, "me/tiny", output_dir=tmp_path / "out", push=True).folder
    clone = tmp_path / "mirrors" / "models" / "me" / "tiny"
    subprocess.run(["git", "clone", "--quiet", hub.repositories["me/tiny"].folder, clone], check=True)
    for large in (hub.folder / "lfs").iterdir():
        place = clone / ".git" / "lfs" / "objects" / large.name[:2] / large.name[2:4]
        place.mkdir(parents=True)
        shutil.copy(large, place)
    with run_olah(tmp_path) as endpoint:
        loaded = Path(snapshot_download("me/tiny", endpoint=endpoint, cache_dir=tmp_path / "cache"))
    assert names_in(loaded) == names_in(folder) | {".gitattributes"}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (loaded / path.relative_to(folder)).read_bytes() == path.read_bytes()


@contextlib.contextmanager
def run_olah(folder):
    """Run Olah, a mirror of the Hub that serves local git repositories; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = ["[basic]", 'host = "127.0.0.1"', f"port = {port}", f'mirrors-path = ["{folder / "mirrors"}"]']
    lines += [f'repos-path = "{folder / "repos"}"', "[accessibility]", "offline = true"]
    (folder / "olah.toml").write_text("\n".join(lines))
    command = ["olah-cli", "--config", folder / "olah.toml", "--log-path", folder / "logs"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
