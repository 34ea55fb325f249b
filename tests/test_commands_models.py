# SPDX-License-Identifier: Apache-2.0
"""The commands on tiny models: from rows to a trained folder, an export, generated text and a repository."""

import importlib
import inspect
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from encdec_slm_cli import main
from huggingface_hub import HfApi, constants
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from conftest import build_byte_tokenizer, randomize, save_text_folder
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.run_results import RunResults
from encdec_slm.trainers.evaluation import list_tasks
from encdec_slm.trainers.new_models import preset_config


PROGRAM = str(Path(sys.executable).with_name("encdec-slm"))
ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]
TEXT = ROWS[0]["source"]
SHORT = [
    *("--max_steps", "1", "--max_eval_samples", "2", "--save_strategy", "no", "--use_cpu", "true"),
    *("--per_device_train_batch_size", "4", "--disable_tqdm", "true"),
]


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    """The program delays them by a variable that is read when tqdm is imported."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text model of random weights, which ends no text by itself."""
    path = tmp_path_factory.mktemp("text") / "model"
    model = save_text_folder(path)
    model.generation_config.min_new_tokens = 3
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def decoder_only(tmp_path_factory):
    """A decoder-only checkpoint in bfloat16, with a chat template."""
    path = tmp_path_factory.mktemp("decoder_only") / "model"
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ bos_token }}"
    tokenizer.save_pretrained(path)
    config = decoder_only_twin(preset_config("tiny", tokenizer))
    randomize(AutoModelForCausalLM.from_config(config)).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return path


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


@pytest.fixture
def standard_input(monkeypatch):
    def give(content, is_terminal=False):
        stream = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: is_terminal)
        monkeypatch.setattr(sys, "stdin", stream)

    return give


