# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: shapes, limits, routes into `transformers.pipeline`, and what is left behind on disk."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BartConfig,
    BartForConditionalGeneration,
    BatchFeature,
    GenerationConfig,
    ImageTextToTextPipeline,
    LlamaConfig,
    LlamaForCausalLM,
    MBartTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    pipeline,
    pipelines,
)
from transformers.pipelines.pt_utils import KeyDataset

import conftest
from encdec_slm import (
    EncDecSLMConfig,
    EncDecSLMEncoderModel,
    EncDecSLMForConditionalGeneration,
    Text2TextGenerationPipeline,
    restore_text2text_pipelines,
)
from encdec_slm.pipeline_encdec_slm import EncDecVLMPipeline


# Older releases of transformers 5 do not name what they removed.
REMOVED_TASKS = getattr(pipelines, "REMOVED_TASKS", {})
TASK = "text2text-generation"
# transformers looks for stop strings behind the word "abcdef".
WORDS = [f"w{number}" for number in range(89)] + ["abcdef"]
LONG, SHORT = "w1 w2 w3 w4 w5 w6 w7 w8 w9", "w10 w11"
RECOMMENDED = {"prefix": "w20 w21 ", "max_length": 6, "num_beams": 2, "no_such_setting": 1}
TASKS = {
    TASK: "generated_text",
    "summarization": "summary_text",
    "translation": "translation_text",
    "translation_en_to_fr": "translation_text",
}
BART_SIZES = {
    **{"vocab_size": 94, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    "forced_eos_token_id": None,
}
# peft asks the model by a name that transformers is about to drop.
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def build_tokenizer(special=True, **kwargs):
    return conftest.build_tokenizer(words=WORDS, ends_sources=special, **kwargs)


def seeded(model, seed=0):
    """Weights large enough that different sources have different outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def build_model(**kwargs):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "max_position_embeddings": 24}
    return seeded(EncDecSLMForConditionalGeneration(EncDecSLMConfig(vocab_size=94, **sizes, **layers, **kwargs)))


def build_t5(**kwargs):
    sizes = {"vocab_size": 94, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return seeded(T5ForConditionalGeneration(T5Config(**sizes, **ids, **kwargs)))


def build_bart(**kwargs):
    return seeded(BartForConditionalGeneration(BartConfig(**BART_SIZES, **kwargs)))


BUILDERS = {"encdec_slm": build_model, "t5": build_t5, "bart": build_bart}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def pipe(model, tokenizer):
    """New for each test, so that no test sees the settings of another; greedy, 8 tokens at most."""
    return Text2TextGenerationPipeline(model=model, tokenizer=tokenizer, max_new_tokens=8, device="cpu")


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    build_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapted():
    """The tiny model under a LoRA that changes what it writes."""
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear", r=4)
    adapted = peft.get_peft_model(build_model(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return adapted.eval()


@pytest.fixture
def restored():
    """The three tasks, and afterwards transformers as it was."""
    registry = pipelines.PIPELINE_REGISTRY
    before = dict(REMOVED_TASKS), dict(registry.supported_tasks), registry.task_aliases
    restore_text2text_pipelines()
    yield
    REMOVED_TASKS.clear()
    REMOVED_TASKS.update(before[0])
    registry.supported_tasks.clear()
    registry.supported_tasks.update(before[1])
    registry.task_aliases = before[2]


@pytest.fixture
def logged(caplog, monkeypatch):
    """Messages that transformers logs."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def generated(model, tokenizer, text, **kwargs):
    """What `generate` and `decode` say, without a pipeline."""
    output = model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), **kwargs)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


# Shapes


def test_a_string_gives_a_list_and_a_list_gives_one_result_per_source(pipe, model, tokenizer):
    long, short = (generated(model, tokenizer, text, max_length=9)[0] for text in (LONG, SHORT))
    assert long != short
    assert pipe(LONG) == [{"generated_text": long}]
    assert pipe([LONG, SHORT]) == [{"generated_text": long}, {"generated_text": short}]
    assert pipe((LONG, SHORT)) == pipe([LONG, SHORT])
    assert pipe([LONG]) == [{"generated_text": long}]


