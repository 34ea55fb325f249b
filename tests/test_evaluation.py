# SPDX-License-Identifier: Apache-2.0
"""Checkpoints scored on every task from local rows: predictions, results, resuming, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from conftest import randomised
from encdec_slm import EncDecSLMForConditionalGeneration, EncDecVLMConfig, EncDecVLMForConditionalGeneration
from encdec_slm.configuration import load_preset
from encdec_slm.conversion import question_answering_prompt
from encdec_slm.run_results import DataSource, RunResults
from encdec_slm.trainers.evaluation import evaluate_checkpoint, list_tasks
from encdec_slm.trainers.evaluation import tasks as tasks_module
from encdec_slm.trainers.evaluation.generation import Writer, load_checkpoint
from encdec_slm.trainers.evaluation.task_rows import load_examples
from encdec_slm.trainers.evaluation.tasks import Example, find_task
from encdec_slm.trainers.run_reports import preset_config, score_texts
from encdec_slm.trainers.seq2seq_data import train_tokenizer
from encdec_slm.trainers.vqa import new_processor


ROWS = [{"source": f"def f{number}(): return {number * 'x'}", "target": f"Return {number}."} for number in range(11)]
QUIET = {"device": "cpu", "show_progress": False, "num_bootstrap": 20, "max_new_tokens": 6}
LIMIT = 48
SQUAD = [
    {"question": "Who is it?", "context": "It is I.", "answers": {"text": ["I", "I."], "answer_start": [6, 6]}},
    {"question": "Where?", "context": "It is I.", "answers": {"text": [], "answer_start": []}},
]
CODE = [{"code": "secret", "code_tokens": ["def", "f", "(", "\n"], "docstring_tokens": ["Does", "it", "."]}]
PEOPLE = [*["cat"] * 6, *["dog"] * 4]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(folder):
    lines = (Path(folder) / "predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    """A folder with a text model of random weights that reads 48 tokens, in float32."""
    folder = tmp_path_factory.mktemp("models") / "text"
    tokenizer = train_tokenizer((row["source"] for row in ROWS), 300, LIMIT)
    model = EncDecSLMForConditionalGeneration(preset_config("tiny", tokenizer))
    randomised(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision_checkpoint(tmp_path_factory):
    """The same for a vision-text model."""
    folder = tmp_path_factory.mktemp("models") / "vision"
    tokenizer = train_tokenizer(["what is it?", "a grey square"], 300, 64)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    fields = load_preset("tiny-vlm").to_dict()
    fields["text_config"]["vocab_size"] = len(tokenizer)
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    config = EncDecVLMConfig.from_dict(fields)
    randomised(EncDecVLMForConditionalGeneration(config)).save_pretrained(folder)
    new_processor(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(text_checkpoint, rows_file, tmp_path_factory):
    """The result of a run over all rows, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    result = evaluate_checkpoint(text_checkpoint, "text", dataset_name=rows_file, output_dir=folder, **QUIET)
    return result, folder


