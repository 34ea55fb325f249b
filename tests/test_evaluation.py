# SPDX-License-Identifier: Apache-2.0
"""Evaluations on every task from local rows: predictions, results, resuming, and errors."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from encdec_slm.checkpoints import load_checkpoint, lock_folder
from encdec_slm.conversion import question_answering_prompt
from encdec_slm.run_results import DataSource, RunResults
from encdec_slm.trainers.evaluation import evaluate_checkpoint, list_tasks
from encdec_slm.trainers.evaluation import tasks as tasks_module
from encdec_slm.trainers.evaluation.generation import AnswerGenerator
from encdec_slm.trainers.evaluation.shell_metrics import parse_command
from encdec_slm.trainers.evaluation.task_rows import load_examples
from encdec_slm.trainers.evaluation.tasks import Example, find_task


ROWS = [{"source": f"def f{number}(): return {number * 'x'}", "target": f"Return {number}."} for number in range(11)]
QUIET = {"device": "cpu", "show_progress": False, "num_bootstrap": 20, "max_new_tokens": 6}
SQUAD = [
    {"question": "Who is it?", "context": "It is I.", "answers": {"text": ["I", "I."], "answer_start": [6, 6]}},
    {"question": "Where?", "context": "It is I.", "answers": {"text": [], "answer_start": []}},
]
CODE = [{"code": "secret", "code_tokens": ["def", "f", "(", "\n"], "docstring_tokens": ["Does", "it", "."]}]
PEOPLE = [*["cat"] * 6, *["dog"] * 4]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_predictions(folder):
    lines = (Path(folder) / "predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts_in(folder):
    return [row["prediction"] for row in read_predictions(folder)]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def finished(text_folder, rows_file, tmp_path_factory):
    """The results of a run over all rows, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    return evaluate_checkpoint(text_folder, "text", dataset_name=rows_file, output_dir=folder, **QUIET), folder


@pytest.fixture
def pictures(tmp_path):
    """Rows whose images lie beside the file of the rows."""
    rows = []
    for number in range(3):
        PILImage.new("RGB", (20 + number, 16), (80 * number, 9, 9)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what is it?", "answers": PEOPLE, "answer": "cat"})
    return write_rows(tmp_path / "pictures.jsonl", rows)


# Results


def test_results_describe_what_was_measured_and_by_which_command(finished):
    results, folder = finished
    assert RunResults.load(folder / "evaluation.json") == results
    assert results.task == "text" and results.num_rows == {"test": 11} and results.num_cut_rows == {"test": 0}
    assert results.saved.name == "text" and results.device == "cpu" and results.confidence == 0.95
    assert results.dataset == DataSource("rows.jsonl") and {"python", "torch"} <= set(results.versions)
    assert set(results.saved.metrics) == {"rouge1", "rouge2", "rougeL", "exact"}
    for metric in results.saved.metrics.values():
        assert metric.low <= metric.value <= metric.high and metric.unit == "percent"
    words = shlex.split(results.command)
    assert words[:6] == ["encdec-slm", "evaluate", "--model", "text", "--task", "text"]
    assert words[words.index("--dataset-name") + 1] == "rows.jsonl" and "--max-new-tokens" in words
    assert not any(word.startswith("/") for word in words)


def test_predictions_are_saved_with_their_rows(finished):
    _, folder = finished
    rows = read_predictions(folder)
    assert [row["row"] for row in rows] == list(range(11))
    assert [(row["source"], row["references"]) for row in rows] == [(row["source"], [row["target"]]) for row in ROWS]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_batch_gives_the_same_answers_as_its_rows(
    text_folder, vision_folder, rows_file, pictures, tmp_path, num_beams
):
    for folder, task, rows in ((text_folder, "text", rows_file), (vision_folder, "vqav2", pictures)):
        for batch_size in (1, 8):
            options = {"batch_size": batch_size, "output_dir": tmp_path / f"{task}{batch_size}", **QUIET}
            evaluate_checkpoint(folder, task, dataset_name=rows, num_beams=num_beams, **options)
        assert texts_in(tmp_path / f"{task}1") == texts_in(tmp_path / f"{task}8")
    assert len(set(texts_in(tmp_path / "text1"))) > 1


# Generation settings


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 5},
        {"max_new_tokens": 4, "num_beams": 3},
        {"no_repeat_ngram_size": 1, "max_length": 9},
        {"max_length": 9, "stop_strings": [")"], "return_dict_in_generate": True, "prompt_lookup_num_tokens": 2},
    ],
)
def test_an_evaluation_measures_what_the_checkpoint_generates(text_folder, rows_file, tmp_path, settings):
    model, tokenizer = load_checkpoint(text_folder)
    model.generation_config.update(**settings)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = {"device": "cpu", "show_progress": False, "num_bootstrap": 5, "output_dir": tmp_path / "out"}
    results = evaluate_checkpoint(tmp_path / "model", "text", dataset_name=rows_file, **options)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for row, text in zip(ROWS, texts_in(tmp_path / "out"), strict=True):
        inputs = tokenizer(row["source"], return_tensors="pt")
        ids = model.generate(**inputs, tokenizer=tokenizer, return_dict_in_generate=False)
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == text
    assert results.settings["overridden"] == {}


