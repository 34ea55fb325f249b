# SPDX-License-Identifier: Apache-2.0
"""What every engine offers: threads, integer types, stop strings, devices, pipelines, and exports on the Hub."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from export_fixtures import build_ascii_tokenizer
from huggingface_hub import constants
from transformers import AutoTokenizer, CompileConfig, TextIteratorStreamer, pipeline
from transformers.pipelines import base as pipelines_base

from conftest import build_model, build_source, build_tokenizer
from encdec_slm import Text2TextGenerationPipeline
from encdec_slm.export import CT2EncDecSLM, OpenVINOEncDecSLM, OrtEncDecSLM, export_ctranslate2, load_export
from encdec_slm.export_manifest import MANIFEST


ENGINES = {
    "ctranslate2": (CT2EncDecSLM, "ct2_folder"),
    "onnxruntime": (OrtEncDecSLM, "onnx_folder"),
    "onnxruntime, fixed shapes": (OrtEncDecSLM, "static_folder"),
    "openvino": (OpenVINOEncDecSLM, "onnx_folder"),
    "openvino, fixed shapes": (OpenVINOEncDecSLM, "static_folder"),
}


@pytest.fixture(params=ENGINES)
def model_class(request):
    return ENGINES[request.param][0]


@pytest.fixture
def folder(request, model_class):
    engine = request.node.callspec.params["model_class"]
    return request.getfixturevalue(ENGINES[engine][1])


@pytest.fixture
def exported(model_class, folder):
    return model_class.from_pretrained(folder)


@pytest.fixture
def model(request, folder, ct2_model, export_model):
    return ct2_model if folder.name == "ctranslate2" else export_model


@pytest.fixture(scope="session")
def ct2_model(export_model):
    """CTranslate2 does not run `qk_norm`, which `export_model` has."""
    return build_model(lm_head_bias=True)


@pytest.fixture(scope="session")
def ct2_folder(build_once, ct2_model):
    options = {"quantization": "float32", "tokenizer": build_ascii_tokenizer()}
    return build_once("ctranslate2", lambda folder: export_ctranslate2(ct2_model, folder, **options))


def test_threads_get_what_each_gets_alone(exported, model):
    # Beams and greedy search at once, from more threads than there are cores.
    sources = [build_source(length, seed=length) for length in (3, 9, 5, 12, 4, 7, 11, 8, 6, 10, 2, 3)]
    settings = [
        {"num_beams": 1 + 2 * (number % 2), "early_stopping": True, "max_new_tokens": 9} for number in range(12)
    ]
    expected = [model.generate(**source, **each) for source, each in zip(sources, settings, strict=True)]
    with ThreadPoolExecutor(6) as threads:
        for _ in range(2):
            found = threads.map(lambda source, each: exported.generate(**source, **each), sources, settings)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_ids_may_have_any_integer_type(exported, model, dtype):
    source = build_source(5, 9)
    expected = model.generate(**source, max_new_tokens=5)
    for inputs in ({"input_ids": source["input_ids"]}, source):
        found = exported.generate(**{name: tensor.to(dtype) for name, tensor in inputs.items()}, max_new_tokens=5)
        assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([[5.0, 6.0]]), TypeError),
        (torch.tensor([[True, False]]), TypeError),
        (torch.tensor([[5, 97]]), ValueError),
        (torch.tensor([[-1, 5]]), ValueError),
        (torch.tensor([5, 6]), ValueError),
    ],
    ids=str,
)
def test_other_ids_are_refused_by_name(exported, ids, error):
    with pytest.raises(error, match="`input_ids`"):
        exported.generate(ids, max_new_tokens=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False, "low_memory": False, "disable_compile": True, "compile_config": CompileConfig()},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1},
        {"length_penalty": 0.5, "early_stopping": False, "num_return_sequences": 1, "renormalize_logits": True},
        {"guidance_scale": 1, "penalty_alpha": 0.0, "repetition_penalty": 1.0, "remove_invalid_values": True},
        {"logits_processor": [], "stopping_criteria": [], "suppress_tokens": [], "bad_words_ids": None},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda settings: next(iter(settings.values())) if len(settings) == 1 else next(iter(settings)),
)
def test_settings_that_change_nothing_are_accepted(exported, model, folder, settings):
    if "prompt_lookup_num_tokens" in settings and "static" in folder.name:
        pytest.skip("Graphs of fixed shape read one token per step.")
    source = build_source(9)
    expected = model.generate(**source, max_new_tokens=6)
    # From the call, and from a generation config that was saved with the model.
    assert torch.equal(exported.generate(**source, max_new_tokens=6, **settings), expected)
    processors = {name: value for name, value in settings.items() if isinstance(value, list)}
    config = copy.deepcopy(exported.generation_config)
    config.update(**{name: value for name, value in settings.items() if name not in processors}, max_new_tokens=6)
    assert torch.equal(exported.generate(**source, generation_config=config), expected)


def test_stop_strings_end_the_text_as_with_the_model(exported, model):
    source, tokenizer = build_source(9, 5, 7), build_ascii_tokenizer()
    unstopped = model.generate(**source, max_new_tokens=9)
    # Two characters that the first row has in its middle.
    string = tokenizer.decode(unstopped[0, 3:5])
    settings = {"stop_strings": [string], "tokenizer": tokenizer, "max_new_tokens": 9}
    expected = model.generate(**source, **settings)
    assert not torch.equal(expected, unstopped)
    assert torch.equal(exported.generate(**source, **settings), expected)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    first = exported.generate(source["input_ids"][:1], streamer=streamer, **settings)
    assert "".join(streamer) == tokenizer.decode(first[0], skip_special_tokens=True)
    text = "w5 w6 w7"
    string = Text2TextGenerationPipeline(model, tokenizer)(text, max_new_tokens=9)[0]["generated_text"][3:5]
    found, expected = (
        Text2TextGenerationPipeline(each, tokenizer)([text, "w8"], stop_sequence=string, max_new_tokens=9)
        for each in (exported, model)
    )
    assert found == expected and expected[0]["generated_text"].endswith(string)


@pytest.mark.parametrize("device", [None, 0, "cuda", "cpu"])
def test_pipelines_leave_an_export_where_it_is(exported, model, device, monkeypatch):
    tokenizer, text = build_ascii_tokenizer(), "w5 w6 w7"
    expected = Text2TextGenerationPipeline(model, tokenizer)(text, max_new_tokens=5)
    monkeypatch.setattr(pipelines_base, "is_torch_cuda_available", lambda: True)
    pipe = Text2TextGenerationPipeline(exported, tokenizer, **({} if device is None else {"device": device}))
    assert pipe.device.type == "cpu" and pipe(text, max_new_tokens=5) == expected


def test_an_export_stays_where_it_was_loaded(exported):
    assert exported.device == torch.device("cpu") and exported.dtype == torch.float32 and exported.can_generate()
    for unchanged in (exported.to("cpu"), exported.to(torch.float32), exported.to(device=torch.device("cpu"))):
        assert unchanged is exported
    for other in ("cuda", 0, torch.float16):
        with pytest.raises(ValueError, match="from_pretrained"):
            exported.to(other)


def test_the_pipeline_function_takes_an_export_and_refuses_another_tokenizer(exported, model):
    tokenizer = build_ascii_tokenizer()
    options = {"pipeline_class": Text2TextGenerationPipeline, "config": copy.deepcopy(exported.config)}
    pipe = pipeline("text2text-generation", model=exported, tokenizer=tokenizer, **options)
    assert pipe("w5 w6", max_new_tokens=4) == Text2TextGenerationPipeline(model, tokenizer)("w5 w6", max_new_tokens=4)
    with pytest.raises(ValueError, match="`tokenizer`"):
        Text2TextGenerationPipeline(exported, build_tokenizer(90))


def test_ids_of_the_pipeline_end_with_the_first_end_token(exported, model):
    end = model.generate(**build_source(9, 5, 7), max_new_tokens=4)[1, 3].item()
    settings = {"num_beams": 3, "early_stopping": True, "eos_token_id": end, "max_new_tokens": 9}
    pipe = Text2TextGenerationPipeline(exported, build_ascii_tokenizer())
    for record in pipe(["w5 w6 w7", "abcdefg", "w9"], batch_size=3, return_tensors=True, **settings):
        assert end not in record["generated_token_ids"].tolist()[1:-1]


def test_the_configs_are_those_of_the_model(exported, model):
    bookkeeping = dict.fromkeys(("custom_pipelines", "_name_or_path", "architectures", "dtype", "auto_map"))
    assert exported.config.to_dict() | bookkeeping == model.config.to_dict() | bookkeeping
    found, expected = exported.generation_config.to_dict(), model.generation_config.to_dict()
    assert found | {"max_length": None} == expected | {"max_length": None}


# Exports on the Hub


@pytest.fixture
def cached_repository(tmp_path, monkeypatch, folder):
    """A repository in the Hub's cache, as huggingface_hub lays it out: the files are links. Returns a function."""

    def cache(name, **subfolders):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        for path in (repository / "blobs", repository / "refs", snapshot):
            path.mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        for subfolder, source in subfolders.items():
            target = snapshot / subfolder.strip("_")
            target.mkdir(exist_ok=True)
            for path in source.iterdir():
                blob = repository / "blobs" / f"{subfolder}-{path.name}".encode().hex()
                blob.write_bytes(path.read_bytes())
                (target / path.name).symlink_to(os.path.relpath(blob, target))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_an_export_in_the_cache_of_the_hub_is_loaded_by_its_name(cached_repository, model_class, folder, model):
    cached_repository("me/export", _=folder)
    found = model_class.from_pretrained("me/export").generate(**build_source(7, 3), max_new_tokens=5)
    assert torch.equal(found, model.generate(**build_source(7, 3), max_new_tokens=5))
    assert AutoTokenizer.from_pretrained("me/export").get_vocab() == build_ascii_tokenizer().get_vocab()
    loaded, tokenizer = load_export("me/export")
    assert loaded.main_input_name == "input_ids" and tokenizer.get_vocab() == build_ascii_tokenizer().get_vocab()


def test_an_export_in_a_published_repository_is_found_by_name_or_subfolder(
    cached_repository, model_class, folder, ct2_folder, onnx_folder
):
    other, name = (onnx_folder, "onnx") if folder.name == "ctranslate2" else (ct2_folder, "ctranslate2")
    own_name = {"ctranslate2": "onnx", "onnx": "ctranslate2"}[name]
    cached_repository("me/model", **{own_name: folder, name: other})
    for options in ({}, {"subfolder": own_name}):
        assert (
            model_class.from_pretrained("me/model", **options).generate(**build_source(3), max_new_tokens=2).ndim == 2
        )
    with pytest.raises(ValueError, match=f"{name}.* is required"):
        model_class.from_pretrained("me/model", subfolder=name)


def test_what_is_not_an_export_is_refused(model_class, tmp_path):
    with pytest.raises(ValueError, match=MANIFEST):
        model_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        model_class.from_pretrained(tmp_path / "nowhere")