@pytest.fixture
def pictures(tmp_path):
    """Rows with a picture each, whose files lie beside the file of the rows."""
    rows = []
    for number in range(3):
        PILImage.new("RGB", (20 + number, 16), (80 * number, 9, 9)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what is it?", "answers": PEOPLE, "answer": "cat"})
    return write_rows(tmp_path / "pictures.jsonl", rows)


def test_the_tasks_are_those_of_the_documentation():
    built_in = ["text", "docstrings", "digits", "charts", "lines"]
    of_the_hub = ["squad_v2", "xsum", "code_x_glue_ct_code_to_text", "vqav2", "textvqa", "chartqa"]
    assert sorted(list_tasks()) == sorted(built_in + of_the_hub)


def test_a_result_says_what_was_measured_how_and_by_which_command(finished, text_checkpoint, rows_file):
    result, folder = finished
    assert RunResults.load(folder / "evaluation.json") == result
    assert result.task == "text" and result.num_rows == {"test": 11} and result.num_cut_rows == {"test": 0}
    assert result.saved.name == "text" and result.device == "cpu" and result.confidence == 0.95
    assert result.dataset == DataSource("rows.jsonl")
    assert set(result.saved.metrics) == {"rouge1", "rouge2", "rougeL", "exact"}
    for metric in result.saved.metrics.values():
        assert metric.low <= metric.value <= metric.high and metric.unit == "percent"
    assert {"python", "torch", "transformers"} <= set(result.versions)
    words = shlex.split(result.command)
    assert words[:6] == ["encdec-slm", "evaluate", "--model", "text", "--task", "text"]
    assert words[words.index("--dataset-name") + 1] == "rows.jsonl" and "--max-new-tokens" in words
    assert not any(word.startswith("/") for word in words)


def test_predictions_stand_beside_their_rows_and_give_the_metrics(finished):
    result, folder = finished
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [row["row"] for row in rows] == list(range(11))
    assert [row["source"] for row in rows] == [row["source"] for row in ROWS]
    scores = score_texts(texts(folder), [row["references"][0] for row in rows])
    assert {name: result.saved.metrics[name].value for name in scores} == scores


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_batch_gives_what_its_rows_give(text_checkpoint, rows_file, tmp_path, num_beams):
    for batch_size in (1, 8):
        options = {"batch_size": batch_size, "output_dir": tmp_path / str(batch_size), "num_beams": num_beams}
        evaluate_checkpoint(text_checkpoint, "text", dataset_name=rows_file, dtype="float32", **options, **QUIET)
    assert texts(tmp_path / "1") == texts(tmp_path / "8") and len(set(texts(tmp_path / "1"))) > 3


def test_a_batch_of_pictures_gives_what_its_rows_give(vision_checkpoint, pictures, tmp_path):
    for batch_size in (1, 8):
        options = {"batch_size": batch_size, "output_dir": tmp_path / str(batch_size)}
        evaluate_checkpoint(vision_checkpoint, "vqav2", dataset_name=pictures, dtype="float32", **options, **QUIET)
    assert texts(tmp_path / "1") == texts(tmp_path / "8")


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(
    finished, text_checkpoint, rows_file, tmp_path, monkeypatch
):
    whole, folder = finished
    options = {"dataset_name": rows_file, "output_dir": tmp_path, **QUIET}
    written = Writer.write

    def interrupted(self, examples):
        if examples[0].source == ROWS[4]["source"]:
            raise KeyboardInterrupt
        return written(self, examples)

    monkeypatch.setattr(Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(text_checkpoint, "text", batch_size=2, **options)
    assert len(texts(tmp_path)) == 4 and not (tmp_path / "evaluation.json").exists()
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"row": 4, "source": "def f4')  # the power went
    read = []
    monkeypatch.setattr(Writer, "write", lambda self, examples: (read.extend(examples), written(self, examples))[1])
    result = evaluate_checkpoint(text_checkpoint, "text", batch_size=3, **options)
    assert [example.source for example in read] == [row["source"] for row in ROWS[4:]]
    assert (tmp_path / "predictions.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()
    assert result.saved.metrics == whole.saved.metrics

    monkeypatch.setattr(Writer, "write", None)  # nothing is left to write
    assert evaluate_checkpoint(text_checkpoint, "text", **options).saved.metrics == whole.saved.metrics


def test_another_run_does_not_go_on_with_the_predictions(finished, text_checkpoint, rows_file, tmp_path):
    _, folder = finished
    before = (folder / "predictions.jsonl").read_bytes()
    options = {"dataset_name": rows_file, "output_dir": folder, **QUIET}
    with pytest.raises(ValueError, match=r"another run \(`max_new_tokens` was 6 and is 7\)"):
        evaluate_checkpoint(text_checkpoint, "text", **{**options, "max_new_tokens": 7})
    with pytest.raises(ValueError, match=r"another run \(`num_beams` was 1 and is 2\)"):
        evaluate_checkpoint(text_checkpoint, "text", num_beams=2, **options)
    with pytest.raises(ValueError, match=r"`task` was 'text' and is 'docstrings'"):
        evaluate_checkpoint(text_checkpoint, "docstrings", **options)
    with pytest.raises(ValueError, match=r"another run \(`data` was"):
        evaluate_checkpoint(text_checkpoint, "text", max_samples=5, **options)
    model, tokenizer = load_checkpoint(str(text_checkpoint))
    with torch.no_grad():
        model.model.decoder.norm.weight[0] += 1
    with pytest.raises(ValueError, match=r"another run \(`model` was"):
        evaluate_checkpoint(model, "text", processing_class=tokenizer, **options)
    assert (folder / "predictions.jsonl").read_bytes() == before


def test_files_of_somebody_else_are_left_alone(text_checkpoint, rows_file, tmp_path):
    options = {"dataset_name": rows_file, **QUIET}
    (tmp_path / "predictions.jsonl").write_text('{"source": "a"}\n')
    with pytest.raises(ValueError, match=r"no readable evaluation_run\.json"):
        evaluate_checkpoint(text_checkpoint, "text", output_dir=tmp_path, **options)
    with pytest.raises(ValueError, match="is a file, but must be a folder"):
        evaluate_checkpoint(text_checkpoint, "text", output_dir=rows_file, **options)
    evaluate_checkpoint(text_checkpoint, "text", output_dir=tmp_path / "own", **options)
    path = tmp_path / "own" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"row": 3', '"row": 5'))
    with pytest.raises(ValueError, match="line 4, is not the prediction for row 3"):
        evaluate_checkpoint(text_checkpoint, "text", output_dir=tmp_path / "own", **options)


def test_a_loaded_model_is_scored_like_its_folder(finished, text_checkpoint, rows_file):
    model, tokenizer = load_checkpoint(str(text_checkpoint))
    # What a checkpoint recommends for chatting must not make its scores a matter of chance.
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=3, max_length=7)
    result = evaluate_checkpoint(model, "text", dataset_name=rows_file, processing_class=tokenizer, **QUIET)
    assert result.saved.metrics == finished[0].saved.metrics and result.saved.name == "text"
    with pytest.raises(ValueError, match="`processing_class` is not set"):
        evaluate_checkpoint(model, "text", dataset_name=rows_file, **QUIET)


def test_other_families_are_scored_too(text_checkpoint, rows_file, tmp_path):
    _, tokenizer = load_checkpoint(str(text_checkpoint))
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    result = evaluate_checkpoint(tmp_path / "t5", "text", dataset_name=rows_file, max_samples=3, **QUIET)
    assert result.num_rows == {"test": 3}


def test_squad_rows_are_asked_as_the_family_was_trained_and_cut_in_their_context(text_checkpoint, tmp_path):
    long = {"question": "Who?", "context": "It is I who am it, who is it. " * 9, "answers": ["I"]}
    path = write_rows(tmp_path / "squad.jsonl", [*SQUAD, long])
    options = {"dataset_name": path, "output_dir": tmp_path / "out", "max_source_length": 150, **QUIET}
    result = evaluate_checkpoint(text_checkpoint, "squad_v2", **options)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == [["I", "I."], [], ["I"]]
    assert rows[0]["source"] == question_answering_prompt("Who is it?", "It is I.")
    assert [row["is_cut"] for row in rows] == [False, False, True] and result.num_cut_rows == {"test": 1}
    assert set(result.saved.metrics) == {
        f"{whose}{name}" for whose in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")
    }


@pytest.mark.parametrize("emoji", ["", "🙂"])
def test_a_source_that_is_too_long_is_cut_to_what_the_model_reads(text_checkpoint, emoji):
    model, tokenizer = load_checkpoint(str(text_checkpoint), device="cpu")
    writer = Writer(model, tokenizer, max_new_tokens=4)
    plain, asked = Example(f"x {emoji}" * 99, ("y",)), Example(f"x {emoji}" * 99, ("y",), "before ", " after")
    (plain_ids, asked_ids), were_cut = writer._text_inputs([plain, asked])[0]["input_ids"].tolist(), [True, True]
    assert writer._text_inputs([plain, asked])[1] == were_cut
    assert plain_ids == tokenizer(plain.text, truncation=True)["input_ids"] and len(plain_ids) == LIMIT
    text = tokenizer.decode([id for id in asked_ids if id != tokenizer.pad_token_id], skip_special_tokens=True)
    assert text.startswith("before x") and text.endswith(" after") and len(asked_ids) <= LIMIT
    shorter = Writer(model, tokenizer, max_new_tokens=4, max_source_length=9)
    assert shorter._text_inputs([plain])[0]["input_ids"].shape == (1, 9)


def test_a_row_whose_frame_alone_is_too_long_is_refused(text_checkpoint, tmp_path):
    path = write_rows(tmp_path / "squad.jsonl", [{**SQUAD[0], "question": "Who? " * 50}])
    with pytest.raises(ValueError, match="tokens beside its text, but the model reads 48"):
        evaluate_checkpoint(text_checkpoint, "squad_v2", dataset_name=path, **QUIET)


def test_long_questions_about_pictures_are_cut_and_the_pictures_kept(vision_checkpoint, tmp_path):
    model, processor = load_checkpoint(str(vision_checkpoint), device="cpu")
    picture = PILImage.new("RGB", (16, 16))
    example = Example("what is it? " * 30, ("a",), images=lambda: [picture])
    num_image_tokens = processor.image_processor.num_image_tokens(16, 16)
    writer = Writer(model, processor, 4, max_source_length=num_image_tokens + 10)
    inputs, were_cut = writer._vision_inputs([example, Example("what?", ("a",), images=lambda: [picture])])
    assert were_cut == [True, False] and inputs["input_ids"].shape[1] <= num_image_tokens + 10
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [num_image_tokens] * 2


def test_a_question_can_say_where_its_pictures_stand_and_a_typed_token_stays_text(vision_checkpoint):
    model, processor = load_checkpoint(str(vision_checkpoint), device="cpu")
    writer = Writer(model, processor, 4)
    assert writer._rendered("is <image> grey?", 1) == "is <image> grey?"
    assert writer._rendered("what?", 2) == "<image><image>what?"
    assert writer._rendered("what?", 0) == "what?"
    assert writer._rendered("<image> twice <image>", 1).count("<image>") == 1


def test_code_is_read_from_tokens_since_code_may_hold_its_docstring(tmp_path):
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
def test_text_tasks_take_local_rows(text_checkpoint, tmp_path, task, row, metrics):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row, row]))
    result = evaluate_checkpoint(text_checkpoint, task, dataset_name=path, **QUIET)
    assert set(result.saved.metrics) == metrics and result.num_rows == {"test": 2}