@pytest.fixture
def printed(capfd):
    """What a command line that succeeds prints to standard output."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return capfd.readouterr().out

    return run


@pytest.fixture
def message(capfd):
    """The one line that a command line with an exit code prints."""

    def run(code, *arguments):
        assert main([str(argument) for argument in arguments]) == code, arguments
        output = capfd.readouterr()
        assert output.out == "" and len(output.err.splitlines()) == 1, output
        return output.err

    return run


# Training


def test_a_model_is_fine_tuned_and_the_command_line_overrides_the_recipe(rows_file, tmp_path, printed):
    recipe = tmp_path / "mine.yaml"
    values = {"preset": "tiny", "output_dir": "nowhere", "train_file": rows_file, "max_target_length": 8}
    recipe.write_text(json.dumps({**values, "vocab_size": 300}), encoding="utf-8")  # JSON is YAML
    shown = printed("finetune", "--config", recipe, *SHORT, "--output_dir", tmp_path / "run")
    assert "held-out rows" in shown and str(tmp_path / "run") in shown
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert results["train_steps"] == 1 and "tiny" in results.values()


def test_without_a_recipe_the_default_is_named_and_used(rows_file, tmp_path, capfd):
    options = [
        "--train_file",
        rows_file,
        f"--output_dir={tmp_path / 'run'}",
        "--preset",
        "tiny",
        "--vocab_size",
        "300",
    ]
    assert main(["finetune", *options, *SHORT]) == 0
    assert "finetune_docstrings" in capfd.readouterr().err


def test_a_vision_text_model_is_trained_by_its_recipe(tmp_path, printed):
    options = ["--tasks", "digits", "--num_train_rows", "8", "--max_target_length", "4", "--preset", "tiny-vlm"]
    options += ["--dataloader_num_workers", "0", "--eval_strategy", "no", "--output_dir", tmp_path / "run"]
    shown = printed("finetune", "--task", "vision", *SHORT, *options)
    assert "digits" in shown and (tmp_path / "run" / "contact_sheet.png").is_file()


def test_a_student_is_distilled(rows_file, tmp_path, printed):
    tiny = [
        "--preset",
        "tiny",
        "--teacher_preset",
        "tiny",
        "--teacher_num_train_epochs",
        "0.25",
        "--vocab_size",
        "300",
    ]
    tiny += ["--max_completion_length", "8", "--train_file", rows_file, "--compare_with_cross_entropy", "false"]
    shown = printed("distill", "--output_dir", tmp_path / "run", *SHORT, *tiny)
    assert "teacher" in shown and "distilled student" in shown
    assert (tmp_path / "run" / "model.safetensors").is_file()


# Adaptation


def test_a_decoder_only_checkpoint_is_adapted(decoder_only, tmp_path, printed):
    options = ("--split", "1/2-1/2", "--strategy", "first-last")
    shown = printed("adapt", decoder_only, tmp_path / "adapted", *options)
    assert "3 encoder and 3 decoder layers" in shown and "torch.bfloat16" in shown
    source, adapted = (AutoTokenizer.from_pretrained(folder) for folder in (decoder_only, tmp_path / "adapted"))
    assert adapted.chat_template == source.chat_template
    assert adapted("def f")["input_ids"] == source("def f")["input_ids"]
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapted").config.decoder_start_token_id == 1


@pytest.mark.parametrize(
    ("options", "model"),
    [
        (["--finetune", "finetune_docstrings", "--max_target_length", "8"], "finetune"),
        (["--distill", "distill_adapted", "--max_completion_length", "8"], "distill"),
    ],
    ids=["finetune", "distill"],
)
def test_an_adapted_checkpoint_is_trained_by_a_recipe(options, model, decoder_only, rows_file, tmp_path, printed):
    options += ["--train_file", rows_file, "--output_dir", tmp_path / "run", "--max_source_length", "64"]
    printed("adapt", decoder_only, tmp_path / "adapted", *options, *SHORT)
    trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert trained.config.encoder_num_hidden_layers == 4
    assert json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["train_steps"] == 1


# Generation


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_text_is_read_alike_from_an_argument_a_file_and_standard_input(end, folder, tmp_path, printed, standard_input):
    text = "def area(width):\n\n    return width"
    options = ("--max-new-tokens", 12)
    expected = printed("generate", folder, text, *options)
    assert len(expected.strip()) > 0 and "Loading" not in expected
    content = text.encode().replace(b"\n", end) + end
    (tmp_path / "source.py").write_bytes(b"\xef\xbb\xbf" + content)
    assert printed("generate", folder, "--file", tmp_path / "source.py", *options) == expected
    for option in ([], ["--file", "-"]):
        standard_input(content)
        assert printed("generate", folder, *option, *options) == expected
    assert printed("generate", folder, content.decode(), "--max_new_tokens=12", "--no-stream") == expected


def test_beams_samples_and_repetitions_follow_the_options(folder, printed):
    options = (folder, TEXT, "--max-new-tokens", 40)
    greedy = printed("generate", *options)
    assert printed("generate", *options, "--num-beams", 3) != ""
    assert {printed("generate", *options, "--temperature", 2.5) for _ in range(3)} != {greedy}
    assert printed("generate", *options, "--sample", "--no-stream") != ""
    assert printed("generate", *options, "--no-repeat-ngram-size", 1) != greedy
    assert printed("generate", *options, "--no-repeat-ngram-size", 0) == greedy


@pytest.mark.parametrize("option", ["--stream", "--no-stream"])
def test_output_that_the_console_cannot_show_is_replaced(option, folder, printed, monkeypatch):
    text = printed("generate", folder, TEXT, "--max-new-tokens", 20, option)
    assert not text.isascii()  # the model generates random bytes
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["generate", folder, TEXT, "--max-new-tokens", "20", option]) == 0
    assert stream.buffer.getvalue() == text.encode("ascii", "replace")


def test_a_recipe_of_generate_is_overridden(folder, tmp_path, printed):
    recipe = tmp_path / "writing.yaml"
    recipe.write_text(f"model: {folder}\ntext: {TEXT!r}\nmax_new_tokens: 3\nstream: false\n", encoding="utf-8")
    short = printed("generate", "--config", recipe)
    long = printed("generate", "--config", recipe, "--max-new-tokens", 9)
    assert long == printed("generate", folder, TEXT, "--max-new-tokens", 9) and short != long


def test_a_question_about_an_image_is_answered(vision_folder, picture, printed):
    options = ["what?", "--image", picture, "--max-new-tokens", 5]
    answer = printed("generate", vision_folder, *options)
    assert answer == printed("generate", vision_folder, *options, "--no-stream")


def test_a_question_that_is_too_long_is_refused_or_cut(vision_folder, picture, printed, message):
    options = ["word " * 600, "--image", picture, "--max-new-tokens", 3]
    assert "--truncation" in message(1, "generate", vision_folder, *options)
    printed("generate", vision_folder, *options, "--truncation")


def test_a_text_that_begins_with_a_dash_is_read(folder, printed, message):
    assert printed("generate", folder, "--max-new-tokens", 3, "--", "-1 is a number")
    assert "`--`" in message(2, "generate", folder, "-1 is a number")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b" \n\t\n", "empty"), (b"\x89PNG\r\n\x1a\n", "not UTF-8"), (b"a\0b", "zero bytes")],
)
def test_content_that_is_not_text_is_refused(content, words, folder, standard_input, tmp_path, message):
    standard_input(content)
    assert words in message(1, "generate", folder)
    (tmp_path / "file").write_bytes(content)
    assert words in message(1, "generate", folder, "--file", tmp_path / "file")


def test_generate_refuses_what_it_cannot_do(folder, vision_folder, picture, standard_input, tmp_path, message):
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    standard_input(b"", is_terminal=True)
    cases = [
        ([folder], 2, "TEXT"),
        ([folder, TEXT, "--image", picture], 2, "--image"),
        ([vision_folder, "what?"], 2, "--image"),
        ([vision_folder, "what?", "--image", tmp_path / "notes.txt"], 1, "notes.txt"),
        ([vision_folder, "what?", "--image", tmp_path / "none.png"], 1, "none.png"),
        ([folder, "--file", tmp_path / "none.txt"], 1, "No such file"),
        ([folder, "--file", tmp_path], 1, "Is a directory"),
        ([folder, TEXT, "--stream", "--num-beams", "2"], 2, "--num-beams 1"),
        ([tmp_path, TEXT], 1, str(tmp_path)),
    ]
    for arguments, code, words in cases:
        assert words in message(code, "generate", *arguments)


def test_a_text_that_is_too_long_is_cut_on_request(folder, vision_folder, picture, printed, message):
    for arguments in ([folder, "a " * 4000], [vision_folder, "a " * 4000, "--image", picture]):
        assert "`--truncation`" in message(1, "generate", *arguments)
        assert printed("generate", *arguments, "--truncation", "--max-new-tokens", 3).endswith("\n")


def test_no_combination_of_options_ends_in_a_stack_trace(folder, standard_input, capfd):
    generator = random.Random(1)
    options = [["--num-beams", "2"], ["--sample"], ["--temperature", "0.1"], ["--stream"], ["--no-stream"]]
    options += [["--temperature", "nan"], ["--temperature", "-1"], ["--max-new-tokens", "1"], ["--image", "x.png"]]
    options += [["--truncation"], ["--revision", "main"], ["--trust-remote-code"], ["--file", "-"], [""], ["ä\u2028"]]
    for _ in range(12):
        standard_input(generator.choice([b"", b"\xff", b"text", TEXT.encode()]))
        chosen = [word for option in generator.sample(options, 3) for word in option]
        assert main(["generate", folder, *chosen]) in (0, 1, 2), chosen
        shown = capfd.readouterr().err
        assert "Traceback" not in shown and len(shown.splitlines()) <= 1, (chosen, shown)


def test_files_that_do_not_belong_together_are_named(folder, tmp_path, message):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}), encoding="utf-8")
    for arguments in (["generate", tmp_path / "model", TEXT], ["export", tmp_path / "model", tmp_path / "out"]):
        shown = message(1, *arguments)
        assert "config.json" in shown and "mlp" in shown and "24" in shown and "report" not in shown


def test_a_missing_tokenizer_is_named(folder, tmp_path, message, capfd):
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*token*"))
    model, bundle = tmp_path / "model", tmp_path / "out"
    assert "tokenizer" in message(1, "generate", model, TEXT)
    assert "tokenizer" in message(1, "evaluate", model, "--task", "docstrings", "--max-samples", 1)
    assert main(["export", str(model), str(bundle)]) == 0 and "no tokenizer" in capfd.readouterr().err
    assert "tokenizer" in message(1, "generate", bundle, TEXT)


# Exports


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "ct2"
    assert main(["export", folder, str(path), "--quantization", "float32"]) == 0
    return path


@pytest.mark.parametrize("options", [["--stream"], ["--no-stream"]], ids=str)
def test_an_export_generates_what_the_model_does(options, folder, bundle, printed, monkeypatch):
    text = printed("generate", folder, TEXT, "--max-new-tokens", 6)
    # The pipeline would move a model to an accelerator; an export has a device of its own.
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    assert printed("generate", bundle, TEXT, "--max-new-tokens", 6, *options) == text


def test_an_export_is_found_by_the_name_of_its_repository(folder, bundle, hub, tmp_path, printed, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    text = printed("generate", folder, TEXT, "--max-new-tokens", 6)
    for name, place in (("me/export", "."), ("me/model", "ctranslate2")):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=bundle, path_in_repo=place)
    assert printed("generate", "me/export", TEXT, "--max-new-tokens", 6) == text
    HfApi().upload_folder(repo_id="me/model", folder_path=folder)
    options = ("--max-new-tokens", 6, "--subfolder", "ctranslate2")
    assert printed("generate", "me/model", TEXT, *options) == text
    shutil.copytree(bundle, tmp_path / "local" / "ctranslate2")
    assert printed("generate", tmp_path / "local", TEXT, *options) == text


def test_the_agreement_of_an_export_is_printed(folder, tmp_path, printed, monkeypatch):
    splits = {"validation": Dataset.from_list(ROWS[:6])}
    monkeypatch.setattr("encdec_slm.trainers.engine_agreement.build_docstring_task", lambda: splits)
    shown = printed("export", folder, tmp_path / "out", "--quantization", "float32", "--agreement", "--rows", 3)
    assert "On 3 held-out rows" in shown and "equal tokens      100.00 %" in shown


@pytest.mark.slow
def test_an_export_to_onnx_generates_what_the_model_does(folder, tmp_path, printed):
    text = printed("generate", folder, TEXT, "--max-new-tokens", 6)
    for place, options in (("free", []), ("fixed", ["--static-lengths", "32", "--static-lengths", "64"])):
        assert "OrtEncDecSLM" in printed("export", folder, tmp_path / place, "--format", "onnx", *options)
        assert printed("generate", tmp_path / place, TEXT, "--max-new-tokens", 6) == text


# Evaluation and publication


def test_a_checkpoint_is_evaluated(folder, rows_file, tmp_path, printed):
    options = ["--task", "text", "--dataset-name", rows_file, "--max-samples", 3, "--max-new-tokens", 4]
    table = printed("evaluate", folder, *options, "--output-dir", tmp_path / "out", "--num-bootstrap", 10)
    assert "ROUGE-L" in table
    result = RunResults.load(tmp_path / "out" / "evaluation.json")
    assert result.num_rows == {"test": 3} and set(result.saved.metrics) >= {"rougeL", "exact"}
    assert table == printed("evaluate", "--model", folder, *options, "--num_bootstrap", 10)


def test_the_help_of_evaluate_names_every_task(printed):
    shown = printed("evaluate", "--help")
    assert all(task in shown for task in list_tasks())


@pytest.mark.slow
def test_a_repository_is_built_from_a_checkpoint_and_its_results(folder, rows_file, tmp_path, printed):
    options = ["--task", "text", "--dataset-name", rows_file, "--max-samples", 3, "--max-new-tokens", 4]
    printed("evaluate", folder, *options, "--output-dir", tmp_path / "out", "--num-bootstrap", 10)
    (tmp_path / "facts.yaml").write_text("hardware: one CPU core\n", encoding="utf-8")
    results, facts = tmp_path / "out" / "evaluation.json", tmp_path / "facts.yaml"
    shown = printed("publish", folder, tmp_path / "repository", "--results", results, "--facts", facts)
    assert "nothing was uploaded" in shown
    assert "one CPU core" in (tmp_path / "repository" / "README.md").read_text("utf-8")


# The Hub


READING = {
    "generate": "generate {name} text",
    "evaluate": "evaluate {name} --task text --dataset-name {rows}",
    "evaluate on a data set": "evaluate {folder} --task text --dataset-name {name}",
    "export": "export {name} {out}",
    "export onnx": "export {name} {out} --format onnx",
    "adapt": "adapt {name} {out}",
    "demo": "demo --model {name} --revision main",
    "label": "label {name} {rows} {out} --distributions topk:4",
    "label a data set": "label {teacher} {name} {out} --distributions topk:4",
    "finetune": "finetune --model_name_or_path {name} --train_file {rows} --output_dir {out} --use_cpu true",
    "finetune on a data set": "finetune --dataset_name {name} --output_dir {out} --use_cpu true",
    "finetune vision": "finetune --task vision --tasks digits --num_train_rows 4 --model_name_or_path {name} "
    "--output_dir {out} --use_cpu true",
    "distill": "distill --teacher_model_name_or_path {name} --train_file {rows} --output_dir {out} --use_cpu true",
}


@pytest.fixture
def last_line(folder, decoder_only, rows_file, tmp_path, capfd):
    """The last line that a command prints, which fails to read a name on the Hub and leaves no file."""

    def run(command, name):
        places = {"name": name, "rows": rows_file, "folder": folder, "teacher": decoder_only}
        places["out"] = tmp_path / "out"
        assert main([word.format(**places) for word in READING[command].split()]) == 1
        output = capfd.readouterr().err
        assert "Retry" not in output and "(`--debug`" not in output and not list(tmp_path.glob("out/*"))
        return output.splitlines()[-1]

    return run


@pytest.mark.parametrize("command", READING)
def test_the_advice_of_the_hub_is_shown(command, hub, last_line):
    hub.gated.add("you/gated")
    assert "Visit /you/gated to ask for access" in last_line(command, "you/gated")
    assert "me/mistyped" in last_line(command, "me/mistyped")
    assert len(hub.requests) < 12


@pytest.mark.parametrize("command", READING)
def test_an_unreachable_hub_is_asked_once(command, monkeypatch, last_line):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    shown = last_line(command, "me/mistyped")
    assert "me/mistyped" in shown and "local_files_only" not in shown


@pytest.mark.parametrize(
    ("arguments", "target", "expected"),
    [
        (
            ["publish", "m", "out", "--repo-id", "me/m", "--push", "--results", "a", "--results", "b", "--public"],
            "encdec_slm.hub_cards.publish",
            {"repo_id": "me/m", "push": True, "private": False, "results": ["a", "b"], "output_dir": "out"},
        ),
        (
            ["demo", "--model", "m", "--compare", "--port", "7861"],
            "encdec_slm.hub_cards.space.app.serve",
            {"model": "m", "compare": True, "port": 7861, "share": False},
        ),
        (
            ["convert", "model.pt", "out", "--tokenizer", "folder", "--model-config", '{"n_head": 6}'],
            "encdec_slm.conversion.convert_reference_checkpoint",
            {"path": "model.pt", "output_dir": "out", "tokenizer": "folder", "model_config": {"n_head": 6}},
        ),
        (
            ["bench", "--preset", "tiny", "--settings", "16:8", "--settings", "8:4", "--repetitions", "2"],
            "encdec_slm.benchmarks.measuring.run_benchmark",
            {"settings": [(8, 4), (16, 8)], "num_repetitions": 2, "num_threads": torch.get_num_threads()},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_reach_the_function_of_a_command(arguments, target, expected, monkeypatch, capfd):
    module, _, name = target.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))

    def stand_in(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        assert {key: bound.arguments[key] for key in expected} == expected
        raise ValueError("Reached.")

    monkeypatch.setattr(target, stand_in)
    assert main(arguments) == 1
    assert "Reached" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "export", "bench"])
def test_the_program_prints_no_notes_of_libraries(command, folder, printed, tmp_path):
    words = {
        "generate": ["generate", folder, "--max-new-tokens", "12"],
        "export": ["export", folder, "out", "--format", "onnx", "--quantization", "int8"],
        "bench": ["bench", "--preset", "tiny", "--settings", "8:4", "--only", "*r/transformers/float32/*"],
    }[command]
    run = subprocess.run([PROGRAM, *words], input=TEXT, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == ""
    if command == "generate":
        assert run.stdout == printed("generate", folder, TEXT, "--max-new-tokens", 12)
