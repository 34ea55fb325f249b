# SPDX-License-Identifier: Apache-2.0
"""The page without a browser: what is read, what is written while it is written, what is refused, and the twin."""

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

from encdec_slm import (
    EncDecSLMConfig,
    EncDecSLMForConditionalGeneration,
    EncDecVLMConfig,
    EncDecVLMForConditionalGeneration,
)
from encdec_slm.hub_cards.space import app, twin, write_space
from encdec_slm.trainers.new_models import build_processor, train_tokenizer


pytest.importorskip("gradio", reason="gradio is not installed: pip install encdec-slm[demo]")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LAYERS = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "initializer_range": 0.2}


def save_text_folder(folder):
    """A tiny text model with new weights and a tokenizer, as a checkpoint folder."""
    tokenizer = train_tokenizer(["return the area of it"] * 9, 300, model_max_length=64)
    config = EncDecSLMConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **SIZES, **LAYERS)
    torch.manual_seed(0)
    EncDecSLMForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vision_folder(folder):
    """Likewise a vision-text model, with tiles of 16 pixels."""
    tokenizer = train_tokenizer(["what is this?"] * 9, 300, model_max_length=512)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tower = {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = EncDecVLMConfig(
        text_config=EncDecSLMConfig(vocab_size=len(tokenizer), **SIZES, **LAYERS).to_dict(),
        vision_config={**SIZES, **tower},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    EncDecVLMForConditionalGeneration(config).save_pretrained(folder)
    build_processor(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return save_text_folder(tmp_path_factory.mktemp("text") / "scribe")


@pytest.fixture(scope="module")
def loaded(text_folder):
    return app.load(text_folder)


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    return save_vision_folder(tmp_path_factory.mktemp("vision") / "viewer")


@pytest.fixture(scope="module")
def seeing(vision_folder):
    return app.load(vision_folder)


@pytest.fixture
def picture(tmp_path):
    """A wide image, whose grid of tiles this family shrinks and LLaVA-NeXT does not."""
    file = tmp_path / "picture.png"
    Image.effect_noise((60, 15), 90).convert("RGB").save(file)
    return file


def changes(*args, **kwargs):
    """Everything that happened to each part of the page."""
    happened = {}
    for step in app.answer(*args, **kwargs):
        for name, value in step.items():
            happened.setdefault(name, []).append(value)
    return happened


def built(*args, **kwargs):
    """The page, built while an event loop runs: without one, gradio makes its own and never closes them."""

    async def build():
        return app.build_page(*args, **kwargs)

    return asyncio.run(build())


def last_message(loaded, text, picture=None, num_new_tokens=4):
    return changes(loaded, text, picture, num_new_tokens, threading.Event())["message"][-1]


def scripted(loaded, text):
    """`loaded` with a model that writes `text`, and stops where it is told to."""
    ids = loaded.tokenizer(text)["input_ids"]

    def generate(input_ids, streamer, stopping_criteria, **kwargs):
        streamer.put(torch.tensor([1]))
        written = [1]
        for token_id in ids:
            streamer.put(torch.tensor([token_id]))
            written.append(token_id)
            if stopping_criteria[0](torch.tensor([written]), None).all():
                break
        streamer.end()
        return torch.tensor([written])

    model = SimpleNamespace(generate=generate, config=loaded.model.config, device=torch.device("cpu"))
    return app.Loaded("scripted", model, loaded.tokenizer)


def test_words_appear_as_they_are_written(loaded):
    happened = changes(scripted(loaded, "return the area of it"), "x", None, 30, threading.Event())
    assert happened["answer"][:4] == ["", "return ", "return the ", "return the area "]
    assert happened["answer"][-1] == "return the area of it"
    assert " tokens in " in happened["message"][-1] and "the first word after" in happened["message"][-1]


def test_the_answer_is_that_of_greedy_search(loaded):
    inputs = loaded.tokenizer("def area(w, h):", return_tensors="pt")
    ids = loaded.model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, 1:]
    happened = changes(loaded, "def area(w, h):", None, 9, threading.Event())
    assert happened["answer"][-1] == loaded.tokenizer.decode(ids, skip_special_tokens=True)


def test_an_answer_about_an_image_is_that_of_the_processor_and_model(seeing, picture):
    inputs = seeing.processor(images=Image.open(picture), text="what is this?", return_tensors="pt")
    ids = seeing.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 1:]
    happened = changes(seeing, "what is this?", picture, 6, threading.Event())
    assert happened["answer"][-1] == seeing.tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_ends_a_text_after_the_token_that_is_being_written(loaded):
    stop = threading.Event()
    stop.set()
    happened = changes(scripted(loaded, "return the area of it"), "x", None, 30, stop)
    assert happened["message"][-1].startswith("Stopped: 1 tokens")
    assert happened["answer"][-1] and "return the area of it".startswith(happened["answer"][-1])


def test_leaving_ends_the_text_that_nobody_reads(loaded):
    stop = threading.Event()
    texts = app.stream_text(scripted(loaded, "return the area of it"), {"input_ids": torch.ones(1, 2)}, 30, stop)
    next(texts)
    texts.close()
    assert stop.is_set()


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_nothing_to_read_is_told(loaded, text):
    assert last_message(loaded, text) == "There is nothing to read yet. Type a text first."


def test_a_text_that_is_too_long_is_told_with_both_lengths(loaded):
    message = last_message(loaded, "é" * 5000)
    assert message == "The text has 10,001 tokens, but this model reads at most 64. Shorten the text."


def test_a_question_that_is_too_long_is_told(seeing, picture):
    assert "but this model reads at most" in last_message(seeing, "what " * 5000, picture)


def test_a_missing_image_is_told(seeing):
    assert last_message(seeing, "what is this?") == "There is no image yet. Upload one, then ask about it."


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "gone"])
def test_a_file_that_is_no_image_is_told(seeing, picture, tmp_path, kind):
    file = tmp_path / "file.png"
    contents = {"text": b"hello", "empty": b"", "cut": picture.read_bytes()[:200]}
    if kind in contents:
        file.write_bytes(contents[kind])
    assert last_message(seeing, "what is this?", file) == app.UNREADABLE


