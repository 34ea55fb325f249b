# SPDX-License-Identifier: Apache-2.0
"""The page without a browser: inputs, streaming, errors, the baseline, and Space folders."""

import ast
import asyncio
import runpy
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from encdec_slm.hub_cards.space import app, baseline, write_space


pytest.importorskip("gradio", reason="gradio is not installed: pip install encdec-slm[demo]")


@pytest.fixture(scope="module")
def loaded(text_folder):
    return app.load_model(text_folder)


@pytest.fixture(scope="module")
def loaded_vision(vision_folder):
    return app.load_model(vision_folder)


@pytest.fixture
def picture(tmp_path):
    """A wide image; LLaVA-NeXT uses more tokens for it than this family."""
    file = tmp_path / "picture.png"
    Image.effect_noise((60, 15), 90).convert("RGB").save(file)
    return file


def collect(*args, **kwargs):
    """All values of each part of the page, in their order."""
    changes = {}
    for step in app.answer(*args, **kwargs):
        for name, value in step.items():
            changes.setdefault(name, []).append(value)
    return changes


def build_page(*args, **kwargs):
    """Build the page in an event loop; without one, gradio makes its own and never closes them."""

    async def build():
        return app.build_page(*args, **kwargs)

    return asyncio.run(build())


def last_message(loaded, text, picture=None, num_new_tokens=4):
    return collect(loaded, text, picture, num_new_tokens, threading.Event())["message"][-1]


def scripted(loaded, text):
    """`loaded` with a model that generates `text` and honors stopping criteria."""
    ids = loaded.tokenizer(text)["input_ids"]

    def generate(input_ids, streamer, stopping_criteria, **kwargs):
        streamer.put(torch.tensor([1]))
        generated = [1]
        for token_id in ids:
            streamer.put(torch.tensor([token_id]))
            generated.append(token_id)
            if stopping_criteria[0](torch.tensor([generated]), None).all():
                break
        streamer.end()
        return torch.tensor([generated])

    model = SimpleNamespace(generate=generate, config=loaded.model.config, device=torch.device("cpu"))
    return app.LoadedModel("scripted", model, loaded.tokenizer)


# Answers


def test_words_appear_while_they_are_generated(loaded):
    changes = collect(scripted(loaded, "return the area of it"), "x", None, 30, threading.Event())
    assert changes["answer"][:4] == ["", "return ", "return the ", "return the area "]
    assert changes["answer"][-1] == "return the area of it"
    assert " tokens in " in changes["message"][-1] and "first word" in changes["message"][-1]


def test_the_answer_is_that_of_greedy_search(loaded, loaded_vision, picture):
    text = "def area(w, h):"
    for own, inputs, file in (
        (loaded, loaded.tokenizer(text, return_tensors="pt"), None),
        (loaded_vision, loaded_vision.processor.encode_questions(text, picture, return_tensors="pt"), picture),
    ):
        ids = own.model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, 1:]
        changes = collect(own, text, file, 9, threading.Event())
        assert changes["answer"][-1] == own.tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_ends_a_text_after_the_current_token(loaded):
    stop = threading.Event()
    stop.set()
    changes = collect(scripted(loaded, "return the area of it"), "x", None, 30, stop)
    assert changes["message"][-1].startswith("Stopped: 1 tokens")
    assert changes["answer"][-1] and "return the area of it".startswith(changes["answer"][-1])


def test_leaving_the_page_stops_the_generation(loaded):
    stop = threading.Event()
    texts = app.stream_text(scripted(loaded, "return the area of it"), {"input_ids": torch.ones(1, 2)}, 30, stop)
    next(texts)
    texts.close()
    assert stop.is_set()


# Inputs that cannot be used


@pytest.mark.parametrize("value", ["abc", None, "", {}, [3], float("nan"), "seven", object()])
def test_a_number_of_new_tokens_that_is_not_a_number_is_explained(loaded, value):
    assert "from 2 to 256" in last_message(loaded, "x", num_new_tokens=value)


