# SPDX-License-Identifier: Apache-2.0
"""A teacher, its student and a baseline in two steps each: what is saved, measured, continued and refused."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import build_byte_tokenizer, build_config, save_text_folder
from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.run_results import RunResults
from encdec_slm.trainers import Seq2SeqDistillationConfig, distill_job
from encdec_slm.trainers.distill_job import DistillArguments, describe_objective, describe_targets, distill
from encdec_slm.vocabulary import old_token_ids


ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]
METRICS = {"loss", "rougeL", "rougeL_shuffled", "exact", "teacher_agreement"}
SAVING = {"save_strategy": "steps", "save_steps": 1}
NAMES = ["teacher", "distilled student", "student without teacher"]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def training_args(folder, **fields):
    defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "use_cpu": True}
    defaults |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "bf16": False, "report_to": []}
    defaults |= {"lmbda": 0.0, "kd_ratio": 0.5, "max_source_length": 64, "max_completion_length": 8}
    defaults |= {"generation_kwargs": {"no_repeat_ngram_size": 3}}
    return Seq2SeqDistillationConfig(str(folder), **{**defaults, **fields})


@pytest.fixture(scope="module")
def arguments(rows_file):
    def arguments(**fields):
        tiny = {"preset": "tiny", "teacher_preset": "tiny", "vocab_size": 300, "max_eval_samples": 3}
        return DistillArguments(train_file=rows_file, **{**tiny, "teacher_num_train_epochs": 0.25, **fields})

    return arguments


@pytest.fixture(scope="module", autouse=True)
def few_timed_generations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_job, "NUM_TIMED_SOURCES", 2)
        patch.setattr(distill_job, "NUM_TIMED_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """Folder and results of a run, with checkpoints."""
    folder = tmp_path_factory.mktemp("distilled") / "student"
    return folder, distill(arguments(), training_args(folder, **SAVING))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run; returns the folder of the student."""
    shutil.copytree(finished[0].parent, tmp_path / "copy")
    return tmp_path / "copy" / "student"


def test_a_run_measures_teacher_student_and_baseline(finished):
    _, results = finished
    assert [model.name for model in results.models] == NAMES
    for model in results.models:
        assert set(model.metrics) == METRICS and model.metrics["loss"].value > 0
        assert model.first_token_seconds > 0 and model.tokens_per_second > 0 and model.train_seconds > 0
    assert results["teacher"].metrics["teacher_agreement"].value == 100.0
    assert results.models[1].num_parameters == results.models[2].num_parameters
    assert (results.kind, results.saved_model, results.train_steps) == ("distillation", "distilled student", 2)


def test_the_folders_have_all_models_and_results(finished):
    folder, results = finished
    saved = {"results.json", "predictions.jsonl", "loss.png", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} >= saved
    assert RunResults.load(folder / "results.json") == results
    baseline = RunResults.load(f"{folder}_cross_entropy/results.json")
    assert baseline.saved_model == NAMES[2] and baseline.models == results.models
    load_checkpoint(f"{folder}_cross_entropy")
    teacher = AutoModelForCausalLM.from_pretrained(f"{folder}_teacher")
    assert teacher.num_parameters() == results["teacher"].num_parameters
    assert AutoTokenizer.from_pretrained(f"{folder}_teacher").chat_template is not None
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def test_the_saved_student_generates_what_was_measured(finished):
    folder, _ = finished
    student, tokenizer = load_checkpoint(folder)
    assert (student.generation_config.max_length, student.generation_config.no_repeat_ngram_size) == (9, 3)
    for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        inputs = tokenizer(row["source"], return_tensors="pt")
        text = tokenizer.decode(student.generate(**inputs)[0], skip_special_tokens=True)
        assert text.strip() == row["prediction"]