def test_a_small_file_that_claims_to_be_a_huge_image_is_told(seeing, tmp_path, monkeypatch):
    file = tmp_path / "file.png"
    Image.new("1", (300, 300)).save(file)
    for limit in (80_000, 30_000):  # Pillow itself warns of the one and refuses the other
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert f"but at most {limit:,} are read. Scale it down." in last_message(seeing, "what is this?", file)


def test_an_error_of_the_model_is_told_on_the_page(loaded, monkeypatch):
    def generate(**kwargs):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(loaded.model, "generate", generate)
    assert last_message(loaded, "x") == "The model failed on this input (RuntimeError: out of memory)."


@pytest.mark.parametrize("asked", [-3, 0, 7, 7.0, 10**9])
def test_the_number_of_new_tokens_stays_within_what_the_slider_offers(loaded, monkeypatch, asked):
    given = []
    monkeypatch.setattr(app, "_answered", lambda loaded, inputs, number, stop: given.append(number) or [])
    changes(loaded, "x", None, asked, threading.Event())
    assert given == [min(max(2, asked), 127)]


# The twin


def test_the_twin_is_timed_on_the_same_input(loaded):
    model = app.build_twin(loaded.model)
    assert not model.config.is_encoder_decoder
    # Of weights this few, a step of the twin's intermediate size is more than 1 %.
    assert model.num_parameters() == pytest.approx(loaded.model.num_parameters(), rel=0.05)
    happened = changes(loaded, "def area(w, h):", None, 5, threading.Event(), model)
    assert len(loaded.tokenizer(happened["noise"][-1])["input_ids"]) > 1
    lines = happened["speeds"][-1].splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["this model", "decoder-only twin"]
    assert all("ms" in line for line in lines[2:4])
    assert "12 tokens read, 5 written by both, cpu, float32, median of 3" in lines[-1]
    assert "its text is noise, and only its speed counts" in lines[-1]


def test_the_twin_sees_the_whole_grid_of_an_image(seeing, picture):
    model = app.build_twin(seeing.model)
    inputs = app.source_inputs(seeing, "what is this?", picture)
    of_twin = twin.twin_inputs(seeing.model, inputs)
    image_token_id = seeing.model.config.image_token_id
    texts = [ids[ids != image_token_id].tolist() for ids in (inputs["input_ids"], of_twin["input_ids"])]
    assert texts[0] == texts[1]
    # LLaVA-NeXT itself refuses another number of image tokens than it makes features.
    happened = changes(seeing, "what is this?", picture, 3, threading.Event(), model)
    assert "median of 3" in happened["speeds"][-1]


