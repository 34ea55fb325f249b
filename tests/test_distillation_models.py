# SPDX-License-Identifier: Apache-2.0
"""Students and teachers in all the forms in which they can be given."""

import copy

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of, make_tokenizer
from distillation_worker import (
    OFF_POLICY,
    OTHER_ORDER,
    capture,
    gold_pairs,
    make_args,
    make_teacher,
    make_texts,
    make_trainer,
    plain_numbers,
)
from peft import LoraConfig, get_peft_model

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.trainers import Seq2SeqDistillationTrainer


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# PEFT 0.21 asks for `is_gradient_checkpointing`, a name that transformers 5.23 deprecates.
peft_uses_a_deprecated_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def saved(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


def teacher_adapter(teacher):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(teacher, config)
    for index, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(index))
    return adapted.eval()


@peft_uses_a_deprecated_name
@pytest.mark.parametrize("given_as", ["folder", "name in args", "adapter folder", "PeftModel", "merged"])
def test_a_teacher_teaches_in_whatever_form_it_is_given(given_as, tmp_path):
    rows, arguments, settings, reference = make_texts(8), {}, {}, make_teacher()
    base = saved(tmp_path / "base", make_teacher())
    if given_as in ("folder", "name in args"):
        teacher = base
    else:
        from transformers import AutoModelForCausalLM

        reference = teacher_adapter(AutoModelForCausalLM.from_pretrained(base))
        teacher = copy.deepcopy(reference)
        if given_as == "adapter folder":
            teacher.save_pretrained(tmp_path / "adapter")
            teacher = str(tmp_path / "adapter")
        elif given_as == "merged":
            teacher = teacher.merge_and_unload()
    if given_as == "name in args":
        settings["teacher_model_name_or_path"], teacher = teacher, None
    args = make_args(tmp_path / "out", lmbda=0.0, max_steps=1, **settings)
    arguments = {"train_dataset": Dataset.from_list(rows), "processing_class": make_tokenizer()}
    trainer = Seq2SeqDistillationTrainer(build(), teacher, args, **arguments)
    trainer.train()
    expected = plain_numbers(build(), reference, gold_pairs(rows))["loss"].item()
    # Merging adds B A to W once instead of adding B A x to W x.
    torch.testing.assert_close(history_of(trainer)[0], expected, atol=1e-4, rtol=1e-4)
    if given_as not in ("folder", "name in args"):
        other = plain_numbers(build(), make_teacher(), gold_pairs(rows))["loss"].item()
        assert abs(other - expected) > 1e-2
    assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())


def test_a_teacher_is_loaded_as_its_settings_say(tmp_path):
    folder = saved(tmp_path / "teacher", make_teacher())
    settings = {**OFF_POLICY, "max_steps": 1, "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make_trainer(tmp_path, teacher=folder, **settings)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.teacher_model.parameters()} == {torch.bfloat16}
    expected = plain_numbers(build(), make_teacher(), gold_pairs(make_texts()), kd_ratio=0.5)["loss"].item()
    # bfloat16 keeps 8 bits, and the step has half of the rows.
    torch.testing.assert_close(history_of(trainer)[0], expected, rtol=0.05, atol=0.0)
    with pytest.raises(ValueError, match="`teacher_model_init_kwargs` is given, but the teacher is loaded already"):
        make_trainer(tmp_path, **settings)


def test_a_student_is_loaded_from_a_string_in_float32_with_its_tokenizer(tmp_path):
    folder = saved(tmp_path / "student", build().to(torch.bfloat16))
    args = make_args(tmp_path / "out", **OFF_POLICY, max_steps=1)
    trainer = Seq2SeqDistillationTrainer(folder, make_teacher(), args, train_dataset=Dataset.from_list(make_texts(8)))
    assert type(trainer.model) is EncDecSLMForConditionalGeneration
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.processing_class.get_vocab() == make_tokenizer().get_vocab()
    trainer.train()
    half = build().to(torch.bfloat16).float()
    expected = plain_numbers(half, make_teacher(), gold_pairs(make_texts(8)), kd_ratio=0.5)["loss"].item()
    torch.testing.assert_close(history_of(trainer)[0], expected, **OTHER_ORDER)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(97, 128), (104, 97), (104, 128)])
def test_padded_tables_are_compared_on_the_common_ids(student_rows, teacher_rows, tmp_path):
    student, teacher, texts = build(vocab_size=student_rows), make_teacher(vocab_size=teacher_rows), []
    rows, settings = make_texts(8), {"kd_ratio": 0.5, "beta": 0.5, "kd_temperature": 2.0}
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, max_steps=1, lmbda=1.0, **settings)
    capture(trainer, "student_texts", texts)
    with torch.no_grad():
        # Untrained rows may be likely, and are still no tokens.
        student.get_output_embeddings().weight[97:] *= 20
        teacher.get_output_embeddings().weight[97:] *= 20
    before = copy.deepcopy(student)
    trainer.train()
    ((sources,), _, written), *_ = texts
    assert max(id for ids in written for id in ids) < 97
    expected = plain_numbers(
        before, teacher, list(zip(sources, written, strict=True)), gold_pairs(rows), common=97, **settings
    )
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)


def test_another_end_of_text_is_warned_of(tmp_path, caplog):
    teacher_tokenizer = make_tokenizer()
    teacher_tokenizer.eos_token = "w96"
    with caplog.at_level("WARNING", logger="encdec_slm"):
        make_trainer(tmp_path, arguments={"teacher_processing_class": teacher_tokenizer})
    assert "The student ends its texts with '</s>' and the teacher with 'w96'" in caplog.text
