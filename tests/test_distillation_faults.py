# SPDX-License-Identifier: Apache-2.0
"""What distillation refuses and says then, and what a run that was stopped leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of, make_tokenizer
from distillation_worker import (
    EOS,
    OFF_POLICY,
    gold_pairs,
    ids_of,
    make_args,
    make_teacher,
    make_texts,
    make_trainer,
    plain_numbers,
)
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
)
from trl import DistillationConfig

from encdec_slm import EncDecSLMForConditionalGeneration, EncDecSLMModel
from encdec_slm.trainers import Seq2SeqDistillationTrainer


SAVING = {"save_strategy": "steps", "save_steps": 1}
# The sum over rows is taken in another order.
OTHER_ORDER = {"atol": 1e-5, "rtol": 1e-5}


def saved(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def given(model, form, folder):
    """A model as an object, or as the folder that it is saved in."""
    return model if form == "object" else saved(folder, model)


# Models and tokenizers that cannot play their role


@pytest.mark.parametrize("form", ["object", "path"])
def test_a_decoder_only_student_is_refused(form, tmp_path):
    student = given(make_teacher(), form, tmp_path / "student")
    with pytest.raises(ValueError, match=r"The student .*(LlamaForCausalLM|student) is no encoder-decoder") as error:
        make_trainer(tmp_path, student)
    assert "AutoModelForSeq2SeqLM" in str(error.value) and "TRL's DistillationTrainer" in str(error.value)


@pytest.mark.parametrize("form", ["object", "path"])
def test_an_encoder_decoder_teacher_is_refused(form, tmp_path):
    teacher = given(build(), form, tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"The teacher .* is no causal language model") as error:
        make_trainer(tmp_path, teacher=teacher)
    assert "AutoModelForCausalLM" in str(error.value)


@pytest.mark.parametrize("form", ["object", "path"])
def test_a_teacher_without_a_head_is_refused(form, tmp_path):
    # A head that is not the table cannot be made up.
    teacher = given(AutoModel.from_config(make_teacher(tie_word_embeddings=False).config), form, tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"The teacher .* is no causal language model"):
        make_trainer(tmp_path, teacher=teacher)


@pytest.mark.parametrize("kind", [BertModel, BertLMHeadModel])
@pytest.mark.parametrize("form", ["object", "path"])
def test_a_teacher_that_sees_what_it_is_to_predict_is_refused(form, kind, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = given(kind(BertConfig(intermediate_size=32, **sizes)), form, tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"The teacher .* is no causal language model"):
        make_trainer(tmp_path, teacher=teacher)


def test_a_student_without_a_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"The student EncDecSLMModel "):
        make_trainer(tmp_path, EncDecSLMModel(build().config))


def test_a_missing_teacher_is_asked_for(tmp_path):
    arguments = {"train_dataset": Dataset.from_list(make_texts()), "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match=r"There is no teacher\. Pass `teacher_model`"):
        Seq2SeqDistillationTrainer(build(), None, make_args(tmp_path), **arguments)


def other_tokenizer():
    """The tokenizer with the words of the ids 10 to 14 in reversed order."""
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    words = [f"w{id}" for id in range(10, 15)]
    vocabulary.update(zip(words, reversed(range(10, 15)), strict=True))
    tokenizer = type(make_tokenizer().backend_tokenizer).from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def test_tokenizers_that_differ_are_refused_with_the_first_ids(tmp_path):
    arguments = {"teacher_processing_class": other_tokenizer()}
    with pytest.raises(ValueError, match=r"disagree about 4 of 97 token ids") as error:
        make_trainer(tmp_path, arguments=arguments)
    assert "10 is 'w10' and 'w14'; 11 is 'w11' and 'w13'; 13 is 'w13' and 'w11'" in str(error.value)
    assert "kd_ratio=0" in str(error.value)


def test_tokenizers_that_differ_still_share_texts(tmp_path):
    arguments, written = {"teacher_processing_class": other_tokenizer()}, []
    trainer = make_trainer(tmp_path, arguments=arguments, kd_ratio=0.0, seq_kd=True, max_steps=1)
    texts = trainer.teacher_texts
    trainer.teacher_texts = lambda rows: written.extend(texts(rows)) or written[-len(rows) :]
    trainer.train()
    assert torch.isfinite(torch.tensor(history_of(trainer))).all() and len(written) == 8
    rows = [trainer.train_dataset[index] for index in range(8)]
    mapped = {10: 14, 11: 13, 12: 12, 13: 11, 14: 10}
    assert all(row["teacher_source_ids"] == [mapped.get(token, token) for token in row["source_ids"]] for row in rows)


def test_settings_of_another_class_are_refused(tmp_path):
    arguments = {"train_dataset": Dataset.from_list(make_texts()), "processing_class": make_tokenizer()}
    for kind in (DistillationConfig, Seq2SeqTrainingArguments):
        fields = {"bf16": False, "use_cpu": True, "report_to": []}
        if "activation_checkpointing" in kind.__dataclass_fields__:
            fields["activation_checkpointing"] = False
        args = kind(str(tmp_path), **fields)
        with pytest.raises(TypeError, match=f"`args` is a {kind.__name__}, but a Seq2SeqDistillationConfig is needed"):
            Seq2SeqDistillationTrainer(build(), make_teacher(), args, **arguments)


def test_metrics_of_texts_that_nobody_writes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`compute_metrics` is given and `predict_with_generate` is false"):
        make_trainer(tmp_path, arguments={"compute_metrics": lambda prediction: {}})


# Rows


def test_a_row_longer_than_the_teachers_context_is_refused_with_the_numbers(tmp_path):
    rows = make_texts(8)
    rows[5] = {"prompt": " ".join(["w9"] * 12), "completion": "w8 w7 w6"}
    teacher = make_teacher(max_position_embeddings=15)
    message = r"context is 15 tokens, but row 5 has 12 source tokens for it and 4 target tokens, 16 together"
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(tmp_path, teacher=teacher, rows=rows, **OFF_POLICY)
    assert "Lower `max_source_length` or `max_completion_length`" in str(error.value)
    with pytest.raises(ValueError, match=r"row 5 has 12 source tokens for it and up to 4 target tokens, 16 together"):
        make_trainer(tmp_path, teacher=teacher, rows=rows, max_completion_length=4)
    arguments = {"eval_dataset": Dataset.from_list(rows)}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, teacher=teacher, arguments=arguments, max_completion_length=4)
    fitting = make_teacher(max_position_embeddings=16)
    make_trainer(tmp_path, teacher=fitting, rows=rows, **OFF_POLICY, max_steps=1).train()
    make_trainer(tmp_path, teacher=fitting, rows=rows, max_completion_length=4, max_steps=1).train()


def test_a_streamed_row_longer_than_the_teachers_context_is_refused_when_it_comes(tmp_path):
    rows = [{"prompt": " ".join(["w9"] * 12), "completion": "w8 w7 w6"}] * 8
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(
        tmp_path, teacher=make_teacher(max_position_embeddings=15), arguments={"train_dataset": stream}, **OFF_POLICY
    )
    with pytest.raises(ValueError, match=r"Row \d has 12 source tokens .* 4 target tokens, 16 together, .*is 15"):
        trainer.train()


def test_an_empty_completion_is_an_end_of_text(tmp_path):
    rows = [{**row, "completion": ""} for row in make_texts(4)] + make_texts(4, seed=5)
    trainer = make_trainer(tmp_path, rows=rows, **OFF_POLICY, max_steps=1)
    trainer.train()
    assert gold_pairs(rows)[0][1] == [EOS]
    expected = plain_numbers(build(), make_teacher(), gold_pairs(rows), kd_ratio=0.5)
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)


def test_a_batch_of_which_everything_is_cut_trains_on_what_is_left(tmp_path):
    rows = [{"prompt": row["prompt"] + " w5 w6", "completion": row["completion"] + " w7"} for row in make_texts(8)]
    trainer = make_trainer(
        tmp_path, rows=rows, **OFF_POLICY, max_steps=1, max_source_length=1, max_completion_length=1
    )
    trainer.train()
    assert history_of(trainer, "sources/cut_ratio") == history_of(trainer, "targets/cut_ratio") == [1.0]
    pairs = [(ids_of(row["prompt"])[:1], ids_of(row["completion"])[:1]) for row in rows]
    expected = plain_numbers(build(), make_teacher(), pairs, kd_ratio=0.5)
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)


def test_fewer_rows_than_a_step_takes_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, rows=make_texts(7), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="The training data has 7 rows, but an optimizer step takes 8"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 0.5}, r"`lmbda` is 0.5 and `seq_kd` is false, .* Add a `completion`"),
        ({"lmbda": 1.0, "kd_ratio": 0.5}, r"`kd_ratio` is 0.5, which asks for cross-entropy on gold targets"),
        ({"lmbda": 1.0, "kd_ratio": 0.0}, r"`lmbda` is 0.0 and `seq_kd` is false"),
    ],
)
def test_rows_without_a_target_that_is_asked_for_are_refused(settings, message, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in make_texts()]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows=rows, **settings)
    make_trainer(tmp_path, rows=rows, lmbda=1.0, kd_ratio=1.0)


# Numbers that are none


def poison(model, token=96):
    """Lets one token's embedding be NaN, without a NaN in the weights."""

    def hook(module, args, output):
        return output.masked_fill((args[0] == token)[..., None], float("nan"))

    model.get_input_embeddings().register_forward_hook(hook)
    return model


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_loss_names_its_row_and_leaves_the_last_checkpoint_alone(accumulation, role, tmp_path):
    rows = [
        {name: " ".join(word.replace("w96", "w95") for word in text.split()) for name, text in row.items()}
        for row in make_texts(12)
    ]
    rows[6]["prompt"] = "w5 w96"
    models = {"student": build(), "teacher": make_teacher()}
    poison(models[role])
    trainer = make_trainer(
        tmp_path,
        models["student"],
        models["teacher"],
        rows=rows,
        **OFF_POLICY,
        **SAVING,
        max_steps=3,
        shuffle_dataset=False,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    with pytest.raises(FloatingPointError, match=r"The loss after step 1 is not finite for row\(s\) 6 of") as error:
        trainer.train()
    assert str(tmp_path / "checkpoint-1") in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    kept = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(tensor, models["student"].state_dict()[name]) for name, tensor in kept.items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, **OFF_POLICY, **SAVING, max_steps=1)
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.model.encoder.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(FloatingPointError, match=r"`model.encoder.layers.1.mlp.up_proj.weight` has values") as error:
        trainer.save_model()
    assert str(tmp_path / "checkpoint-1") in str(error.value)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_run_that_explodes_saves_nothing(tmp_path):
    student = build()
    student.get_parameter("model.decoder.norm.weight").register_hook(lambda gradient: gradient * float("inf"))
    trainer = make_trainer(tmp_path, student, **OFF_POLICY, **SAVING, max_steps=1)
    with pytest.raises(FloatingPointError, match=r"After step 1, .* Nothing has been saved"):
        trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))