@pytest.mark.parametrize(
    ("task", "metric"),
    [("vqav2", "vqa_accuracy"), ("textvqa", "vqa_accuracy"), ("chartqa", "relaxed_accuracy"), ("digits", "exact")],
)
def test_vision_tasks_take_local_rows(vision_checkpoint, pictures, task, metric):
    result = evaluate_checkpoint(vision_checkpoint, task, dataset_name=pictures, **QUIET)
    assert set(result.saved.metrics) == {metric} and result.num_rows == {"test": 3}


def test_answers_come_as_texts_or_as_the_hub_has_them(tmp_path):
    people = [{"answer": text, "answer_id": number} for number, text in enumerate(PEOPLE)]
    columns = ({"answers": PEOPLE}, {"answers": people}, {"answers": {"answer": PEOPLE}})
    path = write_rows(tmp_path / "r.jsonl", [{"image": None, "question": "?", **column} for column in columns])
    examples = load_examples("vqav2", find_task("vqav2"), dataset_name=str(path))
    assert [example.references for example in examples] == [tuple(PEOPLE)] * 3
    assert [example.images() for example in examples] == [[]] * 3
    path = write_rows(tmp_path / "c.jsonl", [{"image": None, "query": "how many?", "label": ["3"]}])
    (example,) = load_examples("chartqa", find_task("chartqa"), dataset_name=str(path))
    assert (example.source, example.references) == ("how many?", ("3",))


