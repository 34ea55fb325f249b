# SPDX-License-Identifier: Apache-2.0
"""The commands on tiny models: from rows to a trained folder, an export, a text on standard output, a repository."""

import importlib
import inspect
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from encdec_slm_cli import main
from PIL import Image

from conftest import randomised
from encdec_slm import EncDecSLMForConditionalGeneration, EncDecVLMConfig, EncDecVLMForConditionalGeneration
from encdec_slm.configuration import load_preset
from encdec_slm.run_results import RunResults
from encdec_slm.trainers.evaluation import list_tasks
from encdec_slm.trainers.run_reports import preset_config
from encdec_slm.trainers.seq2seq_data import train_tokenizer
from encdec_slm.trainers.vqa import new_processor


PROGRAM = str(Path(sys.executable).with_name("encdec-slm"))
ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]
TEXT = ROWS[0]["source"]
SHORT = [
    *("--max_steps", "1", "--max_eval_samples", "2", "--save_strategy", "no", "--use_cpu", "true"),
    *("--per_device_train_batch_size", "4", "--vocab_size", "300", "--disable_tqdm", "true"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text model of random weights, which ends no text by itself."""
    path = tmp_path_factory.mktemp("text") / "model"
    tokenizer = train_tokenizer((row["source"] for row in ROWS), 300, 64)
    model = randomised(EncDecSLMForConditionalGeneration(preset_config("tiny", tokenizer)))
    model.generation_config.min_new_tokens = 3
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vision") / "model"
    tokenizer = train_tokenizer(["what digit is left of the 7?"], 300, 64)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    fields = load_preset("tiny-vlm").to_dict()
    fields["text_config"]["vocab_size"] = len(tokenizer)
    config = EncDecVLMConfig.from_dict({**fields, "image_token_id": len(tokenizer) - 1})
    EncDecVLMForConditionalGeneration(config).save_pretrained(path)
    new_processor(config, tokenizer).save_pretrained(path)
    Image.new("RGB", (60, 40), "red").save(path.parent / "picture.png")
    return str(path)


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
def written(capfd):
    """What a command line that succeeds writes to standard output."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return capfd.readouterr().out

    return run


def test_a_model_is_fine_tuned_and_the_command_line_wins_over_the_recipe(rows_file, tmp_path, written):
    recipe = tmp_path / "mine.yaml"
    values = {"preset": "tiny", "output_dir": "nowhere", "train_file": rows_file, "max_target_length": 8}
    recipe.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    shown = written("finetune", "--config", recipe, *SHORT, "--output_dir", tmp_path / "run")
    assert "held-out rows" in shown and str(tmp_path / "run") in shown
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert results["train_steps"] == 1 and results["model"] == "tiny"


def test_without_a_recipe_a_small_default_is_named_and_trained(rows_file, tmp_path, capfd):
    output = ["--train_file", rows_file, f"--output_dir={tmp_path / 'run'}", "--preset", "tiny"]
    assert main(["finetune", *output, *SHORT]) == 0
    assert "going by the recipe finetune_docstrings" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["rows"]["train"]["rows"] == 32


def test_a_vision_text_model_is_trained_by_its_recipe(tmp_path, written):
    tasks = ["--tasks", "digits", "--num_train_rows", "8", "--max_target_length", "4", "--preset", "tiny-vlm"]
    workers = ["--dataloader_num_workers", "0", "--eval_strategy", "no", "--output_dir", tmp_path / "run"]
    shown = written("finetune", "--config", "vqa_synthetic", *SHORT, *tasks, *workers)
    assert "digits" in shown and (tmp_path / "run" / "contact_sheet.png").is_file()


def test_a_student_is_distilled(rows_file, tmp_path, written, monkeypatch):
    monkeypatch.setattr("encdec_slm.trainers.distilling.NUM_TIMED_SOURCES", 2)
    monkeypatch.setattr("encdec_slm.trainers.distilling.NUM_TIMED_TOKENS", 3)
    tiny = ["--preset", "tiny", "--teacher_preset", "tiny", "--teacher_num_train_epochs", "0.25"]
    tiny += ["--max_completion_length", "8", "--train_file", rows_file, "--compare_with_cross_entropy", "false"]
    shown = written("distill", "--output_dir", tmp_path / "run", *SHORT, *tiny)
    assert "teacher" in shown and "distilled student" in shown
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_text_is_written_from_an_argument_a_file_and_standard_input_alike(folder, tmp_path, written, standard_input):
    (tmp_path / "source.py").write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"\r\n")
    texts = [written("generate", folder, TEXT, "--max-new-tokens", 12)]
    assert len(texts[0].strip()) > 0 and "Loading" not in texts[0]
    texts.append(written("generate", folder, "--file", tmp_path / "source.py", "--max-new-tokens", 12))
    for option in ([], ["--file", "-"]):
        standard_input(TEXT.encode() + b"\n")
        texts.append(written("generate", folder, *option, "--max-new-tokens", 12))
    texts.append(written("generate", folder, TEXT, "--max_new_tokens=12", "--no-stream"))
    assert len(set(texts)) == 1


def test_beams_and_samples_are_written(folder, written):
    greedy = written("generate", folder, TEXT, "--max-new-tokens", 12)
    assert written("generate", folder, TEXT, "--max-new-tokens", 12, "--num-beams", 3) != ""
    hot = {written("generate", folder, TEXT, "--max-new-tokens", 12, "--temperature", 2.5) for _ in range(3)}
    assert hot != {greedy}
    assert written("generate", folder, TEXT, "--max-new-tokens", 12, "--sample", "--no-stream") != ""


def test_a_recipe_of_generate_is_overridden(folder, tmp_path, written):
    recipe = tmp_path / "writing.yaml"
    recipe.write_text(f"model: {folder}\ntext: {TEXT!r}\nmax_new_tokens: 3\nstream: false\n", encoding="utf-8")
    short, long = (
        written("generate", "--config", recipe),
        written("generate", "--config", recipe, "--max-new-tokens", 9),
    )
    assert long == written("generate", folder, TEXT, "--max-new-tokens", 9) and short != long


def test_a_question_about_a_picture_is_answered(seeing_folder, written):
    asked = ["what?", "--image", Path(seeing_folder).parent / "picture.png", "--max-new-tokens", 5]
    answer = written("generate", seeing_folder, *asked)
    assert answer == written("generate", seeing_folder, *asked, "--no-stream")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"\x89PNG\r\n\x1a\n", "is not UTF-8"), (b"a\0b", "has zero bytes")],
)
def test_what_is_no_text_is_refused_with_a_sentence(content, message, folder, standard_input, tmp_path, capfd):
    standard_input(content)
    assert main(["generate", folder]) == 1
    (tmp_path / "file").write_bytes(content)
    assert main(["generate", folder, "--file", str(tmp_path / "file")]) == 1
    output = capfd.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 2
    assert all(message in line and line.startswith("encdec-slm: The text (") for line in output.err.splitlines())


