# SPDX-License-Identifier: Apache-2.0
"""`encdec-slm shell`: requests, answers, confidence, warnings, and the conversion of a model on first use."""

import io
import json
import math
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encdec_slm_cli import main, shell_model
from encdec_slm_cli.calibration import CALIBRATION_FILE, Calibration
from encdec_slm_cli.shell_syntax import close_line, is_complete, list_programs, outline, quote_literals

from conftest import build_model, build_tokenizer
from encdec_slm.export import CT2EncDecSLM, export_ctranslate2
from encdec_slm.run_results import RunResults


ROOT = Path(__file__).parent.parent
PROGRAM = str(Path(sys.executable).with_name("encdec-slm"))
REQUEST = "w7 w9 w4"
# Most tokens are options, so that commands differ in more than arguments.
WORDS = [f"w{number}" if number < 10 else f"-w{number}" for number in range(4, 97)]
FITTED = {"program_offsets": {}, "threshold": 0.5, "expected_calibration_error": 0.0, "num_examples": 10}
SURE = Calibration(slope=0.0, intercept=2.0, **FITTED)
NOT_SURE = Calibration(slope=0.0, intercept=-2.0, **FITTED)


def save_shell_folder(folder, words=WORDS):
    model = build_model(seed=3)
    model.generation_config.max_length = 9
    for part in (model, build_tokenizer(words=words)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shell_folder(tmp_path_factory):
    """A model of words; not to be changed."""
    return save_shell_folder(tmp_path_factory.mktemp("shell") / "model")


@pytest.fixture(scope="session")
def shell_export(shell_folder):
    """Its CTranslate2 export; not to be changed."""
    return export_ctranslate2(shell_folder, shell_folder.parent / "export")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encdec_slm"


@pytest.fixture
def run(capfd):
    """Run the command; return its exit code, and the lines of standard output and error without progress bars."""

    def run(*arguments):
        capfd.readouterr()
        code = main(["shell", *map(str, arguments)])
        output = capfd.readouterr()
        return code, output.out.splitlines(), [line for line in output.err.splitlines() if line and "%|" not in line]

    return run


# Answers


def test_answers_are_those_of_beam_search(run, shell_export):
    model, tokenizer = CT2EncDecSLM.from_pretrained(shell_export), build_tokenizer(words=WORDS)
    ids = tokenizer(REQUEST, return_tensors="pt").input_ids
    sequences = model.generate(ids, num_beams=20, num_return_sequences=20, length_penalty=0.0)
    candidates = tokenizer.decode(sequences, skip_special_tokens=True)
    code, commands, messages = run(REQUEST, "--model", shell_export, "-n", 20)
    assert code == 0 and messages == [] and len(commands) > 5 and set(commands) <= set(candidates)
    assert run(*REQUEST.split(), "--model", shell_export) == (0, commands[:1], [])


def test_commands_that_differ_in_arguments_are_one_answer(tmp_path):
    words = [f"w{number}" if number < 10 else f"a{number}" for number in range(4, 97)]
    model = shell_model.load_shell_model(str(save_shell_folder(tmp_path / "model", words=words)))
    source = [model.encode(REQUEST)[0]]
    (result,) = model.translator.translate_batch(
        source, beam_size=20, num_hypotheses=20, length_penalty=0, max_decoding_length=8
    )
    probabilities = {}
    for tokens in result.hypotheses:
        (scored,) = model.translator.score_batch(source, [tokens])
        # The commands stop at 8 tokens, without an end token, which `score_batch` adds.
        probability = math.exp(sum(scored.log_probs[: len(tokens)]))
        probabilities[tokens[0]] = probabilities.get(tokens[0], 0) + probability
    answers = model.answer(REQUEST, 20)
    assert len(answers) < 20 and {answer.command.split()[0] for answer in answers} == set(probabilities)
    for answer in answers:  # int8 sums of the two calls differ a little
        expected = math.log(probabilities[answer.command.split()[0]])
        assert answer.log_probability == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("line", "other", "is_equal"),
    [
        ("tar -x -f a.tar", "/bin/tar -f b.tar -x", True),
        ("ls a | wc -l", "ls b c | wc -l", True),
        ("ls | wc", "ls && wc", False),
        ("ls -a", "ls -l", False),
        ("echo $(ls -a)", "echo $(ls -l)", False),
    ],
)
def test_outline_is_programs_and_options(line, other, is_equal):
    assert (outline(line) == outline(other)) == is_equal