def test_several_sequences_per_source_come_as_one_list_per_source(pipe, model, tokenizer):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = [generated(model, tokenizer, text, max_length=9, **beams) for text in (LONG, SHORT)]
    expected = [[{"generated_text": text} for text in texts] for texts in expected]
    assert pipe(LONG, **beams) == expected[0]
    assert pipe([LONG, SHORT], **beams) == expected
    assert pipe([LONG, SHORT], batch_size=2, **beams) == expected


def test_generators_and_datasets_give_an_iterator_over_what_each_source_alone_gives(pipe):
    expected = [pipe(LONG), pipe(SHORT)]
    rows = datasets.Dataset.from_dict({"source": [LONG, SHORT]})
    assert list(pipe(text for text in (LONG, SHORT))) == expected
    assert list(pipe(KeyDataset(rows, "source"), batch_size=2)) == expected
    assert pipe(rows["source"]) == [result[0] for result in expected]


def test_a_generator_is_read_only_as_far_as_results_are_taken(pipe):
    read = []
    results = pipe(read.append(text) or text for text in (LONG, SHORT, LONG))
    next(iter(results))
    assert len(read) == 1


def test_nothing_in_gives_nothing_out(pipe):
    empty = datasets.Dataset.from_dict({"source": []})
    assert pipe([]) == [] and pipe(()) == []
    assert list(pipe(text for text in ())) == [] and list(pipe(KeyDataset(empty, "source"))) == []


@pytest.mark.parametrize("name", BUILDERS)
def test_a_batch_gives_what_its_sources_give_alone(name, tokenizer):
    pipe = Text2TextGenerationPipeline(BUILDERS[name](), tokenizer, max_new_tokens=8, device="cpu")
    texts = [LONG, SHORT, "", "w30 w31 w32"]
    alone = [pipe(text, return_tensors=True, return_text=True)[0] for text in texts]
    assert len({result["generated_text"] for result in alone}) > 1
    together = pipe(texts, batch_size=3, return_tensors=True, return_text=True)
    assert [result["generated_text"] for result in together] == [result["generated_text"] for result in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one["generated_token_ids"], other["generated_token_ids"])


def test_token_ids_come_instead_of_the_text_or_beside_it(pipe, model, tokenizer):
    (ids_only,) = pipe(SHORT, return_tensors=True)
    (both,) = pipe(SHORT, return_tensors=True, return_text=True)
    assert list(ids_only) == ["generated_token_ids"] and isinstance(ids_only["generated_token_ids"], torch.Tensor)
    assert both["generated_text"] == tokenizer.decode(ids_only["generated_token_ids"], skip_special_tokens=True)
    with pytest.raises(ValueError, match="both False"):
        pipe(SHORT, return_text=False)


@pytest.mark.parametrize("padding", ["of its own", "one of two ends", "the only end"])
def test_token_ids_of_a_batch_end_where_the_text_ends(padding, pipe):
    """One source ends its text early, the other never does."""
    first, other = (pipe(text, return_tensors=True)[0]["generated_token_ids"].tolist() for text in (LONG, SHORT))
    end = next(token for token in first[1:] if token not in other)
    ends = {"of its own": ([2, end], 0), "one of two ends": ([2, end], 2), "the only end": ([end], end)}[padding]
    settings = {"eos_token_id": ends[0], "pad_token_id": ends[1], "return_tensors": True}
    for results in (pipe([LONG, SHORT], **settings), pipe([LONG, SHORT], batch_size=2, **settings)):
        rows = [result["generated_token_ids"].tolist() for result in results]
        assert rows == [first[: first.index(end) + 1], other]


# Generation


def test_arguments_of_generate_hold_for_one_call_or_for_all(model, tokenizer):
    pipe = Text2TextGenerationPipeline(model, tokenizer, num_beams=2, max_new_tokens=3, device="cpu")
    assert pipe(LONG)[0]["generated_text"] == generated(model, tokenizer, LONG, num_beams=2, max_length=4)[0]
    longer = generated(model, tokenizer, LONG, num_beams=2, max_length=7)[0]
    assert pipe(LONG, max_new_tokens=6)[0]["generated_text"] == longer
    config = GenerationConfig(max_new_tokens=2)
    assert (
        pipe(LONG, generation_config=config)[0]["generated_text"] == generated(model, tokenizer, LONG, max_length=3)[0]
    )
    with pytest.raises(ValueError, match="no_such_argument"):
        pipe(LONG, no_such_argument=1)