# Runs that were stopped


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and losses of a run of 8 steps with a checkpoint after each one."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_trainer(folder, **RUN)
    trainer.train()
    return folder, history_of(trainer)


RUN = {
    **{"lmbda": 0.5, "kd_ratio": 0.5, "max_steps": 8, "per_device_train_batch_size": 4},
    **{"optim": "adamw_torch", "learning_rate": 1e-3, **SAVING},
}


@pytest.mark.parametrize("damage", ["no state", "half a state", "an empty state", "no folder"])
def test_a_checkpoint_that_is_half_written_is_passed_over(damage, uninterrupted, tmp_path):
    folder, losses = uninterrupted
    for step in (3, 5):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    state = tmp_path / "checkpoint-5" / "trainer_state.json"
    if damage == "no state":
        state.unlink()
    elif damage == "no folder":
        shutil.rmtree(tmp_path / "checkpoint-5")
        (tmp_path / "checkpoint-best").mkdir()
    else:
        text = state.read_text()
        state.write_text(text[: len(text) // 2] if damage == "half a state" else "")
    trainer, began = make_trainer(tmp_path, build(seed=9), **RUN), []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        began.append(trainer.state.global_step) or compute_loss(*args, **kwargs)
    )
    trainer.train(resume_from_checkpoint=True)
    assert began == [3, 4, 5, 6, 7]
    torch.testing.assert_close(history_of(trainer), losses)
    assert (tmp_path / "checkpoint-8" / "trainer_state.json").is_file()


def test_resuming_from_nothing_is_refused(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` is true, but .* holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["checkpoint-2", "checkpoint-4/trainer_state.json"], ids=["saving", "training"])
def test_a_killed_run_goes_on_to_the_losses_of_an_uninterrupted_one(moment, uninterrupted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("distillation_worker.py")
    command = [sys.executable, script, tmp_path, json.dumps({"run": RUN}), "alone"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / moment).exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.0005)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "checkpoint-8").exists()
    trainer = make_trainer(tmp_path, build(seed=9), **RUN)
    trainer.train(resume_from_checkpoint=True)
    torch.testing.assert_close(history_of(trainer), uninterrupted[1])
    finished = EncDecSLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-8")
    expected = EncDecSLMForConditionalGeneration.from_pretrained(uninterrupted[0] / "checkpoint-8")
    torch.testing.assert_close(dict(finished.state_dict()), dict(expected.state_dict()))