@pytest.mark.parametrize(
    ("calibration", "options", "expected"),
    [
        (SURE, [], ["confidence 88%"]),
        (NOT_SURE, [], ["not sure: confidence 11%, below 50%"]),
        (SURE, ["-q"], []),
        (NOT_SURE, ["-q"], ["not sure: confidence 11%, below 50%"]),
        (NOT_SURE, ["-n", 2], ["not sure: confidence 11%, below 50%", "confidence 11%"]),
        (None, [], []),
    ],
)
def test_confidence_is_calibrated(calibration, options, expected, run, shell_export, tmp_path):
    folder = shutil.copytree(shell_export, tmp_path / "model")
    if calibration is not None:
        calibration.save(folder)
    code, commands, messages = run(REQUEST, "--model", folder, *options)
    assert code == 0 and len(commands) == max(1, len(expected)) and [line.strip() for line in messages] == expected


def test_dangerous_answers_are_warned_of(run, tmp_path):
    folder = save_shell_folder(tmp_path / "model", words=[f"rm -rf /{'/' * number}" for number in range(93)])
    code, commands, messages = run("delete everything", "--model", folder, "-q")
    assert code == 0 and "rm -rf /" in commands[0]
    assert [line.partition(":")[0] for line in messages[1:]] == ["Warning"] and "whole file system" in messages[1]


def test_incomplete_commands_come_last_and_are_closed(run, tmp_path, monkeypatch):
    words = [word + "'" * (number % 2) for number, word in enumerate(WORDS)]
    folder = save_shell_folder(tmp_path / "model", words=words)
    assert all(map(is_complete, run(REQUEST, "--model", folder, "-n", 20)[1]))
    monkeypatch.setattr(shell_model, "close_line", lambda line: line)
    commands = run(REQUEST, "--model", folder, "-n", 20)[1]
    is_open = [command.count("'") % 2 for command in commands]
    assert set(is_open) == {0, 1} and is_open == sorted(is_open)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        *((line, True) for line in ("ls", "ls | wc", "(ls)", "echo 'a' \"b $(c) `d`\"", "sleep 1 &", r"ls \(")),
        *((line, False) for line in ("ls 'a", 'ls "a', "ls $'a", "ls `a", "ls $(a", "ls ${a", "(ls", "ls)", "ls |")),
        *((line, False) for line in ("ls &&", "ls ||", "ls \\", 'ls "$(a"', "ls >", "[ -f a", "[[ -f a", "ls; done")),
        *((line, False) for line in ("for f in *; do ls", "if true; then ls", "{ ls;", r"find \( -name a")),
        *((line, True) for line in ("for f in *; do ls; done", "if [ -f a ]; then ls; fi", "{ ls; }", "f() { ls; }")),
        *((line, True) for line in ("case a in a) b;; esac", "function f { ls; }", "tr '{' '}'", "echo done >&2")),
    ],
)
def test_completeness_of_commands(line, expected):
    assert is_complete(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('read -p "Name: $a', 'read -p "Name: $a"'),
        ('a=$(ls "b', 'a=$(ls "b")'),
        ("echo `date", "echo `date`"),
        ("echo ${a", "echo ${a}"),
        ("if true; then ls", "if true; then ls"),
        *((line, line) for line in ("ls", "ls &&", "ls >", "sleep 1 &", "ls \\")),
    ],
)
def test_open_commands_are_closed(line, expected):
    assert close_line(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cd /a && sudo /bin/ls -l | wc", ["cd", "sudo", "ls", "wc"]),
        ("A=1 echo $(date) `id`", ["echo", "date", "id"]),
        ("sudo -u bob ls", ["sudo"]),
        ("$EDITOR a; ./b.sh", ["b.sh"]),
        ("", []),
    ],
)
def test_programs_of_commands(line, expected):
    assert list_programs(line) == expected