def test_the_built_in_tasks_need_no_data(text_checkpoint, vision_checkpoint, monkeypatch):
    # In the place of the standard library, which takes long to read.
    monkeypatch.setattr(tasks_module, "build_docstring_task", lambda: DatasetDict({"test": Dataset.from_list(ROWS)}))
    result = evaluate_checkpoint(text_checkpoint, "docstrings", max_samples=3, **QUIET)
    assert result.num_rows == {"test": 3}
    assert result.dataset == DataSource("docstrings", split="test")
    result = evaluate_checkpoint(vision_checkpoint, "digits", max_samples=2, **QUIET)
    assert result.num_rows == {"test": 2} and set(result.saved.metrics) == {"exact"}
    with pytest.raises(ValueError, match="docstrings have test"):
        evaluate_checkpoint(text_checkpoint, "docstrings", dataset_split="dev", **QUIET)
    with pytest.raises(ValueError, match="digits has train, validation, test"):
        evaluate_checkpoint(vision_checkpoint, "digits", dataset_split="dev", max_samples=1, **QUIET)


@pytest.mark.slow
def test_the_standard_library_is_scored(text_checkpoint, vision_checkpoint):
    for checkpoint, task in ((text_checkpoint, "docstrings"), (vision_checkpoint, "lines")):
        assert evaluate_checkpoint(checkpoint, task, max_samples=3, **QUIET).num_rows == {"test": 3}