def test_a_model_keeps_its_own_limit_without_a_warning(model, tokenizer, logged):
    limited = copy.deepcopy(model)
    limited.generation_config.max_length = 11
    settings = {"return_tensors": True, "suppress_tokens": [0, 2], "device": "cpu"}
    for model_, length in ((model, 24), (limited, 11)):
        pipe = Text2TextGenerationPipeline(model_, tokenizer, **settings)
        assert len(pipe(LONG)[0]["generated_token_ids"]) == length
        assert len(pipe(LONG, max_length=5)[0]["generated_token_ids"]) == 5
    assert logged() == []


@pytest.mark.parametrize(("name", "length"), [("t5", 257), ("bart", 16)])
def test_a_model_without_a_limit_stops_after_256_tokens_or_its_last_position(name, length, tokenizer, logged):
    settings = {"return_tensors": True, "suppress_tokens": [0, 2], "device": "cpu"}
    pipe = Text2TextGenerationPipeline(BUILDERS[name](), tokenizer, **settings)
    assert len(pipe(SHORT)[0]["generated_token_ids"]) == length
    assert len(pipe(SHORT, max_length=7)[0]["generated_token_ids"]) == 7
    assert len(pipe(SHORT, max_new_tokens=4)[0]["generated_token_ids"]) == 5
    assert logged() == []


def test_generate_may_return_its_dictionary(pipe):
    assert pipe(LONG, return_dict_in_generate=True, output_scores=True) == pipe(LONG)


def test_a_stop_sequence_ends_the_text(pipe):
    words = pipe(LONG)[0]["generated_text"].split()
    stop = next(word for word in words if word != words[0])
    assert pipe(LONG, stop_sequence=stop)[0]["generated_text"].split() == words[: words.index(stop) + 1]


def test_a_streamer_receives_the_text_and_refuses_batches(pipe, tokenizer):
    received = []

    class Collector(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            received.append(text)

    streamer = Collector(tokenizer, skip_special_tokens=True)
    text = pipe(LONG, streamer=streamer)[0]["generated_text"]
    assert "".join(received).strip() == text
    with pytest.raises(ValueError, match="batch size 1"):
        pipe([LONG, SHORT], streamer=streamer, batch_size=2)


# Input that is refused


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [(4, "int"), (None, "NoneType"), (b"w1", "bytes"), ({"text": LONG}, "dict"), (torch.ones(1, 2), "Tensor")],
)
def test_a_source_that_is_not_text_is_a_type_error(pipe, inputs, kind):
    with pytest.raises(TypeError, match=f"`inputs` .*{kind}"):
        pipe(inputs)
    with pytest.raises(TypeError, match=rf"`inputs\[1\]` .*{kind}"):
        pipe([LONG, inputs])
    with pytest.raises(TypeError, match=kind):
        list(pipe(item for item in (LONG, inputs)))


def test_a_whole_dataset_is_a_type_error(pipe):
    with pytest.raises(TypeError, match="KeyDataset"):
        pipe(datasets.Dataset.from_dict({"source": [LONG]}))


@pytest.mark.parametrize(
    ("name", "model_max_length", "limit"),
    [
        ("encdec_slm", None, 24),
        ("encdec_slm", 12, 12),
        ("bart", None, 16),
        ("t5", 12, 12),
    ],
)
def test_a_long_source_is_cut_only_when_asked(name, model_max_length, limit):
    length = {} if model_max_length is None else {"model_max_length": model_max_length}
    tokenizer, model = build_tokenizer(**length), BUILDERS[name]()
    pipe = Text2TextGenerationPipeline(model, tokenizer, max_new_tokens=4, device="cpu")
    fits, too_long = WORDS[: limit - 1], WORDS[:30]
    for refused in ({}, {"truncation": False}, {"truncation": "do_not_truncate"}):
        with pytest.raises(ValueError, match=f"31 .*{limit}.*truncation=True"):
            pipe(" ".join(too_long), **refused)
    assert pipe(" ".join(too_long), truncation=True) == pipe(" ".join(fits))
    assert pipe([" ".join(too_long), SHORT], truncation=True, batch_size=2)[0] == pipe(" ".join(fits))[0]