def test_settings_that_the_evaluation_overrides_are_reported(finished, text_folder, rows_file, caplog):
    model, tokenizer = load_checkpoint(text_folder)
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=3, max_length=9, num_beams=2)
    options = {**QUIET, "num_beams": 1}
    results = evaluate_checkpoint(model, "text", dataset_name=rows_file, processing_class=tokenizer, **options)
    assert results.settings["overridden"] == {"do_sample": True, "num_beams": 2, "max_new_tokens": 8}
    assert "max_new_tokens=8" in caplog.text
    assert model.generation_config.do_sample and model.generation_config.max_length == 9
    assert results.saved.metrics == finished[0].saved.metrics
    with pytest.raises(ValueError, match="processing_class"):
        evaluate_checkpoint(model, "text", dataset_name=rows_file, **QUIET)


# PEFT 0.21 reads a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_evaluated(finished, text_folder, rows_file, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_checkpoint(text_folder)
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "adapter")
    options = {"dataset_name": rows_file, **QUIET}
    for checkpoint, name in ((tmp_path / "adapter", "saved"), (model, "loaded")):
        out = tmp_path / name
        evaluate_checkpoint(checkpoint, "text", output_dir=out, processing_class=tokenizer, **options)
    assert texts_in(tmp_path / "saved") == texts_in(tmp_path / "loaded") != texts_in(finished[1])


@pytest.mark.parametrize("emoji", ["", "🙂"])
def test_long_sources_are_truncated_in_their_text(text_folder, emoji):
    model, tokenizer = load_checkpoint(text_folder)
    long = "word " * 400
    generator = AnswerGenerator(model, tokenizer, max_source_length=40)
    example = Example(long + emoji, ("a",), before="Question: ", after=f" {emoji}Answer:")
    source = generator._encode(example)
    text = tokenizer.decode(source.input_ids, skip_special_tokens=True)
    assert source.is_cut and len(source.input_ids) <= 40
    assert text.startswith("Question: word") and text.endswith("Answer:")
    assert AnswerGenerator(model, tokenizer).max_source_length == 512


def test_long_questions_keep_their_images(vision_folder):
    model, processor = load_checkpoint(vision_folder)
    picture = PILImage.new("RGB", (16, 16))
    examples = [Example(text, ("a",), images=lambda: [picture]) for text in ("what " * 99, "what?")]
    num_image_tokens = processor.image_processor.num_image_tokens(16, 16)
    limit = num_image_tokens + 100  # the chat template has 85 tokens
    generator = AnswerGenerator(model, processor, max_source_length=limit)
    long, short = map(generator._encode, examples)
    assert (long.is_cut, short.is_cut) == (True, False) and len(long.input_ids) <= limit
    for source in (long, short):
        assert source.input_ids.count(model.config.image_token_id) == num_image_tokens