def test_parquet_files_and_folders_give_what_json_gives(rows_file, tmp_path):
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
    assert load_examples("text", task, dataset_name=saved) == expected  # there is only one split to take
    assert len(load_examples("text", task, dataset_name=saved, dataset_split="dev", max_samples=4)) == 4
    with pytest.raises(ValueError, match="has the splits dev, but not test"):
        load_examples("text", task, dataset_name=saved, dataset_split="test")


def test_pictures_in_parquet_are_read_when_they_are_needed(vision_checkpoint, tmp_path):
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    rows = [{"image": PILImage.new("RGB", (16, 16), (9, 9, 9)), "question": "what?", "answer": "a"}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    result = evaluate_checkpoint(vision_checkpoint, "chartqa", dataset_name=tmp_path / "rows.parquet", **QUIET)
    assert result.num_rows == {"test": 1}


def test_fewer_rows_are_drawn_as_training_draws_them(rows_file):
    task = find_task("text")
    drawn = load_examples("text", task, dataset_name=str(rows_file), max_samples=4, seed=3)
    expected = Dataset.from_list(ROWS).shuffle(seed=3).select(range(4))
    assert [example.source for example in drawn] == expected["source"][:]


def test_columns_of_your_own_are_named(text_checkpoint, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"code": "a", "comment": "b"}])
    names = {"source_column": "code", "target_column": "comment"}
    result = evaluate_checkpoint(text_checkpoint, "text", dataset_name=path, **names, **QUIET)
    assert result.command.endswith("--max-new-tokens 6 --device cpu --num-bootstrap 20")
    assert "--source-column code --target-column comment" in result.command
    with pytest.raises(ValueError, match="reads document, summary"):
        evaluate_checkpoint(text_checkpoint, "xsum", dataset_name=path, **names, **QUIET)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("{}\n", "Row 0 .* has nothing, but `source` is needed"),
        ('{"a": "b", "target": "c"}\n', "has a, target, but `source` is needed. Add it, or name yours"),
        ('{"source": "b"}\n', "has source, but `target` is needed"),
        ('{"source": "b"\n', "line 1, is not JSON"),
        ("[1, 2]\n", "must have columns"),
    ],
)
def test_rows_that_do_not_fit_are_refused(text_checkpoint, tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(text_checkpoint, "text", dataset_name=path, **QUIET)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("squad_v2", {"question": "?", "answers": []}, "has question, answers, but `context` is needed"),
        ("xsum", {"document": "a"}, "but `summary` is needed. Add it, or rename yours"),
        ("vqav2", {"image": None, "question": "?", "answers": ["a"]}, "has 1 answer, but VQA accuracy"),
        ("chartqa", {"image": None, "question": "?", "answer": None}, "has no answer"),
    ],
)
def test_rows_that_a_task_cannot_use_are_refused(tmp_path, task, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        load_examples(task, find_task(task), dataset_name=str(path))


def test_what_is_no_text_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"source": "a", "target": 5}])
    with pytest.raises(TypeError, match=r"Row 0 \(from 0\) of .* has a `target` of type int"):
        load_examples("text", find_task("text"), dataset_name=str(path))


