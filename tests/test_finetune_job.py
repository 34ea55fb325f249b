# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of text models in two optimizer steps: what is saved, continued, reported and refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import ByT5Tokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import ModelConfig

from conftest import build_model, build_tokenizer, save_vision_folder
from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.run_results import RunResults
from encdec_slm.trainers.finetune_job import LORA_TARGET_MODULES, FinetuneArguments, finetune
from encdec_slm.trainers.jobs import build_trainer, describe_run, predict
from encdec_slm.trainers.row_encoding import RowEncoder, encode_rows


ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]
SAVED = {"results.json", "predictions.jsonl", "loss.png", "model.safetensors", "config.json", "tokenizer.json"}
SAVING = {"save_strategy": "steps", "save_steps": 1}
# PEFT 0.21 asks for `is_gradient_checkpointing`, a name that transformers 5.23 deprecates.
peft_uses_a_deprecated_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def run(rows_file):
    """Fine-tune for two steps, with options of all three kinds of arguments."""

    def run(
        folder,
        model=None,
        model_options=None,
        streaming=False,
        preset="tiny",
        packing=False,
        optimizer="adamw",
        **options,
    ):
        args = FinetuneArguments(
            packing=packing,
            optimizer=optimizer,
            preset=preset,
            train_file=rows_file,
            **{name: rows_file for name in ("validation_file", "test_file") if streaming},
            dataset_streaming=streaming,
            max_source_length=128,
            max_target_length=8,
            max_eval_samples=3,
            vocab_size=300,
        )
        defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "use_cpu": True}
        defaults |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}
        training_args = Seq2SeqTrainingArguments(str(folder), **{**defaults, "report_to": "none", **options})
        model_args = ModelConfig(model_name_or_path=model and str(model), **(model_options or {}))
        return finetune(args, training_args, model_args)

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Folder and results of a run."""
    folder = tmp_path_factory.mktemp("finetuned")
    return folder, run(folder)


@pytest.fixture(scope="module")
def adapter(finished, run, tmp_path_factory):
    """Folder and results of a LoRA run."""
    folder = tmp_path_factory.mktemp("adapter")
    return folder, run(folder, finished[0], {"use_peft": True, "lora_r": 2})


def read_predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


def generate_predictions(folder):
    """The completions of the held-out rows by the model as it is saved."""
    model, tokenizer = load_checkpoint(folder)
    texts = []
    for row in read_predictions(folder):
        inputs = tokenizer(row["source"], truncation=True, max_length=128, return_tensors="pt")
        texts.append(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True).strip())
    return texts


def test_a_run_saves_model_results_predictions_and_plot(finished):
    folder, results = finished
    assert {path.name for path in folder.iterdir()} >= SAVED
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert RunResults.load(folder / "results.json") == results
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    predictions = read_predictions(folder)
    assert len(predictions) == 3 and set(predictions[0]) == {"source", "reference", "prediction"}


def test_two_steps_lower_the_loss_and_all_results_are_there(finished):
    _, results = finished
    before, after = results["before training"], results.saved
    assert after.metrics["loss"].value < before.metrics["loss"].value
    assert set(before.metrics) == set(after.metrics) == {"loss", "rougeL", "rougeL_shuffled", "exact"}
    assert results.train_steps == 2 and results.num_rows == {"train": 32, "validation": 3, "test": 3}
    assert results.num_cut_rows == {"train sources": 0, "train targets": 0}
    assert [entry["step"] for entry in results.validation_losses] == [1, 2]
    assert results.settings["num_trainable_parameters"] == after.num_parameters > 0
    report = describe_run(results, "folder")
    assert "after training" in report and "folder" in report and "prediction:" in report


def test_muon_trains_other_weights_than_adamw(finished, run, tmp_path):
    results = run(tmp_path, optimizer="muon")
    loss = results.saved.metrics["loss"].value
    assert loss < results["before training"].metrics["loss"].value
    assert loss != finished[1].saved.metrics["loss"].value and results.settings["optimizer"] == "muon"


def test_predictions_are_in_the_order_of_the_rows_though_training_groups_by_length(tmp_path):
    rows = Dataset.from_list([{"input_ids": [4] * (1 + 7 * n % 5), "labels": [5 + n, 2]} for n in range(8)])
    options = {"per_device_eval_batch_size": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = Seq2SeqTrainingArguments(str(tmp_path), train_sampling_strategy="group_by_length", **options)
    collate = RowEncoder(build_tokenizer(), decoder_start_token_id=1).collate
    trainer = Seq2SeqTrainer(build_model(), args, data_collator=collate)
    assert predict(trainer, rows).label_ids[:, 0].tolist() == [5 + n for n in range(8)]
    assert trainer.args.train_sampling_strategy == "group_by_length"


def test_rows_are_grouped_by_their_longer_side(tmp_path):
    tokenizer = build_tokenizer()
    encoder = RowEncoder(tokenizer, decoder_start_token_id=1)
    texts = ("w10", " ".join(["w10"] * 30))
    rows = [{"source": texts[n % 4 == 1], "target": texts[n % 4 == 3]} for n in range(640)]
    options = {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    args = Seq2SeqTrainingArguments(str(tmp_path), train_sampling_strategy="group_by_length", **options)
    dataset = encode_rows(Dataset.from_list(rows), encoder, "rows")
    trainer = build_trainer(build_model(), args, 40, data_collator=encoder.collate, train_dataset=dataset)
    longer = [max(batch["input_ids"].shape[1], batch["labels"].shape[1]) for batch in trainer.get_train_dataloader()]
    # 320 long rows; each of the four groups of 160 rows that are sorted may have one batch of both lengths.
    assert len(longer) == 160 and 80 <= longer.count(max(longer)) <= 84


@pytest.mark.parametrize("options", [{}, {"generation_num_beams": 2}], ids=["greedy", "beams"])
def test_the_saved_model_generates_what_was_measured(finished, run, tmp_path, options, caplog):
    base = tmp_path / "base"
    shutil.copytree(finished[0], base)
    model, _ = load_checkpoint(base)
    model.generation_config.update(
        max_length=5, no_repeat_ngram_size=3, num_beams=3, min_length=4, suppress_tokens=[7]
    )
    model.save_pretrained(base)
    with caplog.at_level(logging.WARNING, logger="encdec_slm"):
        run(tmp_path / "run", base, **options)
    assert "top_k" not in caplog.text
    for setting in ("no_repeat_ngram_size=3", "num_beams=3", "max_length=5", "min_length=4", "suppress_tokens=[7]"):
        assert setting in caplog.text
    saved = load_checkpoint(tmp_path / "run")[0].generation_config
    assert (saved.max_length, saved.no_repeat_ngram_size or 0, saved.min_length or 0) == (9, 0, 0)
    assert (saved.num_beams or 1) == options.get("generation_num_beams", 1)
    assert generate_predictions(tmp_path / "run") == [row["prediction"] for row in read_predictions(tmp_path / "run")]


@peft_uses_a_deprecated_name
def test_lora_adapts_every_projection_and_saves_an_adapter_that_generates_what_was_measured(finished, adapter):
    folder, results = adapter
    assert results.settings["num_trainable_parameters"] < results.saved.num_parameters / 5
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    adapted, _ = load_checkpoint(folder)
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    attention, mlp = set(LORA_TARGET_MODULES[:4]), set(LORA_TARGET_MODULES[4:])
    for block, expected in (("self_attn", attention), ("cross_attn", attention), ("mlp", mlp)):
        assert {name.split(".")[-2] for name in names if f".{block}." in name} == expected
    assert adapted.generation_config.max_length == 9
    assert generate_predictions(folder) == [row["prediction"] for row in read_predictions(folder)]


@peft_uses_a_deprecated_name
@pytest.mark.parametrize("use_peft", [False, True])
def test_an_adapter_is_trained_further(adapter, run, tmp_path, use_peft):
    folder, before = adapter
    results = run(tmp_path, folder, {"use_peft": use_peft})
    assert results["before training"].metrics == before.saved.metrics != results.saved.metrics
    model, _ = load_checkpoint(tmp_path)
    assert isinstance(model, PeftModel)
    assert results.settings["num_trainable_parameters"] == before.settings["num_trainable_parameters"]


def test_a_slow_tokenizer_works(run, tmp_path):
    tokenizer = ByT5Tokenizer()
    build_model(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert run(tmp_path / "run", tmp_path / "base").train_steps == 2


def test_a_stream_is_trained_on_for_the_given_number_of_steps(run, tmp_path):
    results = run(tmp_path, streaming=True)
    assert results.train_steps == 2 and "train" not in results.num_rows


@pytest.mark.parametrize("by_path", [False, True], ids=["last", "path"])
def test_an_unfinished_run_is_continued(finished, run, tmp_path, by_path):
    run(tmp_path, **SAVING)
    shutil.rmtree(tmp_path / "checkpoint-2")
    for name in SAVED:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        run(tmp_path, **SAVING)
    resumed = run(tmp_path, **SAVING, resume_from_checkpoint=str(tmp_path / "checkpoint-1") if by_path else "true")
    assert resumed.saved.metrics == finished[1].saved.metrics


def test_a_checkpoint_of_another_folder_does_not_open_a_foreign_folder(run, tmp_path):
    run(tmp_path / "run", **SAVING)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"README\.md"):
        run(tmp_path / "mine", resume_from_checkpoint=checkpoint)
    assert run(tmp_path / "new", resume_from_checkpoint=checkpoint).train_steps == 2


def test_a_checkpoint_that_does_not_exist_is_refused(run, tmp_path):
    for value in ("true", str(tmp_path / "checkpoint-7")):
        with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
            run(tmp_path / "run", resume_from_checkpoint=value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@peft_uses_a_deprecated_name
def test_a_finished_run_is_replaced_with_its_checkpoints_and_adapters(finished, run, tmp_path):
    run(tmp_path, finished[0], {"use_peft": True, "lora_r": 2}, **SAVING)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    run(tmp_path, max_steps=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert not {"adapter_config.json", "checkpoint-1", "checkpoint-2"} & names
    assert {"notes.txt", "checkpoint-best", "model.safetensors"} <= names
    assert not isinstance(load_checkpoint(tmp_path)[0], PeftModel)


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_of_another_kind_are_not_overwritten(finished, run, tmp_path):
    content = json.loads((finished[0] / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**content, "kind": "distillation"}))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="distillation"):
        run(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_failed_save_leaves_the_earlier_run_as_it_was(finished, run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = snapshot(folder)
    monkeypatch.setattr(RunResults, "save", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run(folder)
    assert snapshot(folder) == before


def test_an_input_file_that_would_be_overwritten_is_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match=r"predictions\.jsonl"):
        finetune(FinetuneArguments(train_file=str(path)), Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True))


def test_models_and_arguments_that_do_not_fit_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="`max_steps`"):
        run(tmp_path / "run", streaming=True, max_steps=-1)
    with pytest.raises(ValueError, match="`model_name_or_path`"):
        run(tmp_path / "run", model_options={"use_peft": True})
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path / "run", tmp_path / "nowhere")
    save_vision_folder(tmp_path / "vision")
    with pytest.raises(ValueError, match="vision"):
        run(tmp_path / "run", tmp_path / "vision")
    with pytest.raises(ValueError, match=r"2m.*tiny"):
        run(tmp_path / "run", preset="2m")
    with pytest.raises(ValueError, match=r"`train_file`.*`dataset_name`"):
        FinetuneArguments(train_file="a.jsonl", dataset_name="b")


def test_a_packed_run_learns_what_a_padded_run_learns(finished, run, tmp_path):
    expected, found = finished[1].saved, run(tmp_path, packing=True).saved
    assert found.metrics["loss"].value == pytest.approx(expected.metrics["loss"].value, abs=2e-4)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"packed_source_length": 512}, "packed_source_length"),
        ({"packing": True, "packed_source_length": 128, "max_source_length": 256}, "packed_source_length"),
        ({"packing": True, "packed_target_length": 8}, "packed_target_length"),
    ],
)
def test_packs_without_room_for_the_longest_row_are_refused(fields, name):
    with pytest.raises(ValueError, match=name):
        FinetuneArguments(**fields)


def test_weights_are_trained_in_float32_by_default(finished, run, tmp_path):
    model, tokenizer = load_checkpoint(finished[0])
    for part in (model.to(torch.bfloat16), tokenizer):
        part.save_pretrained(tmp_path / "base")
    run(tmp_path / "run", tmp_path / "base")
    assert load_checkpoint(tmp_path / "run")[0].dtype == torch.float32


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


@pytest.mark.slow
def test_two_processes_measure_each_row_once(rows_file, tmp_path):
    options = {"train_file": rows_file, "output_dir": tmp_path / "run", "preset": "tiny", "max_steps": 1}
    options |= {"max_eval_samples": 3, "use_cpu": "true", "save_strategy": "no", "report_to": "none"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "encdec_slm_cli", "finetune"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(read_predictions(tmp_path / "run")) == 3