@pytest.mark.parametrize(
    ("value", "expected"), [(-3, 2), (0, 2), (7, 7), (7.0, 7), ("7", 7), (10**9, 256), (float("inf"), 256)]
)
def test_the_number_of_new_tokens_is_limited_to_the_slider(value, expected):
    assert app.parse_new_tokens(value, 256) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "Enter a text"), (" \n\t", "Enter a text"), (5, "must be text"), ({"a": 1}, "must be text")],
)
def test_missing_and_wrong_texts_are_explained(loaded, text, expected):
    assert expected in last_message(loaded, text)


def test_inputs_that_are_too_long_are_explained_with_both_lengths(loaded, loaded_vision, picture):
    assert "10,001 tokens" in (message := last_message(loaded, "é" * 5000)) and "at most 512" in message
    assert "at most 512" in last_message(loaded_vision, "what " * 5000, picture)


@pytest.mark.parametrize("kind", [None, "text", "empty", "cut", "gone", "huge", "larger"])
def test_missing_and_wrong_images_are_explained(loaded_vision, picture, tmp_path, monkeypatch, kind):
    file = None if kind is None else tmp_path / "file.png"
    contents = {"text": b"hello", "empty": b"", "cut": picture.read_bytes()[:200]}
    if kind in contents:
        file.write_bytes(contents[kind])
    if kind in ("huge", "larger"):  # a small file; Pillow warns of the one and refuses the other
        Image.new("1", (300, 300)).save(file)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000 if kind == "huge" else 30_000)
    message = last_message(loaded_vision, "what is this?", file)
    assert ("Upload an image" if kind is None else "cannot be read as an image") in message
    assert str(tmp_path) not in message and "failed" not in message


def test_an_error_of_the_model_is_shown_on_the_page(loaded, monkeypatch):
    def generate(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded.model, "generate", generate)
    assert "RuntimeError: out of memory" in last_message(loaded, "x")


# The baseline


def test_the_baseline_is_timed_on_the_same_input(loaded):
    model = app.build_baseline(loaded.model)
    assert not model.config.is_encoder_decoder
    # With so few weights, one step of `intermediate_size` is more than 1 %.
    assert model.num_parameters() == pytest.approx(loaded.model.num_parameters(), rel=0.05)
    changes = collect(loaded, "def area(w, h):", None, 5, threading.Event(), model)
    assert len(loaded.tokenizer(changes["baseline_text"][-1])["input_ids"]) > 1
    lines = changes["speeds"][-1].splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["this model", "decoder-only baseline"]
    assert "16 source tokens, 5 new tokens, cpu, float32, median of 3" in lines[-1]


def test_the_baseline_reads_all_tiles_of_an_image(loaded_vision, picture):
    model = app.build_baseline(loaded_vision.model)
    inputs = app.encode_source(loaded_vision, "what is this?", picture)
    adapted = baseline.adapt_inputs(loaded_vision.model, inputs)
    image_token_id = loaded_vision.model.config.image_token_id
    texts = [ids[ids != image_token_id].tolist() for ids in (inputs["input_ids"], adapted["input_ids"])]
    assert texts[0] == texts[1]
    # LLaVA-NeXT itself refuses a wrong number of image tokens.
    changes = collect(loaded_vision, "what is this?", picture, 3, threading.Event(), model)
    assert "median of 3" in changes["speeds"][-1]