def test_data_of_the_hub_without_a_network_points_to_local_files(text_checkpoint, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'rajpurkar/squad_v2' on the Hub")

    monkeypatch.setattr("encdec_slm.trainers.evaluation.task_rows.load_dataset", no_network)
    with pytest.raises(ValueError, match=r"could not be loaded .*JSONL or parquet.* with question, context, answers"):
        evaluate_checkpoint(text_checkpoint, "squad_v2", **QUIET)


def test_data_of_the_hub_is_asked_for_by_its_config_split_and_revision(monkeypatch):
    asked = []

    def recorded(name, config, revision, split):
        asked.append((name, config, revision, split))
        return Dataset.from_list([{"document": "a", "summary": "b", **CODE[0]}])

    monkeypatch.setattr("encdec_slm.trainers.evaluation.task_rows.load_dataset", recorded)
    load_examples("xsum", find_task("xsum"))
    task = find_task("code_x_glue_ct_code_to_text")
    load_examples("code", task, dataset_config="go", dataset_split="validation")
    assert asked == [
        ("EdinburghNLP/xsum", None, "refs/convert/parquet", "test"),
        ("google/code_x_glue_ct_code_to_text", "go", None, "validation"),
    ]


def test_models_and_tasks_of_different_kinds_are_refused(text_checkpoint, vision_checkpoint, rows_file, pictures):
    with pytest.raises(ValueError, match="asks about images, but the model reads text only"):
        evaluate_checkpoint(text_checkpoint, "vqav2", dataset_name=pictures, **QUIET)
    with pytest.raises(ValueError, match="has no images, but the model is a vision-text model"):
        evaluate_checkpoint(vision_checkpoint, "text", dataset_name=rows_file, **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "glue"}, "`task` is 'glue', but the tasks are text, docstrings, squad_v2"),
        ({"batch_size": 0}, "`batch_size` is 0, but must be a whole number of at least 1"),
        ({"max_samples": -1}, "`max_samples` is -1"),
        ({"num_beams": 0}, "`num_beams` is 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"max_source_length": 0}, "`max_source_length` is 0"),
        ({"max_new_tokens": 10**6}, "`max_new_tokens` is 1000000, but the decoder has"),
        ({"dtype": "int8"}, "`dtype` is 'int8', but must be float32, bfloat16, float16"),
        ({"device": "nowhere"}, "`device` is 'nowhere'"),
        ({"dataset_name": None}, "has no rows of its own"),
        ({"dataset_name": "nowhere.jsonl"}, "`dataset_name` is 'nowhere.jsonl', but there is no such file"),
        ({"dataset_name": __file__}, "files of rows end in .json, .jsonl, .parquet"),
        ({"model_or_path": "no/such/model"}, "'no/such/model' could not be loaded"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(text_checkpoint, rows_file, options, message):
    arguments = {"model_or_path": text_checkpoint, "task": "text", "dataset_name": rows_file, **QUIET, **options}
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(arguments.pop("model_or_path"), arguments.pop("task"), **arguments)


def test_a_decoder_only_model_is_refused(text_checkpoint, rows_file, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    _, tokenizer = load_checkpoint(str(text_checkpoint))
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, but an encoder-decoder is needed"):
        evaluate_checkpoint(model, "text", dataset_name=rows_file, processing_class=tokenizer, **QUIET)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="could not be loaded as an encoder-decoder"):
        evaluate_checkpoint(tmp_path, "text", dataset_name=rows_file, **QUIET)