def test_a_model_and_a_tokenizer_without_a_limit_read_any_length(tokenizer, logged):
    pipe = Text2TextGenerationPipeline(build_t5(), tokenizer, max_new_tokens=2, device="cpu")
    source = " ".join(WORDS * 7)
    assert pipe(source) == pipe(source, truncation=True)
    assert logged() == []


def test_an_empty_source_is_read_as_an_end_of_text(model, tokenizer, pipe):
    bare = Text2TextGenerationPipeline(model, build_tokenizer(special=False), max_new_tokens=8, device="cpu")
    assert bare("") == pipe("")
    assert bare(["", SHORT], batch_size=2)[0] == pipe("")[0]
    silent = build_tokenizer(special=False, eos_token=None)
    with pytest.raises(ValueError, match="eos_token"):
        Text2TextGenerationPipeline(model, silent, device="cpu")("")


@pytest.mark.parametrize("name", BUILDERS)
def test_a_tokenizer_with_more_ids_than_the_model_is_named(name):
    tokenizer = build_tokenizer(special=False)
    tokenizer.add_tokens(["added"])
    pipe = Text2TextGenerationPipeline(BUILDERS[name](), tokenizer, device="cpu", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"94.* 93"):
        pipe("w1 added")
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ValueError, match=r"95.* 93"):
        pipe([LONG, SHORT], batch_size=2)


def test_a_batch_needs_a_padding_token(model):
    pipe = Text2TextGenerationPipeline(model, build_tokenizer(pad_token=None), device="cpu", max_new_tokens=2)
    assert len(pipe([LONG, SHORT])) == 2
    with pytest.raises(ValueError, match="pad_token"):
        pipe([LONG, SHORT], batch_size=2)