def test_a_comparison_that_is_stopped_has_no_numbers(loaded, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(baseline, "token_seconds", lambda *args, **kwargs: stop.set() or [0.1, 0.2])
    changes = collect(loaded, "x", None, 3, stop, app.build_baseline(loaded.model))
    assert changes["speeds"][-1].startswith("Stopped")


def test_the_table_of_speeds_has_medians_and_their_ratios(loaded):
    runs = [[[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.2, 0.3, 0.4]], [[0.4, 0.6, 0.8]] * 3]
    table = baseline.format_speeds((loaded.model, loaded.model), runs, 1234)
    assert "M | 200.0 ms | 10.0 |" in table and "M | 400.0 ms | 5.0 |" in table
    assert "0.50 x the baseline's" in table and "2.00 x as fast (1,234 source tokens, 3 new" in table


# The page


def test_the_page_of_a_text_model_has_no_analytics(text_folder):
    page = build_page(text_folder)
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Text", "Answer"} <= labels and "Image" not in labels
    assert page.title == "text" and page.analytics_enabled is False


def test_the_heading_names_the_size(loaded):
    heading = app.format_heading(loaded)
    assert heading.startswith("# text\n") and "(2 layers)" in heading and "at most 512 input tokens" in heading


def test_the_page_of_a_vision_model_has_an_image(vision_folder):
    page = build_page(vision_folder, compare=True)
    labels = " ".join(str(getattr(block, "label", "")) for block in page.blocks.values())
    assert "Image" in labels and "Question" in labels and "random weights" in labels


def test_missing_packages_are_named_with_the_pip_command(text_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "encdec_slm.hub_cards.space", None)
    page = build_page(text_folder, compare=True)
    values = " ".join(str(getattr(block, "value", "")) for block in page.blocks.values())
    assert "`encdec_slm`" in values and "`pip install encdec-slm`" in values
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"`pip install encdec-slm\[demo\]`"):
        app.build_page(text_folder)


def test_example_pictures_are_images_with_questions(loaded_vision, tmp_path):
    for file, question in app.draw_examples(tmp_path, loaded_vision):
        assert app.encode_source(loaded_vision, question, file)["pixel_values"].shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("name", ["nowhere/at/all", "no-such/model", "empty"])
def test_a_missing_model_is_explained(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert app.main(["--model", name]) == 1
    error = capsys.readouterr().err
    assert f"`model` '{name}'" in error and "Traceback" not in error


def test_a_mistyped_name_asks_an_unreachable_hub_once(tmp_path, monkeypatch):
    calls = []

    def unreachable(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(app.HfApi, "model_info", unreachable)
    with pytest.raises(ValueError, match="no-such/model"):
        app.load_model("no-such/model")
    assert len(calls) == 1


def test_models_of_other_families_are_refused(tmp_path, capsys):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        app.load_model(tmp_path)
    with pytest.raises(SystemExit) as error:
        app.main([])
    assert error.value.code == 2 and "MODEL_ID" in capsys.readouterr().err


# The Space


def test_the_page_imports_only_what_a_space_installs():
    tree = ast.parse(Path(app.__file__).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    packages = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    assert packages == {"torch", "transformers", "huggingface_hub", "PIL"}


def test_a_space_folder_names_its_model_and_commit(tmp_path, monkeypatch):
    for variable in ("MODEL_ID", "MODEL_REVISION"):
        monkeypatch.delenv(variable, raising=False)
    for commit in ("456def", "0123abc"):  # an earlier output is replaced
        folder = write_space(tmp_path / "space", "owner/scribe", commit)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    variables = runpy.run_path(str(folder / "app.py"), run_name="app")
    assert variables["MODEL_ID"] == "owner/scribe" and variables["MODEL_REVISION"] == "0123abc"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "app_file: app.py" in readme and "- owner/scribe" in readme and "`0123abc`" in readme and "$" not in readme


@pytest.mark.parametrize("name", ["README.md", "app.py", "thesis.tex"])
def test_other_files_are_never_replaced_by_a_space(tmp_path, name):
    if name == "thesis.tex":
        write_space(tmp_path, "owner/scribe", "0123abc")
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        write_space(tmp_path, "owner/scribe", "0123abc")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(("model_id", "revision"), [("outputs", "main"), ("a/b/c", "main"), ("owner/scribe", "")])
def test_a_space_requires_a_model_on_the_hub_and_its_commit(tmp_path, model_id, revision):
    with pytest.raises(ValueError, match="model_id" if revision else "revision"):
        write_space(tmp_path, model_id, revision)