def test_a_comparison_that_is_stopped_has_no_numbers(loaded, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(twin, "_token_seconds", lambda *args: stop.set() or [0.1, 0.2])
    happened = changes(loaded, "x", None, 3, stop, app.build_twin(loaded.model))
    assert happened["speeds"][-1] == "Stopped before both were measured."


def test_the_table_has_medians_and_their_ratios(loaded):
    runs = [[[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.2, 0.3, 0.4]], [[0.4, 0.6, 0.8]] * 3]
    table = twin.speed_table((loaded.model, loaded.model), runs, 1234)
    assert "M | 200.0 ms | 10.0 |" in table and "M | 400.0 ms | 5.0 |" in table
    assert "took 0.50 of the twin's time" in table and "2.00 times its rate (1,234 tokens read, 3 written" in table


# The page


def test_the_page_of_a_text_model_reports_to_nobody(text_folder):
    page = built(text_folder)
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Text", "Answer", "New tokens, at most"} <= labels and "Image" not in labels
    assert page.title == "scribe" and page.analytics_enabled is False


def test_the_heading_tells_the_size(loaded):
    heading = app.heading(loaded)
    assert heading.startswith("# scribe\nText in, text out. An encoder-decoder of 0.0")
    assert "1 layers read the input once, 1 run per new token" in heading and "at most 64 tokens" in heading


def test_the_page_of_a_vision_model_takes_an_image(vision_folder):
    page = built(vision_folder, compare_with_twin=True)
    labels = " ".join(str(getattr(block, "label", "")) for block in page.blocks.values())
    assert "Image" in labels and "Question" in labels and "this text is noise" in labels


def test_without_the_package_the_page_says_what_the_twin_needs(text_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "encdec_slm.hub_cards.space", None)
    page = built(text_folder, compare_with_twin=True)
    values = " ".join(str(getattr(block, "value", "")) for block in page.blocks.values())
    assert "needs the package `encdec_slm`" in values and "`pip install encdec-slm`" in values


def test_without_gradio_an_error_says_what_to_install(text_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"`pip install encdec-slm\[demo\]`"):
        app.build_page(text_folder)


def test_example_pictures_are_images_with_questions(seeing, tmp_path):
    for file, question in app.example_pictures(tmp_path, seeing):
        assert app.open_picture(file).size == (72, 72)
        assert app.source_inputs(seeing, question, file)["pixel_values"].shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("name", ["nowhere/at/all", "empty"])
def test_a_model_that_is_not_there_is_told(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert app.main(["--model", name]) == 1
    error = capsys.readouterr().err
    assert f"app.py: `model` '{name}' could not be loaded" in error and "Traceback" not in error


def test_a_model_of_another_kind_is_told(tmp_path):
    config = LlamaConfig(vocab_size=8, num_hidden_layers=1, num_key_value_heads=2, **SIZES)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'llama', but the page is for"):
        app.load(tmp_path)


def test_no_model_is_an_error_of_usage(capsys):
    with pytest.raises(SystemExit) as error:
        app.main([])
    assert error.value.code == 2
    assert "no model is named: give --model, or set the variable MODEL_ID" in capsys.readouterr().err


# The Space


def test_the_page_needs_only_what_a_space_installs():
    tree = ast.parse(Path(app.__file__).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    packages = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    assert packages == {"torch", "transformers", "PIL"}


def test_a_space_folder_names_its_model_and_commit(tmp_path, monkeypatch):
    for variable in ("MODEL_ID", "MODEL_REVISION"):
        monkeypatch.delenv(variable, raising=False)
    folder = write_space(tmp_path / "space", "owner/scribe", "0123abc")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    variables = runpy.run_path(str(folder / "app.py"), run_name="app")
    assert variables["MODEL_ID"] == "owner/scribe" and variables["MODEL_REVISION"] == "0123abc"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "app_file: app.py" in readme and "- owner/scribe" in readme and "`0123abc`" in readme and "$" not in readme


@pytest.mark.parametrize(("model_id", "revision"), [("outputs", "main"), ("a/b/c", "main"), ("owner/scribe", "")])
def test_a_space_needs_a_model_on_the_hub_and_its_commit(tmp_path, model_id, revision):
    with pytest.raises(ValueError, match="but"):
        write_space(tmp_path, model_id, revision)