def test_models_that_do_not_generate_from_a_source_are_refused(model, tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder_only = LlamaForCausalLM(LlamaConfig(vocab_size=94, **sizes))
    for unfit in (decoder_only, EncDecSLMEncoderModel(model.config)):
        with pytest.raises(ValueError, match=type(unfit).__name__):
            Text2TextGenerationPipeline(unfit, tokenizer)
    with pytest.raises(ValueError, match="`tokenizer`"):
        Text2TextGenerationPipeline(model)


# What a config recommends for a task


@pytest.mark.parametrize(
    ("task", "key"), [("summarization", "summary_text"), ("translation_en_to_de", "translation_text")]
)
def test_a_task_names_its_output_and_applies_what_the_config_recommends(task, key, tokenizer, logged):
    model = build_t5(task_specific_params={task: RECOMMENDED})
    config = model.config.to_dict()
    pipe = Text2TextGenerationPipeline(model, tokenizer, task=task, device="cpu")
    sources = [f"w20 w21 {text}" for text in (LONG, SHORT)]
    expected = [generated(model, tokenizer, text, max_length=6, num_beams=2)[0] for text in sources]
    assert pipe([LONG, SHORT], batch_size=2) == [{key: text} for text in expected]
    shorter = generated(model, tokenizer, sources[0], max_length=4, num_beams=1)[0]
    assert pipe(LONG, max_new_tokens=3, num_beams=1) == [{key: shorter}]
    assert pipe(LONG, generation_config=GenerationConfig(max_length=4)) == [{key: shorter}]
    assert logged() == [] and model.config.to_dict() == config


def test_a_prefix_of_the_config_stands_before_every_source(tokenizer):
    plain, prefixed = (
        Text2TextGenerationPipeline(build_t5(**extra), tokenizer, max_new_tokens=8, device="cpu")
        for extra in ({}, {"prefix": "w20 w21 "})
    )
    assert prefixed([LONG, SHORT]) == plain([f"w20 w21 {LONG}", f"w20 w21 {SHORT}"]) != plain([LONG, SHORT])


def test_tokenizers_that_mark_languages_get_them_from_the_call_or_the_task():
    tokenizer = MBartTokenizer()
    model = seeded(BartForConditionalGeneration(BartConfig(**{**BART_SIZES, "vocab_size": len(tokenizer)})))
    settings = {"max_new_tokens": 4, "device": "cpu", "return_tensors": True}
    pipe = Text2TextGenerationPipeline(model, tokenizer, task="translation", **settings)
    french, german = tokenizer.convert_tokens_to_ids(["fr_XX", "de_DE"])
    results = pipe(["a", "b a"], src_lang="en_XX", tgt_lang="fr_XX", batch_size=2)
    assert [result["translation_token_ids"][1] for result in results] == [french, french]
    assert pipe.preprocess("a", src_lang="ro_RO", tgt_lang="fr_XX")["input_ids"][0, -1] == (
        tokenizer.convert_tokens_to_ids("ro_RO")
    )
    with pytest.raises(ValueError, match="requires a `src_lang` and a `tgt_lang`"):
        pipe("a")
    named = Text2TextGenerationPipeline(model, tokenizer, task="translation_en_XX_to_de_DE", **settings)
    assert named("a")[0]["translation_token_ids"][1] == german


# Routes into `transformers.pipeline`


def test_importing_the_package_restores_no_task(model, tokenizer):
    for task in (TASK, "summarization", "translation", "translation_en_to_fr"):
        with pytest.raises(KeyError, match=r"has been removed|Unknown task"):
            pipeline(task, model=model, tokenizer=tokenizer)
    assert not hasattr(Text2TextGenerationPipeline, "_registered_impl")


def test_naming_the_class_needs_no_trust(folder, pipe):
    named = pipeline(TASK, str(folder), pipeline_class=Text2TextGenerationPipeline, max_new_tokens=8, device="cpu")
    assert type(named) is Text2TextGenerationPipeline and named.task == TASK
    assert named(LONG) == pipe(LONG)


def test_without_the_class_transformers_asks_for_trust(folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline(TASK, str(folder))


@pytest.mark.parametrize("name", BUILDERS)
def test_restored_tasks_take_any_encoder_decoder(name, tokenizer, restored):
    model = BUILDERS[name]()
    plain = Text2TextGenerationPipeline(model, tokenizer, max_new_tokens=8, device="cpu")(LONG)[0]["generated_text"]
    for task, key in TASKS.items():
        pipe = pipeline(task, model=model, tokenizer=tokenizer, max_new_tokens=8, device="cpu")
        assert type(pipe) is Text2TextGenerationPipeline and pipe.task == task
        assert pipe(LONG) == [{key: plain}]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_restored_pipeline_saves_a_folder_that_asks_for_no_code(name, tokenizer, restored, tmp_path):
    settings = {"max_new_tokens": 8, "device": "cpu"}
    pipe = pipeline("summarization", model=BUILDERS[name](), tokenizer=tokenizer, **settings)
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert pipeline("summarization", model=str(tmp_path), **settings)(LONG) == pipe(LONG)


def test_restoring_again_changes_nothing(restored, logged):
    registry = pipelines.PIPELINE_REGISTRY
    before = dict(registry.supported_tasks), registry.task_aliases, dict(REMOVED_TASKS)
    restore_text2text_pipelines()
    assert (registry.supported_tasks, registry.task_aliases, REMOVED_TASKS) == before
    assert registry.task_aliases is before[1] and logged() == []


def test_restoring_leaves_the_other_tasks_alone(restored):
    assert pipelines.check_task("ner")[0] == "token-classification"
    for task in ("question-answering", "vqa"):
        with pytest.raises(KeyError, match=r"has been removed|Unknown task"):
            pipelines.check_task(task)
    for task in ("translation_en", "no-such-task"):
        with pytest.raises(KeyError, match="Unknown task"):
            pipelines.check_task(task)


def test_a_transformers_without_a_registry_is_refused(monkeypatch):
    monkeypatch.delattr(pipelines, "PIPELINE_REGISTRY")
    with pytest.raises(RuntimeError, match="transformers"):
        restore_text2text_pipelines()


@PEFT_WARNS
def test_a_peft_model_generates_through_its_adapter(adapted, tokenizer, pipe):
    through_adapter = Text2TextGenerationPipeline(adapted, tokenizer, max_new_tokens=8, device="cpu")(LONG)
    assert through_adapter[0]["generated_text"] == generated(adapted, tokenizer, LONG, max_length=9)[0]
    assert through_adapter != pipe(LONG)


def test_one_config_serves_many_pipelines(folder, tokenizer, pipe):
    config = EncDecSLMConfig.from_pretrained(folder)
    before = config.to_json_string()
    settings = {"pipeline_class": Text2TextGenerationPipeline, "max_new_tokens": 8, "device": "cpu"}
    model = EncDecSLMForConditionalGeneration.from_pretrained(folder, config=config)
    for _ in range(2):
        assert pipeline(TASK, str(folder), config=config, **settings)(LONG) == pipe(LONG)
        assert pipeline(TASK, model, config=model.config, tokenizer=tokenizer, **settings)(LONG) == pipe(LONG)
    assert config.to_json_string() == before


def test_a_restored_task_needs_no_trust_for_a_folder_of_this_family(folder, pipe, restored):
    settings = {"max_new_tokens": 8, "device": "cpu"}
    for options in ({"task": TASK}, {"task": TASK, "trust_remote_code": True}, {"trust_remote_code": True}):
        local = pipeline(model=str(folder), **options, **settings)
        assert type(local) is Text2TextGenerationPipeline and local.task == TASK
        assert local(LONG) == pipe(LONG)
    assert pipeline("summarization", str(folder), **settings)(LONG) == [
        {"summary_text": pipe(LONG)[0]["generated_text"]}
    ]


# Saving, and processes without the package


def test_a_saved_pipeline_is_a_folder_that_loads_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["custom_pipelines"][TASK]["impl"] == "pipeline_encdec_slm.Text2TextGenerationPipeline"
    assert (tmp_path / "pipeline_encdec_slm.py").is_file()
    loaded = pipeline(TASK, str(tmp_path), pipeline_class=Text2TextGenerationPipeline, max_new_tokens=8, device="cpu")
    assert loaded(LONG) == pipe(LONG)


FRESH_PROCESS = """
import json, sys
from pathlib import Path

class PackageIsNotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "encdec_slm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, PackageIsNotInstalled())

import torch
from transformers import pipeline

torch.set_num_threads(1)
TASK, HUB_ID = "text2text-generation", "someone/tiny"
SETTINGS = {"max_new_tokens": 8, "device": "cpu"}
folder, adapter, sources = json.loads(sys.argv[1])
results = {}

def run(name, *args, **kwargs):
    pipe = pipeline(*args, **SETTINGS, trust_remote_code=True, **kwargs)
    assert type(pipe).__module__.startswith("transformers_modules."), type(pipe)
    assert pipe.task == TASK
    results[name] = pipe(sources, batch_size=2)
    return pipe

pipe = run("path", TASK, folder)
pipe.save_pretrained("again")
json.loads(Path("again/config.json").read_text())
run("saved again", TASK, "again")
run("inferred task", model=folder)
run("hub id", TASK, HUB_ID)
run("adapter", TASK, adapter)
for task, options in (("summarization", {"trust_remote_code": True}), (TASK, {"trust_remote_code": False})):
    try:
        pipeline(task, folder, **options)
    except (KeyError, ValueError) as error:
        results[task] = str(error)
try:
    pipe(4)
except TypeError as error:
    results["int"] = str(error)
print("RESULTS" + json.dumps(results))
"""


@PEFT_WARNS
def test_folders_hub_ids_and_adapters_work_where_the_package_is_not_installed(
    folder, adapted, pipe, tokenizer, tmp_path
):
    adapter, empty, hub = tmp_path / "adapter", tmp_path / "empty", tmp_path / "hub/models--someone--tiny"
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(adapter)
    empty.mkdir()
    shutil.copytree(folder, hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text(COMMIT)
    sources = [LONG, SHORT]
    fresh = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS, json.dumps([str(folder), str(adapter), sources])],
        cwd=empty,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"} | {"HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert fresh.returncode == 0, fresh.stderr
    results = json.loads(fresh.stdout.partition("RESULTS")[2])
    expected = pipe(sources)
    assert all(results[route] == expected for route in ("path", "saved again", "inferred task", "hub id"))
    through_adapter = Text2TextGenerationPipeline(adapted, tokenizer, max_new_tokens=8, device="cpu")
    assert results["adapter"] == through_adapter(sources) != expected
    assert "summarization" in results["summarization"] and "trust_remote_code=True" in results[TASK]
    assert "is of type int" in results["int"]


# Images


@pytest.fixture(scope="module")
def vision(vision_folder):
    """A model and its processor, whose chat template changes the question."""
    processor = AutoProcessor.from_pretrained(vision_folder)
    processor.chat_template = "Q: {{ messages[0]['content'][-1]['text'] }} <image>"
    return AutoModelForImageTextToText.from_pretrained(vision_folder).eval(), processor


@pytest.fixture
def pictures(tmp_path):
    """A transparent and a 16-bit picture, as files, and what they look like."""
    Image.new("RGBA", (20, 10), (255, 0, 0, 90)).save(tmp_path / "transparent.png")
    Image.fromarray(np.full((10, 20), 90 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    colors = {"transparent.png": (255, 165, 165), "deep.png": (90, 90, 90)}
    return {str(tmp_path / name): Image.new("RGB", (20, 10), color) for name, color in colors.items()}


def seen(pipe):
    """The inputs of the model in each later call of a pipeline."""
    calls = []
    pipe.model.model.encoder.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def image_pipelines(vision, folder):
    model, processor = vision
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    yield pipeline("image-text-to-text", model=str(folder))
    yield pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    yield pipeline("image-text-to-text", model=copy.deepcopy(model), processor=processor)


def test_every_image_pipeline_reads_pixels_and_prompts_as_the_processor(vision, pictures, tmp_path):
    options = {"max_new_tokens": 2, "return_full_text": False}
    for pipe in image_pipelines(vision, tmp_path / "model"):
        calls = seen(pipe)
        for path, plain in pictures.items():
            expected = vision[1].encode_questions("What?", plain, return_tensors="pt")
            chat = [{"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "What?"}]}]
            with Image.open(path) as opened:
                results = [
                    pipe(images=path, text="What?", **options),
                    pipe(images=opened, text="What?", **options),
                    pipe(images=[path], text=["What?"], **options),
                    pipe(text=chat, **options),
                ]
            assert len({result[0]["generated_text"] for result in results}) == 1
            for call in calls:
                assert torch.equal(call["input_ids"], expected["input_ids"])
                torch.testing.assert_close(call["pixel_values"], expected["pixel_values"])
            calls.clear()


def test_questions_about_images_are_refused_or_cut_when_they_are_too_long(vision, pictures):
    pipe = pipeline("image-text-to-text", model=vision[0], processor=vision[1], max_new_tokens=2)
    path, limit = next(iter(pictures)), vision[0].config.text_config.max_position_embeddings
    question = "word " * limit
    chat = [{"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": question}]}]
    calls = seen(pipe)
    for inputs in ({"images": path, "text": question}, {"text": chat}):
        with pytest.raises(ValueError, match=f"{limit}.*truncation"):
            pipe(**inputs)
        pipe(**inputs, truncation=True)
        assert limit - 4 <= calls[-1]["input_ids"].shape[1] <= limit


def test_image_pipelines_of_other_families_are_transformers_own():
    assert issubclass(EncDecVLMPipeline, ImageTextToTextPipeline)
    pipe = EncDecVLMPipeline.__new__(EncDecVLMPipeline)
    pipe.processor = lambda **inputs: BatchFeature(inputs)
    pipe.model = torch.nn.Linear(1, 1)
    inputs = {"images": Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "text": "What?"}
    assert pipe.preprocess(inputs)["images"].getpixel((0, 0)) == (0, 0, 0)