def test_what_generate_cannot_do_is_said(folder, seeing_folder, standard_input, tmp_path, capfd):
    picture = str(Path(seeing_folder).parent / "picture.png")
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    standard_input(b"", is_terminal=True)
    cases = [
        ([folder], 2, "There is no text"),
        ([folder, TEXT, "--image", picture], 2, "a text model, which sees no pictures"),
        ([seeing_folder, "what?"], 2, "add --image PICTURE"),
        ([seeing_folder, "what?", "--image", str(tmp_path / "notes.txt")], 1, "cannot be read as a picture"),
        ([seeing_folder, "what?", "--image", str(tmp_path / "none.png")], 1, "there is no such file"),
        ([folder, "--file", str(tmp_path / "none.txt")], 1, "cannot be read (No such file or directory)"),
        ([folder, "--file", str(tmp_path)], 1, "cannot be read (Is a directory)"),
        ([folder, TEXT, "--stream", "--num-beams", "2"], 2, "add --num-beams 1"),
        ([str(tmp_path), TEXT], 1, "could not be loaded"),
        ([folder, "a " * 4000], 1, "allows"),
    ]
    for arguments, code, message in cases:
        assert main(["generate", *arguments]) == code, arguments
        output = capfd.readouterr()
        assert output.out == "" and message in output.err and len(output.err.splitlines()) == 1, output


def test_a_text_that_is_too_long_is_cut_when_asked(folder, written):
    assert written("generate", folder, "a " * 4000, "--truncation", "--max-new-tokens", 3).endswith("\n")


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


def test_an_export_to_ctranslate2_writes_what_the_model_writes(folder, tmp_path, written):
    exported = written("export", folder, tmp_path / "ct2", "--quantization", "float32")
    assert "CT2EncDecSLM.from_pretrained" in exported
    assert main(["export", folder, str(tmp_path / "ct2")]) == 1
    written("export", folder, tmp_path / "ct2", "--overwrite", "--quantization", "float32")
    text = written("generate", folder, TEXT, "--max-new-tokens", 6)
    for option in ("--stream", "--no-stream"):
        assert written("generate", tmp_path / "ct2", TEXT, "--max-new-tokens", 6, option) == text


@pytest.mark.slow
def test_an_export_to_onnx_writes_what_the_model_writes(folder, tmp_path, written):
    text = written("generate", folder, TEXT, "--max-new-tokens", 6)
    for place, options in (("free", []), ("fixed", ["--static-lengths", "32", "64"])):
        assert "OrtEncDecSLM" in written("export", folder, tmp_path / place, "--format", "onnx", *options)
        assert written("generate", tmp_path / place, TEXT, "--max-new-tokens", 6) == text