@pytest.mark.parametrize("question", ["what?", "is <image> red?", "typed <image> twice <image>", "long " * 90])
@pytest.mark.parametrize("has_own_template", [False, True])
def test_questions_are_encoded_as_by_pipelines_and_the_page(vision_folder, question, has_own_template):
    model, processor = load_checkpoint(vision_folder)
    if has_own_template:
        processor.chat_template = (
            "{% for message in messages %}Q:{% for part in message.content %}{{ part.text or '<image>' }}{% endfor %}"
            "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
        )
    picture = PILImage.new("RGBA", (16, 16))
    source = AnswerGenerator(model, processor, max_source_length=200)._encode(
        Example(question, ("a",), images=lambda: [picture])
    )
    expected = processor.encode_questions(question, picture, truncation=True, max_length=200, return_tensors="pt")
    assert source.input_ids == expected["input_ids"][0].tolist()
    torch.testing.assert_close(source.image_inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=0)


# Resuming


def test_an_interrupted_run_is_resumed(finished, text_folder, rows_file, tmp_path, monkeypatch):
    complete, folder = finished
    options = {"dataset_name": rows_file, "output_dir": tmp_path, **QUIET}
    generate = AnswerGenerator.generate

    def interrupted(self, examples):
        if examples[0].source == ROWS[4]["source"]:
            raise KeyboardInterrupt
        return generate(self, examples)

    monkeypatch.setattr(AnswerGenerator, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(text_folder, "text", batch_size=2, **options)
    assert len(texts_in(tmp_path)) == 4 and not (tmp_path / "evaluation.json").exists()
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"row": 4, "source": "def f4')  # interrupted within a line
    read = []
    monkeypatch.setattr(
        AnswerGenerator, "generate", lambda self, examples: (read.extend(examples), generate(self, examples))[1]
    )
    results = evaluate_checkpoint(text_folder, "text", batch_size=3, **options)
    assert [example.source for example in read] == [row["source"] for row in ROWS[4:]]
    assert (tmp_path / "predictions.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()
    assert results.saved.metrics == complete.saved.metrics
    monkeypatch.setattr(AnswerGenerator, "generate", None)  # nothing is left to generate
    assert evaluate_checkpoint(text_folder, "text", **options).saved.metrics == complete.saved.metrics


def test_predictions_of_another_run_are_not_continued(finished, text_folder, rows_file):
    _, folder = finished
    before = (folder / "predictions.jsonl").read_bytes()
    options = {"dataset_name": rows_file, "output_dir": folder, **QUIET}
    for task, change, named in (
        ("text", {"max_new_tokens": 7}, "`max_new_tokens` was 6 and is 7"),
        ("text", {"num_beams": 2}, "`num_beams` was 1 and is 2"),
        ("docstrings", {}, "`task` was 'text' and is 'docstrings'"),
        ("text", {"max_samples": 5}, "`data` was"),
    ):
        with pytest.raises(ValueError, match=named):
            evaluate_checkpoint(text_folder, task, **{**options, **change})
    model, tokenizer = load_checkpoint(text_folder)
    with torch.no_grad():
        model.model.decoder.norm.weight[0] += 1
    with pytest.raises(ValueError, match="`model` was"):
        evaluate_checkpoint(model, "text", processing_class=tokenizer, **options)
    assert (folder / "predictions.jsonl").read_bytes() == before


def test_other_files_are_not_overwritten(text_folder, rows_file, tmp_path):
    options = {"dataset_name": rows_file, **QUIET}
    (tmp_path / "predictions.jsonl").write_text('{"source": "a"}\n')
    with pytest.raises(ValueError, match=r"evaluation_run\.json"):
        evaluate_checkpoint(text_folder, "text", output_dir=tmp_path, **options)
    with pytest.raises(ValueError, match="output_dir"):
        evaluate_checkpoint(text_folder, "text", output_dir=rows_file, **options)
    for name in ("evaluation.json", "evaluation_run.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text('{"of": "another program"}')
        with pytest.raises(ValueError, match=name):
            evaluate_checkpoint(text_folder, "text", output_dir=tmp_path / name, **options)
        assert (tmp_path / name / name).read_text() == '{"of": "another program"}'
    (tmp_path / "own").mkdir()
    with lock_folder(tmp_path / "own"), pytest.raises(ValueError, match="Another process"):
        evaluate_checkpoint(text_folder, "text", output_dir=tmp_path / "own", **options)
    evaluate_checkpoint(text_folder, "text", output_dir=tmp_path / "own", **options)
    path = tmp_path / "own" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"row": 3', '"row": 5'))
    with pytest.raises(ValueError, match="line 4"):
        evaluate_checkpoint(text_folder, "text", output_dir=tmp_path / "own", **options)


# Tasks and rows


def test_the_documented_tasks_exist():
    built_in = ["text", "docstrings", "digits", "charts", "lines"]
    on_the_hub = ["squad_v2", "xsum", "code_x_glue_ct_code_to_text", "vqav2", "textvqa", "chartqa"]
    assert set(list_tasks()) >= {*built_in, *on_the_hub}


def test_squad_contexts_are_truncated_in_the_prompt_of_the_family(text_folder, tmp_path):
    long = {"question": "Who?", "context": "It is I who am it, who is it. " * 9, "answers": ["I"]}
    path = write_rows(tmp_path / "squad.jsonl", [*SQUAD, long])
    options = {"dataset_name": path, "output_dir": tmp_path / "out", "max_source_length": 150, **QUIET}
    results = evaluate_checkpoint(text_folder, "squad_v2", **options)
    rows = read_predictions(tmp_path / "out")
    assert [row["references"] for row in rows] == [["I", "I."], [], ["I"]]
    assert rows[0]["source"] == question_answering_prompt("Who is it?", "It is I.")
    assert [row["is_cut"] for row in rows] == [False, False, True] and results.num_cut_rows == {"test": 1}
    metrics = results.saved.metrics
    assert set(metrics) == {f"{kind}{name}" for kind in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")}
    assert (metrics["f1"].num_rows, metrics["HasAns_f1"].num_rows) == (None, 2)


def test_code_is_read_from_tokens_because_code_can_contain_its_docstring(tmp_path):
    path = write_rows(tmp_path / "code.jsonl", CODE)
    (example,) = load_examples("code", find_task("code_x_glue_ct_code_to_text"), dataset_name=str(path))
    assert example.source == "def f (  " and example.references == ("Does it .",)


@pytest.mark.parametrize(
    ("task", "row", "metrics"),
    [
        ("xsum", {"document": "News.", "summary": "New."}, {"rouge1", "rouge2", "rougeL"}),
        ("code_x_glue_ct_code_to_text", CODE[0], {"bleu"}),
        ("docstrings", ROWS[0], {"rouge1", "rouge2", "rougeL", "exact", "bleu"}),
    ],
)
def test_text_tasks_read_local_files(text_folder, tmp_path, task, row, metrics):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row, row]))
    results = evaluate_checkpoint(text_folder, task, dataset_name=path, **QUIET)
    assert set(results.saved.metrics) == metrics and results.num_rows == {"test": 2}


@pytest.mark.parametrize(
    ("task", "metric"),
    [("vqav2", "vqa_accuracy"), ("textvqa", "vqa_accuracy"), ("chartqa", "relaxed_accuracy"), ("digits", "exact")],
)
def test_vision_tasks_read_local_files(vision_folder, pictures, task, metric):
    results = evaluate_checkpoint(vision_folder, task, dataset_name=pictures, **QUIET)
    assert set(results.saved.metrics) == {metric} and results.num_rows == {"test": 3}


def test_answers_are_read_as_texts_and_in_the_formats_of_the_hub(tmp_path):
    people = [{"answer": text, "answer_id": number} for number, text in enumerate(PEOPLE)]
    columns = ({"answers": PEOPLE}, {"answers": people}, {"answers": {"answer": PEOPLE}})
    path = write_rows(tmp_path / "r.jsonl", [{"image": None, "question": "?", **column} for column in columns])
    examples = load_examples("vqav2", find_task("vqav2"), dataset_name=str(path))
    assert [example.references for example in examples] == [tuple(PEOPLE)] * 3
    assert [example.images() for example in examples] == [[]] * 3
    path = write_rows(tmp_path / "c.jsonl", [{"image": None, "query": "how many?", "label": ["3"]}])
    (example,) = load_examples("chartqa", find_task("chartqa"), dataset_name=str(path))
    assert (example.source, example.references) == ("how many?", ("3",))


def test_built_in_tasks_need_no_data(text_folder, vision_folder, monkeypatch):
    # The standard library takes long to read.
    monkeypatch.setattr(tasks_module, "build_docstring_task", lambda: DatasetDict({"test": Dataset.from_list(ROWS)}))
    results = evaluate_checkpoint(text_folder, "docstrings", max_samples=3, **QUIET)
    assert results.num_rows == {"test": 3} and results.dataset == DataSource("docstrings", split="test")
    results = evaluate_checkpoint(vision_folder, "digits", max_samples=2, **QUIET)
    assert results.num_rows == {"test": 2} and set(results.saved.metrics) == {"exact"}
    for folder, task in ((text_folder, "docstrings"), (vision_folder, "digits")):
        with pytest.raises(ValueError, match=r"dataset_split.*test"):
            evaluate_checkpoint(folder, task, dataset_split="dev", max_samples=1, **QUIET)


def test_parquet_files_and_folders_give_the_same_rows_as_json(rows_file, tmp_path):
    task = find_task("text")
    expected = load_examples("text", task, dataset_name=str(rows_file))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert load_examples("text", task, dataset_name=str(tmp_path / "rows.parquet")) == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "test.jsonl", ROWS)
    assert load_examples("text", task, dataset_name=str(folder)) == expected
    DatasetDict({"dev": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert load_examples("text", task, dataset_name=saved) == expected  # the only split
    assert len(load_examples("text", task, dataset_name=saved, dataset_split="dev", max_samples=4)) == 4
    with pytest.raises(ValueError, match="dataset_split"):
        load_examples("text", task, dataset_name=saved, dataset_split="test")


def test_images_in_parquet_files_are_read(vision_folder, tmp_path):
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    rows = [{"image": PILImage.new("RGB", (16, 16), (9, 9, 9)), "question": "what?", "answer": "a"}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.parquet", "."):
        results = evaluate_checkpoint(vision_folder, "chartqa", dataset_name=tmp_path / name, **QUIET)
        assert results.num_rows == {"test": 1}


def test_max_samples_draws_the_same_rows_as_training(rows_file):
    task = find_task("text")
    drawn = load_examples("text", task, dataset_name=str(rows_file), max_samples=4, seed=3)
    expected = Dataset.from_list(ROWS).shuffle(seed=3).select(range(4))
    assert [example.source for example in drawn] == expected["source"][:]


def test_columns_can_be_named(text_folder, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"code": "a", "comment": "b"}])
    names = {"source_column": "code", "target_column": "comment"}
    results = evaluate_checkpoint(text_folder, "text", dataset_name=path, **names, **QUIET)
    assert "--source-column code --target-column comment" in results.command
    with pytest.raises(ValueError, match="document, summary"):
        evaluate_checkpoint(text_folder, "xsum", dataset_name=path, **names, **QUIET)


# Errors


@pytest.mark.parametrize(
    ("task", "content", "error", "named"),
    [
        ("text", "", ValueError, "no rows"),
        ("text", "{}\n", ValueError, "`source`"),
        ("text", '{"a": "b", "target": "c"}\n', ValueError, r"a, target.*`source`"),
        ("text", '{"source": "b"}\n', ValueError, "`target`"),
        ("text", '{"source": "b"\n', ValueError, "line 1"),
        ("text", "[1, 2]\n", ValueError, "int"),
        ("text", '{"source": "a", "target": 5}', TypeError, r"Row 1 .*`target` of type int"),
        ("squad_v2", '{"question": "?", "answers": []}', ValueError, "`context`"),
        ("xsum", '{"document": "a"}', ValueError, "`summary`"),
        ("vqav2", '{"image": null, "question": "?", "answers": ["a"]}', ValueError, "1 answer"),
        ("chartqa", '{"image": null, "question": "?", "answer": null}', ValueError, "no answer"),
    ],
)
def test_rows_that_do_not_fit_a_task_are_refused(tmp_path, task, content, error, named):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(error, match=named):
        load_examples(task, find_task(task), dataset_name=str(path))


def test_without_a_network_the_message_asks_for_local_files(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'rajpurkar/squad_v2' on the Hub")

    monkeypatch.setattr("encdec_slm.trainers.evaluation.task_rows.load_hub_dataset", no_network)
    with pytest.raises(ValueError, match="question, context, answers"):
        load_examples("squad_v2", find_task("squad_v2"))


def test_data_sets_of_the_hub_are_loaded_by_config_split_and_revision(monkeypatch):
    asked = []

    def record(name, config, revision, split):
        asked.append((name, config, revision, split))
        return Dataset.from_list([{"document": "a", "summary": "b", **CODE[0]}])

    monkeypatch.setattr("encdec_slm.trainers.evaluation.task_rows.load_hub_dataset", record)
    load_examples("xsum", find_task("xsum"))
    task = find_task("code_x_glue_ct_code_to_text")
    load_examples("code", task, dataset_config="go", dataset_split="validation")
    assert asked == [
        ("EdinburghNLP/xsum", None, "refs/convert/parquet", "test"),
        ("google/code_x_glue_ct_code_to_text", "go", None, "validation"),
    ]


def test_models_must_fit_the_task(text_folder, vision_folder, rows_file, pictures):
    with pytest.raises(ValueError, match=r"`task` 'vqav2'"):
        evaluate_checkpoint(text_folder, "vqav2", dataset_name=pictures, **QUIET)
    with pytest.raises(ValueError, match=r"`task` 'text'"):
        evaluate_checkpoint(vision_folder, "text", dataset_name=rows_file, **QUIET)


@pytest.mark.parametrize(
    "options",
    [
        {"task": "glue"},
        {"batch_size": 0},
        {"max_samples": -1},
        {"num_beams": 0},
        {"max_new_tokens": 0},
        {"max_source_length": 0},
        {"max_new_tokens": 10**6},
        {"dtype": "int8"},
        {"device": "nowhere"},
        {"dataset_name": "nowhere.jsonl"},
        {"dataset_name": __file__},
        {"model_or_path": "no/such/model"},
    ],
)
def test_wrong_arguments_are_named(text_folder, rows_file, options):
    arguments = {"model_or_path": text_folder, "task": "text", "dataset_name": rows_file, **QUIET, **options}
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=str(value) if name == "model_or_path" else f"`{name}` is .*{value}"):
        evaluate_checkpoint(arguments.pop("model_or_path"), arguments.pop("task"), **arguments)
    with pytest.raises(ValueError, match="dataset_name"):
        evaluate_checkpoint(text_folder, "text", **QUIET)


def test_other_encoder_decoders_and_decoder_only_models_are_evaluated(text_folder, rows_file, tmp_path):
    _, tokenizer = load_checkpoint(text_folder)
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    results = evaluate_checkpoint(tmp_path / "t5", "text", dataset_name=rows_file, max_samples=3, **QUIET)
    assert results.num_rows == {"test": 3}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    model.save_pretrained(tmp_path / "llama")
    options = {**QUIET, "max_samples": 3, "max_new_tokens": 4, "processing_class": tokenizer}
    for checkpoint in (model, tmp_path / "llama"):
        results = evaluate_checkpoint(checkpoint, "text", dataset_name=rows_file, **options)
        assert results.models[0].num_parameters == model.num_parameters()
        assert results.settings["max_new_tokens"] == 4
    model.model.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="causal language model"):
        evaluate_checkpoint(tmp_path / "backbone", "text", dataset_name=rows_file, **options)


