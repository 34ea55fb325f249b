# SPDX-License-Identifier: Apache-2.0
"""The command line before and after a command runs: arguments, recipes, help, what is refused, and exit codes."""

import random
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from encdec_slm_cli import app, main, run_command, shared, training
from encdec_slm_cli.shared import Command

from encdec_slm.configuration import list_presets, load_recipe


PROGRAM = str(Path(sys.executable).with_name("encdec-slm"))
COMMANDS = [command.callback.__name__ for command in app.registered_commands]
OWN = {"finetune", "distill", "adapt", "convert", "evaluate", "export", "bench", "generate", "publish", "presets"}


def run_program(*arguments, **options):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def parsed(monkeypatch):
    """The values that the last command line gave to its command, which is not run."""
    values = {}

    def invoke(self, ctx):
        values.clear()
        values.update(ctx.params, extra=ctx.args)

    monkeypatch.setattr(Command, "invoke", invoke)
    return values


@pytest.fixture
def refused(capfd):
    """Runs a command line that is refused; its code and the one line that says why."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        output = capfd.readouterr()
        lines = [line for line in output.err.splitlines() if not line.startswith("No --config")]
        assert output.out == "" and len(lines) == 1, output
        assert lines[0].startswith("encdec-slm")
        return code, lines[0]

    return run


def write(path, values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_every_command_is_there():
    assert set(COMMANDS) == OWN | {"demo"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_options_and_examples_that_parse(command, capsys, parsed):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--config" in shown and "--debug" in shown and "Traceback" not in shown
    lines = [line.strip() for line in shown.partition("Examples:")[2].splitlines() if "encdec-slm" in line]
    assert lines
    for line in lines:
        words = shlex.split(line.partition("| ")[2] or line)
        assert words[:2] == ["encdec-slm", command]
        assert main(words[1:]) == 0, line
        if command in ("finetune", "distill"):
            known = training_keys(shown)
            assert {word.removeprefix("--") for word in parsed["extra"] if word.startswith("--")} <= known
            assert parsed["config"] is None or load_recipe(parsed["config"]).keys() <= known


def training_keys(shown):
    return set(re.findall(r"^  --(\w+)", shown, re.MULTILINE)) | set(
        re.findall(r"\b\w+\b", shown.partition("Keys of")[2])
    )


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_the_keys_in_the_help_are_those_of_the_dataclasses(command):
    from transformers import Seq2SeqTrainingArguments
    from trl import ModelConfig

    from encdec_slm.trainers import Seq2SeqDistillationConfig
    from encdec_slm.trainers.distilling import DistillArguments
    from encdec_slm.trainers.finetuning import FinetuneArguments

    of_finetune = (FinetuneArguments, Seq2SeqTrainingArguments, ModelConfig)
    kinds = {"finetune": of_finetune, "distill": (DistillArguments, Seq2SeqDistillationConfig)}[command]
    wanted = {name for kind in kinds for name, field in kind.__dataclass_fields__.items() if field.init}
    own = {name.removeprefix("--") for name, _ in training._own_keys(training.OWN_KEYS[command])}
    others = {
        field.target.id
        for package, path, kind in training.OTHER_KEYS[command]
        for field in training._fields(training._folder_of(package) / path, kind)
    }
    assert own | others == wanted
    assert all(text for _, text in training._own_keys(training.OWN_KEYS[command]))


def test_help_and_the_completion_of_a_word_do_not_wait_for_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_program("finetune", "--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of CPU time, which a busy machine does not stretch as it does seconds.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    code = "import sys; import encdec_slm_cli as c; "
    code += "c.main(['--help']); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    asked = {"_ENCDEC_SLM_COMPLETE": "complete_bash", "COMP_WORDS": "encdec-slm ex", "COMP_CWORD": "1"}
    assert run_program(env={"PATH": "/usr/bin:/bin", **asked}).stdout.strip() == "export"


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"encdec-slm \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_without_a_command_the_help_is_shown_and_nothing_was_done(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_presets_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr("encdec_slm.configuration.sizes.preset_table", lambda: "| preset |")
    assert main(["presets"]) == 0
    assert capsys.readouterr().out == "| preset |\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot"], "No such command 'exprot'. Did you mean 'export'?"),
        (["export"], "encdec-slm export: Missing argument 'MODEL'."),
        (["export", "a", "b", "c"], "unexpected extra argument"),
        (["export", "a", "b", "--rows", "many"], "valid integer"),
        (["export", "a", "b", "--format", "gguf"], "'gguf' is not one of"),
        (["export", "a", "b", "--static-lengths", "64"], "add --format onnx"),
        (["export", "a", "b", "--formt", "onnx"], "No such option: --formt"),
        (["generate", "m", "text", "--file", "f"], "leave one of them out"),
        (["generate", "m", "text", "--temperature", "0"], "give a number above 0"),
        (["generate", "m", "text", "--num-beams", "0"], "--num-beams"),
        (["publish", "m", "out", "--push"], "add --repo-id"),
        (["evaluate"], "Give one MODEL"),
        (["evaluate", "m", "--model", "n"], "Give one MODEL"),
        (["demo"], "--model"),
        (["demo", "--model", "m", "--port", "70000"], "65535"),
        (["bench", "--preset", "tiny-vlm"], "a text size is needed"),
        (["adapt", "a", "b", "--seed", "1"], "unrecognized arguments: --seed 1"),
        (["adapt", "a", "b", "--distill", "x", "--finetune", "y"], "exclude each other"),
        (["finetune", "--learning_rat", "1"], "The nearest valid key is `learning_rate`"),
        (["finetune", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["finetune", "rows.jsonl"], "'rows.jsonl', which belongs to no key"),
        (["finetune", "--config", "finetun"], "Unknown recipe 'finetun'"),
        (["finetune", "--train_file", "a", "--dataset_name", "b"], "Leave one of them out"),
        (["finetune", "--config", "vqa_synthetic", "--vocab_siz", "1"], "`vocab_size`"),
        (["distill", "--kd_ratio", "2", "--use_cpu", "true"], "`kd_ratio` is 2.0, but it is a share"),
        (["generate", "--config", "nowhere.yaml"], "Unknown recipe 'nowhere.yaml'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, message, refused):
    code, line = refused(*arguments)
    assert code == 2 and message in line and "--help`" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "{nowhere}", "text"],
        ["export", "{nowhere}", "{nowhere}/out"],
        ["export", "{nowhere}", "{nowhere}/out", "--format", "onnx"],
        ["adapt", "{nowhere}", "{nowhere}/out"],
        ["convert", "{nowhere}", "{nowhere}/out"],
        ["evaluate", "{nowhere}", "--task", "text", "--dataset-name", "{rows}"],
        ["evaluate", "{nowhere}", "--task", "chess"],
        ["publish", "{nowhere}", "{nowhere}/out"],
        ["demo", "--model", "{nowhere}"],
        ["finetune", "--model_name_or_path", "{nowhere}", "--train_file", "{rows}", "--use_cpu", "true"],
        ["finetune", "--train_file", "{nowhere}", "--use_cpu", "true"],
        ["finetune", "--train_file", "{rows}", "--use_cpu", "true", "--preset", "2m"],
        ["distill", "--train_file", "{nowhere}", "--use_cpu", "true"],
    ],
)
def test_what_fails_is_one_line_and_code_1(arguments, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"source": "a", "target": "b"}\n' * 9, encoding="utf-8")
    places = {"nowhere": tmp_path / "no" / "model", "rows": rows}
    run_folder = [f"--output_dir={tmp_path / 'run'}"] if arguments[0] in ("finetune", "distill") else []
    assert main([*(argument.format(**places) for argument in arguments), *run_folder]) == 1
    output = capfd.readouterr()
    # Above it stands what was done until then.
    assert "Traceback" not in output.err and output.err.splitlines()[-1].startswith("encdec-slm: ")
    assert "(`--debug` shows" not in output.err.splitlines()[-1]


def test_debug_shows_where_an_error_comes_from(tmp_path, capfd):
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--debug"]) == 1
    shown = capfd.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith("encdec-slm: ")


def test_a_bug_is_named_by_its_kind(monkeypatch, refused):
    monkeypatch.setattr("encdec_slm.configuration.sizes.preset_table", lambda: {}["sizes"])
    code, line = refused("presets")
    assert code == 1 and "KeyError: 'sizes' (`--debug` shows where" in line


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["finetune"], "trl", "train"),
        (["distill"], "trl", "train"),
        (["evaluate", "m"], "datasets", "evaluation"),
        (["demo", "--model", "m"], "gradio", "demo"),
    ],
)
def test_a_missing_package_is_answered_with_how_to_install_it(arguments, package, extra, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.startswith("encdec_slm.trainers.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("encdec-slm: ") and f"`{package}`" in last and f"pip install encdec-slm[{extra}]" in last


def test_a_recipe_gives_options_and_arguments_and_the_command_line_wins(tmp_path, parsed):
    values = {"model": "a", "output": "b", "format": "onnx", "static-lengths": [64, 128], "rows": 7}
    path = write(tmp_path / "export.yaml", {**values, "agreement": True, "quantization": None})
    assert main(["export", "--config", path]) == 0
    assert (parsed["model"], parsed["output"], parsed["format"]) == ("a", "b", "onnx")
    assert list(parsed["static_lengths"]) == [64, 128] and parsed["rows"] == 7 and parsed["agreement"] is True
    assert main(["export", "mine", f"--config={path}", "--rows", "8", "--static-lengths", "32"]) == 0
    assert (parsed["model"], parsed["output"], parsed["rows"]) == ("mine", "b", 8)
    assert list(parsed["static_lengths"]) == [32]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("finetune", "distill", "presets")])
def test_each_command_takes_a_recipe_of_all_its_options(command, tmp_path, parsed):
    import typer

    options = typer.main.get_command(app).commands[command].params
    values = {}
    for option in options:
        if option.name in shared.NOT_IN_A_FILE or option.name in ("install_completion", "show_completion"):
            continue
        is_list, is_flag = getattr(option, "multiple", False), getattr(option, "is_flag", False)
        numbers = {"N": 2, "T": 0.5}
        value = True if is_flag else "onnx" if option.name == "format" else numbers.get(option.metavar, "some")
        values[option.name] = [value] if is_list else value
    assert main([command, "--config", write(tmp_path / "recipe.yaml", values)]) == 0
    given = {name: list(parsed[name]) if isinstance(parsed[name], tuple) else parsed[name] for name in values}
    assert {name: str(value) for name, value in given.items()} == {name: str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modl": "a"}, "Unknown key `modl` in .* The nearest valid key is `model`"),
        ({"rows": [1, 2]}, r"`rows` in .* is \[1, 2\], but it is a text or a number"),
        ({"rows": "many"}, "'--rows'.* valid integer"),
        ({"agreement": "yes"}, "`agreement` in .* but it is true or false"),
        ({"static_lengths": {"a": 1}}, "but it is a list of texts or numbers"),
        ({"format": "gguf"}, "'gguf' is not one of"),
    ],
)
def test_a_recipe_that_does_not_fit_is_wrong_usage(values, message, tmp_path, refused):
    code, line = refused("export", "a", "b", "--config", write(tmp_path / "bad.yaml", values))
    assert code == 2 and re.search(message, line)


def test_lists_take_several_values_behind_one_option_and_hyphens_may_be_underscores(parsed):
    assert main(["export", "m", "out", "--static-lengths", "64", "256", "--rows=3"]) == 0
    assert list(parsed["static_lengths"]) == [64, 256]
    assert main(["export", "--static_lengths", "64", "m", "out"]) == 0
    assert (parsed["model"], parsed["output"], list(parsed["static_lengths"])) == ("m", "out", [64])
    assert main(["bench", "--settings", "8:4", "16:8", "--only", "*/a/*", "*/b/*", "--preset", "tiny"]) == 0
    assert list(parsed["settings"]) == ["8:4", "16:8"] and list(parsed["only"]) == ["*/a/*", "*/b/*"]
    assert main(["publish", "m", "out", "--results", "a.json", "b.json", "--push"]) == 0
    assert list(parsed["results"]) == ["a.json", "b.json"] and parsed["push"] is True
    assert main(["generate", "m", "--", "--text-that-looks-like-an-option"]) == 0
    assert parsed["text"] == "--text-that-looks-like-an-option"


def test_keys_of_a_training_that_follows_go_on_to_it(parsed):
    assert main(["adapt", "a", "b", "--distill", "distill_adapted", "--max_steps", "-1", "--encoder_layers", "3"]) == 0
    assert parsed["extra"] == ["--max_steps", "-1"] and parsed["encoder_layers"] == 3


def test_runs_on_images_are_known_by_their_keys():
    assert training._is_vision(["--config", "vqa_synthetic"])
    assert training._is_vision(["--config", "finetune_docstrings", "--preset", "tiny-vlm"])
    assert training._is_vision(["--config", "finetune_docstrings", "--image-column=image"])
    assert not training._is_vision(["--config", "finetune_docstrings", "--preset", "tiny"])


def test_no_command_line_ends_in_a_stack_trace(parsed, capfd):
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
        "--settings",
        "8:4",
    ]
    words += ["--task", "--results", "--max_steps", "--no-stream", "--stream", "--image", "finetune_xsum", "*", "\n"]
    for _ in range(120):
        arguments = [generator.choice(COMMANDS), *generator.choices(words, k=generator.randrange(6))]
        assert main(arguments) in (0, 1, 2), arguments
        assert "Traceback" not in capfd.readouterr().err, arguments


def test_ctrl_c_ends_with_130_and_no_trace(monkeypatch, refused):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("encdec_slm.configuration.sizes.preset_table", interrupt)
    code, line = refused("presets")
    assert code == 130 and line == "encdec-slm: Interrupted."


def test_a_script_speaks_under_its_own_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["examples/export_onnx.py", "m"])
    with pytest.raises(SystemExit, match="2"):
        run_command("export", "--format", "onnx")
    assert capsys.readouterr().err.startswith("export_onnx.py: Missing argument 'OUTPUT'.")
