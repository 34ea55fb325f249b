# SPDX-License-Identifier: Apache-2.0
"""No command loses a file: outputs that hold other files or overlap an input, earlier outputs, and failed runs."""

import json
import os
import shutil

import pytest
import torch
from encdec_slm_cli import main
from reference_files import MU_CONFIG, make_weights
from transformers import AutoModelForCausalLM

from conftest import build_byte_tokenizer, build_config, randomize, save_text_folder, save_vision_folder
from encdec_slm.configuration import decoder_only_twin


TRAINING = [
    *("--max_steps", "1", "--max_eval_samples", "2", "--save_strategy", "no", "--use_cpu", "true"),
    *("--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--report_to", "none"),
]
ROWS = ["--train_file", "{rows}", *TRAINING]
# What each command reads, and its words.
COMMANDS = {
    "adapt": ("decoder_only", ["adapt", "{source}", "{output}"]),
    "convert": ("reference", ["convert", "{source}/model.pt", "{output}"]),
    "export": ("text", ["export", "{source}", "{output}"]),
    "export onnx": ("text", ["export", "{source}", "{output}", "--format", "onnx"]),
    "publish": ("text", ["publish", "{source}", "{output}"]),
    "finetune": ("text", ["finetune", "--model_name_or_path", "{source}", "--output_dir", "{output}", *ROWS]),
    "finetune vision": (
        "vision",
        [
            *(
                "finetune",
                "--task",
                "vision",
                "--model_name_or_path",
                "{source}",
                "--output_dir",
                "{output}",
                *TRAINING,
            ),
            *("--tasks", "digits", "--num_train_rows", "4", "--dataloader_num_workers", "0", "--eval_strategy", "no"),
        ],
    ),
    "distill": (
        "text",
        [
            *("distill", "--model_name_or_path", "{source}", "--output_dir", "{output}", *ROWS),
            *("--teacher_model_name_or_path", "{decoder_only}", "--compare_with_cross_entropy", "false"),
        ],
    ),
    "distill from the teacher": (
        "decoder_only",
        [
            *("distill", "--teacher_model_name_or_path", "{source}", "--output_dir", "{output}", *ROWS),
            *("--student_from_teacher", "true", "--compare_with_cross_entropy", "false"),
        ],
    ),
    "evaluate": (
        "text",
        [
            *("evaluate", "{source}", "--output-dir", "{output}", "--task", "text", "--dataset-name", "{rows}"),
            *("--max-samples", "1", "--max-new-tokens", "2", "--num-bootstrap", "2"),
        ],
    ),
    "label": ("decoder_only", ["label", "{source}", "{rows}", "{output}", "--distributions", "topk:4"]),
    "bench": (None, ["bench", "--preset", "tiny", "--output", "{output}"]),
}
# Commands that add files to any folder that has none of their names.
ADDING = ("evaluate", "label")
REPLACING = ("adapt", "convert", "export", "export onnx")
# The file that a user looks at.
MAIN_FILES = {"evaluate": "evaluation.json", "bench": "benchmark.png"}
# Names that commands write, in a folder that no command wrote.
FOREIGN = (
    *("notes.txt", "config.json", "model.safetensors", "model.bin", "README.md", "tokenizer.json", "results.json"),
    *("predictions.jsonl", "evaluation.json", "benchmark.json", "benchmark.png", "loss.png"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_text_folder(folder / "text")
    save_vision_folder(folder / "vision")
    tokenizer = build_byte_tokenizer()
    config = decoder_only_twin(build_config(vocab_size=len(tokenizer), max_position_embeddings=512))
    for part in (randomize(AutoModelForCausalLM.from_config(config)), tokenizer):
        part.save_pretrained(folder / "decoder_only")
    (folder / "reference").mkdir()
    torch.save({"model_state_dict": make_weights(), "model_config": MU_CONFIG}, folder / "reference" / "model.pt")
    rows = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def workspace(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "work")
    return tmp_path / "work"


def run(command, workspace, output, *options):
    """The exit code of a command that writes to a folder; its input lies in the workspace."""
    name, words = COMMANDS[command]
    places = {"source": workspace / (name or ""), "output": output, "rows": workspace / "rows.jsonl"}
    places["decoder_only"] = workspace / "decoder_only"
    return main([*(word.format(**places) for word in words), *options])


def snapshot(folder):
    """The content of every file below a folder, and the targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


def place_output(kind, command, workspace):
    """A path that a user may give as the output by mistake."""
    source = workspace / (COMMANDS[command][0] or "")
    paths = {
        "foreign": workspace / "mine",
        "one file": workspace / "mine",
        "file": workspace / "mine.txt",
        "input": source,
        "inside": source / "inside",
        "parent": source.parent,
        "link": workspace / "link",
    }
    if kind in ("foreign", "one file"):
        paths[kind].mkdir()
        for name in FOREIGN if kind == "foreign" else [MAIN_FILES.get(command, "README.md")]:
            (paths[kind] / name).write_text(f"{{}} mine: {name}", encoding="utf-8")
    elif kind == "file":
        paths[kind].write_text("mine", encoding="utf-8")
    elif kind == "link":
        paths[kind].symlink_to(source)
    return paths[kind]


@pytest.mark.parametrize("kind", ["foreign", "one file", "file", "input", "inside", "parent", "link"])
@pytest.mark.parametrize(
    ("command", "options"),
    [(name, []) for name in COMMANDS] + [(name, ["--overwrite"]) for name in REPLACING],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_no_command_loses_a_file_that_it_did_not_write(command, options, kind, workspace, capfd):
    if COMMANDS[command][0] is None and kind not in ("foreign", "one file", "file"):
        pytest.skip("The command reads no folder.")
    output = place_output(kind, command, workspace)
    before = snapshot(workspace)
    code = run(command, workspace, output, *options)
    after = snapshot(workspace)
    messages = capfd.readouterr().err
    assert "Traceback" not in messages and "(`--debug` shows" not in messages, messages
    if code == 0:
        assert command in ADDING or (command, kind) == ("convert", "inside")  # it reads a file, not a folder
        assert {name: after.get(name) for name in before} == before
    else:
        assert code == 1 and after == before, messages


@pytest.mark.parametrize("command", ["adapt", "convert", "export", "finetune"])
def test_a_failed_run_leaves_an_earlier_output_as_it_was(command, workspace, capfd):
    output = workspace / "out"
    assert run(command, workspace, output) == 0
    if command in REPLACING:
        assert run(command, workspace, output) == 1
        assert run(command, workspace, output, "--overwrite") == 0
    before = snapshot(output)
    for path in (workspace / COMMANDS[command][0]).iterdir():
        if path.suffix in (".safetensors", ".pt"):
            path.write_bytes(path.read_bytes()[:-100])
    assert run(command, workspace, output, *(["--overwrite"] if command in REPLACING else [])) == 1
    assert snapshot(output) == before, capfd.readouterr().err