# Shell commands


COMMANDS = [{"source": f"list files {number}", "target": f"ls -l d{number}"} for number in range(3)]


def test_a_function_is_scored_on_shell_commands(tmp_path):
    def answer(sources):
        return [[f"du {source}", f"ls -l {source[-1]}"] for source in sources]

    rows = write_rows(tmp_path / "rows.jsonl", COMMANDS)
    options = {"show_progress": False, "num_bootstrap": 20}
    results = evaluate_checkpoint(answer, "shell", dataset_name=rows, output_dir=tmp_path / "out", **options)
    metrics = {name: metric.value for name, metric in results.saved.metrics.items()}
    expected = {"nlc2cmd": -100, "nlc2cmd_top5": 100, "template": 0, "exact": 0, "first_utility": 0, "valid_bash": 100}
    assert metrics == expected and results.command is None and results.device is None
    assert texts_in(tmp_path / "out")[1] == "du list files 1\nls -l 1"
    assert (
        evaluate_checkpoint(lambda sources: ["ls -l"] * 3, "shell", dataset_name=rows, **options)
        .saved.metrics["template"]
        .value
        == 100
    )
    with pytest.raises(ValueError, match=r"`num_beams`, `dtype`"):
        evaluate_checkpoint(answer, "shell", dataset_name=rows, num_beams=5, dtype="float32", **options)
    with pytest.raises(ValueError, match="1 answers to 3"):
        evaluate_checkpoint(lambda sources: ["ls"], "shell", dataset_name=rows, **options)