@pytest.mark.parametrize(("form", "package"), [("ctranslate2", "ctranslate2"), ("onnx", "onnx")])
def test_an_export_without_its_runtime_is_answered_with_how_to_get_it(
    form, package, folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", folder, str(tmp_path / "out"), "--format", form]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"`{package}`" in last and "pip install encdec-slm[export]" in last


def test_a_checkpoint_is_evaluated(folder, rows_file, tmp_path, written):
    given = ["--task", "text", "--dataset-name", rows_file, "--max-samples", 3, "--max-new-tokens", 4]
    table = written("evaluate", folder, *given, "--output-dir", tmp_path / "out", "--num-bootstrap", 10)
    assert "ROUGE-L" in table
    result = RunResults.load(tmp_path / "out" / "evaluation.json")
    assert result.num_rows == {"test": 3} and set(result.saved.metrics) >= {"rougeL", "exact"}
    assert table == written("evaluate", "--model", folder, *given, "--num_bootstrap", 10)


def test_the_help_of_evaluate_names_every_task(written):
    shown = written("evaluate", "--help")
    assert all(task in shown for task in list_tasks())


@pytest.mark.slow
def test_a_repository_is_built_from_a_checkpoint_and_its_results(folder, rows_file, tmp_path, written):
    given = ["--task", "text", "--dataset-name", rows_file, "--max-samples", 3, "--max-new-tokens", 4]
    written("evaluate", folder, *given, "--output-dir", tmp_path / "out", "--num-bootstrap", 10)
    (tmp_path / "facts.yaml").write_text("hardware: one CPU core\n", encoding="utf-8")
    results, facts = tmp_path / "out" / "evaluation.json", tmp_path / "facts.yaml"
    shown = written("publish", folder, tmp_path / "repository", "--results", results, "--facts", facts)
    assert "nothing was uploaded" in shown
    assert "one CPU core" in (tmp_path / "repository" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "target", "wanted"),
    [
        (
            ["publish", "m", "out", "--repo-id", "me/m", "--push", "--results", "a.json", "b.json", "--public"],
            "encdec_slm.hub_cards.publish",
            {"repo_id": "me/m", "push": True, "private": False, "results": ["a.json", "b.json"], "output_dir": "out"},
        ),
        (
            ["demo", "--model", "m", "--compare", "--port", "7861"],
            "encdec_slm.hub_cards.space.app.serve",
            {"model": "m", "compare": True, "port": 7861, "share": False},
        ),
        (
            ["convert", "model.pt", "out", "--tokenizer", "folder"],
            "encdec_slm.conversion.convert_reference_checkpoint",
            {"path": "model.pt", "output_dir": "out", "tokenizer": "folder", "overwrite": False},
        ),
        (
            ["bench", "--preset", "tiny", "--settings", "16:8", "8:4", "--repetitions", "2", "--threads", "1"],
            "encdec_slm.benchmarks.measuring.run_benchmark",
            {"settings": [(8, 4), (16, 8)], "num_repetitions": 2, "num_threads": 1},
        ),
    ],
)
def test_options_reach_the_function_behind_a_command(arguments, target, wanted, monkeypatch, capfd):
    module, _, name = target.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))

    def stand_in(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        assert {key: given.arguments[key] for key in wanted} == wanted
        raise ValueError("Reached.")

    monkeypatch.setattr(target, stand_in)
    assert main(arguments) == 1
    assert "Reached." in capfd.readouterr().err


def run_program(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, env=environment, **options)


@pytest.mark.slow
def test_the_program_writes_the_text_alone_to_standard_output(folder, written):
    run = run_program("generate", folder, "--max-new-tokens", 12, input=TEXT.encode())
    assert run.returncode == 0 and run.stderr == b""
    assert run.stdout.decode() == written("generate", folder, TEXT, "--max-new-tokens", 12)


@pytest.mark.parametrize(
    "arguments", [["finetune", "--help"], pytest.param(["generate", "{folder}", TEXT], marks=pytest.mark.slow)]
)
def test_a_reader_that_goes_away_leaves_no_trace(arguments, folder):
    command = [PROGRAM, *(argument.format(folder=folder) for argument in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait() == 1 and process.stderr.read() == b""


@pytest.mark.slow
def test_ctrl_c_leaves_no_trace(folder):
    # Behind `&` of a shell the signal is ignored, as in what is started from there.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    command = [PROGRAM, "generate", folder, TEXT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heeds) as process:
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        output, told = process.communicate()
        assert (process.returncode, output) == (130, b"")
        assert told == b"encdec-slm: Interrupted.\n"