@pytest.mark.parametrize(
    ("request_", "line", "expected"),
    [
        ('remove the folder "old photos"', "rm -rf old photos", "rm -rf 'old photos'"),
        ("copy 'final report.pdf' to /tmp", "cp ./final report.pdf /tmp", "cp ./'final report.pdf' /tmp"),
        ("list “my files”", "ls my files/a; ls my files", "ls 'my files'/a; ls 'my files'"),
        ("commit with the message `fix a bug`", "git commit -m fix a bug", "git commit -m 'fix a bug'"),
        ('find "old photos"', "find . -name 'old photos'", "find . -name 'old photos'"),
        ('find "old photos"', r"find . -name old\ photos -o -name bold photos", None),
        ("run 'ls -l' in the background", "nohup ls -l &", None),
        ("run 'my script' now", "my script", None),
        ("don't delete bob's files or ann's", "ls s files or ann", None),
        ('delete "notes.txt"', "rm notes.txt", None),
    ],
)
def test_quoted_names_of_a_request_are_quoted(request_, line, expected):
    assert quote_literals(line, request_, ["ls"]) == (expected or line)


def test_a_program_that_is_not_known_is_not_sure(run, shell_export, tmp_path):
    folder = shutil.copytree(shell_export, tmp_path / "model")
    commands = run(REQUEST, "--model", shell_export, "-n", 20)[1]
    first, other = commands[0].split()[0], next(command for command in commands if command.split()[0][0] != "w")
    assert first not in REQUEST.split()
    replace(SURE, programs=["ls"]).save(folder)
    assert run(REQUEST, "--model", folder)[1:] == (commands[:1], ["  not sure: confidence 0%, below 50%"])
    replace(SURE, programs=[other.split()[0]]).save(folder)
    assert run(REQUEST, "--model", folder)[1:] == ([other], ["  confidence 88%"])


def test_the_script_calibrates_a_model(shell_export, tmp_path, capsys):
    folder = shutil.copytree(shell_export, tmp_path / "model")
    model = shell_model.load_shell_model(str(folder))
    requests = [f"w{number} w{number + 1}" for number in range(4, 34)]
    rows = [
        {"source": request, "target": model.answer(request)[0].command if number % 3 else "ls"}
        for number, request in enumerate(requests)
    ]
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("long", "short", "test")]
    for path, number in zip(paths, (30, 12, 30), strict=True):
        Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows[:number]))
    script = runpy.run_path(str(ROOT / "examples" / "calibrate_shell.py"))
    arguments = ["--train", paths[0], "--validation", *paths[:2], "--test", paths[2], "--threshold", "0.3"]
    script["main"]([str(folder), *arguments, "--output-dir", str(tmp_path / "out")])
    calibration = Calibration.load(folder)
    assert calibration.num_examples == 42 and calibration.threshold == 0.3
    counts = Counter(list_programs(row["target"])[0] for row in rows)
    assert calibration.programs == sorted(name for name, count in counts.items() if count >= 3 and name[0] != "-")
    results = RunResults.load(tmp_path / "out" / "test" / "evaluation.json")
    assert results.command.endswith("MODEL --train long.jsonl --validation long.jsonl short.jsonl --test test.jsonl")
    assert capsys.readouterr().out.count("66.7% right") == 3


# Requests