def test_a_request_may_have_several_right_commands(tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl", [COMMANDS[0], {"source": "count", "target": ["ls | wc -l", "ls -l d0"]}]
    )
    results = evaluate_checkpoint(
        lambda sources: ["ls -l d0"] * 2, "shell", dataset_name=rows, show_progress=False, num_bootstrap=20
    )
    assert results.saved.metrics["exact"].value == 100
    rows = write_rows(tmp_path / "empty.jsonl", [{"source": "count", "target": []}])
    with pytest.raises(ValueError, match="at least one command"):
        evaluate_checkpoint(lambda sources: ["ls"], "shell", dataset_name=rows)


def test_models_give_five_answers_to_a_shell_request(text_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", COMMANDS)
    results = evaluate_checkpoint(text_folder, "shell", dataset_name=rows, output_dir=tmp_path / "out", **QUIET)
    assert results.settings["num_beams"] == 5
    model, tokenizer = load_checkpoint(text_folder)
    inputs = tokenizer([row["source"] for row in COMMANDS], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, num_beams=5, num_return_sequences=5, max_new_tokens=QUIET["max_new_tokens"])
    answers = [parse_command(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    expected = ["\n".join(dict.fromkeys(answers[5 * row : 5 * row + 5])) for row in range(3)]
    assert texts_in(tmp_path / "out") == expected
    greedy = evaluate_checkpoint(text_folder, "shell", dataset_name=rows, num_beams=1, **QUIET)
    assert greedy.saved.metrics["nlc2cmd_top5"] == greedy.saved.metrics["nlc2cmd"]


def test_a_decoder_only_model_reads_the_prompt_template_and_its_chat_template(text_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", COMMANDS)
    _, tokenizer = load_checkpoint(text_folder)
    tokenizer.chat_template = "Q: {{ messages[0]['content'] }}\nA:"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, initializer_range=0.5, **sizes))
    options = {"dataset_name": rows, "processing_class": tokenizer, "prompt_template": "Write: {{ source }}."}
    results = evaluate_checkpoint(model, "shell", output_dir=tmp_path / "out", **options, **QUIET)
    prompt = tokenizer("Q: Write: list files 0.\nA:", add_special_tokens=False, return_tensors="pt")
    settings = {"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": QUIET["max_new_tokens"]}
    ids = model.generate(**prompt, **settings, pad_token_id=0)[:, prompt["input_ids"].shape[1] :]
    answers = [parse_command(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert texts_in(tmp_path / "out")[0] == "\n".join(dict.fromkeys(answers))
    assert results.settings["prompt_template"] == "Write: {{ source }}."
    with pytest.raises(ValueError, match="prompt_template"):
        evaluate_checkpoint(text_folder, "shell", dataset_name=rows, prompt_template="{{ source }}", **QUIET)
