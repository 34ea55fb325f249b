# SPDX-License-Identifier: Apache-2.0
"""Repositories that are built, checked, refused, and uploaded to a Hub on localhost."""

import contextlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from onnx_bundles import tiny_text_model, word_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from vision_folders import save_tiny_vision_model

import encdec_slm
from encdec_slm.export import export_ctranslate2
from encdec_slm.hub_cards import fresh_process, publish, publishing, repository_checks
from encdec_slm.hub_cards.fresh_process import check_in_fresh_process


# huggingface_hub hands file objects to its HTTP client in a way that the client no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

CODE = {"configuration_encdec_slm.py", "modeling_encdec_slm.py", "pipeline_encdec_slm.py"}
VISION_CODE = CODE | {name.replace("slm", "vlm") for name in CODE - {"pipeline_encdec_slm.py"}}
VISION_CODE |= {"image_processing_encdec_vlm.py", "processing_encdec_vlm.py"}
TEXT_FILES = CODE | {"config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE"}
TEXT_FILES |= {"tokenizer.json", "tokenizer_config.json"}
TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0hL3n"


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A text model and its tokenizer as `save_pretrained` leaves them; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_text_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(saved, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(saved, tmp_path / "source")


@pytest.fixture(scope="module")
def vision_saved(tmp_path_factory):
    """A vision-text model and its processor."""
    folder = tmp_path_factory.mktemp("vision") / "model"
    save_tiny_vision_model(folder)
    return folder


@pytest.fixture
def checked(monkeypatch):
    """Folders that would have been checked in another process, which takes seconds and is tested by itself."""
    folders = []
    monkeypatch.setattr(fresh_process, "check_in_fresh_process", lambda folder: folders.append(names_in(folder)))
    return folders


@pytest.fixture(scope="module")
def published(saved, tmp_path_factory):
    """A repository that was checked as every user's is."""
    return publish(saved, output_dir=tmp_path_factory.mktemp("published") / "tiny").folder


# The folder


def test_a_published_folder_is_complete_and_has_the_code_of_this_package(published):
    assert names_in(published) == TEXT_FILES
    package = Path(encdec_slm.__file__).parent
    for name in CODE:
        assert (published / name).read_bytes() == (package / name).read_bytes()
    config = json.loads((published / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "modeling_encdec_slm.EncDecSLMForConditionalGeneration"
    assert "text2text-generation" in config["custom_pipelines"]
    assert "Apache License" in (published / "LICENSE").read_text()


def test_a_published_folder_has_the_weights_and_the_tokenizer_of_its_source(saved, published):
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict() for folder in (saved, published))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (saved / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_folder_that_works_only_with_the_package_is_refused_with_the_reason(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "broken")
    with (folder / "modeling_encdec_slm.py").open("a") as file:
        file.write("\nfrom encdec_slm.conversion import convert_reference_checkpoint\n")
    with pytest.raises(ValueError, match=r"No module named 'encdec_slm|requires the following packages") as caught:
        check_in_fresh_process(folder)
    assert "\n" not in str(caught.value)


def test_a_failed_check_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def fail(folder):
        raise ValueError("does not work")

    monkeypatch.setattr(fresh_process, "check_in_fresh_process", fail)
    with pytest.raises(ValueError, match="does not work"):
        publish(source, output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_without_code_or_with_other_code_gets_that_of_the_package(source, tmp_path, checked):
    (source / "pipeline_encdec_slm.py").unlink()
    (source / "modeling_encdec_slm.py").write_text("raise SystemExit")
    folder = publish(source, output_dir=tmp_path / "out").folder
    assert "raise SystemExit" not in (folder / "modeling_encdec_slm.py").read_text()
    assert names_in(folder) == TEXT_FILES
    assert checked == [TEXT_FILES]


def test_a_model_in_memory_brings_the_tokenizer_that_it_was_loaded_with(saved, tmp_path, checked):
    model = AutoModelForSeq2SeqLM.from_pretrained(saved)
    assert names_in(publish(model, output_dir=tmp_path / "out")) == TEXT_FILES
    model = tiny_text_model()
    with pytest.raises(ValueError, match="processing_class=AutoTokenizer"):
        publish(model, output_dir=tmp_path / "none")
    given = publish(model, output_dir=tmp_path / "given", processing_class=word_tokenizer())
    assert names_in(given) == TEXT_FILES
    assert AutoTokenizer.from_pretrained(given.folder).get_vocab() == word_tokenizer().get_vocab()


def test_a_vision_model_is_published_with_its_processor_and_all_code(vision_saved, tmp_path, checked):
    names = names_in(publish(vision_saved, output_dir=tmp_path / "out"))
    assert names >= VISION_CODE | {"processor_config.json", "tokenizer.json", "model.safetensors", "LICENSE"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "AutoModelForImageTextToText" in config["auto_map"]


@pytest.mark.slow
def test_a_vision_model_works_where_the_package_is_not_installed(vision_saved, tmp_path):
    assert publish(vision_saved, output_dir=tmp_path / "out").folder.is_dir()


def test_a_vision_folder_without_processor_is_refused(vision_saved, tmp_path, checked):
    folder = shutil.copytree(vision_saved, tmp_path / "source")
    for path in folder.glob("*processor_config.json"):
        path.unlink()
    with pytest.raises(ValueError, match="needs a processor"):
        publish(folder, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="needs a processor"):
        publish(folder, output_dir=tmp_path / "out", processing_class=word_tokenizer())


def test_exports_beside_the_model_and_given_ones_are_part_of_the_repository(saved, source, tmp_path, checked):
    export_ctranslate2(saved, source / "ctranslate2")
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "encoder_model.onnx").write_bytes(b"\x08\x08")
    manifest = {"format": "onnx", "tokenizer_sha256": None, "files": {"encoder_model.onnx": 2}}
    (tmp_path / "graphs" / "export_manifest.json").write_text(json.dumps(manifest))
    names = names_in(publish(source, output_dir=tmp_path / "out", bundles=[tmp_path / "graphs"]))
    assert {"ctranslate2/model.bin", "ctranslate2/export_manifest.json", "onnx/encoder_model.onnx"} <= names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `ctranslate2/` | ctranslate2 | int8 |" in card and "| `onnx/` | onnx | float32 |" in card
    with pytest.raises(ValueError, match="two exports for `ctranslate2/`"):
        publish(source, output_dir=tmp_path / "twice", bundles=[source / "ctranslate2"])
    (source / "ctranslate2" / "export_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"ctranslate2/model\.bin \(a pickle"):
        publish(source, output_dir=tmp_path / "unknown")


def test_the_licence_of_weights_is_kept_beside_that_of_the_code(source, tmp_path, checked):
    (source / "LICENSE").write_text("MIT License. Copyright of others.")
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# weights\n")
    folder = publish(source, output_dir=tmp_path / "out").folder
    assert (folder / "LICENSE-weights").read_text() == "MIT License. Copyright of others."
    assert "Apache License" in (folder / "LICENSE").read_text()
    again = publish(folder, output_dir=tmp_path / "again").folder
    assert "license: mit" in (again / "README.md").read_text() and (again / "LICENSE-weights").is_file()


# What is refused


@pytest.mark.parametrize(
    "name, content, problem",
    [
        (".env", b"A=1", "holds secrets"),
        ("token", TOKEN.encode(), "holds secrets"),
        ("id_rsa", b"x", "holds secrets"),
        ("notes.txt", f"my token is {TOKEN}".encode(), "a token of the Hub"),
        ("notes.md", b"aws AKIAIOSFODNN7EXAMPLE", "an AWS key"),
        ("setup.cfg", b"-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "a private key"),
        ("settings.yaml", b"WANDB_API_KEY: 0123456789abcdef0123", "a key or password"),
        ("optimizer.pt", b"x", "a state of a training"),
        ("scheduler.pt", b"x", "a state of a training"),
        ("rng_state.pth", b"x", "a state of a training"),
        ("trainer_state.json", b"{}", "a state of a training"),
        ("training_args.bin", b"x", "a state of a training"),
        ("pytorch_model.bin", b"x", "a pickle"),
        ("model.pkl", b"x", "a pickle"),
        ("innocent.dat", pickle.dumps({"a": 1}), "a pickle"),
        ("extra.json", b'{"_name_or_path": "/home/me/model"}', "/home/me/model"),
        ("extra2.json", b'{"list": [{"file": "C:\\\\Users\\\\me\\\\a.txt"}]}', "Users"),
        ("extra3.json", b'{"/home/me/rows.jsonl": 5}', "/home/me/rows.jsonl"),
        ("README.md", b"# Model\n\nTrained from /root/data/rows.jsonl.\n", "line 3: '/root/data/rows.jsonl"),
        ("recipe.yaml", b"train_file: /mnt/disk/rows.jsonl", "/mnt/disk/rows.jsonl"),
    ],
)
def test_what_must_not_be_uploaded_is_refused_by_name(source, tmp_path, checked, name, content, problem):
    (source / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        publish(source, output_dir=tmp_path / "out")
    assert name in str(caught.value) and problem in str(caught.value) and "leave_out" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "out").exists() and not checked


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_paths_in_the_files_of_a_model_are_refused(source, tmp_path, checked, name):
    content = json.loads((source / name).read_text())
    (source / name).write_text(json.dumps({**content, "name_or_path": "/data/models/mine"}))
    with pytest.raises(ValueError, match=rf"{name} \(has a path of this machine, `name_or_path`: '/data/models/mine'"):
        publish(source, output_dir=tmp_path / "out")


def test_a_tokenizer_beside_a_model_in_memory_is_looked_at_too(source, tmp_path, checked):
    model = AutoModelForSeq2SeqLM.from_pretrained(source)
    (source / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/data/models/mine"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        publish(model, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "name, content",
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
def test_what_only_looks_like_a_path_or_a_secret_is_taken(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert repository_checks.problem_of(tmp_path / name) is None


def test_the_folder_of_a_run_is_published_without_what_the_run_keeps_for_itself(source, tmp_path, checked):
    (source / "results.json").write_text(json.dumps({"model": str(tmp_path / "base"), "device": "cpu"}))
    (source / "training_args.bin").write_bytes(pickle.dumps({}))
    (source / "predictions.jsonl").write_text(f'{{"source": "-----BEGIN PRIVATE KEY----- {TOKEN}"}}')
    for name in ("checkpoint-5", "runs"):
        (source / name).mkdir()
        (source / name / "optimizer.pt").write_bytes(b"x")
    done = publish(source, output_dir=tmp_path / "out")
    assert done.left_out == ("checkpoint-5/", "predictions.jsonl", "results.json", "runs/", "training_args.bin")
    assert names_in(done) == TEXT_FILES
    assert "| begun with | base |" in (done.folder / "README.md").read_text()


def test_a_checkpoint_of_a_run_is_published_when_its_states_are_left_out(source, tmp_path, checked):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        (source / name).write_bytes(b"x")
    with pytest.raises(ValueError) as caught:
        publish(source, output_dir=tmp_path / "out")
    assert all(name in str(caught.value) for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"))
    states = ["*.pt", "*.pth", "train*"]
    assert names_in(publish(source, output_dir=tmp_path / "out", leave_out=states)) == TEXT_FILES
    assert (source / "optimizer.pt").is_file()


# PEFT 0.21 reads a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_to_be_merged_first(source, tmp_path, checked):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_text_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        publish(model, output_dir=tmp_path / "out")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_and_unload"):
        publish(source, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_or_dir": "no/such/folder"}, "no folder here"),
        ({"model_or_dir": __file__}, "a file"),
        ({"push": True}, "`repo_id` is not given"),
        ({"repo_id": "a/b/c"}, "no whole name of a repository"),
        ({"repo_id": "tiny"}, "no whole name of a repository"),
        ({"repo_id": "me/tiny", "create_pr": True}, "`push` is not"),
        ({"repo_id": "me/tiny", "push": True, "create_pr": True, "revision": "x"}, "goes to the main branch"),
        ({"output_dir": "{source}"}, "lie in each other"),
        ({"output_dir": "{source}/inside"}, "lie in each other"),
        ({"output_dir": "{source}/.."}, "lie in each other"),
        ({"output_dir": "{other}"}, "is not empty"),
        ({"output_dir": "{other}/file"}, "is a file"),
        ({"results": {"rougeL": 1.0}}, "`task` and `metrics` are needed"),
        ({"results": "no.json"}, "no JSON file"),
        ({"facts": {"price": "1"}}, "`facts` has price"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(source, tmp_path, checked, change, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    change = {
        key: value.format(source=source, other=tmp_path / "other") if isinstance(value, str) else value
        for key, value in change.items()
    }
    arguments = {"model_or_dir": source, "output_dir": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=message):
        publish(arguments.pop("model_or_dir"), arguments.pop("repo_id", None), **arguments)
    assert not (tmp_path / "out").exists() and names_in(tmp_path / "other") == {"file"}


def test_models_of_other_kinds_are_refused(saved, source, tmp_path, checked):
    with pytest.raises(TypeError, match="is a dict"):
        publish({}, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="no output head"):
        publish(tiny_text_model().model, output_dir=tmp_path / "out")
    (source / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="'t5'"):
        publish(source, output_dir=tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        publish(source, output_dir=tmp_path / "out")


@pytest.mark.parametrize("name, message", [("model.safetensors", "no weights"), ("tokenizer*", "needs a tokenizer")])
def test_a_folder_that_is_not_whole_is_refused(source, tmp_path, checked, name, message):
    for path in source.glob(name):
        path.unlink()
    with pytest.raises(ValueError, match=message):
        publish(source, output_dir=tmp_path / "out")


def test_an_earlier_publication_is_replaced_unless_somebody_changed_it(source, tmp_path, checked):
    first = publish(source, "me/tiny", output_dir=tmp_path / "out").folder
    before = {name: (first / name).read_bytes() for name in names_in(first)}
    publish(source, "me/tiny", output_dir=first)
    assert {name: (first / name).read_bytes() for name in names_in(first)} == before
    result = {"task": "copy", "metrics": {"exact": 1.0}}
    publish(source, "me/tiny", output_dir=first, results=result)
    assert (first / ".eval_results" / "copy.yaml").is_file()
    publish(source, "me/tiny", output_dir=first)
    assert not (first / ".eval_results").exists()
    with (first / "README.md").open("a") as file:
        file.write("My own words.\n")
    with pytest.raises(ValueError, match="changed since"):
        publish(source, "me/tiny", output_dir=first)
    assert "My own words." in (first / "README.md").read_text()


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on localhost, for this process; the user is `me`."""
    with Hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield hub


def test_nothing_is_uploaded_unless_asked(hub, saved, tmp_path, checked):
    done = publish(saved, "me/tiny", output_dir=tmp_path / "out")
    assert not hub.requests and not done.is_new_commit and done.commit is None


def test_an_upload_is_one_private_commit_and_none_when_nothing_has_changed(hub, saved, tmp_path, checked):
    done = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True)
    assert done.is_new_commit and done.commit == HfApi().model_info("me/tiny").sha
    assert hub.num_commits("me/tiny") == 2 and hub.repositories["me/tiny"].private
    folder = Path(snapshot_download("me/tiny", revision=done.commit, cache_dir=tmp_path / "cache"))
    assert names_in(folder) == TEXT_FILES | {".gitattributes"}
    for name in TEXT_FILES:
        assert (folder / name).read_bytes() == (done.folder / name).read_bytes()
    again = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True)
    assert not again.is_new_commit and again.commit == done.commit
    assert hub.num_commits("me/tiny") == 2 and hub.sent("PUT", "/lfs/") == 1


def test_an_interrupted_upload_goes_on_when_it_is_called_again(hub, saved, tmp_path, checked):
    export_ctranslate2(saved, tmp_path / "ct2")
    arguments = {"output_dir": tmp_path / "out", "bundles": [tmp_path / "ct2"], "push": True}
    hub.interrupted_after = 1
    with pytest.raises(ConnectionError, match=r"the line went dead.* publish again") as caught:
        publish(saved, "me/tiny", **arguments)
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)
    assert hub.num_commits("me/tiny") == 1
    hub.interrupted_after, hub.requests = None, []
    assert publish(saved, "me/tiny", **arguments).is_new_commit
    assert hub.num_commits("me/tiny") == 2 and hub.sent("PUT", "/lfs/") == 1
    without = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True)
    assert set(HfApi().list_repo_files("me/tiny")) == names_in(without) | {".gitattributes"}
    assert hub.num_commits("me/tiny") == 3


def test_pull_requests_and_branches_leave_the_main_branch_as_it_is(hub, saved, tmp_path, checked):
    HfApi().create_repo("me/tiny")
    done = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True, create_pr=True)
    assert done.pull_request_url.endswith("/me/tiny/discussions/1")
    assert hub.num_commits("me/tiny") == 1 and hub.num_commits("me/tiny", "refs/pr/1") == 2
    done = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True, revision="v1")
    assert hub.num_commits("me/tiny") == 1 and hub.repositories["me/tiny"].resolve("v1") == done.commit
    assert 'REVISION = "v1"' in (done.folder / "README.md").read_text()
    assert not publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True, revision="v1").is_new_commit


def test_who_may_not_write_is_told_so(hub, saved, tmp_path, checked, monkeypatch):
    for token, name in (("hf_you", "me/tiny"), ("", "me/tiny")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConnectionError, match="hf auth login") as caught:
            publish(saved, name, output_dir=tmp_path / "out", push=True)
        assert "\n" not in str(caught.value)
    assert not hub.repositories


def test_a_repository_loads_by_its_name_and_from_the_cache_afterwards(hub, saved, tmp_path, checked, monkeypatch):
    commit = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True).commit
    cached = {"cache_dir": tmp_path / "cache", "revision": commit}
    expected = AutoModelForSeq2SeqLM.from_pretrained(saved).state_dict()
    for options in (cached, {**cached, "local_files_only": True}):
        loaded = AutoModelForSeq2SeqLM.from_pretrained("me/tiny", **options).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("me/tiny")
    with pytest.raises(OSError, match="private repository"):
        AutoModelForSeq2SeqLM.from_pretrained("me/tiny", cache_dir=tmp_path / "empty", token=False)


DOWNLOADER = """\
import sys
sys.modules["encdec_slm"] = None
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
name, revision = sys.argv[1:]
options = {"revision": revision, "trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(name, **options)
model = AutoModelForSeq2SeqLM.from_pretrained(name, **options)
ids = model.generate(**tokenizer("w1 w2", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
said = pipeline("text2text-generation", model=name, trust_remote_code=True)("w1 w2", max_new_tokens=4)
print(tokenizer.decode(ids[0], skip_special_tokens=True), said[0]["generated_text"], sep="|")
"""


def download(hub, home, commit, **environment):
    own = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": ""}
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", DOWNLOADER, "me/tiny", commit]
    return subprocess.run(command, cwd=home, env={**os.environ, **own, **environment}, capture_output=True, text=True)


@pytest.mark.slow
def test_whoever_downloads_needs_no_package_and_later_no_network(hub, saved, tmp_path, checked):
    commit = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True).commit
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


def test_the_names_of_the_folder_are_those_of_the_publishing_module():
    assert encdec_slm.hub_cards.publish is publishing.publish
    assert set(encdec_slm.hub_cards.__all__) == {"PublishedRepository", "publish"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("olah-cli") is None, reason="Olah is not installed (pip install olah, apart)")
def test_somebody_elses_server_gives_the_same_files_from_what_was_committed(hub, saved, tmp_path, checked):
    folder = publish(saved, "me/tiny", output_dir=tmp_path / "out", push=True).folder
    clone = tmp_path / "mirrors" / "models" / "me" / "tiny"
    subprocess.run(["git", "clone", "--quiet", hub.repositories["me/tiny"].folder, clone], check=True)
    for large in (hub.folder / "lfs").iterdir():
        place = clone / ".git" / "lfs" / "objects" / large.name[:2] / large.name[2:4]
        place.mkdir(parents=True)
        shutil.copy(large, place)
    with olah(tmp_path) as endpoint:
        loaded = Path(snapshot_download("me/tiny", endpoint=endpoint, cache_dir=tmp_path / "cache"))
    assert names_in(loaded) == names_in(folder) | {".gitattributes"}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (loaded / path.relative_to(folder)).read_bytes() == path.read_bytes()


@contextlib.contextmanager
def olah(folder):
    """Olah, a mirror of the Hub that serves git repositories of this machine; its address."""
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
