# SPDX-License-Identifier: Apache-2.0
"""The command line around a command: help, options, recipes, error messages, streams, signals and exit codes."""

import functools
import io
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import typer
import yaml
from encdec_slm_cli import app, main
from encdec_slm_cli.console import name_options

from encdec_slm.configuration import list_presets


PROGRAM = str(Path(sys.executable).with_name("encdec-slm"))
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
TRAINING = ("finetune", "distill", "pretrain")


def run_program(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, timeout=120, env=environment, **options
    )


def parse(command, *words):
    """The values that a command line gives to its command, which is not run."""
    with GROUP.make_context("encdec-slm", [command]) as parent:
        ctx = COMMANDS[command].make_context(command, [str(word) for word in words], parent=parent)
        return {**ctx.params, "extra": list(ctx.args)}


@pytest.fixture
def refused(capfd):
    """Run a command line that fails; return its code and the one line that says why."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        output = capfd.readouterr()
        lines = [line for line in output.err.splitlines() if not line.startswith("No --config")]
        assert output.out == "" and len(lines) == 1 and lines[0].startswith("encdec-slm"), output
        return code, lines[0]

    return run


def write_yaml(path, values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_parse(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out.partition("Examples:")[2]
    lines = [line.strip() for line in re.split(r"^\S", shown, flags=re.MULTILINE)[0].splitlines() if line.strip()]
    assert lines
    for line in lines:
        program, name, *words = shlex.split(line.partition("| ")[2] or line, comments=True)
        assert (program, name) == ("encdec-slm", command)
        parse(command, *words)


@pytest.mark.parametrize("command", TRAINING)
def test_keys_in_the_help_and_its_examples_exist(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    known = set()
    for options in ([], ["--task", "vision"]) if command == "finetune" else ([],):
        assert main([command, *options, "--list-keys"]) == 0
        known |= set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert len(known) > 100
    examples = set(re.findall(r"--(\w+)", shown.partition("Examples:")[2].partition("Options:")[0]))
    listed = shown.partition("most used")[2].partition("Examples:")[0]
    keys = {
        word.strip()
        for line in re.findall(r"^    (\w+(?:, \w+)*)  ", listed, re.MULTILINE)
        for word in line.split(",")
    }
    assert len(keys) > 8 and keys <= known and examples - {"config", "task", "list"} <= known


@pytest.mark.parametrize("arguments", [[command, "--help"] for command in COMMANDS] + [["--version"]], ids=" ".join)
def test_help_does_not_import_torch(arguments):
    code = f"import sys, encdec_slm_cli as c; assert c.main({arguments}) == 0; print(*sys.modules, file=sys.stderr)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert not {"torch", "numpy", "transformers", "trl", "encdec_slm"} & set(modules)


def test_shells_complete_commands():
    request = {"_ENCDEC_SLM_COMPLETE": "complete_bash", "COMP_WORDS": "encdec-slm ex", "COMP_CWORD": "1"}
    assert run_program(env=request).stdout.strip() == b"export"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


# Wrong usage and failures


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["exprot"], "'export'"),
        (["export"], "'MODEL'"),
        (["export", "a", "b", "c"], "unexpected"),
        (["export", "a", "b", "--rows", "many"], "'--rows'"),
        (["export", "a", "b", "--format", "gguf"], "gguf"),
        (["export", "a", "b", "--static-lengths", "64"], "--format onnx"),
        (["export", "a", "b", "--formt", "onnx"], "--format"),
        (["generate", "m", "text", "--file", "f"], "--file"),
        (["generate", "m", "text", "--temperature", "0"], "--temperature"),
        (["generate", "m", "text", "--num-beams", "0"], "--num-beams"),
        (["generate", "m", "-1"], "`--`"),
        (["generate", "m", "- a list"], "`--`"),
        (["publish", "m", "out", "--push"], "--repo-id"),
        (["evaluate"], "MODEL"),
        (["evaluate", "m", "--model", "n"], "MODEL"),
        (["demo", "--model", "m", "--port", "70000"], "65535"),
        (["bench", "--preset", "tiny-vlm"], "--preset"),
        (["bench", "--settings", "16:1"], "--settings"),
        (["bench", "--settings", "16"], "--settings"),
        (["bench", "--devices", "tpu"], "--devices"),
        (["bench", "--repetitions", "0"], "--repetitions"),
        (["convert", "a", "b", "--model-config", "{"], "--model-config"),
        (["label", "a", "b", "c", "--distributions", "all"], "`--distributions`"),
        (["adapt", "a", "b", "--seed", "1"], "--seed"),
        (["adapt", "a", "b", "--distill", "x", "--finetune", "y"], "--finetune"),
        (["finetune", "--learning_rat", "1"], "`learning_rate`"),
        (["finetune", "--learning_rate", "fast"], "'fast'"),
        (["finetune", "rows.jsonl"], "'rows.jsonl'"),
        (["finetune", "--config", "finetun"], "'finetun'"),
        (["finetune", "--task", "audio"], "audio"),
        (["finetune", "--config", "vqa_synthetic", "--vocab_siz", "1"], "`vocab_size`"),
        (["distill", "--kd_ratio", "2", "--use_cpu", "true"], "`kd_ratio`"),
        (["generate", "--config", "nowhere.yaml"], "'nowhere.yaml'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_usage_ends_with_one_line_and_code_2(arguments, words, refused):
    code, line = refused(*arguments)
    assert code == 2 and words in line and "--help`" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "{missing}", "text"],
        ["export", "{missing}", "{missing}/out"],
        ["export", "{missing}", "{missing}/out", "--format", "onnx"],
        ["adapt", "{missing}", "{missing}/out"],
        ["convert", "{missing}", "{missing}/out"],
        ["evaluate", "{missing}", "--task", "text", "--dataset-name", "{rows}"],
        ["evaluate", "{missing}", "--task", "chess"],
        ["publish", "{missing}", "{missing}/out"],
        ["demo", "--model", "{missing}"],
        ["finetune", "--model_name_or_path", "{missing}", "--train_file", "{rows}", "--use_cpu", "true"],
        ["finetune", "--train_file", "{missing}", "--use_cpu", "true"],
        ["finetune", "--train_file", "{rows}", "--use_cpu", "true", "--preset", "2m"],
        ["finetune", "--config", "vqa_synthetic", "--tasks", "maps", "--use_cpu", "true"],
        ["distill", "--train_file", "{missing}", "--use_cpu", "true"],
    ],
    ids=" ".join,
)
def test_failures_end_with_one_line_and_code_1(arguments, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"source": "a", "target": "b"}\n' * 9, encoding="utf-8")
    places = {"missing": tmp_path / "no" / "model", "rows": rows}
    run_folder = [f"--output_dir={tmp_path / 'run'}"] if arguments[0] in TRAINING else []
    assert main([*(argument.format(**places) for argument in arguments), *run_folder]) == 1
    output = capfd.readouterr()
    # Status messages may stand above it.
    assert "Traceback" not in output.err and output.err.splitlines()[-1].startswith("encdec-slm: ")
    assert "(`--debug` shows" not in output.err.splitlines()[-1]


def test_debug_shows_the_stack_trace(tmp_path, capfd):
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--debug"]) == 1
    shown = capfd.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith("encdec-slm: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("sizes"), "KeyError: 'sizes' (`--debug`"),
        (OSError(28, "No space left on device", "/full"), "No space left on device: /full."),
    ],
)
def test_errors_of_other_code_are_named(error, words, monkeypatch, refused):
    def fail():
        raise error

    monkeypatch.setattr("encdec_slm.configuration.sizes.preset_table", fail)
    code, line = refused("presets")
    assert code == 1 and words in line


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["finetune"], "trl", "train"),
        (["distill"], "trl", "train"),
        (["export", "{model}", "{out}"], "ctranslate2", "export"),
        (["export", "{model}", "{out}", "--format", "onnx"], "onnx", "export"),
        (["demo", "--model", "{model}"], "gradio", "demo"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value,
)
def test_a_missing_package_is_answered_with_its_extra(
    arguments, package, extra, text_folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([word.format(model=text_folder, out=tmp_path / "out") for word in arguments]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"`{package}`" in last and f"pip install encdec-slm[{extra}]" in last


def test_messages_name_options_of_the_command_and_not_arguments_of_functions():
    def shown(command, message):
        return name_options(message, COMMANDS[command])

    assert shown("export", "Set `overwrite=True`.") == "Set `--overwrite`."
    assert (
        shown("generate", "`max_new_tokens` is 9, or `truncation=True`.")
        == "`--max-new-tokens` is 9, or `--truncation`."
    )
    assert shown("convert", '`model_config={"n_head": ...}`') == "`--model-config '{\"n_head\": ...}'`"
    assert shown("evaluate", "`model_or_path` and `num_beams=4`") == "`MODEL` and `--num-beams 4`"
    assert shown("finetune", "`output_dir` is a file") == "`output_dir` is a file"
    assert shown("distill", "`lmbda` is 1, set `seq_kd=True`.") == "`lmbda` is 1, set `--seq_kd true`."
    assert shown("distill", "Use `seq_kd=True, lmbda=0`.") == "Use `--seq_kd true --lmbda 0`."
    assert shown("generate", "Pass `do_sample=False`.") == "Pass `no --sample`."
    assert shown("presets", "`overwrite=True`") == "`overwrite=True`"
    assert shown("export", "Save it, or pass `tokenizer=AutoTokenizer.from_pretrained(...)`.") == "Save it."
    assert (
        shown("export", "Move it, or set `overwrite=True` to replace it.")
        == "Move it, or set `--overwrite` to replace it."
    )


def test_no_command_line_ends_in_a_stack_trace(capfd, monkeypatch):
    for command in app.registered_commands:
        monkeypatch.setattr(command, "callback", functools.wraps(command.callback)(lambda **values: None))
    generator = random.Random(0)
    words = [*COMMANDS, *list_presets(), "--config", "--help", "--version", "--debug", "--rows", "--format", "onnx"]
    words += [
        "-",
        "--",
        "",
        "-x",
        "--=",
        "=",
        "1",
        "-1",
        "ä",
        "\udcff",
        "a b",
        "--static-lengths",
        "8:4",
        "--settings",
    ]
    words += ["--task", "--results", "--max_steps", "--no-stream", "--stream", "--image", "finetune_xsum", "*", "\n"]
    for _ in range(120):
        arguments = [generator.choice([*COMMANDS]), *generator.choices(words, k=generator.randrange(6))]
        assert main(arguments) in (0, 1, 2), arguments
        assert "Traceback" not in capfd.readouterr().err, arguments


# Recipes


def test_a_recipe_gives_options_and_arguments_and_the_command_line_overrides_it(tmp_path):
    values = {"model": "a", "output": "b", "format": "onnx", "static-lengths": [64, 128], "rows": 7}
    path = write_yaml(tmp_path / "export.yaml", {**values, "agreement": True, "quantization": None})
    given = parse("export", "--config", path)
    assert (given["model"], given["output"], given["format"], given["agreement"]) == ("a", "b", "onnx", True)
    assert list(given["static_lengths"]) == [64, 128] and given["rows"] == 7 and given["quantization"] is None
    given = parse("export", "mine", f"--config={path}", "--rows", "8", "--static-lengths", "32")
    assert (given["model"], given["output"], given["rows"], list(given["static_lengths"])) == ("mine", "b", 8, [32])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in (*TRAINING, "presets")])
def test_a_recipe_can_give_all_options_of_a_command(command, tmp_path):
    (function,) = (one.callback for one in app.registered_commands if one.callback.__name__ == command)
    samples, values = {int: 2, float: 0.5, bool: True}, {}
    for name, kind in get_type_hints(function).items():
        parts = [kind, *get_args(kind), *(inner for part in get_args(kind) for inner in get_args(part))]
        choices = [get_args(part)[0] for part in parts if get_origin(part) is Literal]
        values[name] = next(iter([*choices, *(samples[part] for part in parts if part in samples), "some"]))
        values[name] = [values[name]] if list in map(get_origin, parts) else values[name]
    values = {name: value for name, value in values.items() if name not in ("ctx", "config")}
    given = parse(command, "--config", write_yaml(tmp_path / "recipe.yaml", values))
    given = {name: list(given[name]) if isinstance(given[name], tuple) else given[name] for name in values}
    assert {name: str(value) for name, value in given.items()} == {name: str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modl": "a"}, "`model`"),
        ({"rows": [1, 2]}, "'--rows'"),
        ({"rows": "many"}, "'--rows'"),
        ({"agreement": "perhaps"}, "--agreement"),
        ({"static_lengths": {"a": 1}}, "--static-lengths"),
        ({"format": "gguf"}, "gguf"),
    ],
)
def test_a_recipe_that_does_not_fit_is_wrong_usage(values, words, tmp_path, refused):
    code, line = refused("export", "a", "b", "--config", write_yaml(tmp_path / "bad.yaml", values))
    assert code == 2 and words in line


def test_options_can_be_repeated_and_hyphens_may_be_underscores():
    assert list(parse("export", "m", "o", "--static_lengths", "64", "--static-lengths=256")["static_lengths"]) == [
        64,
        256,
    ]
    assert list(parse("bench", "--settings", "8:4", "--settings", "16:8")["settings"]) == ["8:4", "16:8"]
    assert parse("generate", "m", "--", "--text-like-an-option")["text"] == "--text-like-an-option"
    given = parse("adapt", "a", "b", "--distill", "distill_adapted", "--max_steps", "-1", "--encoder_layers", "3")
    assert given["extra"] == ["--max_steps", "-1"] and given["encoder_layers"] == 3


# Streams and signals


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"?-?\n"), ("cp1252", b"?-\xe9\n"), ("utf-8", b"\xe2\x9c\x93-\xc3\xa9\n")]
)
def test_characters_that_a_console_cannot_show_are_replaced(encoding, shown, monkeypatch):
    outputs = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in outputs.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr("encdec_slm.configuration.sizes.preset_table", lambda: "✓-é")
    assert main(["presets"]) == 0 and main(["✓-é"]) == 2
    outputs["stderr"].flush()
    assert outputs["stdout"].buffer.getvalue() == shown and shown.strip() in outputs["stderr"].buffer.getvalue()


@pytest.mark.parametrize("redirection", [">&-", "| true", ">/dev/full"])
def test_closed_output_ends_with_one_line_and_code_1(redirection):
    command = f"set -o pipefail; (sleep 0.3; {shlex.quote(PROGRAM)} --version) {redirection}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    lines = run.stderr.decode().splitlines()
    assert run.returncode == 1 and len(lines) == 1 and lines[0].startswith("encdec-slm: "), lines


def test_closed_standard_error_loses_no_result():
    run = subprocess.run(["bash", "-c", f"{shlex.quote(PROGRAM)} --version 2>&-"], capture_output=True, timeout=120)
    assert run.returncode == 0 and run.stdout.startswith(b"encdec-slm 0.")


def test_ctrl_c_ends_with_code_130(monkeypatch, refused):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("encdec_slm.configuration.sizes.preset_table", interrupt)
    code, line = refused("presets")
    assert code == 130 and line == "encdec-slm: Interrupted."


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_without_leftovers(number, code, tmp_path):
    (tmp_path / "run.py").write_text(
        "import sys, tempfile, time, encdec_slm_cli as cli\n"
        "def presets():\n"
        "    with tempfile.TemporaryDirectory(dir='.'):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "cli.app.registered_commands[-1].callback = presets\n"
        "sys.exit(cli.main())\n"
    )
    # A signal that is ignored here, as behind `&` of a shell, would be ignored there.
    options = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL), "cwd": tmp_path}
    command = [sys.executable, "run.py", "presets"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        messages = process.communicate(timeout=30)[1]
    assert process.returncode == code and len(messages.splitlines()) == 1, messages
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]
