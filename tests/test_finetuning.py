# SPDX-License-Identifier: Apache-2.0
"""Two optimizer steps from rows to a saved folder: new models, checkpoints, adapters, streams, and the script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments
from trl import ModelConfig

from encdec_slm.trainers.finetuning import LORA_TARGET_MODULES, FinetuneArguments, finetune


ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]
WRITTEN = {"results.json", "predictions.jsonl", "loss.png", "model.safetensors", "config.json", "tokenizer.json"}
# PEFT 0.21 asks for `is_gradient_checkpointing`, a name that transformers 5.23 deprecates.
peft_uses_a_deprecated_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def write_rows(folder, rows=ROWS):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def training_args(folder, **fields):
    defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "use_cpu": True}
    defaults |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}
    return Seq2SeqTrainingArguments(str(folder), **{**defaults, **fields})


def arguments(rows_file, **fields):
    short = {"max_source_length": 128, "max_target_length": 8, "max_eval_samples": 3, "vocab_size": 300}
    return FinetuneArguments(train_file=rows_file, **{**short, **fields})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and results of a run of two steps, and the file of its rows."""
    rows_file = write_rows(tmp_path_factory.mktemp("rows"))
    folder = tmp_path_factory.mktemp("finetuned")
    return folder, finetune(arguments(rows_file), training_args(folder)), rows_file


def test_a_run_writes_the_model_the_numbers_the_predictions_and_the_plot(finished):
    folder, results, _ = finished
    assert {path.name for path in folder.iterdir()} >= WRITTEN
    assert not list(folder.glob(".*.tmp"))
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == 3 and set(predictions[0]) == {"source", "reference", "prediction"}


def test_two_steps_lower_the_held_out_loss_and_every_number_is_there(finished):
    _, results, _ = finished
    assert results["after"]["loss"] < results["before"]["loss"]
    assert set(results["before"]) == set(results["after"]) == {"loss", "rougeL", "rougeL_other_rows", "exact", "rows"}
    assert results["train_steps"] == 2 and results["rows"]["train"]["rows"] == 32
    assert results["num_parameters"] == results["num_trainable_parameters"] > 0


def test_the_saved_folder_loads_and_ends_its_texts(finished):
    folder, results, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
    assert len(tokenizer) == model.config.vocab_size == results["vocab_size"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.decoder_start_token_id == tokenizer.bos_token_id
    assert model.generation_config.max_length > 20
    assert tokenizer.model_max_length == 128


@peft_uses_a_deprecated_name
def test_a_lora_run_from_a_checkpoint_saves_an_adapter_over_every_projection(finished, tmp_path):
    base, _, rows_file = finished
    model_args = ModelConfig(model_name_or_path=str(base), use_peft=True, lora_r=2)
    results = finetune(arguments(rows_file), training_args(tmp_path), model_args)
    assert results["num_trainable_parameters"] < results["num_parameters"] / 5
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path)
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    attention, mlp = set(LORA_TARGET_MODULES[:4]), set(LORA_TARGET_MODULES[4:])
    for block, wanted in (("self_attn", attention), ("cross_attn", attention), ("mlp", mlp)):
        assert {name.split(".")[-2] for name in names if f".{block}." in name} == wanted


def test_a_stream_is_trained_on_for_the_given_number_of_steps(tmp_path):
    files = {"validation_file": write_rows(tmp_path), "test_file": write_rows(tmp_path), "dataset_streaming": True}
    results = finetune(arguments(write_rows(tmp_path), **files), training_args(tmp_path / "run"))
    assert results["train_steps"] == 2 and results["rows"]["train"]["rows"] >= 8


def test_a_stream_without_a_number_of_steps_is_refused(tmp_path):
    args = arguments(write_rows(tmp_path), dataset_streaming=True)
    with pytest.raises(ValueError, match="`dataset_streaming` is true and `max_steps` is not set"):
        finetune(args, training_args(tmp_path, max_steps=-1))


def test_a_stopped_run_goes_on_from_its_last_checkpoint(finished, tmp_path):
    _, whole, rows_file = finished
    # As if stopped between the first and the second step: the schedule is that of two steps.
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    finetune(arguments(rows_file), training_args(tmp_path, **saving))
    for path in tmp_path.glob("checkpoint-2/*"):
        path.unlink()
    (tmp_path / "checkpoint-2").rmdir()
    resumed = finetune(arguments(rows_file), training_args(tmp_path, **saving, resume_from_checkpoint="true"))
    assert resumed["after"] == whole["after"] and resumed["before"] == whole["before"]


def test_adapters_on_a_new_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`use_peft` is true and `model_name_or_path` is not set"):
        finetune(arguments(write_rows(tmp_path)), training_args(tmp_path), ModelConfig(use_peft=True))


def test_a_checkpoint_that_cannot_be_loaded_is_answered_with_what_to_give(tmp_path):
    model_args = ModelConfig(model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"`model_name_or_path` '.*nowhere' could not be loaded .* Give a folder"):
        finetune(arguments(write_rows(tmp_path)), training_args(tmp_path), model_args)


def test_an_unknown_preset_is_answered_with_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown preset '2m'. Available presets: .*tiny"):
        finetune(arguments(write_rows(tmp_path), preset="2m"), training_args(tmp_path))


def test_two_sources_of_data_are_refused():
    with pytest.raises(ValueError, match="rows come from one place"):
        FinetuneArguments(train_file="a.jsonl", dataset_name="b")


WITHOUT_THE_PACKAGE = """
import sys
from hub_worker import PackageIsNotInstalled
sys.meta_path.insert(0, PackageIsNotInstalled())
from transformers import pipeline
pipe = pipeline("text2text-generation", model=sys.argv[1], trust_remote_code=True)
print(pipe("def f(): return 1")[0]["generated_text"])
"""


@pytest.mark.slow
def test_a_saved_folder_generates_in_a_process_without_this_package(finished, tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(finished[0])]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