def test_generation_settings_of_another_task_are_not_inherited(finished, arguments, tmp_path, caplog):
    student, tokenizer = load_checkpoint(finished[0])
    student.generation_config.update(num_beams=3, max_length=5)
    for part in (student, tokenizer):
        part.save_pretrained(tmp_path / "base")
    args = arguments(model_name_or_path=str(tmp_path / "base"), compare_with_cross_entropy=False)
    options = {"teacher_model_name_or_path": f"{finished[0]}_teacher", "generation_kwargs": None}
    with caplog.at_level(logging.WARNING, logger="encdec_slm"):
        results = distill(args, training_args(tmp_path / "run", **options))
    assert all(text in caplog.text for text in ("num_beams=3", "no_repeat_ngram_size=3", "max_length=5"))
    saved = load_checkpoint(tmp_path / "run")[0].generation_config
    assert (saved.max_length, saved.num_beams or 1, saved.no_repeat_ngram_size or 0) == (9, 1, 0)
    assert results["teacher"].train_seconds is None and len(results.models) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_student_that_is_an_adapter_is_trained_further(finished, arguments, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, tokenizer = load_checkpoint(finished[0])
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"], r=2))
    for part in (adapted, tokenizer):
        part.save_pretrained(tmp_path / "adapter")
    args = arguments(model_name_or_path=str(tmp_path / "adapter"), compare_with_cross_entropy=False)
    distill(args, training_args(tmp_path / "run", teacher_model_name_or_path=f"{finished[0]}_teacher"))
    assert isinstance(load_checkpoint(tmp_path / "run")[0], PeftModel)


def test_muon_trains_other_weights_than_adamw(finished, arguments, tmp_path):
    args = arguments(optimizer="muon", compare_with_cross_entropy=False)
    results = distill(args, training_args(tmp_path / "muon", teacher_model_name_or_path=f"{finished[0]}_teacher"))
    losses = [one["distilled student"].metrics["loss"].value for one in (results, finished[1])]
    assert losses[0] != losses[1] and results.settings["optimizer"] == "muon"
    with pytest.raises(ValueError, match="adamw, muon"):
        arguments(optimizer="sgd")


def test_a_student_that_is_a_t5_is_distilled_on_distributions_and_generates(finished, arguments, tmp_path):
    args = arguments(student_architecture="t5", compare_with_cross_entropy=False)
    results = distill(args, training_args(tmp_path / "t5", teacher_model_name_or_path=f"{finished[0]}_teacher"))
    assert set(results["distilled student"].metrics) == METRICS
    student, tokenizer = load_checkpoint(tmp_path / "t5")
    assert student.config.model_type == "t5" and not student.config.scale_decoder_outputs
    assert student.generate(**tokenizer(ROWS[0]["source"], return_tensors="pt")).shape[1] <= 9
    with pytest.raises(ValueError, match="bart"):
        distill(arguments(student_architecture="bart"), training_args(tmp_path / "bart"))


def test_a_teacher_with_another_vocabulary_has_no_loss_and_no_agreement(finished, arguments, tmp_path):
    tokenizer = build_byte_tokenizer(ends_sources=False)
    config = decoder_only_twin(build_config(vocab_size=len(tokenizer), max_position_embeddings=256))
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    args = arguments(model_name_or_path=str(finished[0]), compare_with_cross_entropy=False)
    options = {"teacher_model_name_or_path": str(tmp_path / "teacher"), "kd_ratio": 0.0, "seq_kd": True}
    results = distill(args, training_args(tmp_path / "run", **options))
    assert set(results["teacher"].metrics) == METRICS - {"loss", "teacher_agreement"}
    assert set(results.saved.metrics) == METRICS - {"teacher_agreement"}


def find_steps(folder):
    """Steps of the checkpoints of all three stages."""
    names = ("", "_teacher", "_cross_entropy")
    return [
        sorted(int(path.name[11:]) for path in folder.parent.glob(f"{folder.name}{name}/checkpoint-*"))
        for name in names
    ]


@pytest.mark.parametrize("by_path", [False, True], ids=["last", "path"])
def test_a_stopped_run_continues_at_its_checkpoints(finished, copied, arguments, by_path):
    shutil.rmtree(copied / "checkpoint-2")
    shutil.rmtree(f"{copied}_cross_entropy")
    for name in ("results.json", "model.safetensors"):
        (copied / name).unlink()
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        distill(arguments(), training_args(copied, **SAVING))
    teacher = (copied.parent / "student_teacher" / "model.safetensors").stat().st_mtime_ns
    resume = str(copied / "checkpoint-1") if by_path else "true"
    resumed = distill(arguments(), training_args(copied, **SAVING, resume_from_checkpoint=resume))
    for before, after in zip(finished[1].models, resumed.models, strict=True):
        assert after.metrics == before.metrics
    assert (copied.parent / "student_teacher" / "model.safetensors").stat().st_mtime_ns == teacher


def test_a_checkpoint_of_the_baseline_continues_the_baseline(finished, copied, arguments, caplog):
    resume = f"{copied}_cross_entropy/checkpoint-1"
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        resumed = distill(arguments(), training_args(copied, **SAVING, resume_from_checkpoint=resume))
    assert f"{copied / 'checkpoint-2'}" in caplog.text and resume in caplog.text
    assert resumed.models[2].metrics == finished[1].models[2].metrics


def test_teacher_and_student_that_was_cut_from_it_are_trained_longer(arguments, tmp_path):
    args = arguments(student_from_teacher=True, compare_with_cross_entropy=False)
    distill(args, training_args(tmp_path / "run", **SAVING))
    student, teacher = load_checkpoint(tmp_path / "run")[0], tmp_path / "run_teacher"
    assert (student.config.encoder_num_hidden_layers, student.config.decoder_num_hidden_layers) == (4, 2)
    (teacher / "results.json").unlink()
    shutil.rmtree(tmp_path / "run")
    # Twice as many steps of the teacher.
    args = replace(args, teacher_num_train_epochs=0.5)
    distill(args, training_args(tmp_path / "run", **SAVING, max_steps=3, resume_from_checkpoint="true"))
    assert find_steps(tmp_path / "run") == [[1, 2, 3], [1, 2, 3, 4], []]


def test_checkpoints_that_do_not_fit_are_refused(copied, arguments, tmp_path):
    for value in ("true", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
            distill(arguments(), training_args(tmp_path / "run", resume_from_checkpoint=value))
    shutil.rmtree(f"{copied}_teacher")
    with pytest.raises(ValueError, match="teacher"):
        distill(arguments(), training_args(copied, **SAVING, resume_from_checkpoint="true"))


# The folder of the student is tested with those of all commands.
@pytest.mark.parametrize("suffix", ["_teacher", "_cross_entropy"])
def test_files_that_no_earlier_run_wrote_are_not_overwritten(arguments, tmp_path, suffix):
    path = tmp_path / f"run{suffix}" / "config.json"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"config\.json"):
        distill(arguments(), training_args(tmp_path / "run"))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path] and path.read_text() == "mine"