@pytest.mark.parametrize("content", [REQUEST, f"{REQUEST}\n", "\ufeff w7\tw9\r\n w4 \x1b\n"])
def test_the_request_is_read_from_a_pipe(content, run, shell_export, monkeypatch):
    expected = run(REQUEST, "--model", shell_export)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert run("--model", shell_export) == expected


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"", "empty"), (b" \n\t\x1b", "empty"), (b"caf\xe9", "UTF-8"), (b"a\0b", "zero bytes")],
)
def test_requests_that_are_no_text_are_refused(content, name, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code, commands, messages = run()
    assert (code, commands, len(messages)) == (1, [], 1) and name in messages[0]


def test_a_missing_request_is_wrong_usage(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, commands, messages = run()
    assert (code, commands, len(messages)) == (2, [], 1) and "REQUEST" in messages[0]


def test_only_the_beginning_of_a_long_request_is_read(run, shell_export):
    words = ["w7", "w9"] * 50
    code, commands, messages = run(*words, "--model", shell_export)
    assert code == 0 and len(messages) == 1 and "101" in messages[0] and "64" in messages[0]
    assert commands == run(*words[:63], "--model", shell_export)[1]


# Models


@pytest.mark.parametrize(("kind", "name"), [("missing", "missing"), ("empty", "config.json"), ("other", "bert")])
def test_folders_that_are_no_shell_model_are_refused(kind, name, run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "other":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    code, commands, messages = run(REQUEST, "--model", folder)
    assert (code, commands, len(messages)) == (1, [], 1) and name in messages[0]


def test_without_a_shell_model_the_message_names_the_option(run, monkeypatch):
    monkeypatch.setattr(shell_model, "DEFAULT_FOLDERS", (Path("nowhere"),))
    code, commands, messages = run(REQUEST)
    assert (code, commands, len(messages)) == (1, [], 1) and "--model" in messages[0]


def test_without_a_tokenizer_the_model_is_refused(run, shell_folder, tmp_path):
    folder = shutil.copytree(shell_folder, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    code, commands, messages = run(REQUEST, "--model", folder)
    assert (code, commands) == (1, []) and "tokenizer.json" in messages[-1]


def test_a_missing_engine_is_named_with_its_extra(run, shell_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    code, commands, messages = run(REQUEST, "--model", shell_folder)
    assert (code, commands, len(messages)) == (1, [], 1) and "encdec-slm[export]" in messages[0]


def test_a_model_is_converted_once(run, shell_folder, cache, tmp_path):
    code, commands, messages = run(REQUEST, "--model", shell_folder)
    assert code == 0 and len(messages) == 1 and str(shell_folder) in messages[0]
    assert run(REQUEST, "--model", shutil.copytree(shell_folder, tmp_path / "copy")) == (0, commands, [])
    (export,) = cache.iterdir()
    (export / "model.bin").write_bytes(b"")
    assert run(REQUEST, "--model", shell_folder)[1] == commands
    assert [path.name for path in cache.iterdir()] == [export.name]


def test_other_weights_are_converted_anew(run, shell_folder, cache, tmp_path):
    other = shutil.copytree(shell_folder, tmp_path / "other")
    build_model(seed=4).save_pretrained(other)
    assert run(REQUEST, "--model", shell_folder)[1] != run(REQUEST, "--model", other)[1]
    assert len(list(cache.iterdir())) == 2


def test_an_export_beside_the_model_is_used(run, shell_folder, shell_export, cache, tmp_path):
    folder = shutil.copytree(shell_folder, tmp_path / "model")
    shutil.copytree(shell_export, folder / "ctranslate2")
    SURE.save(folder)
    code, _, messages = run(REQUEST, "--model", folder)
    assert code == 0 and messages == ["  confidence 88%"] and not cache.exists()


@pytest.mark.slow
def test_two_processes_may_convert_at_once(shell_folder, cache):
    command = [PROGRAM, "shell", REQUEST, "--model", str(shell_folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs[0] == outputs[1] != "" and [process.returncode for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 1


def test_an_interrupted_conversion_leaves_nothing(run, shell_folder, cache, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", interrupt)
        assert run(REQUEST, "--model", shell_folder)[0] == 130
    assert list(cache.iterdir()) == []
    (cache / f"{shell_model.TEMPORARY_PREFIX}killed").mkdir()
    os.utime(cache / f"{shell_model.TEMPORARY_PREFIX}killed", (0, 0))
    assert run(REQUEST, "--model", shell_folder)[0] == 0 and len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_not_needed(run, shell_folder, shell_export, cache):
    cache.parent.write_text("a file")
    code, commands, messages = run(REQUEST, "--model", shell_folder)
    assert (code, commands) == (0, run(REQUEST, "--model", shell_export)[1])
    assert len(messages) == 2 and "XDG_CACHE_HOME" in messages[1]


def test_a_new_process_answers_without_torch(shell_export):
    code = (
        "import sys, encdec_slm_cli, encdec_slm_cli.calibration; code = encdec_slm_cli.main(sys.argv[1:]); "
        "print(code, {'torch', 'transformers', 'numpy', 'encdec_slm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "shell", REQUEST, "--model", str(shell_export)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.stdout.splitlines()[1:] == ["0 set()"], finished


@pytest.mark.parametrize("redirection", ["| true", ">&-", "> /dev/full"])
def test_output_that_cannot_be_written_ends_with_one_line(redirection, shell_export):
    words = shlex.join([PROGRAM, "shell", REQUEST, "--model", str(shell_export)])
    command = f"set -o pipefail; (sleep 0.1; {words}) {redirection}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1 and len(finished.stderr.splitlines()) == 1, finished


# Calibration


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps({"slope": "a"})])
def test_a_damaged_calibration_is_refused(text, run, shell_export, tmp_path):
    folder = shutil.copytree(shell_export, tmp_path / "model")
    (folder / CALIBRATION_FILE).write_text(text)
    code, commands, messages = run(REQUEST, "--model", folder)
    assert (code, commands, len(messages)) == (1, [], 1) and CALIBRATION_FILE in messages[0]