@pytest.mark.parametrize("suffix", ["_teacher", "_cross_entropy"])
def test_output_folders_that_overlap_a_model_are_refused(arguments, tmp_path, suffix):
    save_text_folder(tmp_path / f"run{suffix}")
    args = arguments(model_name_or_path=str(tmp_path / f"run{suffix}"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="run"):
        distill(args, training_args(f"{tmp_path / 'run'}/"))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_objective_and_targets_are_described():
    args = training_args("folder", kd_ratio=0.9, lmbda=0.5, temperature=0.9, top_k=128)
    assert all(text in describe_objective(args) for text in ("0.9", "0.1 x cross-entropy"))
    assert all(text in describe_targets(args) for text in ("50%", "temperature 0.9", "from the data"))
    assert describe_targets(replace(args, lmbda=0.0, seq_kd=True)) == "generated by the teacher"


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory):
    """A folder of a teacher whose tokenizer has words that no row has."""
    folder = tmp_path_factory.mktemp("large_teacher")
    template = "{{ messages[0]['content'] }}"
    words = ["Ġreturn", "Ġelsewhere", "Return"]
    tokenizer = build_byte_tokenizer(ends_sources=False, words=words, chat_template=template)
    config = decoder_only_twin(build_config(vocab_size=len(tokenizer) + 2, max_position_embeddings=256))
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("from_teacher", [False, True])
def test_a_new_student_has_the_teachers_tokens_that_the_rows_use(
    large_teacher, arguments, tmp_path, caplog, from_teacher
):
    shape = {"student_from_teacher": from_teacher, "compare_with_cross_entropy": not from_teacher}
    args = arguments(trim_vocabulary=True, **shape)
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        results = distill(args, training_args(tmp_path / "run", teacher_model_name_or_path=large_teacher))
    student, tokenizer = load_checkpoint(tmp_path / "run")
    original = AutoTokenizer.from_pretrained(large_teacher)
    assert "Ġreturn" in tokenizer.get_vocab() and "Ġelsewhere" not in tokenizer.get_vocab()
    assert student.config.vocab_size == len(tokenizer) == len(old_token_ids(tokenizer, original)) < len(original)
    assert results.saved.metrics["teacher_agreement"].value >= 0 and results["teacher"].metrics["loss"].value > 0
    assert "held-out texts" in caplog.text and "of the model" in caplog.text


def test_the_teacher_reads_what_its_template_renders(large_teacher, arguments, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(distill_job, "train", lambda trainer, checkpoint: trainers.append(trainer) or 1.0)
    args = arguments(teacher_prompt_template="Summarize: {{ source }}", compare_with_cross_entropy=False)
    distill(args, training_args(tmp_path / "run", teacher_model_name_or_path=large_teacher))
    tokenizer, row = AutoTokenizer.from_pretrained(large_teacher), trainers[0].train_dataset[0]
    source = tokenizer.decode(row["source_ids"])
    assert tokenizer.decode(row["teacher_source_ids"]) == f"Summarize: {source}"


@pytest.mark.parametrize(
    "fields", [{"trim_vocabulary": True, "model_name_or_path": "student"}, {"trimmed_vocabulary_size": 300}]
)
def test_only_a_new_vocabulary_is_trimmed(arguments, fields):
    with pytest.raises(ValueError, match="trim_vocabulary"):
        arguments(**fields)
